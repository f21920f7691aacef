"""CoLA (arXiv 2502.10940): LLaMA whose linear layers are B silu(A x)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from switchtitan.models.cola.config import FACTORS, ColaConfig, ColaDimensions
from switchtitan.models.llama.model import Llama

SILU_MEAN_SQUARE = 0.3557755
"""Mean of silu(z)^2 for z of the standard normal distribution."""


class BottleneckLinear(nn.Module):
    """y = B silu(A x) (+ bias): [..., in] -> [..., out].

    Args:
        linear: the layer that it replaces.
        rank: number of features between the factors.
    """

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.factor_a = nn.Linear(linear.in_features, rank, bias=False)
        self.factor_b = nn.Linear(rank, linear.out_features, bias=linear.bias is not None)

    def forward(self, x: Tensor) -> Tensor:
        return self.factor_b(F.silu(self.factor_a(x)))


class Cola(Llama):
    """LLaMA with a `BottleneckLinear` in place of every linear layer of the blocks."""

    dims: ColaDimensions

    def __init__(self, dims: ColaDimensions, backend: str) -> None:
        super().__init__(dims, backend)
        for name in dims.plain_shapes():
            linear = self.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            self.set_submodule(name, BottleneckLinear(linear, dims.rank))

    def initial_value(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Returns the initial value of a parameter or buffer; fp32 on the CPU.

        A is N(0, 1 / in), so that A x has unit variance if x has. B is normal too, so that the
        outputs then have the variance of LLaMA's, init_std^2 in. The rest is as in LLaMA.
        """
        layer, _, local_name = name.removesuffix(".weight").rpartition(".")
        if local_name not in FACTORS:
            return super().initial_value(name, shape, generator)
        _, in_features = self.dims.plain_shapes()[layer]
        std = in_features**-0.5
        if local_name == FACTORS[1]:
            std = self.dims.init_std * math.sqrt(in_features / (self.dims.rank * SILU_MEAN_SQUARE))
        value = torch.empty(shape, dtype=torch.float32, device="cpu")
        return value.normal_(0.0, std, generator=generator)


def build_cola(config: ColaConfig) -> Cola:
    """Builds the model on the current default device (the caller sets meta)."""
    return Cola(config.dimensions(), config.attention)
