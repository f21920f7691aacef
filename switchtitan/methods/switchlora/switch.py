"""The arithmetic of a switch, on plain tensors or one rank's shards of them."""

from torch import Tensor

from switchtitan.methods.lowrank.rounding import Rounding, add_product_


def fold_into_weight_(
    weight: Tensor,
    vectors_a: Tensor,
    vectors_b: Tensor,
    scale: float,
    rounding: Rounding | None = None,
) -> None:
    """Moves what a switch takes from B A into the frozen weight, so that the layer's output does not change.

    Keeps W + s B A constant: W += s (B[:, I] (A_old - A_new)[I] + (B_old - B_new)[:, J] A[J]), one update of rank 2k for
    vectors I of A and J of B, which are disjoint (SwitchLoRA, arXiv 2406.06564, Algorithm 1).

    Args:
        weight: [out, in], changed in place. A shard [out/ranks, in] works the same.
        vectors_a: [2k, in], full rows on every rank: A_old - A_new in rows I, then A's rows J.
        vectors_b: [2k, out], or the columns that belong to the shard's rows: B's rows I, then B_old - B_new in rows J.
        rounding: for a weight in bf16; the layer's output is then unchanged on average.
    """
    add_product_(weight, vectors_b.t(), vectors_a, scale, rounding)
