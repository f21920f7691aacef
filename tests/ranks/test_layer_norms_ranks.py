"""Norms of layers do not depend on the number of ranks, nor on how frozen weights are held."""

import json
from pathlib import Path

import pytest
from support.ranks import run_on_ranks
from support.tiny import tiny_trainer

KEYS = ("--metrics.layers", "true", "--training.steps", "3", "--evaluation.interval", "100")
HELD = {
    "shard": (),
    "replicate": ("--parallelism.frozen_weights", "replicate"),
    "gather_once": ("--parallelism.frozen_weights", "gather_once"),
}


def train(rank: int, folder: Path, name: str, num_ranks: int, keys: tuple[str, ...]) -> None:
    trainer = tiny_trainer(folder / name, "switchlora", *KEYS, *keys, num_ranks=num_ranks)
    reported: dict[str, float] = {}
    report = trainer.reporter.report

    def record(step: int, values: dict[str, float]) -> None:
        if step == 3:
            reported.update(
                {tag: v for tag, v in values.items() if "norm/" in tag or "share/" in tag}
            )
        report(step, values)

    trainer.reporter.report = record
    trainer.train()
    if rank == 0:
        (folder / f"{name}.json").write_text(json.dumps(reported))


def test_norms_on_two_ranks_are_those_of_one(corpora):
    folder = corpora / "layer-norms-ranks"
    run_on_ranks(1, train, folder, "one", 1, ())
    one = json.loads((folder / "one.json").read_text())
    assert any(value > 0 for tag, value in one.items() if tag.startswith("merged_share/"))
    for name, keys in HELD.items():
        run_on_ranks(2, train, folder, name, 2, keys)
        two = json.loads((folder / f"{name}.json").read_text())
        # Sums in another order; Adam amplifies it where gradients are near zero.
        assert two == pytest.approx(one, rel=1e-3, abs=1e-6), name
