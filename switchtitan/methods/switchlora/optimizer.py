"""The optimizer of SwitchLoRA: switches, resets, freezes, then updates, on each rank's shards."""

import zlib

import numpy as np
import torch
from torch import Tensor

from switchtitan.contracts import TrainingOptimizer
from switchtitan.distributed.shards import (
    RowExchange,
    RowRequest,
    copy_all_,
    local,
    shard_group,
    write_rows_,
)
from switchtitan.methods.lowrank import LowRankLinear
from switchtitan.methods.switchlora.adamw import VectorAdamW
from switchtitan.methods.switchlora.config import SwitchLoraConfig
from switchtitan.methods.switchlora.freeze import SIDE_A, SIDE_B, FreezeTimers, VectorRun
from switchtitan.methods.switchlora.schedule import (
    LayerSwitch,
    SwitchCounts,
    SwitchSchedule,
    plan_layer_switch,
)
from switchtitan.methods.switchlora.switch import (
    column_views,
    fold_into_weight_,
    split_columns,
    take_columns,
)
from switchtitan.optim import AdamWConfig


class SwitchLoraOptimizer:
    """One step of SwitchLoRA (arXiv 2406.06564, Algorithm 2) for all layers; a `contracts.TrainingOptimizer`.

    Not a torch optimizer, and no hook of one: torch's checkpointing steps optimizers by itself to create their state, and a
    switch must not happen then.

    Args:
        layers: those that switch, by qualified name, with `candidates_a` and `candidates_b`.
        dense: trains everything else.
        num_steps: length of the run, which the switching schedule is stretched over.
    """

    def __init__(
        self,
        config: SwitchLoraConfig,
        adamw: AdamWConfig,
        layers: dict[str, LowRankLinear],
        dense: TrainingOptimizer,
        num_steps: int,
        compile_step: bool,
    ) -> None:
        self._config = config
        self._layers = list(layers.values())
        self._dense = dense
        self._vectors = VectorAdamW(adamw, layers, compile_step)
        self._candidates_a = [layer.get_buffer("candidates_a") for layer in self._layers]
        self._candidates_b = [layer.get_buffer("candidates_b") for layer in self._layers]
        self._num_candidates = np.array([len(candidates) for candidates in self._candidates_a])
        self._schedule = SwitchSchedule(config, num_steps, len(layers))
        self._counts = SwitchCounts(len(layers), config.freeze_steps)
        factor = self._layers[0].lora_a
        self._timers = FreezeTimers(len(layers), config.rank, config.freeze_steps, factor.device)
        self._exchange = RowExchange(shard_group(factor), factor.device)
        self._last_counts = np.zeros(len(layers), dtype=np.int64)
        self._last_frozen = np.zeros(len(layers), dtype=np.int64)

    @torch.no_grad()
    def step(self) -> None:
        """Switches what is due, then updates all parameters from their gradients."""
        switched_before, step = self._counts.num_switched.copy(), self._counts.step
        still_frozen = self._counts.recent.sum(0)
        counts = self._counts.advance(self._schedule.requested(step), self._config.rank, self._num_candidates)
        self._last_counts = counts
        self._last_frozen = still_frozen + counts if self._config.freeze_steps else still_frozen
        switches = {
            layer: plan_layer_switch(
                int(switched_before[layer]),
                int(counts[layer]),
                self._config.rank,
                int(self._num_candidates[layer]),
            )
            for layer in np.flatnonzero(counts).tolist()
        }
        self._switch_(switches, checksum=_checksum(step, switched_before, counts))
        counterparts = _counterparts(switches)
        self._vectors.reset_(counterparts)
        self._timers.start_(counterparts)
        self._vectors.step(self._timers.moving())
        self._timers.advance_()
        self._dense.step()

    def _switch_(self, switches: dict[int, LayerSwitch], checksum: int) -> None:
        layers = [self._layers[index] for index in switches]
        all_candidates_a = [self._candidates_a[index] for index in switches]
        all_candidates_b = [self._candidates_b[index] for index in switches]
        plans = list(switches.values())
        requests = [
            request
            for layer, candidates_a, plan in zip(layers, all_candidates_a, plans, strict=True)
            for request in (
                RowRequest(layer.lora_a, plan.rows),
                RowRequest(candidates_a, plan.slots_in),
                RowRequest(layer.lora_a, plan.columns),
            )
        ]
        rows = self._exchange.gather(requests, checksum)
        rows_out, rows_in, counterparts_a = rows[0::3], rows[1::3], rows[2::3]
        columns_to: list[Tensor] = []
        columns_from: list[Tensor] = []
        for index, (layer, plan) in enumerate(zip(layers, plans, strict=True)):
            lora_b, candidates_b = local(layer.lora_b), local(all_candidates_b[index])
            columns_out = take_columns(lora_b, plan.columns)
            columns_in = take_columns(candidates_b, plan.slots_in)
            fold_into_weight_(
                local(layer.weight),
                counterparts_a[index],
                take_columns(lora_b, plan.rows),
                rows_out[index] - rows_in[index],
                columns_out - columns_in,
                layer.scale,
            )
            columns_to += column_views(candidates_b, plan.slots_out) + column_views(lora_b, plan.columns)
            columns_from += split_columns(columns_out, plan.slots_out) + split_columns(
                columns_in, plan.columns
            )
        copy_all_(columns_to, columns_from)
        write_rows_(
            all_candidates_a + [layer.lora_a for layer in layers],
            [plan.slots_out for plan in plans] + [plan.rows for plan in plans],
            rows_out + rows_in,
        )

    def zero_grad(self) -> None:
        self._vectors.zero_grad()
        self._dense.zero_grad()

    def set_lr(self, lr_factor: float) -> None:
        self._vectors.set_lr(lr_factor)
        self._dense.set_lr(lr_factor)

    def metrics(self) -> dict[str, float]:
        """Vectors switched in the last step and so far, the share of vectors that stood still, and the share of candidates that
        have been in use; both sides, all layers."""
        self._exchange.check()
        counts, rank = self._counts, self._config.rank
        seen = np.minimum(rank + counts.num_switched, self._num_candidates)
        return self._dense.metrics() | {
            "switch/vectors_switched": float(2 * self._last_counts.sum()),
            "switch/vectors_switched_total": float(2 * counts.num_switched.sum()),
            "switch/frozen_share": float(self._last_frozen.mean() / rank),
            "switch/candidate_coverage": float((seen / self._num_candidates).mean()),
        }

    def state_dict(self) -> dict[str, Tensor]:
        """The dense optimizer's, the factors' moments, and `switch.*`: the counts that switching and freezing follow from."""
        self._exchange.check()
        return (
            self._dense.state_dict()
            | self._vectors.state_dict()
            | {
                "switch.step": torch.tensor(self._counts.step),
                "switch.num_switched": torch.from_numpy(self._counts.num_switched.copy()),
                "switch.recent": torch.from_numpy(self._counts.recent.copy()),
                "switch.vector_steps": self._vectors.num_steps,
                "switch.freeze_steps_left": self._timers.steps_left,
            }
        )

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._dense.load_state_dict(state)
        for key, tensor in self._vectors.state_dict().items():
            tensor.copy_(state[key])
        self._vectors.num_steps.copy_(state["switch.vector_steps"])
        self._timers.steps_left.copy_(state["switch.freeze_steps_left"])
        self._counts.step = int(state["switch.step"])
        self._counts.num_switched = state["switch.num_switched"].cpu().numpy().copy()
        self._counts.recent = state["switch.recent"].cpu().numpy().copy()


def _counterparts(switches: dict[int, LayerSwitch]) -> list[VectorRun]:
    """B's columns beside the switched rows of A, and A's rows beside the switched columns of B."""
    return [
        VectorRun(side, layer, run)
        for layer, plan in switches.items()
        for side, runs in ((SIDE_B, plan.rows), (SIDE_A, plan.columns))
        for run in runs
    ]


def _checksum(step: int, num_switched: np.ndarray, counts: np.ndarray) -> int:
    return zlib.crc32(np.concatenate([[step], num_switched, counts]).tobytes()) & 0x7FFFFFFF
