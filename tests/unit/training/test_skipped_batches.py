"""A batch with a loss or gradient that is not finite leaves no trace but a count; if numbers stay
bad, the run stops and names the last good checkpoint."""

import json
import math
from collections.abc import Iterator

import pytest
import torch
from support.skipping import SKIP, differing, outcome
from support.spoiled import spoil_next_gradient, spoil_next_loss
from support.tiny import METHOD_KEYS, tiny_trainer

from switchtitan.checkpoint.layout import list_step_folders
from switchtitan.distributed.count_collectives import CountingMode
from switchtitan.distributed.norms import non_finite, total_norm
from switchtitan.distributed.world import stop_world
from switchtitan.training import trainer as trainer_module
from switchtitan.training.divergence import TrainingDivergedError
from switchtitan.training.stepper import StepResult
from switchtitan.training.trainer import Trainer

SAVE_OFTEN = ("--checkpoint.interval", "2", "--evaluation.interval", "100")


@pytest.fixture(autouse=True)
def leave_world() -> Iterator[None]:
    yield
    stop_world()


@pytest.mark.parametrize("method", METHOD_KEYS)
def test_a_run_with_a_bad_batch_equals_a_run_without_that_batch_bitwise(corpora, method):
    folder = corpora / "left-out"
    # The steps after it include a reset of ReLoRA, new projections, and switches.
    without = outcome(folder, method, *SKIP, leaves_out=True)
    assert differing(outcome(folder, method, *SKIP, spoil="gradient"), without) == []
    if method == "switchlora":
        assert differing(outcome(folder, method, *SKIP, spoil="loss"), without) == []
        # Controls: the batch matters if it is finite, and if its update is not skipped.
        assert differing(outcome(folder, method, *SKIP), without)
        assert differing(outcome(folder, method, spoil="gradient"), without)


DROPOUT = ("--method.dropout", "0.3")


def test_dropout_after_a_skipped_batch_is_that_of_a_run_without_it(corpora):
    folder = corpora / "left-out-dropout"
    without = outcome(folder, "switchlora", *SKIP, *DROPOUT, leaves_out=True)
    assert (
        differing(outcome(folder, "switchlora", *SKIP, *DROPOUT, spoil="gradient"), without) == []
    )


def always(trainer: Trainer, after_step: int) -> None:
    """Makes all losses after a step nan."""
    step = trainer.stepper.step

    def spoiled_step() -> StepResult:
        if trainer.stepper.state.step >= after_step:
            spoil_next_loss(trainer.stepper)
        return step()

    trainer.stepper.step = spoiled_step


def test_too_many_skipped_batches_in_a_row_stop_the_run_and_name_the_last_checkpoint(
    corpora, monkeypatch
):
    monkeypatch.setattr(trainer_module, "MAX_SKIPPED_IN_A_ROW", 3)
    folder = corpora / "skips-in-a-row"
    trainer = tiny_trainer(folder, "switchlora", *SKIP, *SAVE_OFTEN)
    always(trainer, after_step=3)
    with pytest.raises(TrainingDivergedError, match=r"skipped 3 updates.*step-000000002; "):
        trainer.train()
    results = json.loads((folder / "run" / "results.json").read_text())
    assert (results["step"], results["diverged"], results["batches_skipped"]) == (3, True, 3)


def test_skips_that_are_not_in_a_row_do_not_stop_the_run(corpora, monkeypatch):
    monkeypatch.setattr(trainer_module, "MAX_SKIPPED_IN_A_ROW", 2)
    folder = corpora / "skips-apart"
    trainer = tiny_trainer(folder, "full_rank", *SKIP, "--training.steps", "6")
    step, reported = trainer.stepper.step, []
    report = trainer.reporter.report

    def sometimes_spoiled_step() -> StepResult:
        if trainer.stepper.state.num_batches in (1, 3, 5):
            spoil_next_gradient(trainer.stepper)
        return step()

    trainer.stepper.step = sometimes_spoiled_step
    trainer.reporter.report = lambda step, values: (reported.append(values), report(step, values))
    trainer.train()
    results = json.loads((folder / "run" / "results.json").read_text())
    assert (results["step"], results["batches_skipped"]) == (6, 3)
    assert [v["data/batches_skipped"] for v in reported if "loss/train" in v] == [0, 1, 2, 3, 3, 3]


@pytest.mark.parametrize("spoil", [spoil_next_loss, spoil_next_gradient])
def test_without_skipping_the_run_stops_and_names_the_last_checkpoint(corpora, spoil):
    trainer = tiny_trainer(corpora / f"stops-{spoil.__name__}", "switchlora", *SAVE_OFTEN)
    step = trainer.stepper.step

    def spoiled_step() -> StepResult:
        if trainer.stepper.state.step == 3:
            spoil(trainer.stepper)
        return step()

    trainer.stepper.step = spoiled_step
    with pytest.raises(TrainingDivergedError, match=r"by step 4; .*step-000000002; "):
        trainer.train()


def test_a_run_that_stops_before_its_first_checkpoint_says_so(corpora):
    trainer = tiny_trainer(corpora / "stops-early", "switchlora", *SAVE_OFTEN)
    always(trainer, after_step=0)
    with pytest.raises(TrainingDivergedError, match=r"by step 1; there is no checkpoint yet; "):
        trainer.train()


def test_weights_that_are_not_finite_are_not_saved(corpora):
    """A finite gradient can overflow a weight."""
    folder = corpora / "inf-weight"
    trainer = tiny_trainer(folder, "switchlora", *SAVE_OFTEN)
    step, model = trainer.stepper.step, trainer.stepper.model

    def overflowing_step() -> StepResult:
        result = step()
        if trainer.stepper.state.step == 4:
            weight = model.get_parameter("model.layers.1.mlp.up_proj.lora_b").detach()
            weight._local_tensor[2, 3] = math.inf
        return result

    trainer.stepper.step = overflowing_step
    with pytest.raises(
        TrainingDivergedError,
        match=r"at step 4 \(model\.model\.layers\.1\.mlp\.up_proj\.lora_b\); .*step-000000002; ",
    ):
        trainer.train()
    saved = list_step_folders(folder / "run" / "checkpoints")
    assert [path.name for path in saved] == ["step-000000002"]


def test_a_loss_that_is_not_finite_makes_the_norm_nan_and_others_do_not_change_it():
    tensors = [torch.full((3, 5), 2.0), torch.full((2,), -1.0)]
    norm = total_norm(tensors)
    assert norm.item() == pytest.approx((15 * 4 + 2) ** 0.5)
    assert torch.equal(total_norm(tensors, torch.tensor(7.5)), norm)
    for loss in (math.nan, math.inf, -math.inf):
        assert total_norm(tensors, torch.tensor(loss)).isnan()


def test_tensors_with_inf_or_nan_are_named():
    tensors = {
        "finite": torch.randn(3, 2),
        "inf": torch.tensor([0.0, math.inf]),
        "nan": torch.tensor(math.nan, dtype=torch.bfloat16),
        "integers": torch.arange(3),
        "empty": torch.empty(0, 4),
    }
    assert non_finite(tensors, torch.device("cpu")) == ["inf", "nan"]
    assert non_finite({"integers": torch.arange(3)}, torch.device("cpu")) == []


def test_one_norm_is_taken_of_all_tensors_of_a_dtype():
    class CountNorms(CountingMode):
        num_norms = 0

        def count(self, func, args, kwargs, result):
            self.num_norms += "norm" in func.name()

    tensors = {str(i): torch.randn(3, i) for i in range(6)}
    tensors |= {f"bf16.{i}": torch.randn(i).bfloat16() for i in range(4)}
    with CountNorms() as norms:
        assert non_finite(tensors, torch.device("cpu")) == []
    assert norms.num_norms == 2
    # In the order of the names, which is that of the tensors and not of their dtypes.
    spoiled = {name: tensors[name] / 0 for name in ("bf16.1", "5", "bf16.3", "2")}
    assert non_finite(spoiled, torch.device("cpu")) == list(spoiled)
