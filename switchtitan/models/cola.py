"""CoLA (arXiv 2502.10940): LLaMA whose linear layers are B silu(A x)."""

from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor, nn
from typing_extensions import Self

from switchtitan.models.llama.config import MAX_WIDTH, LlamaFamilyConfig
from switchtitan.models.llama.model import Llama

MEAN_SQUARES = {"silu": 0.3557755, "none": 1.0}
"""Mean of f(z)^2 for z of the standard normal distribution, for each function f."""


class ColaConfig(LlamaFamilyConfig):
    """CoLA (arXiv 2502.10940): LLaMA in which every linear layer of the blocks is B silu(A x), a
    bottleneck of `rank` features. It is a model and not a method, because no dense weight computes
    the same. Train it with `[method] name = "full_rank"`, which trains the factors. It can be
    evaluated and generate text. It cannot be exported, and has no `from_folder`: transformers has
    no class for it. The MLP keeps LLaMA's gate with its silu, as the authors' configurations of
    sizes 60m and 130m do; those of 350m, 1b and 7b leave that silu out. The initial values are
    ours: outputs start with the mean square of LLaMA's, for inputs of a normal distribution."""

    name: Literal["cola"] = "cola"
    """Name of the model."""
    rank: int = Field(ge=1, le=MAX_WIDTH)
    """Number of features between A and B: at least 1, and below the smaller dimension of every
    linear layer that they replace. The authors' scripts have 128 for size 60m, 256 for 130m and
    350m, 512 for 1b and 1024 for 7b."""
    activation: Literal["silu", "none"] = "silu"
    """Function between A and B. "none" is for comparisons: the products B A alone."""
    init_std: float = Field(0.02, gt=0)
    """Standard deviation of the normal distribution that initializes embedding and head, and that
    would initialize the linear layers that the factors replace."""

    @model_validator(mode="after")
    def _check_keys(self) -> Self:
        # There are at most as many features of keys as of queries.
        smallest = min(self.sizes.hidden_size, self.sizes.intermediate_size, self.kv_size)
        if self.rank >= smallest:
            raise ValueError(
                f"rank = {self.rank}: expected less than {smallest}, the smallest of hidden_size, "
                "intermediate_size and num_kv_heads * head_dim; lower it, or use name = 'llama'"
            )
        if self.tuned_hidden_size is not None:
            raise ValueError("tuned_hidden_size was not checked for name = 'cola'; remove it")
        return self

    def without_effect(self) -> list[str]:
        void = super().without_effect()
        if self.max_positions is not None:
            void.append(f"max_positions = {self.max_positions} has no effect on this model")
        return void

    def build_linear(self, name: str, in_features: int, out_features: int) -> nn.Module:
        """A `BottleneckLinear`."""
        return BottleneckLinear(in_features, out_features, self.rank, self.activation)


class BottleneckLinear(nn.Module):
    """y = B f(A x): [..., in] -> [..., out]. `factor_a` is A, `factor_b` is B."""

    def __init__(self, in_features: int, out_features: int, rank: int, activation: str) -> None:
        super().__init__()
        self.factor_a = nn.Linear(in_features, rank, bias=False)
        self.activation = nn.SiLU() if activation == "silu" else nn.Identity()
        self.factor_b = nn.Linear(rank, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.factor_b(self.activation(self.factor_a(x)))


class Cola(Llama):
    """LLaMA with a `BottleneckLinear` in place of every linear layer of the blocks."""

    config: ColaConfig

    def initial_std(self, name: str) -> float:
        """See `Llama.initial_std`.

        A is N(0, 1 / in), so that A x is N(0, 1) if x is. B is normal too, and outputs then have
        the mean square of LLaMA's, init_std^2 in.
        """
        layer, _, factor = name.removesuffix(".weight").rpartition(".")
        bottleneck, config = self.get_submodule(layer), self.config
        if not isinstance(bottleneck, BottleneckLinear):
            return super().initial_std(name)
        in_features = bottleneck.factor_a.in_features
        if factor == "factor_a":
            return float(in_features**-0.5)
        between = config.rank * MEAN_SQUARES[config.activation]
        return float(config.init_std * (in_features / between) ** 0.5)

    def hidden_size(self) -> None:
        """The rates of factors without a frozen weight were not checked."""
