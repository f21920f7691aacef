"""Steps, saves, kernels and measurements of a rank on fake CUDA; called in new processes."""

from collections import Counter
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from support.fake_cuda import python_api
from support.fake_cuda.cases import CASES, NUM_RANKS, ON_CPU, UNEVEN
from support.fake_cuda.steps import (
    collectives_on_cpu,
    fake_cuda_stepper,
    observe,
    observed_stepper,
    steps_of,
)
from support.tiny import tiny_config
from switchtitan.checkpoint.save import CheckpointTensors, copy_to_host
from switchtitan.distributed.config import CompileConfig
from switchtitan.distributed.norms import non_finite
from switchtitan.distributed.shards import local
from switchtitan.job.config import parse_arguments
from switchtitan.models.loss import CrossEntropy, Head
from switchtitan.observability.region_times import RegionTimes
from switchtitan.workbench.benchmark.gpu.record import Launch, RecordLaunches

TIMED = ("switchlora", "host candidates", "relora", "sharded accumulation")
"""Cases whose regions are timed."""
SAVED = ("switchlora, HSDP", "host candidates, HSDP")
"""Matrices share a storage, and some tensors are in host memory."""
VOCABULARIES = (32100, 32000, 32104)

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


def steps_of_first_rank(folder):
    """Returns what rank 0 does in steps of all cases."""
    found = {"steps": {}}
    for name in CASES:
        with observed_stepper(folder, name, 0) as (stepper, races):
            found["steps"][name] = steps_of(stepper, name, races)
    on_cpu = {name: collectives_on_cpu(folder, name) for name in sorted(ON_CPU)}
    return found | {"on a CPU": on_cpu}


def steps_of_last_rank(folder):
    """Returns what the rank with the fewest rows does in steps, and in what runs during them."""
    rank = NUM_RANKS - 1
    found = {"steps": {}, "times": {}, "saves": {}}
    for name in sorted(UNEVEN):
        with observed_stepper(folder, name, rank) as (stepper, races):
            if name in TIMED:
                found["steps"][name], found["times"][name] = _timed_steps(stepper, name, races)
            else:
                found["steps"][name] = steps_of(stepper, name, races)
            if name in SAVED:
                found["saves"][name] = _saves(stepper, races)
    return found | {"updates": kernels_of_updates(folder, rank)}


def kernels_of_first_rank():
    """Returns the kernels of switches and losses."""
    return {
        "switches": kernels_of_switches(0),
        "losses": [kernels_of_loss(size) for size in VOCABULARIES],
    }


class LateEvent(python_api.FakeEvent):
    """An event that the device has not passed when the host asks, unless it `has_passed`."""

    has_passed = False

    def query(self):
        return LateEvent.has_passed and super().query()


def _timed_steps(stepper, name, races):
    """Returns what is observed in steps whose regions are timed, and mean times."""
    LateEvent.has_passed = False
    with (
        patch.object(torch.cuda, "Event", LateEvent),
        RegionTimes(torch.device("cuda", 0)) as times,
    ):
        steps = steps_of(stepper, name, races)
        assert not times.means()
        LateEvent.has_passed = True
        return steps, times.means()


def _saves(stepper, races):
    """Returns what each part of two saves does, also if none waits for copies."""
    found = {"saves": [dict(parts) for parts in _two_saves(stepper, races)]}
    with patch.object(python_api.FakeStream, "synchronize", lambda stream: None):
        found["saves without a wait"] = [dict(parts) for parts in _two_saves(stepper, races)]
    return found


def _two_saves(stepper, races):
    """Yields, by part: the search for values that are not finite, the collection of what is saved,
    its copies, reading them in the background, and the next step."""
    tensors = CheckpointTensors(stepper.model, stepper.optimizer)
    memory = dict[str, Tensor]()
    saved, copies = dict[str, Tensor](), dict[str, Tensor]()
    parts = {
        "search": lambda: non_finite(tensors.model, stepper.world.device),
        "collect": lambda: saved.update(_fake(tensors)),
        "copy": lambda: copies.update(copy_to_host(saved, memory)),
        "write": lambda: [local(copy).clone() for copy in copies.values()],
        "step": stepper.step,
    }
    for _ in range(2):
        yield {name: observe(part, races) for name, part in parts.items()}


def _fake(tensors):
    """Returns what is saved; tensors made from NumPy arrays, which are real, as fake ones."""
    saved = tensors()
    for name, tensor in saved.items():
        if not isinstance(local(tensor), FakeTensor):
            saved[name] = torch.zeros(tensor.shape, dtype=tensor.dtype)
    return saved


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
