"""Norms of layers on fake CUDA: a step that measures them reads and waits for nothing."""

from pathlib import Path

from support.fake_cuda import layer_checks
from support.fake_cuda.process import needs_compiler, run_check
from support.fake_cuda.step_checks import Observed

pytestmark = needs_compiler


# One test for all findings: pytest-xdist would take the steps in every process that runs a test.
def test_steps_with_norms_of_layers_do_not_wait_for_the_device(tmp_path: Path) -> None:
    found = run_check(layer_checks.steps_with_norms, str(tmp_path))
    planted = [Observed(*step) for step in found.pop("plant")]
    assert set(found) == set(layer_checks.CHECKED)
    for name, steps in found.items():
        for step in (Observed(*values) for values in steps):
            assert (step.copies, step.reads, step.waits, step.races) == ([], [], [], []), name
    # Shows that the check above can fail.
    assert all(len(step.reads) > 10 for step in planted)
