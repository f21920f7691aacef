"""Traces of several ranks, and their common summary."""

import json
from pathlib import Path

import pytest
from support.ranks import run_on_ranks
from support.tiny import tiny_trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

TRACED = (
    *("--profiler.enabled", "true", "--profiler.start_step", "3", "--profiler.num_steps", "2"),
    *("--profiler.memory", "true", "--training.steps", "6", "--evaluation.interval", "100"),
    *("--training.local_batch_size", "2", "--metrics.tensorboard", "true"),
)


def train(rank: int, folder: Path, ranks: str) -> None:
    keys = (*TRACED, "--profiler.ranks", ranks)
    tiny_trainer(folder / ranks, "switchlora", *keys, num_ranks=2).train()


@pytest.mark.parametrize(("ranks", "traced"), [("all", [0, 1]), ("1", [1])])
def test_every_rank_asked_for_is_traced_and_summarized(corpora, ranks, traced):
    folder = corpora / "profiler-ranks"
    run_on_ranks(2, train, folder, ranks)
    logs = folder / ranks / "run" / "tensorboard"
    assert sorted(file.name.split(".")[0] for file in logs.glob("*.pt.trace.json")) == [
        f"rank{rank}" for rank in traced
    ]
    summaries = json.loads((logs / "profile_summary.json").read_text())
    assert [summary["rank"] for summary in summaries] == traced
    for summary in summaries:
        assert summary["num_steps"] == 2
        assert {"forward", "backward", "switch"} <= set(summary["regions"])
        parts = sum(
            time["host_ms"]
            for name, time in summary["regions"].items()
            if name not in ("evaluate", "save", "report")
        )
        assert parts == pytest.approx(summary["step_ms"])
        assert summary["memory_mib"]
    events = EventAccumulator(str(logs), size_guidance={"images": 0, "tensors": 0}).Reload()
    tags = events.Tags()
    assert set(tags["images"]) == {
        f"profile/{name}" for name in ("regions", "operations", "memory")
    }
    assert "profile/time_per_region/text_summary" in tags["tensors"]
    (text,) = events.Tensors("profile/time_per_region/text_summary")
    assert f"rank {traced[-1]}" in text.tensor_proto.string_val[0].decode()
