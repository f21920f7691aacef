"""Estimates of a step follow from formulas; tests/ranks compares them with real ranks."""

import numpy as np
import pytest
from support.observed import communication_of_a_step, estimate_all_micro_batches
from support.tiny import model_on_meta, tiny_config

from switchtitan.errors import EnvironmentMismatchError
from switchtitan.methods.switchlora.plan import Plan
from switchtitan.methods.targets import linear_layers
from switchtitan.models import plain_model
from switchtitan.workbench.benchmark.counters import CollectiveCount
from switchtitan.workbench.benchmark.estimate import (
    USABLE_SHARE,
    estimate_step,
    largest_batch_sizes,
)

NUM_LAYERS = 2
GIB = 2**30
BF16 = ("--training.dtype", "bfloat16")
KEPT = ("--parallelism.reshard_after_forward", "false")
REPLICATED = ("--parallelism.frozen_weights", "replicate")


def one_pass(folder, method, *keys, num_ranks=1):
    """A configuration whose steps have one micro-batch, unless the keys say more: a step on fake
    tensors takes a second."""
    if "--training.global_batch_size" not in keys:
        keys = (*keys, "--training.global_batch_size", f"{2 * num_ranks}")
    return tiny_config(folder, method, *keys, num_ranks=num_ranks)


def memory_of(folder, method, *keys):
    return estimate_step(one_pass(folder, method, *keys), 1).memory


def units(config):
    """Parameters of each FSDP2 unit: the embedding, each block, and last norm with head."""
    model = model_on_meta(config)
    blocks = [list(block.parameters()) for block in model.blocks().values()]
    embedding, *rest = [
        [parameter for module in modules for parameter in module.parameters()]
        for modules in model.outer_units()
    ]
    return [embedding, *blocks, *rest]


def padded_numel(parameters, num_ranks):
    """Number of values sent: dimension 0 is padded to equal shards."""
    return sum(
        -(-p.shape[0] // num_ranks) * num_ranks * (p.numel() // p.shape[0]) for p in parameters
    )


def test_attention_that_needs_a_gpu_is_estimated_as_sdpa_or_refused(tmp_path):
    config = one_pass(tmp_path, "lora", *BF16)

    def memory_with(attention):
        model = config.model.model_copy(update={"attention": attention})
        return estimate_step(config.model_copy(update={"model": model}), 1).memory

    assert memory_with("flash_attn") == memory_with("sdpa")
    with pytest.raises(EnvironmentMismatchError, match=r"attention = 'flex'.*on a CPU"):
        memory_with("flex")


def test_many_micro_batches_are_estimated_from_few_with_the_flops_of_the_formula(tmp_path):
    keys = ("--training.local_batch_size", "1", "--training.global_batch_size", "10")
    config = tiny_config(tmp_path, "full_rank", *keys, num_ranks=2)
    found = estimate_step(config, 2)
    assert found == estimate_all_micro_batches(config, 2)
    assert found.forward_backward_flops == found.full_rank_flops
    assert found.flops_ratio == 1


def test_the_state_of_a_torch_optimizer_is_counted(tmp_path):
    memory = memory_of(tmp_path, "full_rank", "--optimizer.name", "sgd")
    # One momentum for each weight.
    assert memory.most["optimizer"] == memory.most["trained"]


def test_peaks_are_those_of_a_step_with_two_such_micro_batches(tmp_path):
    """They are measured in one run, whose batches change their size."""
    method, memory_gib = "galore", 0.003
    fit = largest_batch_sizes(tiny_config(tmp_path, method, *KEPT), 1, [memory_gib, 1e-6])
    largest = fit.batch_size[f"{memory_gib}"]
    assert fit.batch_size["1e-06"] == 0
    assert fit.peak[largest] <= USABLE_SHARE * memory_gib * GIB < fit.peak[largest + 1]
    for size in (largest, largest + 1):
        keys = ("--training.local_batch_size", f"{size}", "--training.global_batch_size")
        assert fit.peak[size] == memory_of(tmp_path, method, *keys, f"{2 * size}", *KEPT).peak


@pytest.mark.parametrize(
    ("method", "num_ranks", "dtype", "bytes_per_value", "local_batch_size", "keys"),
    [
        ("lora", 4, "float32", 4, 2, ()),
        ("lora", 4, "bfloat16", 2, 1, REPLICATED),
        ("full_rank", 3, "bfloat16", 2, 1, ()),
        ("lora", 2, "bfloat16", 2, 1, KEPT),
        ("lora", 4, "bfloat16", 2, 1, (*KEPT, *REPLICATED)),
    ],
)
def test_gathers_and_reductions_follow_from_the_parameters(
    tmp_path, method, num_ranks, dtype, bytes_per_value, local_batch_size, keys
):
    num_passes = 2
    config = tiny_config(
        tmp_path,
        method,
        *("--training.dtype", dtype, "--training.local_batch_size", f"{local_batch_size}"),
        *("--training.global_batch_size", f"{num_passes * num_ranks * local_batch_size}"),
        *keys,
        num_ranks=num_ranks,
    )
    parts = units(config)
    trained = [[parameter for parameter in unit if parameter.requires_grad] for unit in parts]
    # The embedding is not needed in the backward pass; the last block and the head are kept.
    gathers = [1, *[2] * (NUM_LAYERS - 1), 1, 1]
    if KEPT[0] in keys:
        gathers, num_passes = [1] * len(parts), 1
    gathered = sum(
        times * padded_numel(unit, num_ranks)
        for times, unit in zip(gathers, trained if REPLICATED[0] in keys else parts, strict=True)
    )
    share = (num_ranks - 1) / num_ranks
    counts = communication_of_a_step(config, num_ranks)
    assert counts["all_gather"] == CollectiveCount(
        num_passes * sum(gathers), pytest.approx(num_passes * gathered * bytes_per_value * share)
    )
    # In fp32, once per step for any number of micro-batches.
    reduced = 4 * sum(padded_numel(unit, num_ranks) for unit in trained) * share
    assert counts["reduce_scatter"] == CollectiveCount(len(parts), pytest.approx(reduced))
    # Clipping: one norm of each trained tensor, and whether the loss is finite, summed at once.
    num_values = sum(map(len, trained)) + 1
    norms = CollectiveCount(1, pytest.approx(2 * share * 4 * num_values))
    assert counts["all_reduce"] == norms
    assert counts["broadcast"].num_calls == 0


def test_a_switch_costs_one_all_reduce_of_the_packed_rows(tmp_path):
    num_ranks, step = 4, 2
    plain, switching = (
        one_pass(tmp_path, method, num_ranks=num_ranks) for method in ("lora", "switchlora")
    )
    without, sent = (communication_of_a_step(each, num_ranks, step) for each in (plain, switching))
    widths = [sum(p.shape) for unit in units(switching) for p in unit if not p.requires_grad]
    plan = Plan(switching.method, switching.training.steps, np.full(len(widths), 100))
    plan.step = step - 1
    # For both factors: vectors out, vectors in and counterparts.
    num_words = sum(3 * num * width for num, width in zip(plan.requested(), widths, strict=True))
    num_bytes = num_words * 4 * 2 * (num_ranks - 1) / num_ranks
    num_calls, bytes_sent = without["all_reduce"]
    assert sent == without | {"all_reduce": CollectiveCount(num_calls + 1, bytes_sent + num_bytes)}


def test_an_estimate_counts_candidates_on_the_host_apart(tmp_path):
    keys = ("--method.candidates_device", "host")
    config = tiny_config(tmp_path, "switchlora", *keys, num_ranks=2)
    most = estimate_step(config, 2).memory.most
    layers = linear_layers(plain_model(config.model)).values()
    # The first of two ranks has half of the rows, rounded up, in fp32.
    num_elements = sum(
        -(-min(layer.weight.shape) // 2) * sum(layer.weight.shape) for layer in layers
    )
    assert most["host"] == 4 * num_elements
    assert most["buffers"] == 0
