"""Initial values: drawn from the seed and the name, or given."""

import pytest
import torch
from torch import Tensor

from switchtitan.distributed.fsdp import materialize, materialize_to_restore
from switchtitan.distributed.seeds import generator_for
from switchtitan.methods import METHODS
from switchtitan.methods.full_rank import FullRankConfig
from switchtitan.methods.lora import LoraConfig
from switchtitan.methods.switchlora import SwitchLoraConfig
from switchtitan.models import MODELS
from switchtitan.models.llama.config import LlamaConfig

MODEL = LlamaConfig(
    size="9m",
    hidden_size=12,
    intermediate_size=18,
    num_layers=2,
    num_heads=3,
    num_kv_heads=1,
    vocab_size=31,
)
CONFIGS = [FullRankConfig(), LoraConfig(rank=3, init="balanced"), SwitchLoraConfig(rank=3)]


def values(
    config, seed: int, initial_weights: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    with torch.device("meta"):
        model = MODELS.build(MODEL)
    METHODS.build(config, 10, seed=0).prepare_model(model)
    materialize(model, torch.device("cpu"), seed, initial_weights)
    return model.state_dict()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_no_two_tensors_share_their_random_numbers(config):
    drawn = {name: v.flatten() for name, v in values(config, 1).items() if v.std() > 0}
    assert len(drawn) >= 16
    beginnings = {}
    for name, value in drawn.items():
        # Compared after scaling, since bounds differ by layer. Factors copy candidates.
        if not name.endswith((".lora_a", ".lora_b")):
            beginnings[tuple((value[:20] / value[0]).round(decimals=3).tolist())] = name
    assert len(beginnings) == sum(not name.endswith((".lora_a", ".lora_b")) for name in drawn)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_values_depend_on_the_seed(config):
    first, again, other = (values(config, seed) for seed in (1, 1, 2))
    for name, value in first.items():
        assert torch.equal(again[name], value), name
        assert torch.equal(other[name], value) == (value.std() == 0), name


def test_full_rank_values_are_those_of_the_model():
    drawn = values(FullRankConfig(), 5)
    model = MODELS.build(MODEL)
    for name, value in drawn.items():
        assert torch.equal(value, model.initial_value(name, value.shape, generator_for(5, name))), (
            name
        )


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_given_weights_are_the_initial_weights(config):
    given = values(FullRankConfig(), 7)
    with torch.device("meta"):
        model = MODELS.build(MODEL)
    method = METHODS.build(config, 10, seed=0)
    method.prepare_model(model)
    materialize(model, torch.device("cpu"), 1, given)
    merged = method.dense_weights(dict(model.named_parameters()))
    assert merged.keys() == given.keys()
    for name, value in given.items():
        # W - s B A + s B A in fp32; factors of order 1, weights of 0.02.
        torch.testing.assert_close(merged[name], value, rtol=0, atol=1e-6)


PRODUCTS = [
    METHODS.restore({"name": "low_rank", "rank": 3}),
    METHODS.restore({"name": "sltrain", "rank": 3, "density": 0.2}),
]


@pytest.mark.parametrize("config", [*CONFIGS, *PRODUCTS], ids=lambda config: config.name)
def test_a_model_with_the_tensors_of_a_checkpoint_computes_what_the_saved_one_does(config):
    models = []
    for _ in range(2):
        with torch.device("meta"):
            models.append(MODELS.build(MODEL))
        METHODS.build(config, 10, seed=0).prepare_model(models[-1])
    saved, restored = models
    materialize(saved, torch.device("cpu"), 1)
    materialize_to_restore(restored, torch.device("cpu"), 1)
    restored.load_state_dict(saved.state_dict(), strict=True)
    buffers = dict(restored.named_buffers())
    for name, buffer in saved.named_buffers():
        assert torch.equal(buffers[name], buffer), name
    tokens = torch.arange(10).view(2, 5)
    documents = torch.zeros_like(tokens)
    assert torch.equal(restored(tokens, documents), saved(tokens, documents))
