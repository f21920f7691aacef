"""A tiny run as it would be on a GPU: bfloat16, compiled whole."""

from collections.abc import Iterator

import pytest
import torch
from tiny import METHOD_KEYS, tiny_trainer, train_steps

from switchtitan.distributed.world import stop_world


@pytest.fixture(autouse=True)
def leave_world() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    stop_world()


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHOD_KEYS)
def test_a_compiled_bfloat16_run_on_cuda_lowers_its_loss(corpora, method):
    trainer = tiny_trainer(
        corpora / f"gpu-{method}",
        method,
        "--training.dtype",
        "bfloat16",
        *("--compile.blocks", "true", "--compile.loss", "true", "--compile.optimizer", "true"),
    )
    assert trainer.world.device.type == "cuda"
    first = trainer.evaluator(trainer.model)
    losses = train_steps(trainer, 40)
    last = trainer.evaluator(trainer.model)
    trainer.batches.close()
    assert losses[-1] < losses[0]
    assert last < first
    for name, parameter in trainer.model.named_parameters():
        assert parameter.dtype == torch.float32, name
        assert parameter.isfinite().all(), name
