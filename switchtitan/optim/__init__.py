"""Optimizers and learning-rate schedules."""

from switchtitan.contracts import OptimizerConfig, TrainingOptimizer
from switchtitan.optim.adamw import AdamW, AdamWConfig
from switchtitan.optim.adamw8bit import AdamW8bitConfig, build_adamw8bit
from switchtitan.optim.muon import Muon8bitConfig, MuonConfig, build_muon
from switchtitan.optim.scale import ScaleConfig, build_scale
from switchtitan.optim.torch_optimizer import AdafactorConfig, SGDConfig, build_adafactor, build_sgd
from switchtitan.registry import Component, Registry

OPTIMIZERS: Registry[OptimizerConfig, TrainingOptimizer] = Registry(
    "optimizer",
    {
        "adafactor": Component(AdafactorConfig, build_adafactor),
        "adamw": Component(AdamWConfig, AdamW),
        "adamw8bit": Component(AdamW8bitConfig, build_adamw8bit),
        "muon": Component(MuonConfig, build_muon),
        "muon8bit": Component(Muon8bitConfig, build_muon),
        "scale": Component(ScaleConfig, build_scale),
        "sgd": Component(SGDConfig, build_sgd),
    },
)
"""A factory is called as factory(config, parameters, compile_step), with `TrainedParameter`s.
Muon and those of 8 bits compile; `adamw` is torch's fused kernel."""
