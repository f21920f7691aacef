"""On a GPU, a switch changes W + s B A by rounding in fp32 only, and runs repeat bitwise."""

import pytest
import torch
from support.switchlora_layers import LARGER, MOST_DRIFT, effective_weights, relative_change
from support.tiny import tiny_trainer, train_steps

from switchtitan.distributed.world import stop_world

NUM_SWITCHING_STEPS = 500

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def use_any_algorithm():
    yield
    torch.use_deterministic_algorithms(False)


def drift(trainer):
    """The largest relative change of W + s B A in 500 switching steps without learning."""
    stepper = trainer.stepper
    before = effective_weights(stepper.model)
    stepper.optimizer.set_lr(0.0)
    for parameter in stepper.model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    for _ in range(NUM_SWITCHING_STEPS):
        stepper.update()
    stepper.close()
    after = effective_weights(stepper.model)
    return max(relative_change(after[name], weight) for name, weight in before.items())


def test_switches_keep_the_weights_while_training_uses_tf32(corpora):
    trainer = tiny_trainer(
        corpora / "tf32",
        "switchlora",
        *LARGER,
        *("--training.tf32", "true", "--training.steps", "600"),
    )
    assert torch.backends.cuda.matmul.allow_tf32
    assert drift(trainer) < MOST_DRIFT


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_deterministic_runs_repeat_bitwise(corpora, dtype):
    losses = []
    for name in ("first", "second"):
        trainer = tiny_trainer(
            corpora / f"deterministic-{dtype}-{name}",
            "switchlora",
            *LARGER,
            *("--training.deterministic", "true", "--training.dtype", dtype),
        )
        losses.append(train_steps(trainer, 20))
        trainer.stepper.close()
        stop_world()
    assert losses[0] == losses[1]
