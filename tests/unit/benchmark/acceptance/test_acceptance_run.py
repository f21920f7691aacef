"""An acceptance continues after a failed step, and reports what failed and why."""

import json
import sys
import time
from pathlib import Path

import pytest

from switchtitan.benchmark.acceptance.__main__ import accept, chosen_steps, main
from switchtitan.benchmark.acceptance.machine import Machine
from switchtitan.benchmark.acceptance.steps import STEPS, Place, Step
from switchtitan.errors import ConfigError

CARD = Machine("ACME G100 80GB", 1, 79.2, {"torch": "2.0"})


def place_in(folder: Path, machine: Machine = CARD) -> Place:
    return Place(machine, folder, folder / "logs")


def step(name: str, program: str, **keys: object) -> Step:
    return Step(name, f"runs {name}", lambda place: [[sys.executable, "-c", program]], **keys)


def run(folder: Path, *steps: Step) -> tuple[dict, str]:
    """Runs the steps; returns the JSON's steps by name, and the page."""
    accept(steps, place_in(folder), folder / "gpu", "acceptance")
    record = json.loads((folder / "gpu" / "acme_g100_80gb.json").read_text())
    page = (folder / "gpu" / "acme_g100_80gb.md").read_text()
    return {result["name"]: result for result in record["steps"]}, page


def test_steps_after_a_failed_one_still_run(tmp_path: Path) -> None:
    results, page = run(
        tmp_path,
        step("first", "print('well')"),
        step("second", "print('the cause'); raise SystemExit(3)"),
        step("third", "print('also well')"),
    )
    assert [result["status"] for result in results.values()] == ["passed", "failed", "passed"]
    assert results["second"]["reason"] == "exit status 3"
    assert results["second"]["tail"][-1] == "the cause"
    assert "the cause" in Path(results["second"]["log"]).read_text()
    assert "1 of 3 steps failed" in page
    assert "## second failed" in page
    assert "the cause" in page
    assert "also well" not in page


def test_a_step_stops_at_its_first_failed_program(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    programs = [
        [sys.executable, "-c", "raise SystemExit(1)"],
        [sys.executable, "-c", f"open({str(marker)!r}, 'w')"],
    ]
    run(tmp_path, Step("two", "", lambda place: programs))
    assert not marker.exists()


def test_a_step_that_runs_too_long_is_ended_with_its_children(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    child = f"import time; time.sleep(3); open({str(marker)!r}, 'w')"
    program = (
        "import subprocess, sys, time; "
        f"subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    )
    results, _ = run(tmp_path, step("slow", program, timeout_s=1.0), step("next", "print('well')"))
    assert results["slow"]["reason"] == "it ran past its time limit"
    assert results["next"]["status"] == "passed"
    time.sleep(3)
    assert not marker.exists()


def test_a_missing_program_or_result_fails_the_step(tmp_path: Path) -> None:
    def read(place: Place) -> tuple[dict, list[str]]:
        return json.loads((place.folder / "no.json").read_text()), []

    results, _ = run(
        tmp_path,
        Step("absent", "", lambda place: [["/no/such/program"]]),
        step("silent", "pass", read=read),
    )
    assert "/no/such/program cannot be started" in results["absent"]["reason"]
    assert results["silent"]["status"] == "failed"
    assert "its results cannot be read: FileNotFoundError" in results["silent"]["reason"]


@pytest.mark.parametrize("contents", ["{", "[]", "null", "3", '{"num_ranks": "1"}'])
def test_unexpected_results_fail_the_step(tmp_path: Path, contents: str) -> None:
    run_folder = tmp_path / "logs" / "flex" / "llama_350m_switchlora"
    run_folder.mkdir(parents=True)
    (run_folder / "results.json").write_text(contents)
    read = next(known.read for known in STEPS if known.name == "flex")
    results, _ = run(tmp_path, step("flex", "pass", read=read), step("next", "pass"))
    assert results["flex"]["status"] == "failed"
    assert "its results cannot be read" in results["flex"]["reason"]
    assert results["next"]["status"] == "passed"


def test_tests_of_which_none_passes_fail_the_step(tmp_path: Path) -> None:
    read = next(known.read for known in STEPS if known.name == "gpu_tests")
    file = tmp_path / "test_gpus.py"
    report = tmp_path / "logs" / "gpu_tests" / "junit.xml"
    (tmp_path / "pytest.ini").write_text("[pytest]\n")

    def tests(*bodies: str) -> Step:
        lines = ["import pytest"]
        lines += [f"def test_{number}(): {body}" for number, body in enumerate(bodies)]
        file.write_text("\n".join(lines))
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", str(file)]
        return Step("gpu_tests", "", lambda place: [command], read)

    skipped = "pytest.skip('no GPU')"
    results, page = run(tmp_path, tests("pass", "pass", skipped))
    assert results["gpu_tests"]["figures"] == {"passed": 2, "skipped": 1}
    assert "2 passed, 1 skipped" in page
    results, _ = run(tmp_path, tests(skipped, skipped))
    assert results["gpu_tests"]["status"] == "failed"
    assert "no test passed, 2 were skipped" in results["gpu_tests"]["reason"]


def test_a_step_that_cannot_run_here_is_skipped_with_its_reason(tmp_path: Path) -> None:
    results, page = run(tmp_path, step("absent", "", obstacle=lambda place: "no package"))
    assert results["absent"]["status"] == "skipped"
    assert "| absent | skipped: no package |" in page
    assert "No step failed." in page


def test_without_a_gpu_it_ends_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--output", str(tmp_path / "gpu"), "--logs", str(tmp_path / "logs")], lambda: None)
    assert stopped.value.code == 2
    assert "no GPU that torch can use is visible" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_status_is_1_if_a_step_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = (step("good", "pass"), step("bad", "raise SystemExit(1)"))
    monkeypatch.setattr("switchtitan.benchmark.acceptance.__main__.STEPS", steps)
    given = ["--output", str(tmp_path / "gpu"), "--logs", str(tmp_path / "logs")]
    main([*given, "--steps", "good"], lambda: CARD)
    with pytest.raises(SystemExit) as stopped:
        main(given, lambda: CARD)
    assert stopped.value.code == 1


def test_unknown_steps_are_refused() -> None:
    assert [step.name for step in chosen_steps(STEPS, "switch, train")] == ["train", "switch"]
    with pytest.raises(ConfigError, match="--steps trane: no step 'trane'; expected some of"):
        chosen_steps(STEPS, "trane")
