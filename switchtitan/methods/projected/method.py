"""The base class of methods that train full weights from low-rank projections of gradients."""

from abc import abstractmethod
from typing import TypeVar

from switchtitan.contracts import LanguageModel, Method, OptimizerConfig, TrainingOptimizer
from switchtitan.methods.projected.optimizer import ProjectedOptimizer, UpdateRule
from switchtitan.methods.projected.weights import (
    ProjectedConfig,
    ProjectedWeight,
    build_projected_weight,
    targeted_weights,
)
from switchtitan.optim import AdamWConfig, adamw_for_others, require_adamw, trained_parameters

ProjectedSection = TypeVar("ProjectedSection", bound=ProjectedConfig)
"""The configuration class of a method with projected gradients."""


class ProjectedMethod(Method[ProjectedSection]):
    """Trains all weights; the optimizer state of the targeted ones is low-rank."""

    @abstractmethod
    def build_rule(
        self, adamw: AdamWConfig, weights: list[ProjectedWeight], compile_step: bool
    ) -> UpdateRule:
        """Returns the rule that updates the targeted weights."""

    def build_optimizer(
        self, model: LanguageModel, config: OptimizerConfig, compile_step: bool
    ) -> TrainingOptimizer:
        """Builds the optimizer of the rule and of all other parameters."""
        adamw = require_adamw(config)
        targeted = targeted_weights(model, self.config.targets)
        weights = [
            build_projected_weight(name, parameter, self.config.rank)
            for name, parameter in targeted.items()
        ]
        others = [p for p in trained_parameters(model, targeted) if p.is_other]
        dense = adamw_for_others(adamw, others, compile_step, self.seed)
        rule = self.build_rule(adamw, weights, compile_step)
        return ProjectedOptimizer(adamw, weights, rule, dense, self.config.update_interval)
