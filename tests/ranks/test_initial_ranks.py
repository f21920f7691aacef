"""Ranks share the start of a model: each reads the rows that it holds, and decomposes a part."""

import sys

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from support.layouts import asked_for
from support.ranks import run_rows_on_ranks
from support.tiny import full_tensors, tiny_trainer
from torch.utils._python_dispatch import TorchDispatchMode


class CountDecompositions(TorchDispatchMode):
    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += str(function) == "aten._linalg_eigh.default"
        return function(*args, **(kwargs or {}))


def check_decompositions(rank, folder, method):
    with CountDecompositions() as counted:
        trainer = tiny_trainer(folder, method, num_ranks=2)
    assert counted.number == 7, "half of two blocks of seven layers"
    trainer.stepper.close()


def check_files(rank, folder, kind):
    saved = tiny_trainer(folder / "saved", "full_rank", num_ranks=2)
    saved.save()
    expected = {
        name.removeprefix("model."): tensor
        for name, tensor in full_tensors(saved).items()
        if name.startswith("model.")
    }
    source = folder / "model.safetensors" if kind == "safetensors" else folder / "saved" / "run"
    if rank == 0:
        save_file(expected, folder / "model.safetensors")
    dist.barrier()
    opened = set()
    sys.addaudithook(
        lambda event, args: opened.add(str(args[0]).rpartition("/")[2]) if event == "open" else None
    )
    keys = ("--checkpoint.initial_weights", str(source), "--job.seed", "7")
    trainer = tiny_trainer(folder / "new", "full_rank", *keys, num_ranks=2)
    if rank == 1:  # the other one compares checksums
        own = {"checkpoint": {"__1_0.distcp"}, "safetensors": set()}[kind]
        assert {name for name in opened if name.endswith((".distcp", ".safetensors"))} == own
    for name, tensor in full_tensors(trainer).items():
        if name.startswith("model."):
            assert torch.equal(tensor, expected[name.removeprefix("model.")]), name


ROWS = {
    **{method: (check_decompositions, method) for method in ("low_rank", "sltrain")},
    **{kind: (check_files, kind) for kind in ("checkpoint", "safetensors")},
}


def check_one(rank, name, folder):
    check, *args = ROWS[name]
    check(rank, folder / name, *args)


@pytest.fixture(scope="module")
def errors(corpora, request):
    folder = corpora / "initial"
    folder.mkdir()
    return run_rows_on_ranks(2, check_one, asked_for(request, ROWS), folder)


@pytest.mark.parametrize("name", ROWS)
def test_ranks_share_the_start(errors, name):
    assert name not in errors, errors[name]
