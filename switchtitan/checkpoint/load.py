"""Reading a checkpoint's tensors on any number of ranks, and those of a run by name."""

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from switchtitan.checkpoint.agreement import ignore_warning_about_single_process, run_together
from switchtitan.checkpoint.layout import TensorsIndex, check_files, read_tensors_index
from switchtitan.checkpoint.storage import JsonIndexReader, dtype_named
from switchtitan.contracts import TrainingOptimizer
from switchtitan.distributed.replicas import check_replicas
from switchtitan.errors import CheckpointError, abbreviate


def load_tensors_(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fills `tensors` in place from the checkpoint at `path`, however it was sharded when it was saved.

    Every rank must call it with the same names.

    Args:
        tensors: exactly the names, shapes and dtypes that were saved; DTensors or plain, on any device but
            meta.

    Raises:
        CheckpointError: on every rank, before anything is changed, if the checkpoint is not complete or names,
            shapes or dtypes differ; names the first few.
    """

    def check() -> None:
        check_files(path)
        _check_tensors(path, read_tensors_index(path), tensors)

    run_together(check, group=None)
    run_together(lambda: _read_into_(path, tensors), group=None)


def read_tensors(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """Returns the tensors whose names start with `prefix`, without it, as full tensors on the CPU. Needs no process
    group.

    Raises:
        CheckpointError: if the checkpoint is not complete or has no such tensor.
    """
    check_files(path)
    records = {
        name: t for name, t in read_tensors_index(path).tensors.items() if name.startswith(prefix)
    }
    if not records:
        raise CheckpointError(f"{path}: holds no tensor whose name starts with {prefix!r}")
    tensors = {
        name: torch.empty(t.shape, dtype=dtype_named(t.dtype)) for name, t in records.items()
    }
    _read_into_(path, tensors)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _read_into_(path: Path, tensors: Mapping[str, Tensor]) -> None:
    assert not any(tensor.is_meta for tensor in tensors.values()), (
        "meta tensors cannot be loaded in place"
    )
    with warnings.catch_warnings():
        ignore_warning_about_single_process()
        # Each rank reads what it needs; there is nothing to plan together.
        dcp.load(dict(tensors), storage_reader=JsonIndexReader(path), no_dist=True)


def _check_tensors(path: Path, index: TensorsIndex, tensors: Mapping[str, Tensor]) -> None:
    saved = index.tensors
    problems = []
    if missing := sorted(tensors.keys() - saved.keys()):
        problems.append(f"lacks {abbreviate(missing)}")
    if unexpected := sorted(saved.keys() - tensors.keys()):
        problems.append(
            f"holds {abbreviate(unexpected)}, which the model or its optimizer does not have"
        )
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
            f"{path} does not fit this run: it {'; it '.join(problems)}. "
            "Use the configuration that it was saved with, or start a new run in another [job] output_dir"
        )


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


_MODEL, _OPTIMIZER = "model.", "optimizer."


class CheckpointTensors:
    """All tensors of a run's checkpoint, sharing memory with the model and the optimizer.

    To be made while all parameters are shards: FSDP swaps them in forward passes.
    """

    def __init__(self, model: nn.Module, optimizer: TrainingOptimizer) -> None:
        self._optimizer = optimizer
        self._of_model = {
            f"{_MODEL}{name}": tensor.detach()
            for name, tensor in model.state_dict(keep_vars=True).items()
        }

    def __call__(self) -> dict[str, Tensor]:
        """By name, with the optimizer's state of the moment."""
        return self._of_model | {
            f"{_OPTIMIZER}{name}": tensor for name, tensor in self._optimizer.state_dict().items()
        }

    def restore(self, checkpoint: Path) -> None:
        """Fills model and optimizer from a checkpoint, whatever number of ranks saved it."""
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
        """Compares what several ranks hold alike of the model. Every rank must call; waits for the device.

        Raises:
            RanksDisagreeError: on every rank, if ranks no longer hold the same weights.
        """
        check_replicas(self._of_model)
