"""Sections that say how the model is spread over devices, compiled and checkpointed."""

from typing import Literal

from pydantic import Field, model_validator

from switchtitan.config.section import Section


class ParallelismConfig(Section):
    """`[parallelism]`: how ranks share the model (FSDP2; HSDP where both numbers exceed 1)."""

    replicate: int = Field(default=1, ge=1)
    """Number of copies of the model, at least 1; gradients are averaged over them. Must divide the number of ranks."""
    shard: int = Field(default=-1, ge=-1)
    """Number of ranks that share one copy of the model, or -1 for all ranks divided by `replicate`."""
    reshard_after_forward: bool = True
    """Free a block's gathered weights after its forward pass and gather them again for the backward pass: less memory,
    more communication."""
    frozen_weights: Literal["shard", "replicate"] = "shard"
    """Where weights that do not train lie: `shard` splits them over the ranks like the rest; `replicate` keeps them whole on
    every rank, so that no step sends them. Results are the same. Takes a method that freezes weights."""


class CompileConfig(Section):
    """`[compile]`: which regions torch.compile turns into fused kernels."""

    blocks: bool = False
    """Compile each repeated block of the model (one graph, shared by all blocks)."""
    loss: bool = False
    """Compile the loss."""
    optimizer: bool = False
    """Compile the optimizer's update. Off: torch's fused AdamW kernel, and plain operations for per-vector AdamW."""


class ActivationCheckpointConfig(Section):
    """`[activation_checkpoint]`: which activations are computed again in the backward pass instead of kept."""

    mode: Literal["none", "full", "selective"] = "none"
    """`none` keeps all; `full` keeps only each block's input; `selective` keeps the results of matrix products and attention
    and computes the element-wise operations between them again."""
    offload: bool = False
    """Keep each block's input in the host's memory until the backward pass needs it: copied beside other work, it takes none
    of a GPU's memory. Without a GPU both are the same memory. Takes `mode = "full"`."""

    @model_validator(mode="after")
    def _check_offload(self) -> "ActivationCheckpointConfig":
        if self.offload and self.mode != "full":
            raise ValueError(
                f'offload = true takes mode = "full", it is "{self.mode}": only block inputs go to host memory; set '
                'mode = "full", or remove offload'
            )
        return self
