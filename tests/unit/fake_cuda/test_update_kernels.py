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
MOST_EAGER_KERNELS = 50


def test_the_update_of_336_factors_takes_at_most_12_kernels(tmp_path: Path) -> None:
    """7 for copies of gradients, 64 a launch, 1 that counts steps, and 3 that are compiled."""
    cases = {"compiled": DEEP + COMPILED, "eager": DEEP}
    kernels = run_check(checks.kernels_of_updates, str(tmp_path), cases, 8, 7)
    for name, most in {"compiled": MOST_KERNELS, "eager": MOST_EAGER_KERNELS}.items():
        assert not any("slow" in operation for operation in kernels[name]), kernels
        assert sum(kernels[name].values()) <= most, kernels
    assert kernels["compiled"]["compiled"] == 3


def test_uneven_shards_are_copied(tmp_path: Path) -> None:
    """FSDP pads the last rank's shard, so shards are not next to each other: two more copies."""
    uneven = ["--method.rank", "7", *COMPILED]
    kernels = run_check(checks.kernels_of_updates, str(tmp_path), {"uneven": uneven}, 4, 3)
    assert kernels["uneven"]["_foreach_copy_ fast"] == 3 * 3, kernels
    assert not any("slow" in operation for operation in kernels["uneven"]), kernels
