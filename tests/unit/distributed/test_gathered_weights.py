"""Forward passes without backward passes change nothing in the steps after them."""

from functools import partial
from pathlib import Path

import pytest
import torch
from support.tiny import tiny_config

from switchtitan.benchmark.steppers import batch_without_values, fake_stepper
from switchtitan.distributed.count_collectives import CountCommunication
from switchtitan.distributed.fsdp import free_gathered_weights
from switchtitan.training.stepper import Stepper


def evaluate(stepper: Stepper, seq_len: int) -> None:
    batch = batch_without_values(2, seq_len)
    loss = partial(stepper.loss, targets=batch.targets, divisor=1)
    with torch.no_grad():
        for _ in range(3):
            stepper.model(batch.tokens, batch.document_ids, loss)
    free_gathered_weights(stepper.model)


@pytest.mark.parametrize("is_freed", ["true", "false"])
@pytest.mark.parametrize("method", ["full_rank", "lora"])
def test_a_step_after_an_evaluation_sends_what_one_before_it_sends(
    tmp_path: Path, method: str, is_freed: str
) -> None:
    config = tiny_config(
        tmp_path, method, "--parallelism.reshard_after_forward", is_freed, num_ranks=2
    )
    with fake_stepper(config, 2) as stepper:
        stepper.step()
        counts = []
        for _ in range(3):
            with CountCommunication() as communication:
                stepper.step()
            counts.append(communication.counts)
            evaluate(stepper, config.data.seq_len)
    assert counts[0]["all_gather"].num_calls >= 3
    assert counts[1] == counts[0]
    assert counts[2] == counts[0]
