"""Many ranks fit the usual limits of open files, or are refused before they connect."""

import os
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from switchtitan.distributed.limits import num_open_files, raise_file_limit
from switchtitan.errors import EnvironmentMismatchError

REPOSITORY = Path(__file__).parents[3]


def test_512_gpus_need_the_documented_number_of_files() -> None:
    assert num_open_files(512, "cuda") == 1122
    assert "512 GPU ranks need 1122 files" in (REPOSITORY / "docs" / "MULTINODE.md").read_text()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_512_ranks_need_less_than_the_usual_hard_limit(device: str) -> None:
    assert num_open_files(512, device) < 4096


@pytest.mark.parametrize("hard", [4096, resource.RLIM_INFINITY])
@pytest.mark.parametrize(
    ("soft", "is_raised"), [(1024, True), (2048, False), (resource.RLIM_INFINITY, False)]
)
def test_a_soft_limit_is_raised_to_what_is_needed(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, is_raised: bool
) -> None:
    limits: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, values: limits.append(values))
    raise_file_limit(512, "cuda")
    assert limits == [(1122, hard)] * is_raised


def test_a_hard_limit_that_is_too_low_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (512, 1024))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, values: None)
    raise_file_limit(300, "cpu")
    with pytest.raises(EnvironmentMismatchError, match=r"400 ranks need \d+ open files .* is 1024"):
        raise_file_limit(400, "cpu")


def test_512_fake_ranks_build_and_step_with_1024_open_files(tmp_path: Path) -> None:
    script = """
        import resource, sys
        from pathlib import Path
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
        from support.tiny import tiny_config
        from switchtitan.benchmark.steppers import fake_stepper
        batch = ["--training.global_batch_size", "512", "--training.local_batch_size", "1"]
        config = tiny_config(Path(sys.argv[1]), "switchlora", *batch, num_ranks=512)
        with fake_stepper(config, 512) as stepper:
            stepper.step()
        print("stepped")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout == "stepped\n", done.stderr
