"""Ways to damage a file of a run, and a run with every kind of file to damage."""

import shutil

import torch
from safetensors.torch import save_file

from support.commands import run
from support.fuzzing import flip_bit
from support.tiny import tiny_toml
from switchtitan.hub.huggingface import parameter_shapes
from switchtitan.job.config import parse_arguments

NUM_STEPS, INTERVAL = 8, 4
"""Of the run that is damaged. Its command then continues for `INTERVAL` steps more."""


def _rewritten(change):
    """The damage to a file that rewrites it as `change(bytes, random)`."""

    def damage(file, draw):
        file.write_bytes(change(bytearray(file.read_bytes()), draw))

    return damage


IN_PLACE = {
    "truncated": _rewritten(lambda data, draw: data[: draw.randrange(len(data))]),
    "halved": _rewritten(lambda data, draw: data[: len(data) // 2]),
    "emptied": _rewritten(lambda data, draw: b""),
    "grown": _rewritten(lambda data, draw: data + draw.randbytes(draw.randint(1, 5000))),
    "zeroed": _rewritten(lambda data, draw: bytes(len(data))),
    "one bit": _rewritten(flip_bit),
    "one bit, again": _rewritten(flip_bit),
    "one bit, once more": _rewritten(flip_bit),
    "deleted": lambda file, draw: file.unlink(),
}
"""Name -> `damage(file, random)`."""


def swap_in(other):
    """Returns the damage that puts another file, of any name, in the place of one."""
    return lambda file, draw: shutil.copyfile(other, file)


def make_run(home, seed, max_bytes):
    """Trains a tiny run in `home`, with its own corpus and initial weights."""
    home.mkdir()
    changes = {
        f"{home}/../corpora": f"{home}/corpora",
        "max_bytes = 200000": f"max_bytes = {max_bytes}",
        # The steps do not depend on their total, which grows when the run is resumed.
        "warmup_steps = 3": 'warmup_steps = 3\ndecay = "constant"',
        "interval = 20": f"interval = {INTERVAL}",
        "tensorboard = false": "tensorboard = true",
        "[checkpoint]": f'[checkpoint]\ninitial_weights = "{home}/weights.safetensors"',
        "[job]": f"[spectrum]\ninterval = {INTERVAL}\n[job]\nseed = {seed}",
    }
    (home / "run.toml").write_text(tiny_toml(home, "switchlora", changes))
    generator = torch.Generator().manual_seed(seed)
    shapes = parameter_shapes(parse_arguments(["--config", str(home / "run.toml")]).model)
    weights = {
        name: 0.02 * torch.randn(shape, generator=generator) + (len(shape) == 1)
        for name, shape in shapes.items()
    }
    save_file(weights, home / "weights.safetensors")
    outcome = train(home, NUM_STEPS)
    assert outcome.status == 0, outcome


def train(home, num_steps, *keys):
    """Gives the run's command, with a number of steps."""
    return run("train", "--config", home / "run.toml", "--training.steps", num_steps, *keys)
