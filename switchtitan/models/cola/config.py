"""The `[model]` section for CoLA."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from switchtitan.config.section import VoidKey, VoidKeyError
from switchtitan.models.llama.config import MAX_WIDTH, LlamaFamilyConfig
from switchtitan.models.llama.dimensions import LlamaDimensions

FACTORS = ("factor_a", "factor_b")
"""Local names of the two linear layers that replace each one of a block."""


@dataclass(frozen=True)
class ColaDimensions(LlamaDimensions):
    """Everything that determines a CoLA model's shapes and function."""

    rank: int = 1
    """Number of features between the factors."""

    def plain_shapes(self) -> dict[str, tuple[int, int]]:
        """Returns LLaMA's (out, in) of the linear layers that the factors replace, by name."""
        shapes = super().linear_shapes()
        shapes.pop("lm_head", None)
        return shapes

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Returns (out, in) of all factors and an untied head, by qualified name, in order."""
        plain, name_a, name_b = self.plain_shapes(), *FACTORS
        shapes = {}
        for name, (out_features, in_features) in plain.items():
            shapes[f"{name}.{name_a}"] = (self.rank, in_features)
            shapes[f"{name}.{name_b}"] = (out_features, self.rank)
        others = {name: s for name, s in super().linear_shapes().items() if name not in plain}
        return shapes | others


class ColaConfig(LlamaFamilyConfig):
    """CoLA (arXiv 2502.10940): LLaMA in which every linear layer of the blocks is B silu(A x), a
    bottleneck of `rank` features. It is a model and not a method, because no dense weight computes
    the same. Train it with `[method] name = "full_rank"`, which trains the factors. It can be
    evaluated and generate text, and cannot be exported: transformers has no class for it. Two
    choices are ours: the MLP keeps its gate, and the factors start so that outputs have about the
    variance of LLaMA's at the start."""

    name: Literal["cola"] = "cola"
    """Name of the model."""
    rank: int = Field(ge=1, le=MAX_WIDTH)
    """Number of features between A and B: at least 1, and below the smaller dimension of every
    linear layer that they replace. The authors' scripts have 128 for size 60m, 256 for 130m and
    350m, 512 for 1b and 1024 for 7b."""

    @model_validator(mode="after")
    def _check_rank(self) -> Self:
        shapes = self.dimensions().plain_shapes()
        name, shape = min(shapes.items(), key=lambda item: min(item[1]))
        if self.rank >= min(shape):
            raise ValueError(
                f"rank = {self.rank}: expected less than {min(shape)}, the smaller dimension of "
                f"{name}; lower it, or use name = 'llama'"
            )
        return self

    @model_validator(mode="after")
    def _check_max_positions(self) -> Self:
        if self.max_positions is not None:
            problem = f"max_positions has no effect with name = {self.name!r}; remove it"
            raise VoidKeyError([VoidKey("max_positions", ("name",), problem)])
        return self

    def dimensions(self) -> ColaDimensions:
        """Returns LLaMA's dimensions and the rank."""
        plain = super().dimensions()
        return ColaDimensions(
            **{field.name: getattr(plain, field.name) for field in fields(plain)}, rank=self.rank
        )

    def huggingface_config(self, seq_len: int) -> None:
        """Returns None: transformers has no class for this model."""

    def check_huggingface_config(self, found: Mapping[str, Any]) -> list[str]:
        """Returns one error: no config.json describes this model."""
        return [f"model_type = {found.get('model_type')!r}, and [model] name = {self.name!r}"]
