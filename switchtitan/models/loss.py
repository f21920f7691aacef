"""The output head, and the training loss without all logits in memory at once."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from switchtitan.contracts import IGNORED_TARGET
from switchtitan.distributed.blocks import compile_if

CHUNK_BYTES = 64 * 2**20
"""Target size of a chunk's logits in fp32; larger where `MAX_NUM_CHUNKS` is the limit."""
MAX_NUM_CHUNKS = 16
"""Each chunk reads the head's weight twice, and reads and writes its gradient: a fixed cost."""
_ROWS_PER_PRODUCT = 4096
"""Rows of the weight's gradient per product, so that a product fits in a CPU's cache."""
_DEVICES_WITH_ALIGNED_ROWS = {"cuda"}
_ALIGNED_BYTES = 16
"""Other rows, which are padded, take slower kernels. (NVIDIA, Matrix Multiplication Background
User's Guide)"""
_PADDED_ELEMENTS = 64


class Head(nn.Linear):
    """Hidden states [..., dim] -> logits [..., vocabulary], without a bias.

    A loss in chunks passes a function of hidden states and weight. It runs inside the call, because
    FSDP gathers and frees the weight, and reduces its gradient, in hooks of the call.
    """

    def __init__(self, dim: int, vocabulary: int) -> None:
        super().__init__(dim, vocabulary, bias=False)

    def forward(
        self, hidden: Tensor, function: Callable[[Tensor, Tensor], Tensor] = F.linear
    ) -> Tensor:
        return function(hidden, self.weight)


class TiedHead(nn.Module):
    """A head that multiplies by the embedding's weight, and has no parameter of its own.

    A model with this head leaves the embedding out of `outer_units`, since its weight must stay
    gathered until the head has run.
    """

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        # In a tuple: as a submodule, the weight would have a second name.
        self._embedding = (embedding,)

    def forward(
        self, hidden: Tensor, function: Callable[[Tensor, Tensor], Tensor] = F.linear
    ) -> Tensor:
        return function(hidden, self._embedding[0].weight)


class CrossEntropy:
    """Computes the sum over targets of -log p(target), in nats, in fp32 or wider.

    For a `Head` or `TiedHead`, logits and their gradients exist for one chunk of tokens at a time.
    Any other head, such as a low-rank one, computes all logits. `compile_regions` compiles
    everything but matrix products and the head, for static shapes.
    """

    def __init__(self, compile_regions: bool) -> None:
        fuse = compile_if(compile_regions)
        self._loss: Callable[[Tensor, Tensor], Tensor] = fuse(summed_cross_entropy)
        self._loss_and_gradient: LossAndGradient = fuse(loss_and_gradient_)

    def __call__(
        self, hidden: Tensor, head: nn.Module, targets: Tensor, divisor: int = 1
    ) -> Tensor:
        """Returns the sum divided by `divisor`, 0-dim. Can be differentiated once.

        Args:
            hidden: [batch, seq, dim].
            head: [..., dim] -> logits [..., vocabulary].
            targets: [batch, seq]; `IGNORED_TARGET` is ignored.
            divisor: dividing here rather than afterwards avoids rounding the gradient twice.
        """
        if not isinstance(head, Head | TiedHead):
            return self._loss(head(hidden), targets) / divisor

        def in_chunks(hidden: Tensor, weight: Tensor) -> Tensor:
            return self._in_chunks(hidden.flatten(0, 1), weight, targets.flatten(), divisor)

        loss: Tensor = head(hidden, in_chunks)
        return loss

    def _in_chunks(self, hidden: Tensor, weight: Tensor, targets: Tensor, divisor: int) -> Tensor:
        """Args: hidden [tokens, dim], weight [vocabulary, dim], targets [tokens]."""
        num_tokens, vocabulary = len(hidden), len(weight)
        num_chunks = min(MAX_NUM_CHUNKS, -(-4 * num_tokens * vocabulary // CHUNK_BYTES))
        chunk_size = -(-num_tokens // num_chunks)
        # Equal chunks share one compiled graph; padding is ignored.
        num_padding = -num_tokens % chunk_size
        if num_padding:
            hidden = F.pad(hidden, (0, 0, 0, num_padding))
            targets = F.pad(targets, (0, num_padding), value=IGNORED_TARGET)
        if not torch.is_grad_enabled():
            hidden, weight = hidden.detach(), weight.detach()
        loss: Tensor = _ChunkedCrossEntropy.apply(
            hidden, weight, targets, divisor, chunk_size, self._loss_and_gradient
        )
        return loss


def summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns the sum over targets of -log p(target), in nats, in fp32 or wider; 0-dim.

    Logits are [..., vocabulary], targets [...]; `IGNORED_TARGET` is ignored.
    """
    return F.cross_entropy(
        logits.flatten(0, -2).to(_wide(logits.dtype)),
        targets.flatten(),
        ignore_index=IGNORED_TARGET,
        reduction="sum",
    )


LossAndGradient = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def loss_and_gradient_(
    logits: Tensor, targets: Tensor, weights: Tensor, loss: Tensor
) -> tuple[Tensor, Tensor]:
    """Overwrites `logits` with the gradient of a weighted cross entropy, except at the targets.

    Args:
        logits: [tokens, vocabulary].
        targets: [tokens] int64, all within the vocabulary.
        weights: [tokens], fp32 or wider; computes in their dtype.
        loss: of other tokens, 0-dim.

    Returns:
        `loss` + the sum over tokens of weight * -log softmax(logits)[target], and the gradient at
        the targets [tokens], in the dtype of `logits`. The caller writes it: torch.compile would
        copy all logits for that.
    """
    wide, weights = logits.to(weights.dtype), weights[:, None]
    largest = wide.amax(dim=1, keepdim=True)
    at_target = logits.gather(1, targets[:, None]).to(weights.dtype) - largest
    exponentials = wide.sub_(largest).exp_()
    total = exponentials.sum(dim=1, keepdim=True)
    logits.copy_(exponentials.mul_(weights / total))
    gradient_at_target = (at_target.exp() / total - 1) * weights
    loss = loss + ((total.log() - at_target) * weights).sum()
    return loss, gradient_at_target[:, 0].to(logits.dtype)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes the gradients in the forward pass; the weight's is accumulated in fp32."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        divisor: int,
        chunk_size: int,
        loss_and_gradient: LossAndGradient,
    ) -> Tensor:
        is_counted = targets != IGNORED_TARGET
        weights = is_counted.to(_wide(hidden.dtype)) / divisor
        targets = targets.where(is_counted, 0)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=weights.dtype) if needs_weight else None
        loss = weights.new_zeros(())
        logits = _empty_logits(hidden, chunk_size, len(weight))
        rows = torch.arange(chunk_size, device=hidden.device)
        for start in range(0, len(hidden), chunk_size):
            chunk = slice(start, start + chunk_size)
            torch.mm(hidden[chunk], weight.t(), out=logits)
            loss, gradient_at_target = loss_and_gradient(
                logits, targets[chunk], weights[chunk], loss
            )
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
            is_narrow = ctx.dtype != grad_weight.dtype
            into = torch.empty_like(grad_weight, dtype=ctx.dtype) if is_narrow else grad_weight
            # One kernel, which rounds once.
            grad_weight = torch.mul(grad_weight, grad, out=into)
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
    # cuBLAS alone multiplies narrow matrices into a wide one, and only into fp32.
    has_wide_product = total.is_cuda and torch.version.hip is None and total.dtype == torch.float32
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif has_wide_product:
        # One kernel, which does not round the product to the narrow dtype before the sum.
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        for rows, left_rows in zip(
            total.split(_ROWS_PER_PRODUCT), left.split(_ROWS_PER_PRODUCT), strict=True
        ):
            rows.add_(left_rows @ right)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
