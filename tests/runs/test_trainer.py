"""A run evaluates, saves and stops when due, also if numbers are not finite or ranks disagree."""

import gc
import json
import math
import signal
import statistics
import threading
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from support.checkpoints import write_when
from support.nonfinite import SKIP, spoil_next_gradient, spoil_next_loss
from support.tensors import differing
from support.tiny import full_tensors, record_reports, tiny_config, tiny_trainer, train_steps
from support.trained import train_and_save

from switchtitan.checkpoint.save import list_step_folders
from switchtitan.data.prepare import open_corpus
from switchtitan.data.sequences import document_ids
from switchtitan.errors import RanksDisagreeError
from switchtitan.models import MODELS
from switchtitan.observability.tensorboard import read_curves
from switchtitan.regions import STEP
from switchtitan.training import trainer as trainer_module
from switchtitan.training.stop import Stop, Stopped
from switchtitan.training.trainer import TrainingDivergedError

SAVE_OFTEN = ("--checkpoint.interval", "2", "--evaluation.interval", "100")
TEST_SPLIT = ("--data.test_fraction", "0.1", "--evaluation.test_tokens", "320")
REGIONS = {"data", "forward", "backward", "reduce", "clip", "update", "other", "step"}


def results_of(folder):
    return json.loads((folder / "run" / "results.json").read_text())


def before_each_step(trainer, call):
    """Calls `call(step)` before each step, with the number of steps done."""
    step = trainer.stepper.step

    def calling():
        call(trainer.stepper.state.step)
        return step()

    trainer.stepper.step = calling


@pytest.fixture(scope="module")
def finished(corpora):
    """A run of 6 steps, of which the first batch is skipped, and what it did."""
    keys = ("--training.steps", "6", "--evaluation.interval", "4", "--metrics.interval", "4")
    keys += (*TEST_SPLIT, *SKIP)
    trainer = tiny_trainer(corpora / "finished", "full_rank", *keys)
    reported, num_frozen = record_reports(trainer), []
    before_each_step(trainer, lambda step: num_frozen.append(gc.get_freeze_count()))
    spoil_next_gradient(trainer.stepper)
    trainer.train()
    file = corpora / "finished" / "run" / "results.json"
    return SimpleNamespace(
        trainer=trainer,
        config=tiny_config(corpora / "finished", "full_rank", *keys),
        keys=keys,
        file=file,
        results=json.loads(file.read_text()),
        reported=reported,
        num_frozen=num_frozen,
    )


def test_a_run_with_a_skipped_update_takes_all_its_steps_and_reports_finite_losses(finished):
    assert (finished.results["step"], finished.results["batches_skipped"]) == (6, 1)
    assert finished.results["tokens_seen"] == 7 * 8 * 16
    losses = {s: v["loss/train"] for s, v in finished.reported.items() if "loss/train" in v}
    assert list(losses) == [1, 4, 6]
    assert all(map(math.isfinite, losses.values()))
    assert finished.reported[6]["data/batches_skipped"] == 1
    # Python's collector visits nothing that the first step leaves.
    first, *others = finished.num_frozen
    assert first == gc.get_freeze_count() == 0
    assert min(others) > 100_000


def test_the_trained_model_is_evaluated_on_the_test_split(finished):
    model, results = finished.trainer.stepper.model, finished.results
    assert results["loss/test"] == finished.trainer.test(model)
    assert results["loss/test"] != results["loss/validation"]
    corpus = open_corpus(finished.config.data)
    sequences = corpus.split("test", 16)
    num_scored = 16 * len(sequences)
    assert num_scored < 320, "the split is shorter than test_tokens"
    (stretch,) = sequences.stretches(len(sequences))
    scored = stretch[1:].tolist()
    text = corpus.tokenizer().tokenizer.decode(scored, skip_special_tokens=True)
    bits = results["loss/test"] * num_scored / math.log(2)
    assert results["bits_per_byte/test"] == pytest.approx(bits / len(text.encode()))


def test_results_state_the_loss_of_the_last_step_and_the_size_of_the_state(finished):
    evaluated = [s for s, v in finished.reported.items() if "loss/validation" in v]
    assert evaluated == [0, 4, 6]
    validation = finished.trainer.validation(finished.trainer.stepper.model)
    assert finished.results["loss/validation"] == validation
    parameters = list(MODELS.build(finished.config.model).parameters())
    num_trained = sum(parameter.numel() for parameter in parameters)
    counts = {"trainable": num_trained, "frozen": 0, "buffers": 0}
    assert finished.results["num_parameters"] == counts
    # Weights and two moments in fp32, and a step count for each tensor.
    num_bytes = 4 * (3 * num_trained + len(parameters))
    assert finished.results["memory/state_gib"] * 2**30 == num_bytes


def test_times_of_all_regions_are_reported_at_the_interval(finished):
    of_step = {f"time/{name}_ms" for name in REGIONS}
    assert {step for step, v in finished.reported.items() if of_step <= set(v)} == {1, 4, 6}
    times = finished.reported[4]
    parts = sum(times[tag] for tag in of_step - {"time/step_ms"})
    assert parts == pytest.approx(times["time/step_ms"])
    # The last evaluation and save come after the last report of a step.
    assert {"time/evaluate_ms", "time/save_ms"} <= set(finished.reported[6])


def test_a_run_stopped_before_its_results_writes_them_when_it_is_resumed(finished, corpora):
    finished.file.unlink()
    tiny_trainer(corpora / "finished", "full_rank", *finished.keys).train()
    again = json.loads(finished.file.read_text())
    assert again["throughput/tokens_per_s"] is None
    for key in ("step", "loss/validation", "loss/test", "corpus"):
        assert again[key] == finished.results[key]
    written_at = finished.file.stat().st_mtime_ns
    tiny_trainer(corpora / "finished", "full_rank", *finished.keys).train()
    assert finished.file.stat().st_mtime_ns == written_at


def test_the_last_step_is_evaluated_also_if_the_interval_grew(corpora):
    folder = corpora / "interval-grew"
    short = ("--training.steps", "2", "--evaluation.interval", "2")
    tiny_trainer(folder, "lora", "--checkpoint.interval", "2", *short).train()
    trainer = tiny_trainer(folder, "lora", *SAVE_OFTEN, "--training.steps", "4")
    trainer.train()
    results = results_of(folder)
    assert results["step"] == 4
    assert results["loss/validation"] == trainer.validation(trainer.stepper.model)


@pytest.mark.parametrize("local_batch_size", ["1", "4"])
def test_validation_loss_is_the_mean_over_the_first_held_out_tokens(corpora, local_batch_size):
    """160 tokens are 10 sequences: batches of 4 are padded with sequences that do not count."""
    folder = corpora / f"validation-{local_batch_size}"
    keys = ("--training.local_batch_size", local_batch_size)
    trainer = tiny_trainer(folder, "full_rank", *keys)
    train_steps(trainer, 1)
    trainer.stepper.close()
    ours = trainer.validation(trainer.stepper.model)
    plain = MODELS.build(tiny_config(folder, "full_rank").model)
    tensors = full_tensors(trainer)
    plain.load_state_dict({name: tensors[f"model.{name}"] for name in plain.state_dict()})
    corpus, losses = open_corpus(tiny_config(folder, "full_rank").data), []
    sequences = corpus.split("validation", 16)
    for index in range(10):
        tokens = sequences[index]
        with torch.no_grad():
            ids = document_ids(tokens[:-1], corpus.index.tokenizer.eos_id)
            logits = plain(tokens[None, :-1], ids[None])
        losses.append(F.cross_entropy(logits[0].double(), tokens[1:]).item())
    # fp32 logits of batches of other shapes: about ten operations with rounding errors of 6e-8.
    assert ours == pytest.approx(statistics.mean(losses), rel=1e-6)


@pytest.mark.parametrize(
    ("spoil", "first", "keys", "words"),
    [
        (spoil_next_loss, 3, (), ("by step 4", "step-000000002; ")),
        (spoil_next_gradient, 3, (), ("by step 4", "on_nonfinite", "step-000000002; ")),
        (spoil_next_gradient, 0, (), ("by step 1", "there is no checkpoint yet; ")),
        (spoil_next_loss, 3, SKIP, ("skipped 3 updates", "step 3", "step-000000002; ")),
    ],
    ids=["loss", "gradient", "first", "skipped"],
)
def test_numbers_that_are_not_finite_stop_the_run_and_are_not_saved(
    corpora, monkeypatch, request, spoil, first, keys, words
):
    monkeypatch.setattr(trainer_module, "MAX_SKIPPED_IN_A_ROW", 3)
    folder = corpora / f"diverged-{request.node.callspec.id}"
    trainer = tiny_trainer(folder, "switchlora", *SAVE_OFTEN, *keys)
    before_each_step(trainer, lambda step: step >= first and spoil(trainer.stepper))
    with pytest.raises(TrainingDivergedError) as caught:
        trainer.train()
    assert all(word in str(caught.value) for word in words), caught.value
    saved = list_step_folders(folder / "run" / "checkpoints")
    assert [path.name for path in saved] == ["step-000000002"] * (first > 0)
    assert results_of(folder)["diverged"]
    assert gc.isenabled()


def test_weights_that_are_not_finite_are_not_saved(corpora):
    """A finite gradient can overflow a weight."""
    folder = corpora / "inf-weight"
    trainer = tiny_trainer(folder, "switchlora", *SAVE_OFTEN)
    step = trainer.stepper.step
    weight = trainer.stepper.model.get_parameter("model.layers.1.mlp.up_proj.lora_b")

    def overflowing_step():
        result = step()
        if trainer.stepper.state.step == 4:
            weight.detach().to_local()[2, 3] = math.inf
        return result

    trainer.stepper.step = overflowing_step
    with pytest.raises(TrainingDivergedError, match=r"up_proj\.lora_b\).*step-000000002; "):
        trainer.train()
    saved = list_step_folders(folder / "run" / "checkpoints")
    assert [path.name for path in saved] == ["step-000000002"]


def test_skips_that_are_not_in_a_row_do_not_stop_the_run(corpora, monkeypatch):
    monkeypatch.setattr(trainer_module, "MAX_SKIPPED_IN_A_ROW", 2)
    folder = corpora / "skips-apart"
    trainer = tiny_trainer(folder, "full_rank", *SKIP, "--training.steps", "4")
    state = trainer.stepper.state

    def spoil_every_second(step):
        if state.next_batch % 2:
            spoil_next_gradient(trainer.stepper)

    before_each_step(trainer, spoil_every_second)
    trainer.train()
    assert (results_of(folder)["step"], results_of(folder)["batches_skipped"]) == (4, 3)


def test_a_save_in_progress_is_finished_when_ranks_disagree(corpora, monkeypatch):
    intervals = ("--checkpoint.interval", "2", "--parallelism.check_interval", "3")
    keys = (*intervals, "--checkpoint.async_save", "true")
    trainer = tiny_trainer(corpora / "disagree", "switchlora", *keys)
    may_write = threading.Event()
    write_when(may_write, monkeypatch)

    def disagree(*_):
        assert trainer.checkpointer.latest is None
        # The save is still in progress when the error is raised.
        threading.Timer(0.3, may_write.set).start()
        raise RanksDisagreeError("ranks no longer hold the same weights")

    before_each_step(trainer, lambda step: step == 2 and setattr(trainer, "check_ranks", disagree))
    with pytest.raises(RanksDisagreeError):
        trainer.train()
    assert trainer.stepper.state.step == 3
    assert trainer.checkpointer.latest.name == "step-000000002"


INTERRUPTED = ("--training.steps", "6", "--evaluation.interval", "2", "--metrics.tensorboard")
INTERRUPTED += ("true", "--checkpoint.interval", "100")


class StopInTheEvaluation(Stop):
    """Stops a run after the third batch of the evaluation after step 4."""

    def __init__(self, state):
        super().__init__()
        self.state, self.num_batches = state, 0

    def raise_if_due(self):
        self.num_batches += self.state.step == 4 != self.state.evaluated_at
        if self.num_batches % 5 == 3:
            raise Stopped(signal.SIGTERM)


def curves(folder):
    """Points by tag, without what depends on the machine."""
    machine = ("throughput/", "memory/", "time/")
    found = read_curves(folder / "run").items()
    return {tag: list(zip(*c, strict=True)) for tag, c in found if not tag.startswith(machine)}


def test_an_abandoned_evaluation_leaves_nothing_and_is_done_by_the_resumed_run(corpora):
    undisturbed, folder = corpora / "undisturbed-evaluation", corpora / "abandoned"
    expected = tiny_trainer(undisturbed, "switchlora", *INTERRUPTED)
    expected.train()
    trainer = tiny_trainer(folder, "switchlora", *INTERRUPTED)
    trainer.stop = StopInTheEvaluation(trainer.stepper.state)
    with pytest.raises(Stopped):
        trainer.train()
    assert (folder / "run" / "checkpoints" / "step-000000004").is_dir()
    assert not (folder / "run" / "results.json").exists()
    left = curves(folder)
    assert left["loss/train"][-1][0] == 4
    assert [step for step, _ in left["loss/validation"]] == [0, 2]
    resumed = tiny_trainer(folder, "switchlora", *INTERRUPTED)
    resumed.train()
    assert curves(folder) == curves(undisturbed)
    assert results_of(folder)["loss/validation"] == results_of(undisturbed)["loss/validation"]
    assert resumed.stepper.state == expected.stepper.state
    assert differing(full_tensors(resumed), full_tensors(expected)) == []


def test_ranks_wait_longer_for_what_is_done_first(corpora):
    folder, keys = corpora / "timeouts", ("--evaluation.interval", "2", "--training.steps", "4")
    train_and_save(folder, "lora", *keys, num_steps=1)
    trainer = tiny_trainer(folder, "lora", *keys)
    timeouts, validation = [], trainer.validation

    def evaluate(*given):
        timeouts.append(trainer.stepper.world.timeout.total_seconds())
        return validation(*given)

    evaluate.bits_per_byte = validation.bits_per_byte
    trainer.validation = evaluate
    trainer.train()
    keys = trainer.stepper.parallelism
    assert timeouts == [keys.timeout_s, keys.step_timeout_s]
    assert trainer.stepper.world.timeout.total_seconds() == keys.step_timeout_s


def test_a_stop_in_the_last_evaluation_costs_the_resumed_run_one_evaluation(corpora):
    folder, keys = corpora / "last-evaluation", ("--training.steps", "4", *INTERRUPTED[2:])
    trainer = tiny_trainer(folder, "lora", *keys)
    trainer.stop = StopInTheEvaluation(trainer.stepper.state)
    with pytest.raises(Stopped):
        trainer.train()
    assert trainer.stepper.state.evaluated_at == 2, "exports say which weights had this loss"
    for losses_at in ([4], []):
        trainer = tiny_trainer(folder, "lora", *keys)
        reported = record_reports(trainer)
        trainer.train()
        assert [s for s, values in reported.items() if "loss/validation" in values] == losses_at
    assert results_of(folder)["step"] == 4


def test_a_trace_has_the_regions_of_all_its_steps(corpora):
    keys = ("--profiler.enabled", "true", "--profiler.start_step", "2", "--profiler.num_steps", "3")
    keys += ("--training.steps", "5", "--evaluation.interval", "3", "--checkpoint.interval", "3")
    trainer = tiny_trainer(corpora / "regions", "switchlora", *keys)
    trainer.train()
    events = json.loads(trainer.profiler.trace.read_text())["traceEvents"]
    counts = Counter(e["name"] for e in events if e.get("cat") == "user_annotation")
    in_every_step = (STEP, "reduce", "clip", "switch")
    assert {name: counts[name] for name in in_every_step} == dict.fromkeys(in_every_step, 3)
    assert counts["backward"] == 3 * 4  # micro-batches
    assert all(counts[name] for name in ("data", "forward", "update", "evaluate", "save", "report"))
