"""Load a checkpoint's tensors on any number of ranks."""

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException

from switchtitan.checkpoint.agreement import (
    ignore_warning_about_single_process,
    raise_unwrapped,
    run_together,
)
from switchtitan.checkpoint.metadata import TensorsIndex, read_tensors_index
from switchtitan.checkpoint.storage import JsonIndexReader, dtype_named
from switchtitan.checkpoint.verify import check_files
from switchtitan.contracts import TrainingOptimizer, replicated_values
from switchtitan.distributed.norms import non_finite
from switchtitan.distributed.replicas import check_replicas
from switchtitan.errors import CheckpointError, abbreviate


def load_tensors_(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fills `tensors` in place from the checkpoint at `path`, which may be sharded differently.

    Collective: every rank passes the same names.

    Args:
        tensors: the saved names, shapes and dtypes, all of them; DTensors or plain tensors, not on
            meta.

    Raises:
        CheckpointError: on every rank, before any tensor changes, if the checkpoint is not complete
            or names, shapes or dtypes differ.
    """

    def check() -> None:
        check_files(path)
        _check_tensors(path, read_tensors_index(path), tensors)

    run_together(check, group=None)
    run_together(lambda: _read_into_(path, read_tensors_index(path), tensors), group=None)


class SavedTensors:
    """The tensors of a checkpoint whose names start with a prefix, read on request.

    Reads the index once. The prefix is removed from the names. Needs no process group.

    Raises:
        CheckpointError: if the checkpoint is not complete or has no such tensor.
    """

    def __init__(self, path: Path, prefix: str = "") -> None:
        check_files(path)
        self._path, self._prefix = path, prefix
        self._index = read_tensors_index(path)
        self.on_meta: dict[str, Tensor] = {
            name.removeprefix(prefix): torch.empty(
                record.shape, dtype=dtype_named(record.dtype), device="meta"
            )
            for name, record in self._index.tensors.items()
            if name.startswith(prefix)
        }
        """All names, with shapes and dtypes."""
        if not self.on_meta:
            raise CheckpointError(f"{path}: holds no tensor whose name starts with {prefix!r}")

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Returns full tensors on the CPU.

        Raises:
            CheckpointError: if a tensor cannot be read.
        """
        tensors = {name: torch.empty_like(self.on_meta[name], device="cpu") for name in names}
        try:
            named = {f"{self._prefix}{name}": tensor for name, tensor in tensors.items()}
            records = {name: self._index.tensors[name] for name in named}
            _read_into_(self._path, TensorsIndex(tensors=records), named)
        except CheckpointException as error:
            raise_unwrapped(error)
        return tensors


def _read_into_(path: Path, index: TensorsIndex, tensors: Mapping[str, Tensor]) -> None:
    assert not any(tensor.is_meta for tensor in tensors.values()), (
        "meta tensors cannot be loaded in place"
    )
    with warnings.catch_warnings():
        ignore_warning_about_single_process()
        # Each rank reads the pieces that it needs; no joint planning.
        dcp.load(dict(tensors), storage_reader=JsonIndexReader(path, index), no_dist=True)


def _check_tensors(path: Path, index: TensorsIndex, tensors: Mapping[str, Tensor]) -> None:
    saved = index.tensors
    problems = []
    if missing := sorted(tensors.keys() - saved.keys()):
        problems.append(f"lacks {abbreviate(missing)}")
    if unexpected := sorted(saved.keys() - tensors.keys()):
        problems.append(f"holds {abbreviate(unexpected)}, which the model and its optimizer lack")
    differing = [
        f"{name} ({saved[name].dtype} {list(saved[name].shape)}, "
        f"expected {_dtype(tensor)} {list(tensor.shape)})"
        for name, tensor in sorted(tensors.items())
        if name in saved
        and (saved[name].dtype, saved[name].shape) != (_dtype(tensor), tuple(tensor.shape))
    ]
    if differing:
        problems.append(f"has other shapes or dtypes in {abbreviate(differing)}")
    if problems:
        raise CheckpointError(
            f"{path} does not fit this run: it {'; it '.join(problems)}. Use the configuration it "
            "was saved with, or start a new run in another [job] output_dir"
        )


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


_MODEL, _OPTIMIZER = "model.", "optimizer."


class CheckpointTensors:
    """All tensors of a run's checkpoint, sharing memory with the model and the optimizer.

    Build it while parameters are sharded: FSDP replaces them during forward passes.
    """

    def __init__(self, model: nn.Module, optimizer: TrainingOptimizer) -> None:
        self._optimizer = optimizer
        self._device = next(model.parameters()).device
        self._of_model = {
            f"{_MODEL}{name}": tensor.detach()
            for name, tensor in model.state_dict(keep_vars=True).items()
        }

    def __call__(self) -> dict[str, Tensor]:
        """Returns all tensors by name, with the current optimizer state."""
        return self._of_model | {
            f"{_OPTIMIZER}{name}": tensor for name, tensor in self._optimizer.state_dict().items()
        }

    def restore(self, checkpoint: Path) -> None:
        """Loads model and optimizer from a checkpoint saved on any number of ranks."""
        tensors = self()
        load_tensors_(checkpoint, tensors)
        self._optimizer.load_state_dict(
            {
                name.removeprefix(_OPTIMIZER): tensor
                for name, tensor in tensors.items()
                if name.startswith(_OPTIMIZER)
            }
        )

    def check_replicas(self) -> None:
        """Compares the model's replicas across ranks. Collective; synchronizes with the device.

        Raises:
            RanksDisagreeError: on every rank, if replicas differ.
        """
        # The default group of CUDA ranks does not communicate buffers that stay in host memory.
        check_replicas(self._of_model, self._device)

    def held(self) -> dict[str, Tensor]:
        """Returns all tensors by name, and values outside the state that every rank computes."""
        others = replicated_values(self._optimizer)
        return {f"{_OPTIMIZER}{name}": tensor for name, tensor in others.items()} | self()

    def check_state(self, numbers: Mapping[str, Tensor]) -> None:
        """Compares all state that several ranks hold: model, optimizer, and `numbers`.

        Shards are compared over replicas. Plain tensors, such as counts and random bases, are
        compared over all ranks. Collective; synchronizes with the device.

        Args:
            numbers: further plain tensors by name, on any device.

        Raises:
            RanksDisagreeError: on every rank, if ranks differ.
        """
        # The state of some optimizers takes time to collect.
        if dist.is_initialized() and dist.get_world_size() > 1:
            check_replicas(self.held() | dict(numbers), self._device)

    def non_finite(self) -> list[str]:
        """Returns the names of the model's tensors with an inf or nan, the same on every rank.

        Collective; synchronizes with the device.
        """
        return non_finite(self._of_model, self._device)
