"""The parameters that an optimizer trains, and their learning rates."""

from collections.abc import Collection, Iterable
from typing import NamedTuple

from torch import nn

from switchtitan.contracts import OptimizerConfig


class TrainedParameter(NamedTuple):
    """A parameter to train."""

    name: str
    """The qualified name."""
    parameter: nn.Parameter
    is_other: bool = False
    """Whether the method does not change it, so that `[optimizer] other_lr` applies."""
    is_in_block: bool = False
    """Whether it belongs to a block of the model, not to the embedding, last norm or head."""


class ParameterGroup(NamedTuple):
    """Parameters, by qualified name, with one peak learning rate and one weight decay."""

    parameters: dict[str, nn.Parameter]
    lr: float
    weight_decay: float


def trained_parameters(
    model: nn.Module, treated: Collection[str], blocks: Iterable[str] = ()
) -> list[TrainedParameter]:
    """Returns the parameters that require a gradient, in the model's order.

    Args:
        treated: names of the parameters that the method changes.
        blocks: qualified names of the model's blocks, see `contracts.LanguageModel.blocks`.
    """
    prefixes = tuple(f"{block}." for block in blocks)
    return [
        TrainedParameter(
            name,
            parameter,
            is_other=name not in treated,
            is_in_block=name.startswith(prefixes),
        )
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]


def parameter_groups(
    config: OptimizerConfig, parameters: Iterable[TrainedParameter]
) -> list[ParameterGroup]:
    """Groups parameters by learning rate and weight decay, in order of first occurrence."""
    groups: dict[tuple[float, float], ParameterGroup] = {}
    for name, parameter, is_other, _ in parameters:
        lr = config.lr if config.other_lr is None or not is_other else config.other_lr
        decays = config.decay_norms or parameter.ndim > 1
        weight_decay = config.weight_decay if decays else 0.0
        group = groups.setdefault((lr, weight_decay), ParameterGroup({}, lr, weight_decay))
        group.parameters[name] = parameter
    return list(groups.values())


def lr_metrics(config: OptimizerConfig, lr_factor: float) -> dict[str, float]:
    """Returns the current learning rates by TensorBoard tag."""
    rates = {"optimizer/lr": config.lr * lr_factor}
    if config.other_lr is not None:
        rates["optimizer/other_lr"] = config.other_lr * lr_factor
    return rates
