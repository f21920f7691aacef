"""Steps after the first one compile nothing, although vectors are switched. A step reads no values
back from the device, and leaves no tensors to the garbage collection."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from support.compiled import SWITCHLORA_COMPILED, compiled_functions
from support.leftovers import tensors_left_by_fifteen_steps
from support.tiny import COMPILED, METHOD_KEYS, tiny_trainer, train_steps
from torch._dynamo.utils import compilation_time_metrics, counters
from torch.utils._python_dispatch import TorchDispatchMode

from switchtitan.contracts import Batch
from switchtitan.distributed.world import stop_world
from switchtitan.training.stepper import RunningLoss

NUM_STEPS = 200
MUON = ("--optimizer.name", "muon")


@pytest.fixture(autouse=True)
def no_world_left_behind(fresh_compiler: None) -> Iterator[None]:
    yield
    stop_world()


def num_compilations() -> int:
    """Number of frames that the compiler has processed so far, successfully or not."""
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
    assert compiled_functions() == SWITCHLORA_COMPILED
    assert num_graphs == sum(SWITCHLORA_COMPILED.values())
    switched_before = trainer.stepper.optimizer.metrics()["switch/vectors_switched_total"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        losses = train_steps(trainer, NUM_STEPS)
    trainer.stepper.close()
    assert losses[-1] < losses[0]
    assert (
        trainer.stepper.optimizer.metrics()["switch/vectors_switched_total"] - switched_before
        >= 100
    )
    assert num_graph_breaks() == 0
    assert counters["stats"]["unique_graphs"] == num_graphs
    assert num_compilations() == num_compiled


@pytest.mark.parametrize("method", ["relora", "galore", "fira", "apollo", "apollo_mini"])
def test_compiled_methods_train_as_they_do_uncompiled(corpora, method):
    """The steps include a reset of ReLoRA and new projections of GaLore, Fira and APOLLO. The test
    above covers SwitchLoRA."""
    losses = []
    for overrides in ((), COMPILED):
        trainer = tiny_trainer(corpora / "compiled-methods", method, *overrides)
        losses.append(train_steps(trainer, 10))
        trainer.stepper.close()
    # Fused kernels round differently; Adam amplifies it where gradients are near zero.
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert num_graph_breaks() == 0


@pytest.mark.parametrize("method", ["full_rank", "lora", "switchlora"])
def test_muon_compiles_in_the_first_step_and_trains_as_it_does_uncompiled(corpora, method):
    trainer = tiny_trainer(corpora / "muon", method, *MUON)
    expected = train_steps(trainer, 10)
    trainer.stepper.close()
    trainer = tiny_trainer(corpora / "compiled-muon", method, *MUON, *COMPILED)
    losses = train_steps(trainer, 1)
    with torch._dynamo.config.patch(error_on_recompile=True):
        losses += train_steps(trainer, 9)
    trainer.stepper.close()
    # Fused kernels round differently; iterations amplify it in directions of small gradients.
    assert losses == pytest.approx(expected, rel=1e-5)
    assert num_graph_breaks() == 0


def test_the_count_includes_the_compilation_for_a_batch_of_another_shape(corpora):
    """Shows that the check above can fail."""
    trainer = tiny_trainer(corpora / "unsteady", "full_rank", *COMPILED)
    train_steps(trainer, 1)
    num_compiled = num_compilations()
    shorter = [
        type(batch)(*(part[:, :-3] for part in batch)) for batch in next(trainer.stepper.batches)
    ]
    trainer.stepper.close()
    trainer.stepper.forward_backward(shorter)
    assert num_compilations() > num_compiled
    with (
        torch._dynamo.config.patch(error_on_recompile=True),
        pytest.raises(torch._dynamo.exc.RecompileError),
    ):
        trainer.stepper.forward_backward(
            [type(batch)(*(part[:, :-2] for part in batch)) for batch in shorter]
        )


READS_BACK = {
    # `item()`, `float()` and `bool()` call this.
    torch.ops.aten._local_scalar_dense,
    torch.ops.aten.is_nonzero,
    torch.ops.aten.equal,
    # The lengths of their results depend on values.
    torch.ops.aten.nonzero,
    torch.ops.aten.masked_select,
    torch.ops.aten._unique2,
}


class RecordReadsBack(TorchDispatchMode):
    """Records operations for which the host would wait if their tensors were on a GPU.

    Does not see `tolist`, `numpy` and `cpu`, which are not operations on a CPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func.overloadpacket in READS_BACK or _picks_by_mask(func, args):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def _picks_by_mask(func: Any, args: tuple) -> bool:
    return func.overloadpacket is torch.ops.aten.index and any(
        index is not None and index.dtype == torch.bool for index in args[1]
    )


def reads_back_in_ten_steps(folder, method: str, *overrides: str) -> list[str]:
    """The steps include two projections of GaLore and APOLLO, a reset of ReLoRA, and switches in
    every step of SwitchLoRA."""
    trainer = tiny_trainer(folder, method, *overrides)
    train_steps(trainer, 1)
    # Batches are read before, because the loader's operations are the host's.
    ready = [next(trainer.stepper.batches) for _ in range(10)]
    trainer.stepper.close()
    trainer.stepper.batches = (micro_batches for micro_batches in ready)
    running_loss = RunningLoss(trainer.stepper.world.device)
    with RecordReadsBack() as record:
        for _ in ready:
            running_loss.add(trainer.stepper.step())
    return record.found


@pytest.mark.parametrize(
    ("method", "overrides"), [*((method, ()) for method in METHOD_KEYS), ("switchlora", MUON)]
)
def test_a_step_reads_nothing_back_from_the_device(corpora, method, overrides):
    assert reads_back_in_ten_steps(corpora / "no-sync", method, *overrides) == []


def test_the_record_sees_the_values_that_skipping_updates_reads(corpora):
    """Shows that the check above can fail."""
    found = reads_back_in_ten_steps(
        corpora / "sync", "full_rank", "--training.on_nonfinite", "skip"
    )
    assert len(found) >= 10


CHECKPOINTED = ("--activation_checkpoint.mode", "full")
# Methods differ in their layers and updates. For compilation and activation checkpointing there are
# only three kinds of layers: plain ones, and adapted ones with and without a frozen weight.
STEPS_TO_WATCH = [
    *((method, ()) for method in METHOD_KEYS),
    *((method, CHECKPOINTED) for method in ("full_rank", "switchlora")),
    ("switchlora", MUON),
    *(pytest.param(method, COMPILED, marks=()) for method in ("galore", "sltrain", "switchlora")),
]


@pytest.mark.parametrize(("method", "overrides"), STEPS_TO_WATCH)
def test_steps_leave_no_tensors_to_the_garbage_collection(corpora, method, overrides):
    """Such tensors would occupy memory until the next collection, many steps later."""
    assert tensors_left_by_fifteen_steps(tiny_trainer(corpora / "garbage", method, *overrides)) <= 0


def test_the_count_includes_tensors_in_reference_cycles(corpora):
    """Shows that the check above can fail."""
    trainer = tiny_trainer(corpora / "garbage", "full_rank")
    forward_backward = trainer.stepper.forward_backward

    def leaving_a_cycle(micro_batches: list[Batch]) -> torch.Tensor:
        entry: list[Any] = [torch.ones(1)]
        entry.append(entry)
        return forward_backward(micro_batches)

    trainer.stepper.forward_backward = leaving_a_cycle
    # Not exactly 15: a tensor that existed before may be freed during the steps.
    assert tensors_left_by_fifteen_steps(trainer) >= 12
