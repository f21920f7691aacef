"""The optimizer of SwitchLoRA: switches, resets, freezes, then updates, on local shards."""

import zlib
from itertools import product

import numpy as np
import torch
from torch import Tensor

from switchtitan.contracts import TrainingOptimizer, replicated_values
from switchtitan.distributed.row_exchange import RowExchange, RowRequest
from switchtitan.distributed.shards import ShardedRows, shard_group, write_rows_
from switchtitan.methods.lowrank import LowRankLinear
from switchtitan.methods.lowrank.rounding import StochasticRounding
from switchtitan.methods.switchlora.candidates import Candidates, StoredCandidates
from switchtitan.methods.switchlora.config import SwitchLoraConfig
from switchtitan.methods.switchlora.factor_rule import FactorRule, HasSecondMoments
from switchtitan.methods.switchlora.init import num_candidates
from switchtitan.methods.switchlora.order import LeastMovingOrder, RingOrder, SwitchOrder
from switchtitan.methods.switchlora.schedule import (
    FACTOR_A,
    FACTOR_B,
    FACTORS,
    LayerSwitch,
    SwitchCounts,
    SwitchSchedule,
    VectorSpan,
)
from switchtitan.methods.switchlora.switch import (
    FreezeTimers,
    fold_into_weight_,
    squared_norm_ratios,
)
from switchtitan.regions import region


class SwitchLoraOptimizer:
    """SwitchLoRA (arXiv 2406.06564, Algorithm 2) for all layers; a `contracts.TrainingOptimizer`.

    Neither a torch optimizer nor a hook of one: torch's checkpointing steps an optimizer to create
    its state, and a switch must not happen then.

    Args:
        layers: the low-rank layers, by qualified name.
        rule: trains the factors of `layers`.
        dense: trains all other parameters.
        num_steps: length of the run, which sets the switching schedule.
        seed: the job's seed, from which the rounding of bf16 weights follows.
        candidates: of `layers`; by default the ones in their buffers.
    """

    def __init__(
        self,
        config: SwitchLoraConfig,
        layers: dict[str, LowRankLinear],
        rule: FactorRule,
        dense: TrainingOptimizer,
        num_steps: int,
        seed: int,
        compile_step: bool,
        candidates: Candidates | None = None,
    ) -> None:
        self._config = config
        self._layers = list(layers.values())
        self._factors = [
            (ShardedRows(layer.lora_a), ShardedRows(layer.lora_b)) for layer in self._layers
        ]
        self._weights = [ShardedRows(layer.weight) for layer in self._layers]
        self._rule = rule
        self._dense = dense
        self._candidates = StoredCandidates(self._layers) if candidates is None else candidates
        self._num_candidates = np.array(
            [num_candidates(layer.out_features, layer.in_features) for layer in self._layers]
        )
        self._schedule = SwitchSchedule(config, num_steps, len(layers))
        self._counts = SwitchCounts(len(layers), config.freeze_steps)
        factor = self._layers[0].lora_a
        self._timers = FreezeTimers(len(layers), config.rank, config.freeze_steps, factor.device)
        self._order: SwitchOrder = RingOrder(config.rank)
        if config.order == "least_moving":
            self._order = LeastMovingOrder(
                config, num_steps, len(layers), rule.momentum, factor.device
            )
        self._exchange = RowExchange(shard_group(factor), factor.device)
        self._rounding = StochasticRounding(layers, seed, compile_step)
        self._next: tuple[np.ndarray, list[LayerSwitch]] | None = None
        self._last_counts = np.zeros(len(layers), dtype=np.int64)
        self._last_frozen = np.zeros(len(layers), dtype=np.int64)

    def step(self) -> None:
        """Switches vectors, then updates all parameters from their gradients."""
        with region("switch"):
            self.switch()
        self.update()

    @torch.no_grad()
    def switch(self) -> None:
        """Exchanges vectors, resets and freezes counterparts, and plans the next switch.

        The first half of a step, with all the cost of switching.
        """
        counts, switches = self._plan() if self._next is None else self._next
        checksum = self._checksum(counts)
        still_frozen = self._counts.recent.sum(0)
        step = self._counts.step
        due = self._order.due(self._counts.num_switched)
        self._counts.advance(counts)
        self._last_counts = counts
        self._last_frozen = still_frozen + counts if self._config.freeze_steps else still_frozen
        ratios = self._exchange_vectors(switches, checksum, due)
        self._order.advance(step, self._counts.num_switched, switches)
        counterparts = [span for switch in switches for span in switch.counterparts()]
        self._reset_moments(switches, counterparts, ratios)
        self._timers.start(counterparts)
        self._next = self._plan()
        self._candidates.prefetch(self._next[1])

    @torch.no_grad()
    def update(self) -> None:
        """Updates all parameters that are not frozen. The second half of a step."""
        self._rule.step(self._timers.update_mask())
        self._timers.advance()
        self._dense.step()

    def _plan(self) -> tuple[np.ndarray, list[LayerSwitch]]:
        """Plans the next step's switches, as a pure function of the counts and the order so far.

        Returns:
            The number of vectors for each layer, [layers], and the switches of layers with any.
        """
        counts = self._counts.limited(
            self._schedule.requested(self._counts.step),
            self._config.rank,
            self._num_candidates,
            self._order.window,
        )
        return counts, [
            self._order.plan(
                layer,
                int(self._counts.num_switched[layer]),
                int(counts[layer]),
                int(self._num_candidates[layer]),
            )
            for layer in np.flatnonzero(counts).tolist()
        ]

    def _exchange_vectors(
        self, switches: list[LayerSwitch], checksum: int, due: np.ndarray
    ) -> Tensor | None:
        """Exchanges vectors for candidates, after the order of layers that are due was measured.

        The number of operations does not depend on the number of vectors: one fold into each
        layer's weight, and a few list operations for the rest.

        Returns:
            |new|^2 / |old|^2 of each vector, in the order of the counterparts, if it is needed.
        """
        factors = [rows for switch in switches for rows in self._factors[switch.layer]]
        # For both factors: the rows I switched in A, then the rows J switched in B.
        involved = [
            switch.vectors[FACTOR_A] + switch.vectors[FACTOR_B]
            for switch in switches
            for _ in FACTORS
        ]
        requests = [*map(RowRequest, factors, involved), *self._candidates.row_requests(switches)]
        if len(due):
            # One matrix [2 * layers, rank].
            table = self._rule.momentum_ratios().flatten(0, 1)
            requests.append(RowRequest(ShardedRows(table), (range(len(table)),)))
        gathered = self._exchange.gather(requests, checksum)
        if len(due):
            movement = gathered.pop().unflatten(0, (len(FACTORS), -1))
            self._order.measure(due, self._counts.step - 1, movement)
        if not switches:
            return None
        vectors = gathered[: len(factors)]
        incoming = self._candidates.take(switches, gathered[len(factors) :])
        outgoing = [
            rows.narrow(0, factor * switch.num_vectors, switch.num_vectors)
            for (switch, factor), rows in zip(product(switches, FACTORS), vectors, strict=True)
        ]
        self._candidates.put_back(switches, outgoing)
        is_rescaled = self._config.reset_moments == "rescaled"
        ratios = squared_norm_ratios(incoming, outgoing) if is_rescaled else None
        # In place: `outgoing` are views of `vectors` and now hold old - new.
        torch._foreach_sub_(outgoing, incoming)
        roundings = self._rounding.of_event(self._counts.step)
        for place, switch in enumerate(switches):
            weight, vectors_a, vectors_b = (
                self._weights[switch.layer],
                *vectors[2 * place : 2 * place + 2],
            )
            fold_into_weight_(
                weight.shard,
                vectors_a,
                vectors_b[:, weight.held.start : weight.held.stop],
                self._layers[switch.layer].scale,
                roundings[switch.layer],
            )
        write_rows_(factors, [spans for switch in switches for spans in switch.vectors], incoming)
        return ratios

    def _reset_moments(
        self, switches: list[LayerSwitch], counterparts: list[VectorSpan], ratios: Tensor | None
    ) -> None:
        if self._config.reset_moments == "counterpart":
            self._rule.reset(counterparts)
        elif self._config.reset_moments == "momentum":
            self._rule.reset_momentum(counterparts)
        elif self._config.reset_moments == "rescaled" and ratios is not None:
            assert isinstance(self._rule, HasSecondMoments), "the configuration is checked"
            self._rule.reset_momentum(counterparts)
            self._rule.rescale_second_moments(counterparts, ratios)
        elif self._config.reset_moments == "both":
            self._rule.reset(
                counterparts + [span for switch in switches for span in switch.switched()]
            )

    def zero_grad(self) -> None:
        self._rule.zero_grad()
        self._dense.zero_grad()

    def set_lr(self, lr_factor: float) -> None:
        self._rule.set_lr(lr_factor)
        self._dense.set_lr(lr_factor)

    def metrics(self) -> dict[str, float]:
        """Returns the dense optimizer's metrics, and those of switching over all layers.

        Vectors switched in the last step and in total, the fraction of vectors that were frozen,
        and the fraction of candidates used so far. All count both factors.
        """
        self._exchange.check()
        counts, rank = self._counts, self._config.rank
        seen = np.minimum(rank + counts.num_switched, self._num_candidates)
        return self._dense.metrics() | {
            "switch/vectors_switched": float(2 * self._last_counts.sum()),
            "switch/vectors_switched_total": float(2 * counts.num_switched.sum()),
            "switch/frozen_share": float(self._last_frozen.mean() / rank),
            "switch/candidate_coverage": float((seen / self._num_candidates).mean()),
        }

    def replicated(self) -> dict[str, Tensor]:
        """Returns a checksum of all plans so far, and the random keys; see
        `contracts.HoldsReplicated`."""
        values = {"plans": torch.tensor(self._exchange.history)} | self._order.state_dict()
        values |= self._rounding.replicated() | self._candidates.replicated()
        return replicated_values(self._dense) | {
            f"switch.{name}": tensor for name, tensor in values.items()
        }

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the state of the dense optimizer and of the rule, and the counts `switch.*`.

        Candidates still in flight are first written to the model's buffers.
        """
        self._exchange.check()
        self._candidates.flush()
        return (
            self._dense.state_dict()
            | self._rule.state_dict()
            | {
                "switch.step": torch.tensor(self._counts.step),
                "switch.num_switched": torch.from_numpy(self._counts.num_switched.copy()),
                "switch.recent": torch.from_numpy(self._counts.recent.copy()),
                "switch.freeze_steps_left": self._timers.steps_left,
            }
            | {f"switch.{name}": tensor for name, tensor in self._order.state_dict().items()}
        )

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._dense.load_state_dict(state)
        self._rule.load_state_dict(state)
        self._timers.steps_left.copy_(state["switch.freeze_steps_left"])
        self._counts.step = int(state["switch.step"])
        self._counts.num_switched = state["switch.num_switched"].cpu().numpy().copy()
        self._counts.recent = state["switch.recent"].cpu().numpy().copy()
        self._order.load_state_dict(
            {key.removeprefix("switch."): tensor for key, tensor in state.items()}
        )
        self._next = None
        self._candidates.discard()

    def _checksum(self, counts: np.ndarray) -> int:
        """Returns a checksum of a step's plan."""
        plan = np.concatenate([[self._counts.step], self._counts.num_switched, counts])
        return zlib.crc32(plan.tobytes(), self._order.checksum) & 0x7FFFFFFF
