"""The choice of values key by key, as a function of the losses of finished runs alone."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from switchtitan.comparison.config import ComparisonConfig, load_comparison
from switchtitan.comparison.plan import Run, report_runs
from switchtitan.comparison.tuning import Tuning, tune

LR, OTHER, DECAY = "optimizer.lr", "optimizer.other_lr", "optimizer.weight_decay"
GRID = """
name = "three axes"
config = "base.toml"
output_dir = "out"
selection_seed = 1
report_seeds = [2, 3]
baseline = "dense"
max_widenings = 2
axes = ["optimizer.lr", "optimizer.other_lr", "optimizer.weight_decay"]
[[rows]]
name = "dense"
learning_rates = [1e-3, 2e-3, 4e-3]
tune."optimizer.other_lr" = [1e-3, 2e-3, 4e-3]
tune."optimizer.weight_decay" = [0.0, 0.1]
start."optimizer.weight_decay" = 0.1
set.method = { name = "full_rank" }
[[rows]]
name = "thin"
tune = { "optimizer.lr" = [1e-2, 2e-2, 4e-2], "optimizer.other_lr" = [1e-3, 2e-3, 4e-3] }
set.method = { name = "lora", rank = 4 }
[[rows]]
name = "ablation"
learning_rate_of = "thin"
set.method = { name = "lora", rank = 4, init = "balanced" }
"""
BEST = {
    "dense": {LR: 2e-3, OTHER: 2e-3, DECAY: 0.1},
    "thin": {LR: 2e-2, OTHER: 2e-3},
}


def declare(folder: Path, grid: str = GRID) -> ComparisonConfig:
    file = folder / "grid.toml"
    file.write_text(grid)
    return load_comparison(file)


def distance(best: dict[str, dict[str, float]]) -> Callable[[Run], float]:
    """A loss that grows with the distance of each key to its best value, and differs by row."""

    def loss(run: Run) -> float:
        total = 2.0
        for key, value in run.tuned:
            at = best[run.row][key]
            total += abs(value - at) if key == DECAY else abs(math.log(value / at))
        return total

    return loss


class Trained:
    """Runs that were trained, and their losses."""

    def __init__(self, comparison: ComparisonConfig, loss: Callable[[Run], float]) -> None:
        self.comparison = comparison
        self.loss = loss
        self.losses: dict[Run, float] = {}

    def tuning(self) -> Tuning:
        return tune(self.comparison, self.losses.get)

    def train(self) -> list[list[Run]]:
        """Trains what is due until nothing is; returns the runs of each call."""
        stages = []
        while due := self.tuning().due:
            assert not self.losses.keys() & set(due), "no run is trained twice"
            assert self.tuning().chosen == {}
            stages.append(list(due))
            self.losses |= {run: self.loss(run) for run in due}
        return stages


def values(runs: list[Run], row: str) -> list[tuple[float, ...]]:
    return [tuple(value for _, value in run.tuned) for run in runs if run.row == row]


def test_each_key_is_tried_with_the_others_at_their_best_so_far(tmp_path):
    best = {"dense": {LR: 2e-3, OTHER: 2e-3, DECAY: 0.0}, "thin": BEST["thin"]}
    trained = Trained(declare(tmp_path), distance(best))
    of_lr, of_other, of_decay = trained.train()
    # The others start at their middle value, or where `start` says.
    assert values(of_lr, "dense") == [(2e-3, 2e-3, 0.1), (1e-3, 2e-3, 0.1), (4e-3, 2e-3, 0.1)]
    assert values(of_lr, "thin") == [(2e-2, 2e-3), (1e-2, 2e-3), (4e-2, 2e-3)]
    # The run at the best value so far is known already.
    assert values(of_other, "dense") == [(2e-3, 1e-3, 0.1), (2e-3, 4e-3, 0.1)]
    assert values(of_other, "thin") == [(2e-2, 1e-3), (2e-2, 4e-3)]
    assert values(of_decay, "dense") == [(2e-3, 2e-3, 0.0)]
    assert values(of_decay, "thin") == []
    assert {run.seed for run in trained.losses} == {1}
    assert trained.tuning().chosen == best


def test_rows_that_use_the_values_of_another_row_take_all_of_them(tmp_path):
    trained = Trained(declare(tmp_path), distance(BEST))
    trained.train()
    runs = report_runs(trained.comparison, trained.tuning().chosen)
    assert values(runs, "ablation") == values(runs, "thin") == [(2e-2, 2e-3)] * 2


def test_the_number_of_later_runs_is_known_from_the_start(tmp_path):
    trained = Trained(declare(tmp_path), distance(BEST))
    first = trained.tuning()
    trained.train()
    assert len(first.runs) + first.num_later == len(trained.losses) == 6 + 4 + 1


def test_only_learning_rates_are_widened_and_for_every_row(tmp_path):
    best = {"dense": {LR: 2e-3, OTHER: 8e-3, DECAY: 0.0}, "thin": BEST["thin"]}
    trained = Trained(declare(tmp_path), distance(best))
    trained.train()
    tried = {name: {of.key: of for of in row} for name, row in trained.tuning().tried.items()}
    # 4e-3 is at the edge, then 8e-3 is, then it lies between two others.
    assert sorted(tried["dense"][OTHER].losses) == [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2]
    assert len(tried["thin"][OTHER].losses) == 5
    assert len(tried["dense"][LR].losses) == len(tried["thin"][LR].losses) == 3
    # The lowest weight decay is the best one, and no lower one is tried.
    assert sorted(tried["dense"][DECAY].losses) == [0.0, 0.1]
    assert tried["dense"][DECAY].is_interior is None
    assert tried["dense"][OTHER].is_interior
    assert trained.tuning().chosen == best


def test_a_grid_is_widened_at_most_as_often_as_declared(tmp_path):
    best = {"dense": {LR: 1.0, OTHER: 2e-3, DECAY: 0.1}, "thin": BEST["thin"]}
    trained = Trained(declare(tmp_path), distance(best))
    trained.train()
    (of_lr, *_) = trained.tuning().tried["dense"]
    assert max(of_lr.losses) == of_lr.best == 16e-3
    assert of_lr.is_interior is False
    assert trained.tuning().chosen["dense"][LR] == 16e-3


def test_a_repeated_key_is_tried_again_with_the_others_at_their_best(tmp_path):
    """The best learning rate depends on the other one, so the first choice was wrong."""

    def loss(run: Run) -> float:
        tuned = dict(run.tuned)
        if run.row == "thin":
            return distance(BEST)(run)
        # The lower the other rate, the higher the best learning rate.
        best_lr = 4e-6 / tuned[OTHER]
        return abs(math.log(tuned[LR] / best_lr)) + abs(math.log(tuned[OTHER] / 1e-3)) * 2

    once = 'axes = ["optimizer.lr", "optimizer.other_lr", "optimizer.weight_decay"]'
    again = once.replace('"optimizer.weight_decay"]', '"optimizer.weight_decay", "optimizer.lr"]')
    chosen = []
    for axes in (once, again):
        trained = Trained(declare(tmp_path, GRID.replace(once, axes)), loss)
        trained.train()
        chosen.append(trained.tuning().chosen["dense"])
    assert (chosen[0][LR], chosen[0][OTHER]) == (2e-3, 1e-3)
    assert (chosen[1][LR], chosen[1][OTHER]) == (4e-3, 1e-3)
    assert [of.key for of in trained.tuning().tried["dense"]] == [LR, OTHER, DECAY, LR]


def test_nothing_is_chosen_from_an_unfinished_axis(tmp_path):
    trained = Trained(declare(tmp_path), distance(BEST))
    first = trained.tuning().due
    trained.losses |= {run: trained.loss(run) for run in first[:-1]}
    tuning = trained.tuning()
    assert tuning.due == first[-1:]
    assert tuning.chosen == {}
    assert [len(of.losses) for of in tuning.tried["dense"]] == [3]
    assert [len(of.losses) for of in tuning.tried["thin"]] == [2]


def test_a_diverged_run_is_finished_and_never_the_best(tmp_path):
    trained = Trained(
        declare(tmp_path),
        lambda run: math.inf if run.value(LR) == 2e-3 else distance(BEST)(run),
    )
    trained.train()
    assert trained.tuning().chosen["dense"][LR] in (1e-3, 4e-3)


def test_the_decision_depends_on_nothing_but_the_losses(tmp_path):
    comparison = declare(tmp_path)
    trained = Trained(comparison, distance(BEST))
    trained.train()
    backwards = dict(reversed(list(trained.losses.items())))
    assert tune(comparison, backwards.get) == trained.tuning()


@pytest.mark.parametrize(
    ("given", "changed", "folder"),
    [
        ("", "", "lr-0.002-other_lr-0.002-weight_decay-0.1-seed-1"),
        # An axis of the method has the method's name in front of it.
        (
            "optimizer.weight_decay",
            "method.scale",
            "lr-0.002-other_lr-0.002-method.scale-0.1-seed-1",
        ),
    ],
)
def test_folders_are_named_after_all_tuned_keys(tmp_path, given, changed, folder):
    comparison = declare(tmp_path, GRID.replace(given, changed) if given else GRID)
    first = tune(comparison, lambda run: None).due[0]
    assert first.folder == Path("out/runs/dense") / folder
