"""Bases from the leading singular vectors of sharded gradients."""

from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor

from switchtitan.distributed.shards import (
    copy_from_full_,
    local,
    replica_group,
    rows_per_rank,
    shard_group,
)
from switchtitan.methods.projected.weights import ProjectedWeight, is_right


def refresh_bases_(weights: list[ProjectedWeight]) -> None:
    """Sets each weight's basis to the leading singular vectors of its gradient.

    Replicas share the weights among them, and then send each other the bases: two devices may
    decompose the same gradient differently, by rounding.
    """
    replicas = replica_group(weights[0].parameter)
    if replicas is None:
        _refresh_own_bases_(weights)
        return
    own, num_replicas = replicas.rank(), replicas.size()
    _refresh_own_bases_(weights[own::num_replicas])
    for index, weight in enumerate(weights):
        if local(weight.basis).numel():
            dist.broadcast(local(weight.basis), group=replicas, group_src=index % num_replicas)


def _refresh_own_bases_(weights: list[ProjectedWeight]) -> None:
    """Sets bases on the ranks of a shard group, which take turns: each gathers and decomposes one
    gradient at a time."""
    if not weights:
        return
    group = shard_group(weights[0].parameter)
    num_ranks = 1 if group is None else group.size()
    queue = iter(weights)
    while round_ := list(islice(queue, num_ranks)):
        if group is None:
            bases = [
                leading_singular_vectors(weight.local_grad, weight.basis.shape[1])
                for weight in round_
            ]
        else:
            bases = _decompose_on_own_ranks(round_, group)
        for weight, basis in zip(round_, bases, strict=True):
            copy_from_full_(weight.basis, basis)


def leading_singular_vectors(grad: Tensor, rank: int) -> Tensor:
    """Returns the leading singular vectors of a gradient [out, in].

    They are the leading eigenvectors of the smaller Gram matrix, G^T G or G G^T, in fp64: squaring
    loses half the digits, and half of those of fp64 are more than an fp32 gradient has. That is
    more exact than an SVD in fp32, and on a CPU takes as long (1024 x 2736 on one thread: 1.3 s).

    The largest entry of each vector is positive. Moments are kept when the basis changes, so the
    sign of a vector must not depend on rounding or on the number of ranks.

    Returns:
        Right ones [in, rank] if out >= in, else left ones [out, rank].
    """
    # The trainer reports a gradient that is not finite. An error here would leave other ranks
    # waiting.
    matrix = torch.nan_to_num(grad, nan=0.0, posinf=0.0, neginf=0.0).to(torch.float64)
    gram = matrix.t() @ matrix if is_right(grad) else matrix @ matrix.t()
    # In ascending order.
    vectors = torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return (vectors * largest.sign()).to(grad.dtype)


def _decompose_on_own_ranks(
    weights: list[ProjectedWeight], group: dist.ProcessGroup
) -> list[Tensor]:
    """Returns the full bases of at most one weight per rank; rank i decomposes gradient i."""
    own_rank = group.rank()
    gathered = [_gather_rows(weight, owner, group) for owner, weight in enumerate(weights)]
    bases = []
    for owner, (weight, grad) in enumerate(zip(weights, gathered, strict=True)):
        if owner == own_rank:
            assert grad is not None
            bases.append(leading_singular_vectors(grad, weight.basis.shape[1]).contiguous())
        else:
            bases.append(
                torch.empty(
                    weight.basis.shape, dtype=weight.basis.dtype, device=weight.basis.device
                )
            )
    for owner, basis in enumerate(bases):
        dist.broadcast(basis, group=group, group_src=owner)
    return bases


def _gather_rows(weight: ProjectedWeight, owner: int, group: dist.ProcessGroup) -> Tensor | None:
    """Returns the full gradient on the rank `owner` of the group, None on the others."""
    num_rows, width = weight.parameter.shape
    grad = weight.local_grad
    padded = grad.new_zeros(rows_per_rank(num_rows, group.size()), width)
    padded[: grad.shape[0]] = grad
    parts = (
        [torch.empty_like(padded) for _ in range(group.size())] if group.rank() == owner else None
    )
    dist.gather(padded, parts, group=group, group_dst=owner)
    return None if parts is None else torch.cat(parts)[:num_rows]
