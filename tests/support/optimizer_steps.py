"""Parameters and gradients for tests of optimizers, equal in every call."""

import torch
from torch import nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from switchtitan.optim import OPTIMIZERS
from switchtitan.optim.parameters import TrainedParameter

NUM_STEPS = 12
SCALED = {
    "embed.weight": (6, 7),
    "layers.0.proj.weight": (5, 7),
    "layers.0.proj.lora_b": (3, 5),
    "layers.0.norm.weight": (5,),
    "head.weight": (9, 5),
}
"""Parameters of every role for SCALE, and those that a method targets."""
SCALED_TARGETED = ("layers.0.proj.weight", "layers.0.proj.lora_b")


def draw(shapes, step):
    """Returns a step's gradients by the parameter's name, as `shapes` are."""
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def parameters(shapes, mesh=None, dtype=torch.float32):
    values = draw(shapes, 1000).items()
    return {name: nn.Parameter(placed(value.to(dtype), mesh)) for name, value in values}


def give_gradients(named, shapes, step, mesh=None, rounded_to=None):
    """Gives the parameters a step's gradients; returns them in full."""
    gradients = draw(shapes, step)
    for name, parameter in named.items():
        gradient = gradients[name].to(rounded_to or parameter.dtype, copy=True)
        parameter.grad = placed(gradient.to(parameter.dtype), mesh)
    return gradients


def is_transposed(name):
    """Whether a matrix's rows are inputs."""
    return name.startswith("embed") or name.endswith("lora_b")


def placed(value, mesh):
    """The tensor, sharded along dimension 0 over a mesh, or over the last dimension of one with
    replicas."""
    if mesh is None:
        return value
    return distribute_tensor(value, mesh, [Replicate()] * (mesh.ndim - 1) + [Shard(0)])


def build(config, named, targeted=None, compile_step=False, compute_dtype=torch.float32):
    """The optimizer of these parameters; a method targets those of `targeted`, or all."""
    entries = [
        TrainedParameter(
            name,
            parameter,
            is_other=targeted is not None and name not in targeted,
            is_in_block=name.startswith("layers."),
            is_head=name == "head.weight",
            input_dim=0 if is_transposed(name) else 1,
            compute_dtype=compute_dtype,
        )
        for name, parameter in named.items()
    ]
    return OPTIMIZERS.build(config, entries, compile_step)


def train(optimizer, named, steps, rounded_to=None):
    """Takes steps with a learning rate that grows to its peak in step `NUM_STEPS`."""
    shapes = {name: tuple(parameter.shape) for name, parameter in named.items()}
    for step in steps:
        optimizer.set_lr((step + 1) / NUM_STEPS)
        give_gradients(named, shapes, step, rounded_to=rounded_to)
        optimizer.step()
        optimizer.zero_grad()


def limit_elements_per_call(monkeypatch, module, num_elements):
    """Makes the parts small in which uncompiled operations of a module take large tensors."""
    monkeypatch.setattr(module, "_MAX_ELEMENTS", num_elements)
