"""A product of two factors without a frozen weight, which starts from the nearest plain weights."""

import logging
from pathlib import Path

import pytest
import torch
from support.tiny import full_tensors, tiny_config, tiny_trainer, train_steps
from support.trained import save_run
from torch import Tensor, nn

from switchtitan.contracts import Reparametrized
from switchtitan.distributed.initial_draws import plain_value
from switchtitan.distributed.seeds import generator_for
from switchtitan.distributed.world import stop_world
from switchtitan.hub.dense_checkpoint import read_dense_checkpoint
from switchtitan.methods import product, sltrain
from switchtitan.methods.product import ProductLinear, balanced_factors
from switchtitan.models import MODELS
from switchtitan.spectra.weight_change import checkpoint_origin, checkpoint_spectra

RANK = 3
SHAPES = [(7, 5), (5, 5), (5, 9)]
LAYER = "model.layers.0.self_attn.q_proj"


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def nearest(weight: Tensor, rank: int) -> Tensor:
    """The best approximation by rank, in float64."""
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    return left[:, :rank] * values[:rank] @ right[:rank]


@pytest.mark.parametrize("shape", SHAPES)
def test_factors_are_balanced_and_their_product_is_the_best_of_its_rank(shape):
    weight = draw(*shape)
    lora_a, lora_b = balanced_factors(weight, RANK)
    assert (lora_a.shape, lora_b.shape) == ((RANK, shape[1]), (RANK, shape[0]))
    assert lora_a.is_contiguous()
    assert lora_b.is_contiguous()
    # Rounded to fp32 once, values of order 1.
    torch.testing.assert_close(
        (lora_b.double().T @ lora_a.double()), nearest(weight, RANK), rtol=0, atol=1e-6
    )
    roots = torch.linalg.svdvals(weight.double())[:RANK].sqrt().float()
    torch.testing.assert_close(lora_a.norm(dim=1), roots)
    torch.testing.assert_close(lora_b.norm(dim=1), roots)


def test_a_projection_onto_other_directions_is_farther_away():
    weight = draw(7, 5).double()
    error = (weight - nearest(weight, RANK)).norm()
    other = torch.linalg.qr(draw(5, RANK, seed=1).double()).Q
    assert (weight - weight @ other @ other.T).norm() > 1.2 * error


def test_a_weight_of_a_lower_rank_has_factors_that_are_finite():
    weight = draw(7, 1) @ draw(1, 5, seed=1)
    lora_a, lora_b = balanced_factors(weight, RANK)
    assert all(torch.isfinite(factor).all() for factor in (lora_a, lora_b))
    torch.testing.assert_close(lora_b.T @ lora_a, weight, rtol=0, atol=2e-6)


@pytest.mark.parametrize("has_bias", [False, True])
def test_a_layer_computes_the_product_and_its_gradients(has_bias):
    plain = nn.Linear(5, 7, bias=has_bias, dtype=torch.float64)
    layer = ProductLinear(plain, RANK).double()
    with torch.no_grad():
        for seed, parameter in enumerate(layer.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=seed))
    assert [name for name, _ in layer.named_parameters()] == ["lora_a", "lora_b"] + (
        ["bias"] if has_bias else []
    )
    x = draw(2, 4, 5, seed=8).double().requires_grad_()
    expected = x @ (layer.lora_b.T @ layer.lora_a).T
    if has_bias:
        expected = expected + layer.bias
    torch.testing.assert_close(layer(x), expected)
    inputs = [x, *layer.parameters()]
    ours = torch.autograd.grad(layer(x).square().sum(), inputs)
    theirs = torch.autograd.grad(expected.square().sum(), inputs)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", SHAPES)
def test_ranks_get_their_rows_of_the_same_factors(shape):
    layer = ProductLinear(nn.Linear(shape[1], shape[0], bias=False), RANK)
    assert isinstance(layer, Reparametrized)
    weight = draw(*shape)

    def generator(name: str) -> torch.Generator:
        return generator_for(1, name)

    full = layer.initial_tensors(weight, generator)
    for first, last in ((0, 2), (2, 3), (3, 3)):
        rows = {"lora_a": range(first, last), "lora_b": range(last), "weight": range(shape[0])}
        part = layer.initial_tensors(weight, generator, rows)
        assert torch.equal(part["lora_a"], full["lora_a"][first:last])
        assert torch.equal(part["lora_b"], full["lora_b"][:last])


@pytest.mark.parametrize("method", ["low_rank", "sltrain"])
def test_a_run_that_resumes_decomposes_no_weight(corpora, monkeypatch, method):
    folder = corpora / f"{method}-resumed"
    save_run(folder, method, num_steps=3)
    stop_world()

    def decompose(*_: object, **__: object) -> None:
        pytest.fail("decomposed a weight whose factors are in the checkpoint")

    for module in (product, sltrain):
        monkeypatch.setattr(module, "balanced_factors", decompose)
    resumed = tiny_trainer(folder, method)
    resumed.stepper.close()
    assert resumed.stepper.state.step == 3


def test_a_run_starts_from_the_weights_nearest_to_those_of_the_plain_model(corpora):
    folder = corpora / "low-rank-start"
    config = tiny_config(folder, "low_rank")
    trainer = tiny_trainer(folder, "low_rank")
    trainer.stepper.close()
    tensors = full_tensors(trainer)
    stop_world()
    with torch.device("meta"):
        plain = MODELS.build(config.model)
    for name, parameter in plain.named_parameters():
        drawn = plain_value(plain, config.job.seed, name, parameter.shape)
        layer = name.removesuffix(".weight")
        if f"model.{name}" in tensors:
            assert torch.equal(tensors[f"model.{name}"], drawn), name
        else:
            lora_a, lora_b = (tensors[f"model.{layer}.{factor}"] for factor in ("lora_a", "lora_b"))
            torch.testing.assert_close(
                lora_b.double().T @ lora_a.double(), nearest(drawn, 6), rtol=0, atol=1e-7
            )


def test_the_change_of_a_weight_has_at_most_twice_the_rank(corpora):
    """The change from the plain initial weights would have all ranks."""
    checkpoint = saved(corpora / "low-rank-change", "low_rank")
    spectra = checkpoint_spectra(checkpoint, ["*.up_proj"])
    assert len(spectra) == 2
    for values in spectra.values():
        assert len(values) == 20
        assert values[12:].max() < 1e-4 * values[0]
    dense = read_dense_checkpoint(checkpoint)
    origin = checkpoint_origin(checkpoint)
    with torch.device("meta"):
        plain = MODELS.build(origin.model_config)
    for layer in spectra:
        name = f"{layer}.weight"
        drawn = plain_value(plain, origin.seed, name, dense[name].shape)
        values = torch.linalg.svdvals(dense[name] - drawn)
        assert values[12:].max() > 1e-2 * values[0]


def saved(folder: Path, method: str) -> Path:
    """The checkpoint of a few steps."""
    trainer = tiny_trainer(folder, method)
    train_steps(trainer, 4)
    trainer.save()
    trainer.checkpointer.finish()
    trainer.stepper.close()
    stop_world()
    assert trainer.checkpointer.latest is not None
    return trainer.checkpointer.latest


@torch.no_grad()
def logits_of(folder: Path, method: str, checkpoint: Path) -> Tensor:
    """Of a run that starts from a checkpoint."""
    trainer = tiny_trainer(folder, method, "--checkpoint.initial_weights", str(checkpoint))
    trainer.stepper.close()
    tokens = torch.randint(0, 271, (2, 16), generator=torch.Generator().manual_seed(0))
    result: Tensor = trainer.stepper.model(tokens, torch.zeros(2, 16, dtype=torch.int32)).clone()
    stop_world()
    return result


def test_initial_weights_are_approximated_and_the_log_says_so(corpora, caplog):
    dense = saved(corpora / "low-rank-dense", "full_rank")
    product = saved(corpora / "low-rank-product", "low_rank")
    own = logits_of(corpora / "low-rank-of-own", "full_rank", product)
    with caplog.at_level(logging.WARNING):
        exact = logits_of(corpora / "low-rank-exact", "lora", dense)
        assert "approximation" not in caplog.text
        again = logits_of(corpora / "low-rank-again", "low_rank", product)
        approximated = logits_of(corpora / "low-rank-approximated", "low_rank", dense)
    assert "'low_rank' starts from an approximation of the initial weights" in caplog.text
    # A product of this rank is its own approximation, to fp32 rounding through two blocks.
    torch.testing.assert_close(again, own, rtol=1e-5, atol=1e-5)
    assert (approximated - exact).abs().max() > 1e-2
