"""The arithmetic of a switch, on plain tensors or one rank's shards of them."""

import torch
from torch import Tensor

from switchtitan.distributed.shards import Runs, copy_all_


def fold_into_weight_(
    weight: Tensor,
    counterparts_a: Tensor,
    counterparts_b: Tensor,
    change_a: Tensor,
    change_b: Tensor,
    scale: float,
) -> None:
    """Moves what a switch takes from B A into the frozen weight, so that the layer's output does not change.

    Keeps W + s B A constant: W += s (B[:, I] (A_old - A_new)[I] + (B_old - B_new)[:, J] A[J]), one update of rank 2k
    (SwitchLoRA, arXiv 2406.06564, Algorithm 1; both sides at once, since the rows I and the columns J are disjoint).

    Args:
        weight: [out, in], changed in place. A shard [out/ranks, in] works the same.
        counterparts_a: [k, in], A's rows J, whole on every rank.
        counterparts_b: [out, k], B's columns I, on the same rows as `weight`.
        change_a: [k, in], A_old - A_new in rows I, whole on every rank.
        change_b: [out, k], B_old - B_new in columns J, on the same rows as `weight`.
    """
    left = torch.cat([counterparts_b, change_b], dim=1)
    right = torch.cat([change_a, counterparts_a], dim=0)
    weight.addmm_(left, right, alpha=scale)


def take_columns(matrix: Tensor, runs: Runs) -> Tensor:
    """A copy of the columns in `runs`, [rows, wanted]."""
    return torch.cat([matrix[:, run.start : run.stop] for run in runs], dim=1)


def column_views(matrix: Tensor, runs: Runs) -> list[Tensor]:
    """The columns in `runs`, one view for each run."""
    return [matrix[:, run.start : run.stop] for run in runs]


def split_columns(columns: Tensor, runs: Runs) -> list[Tensor]:
    """`columns` [rows, wanted] cut as `runs` are."""
    return list(columns.split([len(run) for run in runs], dim=1))


def write_columns_(matrices: list[Tensor], runs: list[Runs], columns: list[Tensor]) -> None:
    """Writes `columns[i]` [rows, wanted] to the columns `runs[i]` of `matrices[i]`, all in few kernels."""
    copy_all_(
        [
            view
            for matrix, wanted in zip(matrices, runs, strict=True)
            for view in column_views(matrix, wanted)
        ],
        [
            part
            for values, wanted in zip(columns, runs, strict=True)
            for part in split_columns(values, wanted)
        ],
    )
