"""Mistakes planted into steps on fake CUDA; each function runs in a new process."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from support.fake_cuda.cases import CASES
from support.fake_cuda.collective_plants import planted_collectives
from support.fake_cuda.copies import FindBlockingCopies
from support.fake_cuda.kernels import CountKernels
from support.fake_cuda.python_api import FakeEvent, FakeStream
from support.fake_cuda.races import FindRaces
from support.fake_cuda.reads import FindHostReads
from support.fake_cuda.step_checks import observe, observed_stepper
from support.fake_cuda.stepper import fake_cuda_stepper
from support.tiny import tiny_config
from switchtitan.distributed.host_copies import CopyToHost, HostCopies
from switchtitan.methods.switchlora.optimizer import SwitchLoraOptimizer
from switchtitan.training.stepper import Stepper


def planted_blocking_copies(folder: str) -> dict[str, list[str]]:
    """Returns the blocking copies found for operations known to block or not."""
    plants = {
        "number": lambda table: table.__setitem__(3, 5),
        "pageable": lambda table: torch.ones(4, dtype=torch.int32).to(
            table.device, non_blocking=True
        ),
        "blocking": lambda table: torch.ones(4, dtype=torch.int32).pin_memory().to(table.device),
        "indices": lambda table: table[torch.tensor([0, 1])],
        "number at indices": lambda table: table.__setitem__(table[:2].long(), 5),
        "back": lambda table: table.cpu(),
        "fill": lambda table: table[3:4].fill_(5),
        "page-locked": lambda table: torch.ones(4).pin_memory().to(table.device, non_blocking=True),
    }
    config = tiny_config(Path(folder), "full_rank", num_ranks=2)
    found = {}
    with fake_cuda_stepper(config, num_ranks=2, rank=1) as stepper:
        table = torch.zeros(8, dtype=torch.int32, device=stepper.world.device)
        for name, plant in plants.items():
            with FindBlockingCopies() as copies:
                plant(table)
            found[name] = copies.found
    return found


def planted_reads(folder: str) -> dict[str, list[str]]:
    """Returns the reads found for operations known to read values or not; or the exception."""
    plants: dict[str, Callable[[Tensor], object]] = {
        "item": lambda table: table[0].item(),
        "bool": lambda table: bool(table.isfinite().all()),
        "float": lambda table: float(table.sum()),
        "list": lambda table: table.tolist(),
        "nonzero": lambda table: table.nonzero(),
        "mask": lambda table: table[table > 0],
        "equal": lambda table: torch.equal(table, table),
        "svd": lambda table: torch.linalg.svd(table.view(2, 4)),
        "shape": lambda table: table.shape[0] + table.numel(),
        "where": lambda table: torch.where(table > 0, table, 0).any(),
    }
    found = {}
    with fake_cuda_stepper(tiny_config(Path(folder), "full_rank"), 1, 0) as stepper:
        table = torch.zeros(8, device=stepper.world.device)
        for name, plant in plants.items():
            with FindHostReads() as reads:
                try:
                    plant(table)
                except Exception as error:
                    reads.found.append(type(error).__name__)
            found[name] = reads.found
    return found


def planted_in_clipping(folder: str) -> dict[str, list]:
    """Returns what is observed in a step without and with mistakes, or the exception."""

    clip = Stepper.clip_gradients
    plants: dict[str, Callable[[Stepper, torch.Tensor], object]] = {
        "nothing": clip,
        "item": lambda stepper, loss: clip(stepper, loss).item(),
        "collective": lambda stepper, loss: stepper.world.sum(clip(stepper, loss)),
        "devices": lambda stepper, loss: clip(stepper, loss) + torch.ones(2),
    }
    observed: dict[str, list] = {}
    with observed_stepper(Path(folder), CASES["lora"], 0) as (stepper, races):
        for name, plant in plants.items():
            with patch.object(stepper, "clip_gradients", partial(plant, stepper)):
                try:
                    observed[name] = list(observe(stepper.step, races))
                except Exception as error:
                    observed[name] = [str(error)]
    return observed


class DeafStream(FakeStream):
    """A stream that does not wait for other streams."""

    def wait_stream(self, stream: FakeStream) -> None:
        pass


class StreamWithEmptyEvents(FakeStream):
    """A stream whose events record nothing, so that no one waits for its work."""

    def record_event(self, event: FakeEvent | None = None) -> FakeEvent:
        return event or FakeEvent()


def _copy_in(stream_type: type[FakeStream]) -> Any:
    """A patch with which `HostCopies` copies in a stream of this type."""
    build = HostCopies.__init__

    def build_with_stream(copies: HostCopies, device: torch.device) -> None:
        build(copies, device)
        copies._stream = stream_type()  # type: ignore[assignment]

    return patch.object(HostCopies, "__init__", build_with_stream)


def _release_at_once(copy: CopyToHost) -> None:
    copy.source = None


def _read_at_once(copy: CopyToHost) -> Tensor:
    copy.source = None
    return copy.destination


_MISTAKES: dict[str, Any] = {
    "none": nullcontext(),
    "the copying stream does not wait": _copy_in(DeafStream),
    "events record nothing": _copy_in(StreamWithEmptyEvents),
    "released at once": patch.object(CopyToHost, "join", _release_at_once),
    "read at once": patch.object(CopyToHost, "wait", _read_at_once),
    "stream not recorded": patch.object(torch.Tensor, "record_stream", lambda *_: None),
}


def planted_races(folder: str) -> dict[str, list[str]]:
    """Returns the races of copies in the background without and with a mistake, by mistake."""
    races = {}
    with fake_cuda_stepper(tiny_config(Path(folder), "full_rank"), 1, 0) as stepper:
        for mistake, plant in _MISTAKES.items():
            with plant, FindRaces() as found:
                _copy_in_background(HostCopies(stepper.world.device), stepper.world.device)
            races[mistake] = found.found
    return races


def _copy_in_background(copies: HostCopies, device: torch.device) -> None:
    """Copies to the host, back, and from the host, as offload and host candidates do."""
    offloaded = copies.to_host(torch.ones(8, device=device).mul(2))
    offloaded.join()
    # May reuse the memory of what was copied.
    torch.ones(8, device=device)
    copies.back_to_device(offloaded).wait().mul(2)
    put_back = copies.to_host(torch.ones(8, device=device).mul(2))
    put_back.wait().add(1)
    for _ in range(2):
        fetched = copies.zeros_on_host(8, torch.float32)
        copies.to_device(fetched).wait().mul(2)


def planted_races_in_steps(folder: str) -> dict[str, list[str]]:
    """Returns the races of steps that do not wait for copies or gathered weights, by case."""
    mistakes = {
        "host candidates": _copy_in(StreamWithEmptyEvents),
        "offload": _copy_in(StreamWithEmptyEvents),
        "frozen weights gathered once": _gathers_without_wait(),
    }
    races = {}
    for name, mistake in mistakes.items():
        with mistake, observed_stepper(Path(folder), CASES[name], 0) as (stepper, found):
            races[name] = observe(stepper.step, found).races
    return races


class UnwaitedWork:
    """Like the handle of a collective, for which no one waits."""

    def wait(self) -> None:
        pass


def _gathers_without_wait() -> Any:
    """A patch in which `Work.wait` of an asynchronous gather does nothing."""
    gather = dist.all_gather_single

    def gather_without_wait(*args: Any, async_op: bool = False, **kwargs: Any) -> Any:
        work = gather(*args, async_op=async_op, **kwargs)
        return UnwaitedWork() if async_op else work

    return patch.object(dist, "all_gather_single", gather_without_wait)


def planted_kernel_per_layer(folder: str) -> dict[str, dict[str, int]]:
    """Returns the kernels of a switch without and with an operation for each layer."""
    config = tiny_config(
        Path(folder), "switchlora", "--training.local_batch_size", "1", num_ranks=8
    )
    counts = {}
    with fake_cuda_stepper(config, 8, 0) as stepper:
        optimizer = stepper.optimizer
        assert isinstance(optimizer, SwitchLoraOptimizer)
        weights = [parameter for parameter in stepper.model.parameters() if parameter.ndim == 2]
        for name, touched in {"nothing": [], "per layer": weights}.items():
            with CountKernels() as kernels:
                optimizer.switch()
                for weight in touched:
                    weight.detach().mul_(1)
            counts[name] = dict(kernels.counts)
    return counts


def planted(folder: str) -> dict[str, dict]:
    """Returns what each function found, by its name."""
    functions: tuple[Callable[[str], dict], ...] = (
        planted_blocking_copies,
        planted_reads,
        planted_in_clipping,
        planted_races,
        planted_collectives,
        planted_races_in_steps,
        planted_kernel_per_layer,
    )
    return {function.__name__: function(folder) for function in functions}
