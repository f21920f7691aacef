"""The full configuration: every shipped file, and values that do not fit together."""

import sys
from pathlib import Path

import pytest
from support.checkpoints import refused
from support.tiny import model_on_meta, tiny_config, tiny_toml

from switchtitan.config import FOLDER, QUICKSTART, resolved_toml
from switchtitan.distributed.dtype import Bf16Support
from switchtitan.errors import ConfigError
from switchtitan.job.checks import keys_without_effect, missing_toolchain
from switchtitan.job.config import parse_arguments, parse_unchecked, print_note
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


@pytest.fixture
def parse(tmp_path):
    return lambda *words, num_ranks=1: tiny_config(
        tmp_path, "switchlora", *words, num_ranks=num_ranks
    )


def count_on_meta(config):
    """Numbers of trained and frozen values, of a model whose method has replaced its layers."""
    model = model_on_meta(config)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    return count_parameters(model)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_shipped_file_loads_again_and_builds_a_model_of_its_published_size(file, tmp_path):
    config = parse_arguments(["--config", str(file)], num_ranks=8)
    assert config.job.name == file.stem
    assert config.job.output_dir == Path("outputs", file.stem)
    (tmp_path / "resolved.toml").write_text(resolved_toml(config))
    assert parse_arguments(["--config", str(tmp_path / "resolved.toml")], num_ranks=8) == config
    assert count_on_meta(config)["trainable"] > 0
    if config.model.size in PUBLISHED_SIZES:
        assert config.model.sizes[:3] == PUBLISHED_SIZES[config.model.size]


@pytest.mark.parametrize(
    ("name", "trainable", "frozen"),
    [
        ("350m_switchlora", 185.4, 24 * (4 * 1024**2 + 3 * 2736 * 1024)),
        ("350m", 368.2, 0),
        ("1b_switchlora", 609.7, 24 * (4 * 2048**2 + 3 * 5461 * 2048)),
        ("1b", 1339.5, 0),
    ],
)
def test_a_method_trains_the_published_number_of_parameters(name, trainable, frozen):
    counts = count_on_meta(parse_arguments(["--config", f"llama_{name}.toml"], 1))
    # Published in millions with one decimal.
    assert (round(counts["trainable"] / 1e6, 1), counts["frozen"]) == (trainable, frozen)


def test_without_a_file_the_quickstart_is_read_at_the_launchers_number_of_ranks(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "7")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="global_batch_size"):
        parse_arguments([])
    assert parse_arguments([], 1).job.name == QUICKSTART.stem


@pytest.mark.parametrize(
    ("words", "num_ranks", "fragments"),
    [
        (("--training.global_batch_size", "7"), 2, ("global_batch_size = 7", "write 4 or 8")),
        (("--parallelism.replicate", "3"), 4, ("[parallelism] replicate = 3",)),
        (("--method.rank", "20"), 1, ("[method] rank = 20", "k_proj is [10, 20]")),
        (("--method.name", "relora", "--method.reset_interval", "200"), 1,
         ("[method] reset_interval = 200", "[training] steps = 40")),
        (("--training.trained_dtype", "bfloat16"), 1,
         ('trained_dtype = "bfloat16": switchlora with adamw', "adamw8bit or muon8bit")),
        (("--optimizer.name", "scale"), 1, ('[optimizer] name = "scale"', "adamw or")),
        (("--evaluation.tokens", "15"), 1, ("[evaluation] tokens = 15", "seq_len = 16")),
        (("--evaluation.test_tokens", "2000"), 1, ("test_tokens = 2000", "test_fraction")),
        (("--evaluation.test_tokens", "3", "--data.test_fraction", "0.1"), 1,
         ("[evaluation] test_tokens = 3",)),
        (("--data.vocab_size", "272"), 1, ("[data] vocab_size = 272", "vocab_size = 271")),
        (("--profiler.enabled", "true", "--profiler.ranks", "0,3"), 2, ("ranks = [0, 3]", "to 1")),
        (("--metrics.trackers", "wandb"), 1, ("[metrics] trackers", ".[wandb]")),
    ],
)  # fmt: skip
def test_values_that_do_not_fit_together_are_refused(
    parse, monkeypatch, words, num_ranks, fragments
):
    monkeypatch.setattr("switchtitan.job.config.device_type", lambda: "cpu")
    monkeypatch.setattr("switchtitan.registry.find_spec", lambda name: None)
    with refused("(1 error)", *fragments, error=ConfigError):
        parse(*words, num_ranks=num_ranks)


SNAPSHOT = ("--profiler.memory_snapshot_step", "50")


@pytest.mark.parametrize(
    ("device", "num_ranks", "words", "void"),
    [
        ("cpu", 1, (), None),
        ("cuda", 1, ("--training.tf32", "true", "--training.dtype", "auto"),
         "[training] tf32 = true"),
        ("cuda", 1, ("--training.tf32", "true"), None),
        ("cuda", 1, ("--training.deterministic", "true"), None),
        ("cpu", 2, ("--parallelism.frozen_weights", "replicate"), None),
        ("cpu", 2, ("--method.name", "galore", "--parallelism.frozen_weights", "replicate"),
         '[parallelism] frozen_weights = "replicate"'),
        ("cpu", 1, ("--method.name", "galore", "--training.frozen_dtype", "int16"),
         '[training] frozen_dtype = "int16"'),
        ("cpu", 1, SNAPSHOT, "[profiler] memory_snapshot_step = 50"),
        ("cuda", 1, (*SNAPSHOT, "--training.steps", "50", "--profiler.ranks", "all"), None),
        ("cpu", 1, ("--profiler.memory", "true"), "[profiler] memory = true"),
        ("cpu", 1, ("--profiler.enabled", "true", "--profiler.start_step", "50"),
         "[profiler] enabled = true"),
        ("cpu", 1, ("--profiler.ranks", "all"), '[profiler] ranks = "all"'),
        ("cpu", 1, ("--parallelism.accumulate_gradients", "sharded"),
         '[parallelism] accumulate_gradients = "sharded"'),
        ("cpu", 2, ("--parallelism.accumulate_gradients", "sharded"), None),
        ("cpu", 4, ("--parallelism.accumulate_gradients", "sharded"),
         '[parallelism] accumulate_gradients = "sharded"'),
        # By keys of the same section.
        ("cpu", 1, ("--lr_schedule.decay", "constant", "--lr_schedule.min_factor", "0.5"),
         "[lr_schedule] min_factor = 0.5"),
        ("cpu", 1, ("--optimizer.decay_norms", "true"), "[optimizer] decay_norms = true"),
        ("cpu", 1, ("--data.path", "texts"), '[data] path = "texts"'),
        ("cpu", 1, ("--data.dataset", "c4", "--data.validation_fraction", "0.1"),
         "[data] validation_fraction = 0.1"),
        ("cpu", 1, ("--data.tokenizer", "t5-base"), "[data] vocab_size = 270"),
        ("cpu", 1, ("--data.offline_dataset", "pystdlib"), '[data] offline_dataset = "pystdlib"'),
        ("cpu", 1, ("--data.sources", '[{ weight = 1, dataset = "english" }]', "--data.dataset",
         "c4"), '[data] dataset = "c4"'),
        ("cpu", 1, ("--checkpoint.initial_weights", "a", "--checkpoint.resume", "b"),
         "[checkpoint] initial_weights = 'a'"),
        ("cpu", 1, ("--checkpoint.keep_every", "9", "--checkpoint.keep_latest", "0"),
         "[checkpoint] keep_every = 9"),
        # A warm-up that lasts until the end.
        ("cpu", 1, ("--lr_schedule.warmup_steps", "50", "--training.steps", "50"),
         "[lr_schedule] warmup_steps = 50"),
        ("cpu", 1, ("--lr_schedule.warmup_steps", "49", "--training.steps", "50"), None),
    ],
)  # fmt: skip
def test_a_key_that_misleads_is_named_in_a_note(tmp_path, device, num_ranks, words, void):
    file = tmp_path / "tiny.toml"
    file.write_text(tiny_toml(tmp_path, "switchlora", {'size = "9m"\n': ""}))
    config = parse_unchecked(["--config", str(file), *words], say=str)
    notes = keys_without_effect(config, num_ranks, device)
    assert [note.startswith(f"{void} ") for note in notes] == [True] * bool(void)


FALL_BACK = ["--data.offline_dataset", "pystdlib"]


@pytest.mark.parametrize(("device", "words"), [("cpu", []), ("cuda", []), ("cuda", FALL_BACK)])
def test_on_gpus_only_the_command_line_allows_another_corpus(monkeypatch, device, words):
    monkeypatch.setattr("switchtitan.job.config.device_type", lambda: device)
    monkeypatch.setattr("switchtitan.job.checks.bf16_support", lambda _: Bf16Support(True, ""))
    config = parse_arguments(["--config", str(FOLDER / "llama_60m.toml"), *words], 1, str)
    assert (config.data.offline_dataset == "pystdlib") == (device == "cpu" or words == FALL_BACK)


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


def test_a_path_below_the_home_folder_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    keys = ("--job.output_dir=~/run", "--checkpoint.resume=~/old", "--checkpoint.initial_weights=~")
    config = parse_arguments(keys, 1, print_note)
    assert config.job.output_dir == tmp_path / "run"
    assert config.checkpoint.resume == str(tmp_path / "old")
    assert config.checkpoint.initial_weights == str(tmp_path)
