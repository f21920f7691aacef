"""What methods share that train whole weights from projections of their gradients onto few dimensions."""

from switchtitan.methods.projected.optimizer import (
    PackedRows,
    ProjectedOptimizer,
    build_projected_optimizer,
    sum_packed,
)
from switchtitan.methods.projected.weights import ProjectedConfig, ProjectedWeight, project

__all__ = [
    "PackedRows",
    "ProjectedConfig",
    "ProjectedOptimizer",
    "ProjectedWeight",
    "build_projected_optimizer",
    "project",
    "sum_packed",
]
