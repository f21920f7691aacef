"""What updates multiply is multiplied in fp32, whatever environment and training ask for."""

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.tiny import tiny_trainer, train_steps
from torch.utils._python_dispatch import TorchDispatchMode

from switchtitan.distributed.precision import (
    allow_tf32,
    full_precision,
    use_deterministic_algorithms,
    use_full_precision,
)
from switchtitan.distributed.world import stop_world
from switchtitan.errors import EnvironmentMismatchError

MATMUL = torch.backends.cuda.matmul


@pytest.fixture(autouse=True)
def _restore(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for variable in ("NVIDIA_TF32_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG"):
        monkeypatch.delenv(variable, raising=False)
    yield
    stop_world()
    use_full_precision("cpu")
    torch.use_deterministic_algorithms(False)
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def test_everything_that_rounds_is_switched_off():
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.allow_tf32 = True
    MATMUL.allow_bf16_reduced_precision_reduction = True
    MATMUL.allow_fp16_reduced_precision_reduction = True
    use_full_precision("cuda")
    assert torch.get_float32_matmul_precision() == "highest"
    assert not MATMUL.allow_tf32
    assert not torch.backends.cudnn.allow_tf32
    assert MATMUL.fp32_precision == "ieee"
    assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"  # type: ignore[attr-defined]
    assert not MATMUL.allow_bf16_reduced_precision_reduction
    assert not MATMUL.allow_fp16_reduced_precision_reduction


def test_the_override_of_containers_is_overridden():
    """torch reads the variable when it is imported."""
    code = (
        "import torch; from switchtitan.distributed.precision import use_full_precision as full; "
        "before = torch.backends.cuda.matmul.allow_tf32; full('cuda'); "
        "print(before, torch.backends.cuda.matmul.allow_tf32)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["True", "False"]


def test_a_variable_that_torch_cannot_override_is_refused_on_a_gpu(monkeypatch):
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    use_full_precision("cuda")
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    use_full_precision("cpu")
    with pytest.raises(EnvironmentMismatchError, match=r"NVIDIA_TF32_OVERRIDE=1.*unset it"):
        use_full_precision("cuda")


def test_full_precision_restores_what_was_set_outside():
    allow_tf32()
    with full_precision():
        assert not MATMUL.allow_tf32
        with full_precision():
            pass
        assert not MATMUL.allow_tf32
    assert MATMUL.allow_tf32
    with pytest.raises(ZeroDivisionError), full_precision():
        raise ZeroDivisionError
    assert MATMUL.allow_tf32


class RecordProducts(TorchDispatchMode):
    """The precision that is set at each product of matrices."""

    PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm")

    def __init__(self) -> None:
        super().__init__()
        self.precisions: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func.overloadpacket.__name__ in self.PRODUCTS:
            self.precisions.append(torch.get_float32_matmul_precision())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("method", "step"),
    [("switchlora", 1), ("relora", 9), ("galore", 1), ("fira", 1), ("apollo", 1)],
)
def test_updates_multiply_in_fp32_while_training_uses_tf32(corpora, method, step):
    trainer = tiny_trainer(corpora / f"precision-{method}", method)
    stepper = trainer.stepper
    allow_tf32()
    for _ in range(step - 1):
        stepper.step()
    with RecordProducts() as gradients:
        stepper.compute_gradients()
    assert set(gradients.precisions) == {"high"}
    with RecordProducts() as updates:
        stepper.update()
    assert len(updates.precisions) > 10
    assert set(updates.precisions) == {"highest"}
    stepper.close()


def test_an_update_outside_of_the_stepper_would_use_tf32(corpora):
    """The negative control of the test above."""
    trainer = tiny_trainer(corpora / "precision-control", "switchlora")
    allow_tf32()
    trainer.stepper.compute_gradients()
    with RecordProducts() as updates:
        trainer.stepper.optimizer.step()
    assert set(updates.precisions) == {"high"}
    trainer.stepper.close()


def test_rank_telemetry_merges_in_fp32_while_training_uses_tf32(corpora):
    trainer = tiny_trainer(
        corpora / "precision-telemetry",
        "switchlora",
        *("--spectrum.interval", "1", "--training.steps", "1"),
    )
    allow_tf32()
    train_steps(trainer, 1)
    (telemetry,) = trainer.hooks
    with RecordProducts() as merges:
        telemetry.after(1)
    trainer.close()
    # B A and a Gram matrix of each of seven layers in two blocks.
    assert len(merges.precisions) == 2 * 7 * 2
    assert set(merges.precisions) == {"highest"}
    assert MATMUL.allow_tf32


def unpool(values: torch.Tensor) -> torch.Tensor:
    """torch has no deterministic implementation, as it says for any device."""
    indices = torch.zeros(1, 1, 5, dtype=torch.int64)
    return torch.nn.functional.max_unpool1d(values.view(1, 1, 5), indices, 1)


def test_operations_without_a_deterministic_algorithm_raise():
    unpool(torch.ones(5))
    use_deterministic_algorithms()
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.backends.cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
        unpool(torch.ones(5))


def test_compiled_regions_choose_deterministic_algorithms():
    """A region that was compiled before is compiled again, and then raises like the eager one."""
    compiled = torch.compile(unpool, backend="aot_eager")
    compiled(torch.ones(5))
    use_deterministic_algorithms()
    with pytest.raises(Exception, match="does not have a deterministic implementation"):
        compiled(torch.ones(5))


def test_another_workspace_of_cublas_is_refused(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(EnvironmentMismatchError, match="CUBLAS_WORKSPACE_CONFIG=:0:0"):
        use_deterministic_algorithms()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    use_deterministic_algorithms()
