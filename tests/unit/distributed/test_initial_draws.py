"""Initial values drawn in blocks of rows: equal on any number of ranks, and well distributed."""

import itertools

import pytest
import torch

from switchtitan.contracts import Reparametrized
from switchtitan.distributed.initial_draws import (
    RandomRows,
    block_size,
    covering_blocks,
    plain_value,
    split_blocks,
)
from switchtitan.distributed.seeds import generator_for
from switchtitan.distributed.shards import rows_per_rank
from switchtitan.methods import METHODS
from switchtitan.models import MODELS
from switchtitan.models.llama.config import LlamaConfig

LARGE = (900, 620)
"""More elements than one block may have; 900 rows are not a multiple of 16 blocks."""


def rows_of_rank(num_rows: int, rank: int, num_ranks: int) -> range:
    chunk = rows_per_rank(num_rows, num_ranks)
    return range(min(rank * chunk, num_rows), min((rank + 1) * chunk, num_rows))


def normal_rows(shape: tuple[int, ...], name: str = "a") -> RandomRows:
    def draw(block: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        return torch.empty(block).normal_(generator=generator)

    return RandomRows(name, shape, draw, lambda block_name: generator_for(3, block_name))


@pytest.mark.parametrize("shape", [LARGE, (33, 20000), (600_000,), (7, 5), (1, 600_000)])
def test_blocks_cover_all_rows_once(shape):
    rows = range(shape[0])
    blocks = split_blocks(shape, covering_blocks(shape, rows))
    assert list(itertools.chain(*blocks)) == list(rows)
    assert all(len(block) == block_size(shape) for block in blocks[:-1])
    assert len(blocks) == 1 if torch.Size(shape).numel() <= 2**19 else 1 <= len(blocks) <= 16


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8, 1000])
def test_rows_do_not_depend_on_the_number_of_ranks(num_ranks):
    full = normal_rows(LARGE)[range(LARGE[0])]
    parts = [
        normal_rows(LARGE)[rows_of_rank(LARGE[0], rank, num_ranks)] for rank in range(num_ranks)
    ]
    assert torch.equal(torch.cat(parts), full)


def test_a_small_tensor_is_drawn_at_once_and_a_large_one_starts_alike():
    """A tensor of one block has the values of a single draw."""
    full = torch.empty(40, 50).normal_(generator=generator_for(3, "a"))
    assert torch.equal(normal_rows((40, 50))[range(40)], full)
    size = block_size(LARGE)
    assert size < LARGE[0]
    first = torch.empty(size, LARGE[1]).normal_(generator=generator_for(3, "a"))
    assert torch.equal(normal_rows(LARGE)[range(size)], first)


def test_a_rank_draws_its_own_blocks_only():
    drawn = []

    def draw(block: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        drawn.append(block[0])
        return torch.zeros(block)

    RandomRows("a", LARGE, draw, lambda name: generator_for(0, name))[range(113, 226)]
    assert sum(drawn) <= 113 + 2 * block_size(LARGE)


def test_values_of_all_blocks_are_normal_and_unrelated():
    values = normal_rows(LARGE)[range(LARGE[0])].double()
    count = values.numel()
    # Five standard errors: of the mean 1 / sqrt(n), of the second moment sqrt(2 / n), of the
    # fourth sqrt(96 / n).
    assert abs(values.mean().item()) < 5 / count**0.5
    assert values.square().mean().item() == pytest.approx(1, abs=5 * (2 / count) ** 0.5)
    assert values.pow(4).mean().item() == pytest.approx(3, abs=5 * (96 / count) ** 0.5)
    size = block_size(LARGE)
    blocks = values[: LARGE[0] // size * size].reshape(-1, size * LARGE[1])
    correlations = torch.corrcoef(blocks)[~torch.eye(len(blocks), dtype=torch.bool)]
    assert correlations.abs().max() < 5.5 / blocks.shape[1] ** 0.5


METHODS_AND_INITS = [
    ("lora", {"init": "lora"}),
    ("lora", {"init": "balanced"}),
    ("switchlora", {}),
    ("switchlora", {"init": "lora"}),
    ("switchlora", {"candidates": "constant"}),
]


@pytest.mark.parametrize(("method", "keys"), METHODS_AND_INITS)
@pytest.mark.parametrize("shape", [LARGE, LARGE[::-1]])
def test_layers_start_alike_on_any_number_of_ranks(method, keys, shape):
    out_features, in_features = shape
    with torch.device("meta"):
        model = torch.nn.ModuleDict({"proj": torch.nn.Linear(in_features, out_features, False)})
    section = METHODS[method].config_type(name=method, rank=100, targets=("proj",), **keys)
    METHODS.build(section, 10, seed=0).prepare_model(model)
    layer = model["proj"]
    assert isinstance(layer, Reparametrized)
    weight = normal_rows(shape, "weight")
    numbers = {
        name: tensor.shape[0]
        for name, tensor in (*layer.named_parameters(), *layer.named_buffers())
    }

    def generator(name: str) -> torch.Generator:
        return generator_for(1, name)

    full = layer.initial_tensors(weight[range(out_features)], generator)
    for num_ranks in (2, 3, 8):
        for rank in range(num_ranks):
            own = {name: rows_of_rank(count, rank, num_ranks) for name, count in numbers.items()}
            rows = own | {"weight": covering_blocks(shape, own["weight"])}
            drawn = layer.initial_tensors(weight[rows["weight"]], generator, rows)
            assert drawn.keys() == full.keys() == numbers.keys()
            for name, wanted in rows.items():
                assert torch.equal(drawn[name], full[name][wanted.start : wanted.stop]), name
    merged = full["weight"] + layer.scale * full["lora_b"].t() @ full["lora_a"]
    # W - s B A + s B A in fp32, terms of order 1.
    torch.testing.assert_close(merged, weight[range(out_features)], rtol=0, atol=4e-6)


def test_the_plain_value_has_the_configured_deviation():
    config = LlamaConfig(
        size="9m", hidden_size=132, num_heads=3, vocab_size=5000, num_layers=1, init_std=0.02
    )
    with torch.device("meta"):
        model = MODELS.build(config)
    value = plain_value(model, 1, "model.embed_tokens.weight", torch.Size((5000, 132))).double()
    assert value.std().item() == pytest.approx(0.02, rel=5 / (2 * value.numel()) ** 0.5)
    assert abs(value.mean().item()) < 5 * 0.02 / value.numel() ** 0.5
    part = plain_value(
        model, 1, "model.embed_tokens.weight", torch.Size((5000, 132)), range(1700, 2100)
    )
    assert torch.equal(part.double(), value[1700:2100])
