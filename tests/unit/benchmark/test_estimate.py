"""Estimates without hardware equal measurements on real ranks, and formulas."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from support.ranks import run_on_ranks
from support.tiny import tiny_config, tiny_stepper
from torch import Tensor

from switchtitan.benchmark.estimate import StepEstimate, estimate_step, measure_step
from switchtitan.benchmark.memory_tracker import GRADIENTS, KINDS, STATE, TEMPORARY
from switchtitan.benchmark.peak_memory import peak_extra_bytes
from switchtitan.contracts import Batch, TrainingOptimizer
from switchtitan.distributed.shards import local
from switchtitan.methods.lowrank.contraction import (
    cheapest_contraction,
    factored,
    merged,
    num_flops,
)
from switchtitan.models import MODELS
from switchtitan.training.stepper import Stepper

SEQ_LEN = 16
MUON = ("--optimizer.name", "muon")
REPLICATED = ("--parallelism.frozen_weights", "replicate", "--training.dtype", "bfloat16")
KEPT = (
    *("--parallelism.frozen_weights", "gather_once", "--parallelism.blocks_per_unit", "2"),
    *("--parallelism.accumulate_gradients", "sharded", "--parallelism.reshard_after_forward"),
    "false",
)
NUM_MEASURED_STEPS = 5
NUM_PROFILED_STEPS = 10
"""In some steps a process group frees reduced tensors late, which increases the peak by 4 %. The
minimum is that of a step in which it does not."""


def num_bytes(tensors: Sequence[Tensor]) -> int:
    return sum(local(tensor).nbytes for tensor in tensors)


def kept_state(optimizer: TrainingOptimizer) -> list[Tensor]:
    """Tensors of an optimizer's state_dict that it does not create for the call."""
    first, second = optimizer.state_dict(), optimizer.state_dict()
    return [
        tensor
        for key, tensor in first.items()
        if local(tensor).data_ptr() == local(second[key]).data_ptr() or local(tensor).numel() == 0
    ]


def count_state(stepper: Stepper) -> dict[str, int]:
    """Bytes of a real stepper's tensors by kind; runs a step."""
    parameters = list(stepper.model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    counted = {
        "trained": num_bytes(trained),
        "frozen": num_bytes([parameter for parameter in parameters if not parameter.requires_grad]),
        "buffers": num_bytes(list(stepper.model.buffers())),
        "optimizer": num_bytes(kept_state(stepper.optimizer)),
    }
    result = stepper.compute_gradients()
    counted["gradients"] = num_bytes([p.grad for p in trained if p.grad is not None])
    stepper.optimizer.step()
    stepper.finish_step(result)
    return counted


def check_estimates(
    rank: int, folder: Path, num_ranks: int, expected: dict[tuple[str, ...], StepEstimate]
) -> None:
    for index, (side, estimate) in enumerate(expected.items()):
        method, *overrides = side
        config = tiny_config(
            folder / f"real-{num_ranks}-{index}", method, *overrides, num_ranks=num_ranks
        )
        stepper = tiny_stepper(config)
        stepper.step()
        steps = [measure_step(stepper, SEQ_LEN) for _ in range(NUM_MEASURED_STEPS)]
        measured = min(steps, key=lambda step: sum(step.memory.at_peak.values()))
        assert measured.communication == estimate.communication, method
        assert measured.forward_backward_flops == estimate.forward_backward_flops, method
        counted = count_state(stepper)
        # Other ranks' shards may be smaller.
        if rank == 0:
            # Allocation and release do not depend on values.
            assert measured.memory.at_peak == estimate.memory.at_peak, method
            # A real process group frees reduced tensors asynchronously, in some steps late.
            for kind in KINDS.keys() - {TEMPORARY}:
                most = [step.memory.most[kind] for step in steps]
                assert min(most) == estimate.memory.most[kind], (method, kind, most)
            # Not in a checkpoint: AdamW's learning rate in fp32, a flag, and a number for each
            # vector.
            num_vectors = sum(
                local(parameter).shape[0]
                for name, parameter in stepper.model.named_parameters()
                if "lora_" in name
            )
            num_rates = 0 if "muon" in side else 1
            if counted["buffers"]:
                counted["optimizer"] += 4 * num_rates + 1 + 8 * num_vectors
            assert {kind: estimate.memory.most[kind] for kind in STATE} == counted, method
        allocated = min(
            peak_extra_bytes(stepper.step, stepper.world.device) for _ in range(NUM_PROFILED_STEPS)
        )
        if rank == 0:
            lasting_kinds = [kind for kind in STATE if kind != GRADIENTS]
            expected_bytes = estimate.memory.peak - sum(
                estimate.memory.most[kind] for kind in lasting_kinds
            )
            # Two numbers of 8 bytes and one of 4 for each token of a batch, not in an estimate. A
            # peak in the update is after the batch was freed.
            batches = config.training.global_batch_size // num_ranks * SEQ_LEN * (8 + 8 + 4)
            # 1 % for scalars. A CPU's products in bf16 allocate workspaces, not in an estimate.
            tolerance = 0.05 if config.training.dtype == "bfloat16" else 0.01
            low, high = expected_bytes, expected_bytes + batches
            assert low * (1 - tolerance) <= allocated <= high * (1 + tolerance), method
        stepper.close()


@pytest.mark.parametrize(
    ("num_ranks", "sides"),
    [
        (1, [("lora",)]),
        (2, [("full_rank",), ("switchlora",), ("switchlora", *REPLICATED)]),
        (2, [("switchlora", *KEPT)]),
        (2, [("full_rank", *MUON), ("switchlora", *MUON)]),
    ],
)
def test_real_ranks_hold_send_and_compute_the_estimates(
    corpora: Path, num_ranks: int, sides: list[tuple[str, ...]]
) -> None:
    """Each side is a method with overrides."""
    expected = {
        side: estimate_step(tiny_config(corpora / "fake", *side, num_ranks=num_ranks), num_ranks)
        for side in sides
    }
    run_on_ranks(num_ranks, check_estimates, corpora, num_ranks, expected)


def test_full_rank_flops_equal_the_formula(tmp_path: Path) -> None:
    found = estimate_step(tiny_config(tmp_path, "full_rank", num_ranks=2), 2)
    assert found.forward_backward_flops == found.full_rank_flops
    assert found.flops_ratio == 1


@pytest.mark.parametrize(("local_batch_size", "contraction"), [(1, factored), (2, merged)])
def test_low_rank_flops_equal_those_of_the_contraction(
    tmp_path: Path, local_batch_size: int, contraction: object
) -> None:
    num_micro_batches, rank = 2, 6
    batches = (
        *("--training.local_batch_size", str(local_batch_size)),
        *("--training.global_batch_size", str(num_micro_batches * local_batch_size)),
    )
    config = tiny_config(tmp_path, "lora", *batches)
    found = estimate_step(config, 1)
    num_tokens = local_batch_size * SEQ_LEN
    with torch.device("meta"):
        plain = MODELS.build(config.model)
    shapes = [
        (module.out_features, module.in_features)
        for name, module in plain.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    # The square layers at least: the cheapest of the three contractions for this many tokens.
    assert cheapest_contraction(20, 20, rank, num_tokens) is contraction
    extra = sum(
        num_flops(cheapest_contraction(*shape, rank, num_tokens), *shape, rank, num_tokens)
        - 6 * shape[0] * shape[1] * num_tokens
        for shape in shapes
    )
    expected = found.full_rank_flops + num_micro_batches * extra
    assert found.forward_backward_flops == expected
    assert found.update_flops == 0
    assert found.flops_ratio == expected / found.full_rank_flops


@pytest.mark.parametrize("method", ["full_rank", "switchlora", "galore"])
def test_many_micro_batches_are_estimated_from_few(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = ("--training.local_batch_size", "1", "--training.global_batch_size", "14")
    config = tiny_config(tmp_path, method, *batches, num_ranks=2)
    estimated = estimate_step(config, 2)
    simulated = []

    def count(stepper: Stepper, micro_batches: list[Batch]) -> Tensor:
        simulated.append(len(micro_batches))
        return forward_backward(stepper, micro_batches)

    forward_backward = Stepper.forward_backward
    monkeypatch.setattr(Stepper, "forward_backward", count)
    assert estimate_step(config, 2) == estimated
    assert max(simulated) == 3
    monkeypatch.setattr("switchtitan.benchmark.estimate._NUM_SIMULATED", 7)
    assert estimate_step(config, 2) == estimated
    assert max(simulated) == 7


def test_the_state_of_a_torch_optimizer_is_counted(tmp_path: Path) -> None:
    memory = estimate_step(tiny_config(tmp_path, "full_rank", "--optimizer.name", "sgd"), 1).memory
    # One momentum for each weight.
    assert memory.most["optimizer"] == memory.most["trained"]


def test_muon_has_one_moment_for_matrices_in_blocks_and_two_for_all_else(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "full_rank", "--optimizer.name", "muon")
    with torch.device("meta"):
        model = MODELS.build(config.model)
    numels = {name: parameter.numel() for name, parameter in model.named_parameters()}
    shapes = config.model.linear_shapes()
    in_blocks = sum(numels[f"{name}.weight"] for name in shapes if name.startswith("model.layers."))
    others = len(numels) - 7 * config.model.num_layers
    memory = estimate_step(config, 1).memory
    # fp32, and a step count for each of AdamW's parameters.
    expected = 4 * (2 * sum(numels.values()) - in_blocks + others)
    assert memory.most["optimizer"] == expected
    with_adamw = estimate_step(tiny_config(tmp_path, "full_rank"), 1).memory
    assert with_adamw.most["optimizer"] > expected


def test_muon_has_one_moment_for_factors_and_no_step_counts(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "switchlora", *MUON)
    with_adamw, with_muon = (
        estimate_step(config, 1).memory.most["optimizer"]
        for config in (tiny_config(tmp_path, "switchlora"), config)
    )
    shapes = config.model.linear_shapes()
    layers = [shape for name, shape in shapes.items() if name.startswith("model.layers.")]
    rank, num_factors = 6, 2 * len(layers)
    moments = rank * sum(out + width for out, width in layers)
    # fp32. Also AdamW's learning rate, which is a tensor.
    assert with_adamw - with_muon == 4 * (moments + rank * num_factors + 1)


def test_kept_frozen_weights_and_sharded_gradients_are_counted(tmp_path: Path) -> None:
    keys = {
        "neither": (),
        "kept": ("--parallelism.frozen_weights", "gather_once"),
        "sharded": ("--parallelism.accumulate_gradients", "sharded"),
    }
    memory = {
        name: estimate_step(
            tiny_config(tmp_path, "switchlora", *("--model.num_layers", "6", *key), num_ranks=2), 2
        ).memory
        for name, key in keys.items()
    }
    with torch.device("meta"):
        plain = MODELS.build(tiny_config(tmp_path, "full_rank", "--model.num_layers", "6").model)
    weights = 4 * sum(
        module.weight.numel()
        for block in plain.blocks().values()
        for module in block.modules()
        if isinstance(module, torch.nn.Linear)
    )
    assert memory["neither"].most["gathered"] < weights <= memory["kept"].most["gathered"]
    assert memory["kept"].state == memory["neither"].state
    unreduced = "unreduced gradients"
    assert memory["sharded"].most[unreduced] < memory["neither"].most[unreduced] / 2


def test_activation_checkpointing_trades_memory_for_flops(tmp_path: Path) -> None:
    plain, checkpointed = (
        estimate_step(tiny_config(tmp_path, "full_rank", "--activation_checkpoint.mode", mode), 1)
        for mode in ("none", "full")
    )
    assert checkpointed.memory.most["activations"] < plain.memory.most["activations"]
    assert checkpointed.memory.state == plain.memory.state
    assert checkpointed.flops_ratio > plain.flops_ratio


def test_block_inputs_in_host_memory_are_not_in_the_sums(tmp_path: Path) -> None:
    kept, offloaded = (
        estimate_step(
            tiny_config(
                tmp_path,
                "full_rank",
                *("--model.num_layers", "4"),
                *("--activation_checkpoint.mode", "full"),
                *("--activation_checkpoint.offload", offload),
            ),
            1,
        ).memory
        for offload in ("false", "true")
    )
    # Two sequences of 16 tokens, hidden size 20, fp32.
    num_bytes_of_block = 2 * 16 * 20 * 4
    num_bytes = 4 * num_bytes_of_block
    assert kept.most["host"] == 0
    assert offloaded.most["host"] == num_bytes
    # The last block's input stays on the device, since backward starts with it.
    assert (
        kept.most["activations"] - offloaded.most["activations"] == num_bytes - num_bytes_of_block
    )
    assert offloaded.state == kept.state
    # During a block's backward pass, its own input and the one before it are on the device.
    assert kept.peak - num_bytes < offloaded.peak <= kept.peak - num_bytes_of_block


def test_the_peak_is_at_most_the_sum_of_the_maxima(tmp_path: Path) -> None:
    memory = estimate_step(tiny_config(tmp_path, "switchlora"), 1).memory
    assert all(memory.at_peak[kind] <= memory.most[kind] for kind in memory.most)
    assert memory.state < memory.peak <= sum(memory.most.values())


@pytest.mark.parametrize("is_freed", ["true", "false"])
def test_embedding_and_head_are_counted_as_gathered(tmp_path: Path, is_freed: str) -> None:
    """They are units of their own: the hooks of their own calls gather them."""
    keys = ("--model.vocab_size", "4000", "--parallelism.reshard_after_forward", is_freed)
    config = tiny_config(tmp_path, "full_rank", *keys, num_ranks=2)
    memory = estimate_step(config, 2).memory
    dtype_bytes = 4 if config.training.dtype == "float32" else 2
    matrix = 4000 * config.model.dimensions().hidden_size * dtype_bytes
    at_once = 1 if is_freed == "true" else 2
    blocks = memory.most["gathered"] - at_once * matrix
    assert 0 < blocks < matrix
