"""Tensors that blocks save for the backward pass in each mode of activation checkpointing."""

import gc
from pathlib import Path

import pytest
import torch
from support.tiny import tiny_config, tiny_stepper
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from switchtitan.distributed.blocks import checkpoint_activations
from switchtitan.distributed.config import ActivationCheckpointConfig
from switchtitan.distributed.fsdp import materialize
from switchtitan.distributed.world import stop_world
from switchtitan.methods import METHODS
from switchtitan.methods.lora import LoraConfig
from switchtitan.models import MODELS
from switchtitan.models.llama.config import LlamaConfig

pytestmark = pytest.mark.usefixtures("fresh_compiler")

MODEL = LlamaConfig(
    size="9m",
    hidden_size=20,
    intermediate_size=28,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    vocab_size=31,
)
NUM_TOKENS = 7 * 16
WEIGHT_SHAPES = {(20, 20), (10, 20), (28, 20), (20, 28)}
MODES = ("none", "selective", "full")


class LiveResults(TorchDispatchMode):
    """Records the results of all operations without keeping them alive."""

    def __init__(self) -> None:
        super().__init__()
        self._results: list[tuple[tuple[int, ...], StorageWeakRef]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for result in results if isinstance(results, (tuple, list)) else [results]:
            if isinstance(result, Tensor):
                self._results.append(
                    (tuple(result.shape), StorageWeakRef(result.untyped_storage()))
                )
        return results

    def shapes(self, apart_from: nn.Module) -> set[tuple[int, ...]]:
        """Shapes of live results that share no memory with a module's parameters."""
        gc.collect()
        held = {StorageWeakRef(p.untyped_storage()).cdata for p in apart_from.parameters()}
        return {
            shape for shape, ref in self._results if not ref.expired() and ref.cdata not in held
        }


def build_model(mode: str, compiled: bool, dropout: float = 0.0) -> nn.Module:
    with torch.device("meta"):
        model = MODELS.build(MODEL)
    method = LoraConfig(rank=6, init="balanced", dropout=dropout)
    METHODS.build(method, 10, seed=0).prepare_model(model)
    checkpoint_activations(
        model, ActivationCheckpointConfig(mode=mode), preserve_rng_state=method.draws_in_forward()
    )
    if compiled:
        for block in model.blocks().values():
            # Partitions as for Inductor, without generating code.
            block.compile(fullgraph=True, dynamic=False, backend="aot_eager_decomp_partition")
    materialize(model, torch.device("cpu"), seed=1)
    return model


def run(mode: str, compiled: bool) -> tuple[set[tuple[int, ...]], list[Tensor]]:
    """Shapes saved for the backward pass, without the model's tensors; and the gradients."""
    model = build_model(mode, compiled)
    tokens = torch.randint(31, (7, 16), generator=torch.Generator().manual_seed(0))
    documents = torch.zeros(7, 16, dtype=torch.int32)
    if compiled:
        # A compiled block saves the tensors that selective checkpointing keeps.
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            loss = model(tokens, documents).square().sum()
        held = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        alive = {tuple(t.shape) for t in saved if t.untyped_storage().data_ptr() not in held}
    else:
        with LiveResults() as results:
            loss = model(tokens, documents).square().sum()
        alive = results.shapes(apart_from=model)
    loss.backward()
    return alive, [parameter.grad for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("compiled", [False, True])
def test_modes_save_the_documented_tensors_and_have_equal_gradients(compiled):
    alive, gradients = {}, {}
    for mode in MODES:
        alive[mode], gradients[mode] = run(mode, compiled)
    widest = {(NUM_TOKENS, 28), (7, 16, 28)}
    assert widest & alive["none"]
    assert widest & alive["selective"], "the MLP's matrix products must be saved"
    assert not widest & alive["full"]
    for mode in MODES:
        assert not WEIGHT_SHAPES & alive[mode], "a merged weight is saved"
    for mode in ("selective", "full"):
        for ours, plain in zip(gradients[mode], gradients["none"], strict=True):
            # The same operations; other fusions round differently in fp32.
            torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5 * plain.abs().max().item())


def gradients_of(mode: str, dropout: float) -> list[Tensor]:
    model = build_model(mode, compiled=False, dropout=dropout)
    tokens = torch.randint(31, (7, 16), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(3)
    model(tokens, torch.zeros(7, 16, dtype=torch.int32)).square().sum().backward()
    return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputation_gives_bitwise_the_same_gradients(mode: str, dropout: float) -> None:
    for ours, plain in zip(gradients_of(mode, dropout), gradients_of("none", dropout), strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize(("dropout", "is_preserved"), [("0", False), ("0.1", True)])
def test_only_a_run_with_dropout_saves_the_state_of_random_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dropout: str, is_preserved: bool
) -> None:
    reads: list[int] = []
    read = torch.get_rng_state
    keys = ("--activation_checkpoint.mode", "full", "--method.dropout", dropout)
    stepper = tiny_stepper(tiny_config(tmp_path, "switchlora", *keys))
    monkeypatch.setattr(torch, "get_rng_state", lambda: reads.append(1) or read())
    stepper.step()
    stepper.close()
    stop_world()
    assert bool(reads) == is_preserved


@pytest.mark.parametrize(("mode", "num_calls"), [("selective", 1), ("full", 2)])
def test_selective_keeps_the_result_of_the_package_flash_attn(mode: str, num_calls: int) -> None:
    """A stand-in under the name of the package's operation; `full` shows that calls are counted."""
    calls: list[int] = []

    def attend(x: Tensor) -> Tensor:
        calls.append(1)
        return x * 2

    class Attend(torch.autograd.Function):
        """As in the package: the operation has no backward of its own."""

        @staticmethod
        def forward(ctx, x):
            result = torch.ops.flash_attn._flash_attn_forward(x)
            ctx.save_for_backward(result)
            return result

        @staticmethod
        def backward(ctx, grad):
            (result,) = ctx.saved_tensors
            return grad * result

    class Block(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Attend.apply(x.exp()).exp()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def blocks(self) -> dict[str, nn.Module]:
            return {"block": self.block}

    model = Model()
    checkpoint_activations(model, ActivationCheckpointConfig(mode=mode))
    with torch.library._scoped_library("flash_attn", "FRAGMENT") as library:
        library.define("_flash_attn_forward(Tensor x) -> Tensor")
        library.impl("_flash_attn_forward", attend, "CPU")
        x = torch.tensor([0.1, 0.2], requires_grad=True)
        model.block(x).sum().backward()
    assert len(calls) == num_calls
    assert x.grad is not None
