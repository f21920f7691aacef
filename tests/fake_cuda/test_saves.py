"""A background save on fake CUDA: the host waits once for all copies, and reads none before."""

from pathlib import Path

from support.fake_cuda import save_checks
from support.fake_cuda.process import needs_compiler, run_check
from support.fake_cuda.step_checks import Observed

pytestmark = needs_compiler


# One test for all findings: pytest-xdist would observe the saves in every process that runs a test.
def test_the_host_waits_once_for_all_copies(tmp_path: Path) -> None:
    found = run_check(save_checks.saves, str(tmp_path))
    assert found.keys() == set(save_checks.SAVED)
    for case, by_mistake in found.items():
        for save in ("first", "second"):
            check_parts(
                {
                    mistake: {
                        part: Observed(*of_save[f"{save} {part}"]) for part in save_checks.PARTS
                    }
                    for mistake, of_save in by_mistake.items()
                },
                num_copies_of_search=1 if "host candidates" in case else 0,
            )
        memory = by_mistake["none"]
        # Replicas share the work: some of the matrices of a storage are saved here.
        assert memory["storages"] > memory["share"]
        assert 0 <= memory["copies"] - memory["share"] < 16 * memory["num_tensors"]


def check_parts(observed: dict[str, dict[str, Observed]], num_copies_of_search: int) -> None:
    """Checks a save without and with mistakes: mistake -> part of the save -> what it does."""
    right = observed["none"]
    for part in ("share", "copy", "write", "step"):
        assert right[part].copies == right[part].reads == right[part].races == [], part
    assert right["copy"].waits == ["Stream.synchronize"]
    # Values that are not finite: all tensors in host memory are copied to the device together.
    assert len(right["search"].copies) == num_copies_of_search, right["search"].copies

    assert observed["no wait"]["copy"].waits == []
    assert any("clone reads on the host" in race for race in observed["no wait"]["write"].races)
    assert observed["pageable"]["copy"].copies
