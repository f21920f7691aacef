"""The tensors of a run's checkpoint, by name: the model's and the optimizer's."""

from pathlib import Path

from torch import Tensor, nn

from switchtitan.checkpoint import load_tensors_
from switchtitan.contracts import TrainingOptimizer
from switchtitan.distributed.replicas import check_replicas

_MODEL, _OPTIMIZER = "model.", "optimizer."


class CheckpointTensors:
    """All tensors of a run's checkpoint, sharing memory with the model and the optimizer.

    To be made while all parameters are shards: FSDP swaps them in forward passes.
    """

    def __init__(self, model: nn.Module, optimizer: TrainingOptimizer) -> None:
        self._optimizer = optimizer
        self._of_model = {
            f"{_MODEL}{name}": tensor.detach() for name, tensor in model.state_dict(keep_vars=True).items()
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
