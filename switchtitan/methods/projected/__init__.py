"""What methods share that train whole weights from projections of their gradients onto few dimensions."""

from switchtitan.methods.projected.collectives import PackedRows, sum_packed
from switchtitan.methods.projected.config import ProjectedConfig
from switchtitan.methods.projected.optimizer import ProjectedOptimizer, build_projected_optimizer
from switchtitan.methods.projected.weights import ProjectedWeight, project

__all__ = [
    "PackedRows",
    "ProjectedConfig",
    "ProjectedOptimizer",
    "ProjectedWeight",
    "build_projected_optimizer",
    "project",
    "sum_packed",
]
