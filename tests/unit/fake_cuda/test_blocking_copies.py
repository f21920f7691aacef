"""No method's step makes the host wait: fake CUDA tensors show no blocking copy."""

from pathlib import Path

import pytest
from support.fake_cuda import checks
from support.fake_cuda.process import needs_compiler, run_check
from support.tiny import METHOD_KEYS

pytestmark = needs_compiler

ON_HOST = ("--method.candidates_device", "host")
REPLICATED = ("--parallelism.frozen_weights", "replicate")
# A reset, or a new basis, every second step.
RESETS = ("--method.reset_interval", "2", "--method.restart_warmup_steps", "1")
CASES = {method: [method] for method in METHOD_KEYS} | {
    "bf16 candidates": ["switchlora", "--method.candidates_dtype", "bfloat16"],
    "constant candidates": ["switchlora", "--method.candidates", "constant"],
    "candidates on the host": ["switchlora", *ON_HOST],
    "replicated": ["switchlora", *REPLICATED],
    "bf16 moments": ["full_rank", "--optimizer.moments_dtype", "bfloat16"],
    "bf16 moments of others": ["switchlora", "--optimizer.moments_dtype", "bfloat16"],
    "bf16 weights": ["switchlora", "--training.frozen_dtype", "bfloat16"],
    "replicas": ["switchlora", "--parallelism.replicate", "2"],
    "resets": ["relora", *RESETS],
    "random resets": ["relora", *RESETS, "--method.reset_moments", "random"],
    # On a real device, `torch.linalg.eigh` makes the host wait inside its kernel when bases are
    # renewed. Fake tensors do not run it, so this case covers the rest of the step only.
    "bases": ["galore", "--method.update_interval", "2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 3])
def test_no_step_of_any_method_makes_the_host_wait(tmp_path: Path, rank: int) -> None:
    found = run_check(checks.blocking_copies, str(tmp_path), CASES, 4, rank)
    assert found.keys() == CASES.keys()
    # Writes vectors of the step before the last, already copied to the host, to their buffers.
    waits = found["candidates on the host"].pop("waits")
    assert set(waits) == {"Event.synchronize"}
    assert len(waits) <= checks.NUM_STEPS
    assert {name: case for name, case in found.items() if any(case.values())} == {}


def test_blocking_copies_are_found(tmp_path: Path) -> None:
    found = run_check(checks.planted_blocking_copies, str(tmp_path))
    assert {name for name, copies in found.items() if copies} == {
        "number",
        "number at indices",
        "pageable",
        "blocking",
        "indices",
        "back",
    }
    assert found.keys() - {"fill", "page-locked"} == {
        name for name, copies in found.items() if copies
    }
