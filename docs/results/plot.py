"""Draws pictures of docs/RESULTS.md from the CSV files in this folder.

    python docs/results/plot.py

Writes docs/ablations.png and docs/fresh_seeds.png.
"""

import csv
import statistics
from pathlib import Path

from matplotlib.figure import Figure

FOLDER = Path(__file__).parent
Losses = dict[str, dict[int, float]]

ABLATIONS = {
    "full_rank": "full rank",
    "lora-balanced-r16": "control",
    "switchlora-r16-even-160-momentum": "gentler keys",
    "switchlora-r16-even-160": "interval 160, no decay",
    "switchlora-r16-constant-candidates": "constant candidates",
    "switchlora-r16-even-80": "interval 80, no decay",
    "switchlora-r16-momentum": "first moments reset only, no freezing",
    "switchlora-r16-decay-ratio-0.4": "decay ratio 0.4",
    "switchlora-r16-interval-80": "interval 80",
    "switchlora-r16-reset-both": "moments of both vectors reset",
    "switchlora-r16-reset-none": "no reset of moments",
    "switchlora-r16-interval-20": "interval 20",
    "switchlora-r16-freeze-10": "10 frozen steps",
    "switchlora-r16-even-480": "interval 480, no decay",
    "switchlora-r16-freeze-0": "no freezing",
    "switchlora-r16-decay-sigmoid": "sigmoid decay",
    "switchlora-r16-decay-constant-constant-candidates": (
        "interval 40, no decay, constant candidates"
    ),
    "switchlora-r16-decay-constant": "interval 40, no decay",
    "switchlora-r16-init-lora": "LoRA's init",
}
FRESH_SEEDS = {
    "full_rank": "full rank",
    "lora-r16": "LoRA",
    "lora-balanced-r16": "control",
    "switchlora-r16": "SwitchLoRA",
    "switchlora-r16-even-160-momentum": "gentler keys",
}


def read_losses(file: str, split: str) -> Losses:
    """Returns the reported losses of `split` by row and seed."""
    losses: Losses = {}
    with (FOLDER / file).open(newline="") as lines:
        for run in csv.DictReader(lines):
            if run["stage"] == "report":
                losses.setdefault(run["row"], {})[int(run["seed"])] = float(run[f"{split}_loss"])
    return losses


def draw_ablations(losses: Losses) -> Figure:
    """Draws mean and standard deviation of each row's difference in validation loss to the
    published keys, paired by seed."""
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    published = losses["switchlora-r16"]
    for place, row in enumerate(ABLATIONS):
        differences = [losses[row][seed] - published[seed] for seed in published]
        deviation = statistics.stdev(differences)
        axes.errorbar(
            statistics.mean(differences), place, xerr=deviation, fmt="o", color="C0", capsize=3
        )
    axes.axvline(0.0, color="gray", linewidth=1)
    axes.set_yticks(range(len(ABLATIONS)), list(ABLATIONS.values()))
    axes.invert_yaxis()
    axes.set_xlabel("difference in validation loss to the published keys")
    axes.grid(axis="x", alpha=0.3)
    return figure


def draw_seeds(losses: Losses) -> Figure:
    """Draws the test loss of every run, with the mean of each row."""
    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.subplots()
    axes.margins(y=0.12)
    for place, row in enumerate(FRESH_SEEDS):
        values = list(losses[row].values())
        axes.plot(values, [place] * len(values), "o", color="C0", alpha=0.7)
        axes.plot(statistics.mean(values), place, "|", color="black", markersize=18)
    axes.set_yticks(range(len(FRESH_SEEDS)), list(FRESH_SEEDS.values()))
    axes.invert_yaxis()
    axes.set_xlabel("test loss on seeds 5, 6 and 7; the bar is their mean")
    axes.grid(axis="x", alpha=0.3)
    return figure


def main() -> None:
    """Writes both pictures."""
    ablations = read_losses("rank_16.csv", "validation")
    ablations |= read_losses("switchlora_ablations.csv", "validation")
    fresh = read_losses("rank_16_gentler.csv", "test")
    draw_ablations(ablations).savefig(FOLDER.parent / "ablations.png", dpi=120)
    draw_seeds(fresh).savefig(FOLDER.parent / "fresh_seeds.png", dpi=120)


if __name__ == "__main__":
    main()
