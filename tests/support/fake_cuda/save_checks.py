"""Checks of what a save does before training continues, on fake CUDA tensors."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.cuda import _pin_memory_utils

from support.fake_cuda.cases import CASES
from support.fake_cuda.python_api import FakeStream
from support.fake_cuda.races import FindRaces
from support.fake_cuda.step_checks import Observed, observe, observed_stepper
from switchtitan.checkpoint.load import CheckpointTensors
from switchtitan.checkpoint.staging import HostCopies, own_share
from switchtitan.distributed.row_exchange import RowExchange
from switchtitan.distributed.shards import local
from switchtitan.training.stepper import Stepper

SAVED = ("switchlora, HSDP", "bf16 host candidates, HSDP")
"""A replica saves some of the matrices that share a storage, and tensors in host memory."""
PARTS = ("search", "share", "copy", "write", "step")
"""The search for values that are not finite, the choice of what a rank saves, its copies, reading
them in the background, and the next step."""
MISTAKES: dict[str, Any] = {
    "none": nullcontext(),
    "no wait": patch.object(FakeStream, "synchronize", lambda stream: None),
    "pageable": patch.object(_pin_memory_utils, "pin_memory", lambda address, num_bytes: None),
}


# Reads whether ranks disagree, for which fake tensors have no value.
@patch.object(RowExchange, "check", lambda exchange: None)
def saves(folder: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns for each case and mistake what each part of a save does, and its memory."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name in SAVED:
        with observed_stepper(Path(folder), CASES[name], 0) as (stepper, races):
            found[name] = {}
            for mistake, plant in MISTAKES.items():
                with plant:
                    found[name][mistake] = {
                        **dict(_parts_of_two_saves(stepper, races)),
                        **_memory(stepper),
                    }
    return found


def _parts_of_two_saves(stepper: Stepper, races: FindRaces) -> Iterator[tuple[str, Observed]]:
    tensors = CheckpointTensors(stepper.model, stepper.optimizer)
    copy_to_host = HostCopies()
    share, copies = dict[str, Tensor](), dict[str, Tensor]()
    for save in ("first", "second"):
        yield f"{save} search", observe(tensors.non_finite, races)
        yield f"{save} share", observe(lambda: share.update(_share(tensors)), races)
        yield f"{save} copy", observe(lambda: copies.update(copy_to_host(share)), races)
        yield (
            f"{save} write",
            observe(lambda: [local(copy).clone() for copy in copies.values()], races),
        )
        yield f"{save} step", observe(stepper.step, races)


def _share(tensors: CheckpointTensors) -> dict[str, Tensor]:
    """Returns what a rank saves; tensors made from NumPy arrays, which are real, as fake ones."""
    return {
        name: tensor
        if isinstance(local(tensor), FakeTensor)
        else torch.zeros(tensor.shape, dtype=tensor.dtype)
        for name, tensor in own_share(tensors()).items()
    }


def _memory(stepper: Stepper) -> dict[str, int]:
    """Returns the bytes of a rank's share, of the storages of it, and of those of its copies."""
    own = _share(CheckpointTensors(stepper.model, stepper.optimizer))
    return {
        "num_tensors": len(own),
        "share": sum(local(tensor).nbytes for tensor in own.values()),
        "storages": _bytes_of_storages(own),
        "copies": _bytes_of_storages(HostCopies()(own)),
    }


def _bytes_of_storages(tensors: dict[str, Tensor]) -> int:
    storages = [local(tensor).untyped_storage() for tensor in tensors.values()]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())
