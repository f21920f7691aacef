"""`./run_train.sh` as a user runs it: it trains, resumes, and prints one message for a mistake."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from support.tiny import METHOD_KEYS, TINY

from switchtitan.cli import train
from switchtitan.distributed.world import stop_world
from switchtitan.observability import configure_logging

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def destroy_leftover_world() -> Iterator[None]:
    """Destroys the process group of a run in this process that ended with an error."""
    yield
    stop_world()


def run_train(
    environment: dict[str, str], folder: Path, *arguments: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs the script in `folder`, with standard output and error combined."""
    return subprocess.run(
        [str(REPOSITORY / "run_train.sh"), *arguments],
        cwd=folder,
        env=environment | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )


def write_config(folder: Path, method: str = "switchlora", run: str = "run") -> Path:
    """Writes a tiny run's configuration with the output folder `folder/run`."""
    folder.mkdir(parents=True, exist_ok=True)
    text = TINY.format(folder=folder, method=method, method_keys=METHOD_KEYS[method])
    file = folder / f"{method}.toml"
    file.write_text(
        text.replace("steps = 40", "steps = 6")
        .replace("interval = 20", "interval = 3")
        .replace('/run"', f'/{run}"')
    )
    return file


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Returns the modification time and the bytes of every file in `folder`."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_a_run_trains_and_resumes_with_more_steps_on_one_rank_and_on_two(
    environment: dict[str, str], corpora: Path
) -> None:
    folder = corpora / "a user's folder"
    config = write_config(folder)
    watch = [
        "--metrics.tensorboard",
        "true",
        "--profiler.enabled",
        "true",
        "--profiler.start_step",
        "3",
    ]
    output = folder / "run"

    first = run_train(environment, folder, "--config", str(config), *watch)
    assert first.returncode == 0, first.stdout
    assert "starting a new run in" in first.stdout
    for label in (
        "validation loss",
        "perplexity",
        "tokens/s",
        "checkpoint",
        "logs",
        "profile trace",
        "tensorboard",
    ):
        assert label in first.stdout
    assert (output / "checkpoints" / "step-000000006" / "metadata.json").is_file()
    assert list((output / "tensorboard").glob("events.out.tfevents.*"))
    assert list((output / "tensorboard").glob("*.pt.trace.json"))
    assert "Traceback" not in first.stdout

    second = run_train(environment, folder, "--config", str(config), "--training.steps", "12")
    assert second.returncode == 0, second.stdout
    assert f"resuming from {output}/checkpoints/step-000000006" in second.stdout
    assert (output / "checkpoints" / "step-000000012").is_dir()

    count = ["--metrics.communication", "true"]
    third = run_train(
        environment, folder, "--config", str(config), "--training.steps", "18", *count, NGPU="2"
    )
    assert third.returncode == 0, third.stdout
    assert third.stdout.count(f"resuming from {output}/checkpoints/step-000000012") == 1
    assert third.stdout.count("MiB in step 15") == 1
    assert json.loads((output / "results.json").read_text())["communication/mib_per_step"] > 0
    assert (output / "checkpoints" / "step-000000018").is_dir()


@pytest.mark.parametrize(("number", "num_ranks"), [(signal.SIGTERM, "1"), (signal.SIGINT, "2")])
def test_a_stopped_run_exits_with_a_message_and_resumes_from_its_newest_checkpoint(
    environment: dict[str, str], corpora: Path, number: signal.Signals, num_ranks: str
) -> None:
    folder = corpora / f"stopped-{number.name}"
    arguments = ["--config", str(write_config(folder)), "--checkpoint.async_save", "true"]
    # Stops the complete job, including the loader's worker.
    arguments += ["--data.num_workers", "1"]
    checkpoints, output = folder / "run" / "checkpoints", folder / "output.txt"
    with output.open("w") as printed:
        run = subprocess.Popen(
            [str(REPOSITORY / "run_train.sh"), *arguments, "--training.steps", "100000"],
            cwd=folder,
            env=environment | {"NGPU": num_ranks},
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        while not list(checkpoints.glob("step-*")):
            assert run.poll() is None, output.read_text()
            time.sleep(0.05)
        second = run_train(environment | {"NGPU": num_ranks}, folder, *arguments)
        os.killpg(run.pid, number)
        status = run.wait(timeout=600)
    assert second.returncode == 2, second.stdout
    assert "trains in this folder; wait until it ends, or stop it" in second.stdout
    assert "Traceback" not in second.stdout
    said = output.read_text()
    assert status == 128 + number, said
    assert not (folder / "run" / "run.lock").exists()
    assert "stopping after this step" in said
    assert "Traceback" not in said
    newest = max(checkpoints.glob("step-*"))
    assert f"the same command resumes from {newest}" in said
    step = int(newest.name.removeprefix("step-"))
    resumed = run_train(environment, folder, *arguments, "--training.steps", str(step + 3))
    assert resumed.returncode == 0, resumed.stdout
    assert f"resuming from {newest}" in resumed.stdout


@pytest.fixture(scope="module")
def finished(corpora: Path) -> Path:
    """The configuration of a finished run; bad input must not change its folder."""
    config = write_config(corpora / "finished")
    train.main(["--config", str(config)])
    configure_logging(
        is_main=True
    )  # closes the run's log file, which the end of the process would do
    return config


ELSEWHERE = ["--job.output_dir", "another/run"]
NO_CORPUS_YET = ["--data.cache_dir", "no_corpora"]

MISTAKES = {
    "a misspelt key": (
        ["--training.step", "9"],
        ["--training.step 9: unknown key; did you mean steps?"],
    ),
    "a misspelt section": (
        ["--trainning.steps", "9"],
        ["--trainning.steps 9", "did you mean", "training"],
    ),
    "a misspelt choice": (
        ["--method.decay", "sigmoidal"],
        ["--method.decay sigmoidal", 'did you mean "sigmoid"'],
    ),
    "a wrong type": (["--training.steps", "many"], ["--training.steps many: expected an integer"]),
    "a rank as large as a layer": (
        ["--method.rank", "10"],
        ["[method] rank = 10", "a rank of at most 9"],
    ),
    "rank 1": (["--method.rank", "1"], ["[method]", "rank = 1 never switches", "at least 2"]),
    "an interval within the freeze": (
        ["--method.interval", "3"],
        ["interval = 3", "2 * freeze_steps = 4"],
    ),
    "a batch that does not divide": (
        ["--training.global_batch_size", "7"],
        ["[training] global_batch_size = 7", "write 6 or 8"],
    ),
    "a sequence longer than the corpus": (
        ["--data.seq_len", "900000", "--evaluation.tokens", "900000", *ELSEWHERE],
        ["[data] seq_len = 900000", "fewer than the 900,001", "lower seq_len"],
    ),
    "a batch larger than the corpus": (
        ["--training.global_batch_size", "900000", *ELSEWHERE],
        ["[training] global_batch_size = 900000", "fewer than one global batch"],
    ),
    "a missing file": (["--config", "missing.toml"], ["missing.toml: no such file"]),
    "a missing corpus": (
        ["--data.dataset", "text", "--data.path", "no/such/books"],
        ["[data] path = ", "no/such/books", "no such file or folder"],
    ),
    "a missing tokenizer": (
        ["--data.tokenizer", "no/such/tokenizer.json", "--data.vocab_size", "none"],
        ["[data] tokenizer = ", "no/such/tokenizer.json", "expected a tokenizer.json"],
    ),
    "a vocabulary larger than the model's": (
        ["--data.vocab_size", "300"],
        ["[data] vocab_size = 300", "[model] vocab_size = 271"],
    ),
    "another model's checkpoint": (
        ["--model.intermediate_size", "30"],
        [
            "belongs to another run",
            "model.intermediate_size: saved with 28, now 30",
            "[job] output_dir",
        ],
    ),
    "another rank's checkpoint": (["--method.rank", "5"], ["method.rank: saved with 6, now 5"]),
    "another corpus's checkpoint": (
        ["--data.max_bytes", "150000"],
        ["corpus.name: saved with 'pystdlib-"],
    ),
    "flash_attn on a CPU": (
        ["--model.attention", "flash_attn"],
        ["[model] attention = 'flash_attn'", "CUDA"],
    ),
    "another run's folder": (
        ["--checkpoint.resume", "never"],
        ["[checkpoint] resume = 'never'", "already holds 2 checkpoints", "set resume = 'auto'"],
    ),
    "a missing checkpoint": (
        ["--checkpoint.resume", "no/such/run", *NO_CORPUS_YET, *ELSEWHERE],
        ["[checkpoint] resume = 'no/such/run'", "no such folder"],
    ),
    "missing initial weights": (
        ["--checkpoint.initial_weights", "no/such/weights", *NO_CORPUS_YET, *ELSEWHERE],
        ["[checkpoint] initial_weights = 'no/such/weights'", "no such file or folder"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_message_and_changes_nothing(
    mistake: str,
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments, expected = MISTAKES[mistake]
    monkeypatch.chdir(tmp_path)
    before = contents(finished.parent)
    file = [] if "--config" in arguments else ["--config", str(finished)]
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        train.main([*file, *arguments])
    assert stopped.value.code == 2
    said = capsys.readouterr()
    assert said.err.count("error: ") == 1
    assert "Traceback" not in said.out + said.err
    for part in expected:
        assert part in said.err
    assert contents(finished.parent) == before
    assert not list(tmp_path.iterdir())


def test_another_methods_checkpoint_is_refused(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(finished.parent, "lora")
    before = contents(finished.parent)
    with pytest.raises(SystemExit) as stopped:
        train.main(["--config", str(config)])
    assert stopped.value.code == 2
    assert "method.name: saved with 'switchlora', now 'lora'" in capsys.readouterr().err
    # Threads still active at interpreter exit could abort the process instead.
    assert not dist.is_initialized()
    assert contents(finished.parent) == before


def test_a_mistake_in_a_file_is_named_by_section_key_and_value(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "job.toml"
    config.write_text(finished.read_text().replace("warmup_steps = 3", "warm_up_steps = 3"))
    with pytest.raises(SystemExit) as stopped:
        train.main(["--config", str(config)])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "[lr_schedule] warm_up_steps = 3: unknown key; did you mean warmup_steps?" in message
    assert str(config) in message


@pytest.mark.parametrize("num_ranks", ["1", "2"])
def test_a_misspelt_key_ends_the_script_with_status_2(
    environment: dict[str, str], finished: Path, num_ranks: str
) -> None:
    before = contents(finished.parent)
    done = run_train(
        environment,
        finished.parent,
        "--config",
        str(finished),
        "--training.step",
        "9",
        NGPU=num_ranks,
    )
    assert done.returncode == 2
    assert done.stdout.splitlines() == [
        "error: invalid configuration (1 error)",
        "on the command line:",
        "  --training.step 9: unknown key; did you mean steps?",
    ]
    assert contents(finished.parent) == before


def test_two_ranks_print_once_that_a_checkpoint_belongs_to_another_run(
    environment: dict[str, str], finished: Path
) -> None:
    before = contents(finished.parent)
    arguments = ["--config", str(finished), "--model.intermediate_size", "30"]
    done = run_train(environment, finished.parent, *arguments, NGPU="2")
    assert done.returncode == 2
    assert done.stdout.count("model.intermediate_size: saved with 28, now 30") == 1
    assert "Traceback" not in done.stdout
    assert contents(finished.parent) == before


def test_an_unreachable_hub_is_an_error_unless_an_offline_corpus_is_named(
    environment: dict[str, str], finished: Path, tmp_path: Path
) -> None:
    arguments = ["--config", str(finished), "--data.dataset", "c4", "--data.tokenizer", "t5-base"]
    arguments += ["--data.vocab_size", "none", "--model.vocab_size", "32100"]
    arguments += ["--job.output_dir", "outputs/c4", "--data.cache_dir", "corpora"]
    done = run_train(
        environment, tmp_path, *arguments, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hub")
    )
    assert done.returncode == 2, done.stdout
    assert "Traceback" not in done.stdout
    assert "[data] dataset = 'c4', tokenizer = 't5-base': the Hugging Face hub" in done.stdout
    assert "offline_dataset" in done.stdout
    assert not (tmp_path / "outputs").exists()
