"""A tiny run on a GPU: bfloat16, all regions compiled."""

import pytest
import torch
from support.tiny import COMPILED, METHOD_KEYS, tiny_trainer, train_steps

ON_HOST = ("--method.candidates_device", "host")
FROZEN_IN_BF16 = ("--training.frozen_dtype", "bfloat16")
FROZEN_REPLICATED = ("--parallelism.frozen_weights", "replicate")
RUNS = [
    *((method, ()) for method in METHOD_KEYS),
    ("switchlora", ("--method.candidates", "constant")),
    ("switchlora", ON_HOST),
    ("switchlora", FROZEN_IN_BF16),
    ("switchlora", FROZEN_REPLICATED),
    ("switchlora", (*ON_HOST, *FROZEN_IN_BF16, *FROZEN_REPLICATED)),
    ("relora", FROZEN_IN_BF16),
    ("relora", FROZEN_REPLICATED),
    ("full_rank", ("--optimizer.name", "muon")),
    ("switchlora", ("--optimizer.name", "muon")),
]


@pytest.mark.gpu
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("method", "overrides"), RUNS)
def test_a_compiled_bfloat16_run_on_cuda_lowers_its_loss(corpora, method, overrides):
    trainer = tiny_trainer(
        corpora / "-".join(["gpu", method, *overrides]),
        method,
        *overrides,
        "--training.dtype",
        "bfloat16",
        *COMPILED,
    )
    assert trainer.stepper.world.device.type == "cuda"
    first = trainer.evaluators.validation(trainer.stepper.model)
    losses = train_steps(trainer, 40)
    last = trainer.evaluators.validation(trainer.stepper.model)
    trainer.stepper.close()
    assert losses[-1] < losses[0]
    assert last < first
    for name, parameter in trainer.stepper.model.named_parameters():
        is_short = "--training.frozen_dtype" in overrides and not parameter.requires_grad
        assert parameter.dtype == (torch.bfloat16 if is_short else torch.float32), name
        assert parameter.isfinite().all(), name
