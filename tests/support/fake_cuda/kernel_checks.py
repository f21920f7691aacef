"""Checks of kernels on fake CUDA tensors; each function runs in a new process."""

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from support.fake_cuda.kernels import CountKernels
from support.fake_cuda.stepper import fake_cuda_stepper, without_initial_values
from support.tiny import tiny_config
from switchtitan.job.config import JobConfig
from switchtitan.methods.switchlora.optimizer import SwitchLoraOptimizer
from switchtitan.methods.switchlora.vector_adamw import VectorAdamW
from switchtitan.models.head import Head
from switchtitan.models.loss import CrossEntropy


def kernels_of_switches(
    folder: str, cases: dict[str, list[str]], num_ranks: int, rank: int
) -> dict[str, dict[str, int]]:
    """Returns the kernels of a step's switch by case and operation; "addmm_" is a layer's fold."""
    results = {}
    for name, settings in cases.items():
        config = tiny_config(Path(folder), "switchlora", *settings, num_ranks=num_ranks)
        results[name] = kernels_of_switch(config, num_ranks, rank)
    return results


def kernels_of_switch(config: JobConfig, num_ranks: int, rank: int) -> dict[str, int]:
    """Returns the kernels of a step's switch by operation."""
    with without_initial_values(), fake_cuda_stepper(config, num_ranks, rank) as stepper:
        optimizer = stepper.optimizer
        assert isinstance(optimizer, SwitchLoraOptimizer)
        # The previous step prefetches this step's candidates if they are in host memory.
        optimizer.switch()
        with CountKernels() as kernels:
            optimizer.switch()
    return dict(kernels.counts)


def kernels_of_updates(
    folder: str, cases: dict[str, list[str]], num_ranks: int, rank: int
) -> dict[str, dict[str, int]]:
    """Returns the kernels of the update of all factors by case and operation.

    Regions that are compiled run eagerly; "compiled" counts their calls if `[compile] optimizer` is
    set, one kernel each.
    """
    results = {}
    for name, settings in cases.items():
        config = tiny_config(Path(folder), "switchlora", *settings, num_ranks=num_ranks)
        is_compiled = config.compile.optimizer
        config = config.model_copy(
            update={"compile": config.compile.model_copy(update={"optimizer": False})}
        )
        with without_initial_values(), fake_cuda_stepper(config, num_ranks, rank) as stepper:
            optimizer = stepper.optimizer
            assert isinstance(optimizer, SwitchLoraOptimizer)
            stepper.compute_gradients()
            rule = optimizer._rule
            assert isinstance(rule, VectorAdamW)
            update_mask = optimizer._timers.update_mask()
            with CountKernels() as kernels:
                if is_compiled:
                    rule._coefficients = _as_one_kernel(rule._coefficients, kernels)
                    rule._update = _as_one_kernel(rule._update, kernels)
                rule.step(update_mask)
        results[name] = dict(kernels.counts)
    return results


def _as_one_kernel(region: Callable[..., Any], kernels: CountKernels) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        counts = kernels.counts.copy()
        result = region(*args, **kwargs)
        kernels.counts = counts + Counter(compiled=1)
        return result

    return call


def kernels_of_losses(
    num_tokens: int, dim: int, vocabularies: list[int]
) -> list[tuple[dict[str, int], list[tuple[int, ...]]]]:
    """Returns, by vocabulary, the kernels of the eager loss and its backward pass in bf16, by
    operation, and the strides of the logits of each chunk."""
    return [_kernels_of_loss(num_tokens, dim, vocabulary) for vocabulary in vocabularies]


def _kernels_of_loss(
    num_tokens: int, dim: int, vocabulary: int
) -> tuple[dict[str, int], list[tuple[int, ...]]]:
    strides: list[tuple[int, ...]] = []

    class Count(CountKernels):
        def count(self, func: Any, args: tuple, kwargs: Mapping[str, Any], result: Any) -> None:
            super().count(func, args, kwargs, result)
            if func is torch.ops.aten.mm.out and kwargs["out"].shape[1] == vocabulary:
                strides.append(kwargs["out"].stride())

    with FakeTensorMode(), torch.device("cuda"):
        hidden = torch.empty(1, num_tokens, dim, dtype=torch.bfloat16, requires_grad=True)
        head = Head(dim, vocabulary)
        head.weight = nn.Parameter(torch.empty(vocabulary, dim, dtype=torch.bfloat16))
        targets = torch.zeros(1, num_tokens, dtype=torch.int64)
        with Count() as kernels:
            CrossEntropy(compile_regions=False)(hidden, head, targets, num_tokens).backward()
    return dict(kernels.counts), strides
