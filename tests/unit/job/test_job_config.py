"""The full configuration: every shipped file, values that do not fit together, and its help."""

import sys
from pathlib import Path
from typing import Literal

import pytest
import torch
from pydantic import Field
from support.commands import run
from torch import nn

from switchtitan.config import FOLDER, QUICKSTART, resolved_toml, toml_value
from switchtitan.contracts import MethodConfig, ModelConfig
from switchtitan.errors import ConfigError
from switchtitan.job.checks import keys_without_effect, missing_toolchain
from switchtitan.job.config import parse_arguments, parse_unchecked, print_note
from switchtitan.methods import METHODS
from switchtitan.models import MODELS
from switchtitan.registry import Component
from switchtitan.training.describe import count_parameters

FILES = sorted(FOLDER.glob("*.toml"))
PUBLISHED_SIZES = {
    "130m": (768, 2048, 12),
    "250m": (768, 2560, 24),
    "350m": (1024, 2736, 24),
    "1b": (2048, 5461, 24),
    "3b": (2560, 6848, 32),
    "7b": (4096, 11008, 32),
}
"""Hidden size, intermediate size and layers of the published runs (arXiv 2406.06564)."""
TINY = """\
[job]
name = "tiny"
output_dir = "outputs/tiny"
[model]
name = "llama"
size = "9m"
vocab_size = 4096
[method]
name = "switchlora"
rank = 16
[optimizer]
name = "adamw"
lr = 0.02
[training]
steps = 40
global_batch_size = 12
local_batch_size = 2
[evaluation]
tokens = 1024
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


@pytest.fixture
def parse(file):
    return lambda *words, num_ranks=1: parse_arguments(["--config", str(file), *words], num_ranks)


def count_on_meta(config):
    with torch.device("meta"):
        model = MODELS.build(config.model)
    METHODS.build(config.method, config.training.steps, config.job.seed).prepare_model(model)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    return count_parameters(model)


def expected_counts(config):
    """Counts the values of embedding and head, 2 L + 1 norms, and seven linear layers per block."""
    method = config.method.model_dump()
    if config.model.size in PUBLISHED_SIZES:
        hidden, wide, num_layers = PUBLISHED_SIZES[config.model.size]
    else:
        hidden, wide, num_layers, num_heads = config.model.sizes
        assert config.model.kv_heads == num_heads
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


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_shipped_file_loads_again_and_builds_the_model_of_its_size(file, tmp_path):
    config = parse_arguments(["--config", str(file)], num_ranks=8)
    assert config.job.name == file.stem
    assert config.job.output_dir == Path("outputs", file.stem)
    (tmp_path / "resolved.toml").write_text(resolved_toml(config))
    assert parse_arguments(["--config", str(tmp_path / "resolved.toml")], num_ranks=8) == config
    assert count_on_meta(config) == expected_counts(config)


@pytest.mark.parametrize(
    ("size", "rank", "trainable", "full_rank"),
    [("350m", 256, 185.4, 368.2), ("1b", 512, 609.7, 1339.5)],
)
def test_switchlora_trains_the_published_number_of_parameters(size, rank, trainable, full_rank):
    switching, plain = (
        parse_arguments(["--config", file], 1)
        for file in (f"llama_{size}_switchlora.toml", f"llama_{size}.toml")
    )
    assert switching.method.rank == rank
    # Published in millions with one decimal.
    assert round(count_on_meta(switching)["trainable"] / 1e6, 1) == trainable
    assert round(count_on_meta(plain)["trainable"] / 1e6, 1) == full_rank


def test_without_a_file_the_quickstart_is_read_at_the_launchers_number_of_ranks(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "7")
    with pytest.raises(ConfigError, match="global_batch_size"):
        parse_arguments([])
    assert parse_arguments([], 1).job.name == QUICKSTART.stem


@pytest.mark.parametrize(
    ("words", "num_ranks", "fragments"),
    [
        (("--training.global_batch_size", "7"), 2, ("global_batch_size = 7", "write 4 or 8")),
        (("--training.global_batch_size", "1"), 1, ("global_batch_size = 1", "write 2")),
        (("--parallelism.replicate", "4"), 6, ("[parallelism] replicate = 4",)),
        (("--method.rank", "128"), 1, ("[method] rank = 128", "q_proj is [128, 128]")),
        (("--method.rank", "1"), 1, ("[method] rank = 1",)),
        (("--method.name", "relora", "--method.reset_interval", "200"), 1,
         ("[method] reset_interval = 200", "[training] steps = 40")),
        (("--method.interval", "9"), 1, ("[method] interval = 9",)),
        (("--method.targets", "q_prj"), 1, ("q_prj",)),
        (("--optimizer.name", "scale"), 1, ('[optimizer] name = "scale"', "adamw or muon")),
        (("--evaluation.tokens", "511"), 1, ("[evaluation] tokens = 511", "seq_len = 512")),
        (("--evaluation.test_tokens", "2000"), 1, ("test_tokens = 2000", "test_fraction")),
        (("--evaluation.test_tokens", "3", "--data.test_fraction", "0.1"), 1,
         ("[evaluation] test_tokens = 3",)),
        (("--data.vocab_size", "5000"), 1, ("[data] vocab_size = 5000", "vocab_size = 4096")),
        (("--profiler.enabled", "true", "--profiler.ranks", "0,3"), 2, ("ranks = [0, 3]", "to 1")),
        (("--model.num_heads", "3"), 1, ("[model] hidden_size = 128", "num_heads = 3")),
        (("--model.attention", "flash_attn"), 1, ("flash_attn",)),
        (("--metrics.trackers", "wandb"), 1, ("[metrics] trackers", "switchtitan[wandb]")),
    ],
)  # fmt: skip
def test_values_that_do_not_fit_together_are_refused(
    parse, monkeypatch, words, num_ranks, fragments
):
    monkeypatch.setattr("switchtitan.job.config.device_type", lambda: "cpu")
    monkeypatch.setattr("switchtitan.job.checks.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        parse(*words, num_ranks=num_ranks)
    for fragment in ("(1 error)", *fragments):
        assert fragment in str(caught.value)


SNAPSHOT = ("--profiler.memory_snapshot_step", "50")


@pytest.mark.parametrize(
    ("device", "num_ranks", "words", "void"),
    [
        ("cpu", 1, (), None),
        ("cpu", 1, ("--training.tf32", "true"), "[training] tf32 = true"),
        ("cuda", 1, ("--training.tf32", "true"), "[training] tf32 = true"),
        ("cuda", 1, ("--training.tf32", "true", "--training.dtype", "float32"), None),
        ("cpu", 1, ("--training.deterministic", "true"), "[training] deterministic = true"),
        ("cuda", 1, ("--training.deterministic", "true"), None),
        ("cpu", 2, ("--parallelism.frozen_weights", "replicate"), None),
        ("cpu", 2, ("--method.name", "galore", "--parallelism.frozen_weights", "replicate"),
         '[parallelism] frozen_weights = "replicate"'),
        ("cpu", 1, ("--method.name", "galore", "--training.frozen_dtype", "bfloat16"),
         '[training] frozen_dtype = "bfloat16"'),
        ("cpu", 1, SNAPSHOT, "[profiler] memory_snapshot_step = 50"),
        ("cuda", 1, SNAPSHOT, "[profiler] memory_snapshot_step = 50"),
        ("cuda", 1, (*SNAPSHOT, "--training.steps", "50", "--profiler.ranks", "all"), None),
        ("cpu", 1, ("--profiler.memory", "true"), "[profiler] memory = true"),
        ("cpu", 1, ("--profiler.enabled", "true", "--profiler.start_step", "50"),
         "[profiler] enabled = true"),
        ("cpu", 1, ("--profiler.ranks", "all"), '[profiler] ranks = "all"'),
        ("cpu", 1, ("--parallelism.accumulate_gradients", "sharded"),
         '[parallelism] accumulate_gradients = "sharded"'),
        ("cpu", 2, ("--parallelism.accumulate_gradients", "sharded"), None),
        ("cpu", 6, ("--parallelism.accumulate_gradients", "sharded"),
         '[parallelism] accumulate_gradients = "sharded"'),
        # By keys of the same section.
        ("cpu", 1, ("--lr_schedule.decay", "constant", "--lr_schedule.min_factor", "0.5"),
         "[lr_schedule] min_factor = 0.5"),
        ("cpu", 1, ("--lr_schedule.decay", "constant"), None),
        ("cpu", 1, ("--optimizer.decay_norms", "true"), "[optimizer] decay_norms = true"),
        ("cpu", 1, ("--evaluation.prompt_tokens", "9"), "[evaluation] prompt_tokens = 9"),
        ("cpu", 1, ("--data.path", "texts"), '[data] path = "texts"'),
        ("cpu", 1, ("--data.tokenizer", "t5-base", "--data.vocab_size", "300"),
         "[data] vocab_size = 300"),
        ("cpu", 1, ("--checkpoint.initial_weights", "a", "--checkpoint.resume", "b"),
         "[checkpoint] initial_weights = 'a'"),
    ],
)  # fmt: skip
def test_a_key_without_effect_is_named_in_a_note(file, device, num_ranks, words, void):
    config = parse_unchecked(["--config", str(file), *words], say=str)
    notes = keys_without_effect(config, num_ranks, device)
    assert [note.startswith(f"{void} has no effect") for note in notes] == [True] * bool(void)


@pytest.mark.parametrize(("rank", "is_printed"), [(None, True), ("0", True), ("1", False)])
def test_one_rank_prints_a_note_once(monkeypatch, capsys, rank, is_printed):
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    for _ in range(2):
        print_note(f"x of rank {rank} has no effect")
    assert capsys.readouterr().err.count("has no effect") == is_printed


def test_compilation_without_a_compiler_or_headers_is_refused(parse, monkeypatch, tmp_path):
    monkeypatch.setattr("switchtitan.job.config.device_type", lambda: "cpu")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    for name in ("CXX", "CC"):
        monkeypatch.setenv(name, sys.executable)
    for device in ("cpu", "cuda"):
        assert "python3-dev" in missing_toolchain(device)
    (tmp_path / "Python.h").touch()
    assert missing_toolchain("cpu") is missing_toolchain("cuda") is None
    for name in ("CXX", "CC"):
        monkeypatch.setenv(name, "no-such-compiler")
    assert not parse().compile.blocks
    with pytest.raises(ConfigError, match=r"g\+\+.*--compile\.blocks false"):
        parse("--compile.blocks", "true")
    assert "gcc" in missing_toolchain("cuda")


class ToyMethodConfig(MethodConfig):
    name: Literal["toy"] = "toy"
    strength: float = Field(default=1.0, gt=0)

    def check_length(self, num_steps):
        return [] if num_steps > 10 else [f"[method] strength: {num_steps} steps are too few"]


class ToyModelConfig(ModelConfig):
    name: Literal["toy"] = "toy"
    width: int = 3


class ToyModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.only = nn.Linear(config.width, config.width)


def test_a_method_and_a_model_registered_outside_the_package_can_be_configured(
    parse, tmp_path, monkeypatch
):
    words = ("--method.name", "toy", "--method.strength", "0.5", "--model.name", "toy")
    with pytest.raises(ConfigError, match="apollo, fira"):
        parse(*words)
    monkeypatch.setitem(METHODS.rows, "toy", Component(ToyMethodConfig, object))
    monkeypatch.setitem(MODELS.rows, "toy", Component(ToyModelConfig, ToyModel))
    config = parse(*words)
    assert config.method == ToyMethodConfig(strength=0.5)
    assert config.model == ToyModelConfig(vocab_size=4096)
    (tmp_path / "resolved.toml").write_text(resolved_toml(config))
    assert parse_arguments(["--config", str(tmp_path / "resolved.toml")], 1) == config
    with pytest.raises(ConfigError, match="7 steps are too few"):
        parse(*words, "--training.steps", "7")


@pytest.mark.parametrize("option", ["--help", "--help-all"])
def test_help_names_every_key(parse, capsys, option):
    with pytest.raises(SystemExit, match="0"):
        parse(option)
    text = capsys.readouterr().out
    for section, keys in parse():
        for key, value in keys:
            assert f"--{section}.{key} (default: {toml_value(value)})" in text


def test_a_mistake_ends_with_status_2_and_without_a_traceback():
    run("train", "--training.step", "3").check_refused("--training.step 3", "steps?")
