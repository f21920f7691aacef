"""What every method must offer: it trains, goes on from a checkpoint bit by bit, and comes out as a plain model."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.tiny import METHOD_KEYS, MINI, tiny_config, tiny_trainer, train_steps, whole_tensors

from switchtitan.contracts import Batch
from switchtitan.distributed.shards import gather_on_main
from switchtitan.distributed.world import stop_world
from switchtitan.methods import METHODS
from switchtitan.models import MODELS
from switchtitan.training.trainer import Trainer


@pytest.fixture(autouse=True)
def leave_world() -> Iterator[None]:
    yield
    stop_world()


def save(trainer: Trainer) -> Path:
    trainer.save()
    trainer.checkpointer.finish()
    trainer.stepper.close()
    assert trainer.checkpointer.latest is not None
    return trainer.checkpointer.latest


@torch.no_grad()
def logits(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    return model(batch.tokens, batch.document_ids).clone()


def test_every_method_is_held_to_the_contract():
    assert {method.removesuffix(MINI) for method in METHOD_KEYS} == set(METHODS)


@pytest.mark.parametrize("method", METHOD_KEYS)
def test_a_section_tells_whether_its_method_freezes_weights(tmp_path, method):
    config = tiny_config(tmp_path, method)
    with torch.device("meta"):
        model = MODELS.build(config.model)
    METHODS.build(config.method, config.training.steps, config.job.seed).prepare_model(model)
    freezes = any(not parameter.requires_grad for parameter in model.parameters())
    assert config.method.freezes_weights == freezes


@pytest.mark.parametrize("method", METHOD_KEYS)
def test_resuming_equals_a_straight_run_bitwise(corpora, method):
    straight = tiny_trainer(corpora / f"contract-straight-{method}", method)
    losses = train_steps(straight, 40)
    straight.stepper.close()
    assert losses[-1] < losses[0]

    folder = corpora / f"contract-resumed-{method}"
    first_half = tiny_trainer(folder, method)
    assert train_steps(first_half, 20) == losses[:20]
    save(first_half)
    resumed = tiny_trainer(folder, method)
    assert resumed.stepper.state.step == 20
    assert train_steps(resumed, 20) == losses[20:]
    resumed.stepper.close()
    assert resumed.stepper.state == straight.stepper.state
    tensors = whole_tensors(resumed)
    assert any(name.startswith("optimizer.") for name in tensors)
    for name, tensor in whole_tensors(straight).items():
        assert torch.equal(tensors[name], tensor), name


@pytest.mark.parametrize("method", METHOD_KEYS)
def test_optimizer_state_moves_to_a_fresh_optimizer(corpora, method):
    trained = tiny_trainer(corpora / f"contract-state-{method}", method)
    train_steps(trained, 7)
    trained.stepper.close()
    fresh = tiny_trainer(corpora / f"contract-fresh-{method}", method)
    fresh.stepper.close()
    saved = {name: tensor.clone() for name, tensor in trained.stepper.optimizer.state_dict().items()}
    assert any(
        not torch.equal(tensor, saved[name]) for name, tensor in fresh.stepper.optimizer.state_dict().items()
    )
    fresh.stepper.optimizer.load_state_dict(saved)
    loaded = fresh.stepper.optimizer.state_dict()
    assert loaded.keys() == saved.keys()
    for name, tensor in saved.items():
        assert torch.equal(loaded[name], tensor), name
    assert fresh.stepper.optimizer.metrics().keys() == trained.stepper.optimizer.metrics().keys()


@pytest.mark.parametrize("method", METHOD_KEYS)
def test_dense_weights_in_the_plain_model_compute_the_same_logits(corpora, method):
    folder = corpora / f"contract-merged-{method}"
    trainer, config = tiny_trainer(folder, method), tiny_config(folder, method)
    train_steps(trainer, 12)
    batch = next(trainer.stepper.batches)[0]
    trainer.stepper.close()
    expected = logits(trainer.stepper.model, batch)
    plain = MODELS.build(config.model)
    built = METHODS.build(config.method, config.training.steps, config.job.seed)
    merged = built.dense_weights(gather_on_main(trainer.stepper.model.named_parameters(), is_main=True))
    assert all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in merged.values())
    untrained = logits(plain, batch)
    plain.load_state_dict(merged, strict=True)
    # (W + s B A) x against W x + s B (A x): fp32 roundings of 6e-8 through two blocks, logits of order 1.
    torch.testing.assert_close(logits(plain, batch), expected, rtol=1e-5, atol=1e-5)
    assert (untrained - expected).abs().max() > 0.1


@pytest.mark.parametrize("method", METHOD_KEYS)
def test_warm_start_computes_what_the_full_rank_checkpoint_does(corpora, method):
    dense = tiny_trainer(corpora / f"contract-dense-{method}", "full_rank")
    train_steps(dense, 10)
    batch = next(dense.stepper.batches)[0]
    expected = logits(dense.stepper.model, batch)
    checkpoint = save(dense)
    warm = tiny_trainer(
        corpora / f"contract-warm-{method}", method, "--checkpoint.initial_weights", str(checkpoint)
    )
    warm.stepper.close()
    assert warm.stepper.state.step == 0
    # W - s B A + s B A: as above.
    torch.testing.assert_close(logits(warm.stepper.model, batch), expected, rtol=1e-5, atol=1e-5)
    cold = tiny_trainer(corpora / f"contract-cold-{method}", method)
    cold.stepper.close()
    assert (logits(cold.stepper.model, batch) - expected).abs().max() > 0.1


@pytest.mark.parametrize("method", METHOD_KEYS)
def test_a_checkpoint_of_any_method_starts_a_full_rank_run(corpora, method):
    trained = tiny_trainer(corpora / f"contract-source-{method}", method)
    train_steps(trained, 10)
    batch = next(trained.stepper.batches)[0]
    expected = logits(trained.stepper.model, batch)
    checkpoint = save(trained)
    dense = tiny_trainer(
        corpora / f"contract-target-{method}", "full_rank", "--checkpoint.initial_weights", str(checkpoint)
    )
    dense.stepper.close()
    torch.testing.assert_close(logits(dense.stepper.model, batch), expected, rtol=1e-5, atol=1e-5)
