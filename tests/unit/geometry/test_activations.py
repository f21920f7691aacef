"""Similarity of activations against closed forms, and of models' blocks."""

import pytest
import torch

from switchtitan.contracts import IGNORED_TARGET, Batch
from switchtitan.geometry.activations import (
    SimilarityOfActivations,
    compare_activations,
    mean_similarity,
)
from switchtitan.models import MODELS

NUM_TOKENS, DIM = 300, 6


def features(seed, dim=DIM):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(NUM_TOKENS, dim, generator=generator, dtype=torch.float64) + 2


def similarity(first, second, num_parts=1):
    sums = SimilarityOfActivations()
    for x, y in zip(first.chunk(num_parts), second.chunk(num_parts), strict=True):
        sums.add(x, y)
    return sums.result()


def test_cka_of_rotated_scaled_and_shifted_features_is_one_and_the_others_differ():
    x = features(0)
    rotation = torch.linalg.qr(features(1)[:DIM])[0]
    found = similarity(3 * x @ rotation + 5, x)
    assert found.linear_cka == pytest.approx(1)
    assert found.cosine < 0.99
    assert found.relative_l2 > 1


def test_cka_is_not_one_for_other_features_or_another_scale_of_one_feature():
    x = features(0)
    # Of independent features it is about dim / tokens.
    assert similarity(x, features(2)).linear_cka < 0.1
    stretched = x * torch.tensor([10.0, 1, 1, 1, 1, 1], dtype=torch.float64)
    assert 0.2 < similarity(x, stretched).linear_cka < 0.9


def test_cka_equals_the_form_with_matrices_of_tokens():
    x, y = features(0), features(0) @ features(3)[:DIM] + features(4)
    centring = torch.eye(NUM_TOKENS, dtype=torch.float64) - 1 / NUM_TOKENS
    k, m = centring @ x @ x.T @ centring, centring @ y @ y.T @ centring
    expected = (k * m).sum() / (k.norm() * m.norm())
    assert similarity(x, y, num_parts=7).linear_cka == pytest.approx(expected.item(), rel=1e-9)


def test_cosine_and_distance_of_known_vectors():
    y = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    x = torch.tensor([[3.0, 0.0], [2.0, 0.0]])  # parallel, orthogonal
    found = similarity(x, y)
    assert found.cosine == pytest.approx(0.5)
    assert found.relative_l2 == pytest.approx(((4 + 4 + 4) / 5) ** 0.5)
    assert similarity(y, y)[1:] == pytest.approx((1, 0))
    assert mean_similarity([found, similarity(y, y)]).cosine == pytest.approx(0.75)


def tiny_model(seed):
    section = MODELS["llama"].config_type.model_validate(
        {
            "name": "llama",
            "hidden_size": 12,
            "intermediate_size": 20,
            "num_layers": 3,
            "num_heads": 2,
            "vocab_size": 31,
        }
    )
    torch.manual_seed(seed)
    return MODELS.build(section).requires_grad_(False).eval()


def test_blocks_of_one_model_are_equal_until_the_block_that_differs():
    one, other = tiny_model(0), tiny_model(0)
    with torch.no_grad():
        other.blocks()["model.layers.1"].mlp.down_proj.weight.mul_(-1.5)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(31, (4, 9), generator=generator)
    targets = tokens.roll(-1, 1)
    documents = torch.zeros(4, 9, dtype=torch.int32)
    batches = [Batch(tokens[:2], targets[:2], documents[:2])]
    batches.append(Batch(tokens[2:], targets[2:], documents[2:]))
    found = compare_activations(one, other, batches, torch.device("cpu"))
    assert list(found) == [f"model.layers.{index}" for index in range(3)]
    assert found["model.layers.0"] == pytest.approx((1, 1, 0), abs=1e-9)
    for name in ("model.layers.1", "model.layers.2"):
        assert found[name].linear_cka < 0.999
        assert found[name].relative_l2 > 0.01
    # Padding does not count.
    padding = torch.full_like(targets[2:], IGNORED_TARGET)
    padded = compare_activations(
        one, other, [batches[0], Batch(tokens[2:], padding, documents[2:])], torch.device("cpu")
    )
    alone = compare_activations(one, other, batches[:1], torch.device("cpu"))
    assert padded["model.layers.2"] == pytest.approx(alone["model.layers.2"])
    assert alone["model.layers.2"] != found["model.layers.2"]
