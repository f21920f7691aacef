"""Ranks share the start of a run, and replicas stay equal though they sum in different orders."""

import sys

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from support.layouts import LAYOUTS, asked_for
from support.ranks import run_rows_on_ranks
from support.tiny import full_tensors, tiny_trainer, train_steps
from torch.utils._python_dispatch import TorchDispatchMode

from switchtitan.distributed.shards import local
from switchtitan.errors import RanksDisagreeError
from switchtitan.workbench.benchmark.counters import CountingMode

NUM_RANKS, REPLICATED = LAYOUTS["two_by_two"]
SUMS = {"c10d.allreduce_.default": 0, "c10d._reduce_scatter_base_.default": 1}
"""Operations that sum over ranks -> the argument with this rank's summand."""


DECOMPOSITION = "aten._linalg_eigh.default"


class AnotherOrder(TorchDispatchMode):
    """Changes the last bits of what this rank adds to a sum, as another order of the sum would, and
    of decompositions, as another device would."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if str(function) == DECOMPOSITION:
            values, vectors = function(*args)
            return values, vectors * (1 + 1e-6)
        if str(function) in SUMS:
            summand = args[SUMS[str(function)]]
            for tensor in summand if isinstance(summand, list) else [summand]:
                if tensor.is_floating_point():
                    tensor.mul_(1 + 1e-6)
        return function(*args, **(kwargs or {}))


class CountDecompositions(CountingMode):
    number = 0

    def count(self, func, args, kwargs, result):
        self.number += str(func) == DECOMPOSITION


def check_replicas(rank, folder, method, *keys):
    trainer = tiny_trainer(folder, method, *keys, *REPLICATED, num_ranks=NUM_RANKS)
    if rank == NUM_RANKS - 1:
        with AnotherOrder():
            train_steps(trainer, 4)
    else:
        train_steps(trainer, 4)
    trainer.check_ranks()
    trainer.stepper.close()


def check_a_difference(rank, folder, changed_rank):
    """Both pairs of replicas end, though those of one pair are equal."""
    trainer = tiny_trainer(folder, "full_rank", *REPLICATED, num_ranks=NUM_RANKS)
    trainer.check_ranks()
    if rank == changed_rank:
        local(trainer.tensors()["model.lm_head.weight"].detach()).neg_()
    with pytest.raises(RanksDisagreeError, match=r"\(model\.lm_head\.weight[,)]"):
        trainer.check_ranks()
    trainer.stepper.close()


def check_decompositions(rank, folder, method):
    with CountDecompositions() as counted:
        trainer = tiny_trainer(folder, method, *REPLICATED, num_ranks=NUM_RANKS)
    assert trainer.stepper.world.gather(counted.number) == [4, 4, 3, 3]
    trainer.stepper.close()


def check_warm_start(rank, folder, name):
    saved = tiny_trainer(folder / "saved", "full_rank", num_ranks=NUM_RANKS)
    saved.save()
    expected = {name: tensor for name, tensor in full_tensors(saved).items() if name[0] == "m"}
    if rank == 0:
        weights = {name.removeprefix("model."): tensor for name, tensor in expected.items()}
        save_file(weights, folder / "model.safetensors")
    dist.barrier()
    opened = set()
    sys.addaudithook(lambda event, args: opened.add(str(args[0])) if event == "open" else None)
    keys = ("--checkpoint.initial_weights", str(folder / name), "--job.seed", "7")
    trainer = tiny_trainer(folder / "new", "full_rank", *keys, num_ranks=NUM_RANKS)
    read = {file.rpartition("/")[2] for file in opened if file.endswith(("distcp", "safetensors"))}
    # Rank 0 compares checksums. A safetensors file is memory-mapped, not opened by Python.
    own = {f"__{rank}_0.distcp"} if name == "saved/run" else set()
    assert rank == 0 or read == own
    tensors = full_tensors(trainer)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())


PROJECTING = ("galore", "fira", "apollo", "apollo_mini")
PROJECTED = ("--method.update_interval", "2")
ROWS = {
    **{name: (check_replicas, name, *PROJECTED) for name in PROJECTING},
    "scale": (check_replicas, "full_rank", "--optimizer.name", "scale"),
    "muon": (check_replicas, "full_rank", "--optimizer.name", "muon"),
    "clipping": (check_replicas, "full_rank", "--training.max_grad_norm", "0.1"),
    **{f"difference on {rank}": (check_a_difference, rank) for rank in (0, 3)},
    "low_rank": (check_decompositions, "low_rank"),
    "sltrain": (check_decompositions, "sltrain"),
    "checkpoint": (check_warm_start, "saved/run"),
    "safetensors": (check_warm_start, "model.safetensors"),
}


def check_row(rank, name, folder):
    check, *args = ROWS[name]
    check(rank, folder / name, *args)


@pytest.fixture(scope="module")
def errors(corpora, request):
    (corpora / "shared").mkdir()
    return run_rows_on_ranks(NUM_RANKS, check_row, asked_for(request, ROWS), corpora / "shared")


@pytest.mark.parametrize("name", ROWS)
def test_ranks_share_a_start_and_replicas_stay_equal(errors, name):
    assert name not in errors, errors[name]
