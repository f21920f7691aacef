"""ReLoRA's resets are the same on any number of ranks."""

import torch
from support.ranks import run_on_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from switchtitan.distributed.seeds import generator_for
from switchtitan.distributed.shards import copy_from_full_, full_tensor
from switchtitan.methods.lowrank import LowRankLinear, lora_init
from switchtitan.methods.relora import (
    merge_and_restart_,
    prune_at_random_,
    prune_by_magnitude_,
)

# 11 rows of W, 3 of A and B: uneven over 2 ranks; one of 4 ranks holds none of A and B.
OUT, IN, RANK = 11, 5, 3


def reset_and_prune(rank, result_file, num_ranks):
    layer = LowRankLinear(IN, OUT, RANK, 0.5, lora_init)
    if num_ranks > 1:
        fully_shard(layer, mesh=init_device_mesh("cpu", (num_ranks,)))
    for name, parameter in layer.named_parameters():
        copy_from_full_(parameter, torch.randn(parameter.shape, generator=generator_for(0, name)))
    moments = {
        f"{how}.{name}.{key}": torch.zeros_like(factor, requires_grad=False)
        for how in ("magnitude", "lot")
        for name, factor in (("a", layer.lora_a), ("b", layer.lora_b))
        for key in ("exp_avg", "exp_avg_sq")
    }
    for name, moment in moments.items():
        # Rounded, so that there are ties, which ranks must break equally.
        copy_from_full_(
            moment,
            torch.randn(moment.shape, generator=generator_for(1, name)).mul_(4).round_().abs_(),
        )
    merge_and_restart_(layer, generator_for(2, "lora_a"))
    for name in ("a", "b"):
        by_magnitude = moments[f"magnitude.{name}.exp_avg"], moments[f"magnitude.{name}.exp_avg_sq"]
        prune_by_magnitude_(*by_magnitude, 0.6)
        by_lot = moments[f"lot.{name}.exp_avg"], moments[f"lot.{name}.exp_avg_sq"]
        prune_at_random_(*by_lot, 0.6, generator_for(3, name))
    tensors = {
        name: full_tensor(tensor.detach())
        for name, tensor in (dict(layer.named_parameters()) | moments).items()
    }
    if rank == 0:
        torch.save(tensors, result_file)


def test_a_reset_of_shards_equals_that_of_full_tensors(tmp_path):
    reset_and_prune(0, tmp_path / "1.pt", 1)
    one = torch.load(tmp_path / "1.pt")
    assert one["magnitude.b.exp_avg"].any()
    assert not one["lora_b"].any()
    for num_ranks in (2, 4):
        run_on_ranks(num_ranks, reset_and_prune, tmp_path / f"{num_ranks}.pt", num_ranks)
        several = torch.load(tmp_path / f"{num_ranks}.pt")
        # A product of fewer rows may sum in another order: roundings of 6e-8 of values of order 1.
        torch.testing.assert_close(several.pop("weight"), one["weight"], rtol=0, atol=1e-6)
        for name, tensor in several.items():
            assert torch.equal(tensor, one[name]), (num_ranks, name)
