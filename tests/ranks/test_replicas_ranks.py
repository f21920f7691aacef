"""Replicas stay equal if their shard groups sum in different orders."""

import pytest
import torch
from support.layouts import LAYOUTS, asked_for
from support.ranks import run_rows_on_ranks
from support.tiny import tiny_trainer, train_steps
from torch.utils._python_dispatch import TorchDispatchMode

PROJECTED = ("--method.update_interval", "2")
ROWS = {
    "clipping": ("full_rank", "--training.max_grad_norm", "0.1"),
    "scale": ("full_rank", "--optimizer.name", "scale"),
    "muon": ("full_rank", "--optimizer.name", "muon"),
    "switchlora": ("switchlora", "--method.interval", "3", "--method.freeze_steps", "1"),
    **{name: (name, *PROJECTED) for name in ("galore", "fira", "apollo", "apollo_mini")},
}


class AnotherOrder(TorchDispatchMode):
    """Changes the last bits of what this rank adds to a sum, as another order of the sum would."""

    num_sums = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        c10d = torch.ops.c10d
        if function in (c10d.allreduce_.default, c10d._reduce_scatter_base_.default):
            (summand,) = args[0] if function is c10d.allreduce_.default else (args[1],)
            if summand.is_floating_point():
                summand.mul_(1 + 1e-6)
                self.num_sums += 1
        return function(*args, **(kwargs or {}))


def train(rank, name, folder):
    num_ranks, placement = LAYOUTS["two_by_two"]
    method, *keys = ROWS[name]
    trainer = tiny_trainer(folder / name, method, *keys, *placement, num_ranks=num_ranks)
    if rank == num_ranks - 1:
        with AnotherOrder() as order:
            train_steps(trainer, 4)
        assert order.num_sums
    else:
        train_steps(trainer, 4)
    trainer.check_ranks()
    trainer.stepper.close()


@pytest.fixture(scope="module")
def errors(corpora, request):
    folder = corpora / "replicas"
    folder.mkdir()
    return run_rows_on_ranks(4, train, asked_for(request, ROWS), folder)


@pytest.mark.parametrize("name", ROWS)
def test_replicas_stay_equal_if_one_sums_in_another_order(errors, name):
    assert name not in errors, errors[name]
