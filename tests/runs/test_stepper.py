"""A step equals that of a plain loop, and a batch with numbers that are not finite leaves no trace
but a count."""

import dataclasses
import importlib
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from support.nonfinite import SKIP, spoil_next_gradient, spoil_next_loss
from support.tensors import differing
from support.tiny import full_tensors, tiny_config, tiny_trainer, train_steps
from torch import nn

from switchtitan.distributed import fsdp
from switchtitan.models import MODELS
from switchtitan.models.llama.model import Llama
from switchtitan.models.loss import CrossEntropy
from switchtitan.training.step import StepResult
from switchtitan.training.trainer import RunningLoss


def weights(trainer):
    tensors = full_tensors(trainer)
    return {name[6:]: value for name, value in tensors.items() if name.startswith("model.")}


def plain_model(trainer, folder):
    """A model without wrappers, with the weights of a trainer of full rank."""
    model = MODELS.build(tiny_config(folder, "full_rank").model)
    model.load_state_dict(weights(trainer))
    return model


def plain_learning_rate(step):
    """Warm-up over 3 steps, then half a cosine from 1e-2 to 1e-3 at step 40."""
    if step < 3:
        return 1e-2 * ((step + 1) / 3)
    return 1e-2 * (0.1 + (1 - 0.1) * (0.5 * (1 + math.cos(math.pi * ((step - 3) / (40 - 3))))))


def test_full_rank_training_equals_a_plain_loop_bitwise(corpora, monkeypatch):
    # With a unit of its own, the head's tensors start elsewhere in memory, and its products round
    # differently: gradients differ by 1e-7.
    monkeypatch.setattr(Llama, "outer_units", lambda model: [])
    ours = tiny_trainer(corpora / "plain", "full_rank")
    model = plain_model(ours, corpora / "plain")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0, fused=True)
    read = [next(ours.stepper.batches) for _ in range(12)]
    ours.stepper.close()
    ours.stepper.batches = iter(read)
    norms = []
    for step, micro_batches in enumerate(read):
        result = ours.stepper.step()
        norms.append(result.grad_norm.item())
        for group in optimizer.param_groups:
            group["lr"] = plain_learning_rate(step)
        num_targets = sum(batch.targets.numel() for batch in micro_batches)
        loss_plain = torch.zeros(())
        for batch in micro_batches:
            hidden = model(batch.tokens, batch.document_ids, lambda hidden, head: hidden)
            # It rounds differently from torch's loss, with which the next test compares it.
            compute = CrossEntropy(compile_regions=False)
            loss = compute(hidden, model.lm_head, batch.targets, num_targets)
            loss.backward()
            loss_plain += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(result.loss, loss_plain), step
    assert differing(weights(ours), model.state_dict()) == []
    assert min(norms) < 1.0 < max(norms), "some gradients are clipped"


def test_loss_and_gradients_of_several_micro_batches_equal_those_of_one_batch_in_plain_torch(
    corpora,
):
    trainer = tiny_trainer(corpora / "torch-loss", "full_rank")
    model = plain_model(trainer, corpora / "torch-loss")
    micro_batches = next(trainer.stepper.batches)
    trainer.stepper.close()
    assert len(micro_batches) == 4
    tokens, targets, documents = map(torch.cat, zip(*micro_batches, strict=True))
    expected = F.cross_entropy(model(tokens, documents).flatten(0, 1), targets.flatten())
    expected.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    loss = trainer.stepper.forward_backward(micro_batches)
    # fp32 sums over 128 tokens in another order: about 10 rounding errors of 6e-8 of the largest
    # term.
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=0)
    for name, parameter in trainer.stepper.model.named_parameters():
        atol = 2e-6 * gradients[name].abs().max().item()
        gradient = parameter.grad.full_tensor()
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-5, atol=atol)
    trainer.stepper.optimizer.zero_grad()
    trainer.stepper.batches = iter([micro_batches])
    result = trainer.stepper.step()
    torch.testing.assert_close(result.loss, expected.detach(), rtol=1e-5, atol=0)
    norm = nn.utils.get_total_norm(gradients.values())
    torch.testing.assert_close(result.grad_norm, norm, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("reshard", "trained"), [("true", "float32"), ("false", "bfloat16")])
def test_one_rank_with_few_kernels_trains_like_fsdp_itself_bitwise(
    corpora, monkeypatch, reshard, trained
):
    narrow = ("--training.dtype", "bfloat16", "--training.frozen_dtype", "int16")
    short = ("--optimizer.name", "adamw8bit", "--training.trained_dtype", trained)
    keys = (*narrow, *short, "--parallelism.reshard_after_forward", reshard)
    ours = tiny_trainer(corpora / f"few-{reshard}", "switchlora", *keys)
    # Another torch, without the private names.
    monkeypatch.setattr(torch, "__version__", "2.14.0")
    monkeypatch.setitem(sys.modules, "switchtitan.distributed.one_rank", None)
    importlib.reload(fsdp)
    reference = tiny_trainer(corpora / f"many-{reshard}", "switchlora", *keys)
    # Weights of both dtypes are cast.
    dtypes = {parameter.dtype for parameter in ours.stepper.model.parameters()}
    assert dtypes == {getattr(torch, trained), torch.int16}
    assert train_steps(ours, 4) == train_steps(reference, 4)
    assert differing(full_tensors(ours), full_tensors(reference)) == []


def test_ranks_drop_different_values(corpora):
    losses = []
    for rank in (0, 1):
        keys = ("--method.dropout", "0.3", "--method.init", "balanced")
        trainer = tiny_trainer(corpora / f"dropout-{rank}", "lora", *keys)
        trainer.stepper.world = dataclasses.replace(trainer.stepper.world, rank=rank)
        losses += train_steps(trainer, 1)
    assert losses[0] != losses[1]


@pytest.mark.parametrize(
    ("method", "keys", "spoil"),
    [
        ("switchlora", ("--method.dropout", "0.3"), spoil_next_gradient),
        ("switchlora", (), spoil_next_loss),
        # The step would be followed by a reset, and begin with a new projection.
        ("relora", ("--method.reset_interval", "5"), spoil_next_gradient),
        ("galore", ("--method.update_interval", "4"), spoil_next_gradient),
    ],
)
def test_a_skipped_step_changes_no_tensor_switches_nothing_and_does_not_count(
    corpora, method, keys, spoil
):
    trainer = tiny_trainer(corpora / "skipped", method, *SKIP, *keys)
    stepper = trainer.stepper
    train_steps(trainer, 4)
    before, lr_factor = full_tensors(trainer), stepper.lr_schedule(stepper.state.step)
    spoil(stepper)
    assert stepper.step().is_skipped
    assert differing(full_tensors(trainer), before) == []
    assert (stepper.state.step, stepper.state.num_skipped, stepper.state.next_batch) == (4, 1, 5)
    assert stepper.lr_schedule(stepper.state.step) == lr_factor
    loss = stepper.step().loss
    stepper.close()
    # float64, multiplied in another order.
    lr = stepper.optimizer.metrics()["optimizer/lr"]
    assert lr == pytest.approx(plain_learning_rate(4), rel=1e-14)
    assert loss.isfinite()
    assert stepper.state.step == 5
    assert differing(full_tensors(trainer), before)


def test_the_running_loss_is_the_mean_since_it_was_taken_and_remembers_gradients_not_finite():
    running = RunningLoss(torch.device("cpu"))
    for loss in (1.0, 2.0, 6.0):
        running.add(StepResult(torch.tensor(loss), torch.tensor(0.5), is_skipped=False))
    assert running.take_mean() == 3
    assert running.all_finite
    for grad_norm in (math.inf, 0.5):
        running.add(StepResult(torch.tensor(4.0), torch.tensor(grad_norm), is_skipped=False))
        assert running.take_mean() == 4
    assert not running.all_finite
