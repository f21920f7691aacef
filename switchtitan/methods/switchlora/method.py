"""SwitchLoRA as a component."""

import logging

import torch
from torch import Tensor, nn

from switchtitan.config.section import Section
from switchtitan.contracts import TrainingOptimizer
from switchtitan.distributed.shards import local
from switchtitan.methods.lowrank import (
    LowRankLinear,
    low_rank_layer_for,
    low_rank_layers,
    merged_state_dict,
    replace_linears,
)
from switchtitan.methods.switchlora.candidates import Candidates, DrawnCandidates, StoredCandidates
from switchtitan.methods.switchlora.config import SwitchLoraConfig
from switchtitan.methods.switchlora.host_candidates import HostCandidates
from switchtitan.methods.switchlora.init import candidate_buffers, initial_factors
from switchtitan.methods.switchlora.optimizer import SwitchLoraOptimizer
from switchtitan.optim import OPTIMIZERS, AdamWConfig

logger = logging.getLogger(__name__)


class SwitchLora:
    """Low-rank factors whose vectors are exchanged with candidates all through training; a `contracts.Method`."""

    def __init__(self, config: SwitchLoraConfig, num_steps: int, seed: int) -> None:
        self._config = config
        self._num_steps = num_steps
        self._seed = seed

    def prepare_model(self, model: nn.Module) -> None:
        replace_linears(model, self._config.targets, self._build_layer)

    def build_optimizer(self, model: nn.Module, config: Section, compile_step: bool) -> TrainingOptimizer:
        assert isinstance(config, AdamWConfig)
        layers = low_rank_layers(model)
        factors = {id(factor) for layer in layers.values() for factor in (layer.lora_a, layer.lora_b)}
        dense_parameters = [
            (name, parameter)
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and id(parameter) not in factors
        ]
        # Not compiled: torch's fused kernel takes these few tensors in one pass already.
        dense = OPTIMIZERS.build(config, dense_parameters, local)
        if any(layer.weight.dtype == torch.bfloat16 for layer in layers.values()):
            logger.warning(
                "Frozen weights are bfloat16, and every switch rounds them anew: right in the mean, but each value walks at "
                "random; 500 steps that switch moved a layer by 6 % of its norm (docs/PERFORMANCE.md). [training] frozen_dtype "
                '= "float32" does not.'
            )
        return SwitchLoraOptimizer(
            self._config,
            config,
            layers,
            dense,
            self._num_steps,
            self._seed,
            compile_step,
            self._candidates_of(layers),
        )

    def merged_state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        return merged_state_dict(model)

    def _build_layer(self, linear: nn.Linear) -> LowRankLinear:
        return low_rank_layer_for(
            linear,
            self._config,
            initial_factors(self._config),
            candidate_buffers(self._config, linear.out_features, linear.in_features),
        )

    def _candidates_of(self, layers: dict[str, LowRankLinear]) -> Candidates:
        if self._config.candidates == "constant":
            return DrawnCandidates(self._config, layers, self._seed)
        if self._config.candidates_device == "host":
            return HostCandidates(list(layers.values()))
        return StoredCandidates(list(layers.values()))
