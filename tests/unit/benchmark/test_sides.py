"""A command line names several configurations, with overrides for each side."""

from pathlib import Path

import pytest
from support.tiny import METHOD_KEYS, TINY

from switchtitan.benchmark.sides import Side, load_sides, read_side, split_overrides
from switchtitan.errors import ConfigError


@pytest.mark.parametrize(
    ("argument", "side"),
    [
        ("a.toml", Side("a.toml", {})),
        ("a.toml:method.rank=64", Side("a.toml", {"method.rank": ["64"]})),
        (
            "dir.x/a.toml:optimizer.betas=0.9,0.95,method.rank=64",
            Side("dir.x/a.toml", {"optimizer.betas": ["0.9,0.95"], "method.rank": ["64"]}),
        ),
        ("odd:name.toml:job.name=a=b", Side("odd:name.toml", {"job.name": ["a=b"]})),
    ],
)
def test_a_side_is_a_file_with_overrides(argument: str, side: Side) -> None:
    assert read_side(argument) == side


def test_overrides_are_separated_from_the_programs_arguments() -> None:
    argv = (
        "step a b --rounds 3 --training.steps 9 --optimizer.betas 0.9 0.95 --data.seq_len=8 c "
        "--steps-per-round 2"
    )
    own, overrides = split_overrides(argv.split())
    assert own == ["step", "a", "b", "--rounds", "3", "c", "--steps-per-round", "2"]
    assert overrides == {
        "training.steps": ["9"],
        "optimizer.betas": ["0.9", "0.95"],
        "data.seq_len": ["8"],
    }
    with pytest.raises(ConfigError, match=r"--a\.b: given twice"):
        split_overrides(["--a.b", "1", "--a.b=2"])


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY.format(folder=tmp_path, method="lora", method_keys=METHOD_KEYS["lora"]))
    return str(path)


def test_a_sides_own_keys_take_precedence(file: str) -> None:
    overrides = {"method.rank": ["3"], "optimizer.betas": ["0.8", "0.9"]}
    sides = load_sides([file, f"{file}:method.rank=5", file], overrides)
    assert list(sides) == [file, f"{file}:method.rank=5", f"{file} (3)"]
    assert [config.method.rank for config in sides.values()] == [3, 5, 3]
    assert {config.optimizer.betas for config in sides.values()} == {(0.8, 0.9)}


def test_a_side_that_does_not_match_the_ranks_is_refused(file: str) -> None:
    with pytest.raises(ConfigError, match="global_batch_size = 8"):
        load_sides([f"{file}:training.local_batch_size=4"], {}, num_ranks=3)
