"""Every method trains, resumes bitwise from a checkpoint and exports a plain model's weights."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from support.tiny import (
    METHOD_KEYS,
    MINI,
    full_tensors,
    tiny_config,
    tiny_stepper,
    tiny_trainer,
    train_steps,
)

from switchtitan.distributed.shards import gather_on_main
from switchtitan.distributed.world import stop_world
from switchtitan.methods import METHODS
from switchtitan.models import MODELS
from switchtitan.training.stepper import TrainState
from switchtitan.training.trainer import Trainer


@pytest.fixture(autouse=True)
def leave_world() -> Iterator[None]:
    yield
    stop_world()


NUM_STEPS, SAVED_STEP = 40, 20
Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class TrainedRun:
    """Results of a run of `NUM_STEPS` steps; `saved_...` are from the save after `SAVED_STEP`."""

    checkpoint: Path
    saved_logits: torch.Tensor
    saved_parameters: Weights
    saved_optimizer: Weights
    metric_names: set[str]
    losses: list[float]
    tensors: Weights
    state: TrainState


@pytest.fixture(scope="module")
def trained(corpora: Path) -> Callable[[str], TrainedRun]:
    """The run of a method; each is trained once."""
    return cache(lambda method: train_and_save(corpora / f"contract-{method}", method))


DROPOUT = ("--method.dropout", "0.1")


@pytest.mark.parametrize(
    ("method", "keys"), [*((method, ()) for method in METHOD_KEYS), ("lora", DROPOUT)]
)
def test_a_pass_draws_random_numbers_only_with_dropout_and_the_method_says_so(
    corpora: Path, method: str, keys: tuple[str, ...]
) -> None:
    config = tiny_config(corpora / f"draws-{method}", method, *keys)
    stepper = tiny_stepper(config)
    assert not stepper.model.draws_in_forward
    before = torch.get_rng_state()
    tokens = torch.randint(271, (3, 16), generator=torch.Generator().manual_seed(0))
    stepper.model(tokens, torch.zeros(3, 16, dtype=torch.int32)).sum().backward()
    assert torch.equal(torch.get_rng_state(), before) == (not keys)
    assert config.method.draws_in_forward() == bool(keys)
    stepper.close()


def train_and_save(folder: Path, method: str) -> TrainedRun:
    trainer = tiny_trainer(folder, method)
    stepper = trainer.stepper
    losses = train_steps(trainer, SAVED_STEP)
    trainer.save()
    trainer.checkpointer.finish()
    assert trainer.checkpointer.latest is not None
    saved_logits = logits(stepper.model)
    saved_parameters = copies(gather_on_main(stepper.model.named_parameters(), is_main=True))
    saved_optimizer = copies(stepper.optimizer.state_dict())
    losses += train_steps(trainer, NUM_STEPS - SAVED_STEP)
    stepper.close()
    return TrainedRun(
        checkpoint=trainer.checkpointer.latest,
        saved_logits=saved_logits,
        saved_parameters=saved_parameters,
        saved_optimizer=saved_optimizer,
        metric_names=set(stepper.optimizer.metrics()),
        losses=losses,
        tensors=full_tensors(trainer),
        state=stepper.state,
    )


def copies(tensors: Mapping[str, torch.Tensor]) -> Weights:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def warm_started(folder: Path, method: str, checkpoint: Path) -> Trainer:
    trainer = tiny_trainer(folder, method, "--checkpoint.initial_weights", str(checkpoint))
    trainer.stepper.close()
    assert trainer.stepper.state.step == 0
    return trainer


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    """Of two sequences that are the same in all tests, of two documents each."""
    tokens = torch.randint(0, 271, (2, 16), generator=torch.Generator().manual_seed(0))
    document_ids = (torch.arange(16) >= 7).long().expand(2, 16)
    return model(tokens, document_ids).clone()


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
def test_a_run_without_a_save_has_the_same_losses(corpora, trained, method):
    run = trained(method)
    assert run.losses[-1] < run.losses[0]
    unsaved = tiny_trainer(corpora / f"contract-unsaved-{method}", method)
    assert train_steps(unsaved, SAVED_STEP + 2) == run.losses[: SAVED_STEP + 2]
    unsaved.stepper.close()


@pytest.mark.parametrize("method", METHOD_KEYS)
def test_resuming_equals_a_straight_run_bitwise(corpora, trained, method):
    straight = trained(method)
    resumed = tiny_trainer(corpora / f"contract-{method}", method)
    assert resumed.stepper.state.step == SAVED_STEP
    assert train_steps(resumed, NUM_STEPS - SAVED_STEP) == straight.losses[SAVED_STEP:]
    resumed.stepper.close()
    assert resumed.stepper.state == straight.state
    tensors = full_tensors(resumed)
    assert any(name.startswith("optimizer.") for name in tensors)
    for name, tensor in straight.tensors.items():
        assert torch.equal(tensors[name], tensor), name


@pytest.mark.parametrize("method", METHOD_KEYS)
def test_optimizer_state_moves_to_a_fresh_optimizer(corpora, trained, method):
    saved = trained(method).saved_optimizer
    fresh = tiny_trainer(corpora / f"contract-fresh-{method}", method)
    fresh.stepper.close()
    optimizer = fresh.stepper.optimizer
    assert any(
        not torch.equal(tensor, saved[name]) for name, tensor in optimizer.state_dict().items()
    )
    optimizer.load_state_dict(saved)
    loaded = optimizer.state_dict()
    assert loaded.keys() == saved.keys()
    for name, tensor in saved.items():
        assert torch.equal(loaded[name], tensor), name
    assert set(optimizer.metrics()) == trained(method).metric_names


@pytest.mark.parametrize("method", METHOD_KEYS)
def test_dense_weights_in_the_plain_model_compute_the_same_logits(tmp_path, trained, method):
    run, config = trained(method), tiny_config(tmp_path, method)
    plain = MODELS.build(config.model)
    built = METHODS.build(config.method, config.training.steps, config.job.seed)
    dense = built.dense_weights(run.saved_parameters)
    assert all(
        tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in dense.values()
    )
    untrained = logits(plain)
    plain.load_state_dict(dense, strict=True)
    # (W + s B A) x against W x + s B (A x): fp32 rounding errors of 6e-8 through two blocks;
    # logits are of order 1.
    torch.testing.assert_close(logits(plain), run.saved_logits, rtol=1e-5, atol=1e-5)
    assert (untrained - run.saved_logits).abs().max() > 0.1


EXACT = [
    method
    for method in METHOD_KEYS
    if METHODS[method.removesuffix(MINI)].config_type.keeps_initial_weights
]
"""Methods that start from exactly the weights that they are given."""


def test_only_a_product_without_a_frozen_weight_approximates_initial_weights():
    assert set(METHOD_KEYS) - set(EXACT) == {"low_rank", "sltrain"}


@pytest.mark.parametrize("method", EXACT)
def test_warm_start_computes_what_the_full_rank_checkpoint_does(corpora, trained, method):
    dense = trained("full_rank")
    warm = warm_started(corpora / f"contract-warm-{method}", method, dense.checkpoint)
    # W - s B A + s B A: as above.
    torch.testing.assert_close(logits(warm.stepper.model), dense.saved_logits, rtol=1e-5, atol=1e-5)
    cold = tiny_trainer(corpora / f"contract-cold-{method}", method)
    cold.stepper.close()
    assert (logits(cold.stepper.model) - dense.saved_logits).abs().max() > 0.1


@pytest.mark.parametrize("method", METHOD_KEYS)
def test_a_checkpoint_of_any_method_starts_a_full_rank_run(corpora, trained, method):
    run = trained(method)
    dense = warm_started(corpora / f"contract-target-{method}", "full_rank", run.checkpoint)
    torch.testing.assert_close(logits(dense.stepper.model), run.saved_logits, rtol=1e-5, atol=1e-5)
