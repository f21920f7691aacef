"""Norms of each layer's gradient and update, and how much of a frozen weight a step changed."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from switchtitan.distributed.shards import local, shard_group
from switchtitan.observability.reporter import Reporter
from switchtitan.training.step import Stepper

_GRADIENT, _UPDATE, _MERGED, _FROZEN = range(4)
"""Rows of sums: of gradients, of changes of trained and of frozen parameters, of frozen ones."""


class LayerNorms:
    """A `training.hooks.Hook` that reports norms of each layer in steps that are reported.

    - `gradient_norm/<layer>`: before clipping; the squares of all layers add up to that of
      `optimizer/grad_norm`.
    - `update_norm/<layer>`: of the change of its trained parameters, vectors switched in the step
      included.
    - `merged_share/<layer>`: norm of the change of its frozen weight divided by that of the weight:
      what a switch or a reset merged into it in the step.

    A layer is a module with parameters of its own. Such a step takes a copy of the local shards.
    Values stay on the device until all layers' are read at once.
    """

    def __init__(self, stepper: Stepper, reporter: Reporter) -> None:
        self._stepper = stepper
        self._reporter = reporter
        trains = [(_layer_of(name), p.requires_grad) for name, p in self._parameters()]
        self._layers = list(dict.fromkeys(layer for layer, _ in trains))
        self._trained = {layer for layer, is_trained in trains if is_trained}
        self._frozen = {layer for layer, is_trained in trains if not is_trained}
        self._sums: Tensor | None = None

    @contextmanager
    def around(self, step: int) -> Iterator[None]:
        """See `training.hooks.Hook`."""
        if not self._reporter.is_due(step):
            yield
            return
        before = {name: local(p).detach().clone() for name, p in self._parameters()}
        gradients: list[Tensor] = []
        self._stepper.on_gradients = lambda: gradients.append(self._summed(self._gradients()))
        try:
            yield
        finally:
            self._stepper.on_gradients = None
        self._sums = self._summed(self._changes(before)) + gradients[0]

    def is_due(self, step: int) -> bool:
        """See `training.hooks.Hook`."""
        return self._reporter.is_due(step)

    def after(self, step: int) -> None:
        """Reports the norms of the step just done."""
        sums, self._sums = self._sums, None
        if sums is None:  # the step was done by the process that a resumed run continues
            return
        # One transfer for all layers.
        norms = sums.sqrt_().T.tolist()
        values: dict[str, float] = {}
        for layer, (gradient, update, merged, frozen) in zip(self._layers, norms, strict=True):
            if layer in self._trained:
                values |= {f"gradient_norm/{layer}": gradient, f"update_norm/{layer}": update}
            if layer in self._frozen:
                values[f"merged_share/{layer}"] = merged / max(frozen, 1e-30)
        self._reporter.report(step, values)

    def _parameters(self) -> Iterator[tuple[str, Parameter]]:
        # Not kept: frozen weights may be replaced by gathered ones within a step.
        return self._stepper.model.named_parameters()

    def _gradients(self) -> Iterator[tuple[str, Parameter, int, Tensor]]:
        for name, parameter in self._parameters():
            if parameter.grad is not None:
                yield name, parameter, _GRADIENT, local(parameter.grad)

    def _changes(self, before: dict[str, Tensor]) -> Iterator[tuple[str, Parameter, int, Tensor]]:
        for name, parameter in self._parameters():
            own = local(parameter).detach()
            # In fp32: the change of a bf16 weight is a few of its units.
            change = own.to(torch.float32) - before[name].to(torch.float32)
            yield name, parameter, _UPDATE if parameter.requires_grad else _MERGED, change
            if not parameter.requires_grad:
                yield name, parameter, _FROZEN, own

    @torch.no_grad()
    def _summed(self, tensors: Iterable[tuple[str, Parameter, int, Tensor]]) -> Tensor:
        """Returns the squared norms over all shards, [4, layers]; one collective.

        Args:
            tensors: a parameter's name, itself, the row of its sum, and the local shard to measure.
        """
        columns = {layer: column for column, layer in enumerate(self._layers)}
        sharded = torch.zeros(4, len(columns), device=self._stepper.world.device)
        unsharded = torch.zeros_like(sharded)
        group = None
        for name, parameter, row, shard in tensors:
            own_group = shard_group(parameter)
            sums, group = (unsharded, group) if own_group is None else (sharded, own_group)
            norm = torch.linalg.vector_norm(shard, dtype=torch.float32)
            sums[row, columns[_layer_of(name)]] += norm * norm
        if group is not None and group.size() > 1:
            dist.all_reduce(sharded, group=group)
        return sharded + unsharded


def _layer_of(parameter_name: str) -> str:
    return parameter_name.rpartition(".")[0]
