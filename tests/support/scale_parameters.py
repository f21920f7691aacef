"""Parameters of every role for tests of SCALE, full or sharded."""

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from support.optimizer_steps import draw
from switchtitan.optim import TrainedParameter

SHAPES = {
    "embed.weight": (6, 7),
    "layers.0.proj.weight": (5, 7),
    "layers.0.proj.lora_b": (3, 5),
    "layers.0.norm.weight": (5,),
    "head.weight": (9, 5),
}
TRANSPOSED = ("embed.weight", "layers.0.proj.lora_b")
"""Matrices whose rows are inputs."""
HEAD = "head.weight"
TREATED = ("layers.0.proj.weight", "layers.0.proj.lora_b")


def placed(value: Tensor, mesh: DeviceMesh | None) -> Tensor:
    """The tensor, sharded along dimension 0 over a mesh, or over the last dimension of one with
    replicas."""
    if mesh is None:
        return value
    return distribute_tensor(value, mesh, [Replicate()] * (mesh.ndim - 1) + [Shard(0)])


def start(mesh: DeviceMesh | None = None) -> dict[str, nn.Parameter]:
    """The same values in every call."""
    values = zip(SHAPES, draw(SHAPES, 1000), strict=True)
    return {name: nn.Parameter(placed(value, mesh)) for name, value in values}


def give_gradients(
    named: dict[str, nn.Parameter], step: int, mesh: DeviceMesh | None = None
) -> dict[str, Tensor]:
    """Gives the parameters a step's gradients; returns them in full."""
    gradients = dict(zip(SHAPES, draw(SHAPES, step), strict=True))
    for name, parameter in named.items():
        parameter.grad = placed(gradients[name].clone(), mesh)
    return gradients


def trained(named: dict[str, nn.Parameter]) -> list[TrainedParameter]:
    return [
        TrainedParameter(
            name,
            parameter,
            is_other=name not in TREATED,
            is_in_block=name.startswith("layers."),
            is_head=name == HEAD,
            input_dim=0 if name in TRANSPOSED else 1,
        )
        for name, parameter in named.items()
    ]
