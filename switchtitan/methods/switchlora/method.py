"""The method SwitchLoRA: a model's layers, their initial values, and the optimizer."""

import logging
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from switchtitan.contracts import LanguageModel, OptimizerConfig, TrainingOptimizer
from switchtitan.distributed.initial import GeneratorFor
from switchtitan.distributed.random import generator_for
from switchtitan.methods.lowrank import LowRankLinear, LowRankMethod, balanced_bounds, lora_bounds
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
from switchtitan.methods.switchlora.factors import FactorMuon, Factors, VectorAdamW
from switchtitan.methods.switchlora.optimizer import SwitchLoraOptimizer
from switchtitan.methods.switchlora.plan import Plan
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
            layer.store_candidates(self._is_on_host)
        return layer

    @property
    def _is_on_host(self) -> bool:
        return self.config.candidates_device == "host"

    def build_optimizer(
        self, model: LanguageModel, config: OptimizerConfig, compile_step: bool
    ) -> TrainingOptimizer:
        layers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, SwitchLoraLinear)
        }
        of_layers = list(layers.values())
        num_candidates = np.array([layer.num_candidates for layer in of_layers])
        plan = Plan(self.config, self.num_steps, num_candidates)
        factors = Factors(layers)
        others = [p for p in self.trained_parameters(model) if p.is_other]
        rule: VectorAdamW | FactorMuon
        dense: TrainingOptimizer
        if isinstance(config, MuonConfig):
            rule = FactorMuon(config, factors, plan, model.compute_dtype, compile_step)
            # Layers that are not targets are matrices in blocks.
            dense = build_muon(config, others, compile_step, self.seed)
        else:
            adamw = require_adamw(config)
            rule = VectorAdamW(adamw, factors, plan, compile_step)
            dense = AdamW(adamw, others)
        self._warn(layers)
        rounding = StochasticRounding(layers, self.seed, compile_step)
        return SwitchLoraOptimizer(
            self.config, of_layers, plan, rule, dense, self._candidates_of(layers), rounding
        )

    def _candidates_of(self, layers: dict[str, SwitchLoraLinear]) -> Candidates:
        of_layers = list(layers.values())
        if self.config.candidates == "swap":
            return (HostCandidates if self._is_on_host else StoredCandidates)(of_layers)
        keys = [
            [generator_for(self.seed, f"{name}.{factor}").initial_seed() for factor in FACTORS]
            for name in layers
        ]
        bounds = [layer.bounds for layer in of_layers]
        return DrawnCandidates(
            of_layers, torch.tensor(keys), torch.tensor(bounds, dtype=torch.float32)
        )

    def _warn(self, layers: dict[str, SwitchLoraLinear]) -> None:
        if any(layer.weight.dtype == torch.bfloat16 for layer in layers.values()):
            logger.warning(
                "frozen weights are bfloat16: stochastic rounding is unbiased, but its error "
                "accumulates as a random walk (6 % of a layer's norm after 500 switching steps, "
                'see docs/PERFORMANCE.md); [training] frozen_dtype = "float32" avoids it'
            )
        name, layer = min(layers.items(), key=lambda pair: pair[1].num_candidates)
        spare = layer.num_candidates - self.config.rank
        per_step = self.config.rank / self.config.interval_in(self.num_steps)
        # Error diffusion requests no more than the next whole number. Not an error: ranks near the
        # smaller dimension of a layer would need very large intervals.
        if np.ceil(per_step * (1 - 1e-9)) > spare:
            key = "interval" if self.config.switches_per_vector is None else "switches_per_vector"
            logger.warning(
                "[method] %s = %g: %.3g switches of each factor's vectors are due in a step at the "
                "start, but %s has %d candidates for rank = %d, so at most %d are made there and "
                "the others are dropped; switch less often, or lower rank",
                key,
                getattr(self.config, key),
                per_step,
                name,
                layer.num_candidates,
                self.config.rank,
                spare,
            )
