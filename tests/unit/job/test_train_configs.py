"""Every shipped configuration builds a model with the expected numbers of values."""

from pathlib import Path

import pytest
import torch
from torch import nn

from switchtitan.config.shipped import QUICKSTART
from switchtitan.job.config import JobConfig, parse_arguments
from switchtitan.methods import METHODS
from switchtitan.models import MODELS
from switchtitan.training.description import count_parameters

TRAIN_CONFIGS = [
    file
    for file in sorted(QUICKSTART.parent.glob("*.toml"))
    if not file.read_text().startswith("# Base of ")
]

PUBLISHED_SIZES = {
    "130m": (768, 2048, 12),
    "250m": (768, 2560, 24),
    "350m": (1024, 2736, 24),
    "1b": (2048, 5461, 24),
    "3b": (2560, 6848, 32),
    "7b": (4096, 11008, 32),
}
"""Hidden size, intermediate size and layers of the published runs (arXiv 2406.06564)."""


def build_on_meta(file: Path) -> tuple[JobConfig, nn.Module]:
    config = parse_arguments(["--config", str(file)], 1)
    with torch.device("meta"):
        model = MODELS.build(config.model)
    METHODS.build(config.method, config.training.steps, config.job.seed).prepare_model(model)
    return config, model


def expected_counts(config: JobConfig) -> dict[str, int]:
    """Count the values of embedding and head, 2 L + 1 norms, and seven linear layers per block."""
    method = config.method.model_dump()
    if config.model.size in PUBLISHED_SIZES:
        hidden, wide, num_layers = PUBLISHED_SIZES[config.model.size]
    else:
        dims = config.model.dimensions()
        hidden, wide, num_layers = dims.hidden_size, dims.intermediate_size, dims.num_layers
        assert dims.num_kv_heads == dims.num_heads
    around = 2 * config.model.vocab_size * hidden + (2 * num_layers + 1) * hidden
    dense = num_layers * (4 * hidden * hidden + 3 * wide * hidden)
    # Sum of out + in over the seven layers of all blocks. In each, min(out, in) is the hidden size.
    sides = num_layers * (4 * 2 * hidden + 3 * (hidden + wide))
    if config.model.name == "cola":
        return {"trainable": around + config.model.rank * sides, "frozen": 0, "buffers": 0}
    if method["name"] not in ("low_rank", "lora", "relora", "sltrain", "switchlora"):
        return {"trainable": around + dense, "frozen": 0, "buffers": 0}
    assert hidden <= wide
    sparse = 0
    if method["name"] == "sltrain":
        # The input of six layers is the hidden size.
        by_hidden, by_wide = (round(method["density"] * size) for size in (hidden, wide))
        sparse = num_layers * ((4 * hidden + 2 * wide) * by_hidden + hidden * by_wide)
    return {
        "trainable": around + method["rank"] * sides + sparse,
        "frozen": 0 if method["name"] in ("low_rank", "sltrain") else dense,
        "buffers": {"switchlora": hidden * sides, "sltrain": 7 * num_layers}.get(method["name"], 0),
    }


@pytest.mark.parametrize("file", TRAIN_CONFIGS, ids=lambda file: file.stem)
def test_a_shipped_config_builds_with_the_counts_of_its_sizes(file: Path) -> None:
    config, model = build_on_meta(file)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert count_parameters(model) == expected_counts(config)


@pytest.mark.parametrize(
    ("size", "rank", "trainable", "full_rank"),
    [("350m", 256, 185.4, 368.2), ("1b", 512, 609.7, 1339.5)],
)
def test_switchlora_trains_the_published_number_of_parameters(
    size: str, rank: int, trainable: float, full_rank: float
) -> None:
    folder = QUICKSTART.parent
    config, model = build_on_meta(folder / f"llama_{size}_switchlora.toml")
    assert config.method.rank == rank
    # Published in millions with one decimal.
    assert round(count_parameters(model)["trainable"] / 1e6, 1) == trainable
    _, plain = build_on_meta(folder / f"llama_{size}_full_rank.toml")
    assert round(count_parameters(plain)["trainable"] / 1e6, 1) == full_rank
