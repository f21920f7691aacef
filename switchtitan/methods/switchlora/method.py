"""The method SwitchLoRA."""

import logging
from collections.abc import Mapping

import numpy as np
import torch

from switchtitan.contracts import LanguageModel, OptimizerConfig, TrainingOptimizer
from switchtitan.methods.lowrank import (
    InitialFactors,
    LayerBuffer,
    LowRankLinear,
    LowRankMethod,
    low_rank_layers,
)
from switchtitan.methods.switchlora.candidates import Candidates, DrawnCandidates, StoredCandidates
from switchtitan.methods.switchlora.config import SwitchLoraConfig
from switchtitan.methods.switchlora.factor_muon import FactorMuon
from switchtitan.methods.switchlora.factor_rule import FactorRule
from switchtitan.methods.switchlora.init import (
    candidate_buffers,
    initial_factors,
    num_candidates,
)
from switchtitan.methods.switchlora.optimizer import SwitchLoraOptimizer
from switchtitan.methods.switchlora.vector_adamw import VectorAdamW
from switchtitan.optim import adamw_for_others, require_adamw
from switchtitan.optim.muon import MuonConfig, build_muon

logger = logging.getLogger(__name__)


class SwitchLora(LowRankMethod[SwitchLoraConfig]):
    """Low-rank factors whose vectors are exchanged with candidates throughout training."""

    def initial_factors(self) -> InitialFactors:
        return initial_factors(self.config)

    def layer_buffers(self, out_features: int, in_features: int) -> dict[str, LayerBuffer]:
        return candidate_buffers(self.config, out_features, in_features)

    def build_optimizer(
        self, model: LanguageModel, config: OptimizerConfig, compile_step: bool
    ) -> TrainingOptimizer:
        layers = low_rank_layers(model)
        others = [p for p in self.trained_parameters(model) if p.is_other]
        rule: FactorRule
        dense: TrainingOptimizer
        if isinstance(config, MuonConfig):
            rule = FactorMuon(config, layers, model.compute_dtype, compile_step)
            # Layers that are not targets are matrices in blocks.
            dense = build_muon(config, others, compile_step, self.seed)
        else:
            adamw = require_adamw(config)
            rule = VectorAdamW(adamw, layers, compile_step)
            dense = adamw_for_others(adamw, others, compile_step, self.seed)
        if any(layer.weight.dtype == torch.bfloat16 for layer in layers.values()):
            logger.warning(
                "frozen weights are bfloat16: stochastic rounding is unbiased, but its error "
                "accumulates as a random walk (6 % of a layer's norm after 500 switching steps, "
                'see docs/PERFORMANCE.md); [training] frozen_dtype = "float32" avoids it'
            )
        if problem := dropped_switches(self.config, layers, self.num_steps):
            logger.warning(problem)
        return SwitchLoraOptimizer(
            self.config,
            layers,
            rule,
            dense,
            self.num_steps,
            self.seed,
            compile_step,
            self._candidates_of(layers),
        )

    def _candidates_of(self, layers: dict[str, LowRankLinear]) -> Candidates:
        if self.config.candidates == "constant":
            return DrawnCandidates(self.config, layers, self.seed)
        if self.config.candidates_device == "host":
            # Imported here: most runs store candidates on the device and never need it.
            from switchtitan.methods.switchlora.host_candidates import HostCandidates

            return HostCandidates(list(layers.values()))
        return StoredCandidates(list(layers.values()))


def dropped_switches(
    config: SwitchLoraConfig, layers: Mapping[str, LowRankLinear], num_steps: int
) -> str | None:
    """Returns a warning if a layer has too few unused candidates for the switches of a step.

    `SwitchCounts.limited` drops the others. Not an error: ranks near the smaller dimension of a
    layer would need very large intervals.

    Args:
        layers: by qualified name.
        num_steps: length of the run.
    """
    spare = {
        name: num_candidates(layer.out_features, layer.in_features) - config.rank
        for name, layer in layers.items()
    }
    name = min(spare, key=spare.__getitem__)
    per_step = config.rank / config.interval_in(num_steps)
    # Error diffusion requests no more than the next whole number.
    if np.ceil(per_step * (1 - 1e-9)) <= spare[name]:
        return None
    key, remedy = f"interval = {config.interval:g}", "increase it"
    if config.switches_per_vector is not None:
        key, remedy = f"switches_per_vector = {config.switches_per_vector:g}", "lower it"
    return (
        f"[method] {key}: {per_step:.3g} switches of each factor's vectors are due in a step at "
        f"the start, but {name} has {spare[name] + config.rank} candidates for rank = "
        f"{config.rank}, so at most {spare[name]} are made there and the others are dropped; "
        f"{remedy}, or lower rank"
    )
