"""On CUDA a switch launches one fold per layer and a few other kernels."""

from pathlib import Path

import pytest
from support.fake_cuda import checks
from support.fake_cuda.process import needs_compiler, run_check

pytestmark = needs_compiler

LINEARS_PER_BLOCK = 7
MOST_OTHER_KERNELS = 60
DEEP = ("--model.num_layers", "4")
VARIANTS = {
    "stored": [],
    "wide": ["--model.hidden_size", "48", "--model.intermediate_size", "56", "--method.rank", "12"],
    "bf16": ["--method.candidates_dtype", "bfloat16"],
    "constant": ["--method.candidates", "constant"],
    "host": ["--method.candidates_device", "host"],
    "replicated": ["--parallelism.frozen_weights", "replicate"],
}


@pytest.mark.slow
def test_only_folds_grow_with_the_number_of_layers(tmp_path: Path) -> None:
    cases = {
        f"{variant}, {depth}": [*settings, *keys, "--model.num_kv_heads", "2"]
        for variant, settings in VARIANTS.items()
        for depth, keys in {"shallow": (), "deep": DEEP}.items()
    }
    kernels = run_check(checks.kernels_of_switches, str(tmp_path), cases, 2, 0)
    for variant in VARIANTS:
        others = []
        for depth, num_blocks in {"shallow": 2, "deep": 4}.items():
            counts = kernels[f"{variant}, {depth}"]
            assert counts["addmm_"] == num_blocks * LINEARS_PER_BLOCK, counts
            assert not any("slow" in operation for operation in counts), counts
            others.append(sum(counts.values()) - counts["addmm_"])
        shallow, deep = others
        # A launch takes 64 pairs of tensors or 110 tensors; a layer adds at most 12 pairs and 4
        # tensors.
        assert 0 <= deep - shallow <= 2 * LINEARS_PER_BLOCK / 4, variant
        assert deep <= MOST_OTHER_KERNELS, (variant, counts)
