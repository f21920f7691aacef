"""After the first step nothing is compiled any more, however often vectors are switched."""

from collections.abc import Iterator

import pytest
import torch
from tiny import tiny_trainer, train_steps
from torch._dynamo.utils import compilation_time_metrics, counters

from switchtitan.distributed.world import stop_world

NUM_STEPS = 200
COMPILED = ("--compile.blocks", "true", "--compile.loss", "true", "--compile.optimizer", "true")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    stop_world()


def num_compilations() -> int:
    """Frames that the compiler has worked on so far, successfully or not."""
    return len(compilation_time_metrics.get("_compile.compile_inner", []))


def num_graph_breaks() -> int:
    return sum(counters["graph_break"].values())


def test_no_graph_break_and_no_recompilation_in_200_steps_with_switches(corpora):
    trainer = tiny_trainer(
        corpora / "steady",
        "switchlora",
        *COMPILED,
        "--training.steps",
        "201",
        "--evaluation.interval",
        "1000",
    )
    train_steps(trainer, 1)
    num_compiled, num_graphs = num_compilations(), counters["stats"]["unique_graphs"]
    # Blocks, the loss, the dense update, and updates of factors of several shapes.
    assert min(num_graphs, num_compiled) >= 4
    switched_before = trainer.optimizer.metrics()["switch/vectors_switched_total"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        losses = train_steps(trainer, NUM_STEPS)
    trainer.batches.close()
    assert losses[-1] < losses[0]
    assert trainer.optimizer.metrics()["switch/vectors_switched_total"] - switched_before >= 100
    assert num_graph_breaks() == 0
    assert counters["stats"]["unique_graphs"] == num_graphs
    assert num_compilations() == num_compiled


def test_the_count_sees_a_batch_of_another_shape(corpora):
    """Shows that the check above can fail."""
    trainer = tiny_trainer(corpora / "unsteady", "switchlora", *COMPILED)
    train_steps(trainer, 1)
    num_compiled = num_compilations()
    shorter = [type(batch)(*(part[:, :-3] for part in batch)) for batch in next(trainer.batches)]
    trainer.batches.close()
    trainer._forward_backward(shorter)
    assert num_compilations() > num_compiled
    with (
        torch._dynamo.config.patch(error_on_recompile=True),
        pytest.raises(torch._dynamo.exc.RecompileError),
    ):
        trainer._forward_backward([type(batch)(*(part[:, :-2] for part in batch)) for batch in shorter])
