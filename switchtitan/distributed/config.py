"""Sections for sharding, compilation and activation checkpointing."""

from typing import Literal

from pydantic import Field

from switchtitan.registry import Section


class ParallelismConfig(Section):
    """`[parallelism]`: how ranks share the model (FSDP2; HSDP where both numbers exceed 1)."""

    replicate: int = Field(default=1, ge=1)
    """Number of model replicas, at least 1; gradients are averaged over them. Must divide the
    number of ranks."""
    shard: int = Field(default=-1, ge=-1)
    """Number of ranks that share one replica; -1: the number of ranks divided by `replicate`."""
    blocks_per_unit: int = Field(default=1, ge=1)
    """Blocks whose weights are gathered together and whose gradients are reduced together, at least
    1. More blocks take less host time and fewer, larger messages; memory grows by the full weights
    and gradients of the added blocks. One rank sends no messages."""
    reshard_after_forward: bool = True
    """Free a unit's gathered weights after its forward pass and gather them again for the backward
    pass: less memory, more communication. If false, weights are gathered once per step and freed
    in the backward pass of the last micro-batch."""
    frozen_weights: Literal["shard", "replicate"] = "shard"
    """Placement of frozen weights: `shard` splits them over the ranks and gathers them like trained
    weights; `replicate` keeps full tensors on every rank, so no step communicates them. Results
    are the same. No effect if all weights train."""
    timeout_s: int = Field(default=1800, ge=1)
    """Seconds, at least 1, after which a collective fails if a rank has not joined it, until the
    first step is done; later only in the first evaluation and in the writing of checkpoints. Must
    exceed the time in which a rank compiles, decomposes an initial weight or writes a checkpoint.
    Does not limit what one rank does alone, such as the preparation of a corpus."""
    step_timeout_s: int = Field(default=120, ge=1)
    """The same after the first step, so that a hung rank ends the run soon. Must exceed the time by
    which a rank can be late with a batch. Does not limit saves and what one rank does alone, such
    as spectra."""
    check_interval: int = Field(default=100, ge=0)
    """Optimizer steps between two comparisons of what several ranks hold alike: weights,
    candidates and optimizer state of replicas, and counts, switching plans and random keys of all
    ranks. A difference, such as a flipped bit, stops the run and names the tensors. Also
    compared before every save, with 0 only there. No effect on one rank. A comparison reads the
    replicated tensors twice and makes the host wait for the device."""
    accumulate_gradients: Literal["full", "sharded"] = "full"
    """How gradients of several micro-batches are accumulated: `full` keeps full fp32 gradients on
    every rank and reduces them once per step; `sharded` reduces them after every micro-batch: less
    memory, more communication. Equal to rounding. `sharded` has no effect with one micro-batch per
    step, or where one rank holds a replica and `trained_dtype` is float32."""


class CompileConfig(Section):
    """`[compile]`: regions to compile with torch.compile."""

    blocks: bool = False
    """Compile each repeated block of the model (one graph, shared by all blocks)."""
    loss: bool = False
    """Compile the loss."""
    optimizer: bool = False
    """Compile the update of factors that switch, of projected gradients, of frozen weights of 16
    bits, of Muon, and of moments in 8 bits. `adamw` is torch's fused kernel; others never compile.
    """


class ActivationCheckpointConfig(Section):
    """`[activation_checkpoint]`: activations to recompute in the backward pass."""

    mode: Literal["none", "full", "selective"] = "none"
    """`none` keeps all; `full` keeps only each block's input; `selective` keeps the results of
    matrix products and attention, and recomputes the element-wise operations between them."""
