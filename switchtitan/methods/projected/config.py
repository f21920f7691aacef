"""The keys that all methods share that project gradients."""

from typing import ClassVar

from pydantic import Field

from switchtitan.contracts import MethodConfig
from switchtitan.methods.lowrank.config import ADAPTED_LINEARS, Targets, check_rank


class ProjectedConfig(MethodConfig):
    """Which gradients are projected, onto how many dimensions, and for how long."""

    optimizers: ClassVar[frozenset[str] | None] = frozenset({"adamw"})
    rank: int = Field(ge=1)
    """Dimensions that gradients are projected onto, at least 1 and below the smaller dimension of every projected weight."""
    update_interval: int = Field(default=200, ge=1)
    """Steps for which a projection is kept before the next one; at least 1."""
    targets: Targets = ADAPTED_LINEARS
    """Local names of the linear layers whose weights' gradients are projected; by default all of attention and MLP. The other
    parameters train with plain AdamW."""

    def check_model(self, linear_shapes: dict[str, tuple[int, int]]) -> list[str]:
        """What is wrong between this section and a model's linear layers, qualified name -> (out, in)."""
        return check_rank(self.rank, self.targets, linear_shapes)
