"""A step equals that of a plain loop, and skips updates with gradients that are not finite if
configured so."""

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from support.spoiled import spoil_next_gradient
from support.tiny import METHOD_KEYS, full_tensors, tiny_config, tiny_trainer, train_steps
from torch import nn

from switchtitan.distributed.world import stop_world
from switchtitan.models import MODELS
from switchtitan.models.llama.model import Llama
from switchtitan.models.loss import CrossEntropy
from switchtitan.training.stepper import RunningLoss, StepResult
from switchtitan.training.trainer import Trainer

SKIP = ("--training.on_nonfinite", "skip")


@pytest.fixture(autouse=True)
def leave_world() -> Iterator[None]:
    yield
    stop_world()


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    prefix = "model."
    return {
        k.removeprefix(prefix): v for k, v in full_tensors(trainer).items() if k.startswith(prefix)
    }


def plain_learning_rate(step: int) -> float:
    """Warm-up over 3 steps, then half a cosine from 1e-2 to 1e-3 at step 40."""
    if step < 3:
        return 1e-2 * ((step + 1) / 3)
    return 1e-2 * (0.1 + (1 - 0.1) * (0.5 * (1 + math.cos(math.pi * ((step - 3) / (40 - 3))))))


def test_full_rank_training_equals_a_plain_loop_bitwise(corpora, monkeypatch):
    # With a unit of its own, the head's tensors start elsewhere in memory, and its products round
    # differently: gradients differ by 1e-7.
    monkeypatch.setattr(Llama, "outer_units", lambda model: [])
    ours = tiny_trainer(corpora / "plain", "full_rank")
    config = tiny_config(corpora / "plain", "full_rank")
    model = MODELS.build(config.model)
    model.load_state_dict(weights(ours))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0, fused=True)
    read = [next(ours.stepper.batches) for _ in range(20)]
    ours.stepper.close()
    ours.stepper.batches = iter(read)
    for step, micro_batches in enumerate(read):
        loss_ours = ours.stepper.step().loss
        for group in optimizer.param_groups:
            group["lr"] = plain_learning_rate(step)
        num_targets = sum(batch.targets.numel() for batch in micro_batches)
        loss_plain = torch.zeros(())
        for batch in micro_batches:
            hidden = model.model(batch.tokens, batch.document_ids)
            # It rounds differently from torch's loss, with which the next test compares it.
            loss = CrossEntropy(compile_regions=False)(
                hidden, model.lm_head, batch.targets, num_targets
            )
            loss.backward()
            loss_plain += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(loss_ours, loss_plain), step
    for name, weight in weights(ours).items():
        assert torch.equal(weight, model.state_dict()[name]), name


def test_loss_and_gradients_of_several_micro_batches_equal_those_of_one_batch_in_plain_torch(
    corpora,
):
    trainer = tiny_trainer(corpora / "torch-loss", "full_rank")
    model = MODELS.build(tiny_config(corpora / "torch-loss", "full_rank").model)
    model.load_state_dict(weights(trainer))
    micro_batches = next(trainer.stepper.batches)
    trainer.stepper.close()
    assert len(micro_batches) == 4
    tokens, documents, targets = (
        torch.cat([getattr(batch, name) for batch in micro_batches])
        for name in ("tokens", "document_ids", "targets")
    )
    expected = F.cross_entropy(model(tokens, documents).flatten(0, 1), targets.flatten())
    expected.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    # fp32 sums over 128 tokens in another order: about 10 rounding errors of 6e-8 of the largest
    # term.
    torch.testing.assert_close(
        trainer.stepper.forward_backward(micro_batches), expected.detach(), rtol=1e-5, atol=0
    )
    for name, parameter in trainer.stepper.model.named_parameters():
        atol = 2e-6 * gradients[name].abs().max().item()
        torch.testing.assert_close(
            parameter.grad.full_tensor(), gradients[name], rtol=1e-5, atol=atol
        )
    trainer.stepper.optimizer.zero_grad()
    trainer.stepper.batches = iter([micro_batches])
    result = trainer.stepper.step()
    torch.testing.assert_close(result.loss, expected.detach(), rtol=1e-5, atol=0)
    norm = nn.utils.get_total_norm(gradients.values())
    torch.testing.assert_close(result.grad_norm, norm, rtol=1e-5, atol=0)


def test_gradients_of_the_plain_loop_are_clipped(corpora):
    """So the equality above covers clipping."""
    trainer = tiny_trainer(corpora / "clipped", "full_rank")
    norms = [trainer.stepper.step().grad_norm.item() for _ in range(20)]
    trainer.stepper.close()
    assert max(norms) > 1.0


@pytest.mark.parametrize("method", METHOD_KEYS)
def test_accumulated_micro_batches_equal_one_big_batch(corpora, method):
    gradients = []
    for local_batch_size in ("8", "2", "1"):
        trainer = tiny_trainer(
            corpora / f"accumulate-{local_batch_size}",
            method,
            "--training.local_batch_size",
            local_batch_size,
        )
        micro_batches = next(trainer.stepper.batches)
        assert len(micro_batches) == 8 // int(local_batch_size)
        loss = trainer.stepper.forward_backward(micro_batches)
        trainer.stepper.close()
        gradients.append(
            [
                loss,
                *(
                    p.grad.full_tensor()
                    for p in trainer.stepper.model.parameters()
                    if p.requires_grad
                ),
            ]
        )
    for accumulated in gradients[1:]:
        for one, other in zip(gradients[0], accumulated, strict=True):
            # fp32 sums over 128 tokens in another order: about 10 rounding errors of 6e-8 of the
            # largest term.
            torch.testing.assert_close(
                other, one, rtol=1e-5, atol=2e-6 * one.abs().max().item() + 1e-9
            )


@pytest.mark.parametrize("method", METHOD_KEYS)
def test_a_skipped_step_changes_no_tensor_switches_nothing_and_does_not_count(corpora, method):
    trainer = tiny_trainer(corpora / "skipped", method, *SKIP)
    train_steps(trainer, 4)
    before, lr_factor = (
        full_tensors(trainer),
        trainer.stepper.lr_schedule(trainer.stepper.state.step),
    )
    spoil_next_gradient(trainer.stepper)
    assert not trainer.stepper.step().grad_norm.isfinite()
    after = full_tensors(trainer)
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    assert (
        trainer.stepper.state.step,
        trainer.stepper.state.num_skipped,
        trainer.stepper.state.num_batches,
    ) == (4, 1, 5)
    assert trainer.stepper.lr_schedule(trainer.stepper.state.step) == lr_factor
    loss = trainer.stepper.step().loss
    # float64, multiplied in another order.
    assert trainer.stepper.optimizer.metrics()["optimizer/lr"] == pytest.approx(
        plain_learning_rate(4), rel=1e-14
    )
    trainer.stepper.close()
    assert loss.isfinite()
    assert trainer.stepper.state.step == 5
    changed = [
        name
        for name, tensor in full_tensors(trainer).items()
        if not torch.equal(tensor, before[name])
    ]
    assert changed


def test_the_running_loss_is_the_mean_since_its_reset_and_remembers_gradients_not_finite():
    running = RunningLoss(torch.device("cpu"))
    for loss in (1.0, 2.0, 6.0):
        running.add(StepResult(torch.tensor(loss), torch.tensor(0.5), is_skipped=False))
    assert running.mean() == 3
    assert running.all_finite
    running.reset()
    running.add(StepResult(torch.tensor(5.0), torch.tensor(math.inf), is_skipped=False))
    running.reset()
    running.add(StepResult(torch.tensor(4.0), torch.tensor(0.5), is_skipped=False))
    assert running.mean() == 4
    assert not running.all_finite


@pytest.mark.parametrize("method", ["sltrain", "switchlora"])
@pytest.mark.parametrize("compiled", ["false", pytest.param("true", marks=())])
def test_activation_checkpointing_changes_no_loss(corpora, method, compiled):
    losses = {}
    for mode in ("none", "full", "selective"):
        trainer = tiny_trainer(
            corpora / f"checkpointing-{method}-{compiled}-{mode}",
            method,
            "--activation_checkpoint.mode",
            mode,
            "--compile.blocks",
            compiled,
        )
        losses[mode] = train_steps(trainer, 8)
        trainer.stepper.close()
    assert losses["none"][-1] < losses["none"][0]
    for mode in ("full", "selective"):
        if compiled == "false":
            assert losses[mode] == losses["none"], mode
        else:
            # Fused kernels round differently; Adam amplifies it where gradients are near zero.
            assert losses[mode] == pytest.approx(losses["none"], rel=1e-5), mode
