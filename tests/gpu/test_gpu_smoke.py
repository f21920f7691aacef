"""Tiny runs on a GPU: in bfloat16 with all regions compiled, and twice with the same bits."""

import pytest
import torch
from support.switchlora_layers import LARGER
from support.tiny import COMPILED, METHOD_KEYS, tiny_trainer, train_steps

from switchtitan.distributed.world import stop_world

pytestmark = pytest.mark.gpu

ON_HOST = ("--method.candidates_device", "host")
FROZEN_IN_INT16 = ("--training.frozen_dtype", "int16")
FROZEN_REPLICATED = ("--parallelism.frozen_weights", "replicate")
RUNS = [
    *((method, ()) for method in METHOD_KEYS),
    ("switchlora", ("--method.candidates", "constant")),
    ("switchlora", ON_HOST),
    ("switchlora", FROZEN_IN_INT16),
    ("switchlora", FROZEN_REPLICATED),
    ("switchlora", (*ON_HOST, *FROZEN_IN_INT16, *FROZEN_REPLICATED)),
    ("relora", FROZEN_IN_INT16),
    ("relora", FROZEN_REPLICATED),
    ("full_rank", ("--optimizer.name", "muon")),
    ("switchlora", ("--optimizer.name", "muon")),
]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("method", "overrides"), RUNS)
def test_a_compiled_bfloat16_run_on_cuda_lowers_its_loss(corpora, method, overrides):
    folder, keys = corpora / "-".join(["gpu", method, *overrides]), (*overrides, *COMPILED)
    trainer = tiny_trainer(folder, method, *keys, "--training.dtype", "bfloat16")
    assert trainer.stepper.world.device.type == "cuda"
    first = trainer.validation(trainer.stepper.model)
    losses = train_steps(trainer, 40)
    last = trainer.validation(trainer.stepper.model)
    trainer.stepper.close()
    assert losses[-1] < losses[0]
    assert last < first
    for name, parameter in trainer.stepper.model.named_parameters():
        is_short = "--training.frozen_dtype" in overrides and not parameter.requires_grad
        assert parameter.dtype == (torch.int16 if is_short else torch.float32), name
        assert parameter.isfinite().all(), name


@pytest.fixture
def use_any_algorithm():
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("use_any_algorithm")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_deterministic_runs_repeat_bitwise(corpora, dtype):
    losses = []
    for name in ("first", "second"):
        keys = (*LARGER, "--training.deterministic", "true", "--training.dtype", dtype)
        trainer = tiny_trainer(corpora / f"deterministic-{dtype}-{name}", "switchlora", *keys)
        losses.append(train_steps(trainer, 20))
        trainer.stepper.close()
        stop_world()
    assert losses[0] == losses[1]
