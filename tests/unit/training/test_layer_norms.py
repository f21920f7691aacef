"""Norms of layers, compared with those of full tensors before and after a step."""

import math
from collections.abc import Iterator

import pytest
import torch
from support.tiny import tiny_trainer
from torch.utils._python_dispatch import TorchDispatchMode

from switchtitan.distributed.world import stop_world
from switchtitan.training.layer_norms import LayerNorms
from switchtitan.training.trainer import Trainer


@pytest.fixture(autouse=True)
def no_world_left_behind() -> Iterator[None]:
    yield
    stop_world()


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {
        name: parameter.full_tensor().detach().clone()
        for name, parameter in trainer.stepper.model.named_parameters()
    }


def reported_in(trainer: Trainer, hook: LayerNorms, step: int) -> tuple[dict, float]:
    """What the hook reports of one step, and the gradient's norm."""
    reported: dict[str, float] = {}
    trainer.reporter.report = lambda step, values: reported.update(values)
    with hook.around(step):
        result = trainer.stepper.step()
    hook.after(step)
    return reported, float(result.grad_norm)


@pytest.mark.parametrize("method", ["full_rank", "switchlora", "relora"])
def test_norms_are_those_of_full_tensors(corpora, method):
    keys = ("--metrics.layers", "true", "--training.max_grad_norm", "0.1")
    trainer = tiny_trainer(corpora / "layer-norms", method, *keys)
    (hook,) = trainer.hooks
    assert isinstance(hook, LayerNorms)
    # ReLoRA's first reset follows step 9.
    for _ in range(8):
        trainer.stepper.step()
    before = weights(trainer)
    reported, grad_norm = reported_in(trainer, hook, 9)
    after = weights(trainer)
    trainer.stepper.close()
    gradients = [value for tag, value in reported.items() if tag.startswith("gradient_norm/")]
    # Before clipping, which this gradient exceeds.
    assert grad_norm > 0.1
    assert math.hypot(*gradients) == pytest.approx(grad_norm, rel=1e-5)
    layer = "model.layers.1.mlp.up_proj"
    change = {
        name: (after[name] - before[name]).norm().item()
        for name in after
        if name.startswith(f"{layer}.")
    }
    is_frozen = method != "full_rank"
    trained = [value for name, value in change.items() if not (is_frozen and "weight" in name)]
    assert reported[f"update_norm/{layer}"] == pytest.approx(math.hypot(*trained), rel=1e-5)
    if is_frozen:
        share = change[f"{layer}.weight"] / after[f"{layer}.weight"].norm().item()
        assert share > 0
        assert reported[f"merged_share/{layer}"] == pytest.approx(share, rel=1e-4)
    else:
        assert not any(tag.startswith("merged_share/") for tag in reported)
    assert "update_norm/model.embed_tokens" in reported


class CountReads(TorchDispatchMode):
    """Counts operations that read a value of the device."""

    num_reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num_reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_no_layer_is_read_by_itself(corpora):
    """`tolist` of all layers together is not an operation on a CPU."""
    trainer = tiny_trainer(corpora / "layer-reads", "switchlora", "--metrics.layers", "true")
    (hook,) = trainer.hooks
    trainer.stepper.step()
    batch = next(trainer.stepper.batches)
    trainer.stepper.close()
    trainer.stepper.batches = iter([batch])  # the loader's reads are the host's
    with CountReads() as count:
        with hook.around(2):
            trainer.stepper.step()
        hook.after(2)
        assert count.num_reads == 0
        float(torch.ones(()))  # shows that the check above can fail
    assert count.num_reads == 1


def test_nothing_is_copied_in_steps_that_are_not_reported(corpora):
    keys = ("--metrics.layers", "true", "--metrics.interval", "4")
    trainer = tiny_trainer(corpora / "layer-interval", "switchlora", *keys)
    (hook,) = trainer.hooks
    for step in (2, 3):
        with hook.around(step):
            assert trainer.stepper.on_gradients is None
        assert not hook.is_due(step)
    with hook.around(4):
        assert trainer.stepper.on_gradients is not None
        trainer.stepper.step()
    assert trainer.stepper.on_gradients is None
    assert hook.is_due(4)
    trainer.stepper.close()


def test_without_the_key_there_is_no_hook(corpora):
    trainer = tiny_trainer(corpora / "no-layers", "switchlora")
    trainer.stepper.close()
    assert trainer.hooks == []
