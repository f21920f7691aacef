"""The method SwitchLoRA: a model's layers, their initial values, and the optimizer."""

import logging
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from switchtitan.contracts import LanguageModel, OptimizerConfig, TrainingOptimizer
from switchtitan.distributed.initial import GeneratorFor
from switchtitan.distributed.random import generator_for
from switchtitan.methods.lowrank import (
    LowRankLinear,
    LowRankMethod,
    balanced_bounds,
    lora_bounds,
    low_rank_layers,
)
from switchtitan.methods.lowrank.linear import FACTORS
from switchtitan.methods.lowrank.rounding import StochasticRounding
from switchtitan.methods.switchlora.candidates import (
    BUFFERS,
    Candidates,
    DrawnCandidates,
    HostCandidates,
    StoredCandidates,
)
from switchtitan.methods.switchlora.config import SwitchLoraConfig
from switchtitan.methods.switchlora.optimizer import SwitchLoraOptimizer
from switchtitan.methods.switchlora.plan import Plan
from switchtitan.methods.switchlora.update import FactorMuon, Factors, VectorAdamW
from switchtitan.optim import AdamW, require_adamw
from switchtitan.optim.muon import MuonConfig, build_muon

logger = logging.getLogger(__name__)


class SwitchLoraLinear(LowRankLinear):
    """A `LowRankLinear` whose vectors are switched.

    Candidates are random vectors, as many for each factor as the smaller dimension of the weight. A
    and B start as copies of some. With stored candidates, all are in the buffers `candidates_a` [c,
    in] and `candidates_b` [c, out], sharded like the factors.
    """

    def store_candidates(self, on_host: bool) -> None:
        """Adds the buffers; `on_host`: they stay in host memory."""
        self.sharded_buffers, self.host_buffers = BUFFERS, BUFFERS if on_host else ()
        for name, width in zip(BUFFERS, (self.in_features, self.out_features), strict=True):
            self.register_buffer(name, torch.empty(self.num_candidates, width))

    @property
    def num_candidates(self) -> int:
        return min(self.out_features, self.in_features)

    def initial_slots(self) -> tuple[Tensor, Tensor]:
        """Returns the candidates that the vectors of A and B are copies of, [rank] each: the last
        ones of the ring, with B's rotated by half a rank."""
        slots = self.num_candidates - self.rank + torch.arange(self.rank)
        return slots, slots.roll(self.rank // 2)

    def initial_tensors(
        self,
        weight: Tensor,
        generator_for: GeneratorFor,
        rows: Mapping[str, range] | None = None,
    ) -> dict[str, Tensor]:
        """See `contracts.Reparametrized`."""
        tensors = super().initial_tensors(weight, generator_for, rows)
        for name, factor in zip(self.sharded_buffers, FACTORS, strict=False):
            held = rows[name] if rows is not None else range(self.num_candidates)
            slots = torch.arange(held.start, held.stop)
            tensors[name] = self.draw(factor, slots, generator_for)
        return tensors


class SwitchLora(LowRankMethod[SwitchLoraConfig]):
    """Low-rank factors whose vectors are exchanged with candidates throughout training."""

    def bounds(self, out_features: int, in_features: int) -> tuple[float, float]:
        """Returns the bounds of A's and B's candidates."""
        of_init = balanced_bounds if self.config.init == "switchlora" else lora_bounds
        return of_init(out_features, in_features, self.config.rank)

    def build_layer(self, name: str, linear: nn.Linear) -> SwitchLoraLinear:
        layer = self.new_layer(SwitchLoraLinear, name, linear)
        if self.config.candidates == "swap":
            layer.store_candidates(on_host=self.config.candidates_device == "host")
        return layer

    def build_optimizer(
        self, model: LanguageModel, config: OptimizerConfig, compile_step: bool
    ) -> TrainingOptimizer:
        layers = low_rank_layers(model)
        num_candidates = np.array([min(layer.plain_shape) for layer in layers.values()])
        self._warn(layers, num_candidates.min())
        plan = Plan(self.config, self.num_steps, num_candidates)
        factors = Factors(layers, model.compute_dtype)
        others = [p for p in self.trained_parameters(model) if p.is_other]
        rule: VectorAdamW | FactorMuon
        dense: TrainingOptimizer
        if isinstance(config, MuonConfig):
            rule = FactorMuon(config, factors, plan, compile_step)
            # Layers that are not targets are matrices in blocks.
            dense = build_muon(config, others, compile_step, self.seed)
        else:
            rule = VectorAdamW(require_adamw(config), factors, plan, compile_step)
            dense = AdamW(require_adamw(config), others)
        return SwitchLoraOptimizer(
            self.config,
            list(layers.values()),
            plan,
            rule,
            dense,
            self._candidates_of(layers),
            StochasticRounding(layers, self.seed, compile_step),
        )

    def _candidates_of(self, layers: Mapping[str, LowRankLinear]) -> Candidates:
        of_layers = list(layers.values())
        if self.config.candidates == "swap":
            is_on_host = self.config.candidates_device == "host"
            return (HostCandidates if is_on_host else StoredCandidates)(of_layers)
        keys = [
            [generator_for(self.seed, f"{name}.{factor}").initial_seed() for factor in FACTORS]
            for name in layers
        ]
        bounds = torch.tensor([layer.bounds for layer in of_layers], dtype=torch.float32)
        return DrawnCandidates(of_layers, torch.tensor(keys), bounds)

    def _warn(self, layers: Mapping[str, LowRankLinear], num_candidates: int) -> None:
        if any(layer.weight.dtype == torch.bfloat16 for layer in layers.values()):
            logger.warning(
                "frozen weights are bfloat16: stochastic rounding is unbiased, but its error "
                "accumulates as a random walk (6 % of a layer's norm after 500 switching steps, "
                'see docs/PERFORMANCE.md); [training] frozen_dtype = "float32" avoids it'
            )
        rank = self.config.rank
        num_due = rank / self.config.interval_in(self.num_steps)
        # Not an error: ranks near the smaller dimension of a layer need very large intervals.
        if num_due * (1 - 1e-9) > num_candidates - rank:
            logger.warning(
                f"[method] {self.config.frequency()}: {num_due:.3g} switches of each factor's "
                "vectors are due in a step at the start, but the smallest layer has "
                f"{num_candidates} candidates for rank = {rank}, so some are dropped; switch less "
                "often, or lower rank"
            )
