"""What a run resumes from, what may change meanwhile, and what it says about that."""

import json
import math
import os
import shutil

import pytest
import torch
from support.checkpoints import refused
from support.commands import run
from support.comparisons import GRID, LR, result_of, write_grid
from support.tensors import differing
from support.tiny import full_tensors, ready_trainer, tiny_config, tiny_trainer, train_steps
from support.trained import train_and_save

from switchtitan.checkpoint.load import check_same_run
from switchtitan.distributed import dtype as compute_dtype
from switchtitan.distributed.dtype import Bf16Support
from switchtitan.distributed.initial import plain_value
from switchtitan.errors import CheckpointError, ConfigError, CorpusError
from switchtitan.methods import factors
from switchtitan.training.describe import completed_identity, run_identity
from switchtitan.workbench.comparison.comparison import Comparison, check_plan, follow
from switchtitan.workbench.comparison.config import load_comparison
from switchtitan.workbench.comparison.runs import config_sha256, plan_run, write_csv


def identity(folder, method, *overrides):
    return run_identity(tiny_config(folder, method, *overrides))


DETERMINING = [
    ("--job.seed", "7"),
    ("--data.seq_len", "8"),
    ("--data.max_bytes", "150000"),
    ("--data.max_documents", "9"),
    ("--training.global_batch_size", "16"),
    ("--method.rank", "5"),
    ("--method.interval", "8"),
    ("--model.rope_theta", "700"),
    ("--optimizer.name", "muon"),
]
FREE = [
    ("--optimizer.lr", "5e-3"),
    ("--training.steps", "50"),
    ("--training.local_batch_size", "4"),
    ("--method.candidates_device", "host"),
    ("--method.contraction", "merged"),
    ("--data.cache_dir", "elsewhere"),
    ("--data.validation_fraction", "0.02"),
]


def test_what_determines_the_meaning_of_tensors_and_data_must_be_equal(tmp_path):
    saved = identity(tmp_path, "switchlora")
    for key, value in DETERMINING:
        with refused(key.removeprefix("--"), value):
            check_same_run(saved, identity(tmp_path, "switchlora", key, value))
    keys = [word for change in FREE for word in change]
    check_same_run(saved, identity(tmp_path, "switchlora", *keys))


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"reset_moments": ...}, "method.reset_moments"),
        ({"gain": 2.0}, "method.gain"),
        ({"name": "lora"}, "method.name"),
        ({"rank": ...}, "method.rank"),
    ],
)
def test_a_key_that_only_a_checkpoint_has_or_lacks_is_refused_unless_it_has_its_default(
    tmp_path, change, part
):
    changed = tiny_config(tmp_path, "switchlora", "--method.reset_moments", "none")
    now = run_identity(changed)
    method = {key: value for key, value in (now["method"] | change).items() if value is not ...}
    with refused(part):
        check_same_run(completed_identity(now | {"method": method}, changed), now)
    if part == "method.reset_moments":  # it is newer than the checkpoint
        config = tiny_config(tmp_path, "switchlora")
        saved = completed_identity(now | {"method": method, "corpus": {}}, config)
        check_same_run(saved, run_identity(config))


def test_a_run_resumes_with_another_candidates_device_and_contraction(corpora):
    straight = tiny_trainer(corpora / "stays", "switchlora")
    expected = train_steps(straight, 9)
    straight.stepper.close()
    losses = []
    for device, contraction in (("device", "merged"), ("host", "factored"), ("device", "cheapest")):
        keys = ("--method.candidates_device", device, "--method.contraction", contraction)
        trainer = tiny_trainer(corpora / "moves", "switchlora", *keys)
        assert trainer.stepper.state.step == len(losses)
        losses += train_steps(trainer, 3)
        trainer.save()
        trainer.stepper.close()
    # Contractions agree up to rounding; Adam amplifies it where gradients are near zero.
    assert losses == pytest.approx(expected, rel=1e-5)


def test_a_resumed_run_warns_of_changed_keys_and_a_complete_one_writes_no_configuration(
    corpora, caplog
):
    folder, short = corpora / "changed-keys", ("--training.steps", "2")
    tiny_trainer(folder, "lora", *short).train()
    with caplog.at_level("INFO", logger="switchtitan"):
        tiny_trainer(folder, "lora", *short, "--optimizer.lr", "0.09").train()
    assert "training already complete: step 2" in caplog.text
    assert "optimizer.lr: 0.01 -> 0.09" in caplog.text
    config = folder / "run" / "config.toml"
    assert "lr = 0.01" in config.read_text()
    with caplog.at_level("INFO", logger="switchtitan"):
        tiny_trainer(folder, "lora", "--training.steps", "3").train()
    assert "\nsteps = 3\n" in config.read_text()
    levels = [line.levelname for line in caplog.records if "changed since" in line.getMessage()]
    assert levels == ["WARNING", "INFO"]  # to train longer is no reason for a warning
    words = "--training.steps 9 --lr_schedule.decay_ratio 0.9 --lr_schedule.warmup_steps 1"
    with caplog.at_level("INFO", logger="switchtitan"):
        tiny_trainer(folder, "lora", *words.split()).stepper.close()
    assert "share of the peak learning rate in step 3: 1 -> 0.9" in caplog.text


def rates_and_switches(folder, num_steps, *keys):
    """Trains and saves; returns each step's learning rate and number of switched vectors."""
    decay = ("--method.decay", "exponential", "--method.decay_ratio", "0.5")
    trainer, found = tiny_trainer(folder, "switchlora", *decay, *keys), []
    for _ in range(num_steps):
        train_steps(trainer, 1)
        metrics = trainer.stepper.optimizer.metrics()
        found.append((metrics["optimizer/lr"], metrics["switch/vectors_switched"]))
    trainer.save()
    trainer.close()
    return found, metrics["switch/vectors_switched_total"]


def test_a_run_that_is_made_longer_has_the_rates_and_switches_of_the_longer_run_from_then_on(
    corpora,
):
    short, long = ("--training.steps", "12"), ("--training.steps", "24")
    expected, _ = rates_and_switches(corpora / "long-from-the-start", 18, *long)
    before, _ = rates_and_switches(corpora / "made-longer", 8, *short)
    after, total = rates_and_switches(corpora / "made-longer", 10, *long)
    assert after == expected[8:]
    for number in (0, 1):
        assert [step[number] for step in before] != [step[number] for step in expected[:8]]
    assert total == sum(num_switched for _, num_switched in before + after)
    assert after[-1][1] > 0


def test_a_stopped_run_that_is_made_shorter_ends_with_the_loss_of_its_last_weights(corpora, capsys):
    folder, every = corpora / "made-shorter", ("--evaluation.interval", "2")
    trainer = tiny_trainer(folder, "lora", *every)
    trainer.evaluate()
    train_steps(trainer, 3)
    trainer.save()
    trainer.stepper.close()
    tiny_trainer(folder, "lora", *every, "--training.steps", "3").train()
    results = json.loads((folder / "run" / "results.json").read_text())
    loss = trainer.validation(trainer.stepper.model)
    before = trainer.stepper.state.first_validation_loss
    assert (results["step"], results["loss/validation"]) == (3, pytest.approx(loss, rel=1e-6))
    assert f"{before:.4f} -> {loss:.4f}" in capsys.readouterr().out


@pytest.fixture
def books(corpora):
    """A saved run on text files; the folder and the keys of its command."""
    folder = corpora / "books-run"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "books").mkdir(parents=True)
    for number in range(60):
        text = f"line of book {number}\n" * (3 + number % 7)
        (folder / "books" / f"{number}.txt").write_text(text)
    limits = ("--data.max_bytes", "none", "--data.validation_fraction", "0.2")
    keys = ("--data.dataset", "text", "--data.path", str(folder / "books"), *limits)
    keys += ("--data.cache_dir", str(folder / "corpora"), "--evaluation.tokens", "160")
    train_and_save(folder, "lora", *keys, num_steps=2)
    return folder, keys


def resume(folder, *keys, method="lora"):
    trainer = tiny_trainer(folder, method, *keys)
    trainer.close()
    return trainer.stepper.state.step


def move(folder, keys, before, after):
    """Copies a folder of the run without times, deletes it, and changes the keys."""
    shutil.copytree(folder / before, folder / after, copy_function=shutil.copyfile)
    shutil.rmtree(folder / before)
    return tuple(key.replace(str(folder / before), str(folder / after)) for key in keys)


def test_a_run_finds_its_corpus_by_content_and_prepares_nothing(books, monkeypatch):
    folder, keys = books
    monkeypatch.setattr("switchtitan.data.prepare.write_shard", lambda *_: pytest.fail("prepared"))
    os.utime(folder / "books" / "3.txt", (1, 1))
    assert resume(folder, *keys) == 2
    keys = move(folder, keys, "books", "moved books")
    keys = move(folder, keys, "corpora", "moved corpora")
    assert resume(folder, *keys) == 2
    shutil.rmtree(folder / "moved books")
    (folder / "moved corpora").rename(folder / "corpora")  # where it was, and the command is not
    assert resume(folder, *keys) == 2
    monkeypatch.chdir(folder / "run")
    assert run("evaluate", folder / "run").status == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda file: file.write_text(file.read_text().upper()),
        lambda file: file.write_text(file.read_text() + "more"),
        os.remove,
    ],
)
def test_a_run_is_refused_if_its_files_have_changed_and_prepares_nothing(books, change):
    folder, keys = books
    before = sorted((folder / "corpora").iterdir())
    change(folder / "books" / "3.txt")
    with pytest.raises(CorpusError, match=r"\[data\] path = .*books': .* 3\.txt: .*output_dir"):
        tiny_trainer(folder, "lora", *keys)
    with pytest.raises(CheckpointError, match="max_documents: saved with None"):
        tiny_trainer(folder, "lora", *keys, "--data.max_documents", "50")
    assert sorted((folder / "corpora").iterdir()) == before


def test_a_run_keeps_the_corpus_that_it_fell_back_to(corpora, monkeypatch):
    folder, hub = corpora / "fallback", "switchtitan.data.corpus.hub_error"
    keys = ("--data.dataset", "c4", "--data.tokenizer", "t5-base", "--data.vocab_size", "270")
    keys += ("--data.offline_dataset", "pystdlib")
    monkeypatch.setattr(hub, lambda: "it is down")
    train_and_save(folder, "lora", *keys, num_steps=1)
    monkeypatch.setattr(hub, lambda: pytest.fail("asked the hub"))
    assert resume(folder, *keys) == 1


def test_a_fork_resumes_its_own_newest_checkpoint(corpora):
    parent, fork = corpora / "parent", corpora / "fork"
    train_and_save(parent, "lora", num_steps=2)
    given = ("--checkpoint.resume", str(parent / "run" / "checkpoints" / "step-000000002"))
    for step in (2, 3, 4):
        trainer = tiny_trainer(fork, "lora", *given, "--optimizer.lr", "2e-2")
        assert trainer.stepper.state.step == step
        train_steps(trainer, 1)
        trainer.save()
        trainer.close()
    with refused("already holds 2 checkpoints", "resume = 'auto'"):
        tiny_trainer(fork, "lora", "--checkpoint.resume", str(parent / "run"))


@pytest.mark.parametrize("method", ["full_rank", "low_rank", "sltrain", "switchlora"])
def test_a_run_that_resumes_draws_and_decomposes_no_weight(corpora, monkeypatch, method):
    folder, num_rows = corpora / f"{method}-resumed", []

    def drawing(initializer, seed, name, shape, rows):
        num_rows.append(len(rows))
        return plain_value(initializer, seed, name, shape, rows)

    monkeypatch.setattr("switchtitan.distributed.fsdp.plain_value", drawing)
    train_and_save(folder, method, num_steps=2)
    assert sum(num_rows) > 0
    num_rows.clear()
    monkeypatch.setattr(factors, "balanced_factors", lambda *_: pytest.fail("decomposed"))
    assert resume(folder, method=method) == 2
    assert sum(num_rows) == 0


def pretend(monkeypatch, is_native):
    """Lets this machine multiply in bf16 natively or not."""
    support = Bf16Support(is_native, "so the test says")
    monkeypatch.setattr(compute_dtype, "bf16_support", lambda device: support)


def run_steps(folder, num_steps, dtype="auto"):
    """Trains, saves, and returns losses and the dtype in which layers compute."""
    keys = ("--evaluation.interval", "100", "--training.dtype", dtype)
    trainer = tiny_trainer(folder, "switchlora", *keys)
    seen = set()
    layer = trainer.stepper.model.get_submodule("model.layers.0.mlp")
    layer.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    losses = train_steps(trainer, num_steps)
    trainer.save()
    trainer.close()
    (computed,) = seen
    return losses, computed


def test_a_resumed_run_keeps_the_dtype_of_another_machine(corpora, monkeypatch, caplog, tmp_path):
    pretend(monkeypatch, True)
    straight, _ = run_steps(corpora / "straight-dtype", 4)
    folder = corpora / "kept-dtype"
    losses, first_dtype = run_steps(folder, 2)
    pretend(monkeypatch, False)
    caplog.set_level("INFO", logger="switchtitan")
    resumed, second_dtype = run_steps(folder, 2)
    assert (first_dtype, second_dtype) == (torch.bfloat16, torch.bfloat16)
    assert losses + resumed == straight
    assert "compute dtype: bfloat16 (as in the checkpoint)" in caplog.text
    assert "changed since" not in caplog.text
    result = tmp_path / "result.json"
    assert run("evaluate", folder / "run", "--json", result).status == 0
    assert json.loads(result.read_text())["compute_dtype"] == "bfloat16"


BRANCHES = """
differ_in = ["training"]
[[rows]]
name = "dense"
learning_rates = [1e-3, 2e-3, 4e-3]
set.method = {{ name = "switchlora", rank = 6, interval = 5, freeze_steps = 2, decay = "constant" }}
[[rows]]
name = "short"
resume_from = "dense"
learning_rates = [1e-3, 2e-3, 4e-3]
set.method = {{ name = "switchlora", rank = 6, interval = 5, freeze_steps = 2, decay = "constant" }}
set.training = {{ steps = 10 }}
"""
STABLE = {
    "warmup_steps = 3": 'warmup_steps = 3\ndecay = "linear"\ndecay_ratio = 0.4',
    "interval = 20\nasync_save": "interval = 2\nkeep_every = 6\nasync_save",
    "steps = 40": "steps = 16",
    "test_tokens = 160\ninterval = 20": "test_tokens = 160\ninterval = 5",
}


def test_a_row_that_resumes_from_a_longer_one_has_the_weights_of_a_run_from_the_start(tmp_path):
    """The shorter run's rate falls from step 6 on, the longer one's from step 10 on."""
    file = write_grid(tmp_path, GRID.partition("[[rows]]")[0] + BRANCHES, STABLE)
    comparison = load_comparison(file)
    check_plan(comparison)
    state = follow(comparison, lambda run: None)
    long, *_ = state.due
    assert {run.row for run in state.due} == {"dense"}  # the others cannot start yet
    ready_trainer(long.config).train()
    short = follow(comparison, lambda run: None).due[1]
    assert (short.row, short.tuned) == ("short", long.tuned)
    assert short.config.checkpoint.resume.endswith("step-000000006")
    alone = plan_run(comparison, comparison.rows[1], short.tuned, short.seed)
    assert config_sha256(alone.config) == config_sha256(short.config)
    job = short.config.job.model_copy(update={"output_dir": tmp_path / "straight"})
    checkpoint = short.config.checkpoint.model_copy(update={"resume": "never"})
    straight = short.config.model_copy(update={"job": job, "checkpoint": checkpoint})
    ended = []
    for config in (short.config, straight):
        trainer = ready_trainer(config)
        assert trainer.stepper.state.step == (6 if config is short.config else 0)
        trainer.train()
        ended.append(full_tensors(trainer))
    assert not differing(*ended)


def test_a_row_resumes_from_a_run_of_its_own_values_and_diverges_with_it(tmp_path):
    file = write_grid(tmp_path, GRID.partition("[[rows]]")[0] + BRANCHES, STABLE)
    comparison, best = load_comparison(file), {"dense": 1e-3, "short": 2e-3}

    def find(run):
        if run.seed != comparison.selection_seed:
            return None
        return result_of(run, abs(run.tuned[LR] - best[run.row]), 9.0)

    due = follow(comparison, find).due
    # The longer runs of the report have another rate.
    assert [(run.row, run.source) for run in due] == [("dense", None), ("short", None)] * 2
    long = follow(comparison, lambda run: None).due[0]
    write_csv(tmp_path / "runs.csv", {long: result_of(long, math.inf, math.inf)})
    state = Comparison(comparison, tmp_path).state()
    assert {run.row for run in state.finished} == {"dense", "short"}
    assert all(result.diverged for result in state.finished.values())


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({'name = "dense"': 'name = "gone"'}, ("rows.short.resume_from", "'dense'")),
        ({"steps = 10": "steps = 20"}, ("from step 12 on", "from 4 to 10")),
        ({"steps = 10": "steps = 8"}, ("from step 5 on", "interval = 2 and keep_every = 6")),
        ({"\ndecay_ratio = 0.4": ""}, ("from step 3 on", "decay_ratio")),
        ({"10 }}": "10 }}\nset.optimizer.other_lr = 1e-2"}, ("row short", "keys of that row")),
        ({"interval = 5,": "switches_per_vector = 2,"}, ("row short", "does not depend")),
    ],
)
def test_a_row_that_cannot_branch_from_another_is_refused(tmp_path, changes, fragments):
    grid, base = GRID.partition("[[rows]]")[0] + BRANCHES, {**STABLE}
    for before, after in changes.items():
        grid = grid.replace(before, after)
        base = {key: value.replace(before, after) for key, value in base.items()}
    grid = grid.replace('baseline = "dense"', 'baseline = "short"')
    with refused(*fragments, error=ConfigError):
        check_plan(load_comparison(write_grid(tmp_path, grid, base)))
