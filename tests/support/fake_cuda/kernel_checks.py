"""Kernels of switches, updates and losses on fake CUDA tensors."""

from collections import Counter
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from support.fake_cuda.cases import NUM_RANKS
from support.fake_cuda.steps import fake_cuda_stepper
from support.tiny import tiny_config
from switchtitan.benchmark.gpu.record import Launch, RecordLaunches
from switchtitan.distributed.config import CompileConfig
from switchtitan.job.config import parse_arguments
from switchtitan.models.loss import CrossEntropy, Head

# Real widths, since torch cuts lists of tensors into launches by their sizes.
LARGE = Path(__file__).parents[3] / "train_configs/llama_350m_switchlora.toml"
SWITCHES = {"stored": "", "host": "--method.candidates_device host"}
UPDATES = {
    # The structure of the 350M model: 168 layers, 336 factors of two widths.
    "350M": "--model.num_layers 24 --model.num_kv_heads 2 --method.rank 8 --compile.optimizer true",
    "uneven, eager": "--model.num_kv_heads 2 --method.rank 15",
}
NUM_TOKENS, DIM = 36864, 1024
"""Of a micro-batch of the published 350M run."""


def kernels_of_switches(rank):
    """Returns the kernels of a step's switch by case and operation; "addmm_" is a layer's fold."""
    uncompiled = [f"--compile.{key}=false" for key in CompileConfig.model_fields]
    results = {}
    for name, words in SWITCHES.items():
        words = ["--config", str(LARGE), *uncompiled, *words.split()]
        with fake_cuda_stepper(parse_arguments(words, NUM_RANKS), NUM_RANKS, rank) as stepper:
            # This step takes none of the vectors that the previous one puts back.
            stepper.optimizer.switch()
            with RecordLaunches() as kernels:
                stepper.optimizer.switch()
        results[name] = by_operation(kernels)
    return results


def kernels_of_updates(folder, rank):
    """Returns the kernels of the update of all factors by case and operation.

    Regions that are compiled run eagerly; "compiled" counts their calls if `[compile] optimizer` is
    set, one kernel each.
    """
    results = {}
    for name, words in UPDATES.items():
        words += " --training.local_batch_size 1"
        config = tiny_config(folder, "switchlora", *words.split(), num_ranks=NUM_RANKS)
        is_compiled = config.compile.optimizer
        eager = config.compile.model_copy(update={"optimizer": False})
        config = config.model_copy(update={"compile": eager})
        with fake_cuda_stepper(config, NUM_RANKS, rank) as stepper:
            stepper.compute_gradients()
            rule = stepper.optimizer._rule
            stepper.optimizer.switch()
            with RecordLaunches() as kernels:
                if is_compiled:
                    rule._update = _as_one_kernel(rule._update, kernels)
                rule.step()
        results[name] = by_operation(kernels)
    return results


def _as_one_kernel(region, kernels):
    def call(*args, **kwargs):
        launches = kernels.launches.copy()
        result = region(*args, **kwargs)
        kernels.launches = launches + Counter([Launch("", "triton", "compiled", 1, 0)])
        return result

    return call


def kernels_of_loss(vocabulary):
    """Returns the kernels of the eager loss and its backward pass in bf16, by operation, and the
    strides of the logits of each chunk."""
    strides = []

    class RecordStrides(RecordLaunches):
        def count(self, func, args, kwargs, result):
            super().count(func, args, kwargs, result)
            if func is torch.ops.aten.mm.out and kwargs["out"].shape[1] == vocabulary:
                strides.append(kwargs["out"].stride())

    with FakeTensorMode(), torch.device("cuda"):
        hidden = torch.empty(1, NUM_TOKENS, DIM, dtype=torch.bfloat16, requires_grad=True)
        head = Head(DIM, vocabulary)
        head.weight = nn.Parameter(torch.empty(vocabulary, DIM, dtype=torch.bfloat16))
        targets = torch.zeros(1, NUM_TOKENS, dtype=torch.int64)
        with RecordStrides() as kernels:
            CrossEntropy(compile_regions=False)(hidden, head, targets, NUM_TOKENS).backward()
    return by_operation(kernels), strides


def by_operation(kernels):
    """Returns the number of kernels by operation, collectives and copies included."""
    counts = Counter()
    for launch, number in kernels.launches.items():
        counts[launch.name] += number * launch.num_launches
    return dict(counts)
