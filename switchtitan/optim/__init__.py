"""Optimizers and learning-rate schedules."""

from switchtitan.contracts import OptimizerConfig, TrainingOptimizer
from switchtitan.optim.adamw import AdamW
from switchtitan.optim.config import AdamWConfig, LRScheduleConfig
from switchtitan.optim.lr_schedule import build_lr_schedule
from switchtitan.registry import Component, Registry

OPTIMIZERS: Registry[OptimizerConfig, TrainingOptimizer] = Registry(
    "optimizer", {"adamw": Component(AdamWConfig, AdamW)}
)

__all__ = ["OPTIMIZERS", "AdamW", "AdamWConfig", "LRScheduleConfig", "build_lr_schedule"]
