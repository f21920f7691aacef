"""Runs that are interrupted and resumed, and what they leave at the end."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from support.tiny import METHOD_KEYS, TINY
from switchtitan.checkpoint.verify import check_contents

NUM_STEPS, INTERVAL = 24, 4
"""Length of a run, and the interval of evaluations and saves."""


@dataclass(frozen=True)
class Outcome:
    """What a run leaves: equal for equal runs."""

    tensors: dict[str, str]
    """Checksums of the files with the tensors of the last checkpoint."""
    train_state: dict
    losses: dict[str, str]
    """The last printed loss of each step."""


def arguments(folder: Path, is_async: bool) -> list[str]:
    """Writes the configuration of a run in `folder`; returns the arguments of `train`."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "config.toml"
    text = TINY.format(folder=folder, method="switchlora", method_keys=METHOD_KEYS["switchlora"])
    text = text.replace("steps = 40", f"steps = {NUM_STEPS}")
    text = text.replace("interval = 20", f"interval = {INTERVAL}")
    file.write_text(text.replace("async_save = false", f"async_save = {str(is_async).lower()}"))
    return ["--config", str(file), "--data.cache_dir", str(folder / "corpora")]


def outcome(folder: Path) -> Outcome:
    """Returns what a finished run has left. Its output is in the file `log`."""
    metadata = check_contents(folder / "run" / "checkpoints" / f"step-{NUM_STEPS:09d}")
    losses = {}
    for line in (folder / "log").read_text().splitlines():
        step, _, rest = line.strip().partition("/")
        if step.isdecimal() and rest.split()[0] == str(NUM_STEPS):
            losses[step] = rest.split()[1]
    return Outcome(
        {
            name: record.sha256
            for name, record in metadata.files.items()
            if name != ".metadata"  # holds the save's random id
        },
        json.loads(json.dumps(metadata.train_state)),
        losses,
    )


def steps_in(printed: str) -> list[int]:
    """The steps that a run has reported."""
    return [int(step) for step in re.findall(rf"^ *(\d+)/{NUM_STEPS} +\d", printed, re.MULTILINE)]


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint; 0 without one."""
    names = [path.name for path in (folder / "run" / "checkpoints").glob("step-*")]
    return max((int(name.removeprefix("step-")) for name in names if "." not in name), default=0)


def check_folders(folder: Path) -> None:
    """Every folder that has a checkpoint's name is whole."""
    for path in (folder / "run" / "checkpoints").glob("step-*"):
        if path.name.removeprefix("step-").isdecimal():
            check_contents(path)
