"""Norms of each layer's gradient and update, and how much of a frozen weight a step changed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from switchtitan.distributed.shards import local, shard_group
from switchtitan.observability import Reporter
from switchtitan.training.step import Stepper


class _Norms(NamedTuple):
    """Squared norms of each layer, [layers] each; this rank's until `_summed`."""

    gradient: Tensor
    update: Tensor
    merged: Tensor
    """Of the change of frozen weights."""
    frozen: Tensor
    """Of frozen weights."""


class LayerNorms:
    """A `training.hooks.Hook` that reports norms of each layer in steps that are reported.

    - `gradient_norm/<layer>`: before clipping; the squares of all layers add up to that of
      `optimizer/grad_norm`.
    - `update_norm/<layer>`: of the change of its trained parameters, vectors switched in the step
      included.
    - `merged_share/<layer>`: norm of the change of its frozen weight divided by that of the weight:
      what a switch or a reset merged into it in the step.

    Such a step takes a copy of the local shards. Values stay on the device until all layers' are
    read at once.
    """

    def __init__(self, stepper: Stepper, reporter: Reporter) -> None:
        self._stepper = stepper
        self._reporter = reporter
        self._layers = _layers(stepper)
        self._gradients: Tensor | None = None
        self._norms: _Norms | None = None

    @contextmanager
    def around(self, step: int) -> Iterator[None]:
        """See `training.hooks.Hook`."""
        if not self._reporter.is_due(step):
            yield
            return
        before = {name: local(p).detach().clone() for name, p in self._parameters()}
        self._stepper.on_gradients = self._measure_gradients
        try:
            yield
        finally:
            self._stepper.on_gradients = None
        assert self._gradients is not None
        self._norms = _Norms(self._gradients, *self._changes(before))
        self._gradients = None

    def is_due(self, step: int) -> bool:
        """See `training.hooks.Hook`."""
        return self._reporter.is_due(step)

    def after(self, step: int) -> None:
        """Reports the norms of the step just done."""
        norms, self._norms = self._norms, None
        if norms is None:  # the step was done by the process that a resumed run continues
            return
        # One transfer for all layers.
        gradient, update, merged, frozen = torch.stack(norms).sqrt_().tolist()
        values = {}
        for index, layer in enumerate(self._layers):
            if self._layers[layer].is_trained:
                values[f"gradient_norm/{layer}"] = gradient[index]
                values[f"update_norm/{layer}"] = update[index]
            if self._layers[layer].has_frozen:
                values[f"merged_share/{layer}"] = merged[index] / max(frozen[index], 1e-30)
        self._reporter.report(step, values)

    def results(self) -> dict[str, float | None]:
        """See `training.hooks.Hook`."""
        return {}

    def _parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        # Not kept: frozen weights may be replaced by gathered ones within a step.
        return self._stepper.model.named_parameters()

    @torch.no_grad()
    def _measure_gradients(self) -> None:
        gradients = {name: local(p.grad) for name, p in self._parameters() if p.grad is not None}
        (self._gradients,) = self._sums([lambda name, own: gradients.get(name)])

    @torch.no_grad()
    def _changes(self, before: dict[str, Tensor]) -> list[Tensor]:
        is_trained = {name: p.requires_grad for name, p in self._parameters()}

        def change(name: str, own: Tensor) -> Tensor:
            # In fp32: the change of a bf16 weight is a few of its units.
            return own.to(torch.float32) - before[name].to(torch.float32)

        return self._sums(
            [
                lambda name, own: change(name, own) if is_trained[name] else None,
                lambda name, own: None if is_trained[name] else change(name, own),
                lambda name, own: None if is_trained[name] else own,
            ]
        )

    def _sums(self, kinds: "list[Callable[[str, Tensor], Tensor | None]]") -> list[Tensor]:
        """Returns the squared norms over all shards, [layers] each; one collective.

        Args:
            kinds: parameter's name, local shard -> what to take the norm of; None: nothing.
        """
        device = self._stepper.world.device
        places = {layer: index for index, layer in enumerate(self._layers)}
        sharded = torch.zeros(len(kinds), len(places), device=device)
        unsharded = torch.zeros_like(sharded)
        group = None
        for name, parameter in self._parameters():
            own_group = shard_group(parameter)
            sums, group = (unsharded, group) if own_group is None else (sharded, own_group)
            for kind, value_of in enumerate(kinds):
                value = value_of(name, local(parameter).detach())
                if value is not None:
                    norm = torch.linalg.vector_norm(value, dtype=torch.float32)
                    sums[kind, places[_layer_of(name)]] += norm * norm
        if group is not None and group.size() > 1:
            dist.all_reduce(sharded, group=group)
        return list(sharded + unsharded)


class _Layer(NamedTuple):
    is_trained: bool
    has_frozen: bool


def _layers(stepper: Stepper) -> dict[str, _Layer]:
    """Returns the modules that have parameters of their own, by qualified name."""
    layers: dict[str, _Layer] = {}
    for name, parameter in stepper.model.named_parameters():
        layer = layers.setdefault(_layer_of(name), _Layer(False, False))
        layers[_layer_of(name)] = _Layer(
            layer.is_trained or parameter.requires_grad,
            layer.has_frozen or not parameter.requires_grad,
        )
    return layers


def _layer_of(parameter_name: str) -> str:
    return parameter_name.rpartition(".")[0]
