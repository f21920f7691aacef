"""A tied head computes with the embedding's weight, and adds no parameter."""

import copy
from pathlib import Path

import pytest
import torch
from support.folders import draw_tokens, save_random_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from switchtitan.hub.initial_weights import read_initial_weights
from switchtitan.hub.model_folder import read_model_folder
from switchtitan.models import MODELS
from switchtitan.models.head import TiedHead
from switchtitan.models.loss import CrossEntropy, summed_cross_entropy


@pytest.fixture
def tied() -> tuple[nn.Embedding, TiedHead]:
    torch.manual_seed(0)
    embedding = nn.Embedding(11, 5)
    return embedding, TiedHead(embedding)


def test_a_tied_head_has_no_parameter_of_its_own(tied: tuple[nn.Embedding, TiedHead]) -> None:
    embedding, head = tied
    assert not list(head.parameters())
    assert not head.state_dict()
    hidden = torch.randn(2, 3, 5)
    assert torch.equal(head(hidden), hidden @ embedding.weight.t())


def test_a_copy_of_the_model_is_tied_to_its_own_embedding() -> None:
    keys = {"hidden_size": 8, "intermediate_size": 9, "num_layers": 1, "num_heads": 2}
    model = MODELS.build(MODELS.restore({"name": "llama", "tied_head": True, **keys}))
    copied = copy.deepcopy(model)
    tokens = torch.zeros(1, 3, dtype=torch.int64)
    with torch.no_grad():
        copied.model.embed_tokens.weight.zero_()
        assert not copied(tokens, tokens).any()
        assert model(tokens, tokens).any()


def test_the_loss_in_chunks_has_the_gradient_of_the_loss_of_all_logits(
    tied: tuple[nn.Embedding, TiedHead],
) -> None:
    embedding, head = tied
    tokens, targets = torch.randint(11, (2, 7)), torch.randint(11, (2, 7))

    def gradient(loss: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(loss, embedding.weight)
        return found

    chunked = gradient(CrossEntropy(False)(embedding(tokens).sin(), head, targets))
    expected = gradient(summed_cross_entropy(head(embedding(tokens).sin()), targets))
    torch.testing.assert_close(chunked, expected)
    # The control: without the embedding's part, the gradient is another one.
    of_head = gradient(CrossEntropy(False)(embedding(tokens).sin().detach(), head, targets))
    assert (of_head - expected).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["llama3, tied", "qwen2, tied", "qwen2"])
def test_gradients_equal_those_of_transformers(tmp_path: Path, kind: str) -> None:
    folder = save_random_model(kind, tmp_path / "model")
    config = MODELS.restore(read_model_folder(folder))
    model = MODELS.build(config)
    model.load_state_dict(read_initial_weights(folder, config).tensors)
    other = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = draw_tokens(2, 17)
    logits = model(tokens, torch.zeros(2, 17, dtype=torch.int32))
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))
    (logits * direction).sum().backward()
    (other(input_ids=tokens).logits * direction).sum().backward()
    theirs = dict(other.named_parameters())
    assert {name for name, _ in model.named_parameters()} == theirs.keys()
    for name, parameter in model.named_parameters():
        expected = theirs[name].grad
        assert parameter.grad is not None
        assert expected is not None
        assert (parameter.grad - expected).norm() < 1e-5 * expected.norm(), name
