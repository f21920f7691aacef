"""The tensors of a run's checkpoint, by name: the model's and the optimizer's."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from switchtitan.checkpoint import load_tensors_
from switchtitan.contracts import TrainingOptimizer


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors by their names in a checkpoint, sharing memory with it.

    To be looked up while all of them are shards: FSDP swaps them in forward passes.
    """
    return {f"model.{name}": tensor.detach() for name, tensor in model.state_dict(keep_vars=True).items()}


def checkpoint_tensors(model: nn.Module, optimizer: TrainingOptimizer) -> Callable[[], dict[str, Tensor]]:
    """Returns what gives all tensors of a checkpoint by name, sharing memory with the model and the optimizer; see
    `model_tensors`, which it calls now."""
    of_model = model_tensors(model)

    def tensors() -> dict[str, Tensor]:
        return of_model | {f"optimizer.{name}": tensor for name, tensor in optimizer.state_dict().items()}

    return tensors


def restore(checkpoint: Path, tensors: dict[str, Tensor], optimizer: TrainingOptimizer) -> None:
    """Fills model and optimizer from a checkpoint, whatever number of ranks saved it."""
    load_tensors_(checkpoint, tensors)
    prefix = "optimizer."
    optimizer.load_state_dict(
        {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    )
