"""The configuration keys of methods with factors, and of those with a frozen weight as well."""

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from switchtitan.contracts import MethodConfig

ADAPTED_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _check_targets(targets: tuple[str, ...]) -> tuple[str, ...]:
    if not targets or len(set(targets)) != len(targets):
        raise ValueError("name at least one layer, each once")
    return targets


class FactorConfig(MethodConfig):
    """The keys of all methods whose rank is below the dimensions of the layers that they adapt."""

    rank: int = Field(ge=1)
    """Number of vectors in each factor: at least 1, and below the smaller dimension of every
    adapted layer."""
    targets: Annotated[tuple[str, ...], AfterValidator(_check_targets)] = ADAPTED_LINEARS
    """Local names of the linear layers to adapt, at least one, each once; by default all of
    attention and MLP. All other parameters train as with full_rank."""

    def draws_in_forward(self) -> bool:
        """See `contracts.MethodConfig`."""
        return False

    def check_model(self, linear_shapes: dict[str, tuple[int, int]]) -> list[str]:
        """See `contracts.MethodConfig`."""
        problems = []
        local_names = {name.rpartition(".")[2] for name in linear_shapes}
        if unknown := [target for target in self.targets if target not in local_names]:
            problems.append(
                f"[method] targets = {list(self.targets)}: the model has no linear layer called "
                f"{', '.join(map(repr, unknown))}; it has {', '.join(sorted(local_names))}"
            )
        adapted = [name for name in linear_shapes if name.rpartition(".")[2] in self.targets]
        smallest = min(adapted, key=lambda name: min(linear_shapes[name]), default=None)
        if smallest is not None and self.rank >= min(linear_shapes[smallest]):
            problems.append(
                f"[method] rank = {self.rank}: expected less than the smaller dimension of every "
                f"adapted layer; {smallest} is {list(linear_shapes[smallest])}, so use a rank of "
                f"at most {min(linear_shapes[smallest]) - 1}"
            )
        return problems


class LowRankConfig(FactorConfig):
    """The keys of methods with factors and a frozen weight."""

    freezes_weights: ClassVar[bool] = True
    resumable_keys: ClassVar[frozenset[str]] = frozenset({"contraction"})
    alpha: float = Field(default=1.0, gt=0)
    """The low-rank update is scaled by alpha / rank; above 0."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout probability, in [0, 1), for the input of the low-rank update."""
    contraction: Literal["cheapest", "factored", "merged", "dense_gradient"] = "cheapest"
    """How a layer is computed; all agree to rounding. `cheapest` chooses the one with the fewest
    operations for each layer's shape, rank and number of tokens. With dropout, training is always
    factored."""

    @property
    def scale(self) -> float:
        """s in W + s B A."""
        return self.alpha / self.rank

    def without_effect(self) -> list[str]:
        """See `registry.Section`."""
        if not self.dropout or self.contraction == "cheapest":
            return []
        return [
            f"contraction = {self.contraction!r} has no effect on training with dropout = "
            f"{self.dropout:g}, which is always factored"
        ]

    def draws_in_forward(self) -> bool:
        """See `contracts.MethodConfig`."""
        return self.dropout > 0
