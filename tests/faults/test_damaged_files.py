"""Any file of a run is damaged, then the same command is given again.

The run uses the previous checkpoint, or refuses by name, or the damage is harmless. Where it goes
on, its end is bitwise that of the undisturbed run: never a wrong weight, nor another run's state.
"""

import shutil
from types import SimpleNamespace

import pytest
from safetensors.torch import save_file
from support.checkpoints import end_of
from support.commands import run
from support.folders import contents, random_weights
from support.fuzzing import flip_bit
from support.long_form import IS_LONG, new_draw
from support.tiny import tiny_toml

from switchtitan.job.config import parse_arguments

NUM_STEPS, INTERVAL = 8, 4
"""Of the run that is damaged. Its command then continues for `INTERVAL` steps more."""
END = NUM_STEPS + INTERVAL
NEWEST, PREVIOUS = f"step-{NUM_STEPS:09d}", f"step-{NUM_STEPS - INTERVAL:09d}"
CHECKPOINT_FILES = ("metadata.json", "SHA256SUMS", "__0_0.distcp", ".metadata")
SAVED = {
    f"{kind}: {name}": f"run/checkpoints/{step}/{name}"
    for kind, step in (("newest", NEWEST), ("previous", PREVIOUS))
    for name in CHECKPOINT_FILES
}
READ = {
    "corpus: index.json": "corpora/pystdlib-*/index.json",
    "corpus: checksum of the index": "corpora/pystdlib-*/index.json.sha256",
    "corpus: tokenizer.json": "corpora/pystdlib-*/tokenizer.json",
    "corpus: training tokens": "corpora/pystdlib-*/train-00000.bin",
    "corpus: validation tokens": "corpora/pystdlib-*/validation-*.bin",
    "initial weights": "weights.safetensors",
}
NEVER_READ = {
    "results.json": "run/results.json",
    "TensorBoard's events": "run/tensorboard/events.*",
    "config.toml": "run/config.toml",
    "train.log": "run/train.log",
}
"""By a run that trains on: later files are written next to them."""
FILES = SAVED | READ | NEVER_READ
"""Kind of a file -> its place in the run's home."""
SHORT = ("newest: __0_0.distcp", "corpus: training tokens", "initial weights", "results.json")
STARTS = {
    f"resuming from FOLDER/checkpoints/{NEWEST}\n": "harmless",
    f"resuming from FOLDER/checkpoints/{PREVIOUS}\n": "previous",
    "starting a new run in FOLDER\n": "started over",
}
"""What a run logs -> its outcome."""


IN_PLACE = {
    "truncated": lambda data, draw: data[: draw.randrange(len(data))],
    "emptied": lambda data, draw: b"",
    "grown": lambda data, draw: data + draw.randbytes(draw.randint(1, 5000)),
    "zeroed": lambda data, draw: bytes(len(data)),
    "one bit": flip_bit,
    "deleted": lambda data, draw: None,
}
"""Name -> what is left of a file's bytes."""


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
    model = parse_arguments(["--config", str(home / "run.toml")]).model
    save_file(random_weights(model, seed), home / "weights.safetensors")
    assert train(home, NUM_STEPS).status == 0


def train(home, num_steps):
    """Gives the run's command, with a number of steps."""
    return run("train", "--config", home / "run.toml", "--training.steps", num_steps)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished run, its copy, another run of the same shapes, and how the first one continues."""
    folder = tmp_path_factory.mktemp("damages")
    home, pristine, other = folder / "run", folder / "pristine", folder / "other"
    make_run(home, seed=3, max_bytes=60_000)
    make_run(other, seed=4, max_bytes=150_000)
    shutil.copytree(home, pristine)
    assert train(home, END).status == 0
    return SimpleNamespace(home=home, pristine=pristine, other=other, end=end_of(home / "run", END))


def place(home, pattern):
    (found,) = home.glob(pattern)
    return found


def use(runs, *names):
    """Gives the command again, checks how it ends, with one of these names in the message of a
    refusal, and returns its outcome."""
    before = contents(runs.home)
    outcome = train(runs.home, END)
    if outcome.status == 2:
        outcome.check_refused()
        assert any(name in outcome.errors for name in names), outcome.errors
        # So the undamaged file, put back, is all that the run needs.
        assert contents(runs.home) == before
        return "refused"
    assert outcome.status == 0, (outcome.output[-3000:], outcome.errors[-3000:])
    assert end_of(runs.home / "run", END) == runs.end
    said = outcome.output.replace(f"{runs.home}/run", "FOLDER")
    (found,) = [name for start, name in STARTS.items() if start in said]
    return found


def damages_of(kind, runs):
    """Each way to damage a kind of file, by name."""
    pattern = FILES[kind]
    others = {"swapped with another run's": place(runs.other, pattern).read_bytes()}
    if kind in SAVED:
        swapped = {NEWEST: PREVIOUS, PREVIOUS: NEWEST}
        sibling = "/".join(swapped.get(part, part) for part in pattern.split("/"))
        others["swapped with another step's"] = place(runs.pristine, sibling).read_bytes()
    swaps = {name: lambda *_, data=data: data for name, data in others.items()}
    return IN_PLACE | swaps


def expected_outcome(kind, name):
    if kind in SAVED or kind in NEVER_READ:
        return "previous" if kind.startswith("newest") else "harmless"
    if (kind, name) == ("corpus: checksum of the index", "deleted"):
        return "harmless"  # as in a corpus of version 0.2.0
    return "refused"


@pytest.mark.parametrize("kind", FILES if IS_LONG else SHORT)
def test_a_damaged_file(runs, kind):
    draw, chosen = new_draw(kind), [*damages_of(kind, runs).items()]
    for name, damage in chosen if IS_LONG else [draw.choice(chosen)]:
        shutil.rmtree(runs.home)
        shutil.copytree(runs.pristine, runs.home)
        file = place(runs.home, FILES[kind])
        before = file.read_bytes()
        left = damage(bytearray(before), draw)
        assert left != before, name
        file.unlink() if left is None else file.write_bytes(left)
        assert use(runs, file.name, str(file.parent)) == expected_outcome(kind, name), name
