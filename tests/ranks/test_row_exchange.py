"""Rows of shards reach every rank bitwise, and a step needs the expected collectives."""

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.ranks import run_on_ranks
from support.tiny import full_tensors, tiny_config, tiny_trainer
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.profiler import ProfilerActivity, profile

from switchtitan.data import open_corpus
from switchtitan.distributed import initial_draws
from switchtitan.distributed.count_collectives import CountCommunication
from switchtitan.distributed.fsdp import materialize
from switchtitan.distributed.row_exchange import RowExchange, RowRequest
from switchtitan.distributed.shards import (
    ShardedRows,
    copy_from_full_,
    local,
    row_range,
    shard_buffer,
    shard_group,
    write_rows_,
)
from switchtitan.errors import RanksDisagreeError
from switchtitan.job.config import JobConfig
from switchtitan.methods import METHODS
from switchtitan.models import MODELS
from switchtitan.training.trainer import Trainer

NUM_RANKS = 4
# Rows over 4 and over 2 ranks: uneven, and fewer than ranks.
SHAPES = [(11, 3), (6, 5), (3, 7), (1, 2)]


def bits(tensor: Tensor) -> Tensor:
    """The bit patterns: nan equals itself, and -0.0 differs from 0.0."""
    return tensor.contiguous().view(
        {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    )


def draw(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(shape[0]), dtype=dtype)
    values.view(-1)[min(2, values.numel() - 1)] = (
        torch.finfo(dtype).smallest_normal / 3
    )  # a denormal
    values[0, 0] = -0.0
    values[-1, -1] = math.nan
    values[shape[0] // 2, 1] = -math.inf
    return values


def sharded(value: Tensor, mesh: DeviceMesh) -> Tensor:
    tensor = shard_buffer(torch.empty_like(value), mesh)
    copy_from_full_(tensor, value)
    return tensor


def masked(value: Tensor, tensor: Tensor) -> Tensor:
    """The full value, with zeros in rows that this rank does not hold."""
    held = row_range(tensor)
    rest = torch.zeros_like(value)
    rest[held.start : held.stop] = value[held.start : held.stop]
    return rest


def spans_of(num_rows: int) -> tuple[range, ...]:
    """The last and the first rows, as at the end of a ring."""
    if num_rows < 3:
        return (range(num_rows),)
    return range(num_rows - 2, num_rows), range(num_rows // 2)


def check_gather_and_write(mesh: DeviceMesh) -> None:
    dtypes = torch.float32, torch.float64, torch.bfloat16
    full_values = [draw(shape, dtype) for shape in SHAPES for dtype in dtypes]
    tensors = [sharded(value, mesh) for value in full_values]
    spans = [spans_of(len(value)) for value in full_values]
    exchange = RowExchange(shard_group(tensors[0]), torch.device("cpu"))
    requests = [
        RowRequest(ShardedRows(tensor), wanted)
        for tensor, wanted in zip(tensors, spans, strict=True)
    ]
    with CountCommunication() as communication:
        gathered = exchange.gather(requests, checksum=0x7FFFFFFF)
    assert sum(count.num_calls for count in communication.counts.values()) == 1, "for all dtypes"
    exchange.check()
    expected = [
        value[[row for span in wanted for row in span]]
        for value, wanted in zip(full_values, spans, strict=True)
    ]
    for rows, wanted in zip(gathered, expected, strict=True):
        assert rows.dtype == wanted.dtype
        assert torch.equal(bits(rows), bits(wanted))

    parts = [
        RowRequest(ShardedRows(masked(value, tensor)), (range(len(value)),))
        for value, tensor in zip(full_values, tensors, strict=True)
    ]
    for rows, value in zip(exchange.gather(parts, checksum=2), full_values, strict=True):
        assert torch.equal(bits(rows), bits(value)), "each rank fills in its rows of a plain tensor"

    new = [-2 * rows - 1 for rows in gathered]
    for dtype in dtypes:
        places = [place for place, value in enumerate(full_values) if value.dtype == dtype]
        write_rows_(
            [ShardedRows(tensors[place]) for place in places],
            [spans[place] for place in places],
            [new[place] for place in places],
        )
    for value, tensor, wanted, rows in zip(full_values, tensors, spans, new, strict=True):
        value[[row for span in wanted for row in span]] = rows
        again = exchange.gather(
            [RowRequest(ShardedRows(tensor), (range(len(value)),))], checksum=1
        )[0]
        assert torch.equal(bits(again), bits(value))


def check_disagreement(rank: int, mesh: DeviceMesh) -> None:
    tensor = sharded(torch.zeros(11, 3), mesh)
    exchange = RowExchange(shard_group(tensor), torch.device("cpu"))
    exchange.gather([RowRequest(ShardedRows(tensor), (range(2),))], checksum=7)
    exchange.check()
    # One rank is a step ahead, and requests more rows.
    exchange.gather(
        [RowRequest(ShardedRows(tensor), (range(2 + (rank == 2)),))], checksum=7 + (rank == 2)
    )
    exchange.gather([RowRequest(ShardedRows(tensor), (range(2),))], checksum=7)
    # On every rank, also in the other replica, whose own ranks agree.
    with pytest.raises(RanksDisagreeError, match="ranks disagree"):
        exchange.check()


def check_initial_values(folder: Path, overrides: list[str]) -> Trainer:
    """Compares with an unsharded model bitwise; returns the trainer of the sharded one."""
    trainer = tiny_trainer(folder, "switchlora", *overrides, num_ranks=NUM_RANKS)
    config = tiny_config(folder, "switchlora", *overrides, num_ranks=NUM_RANKS)
    with torch.device("meta"):
        alone = MODELS.build(config.model)
    METHODS.build(config.method, config.training.steps, config.job.seed).prepare_model(alone)
    materialize(alone, torch.device("cpu"), config.job.seed)
    tensors = full_tensors(trainer)
    for name, value in alone.state_dict().items():
        assert torch.equal(bits(tensors[f"model.{name}"]), bits(value)), name
    check_evaluation(trainer, alone, config)
    return trainer


def check_evaluation(trainer: Trainer, alone: nn.Module, config: JobConfig) -> None:
    """The ten held-out sequences count once each, though four ranks read two batches of two."""
    corpus = open_corpus(config.data)
    held_out = [corpus.split("validation", config.data.seq_len)[index] for index in range(10)]
    tokens = torch.stack([sequence.tokens for sequence in held_out])
    documents = torch.stack([sequence.document_ids for sequence in held_out])
    with torch.no_grad():
        logits = alone(tokens[:, :-1], documents).double()
    expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    # fp32 logits of other batches: roundings of 6e-8 in about ten operations.
    assert trainer.evaluators.validation(trainer.stepper.model) == pytest.approx(
        expected.item(), rel=1e-6
    )


def count_collectives(part: Callable[[], object]) -> Counter[str]:
    """Number of calls of each collective in `part`, by torch's name."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        part()
    return Counter(event.name for event in recorded.events() if event.name.startswith("c10d::"))


def num_of_kind(counts: Counter[str], kind: str) -> int:
    return sum(count for name, count in counts.items() if kind in name)


def check_collectives(trainer: Trainer, num_micro_batches: int, num_in_update: int) -> None:
    """One reduction for each of embedding, two blocks and head, for any number of micro-batches."""
    micro_batches = next(trainer.stepper.batches)
    assert len(micro_batches) == num_micro_batches
    of_gradients = count_collectives(lambda: trainer.stepper.forward_backward(micro_batches))
    assert num_of_kind(of_gradients, "reduce_scatter") == 4, of_gradients
    of_update = count_collectives(trainer.stepper.optimizer.step)
    assert num_of_kind(of_update, "allreduce") == num_in_update, of_update
    assert of_update.total() == num_in_update, of_update
    trainer.stepper.close()


def check_all(rank: int, folder: Path) -> None:
    # So that tiny tensors have several blocks, whose borders are inside shards.
    initial_draws._LARGEST_BLOCK, initial_draws._NUM_BLOCKS = 64, 5
    line = init_device_mesh("cpu", (NUM_RANKS,), mesh_dim_names=("shard",))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    assert [len(local(sharded(torch.zeros(shape), line))) for shape in SHAPES] != [
        shape[0] // NUM_RANKS for shape in SHAPES
    ]
    for mesh in (line, square):
        check_gather_and_write(mesh)
        check_disagreement(rank, mesh)
    check_initial_values(folder / "square", ["--parallelism.replicate", "2"])
    switching = check_initial_values(folder / "line", [])
    check_collectives(switching, num_micro_batches=1, num_in_update=1)
    one_sequence = ["--training.local_batch_size", "1"]
    accumulating = tiny_trainer(folder / "micro", "switchlora", *one_sequence, num_ranks=NUM_RANKS)
    check_collectives(accumulating, num_micro_batches=2, num_in_update=1)
    replicate = ["--parallelism.frozen_weights", "replicate"]
    replicated = tiny_trainer(folder / "replicated", "switchlora", *replicate, num_ranks=NUM_RANKS)
    check_collectives(replicated, num_micro_batches=1, num_in_update=1)
    dense = tiny_trainer(folder / "dense", "full_rank", num_ranks=NUM_RANKS)
    check_collectives(dense, num_micro_batches=1, num_in_update=0)


def test_rows_initial_values_and_collectives_on_four_ranks(corpora):
    """One start of four ranks for all checks above."""
    run_on_ranks(NUM_RANKS, check_all, corpora)
