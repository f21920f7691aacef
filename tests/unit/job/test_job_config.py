"""The full configuration: every shipped file parses, and values that do not fit are refused."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Literal

import pytest
from pydantic import Field

from switchtitan.config.shipped import QUICKSTART
from switchtitan.config.toml_text import resolved_toml
from switchtitan.contracts import MethodConfig, ModelConfig
from switchtitan.distributed.config import CompileConfig, ParallelismConfig
from switchtitan.errors import ConfigError
from switchtitan.job.checks import (
    check_compiler,
    check_frozen_weights,
    check_precision,
    missing_gpu_toolchain,
    missing_toolchain,
)
from switchtitan.job.config import JobConfig, parse_arguments
from switchtitan.job.sections import TrainingConfig
from switchtitan.methods import METHODS
from switchtitan.methods.lora import LoraConfig
from switchtitan.models import MODELS
from switchtitan.registry import Component

FILES = sorted(QUICKSTART.parent.glob("*.toml"))
BASES = [file for file in FILES if file.read_text().startswith("# Base of ")]
TRAIN_CONFIGS = [file for file in FILES if file not in BASES]
LADDER = ("60m", "130m", "350m", "1b")
OTHER_SIZES = ("250m", "3b", "7b")
FIRST_METHODS = ("full_rank", "lora", "switchlora")
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
def parse(tmp_path: Path) -> Callable[..., JobConfig]:
    file = tmp_path / "tiny.toml"
    file.write_text(TINY)

    def parse_tiny(*argv: str, num_ranks: int = 1) -> JobConfig:
        return parse_arguments(["--config", str(file), *argv], num_ranks)

    return parse_tiny


@pytest.mark.parametrize("file", TRAIN_CONFIGS, ids=lambda file: file.stem)
@pytest.mark.parametrize("num_ranks", [1, 8])
def test_every_shipped_config_parses_and_loads_again_as_an_equal_one(
    file: Path, num_ranks: int, tmp_path: Path
) -> None:
    config = parse_arguments(["--config", str(file)], num_ranks)
    assert config.job.name == file.stem
    assert config.job.output_dir == Path("outputs") / file.stem
    resolved = tmp_path / "resolved.toml"
    resolved.write_text(resolved_toml(config))
    assert parse_arguments(["--config", str(resolved)], num_ranks) == config


def test_configurations_of_all_sizes_and_methods_ship() -> None:
    names = {file.stem for file in TRAIN_CONFIGS}
    assert {
        f"llama_{size}_{method}" for size in LADDER for method in (*METHODS, "apollo_mini")
    } < names
    assert {f"llama_{size}_{method}" for size in OTHER_SIZES for method in FIRST_METHODS} < names
    assert QUICKSTART.stem in names


@pytest.mark.parametrize("file", BASES, ids=lambda file: file.stem)
def test_a_base_lacks_only_the_keys_that_files_based_on_it_add(file: Path) -> None:
    users = [other for other in FILES if f'base = "{file.name}"' in other.read_text()]
    assert len(users) >= 3
    with pytest.raises(ConfigError) as caught:
        parse_arguments(["--config", str(file)], 1)
    missing = {
        line.split(":")[0].strip() for line in str(caught.value).splitlines() if "missing" in line
    }
    assert {"[job] name", "[job] output_dir", "[method] name"} <= missing
    assert missing <= {"[job] name", "[job] output_dir", "[method] name", "[optimizer] lr"}


def test_without_config_the_quickstart_is_read() -> None:
    assert parse_arguments([], 1).job.name == QUICKSTART.stem


def test_a_key_that_must_not_be_set_is_unset_when_loaded_again(
    parse: Callable[..., JobConfig], tmp_path: Path
) -> None:
    config = parse("--method.decay", "constant", "--training.max_grad_norm", "none")
    text = resolved_toml(config)
    assert "\n# decay_ratio = 0.1\n" in text
    assert '\nmax_grad_norm = "none"\n' in text
    (tmp_path / "resolved.toml").write_text(text)
    assert parse_arguments(["--config", str(tmp_path / "resolved.toml")], 1) == config


@pytest.mark.parametrize(
    ("argv", "num_ranks", "expected"),
    [
        (
            ["--training.global_batch_size", "7"],
            2,
            "[training] global_batch_size = 7: expected a multiple of ranks x local_batch_size "
            "= 2 x 2 = 4; write 4 or 8",
        ),
        (["--training.global_batch_size", "1"], 1, "= 1 x 2 = 2; write 2"),
        (["--parallelism.replicate", "4"], 6, "[parallelism] replicate = 4"),
        (
            ["--method.rank", "128"],
            1,
            "[method] rank = 128: expected less than the smaller dimension of every adapted layer; "
            "model.layers.0.self_attn.q_proj is [128, 128]",
        ),
        (["--method.rank", "1"], 1, "[method] rank = 1 never switches"),
        (
            ["--method.name", "relora", "--method.reset_interval", "200"],
            1,
            "[method] reset_interval = 200: expected less than [training] steps = 40",
        ),
        (["--method.interval", "9"], 1, "[method] interval = 9 is below 2 * freeze_steps = 10"),
        (["--method.targets", "q_prj"], 1, "the model has no linear layer called 'q_prj'"),
        (
            ["--lr_schedule.decay", "constant", "--lr_schedule.min_factor", "0.5"],
            1,
            "min_factor has no effect",
        ),
        (
            ["--evaluation.tokens", "511"],
            1,
            "[evaluation] tokens = 511: expected at least one sequence, [data] seq_len = 512",
        ),
        (
            ["--evaluation.test_tokens", "2000"],
            1,
            "test_tokens = 2000: there is no test split; set [data] test_fraction",
        ),
        (
            ["--evaluation.test_tokens", "3", "--data.test_fraction", "0.1"],
            1,
            "[evaluation] test_tokens = 3: expected",
        ),
        (
            ["--method.name", "galore", "--parallelism.frozen_weights", "replicate"],
            2,
            '[parallelism] frozen_weights = "replicate" has no effect: [method] name = "galore" '
            "trains all weights",
        ),
        (
            ["--method.name", "galore", "--parallelism.frozen_weights", "gather_once"],
            2,
            '[parallelism] frozen_weights = "gather_once" has no effect: [method] name = "galore" '
            "trains all weights",
        ),
        (
            ["--method.name", "galore", "--training.frozen_dtype", "bfloat16"],
            1,
            '[training] frozen_dtype = "bfloat16" has no effect: [method] name = "galore" '
            "trains all weights",
        ),
        (
            ["--data.vocab_size", "5000"],
            1,
            "[data] vocab_size = 5000: expected at most [model] vocab_size = 4096",
        ),
        (
            ["--metrics.communication", "true"],
            1,
            "[metrics] communication = true has no effect: one rank sends nothing",
        ),
        (
            ["--profiler.memory_snapshot_step", "5"],
            1,
            "[profiler] memory_snapshot_step = 5 has no effect without a GPU",
        ),
        (
            ["--profiler.enabled", "true", "--profiler.ranks", "0,3"],
            2,
            "[profiler] ranks: there is no rank 3; expected ranks from 0 to 1",
        ),
        (
            ["--profiler.enabled", "false", "--profiler.memory", "true"],
            1,
            "[profiler] memory has no effect without enabled = true",
        ),
        (
            ["--profiler.enabled", "false", "--profiler.ranks", "all"],
            1,
            "[profiler] ranks has no effect without enabled = true",
        ),
        (
            ["--metrics.communication", "true", "--training.steps", "2"],
            2,
            "the bytes of step 3 are counted, and [training] steps = 2",
        ),
        (
            ["--model.num_heads", "3"],
            1,
            "[model] hidden_size = 128 is not a multiple of num_heads = 3",
        ),
    ],
)
def test_values_that_do_not_fit_together_are_refused(
    parse: Callable[..., JobConfig], argv: list[str], num_ranks: int, expected: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(*argv, num_ranks=num_ranks)
    assert expected in str(caught.value)


def test_mistakes_of_all_kinds_are_in_one_message(parse: Callable[..., JobConfig]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(
            "--training.global_batch_size",
            "7",
            "--optimizer.lr",
            "fast",
            "--model.sise",
            "9m",
            "--method.rank",
            "1",
        )
    message = str(caught.value)
    assert message.startswith("invalid configuration (4 errors)")
    for part in (
        "--optimizer.lr fast: expected a number > 0",
        "--model.sise 9m: unknown key; did you mean size?",
        "[training] global_batch_size = 7",
        "[method] rank = 1",
    ):
        assert part in message


def test_attention_that_needs_a_gpu_is_refused_on_a_cpu(
    parse: Callable[..., JobConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("switchtitan.job.config.device_type", lambda: "cpu")
    with pytest.raises(ConfigError, match="flash_attn"):
        parse("--model.attention", "flash_attn")


def test_compilation_on_a_cpu_without_a_compiler_is_refused(
    parse: Callable[..., JobConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("switchtitan.job.config.device_type", lambda: "cpu")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert not parse().compile.blocks
    with pytest.raises(ConfigError, match=r"install g\+\+, or pass --compile\.blocks false"):
        parse("--compile.blocks", "true")


@pytest.mark.parametrize(
    ("target", "value", "expected"),
    [
        ("sysconfig.get_path", lambda name: "/nowhere", "install python3-dev"),
        (
            "torch.__file__",
            "/with space/torch/__init__.py",
            "not /with space/torch; use another environment",
        ),
    ],
)
def test_compilation_on_a_cpu_that_cannot_build_is_refused(
    monkeypatch: pytest.MonkeyPatch, target: str, value: object, expected: str
) -> None:
    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.setattr(target, value)
    if target == "torch.__file__":
        monkeypatch.setattr("pathlib.Path.exists", lambda path: True)
    missing = missing_toolchain()
    assert missing is not None
    assert missing.endswith(expected)


def test_compilation_on_a_gpu_needs_a_c_compiler_and_headers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("CC", sys.executable)
    assert "install python3-dev" in (missing_gpu_toolchain() or "")
    (tmp_path / "Python.h").touch()
    assert missing_gpu_toolchain() is None
    monkeypatch.setenv("CC", "no-such-compiler")
    compiled, eager = CompileConfig(loss=True), CompileConfig()
    (problem,) = check_compiler(compiled, "cuda")
    assert problem == (
        "[compile] loss = true: on a GPU it needs a C compiler; install gcc, or pass "
        "--compile.loss false"
    )
    assert check_compiler(eager, "cuda") == []


@pytest.fixture
def help_text(
    parse: Callable[..., JobConfig],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[str], str]:
    """Returns what an option prints on a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")

    def print_help(option: str) -> str:
        with pytest.raises(SystemExit) as caught:
            parse(option)
        assert caught.value.code == 0
        text = capsys.readouterr().out
        assert max(map(len, text.splitlines())) <= 80
        return text

    return print_help


def test_help_all_describes_every_key(
    parse: Callable[..., JobConfig], help_text: Callable[[str], str]
) -> None:
    text, config = help_text("--help-all"), parse()
    for section in type(config).model_fields:
        for key in type(getattr(config, section)).model_fields:
            assert f"--{section}.{key} " in text
    assert "(default: 16)" in text
    assert 'One of "apollo", "fira",' in text
    assert "An integer >= 1. Number of vectors in each factor" in text


def test_help_names_every_key_and_describes_a_few_on_two_screens(
    parse: Callable[..., JobConfig], help_text: Callable[[str], str]
) -> None:
    text, config = help_text("--help"), parse()
    assert len(text.splitlines()) <= 90
    words = set(re.findall(r"[\w.-]+", text))
    for section in type(config).model_fields:
        assert f"  [{section}] " in text
        assert words >= set(type(getattr(config, section)).model_fields)
    assert "--help-all" in words
    assert "--training.steps" in words
    assert "--training.dtype" not in words
    assert "One of apollo, fira," in text


def test_every_key_has_a_docstring(parse: Callable[..., JobConfig]) -> None:
    config = parse()
    for section in type(config).model_fields:
        for key, field in type(getattr(config, section)).model_fields.items():
            assert field.description, f"[{section}] {key} has no docstring"


def test_a_mistake_exits_with_status_2_and_without_traceback() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "switchtitan", "train", "--training.step", "3"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "error: invalid configuration (1 error)",
        "on the command line:",
        "  --training.step 3: unknown key; did you mean steps?",
    ]


def test_keys_for_frozen_weights_are_checked_against_the_method_s_freezes_weights():
    class Thawed(LoraConfig):
        freezes_weights: ClassVar[bool] = False

    sections = (
        ParallelismConfig(frozen_weights="replicate"),
        TrainingConfig(steps=1, global_batch_size=1, local_batch_size=1),
    )
    (problem,) = check_frozen_weights(Thawed(rank=2), *sections)
    assert "has no effect" in str(problem)
    assert check_frozen_weights(LoraConfig(rank=2), *sections) == []


class ToyMethodConfig(MethodConfig):
    name: Literal["toy"] = "toy"
    strength: float = Field(default=1.0, gt=0)

    def check_length(self, num_steps: int) -> list[str]:
        return [] if num_steps > 10 else [f"[method] strength: {num_steps} steps are too few"]


class ToyModelConfig(ModelConfig):
    name: Literal["toy"] = "toy"
    width: int = 3

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        return {"only": (self.width, self.width)}


def test_a_method_and_a_model_registered_outside_the_package_can_be_configured(
    tmp_path: Path,
) -> None:
    file = tmp_path / "toy.toml"
    file.write_text(
        '[job]\nname = "toy"\noutput_dir = "out"\n'
        '[model]\nname = "toy"\nvocab_size = 5000\n'
        '[method]\nname = "toy"\nstrength = 0.5\n'
        '[optimizer]\nname = "adamw"\nlr = 0.1\n'
        "[training]\nsteps = 40\nglobal_batch_size = 2\nlocal_batch_size = 2\n"
    )
    with (
        METHODS.registered("toy", Component(ToyMethodConfig, object)),
        MODELS.registered("toy", Component(ToyModelConfig, object)),
    ):
        config = parse_arguments(["--config", str(file)], 1)
        assert config.method == ToyMethodConfig(strength=0.5)
        assert config.model == ToyModelConfig(vocab_size=5000)
        (tmp_path / "resolved.toml").write_text(resolved_toml(config))
        assert parse_arguments(["--config", str(tmp_path / "resolved.toml")], 1) == config
        with pytest.raises(ConfigError, match="7 steps are too few"):
            parse_arguments(["--config", str(file), "--training.steps", "7"], 1)
    with pytest.raises(ConfigError, match=r'\[method\] name = "toy": expected one of "apollo"'):
        parse_arguments(["--config", str(file)], 1)


def test_choices_of_a_gpu_are_refused_where_they_have_no_effect():
    training = TrainingConfig(
        steps=1, global_batch_size=1, local_batch_size=1, dtype="float32", tf32=True
    )
    deterministic = training.model_copy(update={"tf32": False, "deterministic": True})
    assert check_precision(training, "cuda") == check_precision(deterministic, "cuda") == []
    (problem,) = check_precision(training, "cpu")
    assert "[training] tf32 = true has no effect without a GPU" in problem
    for dtype in ("auto", "bfloat16"):
        (problem,) = check_precision(training.model_copy(update={"dtype": dtype}), "cuda")
        assert f'tf32 = true has no effect with dtype = "{dtype}"' in str(problem)
    (problem,) = check_precision(deterministic, "cpu")
    assert "[training] deterministic = true has no effect on a CPU" in problem


@pytest.mark.parametrize(
    ("argv", "changed", "dropped", "kept"),
    [
        (
            ["--method.decay", "constant"],
            {"method.decay": "constant"},
            "method.decay_ratio = 0.2",
            "",
        ),
        (
            ["--method.name", "lora"],
            {"method.name": "lora", "method.rank": 32},
            "method.interval = 20",
            "method.rank = 32",
        ),
        (
            ["--method.name", "full_rank"],
            {"method.name": "full_rank", "parallelism.frozen_weights": "shard"},
            'parallelism.frozen_weights = "replicate"',
            "",
        ),
        (["--model.size", "20m"], {"model.num_layers": None}, "model.num_layers = 2", ""),
        (["--data.dataset", "pystdlib"], {"data.path": None}, 'data.path = "texts"', ""),
        (["--optimizer.weight_decay", "0"], {}, "optimizer.decay_norms = true", ""),
        (["--lr_schedule.decay", "constant"], {}, "lr_schedule.min_factor = 0.05", ""),
        (["--profiler.enabled", "false"], {"profiler.memory": False}, "profiler.memory = true", ""),
        (["--loss_spike.factor", "none"], {"loss_spike.window": 128}, "loss_spike.window = 9", ""),
        (["--training.steps", "9"], {"loss_spike.factor": None}, "loss_spike.factor = 6.0", ""),
        (["--data.test_fraction", "none"], {}, "evaluation.test_tokens = 999", ""),
    ],
)
def test_the_command_line_wins_over_what_it_makes_void_in_the_file(
    tmp_path: Path, argv: list[str], changed: dict[str, object], dropped: str, kept: str
) -> None:
    file = tmp_path / "job.toml"
    text = f'''base = "{QUICKSTART}"
[method]
name = "switchlora"
rank = 32
interval = 20
decay_ratio = 0.2
[model]
num_layers = 2
[data]
dataset = "text"
path = "texts"
test_fraction = 0.1
[evaluation]
test_tokens = 999
[parallelism]
frozen_weights = "replicate"
[optimizer]
weight_decay = 0.1
decay_norms = true
[lr_schedule]
min_factor = 0.05
[profiler]
enabled = true
memory = true
[loss_spike]
factor = 6.0
window = 9
'''
    file.write_text(text)
    notes: list[str] = []
    config = parse_arguments(["--config", str(file), *argv], num_ranks=2, say=notes.append)
    assert dropped in " ".join(note for note in notes if "dropped" in note)
    assert kept in " ".join(note for note in notes if "kept" in note)
    for key, value in changed.items():
        section, _, name = key.partition(".")
        assert getattr(getattr(config, section), name) == value
    # What is saved gives the same configuration, without notes.
    file.write_text(resolved_toml(config))
    again = parse_arguments(["--config", str(file)], num_ranks=2, say=pytest.fail)
    assert again == config
    file.write_text(text)
    assert parse_arguments(["--config", str(file)], num_ranks=2).method.interval == 20
