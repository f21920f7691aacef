"""The parameters that an optimizer trains, and their groups."""

from collections.abc import Collection, Iterable
from typing import NamedTuple

import torch
from torch import nn

from switchtitan.contracts import OptimizerConfig, ParameterGroup, TrainedModel


class TrainedParameter(NamedTuple):
    """A parameter to train."""

    name: str
    """The qualified name."""
    parameter: nn.Parameter
    is_other: bool = False
    """Whether the method does not change it, so that `[optimizer] other_lr` applies."""
    is_in_block: bool = False
    """Whether it belongs to a block of the model, not to the embedding, last norm or head."""
    is_head: bool = False
    """Whether it belongs to the module that maps hidden states to logits, and to no other."""
    input_dim: int = 1
    """Of a matrix, the dimension over the inputs of the linear map: 1 for [out, in]; 0 if it is
    stored transposed, like an embedding [vocabulary, dim]."""
    compute_dtype: torch.dtype = torch.float32
    """dtype in which the model multiplies by it."""
    decays: bool = False
    """Whether weight decay applies even if it is 1-dim and `decay_norms` is off."""


def trained_parameters(model: TrainedModel, targeted: Collection[str]) -> list[TrainedParameter]:
    """Returns the parameters that require a gradient, in the model's order.

    Args:
        targeted: names of the parameters that the method changes.
    """
    prefixes, head = tuple(f"{block}." for block in model.blocks()), model.output_head()
    # A tied head has no parameter of its own.
    in_head = set() if head is None else set(head.parameters())
    modules = [module for _, module in model.named_modules()]
    embeddings = [module for module in modules if isinstance(module, nn.Embedding)]
    in_embeddings = {parameter for module in embeddings for parameter in module.parameters()}
    return [
        TrainedParameter(
            name,
            parameter,
            is_other=name not in targeted,
            is_in_block=name.startswith(prefixes),
            is_head=parameter in in_head and parameter not in in_embeddings,
            input_dim=0 if parameter in in_embeddings else 1,
            compute_dtype=model.compute_dtype,
        )
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]


def parameter_groups(
    config: OptimizerConfig, parameters: Iterable[TrainedParameter]
) -> list[ParameterGroup]:
    """Groups parameters by learning rate and weight decay, in order of first occurrence."""
    groups: dict[tuple[float, float], ParameterGroup] = {}
    for entry in parameters:
        lr = config.lr if config.other_lr is None or not entry.is_other else config.other_lr
        decays = config.decay_norms or entry.decays or entry.parameter.ndim > 1
        weight_decay = config.weight_decay if decays else 0.0
        group = groups.setdefault((lr, weight_decay), ParameterGroup({}, lr, weight_decay))
        group.parameters[entry.name] = entry.parameter
    return list(groups.values())
