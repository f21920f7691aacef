"""SwitchLoRA as a component."""

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

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
from switchtitan.methods.switchlora.init import candidate_buffers, initial_factors, is_candidates
from switchtitan.methods.switchlora.optimizer import SwitchLoraOptimizer
from switchtitan.optim import AdamW, require_adamw

logger = logging.getLogger(__name__)


class SwitchLora(LowRankMethod[SwitchLoraConfig]):
    """Low-rank factors whose vectors are exchanged with candidates all through training."""

    def initial_factors(self) -> InitialFactors:
        return initial_factors(self.config)

    def layer_buffers(self, out_features: int, in_features: int) -> dict[str, LayerBuffer]:
        return candidate_buffers(self.config, out_features, in_features)

    def build_optimizer(
        self, model: LanguageModel, config: OptimizerConfig, compile_step: bool
    ) -> TrainingOptimizer:
        adamw = require_adamw(config)
        layers = low_rank_layers(model)
        others = [p for p in self.trained_parameters(model) if p.is_other]
        # Not compiled: torch's fused kernel takes these few tensors in one pass already.
        dense = AdamW(adamw, others)
        if any(layer.weight.dtype == torch.bfloat16 for layer in layers.values()):
            logger.warning(
                "Frozen weights are bfloat16, and every switch rounds them anew: right in the mean, but each value walks at "
                "random; 500 steps that switch moved a layer by 6 % of its norm (docs/PERFORMANCE.md). [training] frozen_dtype "
                '= "float32" does not.'
            )
        return SwitchLoraOptimizer(
            self.config,
            adamw,
            layers,
            dense,
            self.num_steps,
            self.seed,
            compile_step,
            self._candidates_of(layers),
        )

    def dense_weights(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As for other low-rank methods; candidates are no part of a dense model."""
        return super().dense_weights(
            {name: tensor for name, tensor in tensors.items() if not is_candidates(name)}
        )

    def _candidates_of(self, layers: dict[str, LowRankLinear]) -> Candidates:
        if self.config.candidates == "constant":
            return DrawnCandidates(self.config, layers, self.seed)
        if self.config.candidates_device == "host":
            # Imported here: most runs keep their candidates on the device and do not need the module.
            from switchtitan.methods.switchlora.host_candidates import HostCandidates

            return HostCandidates(list(layers.values()))
        return StoredCandidates(list(layers.values()))
