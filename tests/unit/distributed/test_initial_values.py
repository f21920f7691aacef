"""Initial values: drawn in blocks of rows from the seed and the name, equal on any number of ranks,
and dropout, drawn from the seed and the step."""

from functools import partial

import pytest
import torch
from support.small_llama import MODEL, initial_tensors

from switchtitan.distributed.fsdp import materialize
from switchtitan.distributed.initial import block_size, check_replaced, covering_blocks, plain_value
from switchtitan.distributed.shards import rows_per_rank
from switchtitan.methods import METHODS
from switchtitan.methods.full_rank import FullRankConfig
from switchtitan.methods.lora import LoraConfig
from switchtitan.methods.switchlora import SwitchLoraConfig
from switchtitan.models import MODELS
from switchtitan.numerics.random import generator_for, seed_dropout

LARGE = (900, 620)
"""More elements than one block may have; 900 rows are not a multiple of 16 blocks."""


# Seeds.
def test_dropout_depends_only_on_seed_step_and_rank():
    def draw(*place):
        seed_dropout(*place)
        return tuple(torch.rand(3).tolist())

    places = [(seed, step, rank) for seed in (1, 11) for step in (0, 1, 12) for rank in (0, 1, 2)]
    drawn = {place: draw(*place) for place in places}
    assert len(set(drawn.values())) == len(places)
    assert all(draw(*place) == values for place, values in drawn.items())


# Blocks.
def rows_of_rank(num_rows, rank, num_ranks):
    chunk = rows_per_rank(num_rows, num_ranks)
    return range(min(rank * chunk, num_rows), min((rank + 1) * chunk, num_rows))


class NormalValues:
    """Draws normal values, and counts the rows."""

    def __init__(self):
        self.num_drawn = 0

    def initial_value(self, name, shape, generator):
        self.num_drawn += shape[0]
        return torch.empty(shape).normal_(generator=generator)


def normal_rows(shape, rows, name="a"):
    return plain_value(NormalValues(), 3, name, torch.Size(shape), rows)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8, 1000])
def test_rows_do_not_depend_on_the_number_of_ranks(num_ranks):
    full = normal_rows(LARGE, range(LARGE[0]))
    parts = [
        normal_rows(LARGE, rows_of_rank(LARGE[0], rank, num_ranks)) for rank in range(num_ranks)
    ]
    assert torch.equal(torch.cat(parts), full)


def test_a_small_tensor_is_drawn_at_once_a_large_one_starts_alike_and_a_rank_draws_its_own_blocks():
    full = torch.empty(40, 50).normal_(generator=generator_for(3, "a"))
    assert torch.equal(normal_rows((40, 50), None), full)
    size, model = block_size(LARGE), NormalValues()
    assert size < LARGE[0]
    first = torch.empty(size, LARGE[1]).normal_(generator=generator_for(3, "a"))
    assert torch.equal(normal_rows(LARGE, range(size)), first)
    assert not torch.equal(normal_rows(LARGE, range(size, 2 * size)), first)
    plain_value(model, 3, "a", torch.Size(LARGE), range(113, 226))
    assert model.num_drawn <= 113 + 2 * size


@pytest.mark.parametrize(
    ("method", "keys"),
    [
        ("lora", {"init": "lora"}),
        ("lora", {"init": "balanced", "alpha": 1.0}),
        ("switchlora", {}),
        ("switchlora", {"init": "lora"}),
        ("switchlora", {"candidates": "constant"}),
    ],
)
@pytest.mark.parametrize("shape", [LARGE, LARGE[::-1]])
def test_layers_start_alike_on_any_number_of_ranks(method, keys, shape):
    out_features, in_features = shape
    section = METHODS.rows[method].config_type(name=method, rank=100, **keys)
    linear = torch.nn.Linear(in_features, out_features, bias=False, device="meta")
    layer = METHODS.build(section, 10, seed=0).build_layer("proj", linear)
    weight = normal_rows(shape, None, "weight")
    tensors = dict(layer.named_parameters()) | dict(layer.named_buffers())
    numbers = {name: tensor.shape[0] for name, tensor in tensors.items()}
    generator = partial(generator_for, 1)
    full = initial_tensors(layer, weight, generator)
    for num_ranks in (2, 3, 8):
        for rank in range(num_ranks):
            own = {name: rows_of_rank(count, rank, num_ranks) for name, count in numbers.items()}
            rows = own | {"weight": covering_blocks(shape, own["weight"])}
            first, end = rows["weight"].start, rows["weight"].stop
            drawn = layer.initial_tensors(weight[first:end], generator, rows)
            assert drawn.keys() == full.keys() == numbers.keys()
            for name, wanted in rows.items():
                assert torch.equal(drawn[name], full[name][wanted.start : wanted.stop]), name
    merged = full["weight"] + layer.scale * full["lora_b"].t() @ full["lora_a"]
    # W - s B A + s B A in fp32, terms of order 1.
    torch.testing.assert_close(merged, weight, rtol=0, atol=4e-6)


class Gain(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(3))


def test_a_layer_without_initial_values_is_refused():
    model = MODELS.build(MODEL)
    names = {name for name, _ in model.named_parameters()}
    METHODS.build(CONFIGS[-1], 10, seed=0).prepare_model(model)
    check_replaced(model, names)
    model.model.norm = Gain()
    with pytest.raises(TypeError, match=r"Gain .*\(model\.norm\.gain\).*contracts\.Reparametrized"):
        check_replaced(model, names)


# Models.
BALANCED = LoraConfig(rank=3, alpha=1.0, init="balanced")
CONFIGS = [FullRankConfig(), BALANCED, SwitchLoraConfig(rank=3)]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_values_depend_on_the_seed_and_no_two_tensors_share_their_random_numbers(config):
    drawn = []
    for seed in (1, 1, 2):
        with torch.device("meta"):
            model = MODELS.build(MODEL)
            METHODS.build(config, 10, seed=0).prepare_model(model)
        materialize(model, torch.device("cpu"), seed)
        drawn.append(model.state_dict())
    first, again, other = drawn
    for name, value in first.items():
        assert torch.equal(again[name], value), name
        assert torch.equal(other[name], value) == (value.std() == 0), name
    # Compared after scaling, since bounds differ by layer. Factors copy candidates.
    beginnings = [
        tuple((value.flatten()[:20] / value.flatten()[0]).round(decimals=3).tolist())
        for name, value in first.items()
        if value.std() > 0 and not name.endswith((".lora_a", ".lora_b"))
    ]
    assert len(set(beginnings)) == len(beginnings) >= 16
