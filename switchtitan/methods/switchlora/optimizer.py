"""The optimizer of SwitchLoRA: switches, resets and freezes, then updates, on local shards."""

import zlib
from collections.abc import Sequence
from itertools import product

import numpy as np
import torch
from torch import Tensor

from switchtitan.contracts import TrainingOptimizer
from switchtitan.distributed.rows import RowExchange, RowRequest
from switchtitan.distributed.shards import ShardedRows, shard_group, write_rows_
from switchtitan.methods.lowrank import LowRankLinear
from switchtitan.methods.lowrank.rounding import StochasticRounding
from switchtitan.methods.switchlora.candidates import Candidates
from switchtitan.methods.switchlora.config import SwitchLoraConfig
from switchtitan.methods.switchlora.plan import FACTORS, Plan, Switch
from switchtitan.methods.switchlora.update import FactorMuon, VectorAdamW
from switchtitan.optim.base import SplitOptimizer
from switchtitan.regions import region


class SwitchLoraOptimizer(SplitOptimizer):
    """SwitchLoRA (arXiv 2406.06564, Algorithm 2) for all layers.

    Neither a torch optimizer nor a hook of one: torch's checkpointing steps an optimizer to create
    its state, and a switch must not happen then.

    Args:
        layers: the low-rank layers, in the order of `plan`.
        rule: trains the factors of `layers`.
        dense: trains all other parameters.
        rounding: of the layers' weights.
    """

    def __init__(
        self,
        config: SwitchLoraConfig,
        layers: Sequence[LowRankLinear],
        plan: Plan,
        rule: VectorAdamW | FactorMuon,
        dense: TrainingOptimizer,
        candidates: Candidates,
        rounding: StochasticRounding,
    ) -> None:
        super().__init__([dense, rule])
        self._config, self._plan, self._rule = config, plan, rule
        self._candidates, self._rounding = candidates, rounding
        self._scales = [layer.scale for layer in layers]
        self._factors = [(ShardedRows(layer.lora_a), ShardedRows(layer.lora_b)) for layer in layers]
        self._weights = [ShardedRows(layer.weight) for layer in layers]
        factor = layers[0].lora_a
        self._exchange = RowExchange(shard_group(factor), factor.dtype, factor.device)
        self._last: list[Switch] = []

    def step(self) -> None:
        """Switches vectors, then updates all parameters from their gradients."""
        with region("switch"):
            self.switch()
        self.update()

    @torch.no_grad()
    def switch(self) -> None:
        """Exchanges vectors for candidates, and resets and freezes their counterparts.

        The first half of a step. It takes one fold into each layer's weight, and a few list
        operations for the rest, for any number of vectors.
        """
        switches = self._last = self._plan.next()
        factors = [rows for switch in switches for rows in self._factors[switch.layer]]
        # For both factors: the rows I switched in A, then the rows J switched in B.
        involved = [sum(switch.vectors, ()) for switch in switches for _ in FACTORS]
        requests = [*map(RowRequest, factors, involved), *self._candidates.row_requests(switches)]
        counts = [(switch.layer, switch.num_vectors) for switch in switches]
        checked = [self._plan.step, *self._plan.num_switched.tolist(), *counts]
        gathered = self._exchange.gather(requests, zlib.crc32(repr(checked).encode()))
        self._plan.advance(switches)
        if not switches:
            return
        vectors = gathered[: len(factors)]
        incoming = self._candidates.take(switches, gathered[len(factors) :])
        outgoing = [
            rows.narrow(0, factor * switch.num_vectors, switch.num_vectors)
            for (switch, factor), rows in zip(product(switches, FACTORS), vectors, strict=True)
        ]
        self._candidates.put_back(switches, outgoing)
        # In place: `outgoing` are views of `vectors`, and now hold old - new.
        torch._foreach_sub_(outgoing, incoming)
        self._fold(switches, vectors)
        write_rows_(factors, [spans for switch in switches for spans in switch.vectors], incoming)
        self._rule.reset(self._plan.resets(), self._config.reset_moments == "momentum")

    def _fold(self, switches: list[Switch], vectors: list[Tensor]) -> None:
        """Folds each switch into the frozen weight, so that the layer's output does not change.

        Keeps W + s B A constant: W += s (B[:, I] (A_old - A_new)[I] + (B_old - B_new)[:, J] A[J]),
        one update of rank 2k for vectors I of A and J of B, which are disjoint (Algorithm 1).

        Args:
            vectors: for each switch [2k, in] and [2k, out]: A_old - A_new in rows I, then A's rows
                J; B's rows I, then B_old - B_new in rows J.
        """
        add = self._rounding.of_event(self._plan.step)
        for switch, of_a, of_b in zip(switches, vectors[::2], vectors[1::2], strict=True):
            layer, weight = switch.layer, self._weights[switch.layer]
            own_rows = of_b[:, weight.held.start : weight.held.stop].t()
            add[layer](weight.shard, own_rows, of_a, self._scales[layer])

    def update(self) -> None:
        """Updates all parameters that are not frozen. The second half of a step."""
        super().step()

    def metrics(self) -> dict[str, float]:
        """Returns learning rates, and over all layers and both factors: the vectors switched in
        the last step and in total, the shares of frozen vectors and of candidates used so far."""
        self._exchange.check()
        plan = self._plan
        seen = np.minimum(self._config.rank + plan.num_switched, plan.num_candidates)
        return super().metrics() | {
            "switch/vectors_switched": float(2 * sum(switch.num_vectors for switch in self._last)),
            "switch/vectors_switched_total": float(2 * plan.num_switched.sum()),
            "switch/frozen_share": float(plan.is_frozen().mean()),
            "switch/candidate_coverage": float((seen / plan.num_candidates).mean()),
        }

    def replicated(self) -> dict[str, Tensor]:
        """Returns the plan's history, and the random keys."""
        keys = self._rounding.replicated() | self._candidates.replicated()
        return super().replicated() | self._plan.state_dict() | keys

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the state of the dense optimizer, of the rule and of the plan.

        Candidates still in flight are first written to the model's buffers.
        """
        self._exchange.check()
        self._candidates.flush()
        return super().state_dict() | self._plan.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        super().load_state_dict(state)
        self._plan.load_state_dict(state)
