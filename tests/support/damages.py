"""Ways to damage a file or a folder of a run, and a run with every kind of file to damage."""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from support.commands import Outcome, run
from support.tiny import METHOD_KEYS, TINY, tiny_config
from switchtitan.hub.huggingface import parameter_shapes

NUM_STEPS, INTERVAL = 8, 4
"""Of the run that is damaged. Its command then continues for `INTERVAL` steps more."""

Damage = Callable[[Path, random.Random], None]


def _truncate(file: Path, draw: random.Random) -> None:
    os.truncate(file, draw.randrange(file.stat().st_size))


def _halve(file: Path, draw: random.Random) -> None:
    os.truncate(file, file.stat().st_size // 2)


def _empty(file: Path, draw: random.Random) -> None:
    os.truncate(file, 0)


def _grow(file: Path, draw: random.Random) -> None:
    with file.open("ab") as stream:
        stream.write(draw.randbytes(draw.randint(1, 5000)))


def _zero(file: Path, draw: random.Random) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def _flip_bit(file: Path, draw: random.Random) -> None:
    data = bytearray(file.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    file.write_bytes(data)


def delete(path: Path, draw: random.Random) -> None:
    """Deletes a file or a folder."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


IN_PLACE: dict[str, Damage] = {
    "truncated": _truncate,
    "halved": _halve,
    "emptied": _empty,
    "grown": _grow,
    "zeroed": _zero,
    "one bit": _flip_bit,
    "one bit, again": _flip_bit,
    "one bit, once more": _flip_bit,
    "deleted": delete,
}


def swap_in(other: Path) -> Damage:
    """Returns the damage that puts another file or folder, of any name, in the place of one."""

    def replace(path: Path, draw: random.Random) -> None:
        delete(path, draw)
        if other.is_dir():
            shutil.copytree(other, path)
        else:
            shutil.copyfile(other, path)

    return replace


def make_run(home: Path, seed: int, max_bytes: int) -> None:
    """Trains a tiny run in `home`, with its own corpus and initial weights."""
    home.mkdir()
    text = TINY.format(folder=home, method="switchlora", method_keys=METHOD_KEYS["switchlora"])
    for before, after in (
        (f"{home}/../corpora", f"{home}/corpora"),
        ("max_bytes = 200000", f"max_bytes = {max_bytes}"),
        # The steps do not depend on their total, which grows when the run is resumed.
        ("warmup_steps = 3", 'warmup_steps = 3\ndecay = "constant"'),
        ("interval = 20", f"interval = {INTERVAL}"),
        ("tensorboard = false", "tensorboard = true"),
        (
            "async_save = false",
            f'async_save = false\ninitial_weights = "{home}/weights.safetensors"',
        ),
        ("[job]", f"[spectrum]\ninterval = {INTERVAL}\n[job]\nseed = {seed}"),
    ):
        assert before in text
        text = text.replace(before, after)
    (home / "run.toml").write_text(text)
    generator = torch.Generator().manual_seed(seed)
    shapes = parameter_shapes(tiny_config(home / "unused", "full_rank").model)
    shutil.rmtree(home / "unused")
    weights = {
        name: 0.02 * torch.randn(shape, generator=generator) + (len(shape) == 1)
        for name, shape in shapes.items()
    }
    save_file(weights, home / "weights.safetensors")
    outcome = train(home, NUM_STEPS)
    assert outcome.status == 0, outcome


def train(home: Path, num_steps: int, *keys: object) -> Outcome:
    """Gives the run's command, with a number of steps."""
    return run("train", "--config", home / "run.toml", "--training.steps", num_steps, *keys)
