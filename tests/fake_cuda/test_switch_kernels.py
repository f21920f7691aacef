"""On CUDA a switch launches one fold per layer and a few other kernels."""

from pathlib import Path

import pytest
from support.fake_cuda import checks, step_checks
from support.fake_cuda.process import needs_compiler, run_check

pytestmark = needs_compiler

LINEARS_PER_BLOCK = 7
MOST_OTHER_KERNELS = 60
VARIANTS = {
    "bf16": ["--method.candidates_dtype", "bfloat16"],
    "host": ["--method.candidates_device", "host"],
    "replicated": ["--parallelism.frozen_weights", "replicate"],
}
# Real widths, since torch cuts lists of tensors into launches by their sizes.
LARGE = "train_configs/llama_350m_switchlora.toml"
NUM_LARGE_LAYERS = 24 * LINEARS_PER_BLOCK
LARGE_VARIANTS = {"stored": [], "constant": ["--method.candidates", "constant"]}


@pytest.mark.parametrize("variant", LARGE_VARIANTS)
def test_a_switch_of_350m_on_8_ranks_takes_few_kernels(
    large: dict[str, dict[str, int]], variant: str
) -> None:
    counts = large[variant]
    assert counts["addmm_"] == NUM_LARGE_LAYERS, counts
    assert not any("slow" in operation for operation in counts), counts
    assert sum(counts.values()) <= NUM_LARGE_LAYERS + MOST_OTHER_KERNELS, counts


@pytest.fixture(scope="module")
def large() -> dict[str, dict[str, int]]:
    return run_check(step_checks.kernels_of_file, LARGE, LARGE_VARIANTS, 8, 0)


def test_only_folds_grow_with_the_number_of_layers(tmp_path: Path) -> None:
    cases = {
        f"{variant}, {num_blocks}": [*settings, "--model.num_layers", str(num_blocks)]
        for variant, settings in VARIANTS.items()
        for num_blocks in (1, 3)
    }
    kernels = run_check(checks.kernels_of_switches, str(tmp_path), cases, 2, 0)
    for variant in VARIANTS:
        others = []
        for num_blocks in (1, 3):
            counts = kernels[f"{variant}, {num_blocks}"]
            assert counts["addmm_"] == num_blocks * LINEARS_PER_BLOCK, counts
            assert not any("slow" in operation for operation in counts), counts
            others.append(sum(counts.values()) - counts["addmm_"])
        shallow, deep = others
        # A launch takes 64 pairs of tensors or 110 tensors; a layer adds at most 12 pairs and 4
        # tensors.
        assert 0 <= deep - shallow <= 2 * LINEARS_PER_BLOCK / 4, variant
        assert deep <= MOST_OTHER_KERNELS, (variant, counts)
