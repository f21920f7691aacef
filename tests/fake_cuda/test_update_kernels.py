"""On CUDA the update of all factors launches a few kernels, however deep the model is."""

from pathlib import Path

from support.fake_cuda import checks
from support.fake_cuda.process import needs_compiler, run_check

pytestmark = needs_compiler

# The structure of the 350M model: 168 layers, 336 factors of two widths.
DEEP = [
    "--training.global_batch_size",
    "16",
    "--model.num_layers",
    "24",
    "--model.num_kv_heads",
    "2",
    "--method.rank",
    "8",
]
COMPILED = ["--compile.optimizer", "true"]
MOST_KERNELS = 12
MOST_EAGER_KERNELS = 60


def test_the_update_of_336_factors_takes_at_most_12_kernels(tmp_path: Path) -> None:
    """7 for copies of gradients, 64 a launch, 1 that counts steps, and 3 that are compiled."""
    kernels = run_check(checks.kernels_of_updates, str(tmp_path), {"350M": DEEP + COMPILED}, 8, 7)
    counts = kernels["350M"]
    assert not any("slow" in operation for operation in counts), counts
    assert sum(counts.values()) <= MOST_KERNELS, counts
    assert counts["compiled"] == 3


def test_uneven_shards_are_copied(tmp_path: Path) -> None:
    """FSDP pads the last rank's shard, so shards are not next to each other: two more copies."""
    uneven = ["--method.rank", "7"]
    cases = {"uneven": uneven + COMPILED, "eager": uneven}
    kernels = run_check(checks.kernels_of_updates, str(tmp_path), cases, 4, 3)
    for counts in kernels.values():
        # Of three widths: gradients and factors in, factors out.
        assert counts["_foreach_copy_ fast"] == 3 * 3, counts
        assert not any("slow" in operation for operation in counts), counts
    assert sum(kernels["eager"].values()) <= MOST_EAGER_KERNELS, kernels
