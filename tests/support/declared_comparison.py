"""A declared comparison of three rows on the tiny configuration."""

from collections.abc import Mapping
from pathlib import Path

from support.tiny import TINY

GRID = """
name = "two"
config = "base.toml"
output_dir = "{folder}/out"
selection_seed = 1
report_seeds = [2, 3]
baseline = "dense"
[[rows]]
name = "dense"
learning_rates = [1e-3, 2e-3, 4e-3]
set.method = {{ name = "full_rank" }}
[[rows]]
name = "thin"
learning_rates = [1e-2, 2e-2, 4e-2]
set.method = {{ name = "lora", rank = 4 }}
[[rows]]
name = "thin-balanced"
learning_rate_of = "thin"
set.method = {{ name = "lora", rank = 4, init = "balanced" }}
"""


def write_grid(folder: Path, grid: str = GRID, changes: Mapping[str, str] | None = None) -> Path:
    """Writes the file that declares a comparison, and its base.

    Args:
        changes: parts of the base -> their replacements, next to those of every comparison.
    """
    base = TINY.format(folder=folder / "runs", method="full_rank", method_keys="")
    fitting = {
        "[evaluation]": "[evaluation]\ntest_tokens = 160",
        "num_workers = 0": "num_workers = 0\ntest_fraction = 0.1",
        "tensorboard = false": "tensorboard = true",
    }
    for given, changed in (fitting | dict(changes or {})).items():
        assert given in base, given
        base = base.replace(given, changed)
    (folder / "base.toml").write_text(base)
    file = folder / "grid.toml"
    file.write_text(grid.format(folder=folder))
    return file
