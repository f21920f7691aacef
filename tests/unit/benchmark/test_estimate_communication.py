"""A step's communication follows from the parameters, and equals that of real ranks."""

from pathlib import Path

import pytest
import torch
from support.ranks import run_on_ranks
from support.tiny import COMPILED, tiny_config, tiny_trainer, train_steps
from torch import nn

from switchtitan.benchmark.estimate import communication_of_a_step
from switchtitan.distributed.count_collectives import (
    CollectiveCount,
    CommunicationCounts,
    CountCommunication,
)
from switchtitan.distributed.shards import rows_per_rank
from switchtitan.job.config import JobConfig
from switchtitan.methods import METHODS
from switchtitan.methods.switchlora.schedule import SwitchSchedule
from switchtitan.models import MODELS

NUM_LAYERS = 2


def units(config: JobConfig) -> list[list[nn.Parameter]]:
    """Parameters of each FSDP2 unit: the embedding, each block, and last norm with head."""
    with torch.device("meta"):
        model = MODELS.build(config.model)
    METHODS.build(config.method, config.training.steps, config.job.seed).prepare_model(model)
    blocks = [list(block.parameters()) for block in model.blocks().values()]
    embedding, *rest = [
        [parameter for module in modules for parameter in module.parameters()]
        for modules in model.outer_units()
    ]
    return [embedding, *blocks, *rest]


def padded_numel(parameters: list[nn.Parameter], num_ranks: int) -> int:
    """Number of values sent: dimension 0 is padded to equal shards."""
    return sum(
        -(-p.shape[0] // num_ranks) * num_ranks * (p.numel() // p.shape[0]) for p in parameters
    )


@pytest.mark.parametrize("method", ["full_rank", "lora"])
@pytest.mark.parametrize(
    ("num_ranks", "dtype", "bytes_per_value", "reshard", "local_batch_size"),
    [(4, "float32", 4, "true", 2), (3, "bfloat16", 2, "true", 1), (2, "bfloat16", 2, "false", 1)],
)
def test_gathers_and_reductions_follow_from_the_parameters(
    tmp_path: Path,
    method: str,
    num_ranks: int,
    dtype: str,
    bytes_per_value: int,
    reshard: str,
    local_batch_size: int,
) -> None:
    num_micro_batches = 2
    config = tiny_config(
        tmp_path,
        method,
        *("--training.dtype", dtype, "--training.local_batch_size", str(local_batch_size)),
        *("--training.global_batch_size", str(num_micro_batches * num_ranks * local_batch_size)),
        *("--parallelism.reshard_after_forward", reshard),
        num_ranks=num_ranks,
    )
    parts = units(config)
    # The embedding is not needed in the backward pass; the last block and the head are kept.
    gathers = [1, *[2] * (NUM_LAYERS - 1), 1, 1]
    num_passes = num_micro_batches
    if reshard == "false":
        gathers, num_passes = [1] * len(parts), 1
    gathered = sum(
        times * padded_numel(unit, num_ranks) for times, unit in zip(gathers, parts, strict=True)
    )
    trained = [[parameter for parameter in unit if parameter.requires_grad] for unit in parts]
    share = (num_ranks - 1) / num_ranks
    counts = communication_of_a_step(config, num_ranks)
    assert counts["all_gather"] == CollectiveCount(
        num_passes * sum(gathers), pytest.approx(num_passes * gathered * bytes_per_value * share)
    )
    # In fp32, once per step for any number of micro-batches.
    assert counts["reduce_scatter"] == CollectiveCount(
        len(parts),
        pytest.approx(4 * sum(padded_numel(unit, num_ranks) for unit in trained) * share),
    )
    # Clipping: one norm of each trained tensor, and whether the loss is finite, summed at once.
    num_values = sum(map(len, trained)) + 1
    norms = CollectiveCount(1, pytest.approx(2 * share * 4 * num_values))
    assert counts["all_reduce"] == norms
    assert counts["broadcast"].num_calls == 0


def test_a_switch_costs_one_all_reduce_of_the_packed_rows(tmp_path: Path) -> None:
    num_ranks, step = 4, 2
    lora = tiny_config(tmp_path, "lora", num_ranks=num_ranks)
    switchlora = tiny_config(tmp_path, "switchlora", num_ranks=num_ranks)
    without = communication_of_a_step(lora, num_ranks, step)
    with_switch = communication_of_a_step(switchlora, num_ranks, step)
    widths = [sum(shape) for unit in units(switchlora) for shape in shapes_of_adapted(unit)]
    requested = SwitchSchedule(switchlora.method, switchlora.training.steps, len(widths)).requested(
        step - 1
    )
    # For both factors: vectors out, vectors in and counterparts; and each rank's checksum.
    num_words = num_ranks + sum(
        3 * count * width for count, width in zip(requested, widths, strict=True)
    )
    assert with_switch["all_reduce"].num_calls == without["all_reduce"].num_calls + 1
    assert_sent_with_padding(
        with_switch["all_reduce"].bytes_sent - without["all_reduce"].bytes_sent,
        2 * 3 / 4,
        num_words,
    )
    for kind in ("all_gather", "reduce_scatter", "broadcast"):
        assert with_switch[kind] == without[kind]


def assert_sent_with_padding(num_bytes: float, passes: float, num_words: int) -> None:
    """Padding is at most an eighth, or 1024 words for short buffers."""
    assert (
        passes * 4 * num_words <= num_bytes <= passes * 4 * (num_words + max(num_words / 8, 1024))
    )


def shapes_of_adapted(unit: list[nn.Parameter]) -> list[torch.Size]:
    """[out, in] of each adapted layer of a unit, from its frozen weight."""
    return [parameter.shape for parameter in unit if not parameter.requires_grad]


@pytest.mark.parametrize("num_micro_batches", [1, 2])
def test_replicated_frozen_weights_are_not_sent(tmp_path: Path, num_micro_batches: int) -> None:
    num_ranks, step = 4, 2
    batches = (
        "--training.local_batch_size",
        "1",
        "--training.global_batch_size",
        str(4 * num_micro_batches),
    )
    sharded, replicated = (
        tiny_config(
            tmp_path,
            "switchlora",
            *("--training.dtype", "bfloat16", *batches),
            *("--parallelism.frozen_weights", frozen_weights),
            num_ranks=num_ranks,
        )
        for frozen_weights in ("shard", "replicate")
    )
    frozen = frozen_of_blocks(replicated)
    share = (num_ranks - 1) / num_ranks
    before, after = (
        communication_of_a_step(config, num_ranks, step) for config in (sharded, replicated)
    )
    for kind in ("reduce_scatter", "all_reduce", "broadcast"):
        assert after[kind] == before[kind]
    # In bf16, in the forward and in the backward pass; the last block is kept in between.
    gathers = [2] * (NUM_LAYERS - 1) + [1]
    saved = (
        num_micro_batches
        * 2
        * share
        * sum(
            times * padded_numel(weights, num_ranks)
            for times, weights in zip(gathers, frozen, strict=True)
        )
    )
    assert after["all_gather"].num_calls == before["all_gather"].num_calls
    assert after["all_gather"].bytes_sent == pytest.approx(
        before["all_gather"].bytes_sent - saved, rel=1e-9
    )


def frozen_of_blocks(config: JobConfig) -> list[list[nn.Parameter]]:
    _, *blocks, _ = units(config)
    return [[parameter for parameter in block if not parameter.requires_grad] for block in blocks]


@pytest.mark.parametrize("num_micro_batches", [1, 3])
def test_frozen_weights_are_sent_once_per_step(tmp_path: Path, num_micro_batches: int) -> None:
    num_ranks = 4
    batches = ("--training.global_batch_size", str(8 * num_micro_batches))
    kept, replicated = (
        communication_of_a_step(
            tiny_config(
                tmp_path,
                "switchlora",
                *("--training.dtype", "bfloat16", *batches, *keys),
                num_ranks=num_ranks,
            ),
            num_ranks,
        )
        for keys in (
            ("--parallelism.frozen_weights", "gather_once"),
            ("--parallelism.frozen_weights", "replicate"),
        )
    )
    config = tiny_config(tmp_path, "switchlora", *batches, num_ranks=num_ranks)
    sent = sum(padded_numel(weights, num_ranks) for weights in frozen_of_blocks(config))
    assert kept["all_gather"].num_calls == replicated["all_gather"].num_calls + NUM_LAYERS
    assert kept["all_gather"].bytes_sent == pytest.approx(
        replicated["all_gather"].bytes_sent + 2 * 3 / 4 * sent, rel=1e-9
    )
    for kind in ("reduce_scatter", "all_reduce", "broadcast"):
        assert kept[kind] == replicated[kind]


def test_a_unit_of_several_blocks_sends_the_same_bytes_in_fewer_collectives(tmp_path: Path) -> None:
    single, double = (
        communication_of_a_step(
            tiny_config(
                tmp_path,
                "lora",
                *("--model.num_layers", "5", "--parallelism.blocks_per_unit", size),
                *("--parallelism.reshard_after_forward", "false"),
                num_ranks=2,
            ),
            2,
        )
        for size in ("1", "2")
    )
    for kind in ("all_gather", "reduce_scatter"):
        assert (single[kind].num_calls, double[kind].num_calls) == (5 + 2, 3 + 2)
        assert double[kind].bytes_sent == pytest.approx(single[kind].bytes_sent, rel=1e-9)


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_sharded_accumulation_reduces_every_micro_batch_and_replicas_once(
    tmp_path: Path, num_replicas: int
) -> None:
    full, sharded = (
        communication_of_a_step(
            tiny_config(
                tmp_path,
                "full_rank",
                *("--training.global_batch_size", "24"),
                *("--parallelism.replicate", str(num_replicas)),
                *("--parallelism.accumulate_gradients", accumulate),
                num_ranks=4,
            ),
            4,
        )
        for accumulate in ("full", "sharded")
    )
    assert sharded["reduce_scatter"].num_calls == 3 * full["reduce_scatter"].num_calls
    assert sharded["reduce_scatter"].bytes_sent == 3 * full["reduce_scatter"].bytes_sent
    for kind in ("all_gather", "all_reduce"):
        assert sharded[kind] == full[kind]


def test_replicas_exchange_shards_of_gradients(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "full_rank", "--parallelism.replicate", "2", num_ranks=4)
    counts = communication_of_a_step(config, 4)
    num_bytes = 4 * sum(padded_numel(unit, 2) for unit in units(config))
    assert counts["reduce_scatter"] == CollectiveCount(NUM_LAYERS + 2, num_bytes / 2)
    # Shards of half the size between two replicas, and the norms for clipping over all four ranks.
    norms = 4 * (sum(map(len, units(config))) + 1) + 2 * 3 / 4 * 4
    assert counts["all_reduce"].bytes_sent == pytest.approx(num_bytes / 2 + norms, rel=1e-9)


def test_muon_sends_momentum_to_owners_and_updates_back(tmp_path: Path) -> None:
    keys = ("full_rank", "--optimizer.name", "muon", "--training.dtype", "bfloat16")
    config = tiny_config(tmp_path, *keys, num_ranks=2)
    with_adamw = tiny_config(tmp_path, "full_rank", *keys[3:], num_ranks=2)
    counts, usual = (communication_of_a_step(c, 2) for c in (config, with_adamw))
    shapes = config.model.linear_shapes()
    in_blocks = [shape for name, shape in shapes.items() if name.startswith("model.layers.")]
    # Both ranks own half of the matrices of each shape, so that each sends half of its rows.
    rows = sum(rows_per_rank(out, 2) * width for out, width in in_blocks)
    assert counts["all_to_all"] == CollectiveCount(2, 2 * 2 * rows / 2)
    assert {**counts, "all_to_all": usual["all_to_all"]} == usual


def test_muon_on_factors_adds_two_collectives_to_those_of_a_switch(tmp_path: Path) -> None:
    keys = ("--optimizer.name", "muon")
    config = tiny_config(tmp_path, "switchlora", *keys, num_ranks=2)
    with_adamw = tiny_config(tmp_path, "switchlora", num_ranks=2)
    counts, usual = (communication_of_a_step(c, 2) for c in (config, with_adamw))
    shapes = config.model.linear_shapes()
    in_blocks = [shape for name, shape in shapes.items() if name.startswith("model.layers.")]
    # 6 vectors of each factor, 3 on each rank; a rank sends half of its rows each way.
    sent = 2 * 4 * sum(3 * width for shape in in_blocks for width in shape) / 2
    assert counts["all_to_all"].num_calls == 2
    # Owners may have unequal work.
    assert counts["all_to_all"].bytes_sent == pytest.approx(sent, rel=0.3)
    assert usual["all_to_all"].num_calls == 0
    assert {**counts, "all_to_all": usual["all_to_all"]} == usual


@pytest.mark.parametrize("method", ["full_rank", "lora", "low_rank", "switchlora"])
def test_muon_exchanges_rows_in_the_compute_dtype(tmp_path: Path, method: str) -> None:
    sent = {}
    for dtype in ("float32", "bfloat16"):
        keys = ("--optimizer.name", "muon", "--training.dtype", dtype)
        config = tiny_config(tmp_path, method, *keys, num_ranks=2)
        sent[dtype] = communication_of_a_step(config, 2)["all_to_all"].bytes_sent
    assert sent["float32"] == 2 * sent["bfloat16"] > 0


def test_one_rank_sends_nothing(tmp_path: Path) -> None:
    counts = communication_of_a_step(tiny_config(tmp_path, "switchlora"), 1)
    assert {count.bytes_sent for count in counts.values()} == {0.0}


def check_compiled_run(rank: int, folder: Path, expected: CommunicationCounts) -> None:
    torch._dynamo.reset()
    trainer = tiny_trainer(
        folder / "compiled", "switchlora", *COMPILED, "--metrics.communication", "true", num_ranks=2
    )
    (communication,) = trainer.hooks
    for step in range(1, 6):
        with torch._dynamo.config.patch(error_on_recompile=step > 2), communication.around(step):
            trainer.stepper.step()
        if communication.is_due(step):
            communication.after(step)
    trainer.stepper.close()
    sent_mib = sum(count.bytes_sent for count in expected.values()) / 2**20
    assert communication.mib_per_step == pytest.approx(sent_mib, rel=1e-9)


def test_a_compiled_run_counts_its_third_step_without_recompilation(corpora: Path) -> None:
    expected = communication_of_a_step(
        tiny_config(corpora / "fake", "switchlora", num_ranks=2), 2, step=3
    )
    run_on_ranks(2, check_compiled_run, corpora, expected)


def check_counts(rank: int, folder: Path, expected: dict[str, CommunicationCounts]) -> None:
    for method, counts in expected.items():
        trainer = tiny_trainer(folder / f"real-{method}", method, num_ranks=2)
        train_steps(trainer, 1)
        with CountCommunication() as counter:
            trainer.stepper.step()
        trainer.stepper.close()
        assert counter.counts == counts, method


def test_two_real_ranks_communicate_the_same(corpora: Path) -> None:
    expected = {
        method: communication_of_a_step(tiny_config(corpora / "fake", method, num_ranks=2), 2)
        for method in ("full_rank", "switchlora")
    }
    run_on_ranks(2, check_counts, corpora, expected)
