"""The training loss, from hidden states and the head, without all logits in memory at once."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from switchtitan.contracts import IGNORED_TARGET
from switchtitan.distributed.blocks import compile_if
from switchtitan.models.head import Head, TiedHead


class CrossEntropy:
    """Computes the sum over targets of -log p(target), in nats, in fp32 or wider.

    For a `Head` or `TiedHead`, logits and their gradients exist for one chunk of tokens at a time.
    Any other head, such as a low-rank one, computes all logits.

    Args:
        compile_regions: compile everything but matrix products and the head, for static shapes.
    """

    def __init__(self, compile_regions: bool) -> None:
        fuse = compile_if(compile_regions)
        self._logits_loss: Callable[[Tensor, Tensor], Tensor] = fuse(summed_cross_entropy)
        self._chunk_loss: ChunkLoss = fuse(chunk_loss_)
        self._chunk_loss_and_gradient: ChunkLossAndGradient = fuse(chunk_loss_and_gradient_)

    def __call__(
        self, hidden: Tensor, head: nn.Module, targets: Tensor, divisor: int = 1
    ) -> Tensor:
        """Returns the sum divided by `divisor`, 0-dim.

        Args:
            hidden: [batch, seq, dim].
            head: [..., dim] -> logits [..., vocabulary].
            targets: [batch, seq]; `IGNORED_TARGET` is ignored.
            divisor: dividing here rather than afterwards avoids rounding the gradient twice.
        """
        if not isinstance(head, Head | TiedHead):
            return self._logits_loss(head(hidden), targets) / divisor

        def in_chunks(hidden: Tensor, weight: Tensor) -> Tensor:
            return chunked_cross_entropy(
                hidden.flatten(0, 1),
                weight,
                targets.flatten(),
                divisor,
                loss_fn=self._chunk_loss,
                loss_and_gradient_fn=self._chunk_loss_and_gradient,
            )

        loss: Tensor = head(hidden, in_chunks)
        return loss


def summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns the sum over targets of -log p(target), in nats, computed in fp32; 0-dim.

    Args:
        logits: [batch, seq, vocabulary].
        targets: [batch, seq]; `IGNORED_TARGET` is ignored.
    """
    return F.cross_entropy(
        logits.flatten(0, 1).float(),
        targets.flatten(),
        ignore_index=IGNORED_TARGET,
        reduction="sum",
    )


CHUNK_BYTES = 64 * 2**20
"""Target size of a chunk's logits in fp32; larger where `MAX_NUM_CHUNKS` is the limit."""
MAX_NUM_CHUNKS = 16
"""Each chunk reads the head's weight twice, and reads and writes its gradient: a fixed cost. 16
chunks already shrink the logits 16 times."""
_ROWS_PER_PRODUCT = 4096
"""Rows of the weight's gradient per product, so that a product fits in a CPU's cache."""
_DEVICES_WITH_ALIGNED_ROWS = {"cuda"}
_ALIGNED_BYTES = 16
"""Tensor cores load rows that start at multiples of this; for other matrices cuBLAS takes slower
kernels. (NVIDIA, Matrix Multiplication Background User's Guide)"""
_PADDED_ELEMENTS = 64
"""Rows that are not aligned are padded to a multiple of this many elements."""

ChunkLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""See `chunk_loss_`."""
ChunkLossAndGradient = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""See `chunk_loss_and_gradient_`."""


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    divisor: int,
    *,
    loss_fn: ChunkLoss,
    loss_and_gradient_fn: ChunkLossAndGradient,
) -> Tensor:
    """Returns the sum over targets of -log softmax(hidden weight^T)[target], in nats, / `divisor`.

    The result is 0-dim, fp32 or wider. Can be differentiated once, with respect to `hidden` and
    `weight`. The weight's gradient is accumulated over chunks in fp32.

    Args:
        hidden: [tokens, dim].
        weight: [vocabulary, dim], of the same dtype.
        targets: [tokens] int64; `IGNORED_TARGET` is ignored.
        loss_fn: `chunk_loss_`, perhaps compiled; equal shapes for equal numbers of tokens.
        loss_and_gradient_fn: `chunk_loss_and_gradient_`, likewise.
    """
    num_tokens, vocabulary = len(hidden), len(weight)
    num_chunks = min(MAX_NUM_CHUNKS, -(-4 * num_tokens * vocabulary // CHUNK_BYTES))
    chunk_size = -(-num_tokens // num_chunks)
    # Equal chunks share one compiled graph; padding is ignored.
    num_padding = -num_tokens % chunk_size
    if num_padding:
        hidden = F.pad(hidden, (0, 0, 0, num_padding))
        targets = F.pad(targets, (0, num_padding), value=IGNORED_TARGET)
    is_counted = targets != IGNORED_TARGET
    weights = is_counted.to(_wide(hidden.dtype)) / divisor
    targets = targets.where(is_counted, 0)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        loss: Tensor = _ChunkedCrossEntropy.apply(
            hidden, weight, targets, weights, chunk_size, loss_and_gradient_fn
        )
        return loss
    loss = weights.new_zeros(())
    logits = _empty_logits(hidden, chunk_size, vocabulary)
    for chunk in zip(
        hidden.split(chunk_size), targets.split(chunk_size), weights.split(chunk_size), strict=True
    ):
        torch.mm(chunk[0], weight.t(), out=logits)
        loss += loss_fn(logits, *chunk[1:])
    return loss


def chunk_loss_(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Returns the sum over tokens of weight * -log softmax(logits)[target]; 0-dim.

    Args:
        logits: [tokens, vocabulary]; may be overwritten.
        targets: [tokens] int64, all within the vocabulary.
        weights: [tokens], fp32 or wider; computes in their dtype.
    """
    _, total, at_target = _exponentials_(logits, targets, weights.dtype)
    return ((total.log() - at_target) * weights[:, None]).sum()


def chunk_loss_and_gradient_(
    logits: Tensor, targets: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Like `chunk_loss_`, and overwrites `logits` with the loss's gradient, except at the targets.

    Returns:
        The loss, and the gradient at the targets [tokens], in the dtype of `logits`. The caller
        writes it: torch.compile would copy all logits for that.
    """
    exponentials, total, at_target = _exponentials_(logits, targets, weights.dtype)
    weights = weights[:, None]
    logits.copy_(exponentials.mul_(weights / total))
    gradient_at_target = (at_target.exp() / total - 1) * weights
    return ((total.log() - at_target) * weights).sum(), gradient_at_target[:, 0].to(logits.dtype)


def _exponentials_(
    logits: Tensor, targets: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns exp(logit - max) [tokens, vocabulary], their sum, and logit - max at the target,
    [tokens, 1] each."""
    wide = logits.to(dtype)
    largest = wide.amax(dim=1, keepdim=True)
    at_target = logits.gather(1, targets[:, None]).to(dtype) - largest
    exponentials = wide.sub_(largest).exp_()
    return exponentials, exponentials.sum(dim=1, keepdim=True), at_target


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        weights: Tensor,
        chunk_size: int,
        loss_and_gradient_fn: ChunkLossAndGradient,
    ) -> Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=weights.dtype) if needs_weight else None
        loss = weights.new_zeros(())
        logits = _empty_logits(hidden, chunk_size, len(weight))
        rows = torch.arange(chunk_size, device=hidden.device)
        for start in range(0, len(hidden), chunk_size):
            chunk = slice(start, start + chunk_size)
            torch.mm(hidden[chunk], weight.t(), out=logits)
            chunk_loss, gradient_at_target = loss_and_gradient_fn(
                logits, targets[chunk], weights[chunk]
            )
            loss += chunk_loss
            logits[rows, targets[chunk]] = gradient_at_target
            if grad_hidden is not None:
                torch.mm(logits, weight, out=grad_hidden[chunk])
            if grad_weight is not None:
                _add_product_(grad_weight, logits.t(), hidden[chunk])
        ctx.gradients = grad_hidden, grad_weight
        ctx.dtype = weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # The gradients are scaled in place, so they serve one backward pass.
        if ctx.gradients is None:
            raise RuntimeError("this loss can be differentiated only once")
        (grad_hidden, grad_weight), ctx.gradients = ctx.gradients, None
        if grad_hidden is not None:
            grad_hidden.mul_(grad)
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(grad).to(ctx.dtype)
        return grad_hidden, grad_weight, None, None, None, None


def _empty_logits(hidden: Tensor, num_tokens: int, vocabulary: int) -> Tensor:
    """Returns an empty tensor [num_tokens, vocabulary] like `hidden`, with aligned rows on a GPU.

    A vocabulary of 32 100 in bf16 has rows of 64 200 bytes, which are not.
    """
    num_columns = vocabulary
    is_aligned = vocabulary * hidden.element_size() % _ALIGNED_BYTES == 0
    if hidden.device.type in _DEVICES_WITH_ALIGNED_ROWS and not is_aligned:
        num_columns = -(-vocabulary // _PADDED_ELEMENTS) * _PADDED_ELEMENTS
    return hidden.new_empty(num_tokens, num_columns)[:, :vocabulary]


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left right, for `total` [out, in] of the same or a wider dtype."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif _has_wide_product(total):
        # One kernel, which does not round the product to the narrow dtype before the sum.
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        for rows, left_rows in zip(
            total.split(_ROWS_PER_PRODUCT), left.split(_ROWS_PER_PRODUCT), strict=True
        ):
            rows.add_(left_rows @ right)


def _has_wide_product(total: Tensor) -> bool:
    """Whether torch multiplies narrow matrices into `total`: into fp32, by cuBLAS alone."""
    return total.is_cuda and torch.version.hip is None and total.dtype == torch.float32


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
