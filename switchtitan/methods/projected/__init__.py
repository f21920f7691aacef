"""Shared code of methods that train full weights from low-rank projections of their gradients."""

from switchtitan.methods.projected.directions import AdamDirections, direction_
from switchtitan.methods.projected.limiter import TINY_NORM, NormGrowthLimiter
from switchtitan.methods.projected.method import ProjectedMethod
from switchtitan.methods.projected.optimizer import PackedRows, ProjectedOptimizer
from switchtitan.methods.projected.singular_bases import refresh_bases_
from switchtitan.methods.projected.weights import (
    ProjectedConfig,
    ProjectedWeight,
    is_right,
    project,
)

__all__ = [
    "TINY_NORM",
    "AdamDirections",
    "NormGrowthLimiter",
    "PackedRows",
    "ProjectedConfig",
    "ProjectedMethod",
    "ProjectedOptimizer",
    "ProjectedWeight",
    "direction_",
    "is_right",
    "project",
    "refresh_bases_",
]
