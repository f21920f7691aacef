"""Parameters of every role for tests of SCALE, full or sharded."""

from torch import nn

from support.optimizer_steps import draw, parameters, placed
from switchtitan.optim.parameters import TrainedParameter

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


def start(mesh=None):
    """The same values in every call."""
    named = parameters(SHAPES).items()
    return {name: nn.Parameter(placed(value.detach(), mesh)) for name, value in named}


def give_gradients(named, step, mesh=None):
    """Gives the parameters a step's gradients; returns them in full."""
    gradients = dict(zip(SHAPES, draw(SHAPES, step), strict=True))
    for name, parameter in named.items():
        parameter.grad = placed(gradients[name].clone(), mesh)
    return gradients


def trained(named):
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
