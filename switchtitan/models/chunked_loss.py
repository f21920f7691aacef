"""Cross entropy of a linear head, whose logits are there for a chunk of tokens at a time.

The forward pass computes the gradients too, chunk by chunk, since the loss is where the backward pass begins: so logits are
computed once, and there are three matrix products, as in the plain form.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from switchtitan.contracts import IGNORED_TARGET

CHUNK_BYTES = 64 * 2**20
"""What the logits of a chunk take in fp32, about, unless there would be more than `MAX_NUM_CHUNKS`."""
MAX_NUM_CHUNKS = 16
"""Each chunk reads the head's weight twice, and reads and writes its gradient, which takes its time whatever the chunk's size.
In so many chunks logits take next to nothing of what they would."""
_ROWS_PER_PRODUCT = 4096
"""Of the weight's gradient, so that what is added to them is still in a CPU's cache, and takes little memory."""

ChunkLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""See `loss_of_chunk_`."""
ChunkLossAndGradient = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""See `loss_and_gradient_of_chunk_`."""


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    divisor: int,
    *,
    of_chunk_: ChunkLoss,
    of_chunk_with_gradient_: ChunkLossAndGradient,
) -> Tensor:
    """The sum over all targets of -log softmax(hidden weight^T)[target], in nats, divided by `divisor`; 0-dim, fp32 or wider.

    Can be differentiated once, with respect to `hidden` and `weight`. The weight's gradient is added up over chunks in fp32.

    Args:
        hidden: [tokens, dim].
        weight: [vocabulary, dim], of the same type.
        targets: [tokens] int64; `IGNORED_TARGET` does not count.
        of_chunk_: `loss_of_chunk_`, or it compiled: always called with the same shapes for the same number of tokens.
        of_chunk_with_gradient_: `loss_and_gradient_of_chunk_`, likewise.
    """
    num_tokens, vocabulary = len(hidden), len(weight)
    num_chunks = min(MAX_NUM_CHUNKS, -(-4 * num_tokens * vocabulary // CHUNK_BYTES))
    chunk_size = -(-num_tokens // num_chunks)
    # Equal chunks serve one compiled graph; what fills the last one up does not count.
    filling = -num_tokens % chunk_size
    if filling:
        hidden = F.pad(hidden, (0, 0, 0, filling))
        targets = F.pad(targets, (0, filling), value=IGNORED_TARGET)
    is_counted = targets != IGNORED_TARGET
    weights = is_counted.to(_wide(hidden.dtype)) / divisor
    targets = targets.where(is_counted, 0)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        loss: Tensor = _ChunkedCrossEntropy.apply(
            hidden, weight, targets, weights, chunk_size, of_chunk_with_gradient_
        )
        return loss
    loss = weights.new_zeros(())
    logits = hidden.new_empty(chunk_size, vocabulary)
    for chunk in zip(
        hidden.split(chunk_size), targets.split(chunk_size), weights.split(chunk_size), strict=True
    ):
        torch.mm(chunk[0], weight.t(), out=logits)
        loss += of_chunk_(logits, *chunk[1:])
    return loss


def loss_of_chunk_(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """The sum over tokens of weight * -log softmax(logits)[target]; 0-dim.

    Args:
        logits: [tokens, vocabulary]; may be overwritten.
        targets: [tokens] int64, all within the vocabulary.
        weights: [tokens], fp32 or wider: the type that is computed in.
    """
    _, total, at_target = _exponentials_(logits, targets, weights.dtype)
    return ((total.log() - at_target) * weights[:, None]).sum()


def loss_and_gradient_of_chunk_(
    logits: Tensor, targets: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Like `loss_of_chunk_`, and turns `logits` into the loss' gradient with respect to them, but at the targets.

    Returns:
        The loss, and the gradient at the targets [tokens], in the type of `logits`. It is not put in here, since a compiler
        would copy all of them for that.
    """
    exponentials, total, at_target = _exponentials_(logits, targets, weights.dtype)
    weights = weights[:, None]
    logits.copy_(exponentials.mul_(weights / total))
    gradient_at_target = (at_target.exp() / total - 1) * weights
    return ((total.log() - at_target) * weights).sum(), gradient_at_target[:, 0].to(logits.dtype)


def _exponentials_(
    logits: Tensor, targets: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """exp(logit - largest logit) [tokens, vocabulary], their sum, and the exponent at the target, [tokens, 1] each."""
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
        of_chunk_with_gradient_: ChunkLossAndGradient,
    ) -> Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=weights.dtype) if needs_weight else None
        loss = weights.new_zeros(())
        logits = hidden.new_empty(chunk_size, len(weight))
        rows = torch.arange(chunk_size, device=hidden.device)
        for start in range(0, len(hidden), chunk_size):
            chunk = slice(start, start + chunk_size)
            torch.mm(hidden[chunk], weight.t(), out=logits)
            loss_of_chunk, gradient_at_target = of_chunk_with_gradient_(
                logits, targets[chunk], weights[chunk]
            )
            loss += loss_of_chunk
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
        # They are scaled in place, hence good for one backward pass.
        if ctx.gradients is None:
            raise RuntimeError("this loss can be differentiated only once")
        (grad_hidden, grad_weight), ctx.gradients = ctx.gradients, None
        if grad_hidden is not None:
            grad_hidden.mul_(grad)
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(grad).to(ctx.dtype)
        return grad_hidden, grad_weight, None, None, None, None


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left right, for `total` [out, in] of the same type or a wider one."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
        return
    for rows, left_rows in zip(
        total.split(_ROWS_PER_PRODUCT), left.split(_ROWS_PER_PRODUCT), strict=True
    ):
        rows.add_(left_rows @ right)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
