"""The parameters that an optimizer trains, their groups, and their rates at another width."""

import logging
from collections.abc import Collection, Iterable
from typing import NamedTuple

import torch
from torch import nn

from switchtitan.contracts import MethodConfig, OptimizerConfig, ParameterGroup, TrainedModel

logger = logging.getLogger(__name__)


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
    rate_factor: float = 1.0
    """Of its learning rate; the product of rate and weight decay stays."""


def trained_parameters(model: TrainedModel, targeted: Collection[str]) -> list[TrainedParameter]:
    """Returns the parameters that require a gradient, in the model's order; `targeted` are names of
    those that the method changes."""
    prefixes, head = tuple(f"{block}." for block in model.blocks()), own_head(model)
    in_head = set() if head is None else set(head.parameters())
    in_embeddings = _embedded(model)
    return [
        TrainedParameter(
            name,
            parameter,
            is_other=name not in targeted,
            is_in_block=name.startswith(prefixes),
            is_head=parameter in in_head,
            input_dim=0 if parameter in in_embeddings else 1,
            compute_dtype=model.compute_dtype,
        )
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]


def own_head(model: TrainedModel) -> nn.Module | None:
    """Returns the head; None if it is not known or shares a parameter with the embedding."""
    head = model.output_head()
    parameters = set() if head is None else set(head.parameters())
    return head if parameters and parameters.isdisjoint(_embedded(model)) else None


def _embedded(model: TrainedModel) -> set[nn.Parameter]:
    modules = [module for _, module in model.named_modules() if isinstance(module, nn.Embedding)]
    return {parameter for module in modules for parameter in module.parameters()}


def parameter_groups(
    config: OptimizerConfig, parameters: Iterable[TrainedParameter]
) -> list[ParameterGroup]:
    """Groups parameters by learning rate and weight decay, in order of first occurrence."""
    groups: dict[tuple[float, float], ParameterGroup] = {}
    for entry in parameters:
        lr = rate_of(entry, config) * entry.rate_factor
        decays = config.decay_norms or entry.decays or entry.parameter.ndim > 1
        weight_decay = config.weight_decay / entry.rate_factor if decays else 0.0
        group = groups.setdefault((lr, weight_decay), ParameterGroup({}, lr, weight_decay))
        group.parameters[entry.name] = entry.parameter
    return list(groups.values())


def rate_of(entry: TrainedParameter, config: OptimizerConfig) -> float:
    """Returns the peak learning rate that the section has for a parameter."""
    return config.lr if config.other_lr is None or not entry.is_other else config.other_lr


def with_width_factors(
    entries: list[TrainedParameter],
    model: TrainedModel,
    method: MethodConfig,
    config: OptimizerConfig,
) -> list[TrainedParameter]:
    """Returns the parameters with the factors that `tuned_hidden_size` asks for, and logs them.

    So that a step changes the outputs of each layer, relative to its inputs, as much as at the
    tuned width: (tuned / hidden size)^e, with e = 1 for the head and `width_exponent` for matrices
    in blocks, as in muP (Yang et al. 2022, arXiv 2203.03466, table 3).
    """
    hidden_size, tuned_size = model.hidden_size(), config.tuned_hidden_size
    if tuned_size is None:
        return entries
    # By `methods.optimizer_problems`.
    assert hidden_size is not None
    assert config.width_exponent is not None
    matrices, of_method = config.width_exponent, method.width_exponent(config.width_exponent)
    assert of_method is not None

    def kind_and_exponent(entry: TrainedParameter) -> tuple[str, float]:
        if not entry.is_other:
            return "layers", of_method
        if entry.is_head:
            return "head", 1.0
        is_matrix = entry.is_in_block and entry.parameter.ndim > 1 and entry.input_dim == 1
        return ("other layers", matrices) if is_matrix else ("embedding, norms", 0.0)

    scaled, rates = [], dict[str, str]()
    for entry in entries:
        kind, exponent = kind_and_exponent(entry)
        factor = (tuned_size / hidden_size) ** exponent
        scaled.append(entry._replace(rate_factor=factor))
        rates[kind] = f"{kind} {rate_of(entry, config) * factor:.3g} (x {factor:.3g})"
    sizes = f"hidden size {hidden_size}, tuned at {tuned_size}"
    logger.info("learning rates for %s: %s", sizes, ", ".join(rates.values()))
    return scaled
