"""What an optimizer trains, and at which learning rate and weight decay."""

from collections.abc import Collection, Iterable
from typing import NamedTuple

from torch import nn

from switchtitan.contracts import OptimizerConfig


class TrainedParameter(NamedTuple):
    """A parameter to train."""

    name: str
    """Qualified."""
    parameter: nn.Parameter
    is_other: bool = False
    """Whether the method leaves it as it is in the plain model, so that `[optimizer] other_lr` applies."""
    is_in_block: bool = False
    """Whether it belongs to a block of the model: neither embedding, nor last norm, nor head."""


class ParameterGroup(NamedTuple):
    """Parameters by qualified name that share a peak learning rate and a weight decay."""

    parameters: dict[str, nn.Parameter]
    lr: float
    weight_decay: float


def trained_parameters(
    model: nn.Module, treated: Collection[str] | None = None, blocks: Iterable[str] = ()
) -> list[TrainedParameter]:
    """The parameters of a model that require a gradient, in its order.

    Args:
        treated: names of those that the method treats; None for all.
        blocks: qualified names of the model's blocks, see `contracts.LanguageModel.blocks`.
    """
    prefixes = tuple(f"{block}." for block in blocks)
    return [
        TrainedParameter(
            name,
            parameter,
            is_other=treated is not None and name not in treated,
            is_in_block=name.startswith(prefixes),
        )
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]


def parameter_groups(
    config: OptimizerConfig, parameters: Iterable[TrainedParameter]
) -> list[ParameterGroup]:
    """Group parameters by learning rate and weight decay, in the order in which groups first occur."""
    groups: dict[tuple[float, float], ParameterGroup] = {}
    for name, parameter, is_other, _ in parameters:
        lr = config.lr if config.other_lr is None or not is_other else config.other_lr
        decays = config.decay_norms or parameter.ndim > 1
        weight_decay = config.weight_decay if decays else 0.0
        group = groups.setdefault((lr, weight_decay), ParameterGroup({}, lr, weight_decay))
        group.parameters[name] = parameter
    return list(groups.values())


def lr_metrics(config: OptimizerConfig, lr_factor: float) -> dict[str, float]:
    """The current learning rates by TensorBoard tag."""
    rates = {"optimizer/lr": config.lr * lr_factor}
    if config.other_lr is not None:
        rates["optimizer/other_lr"] = config.other_lr * lr_factor
    return rates
