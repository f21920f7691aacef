"""What blocks keep for the backward pass: in each mode of recomputation, and in host memory."""

import gc

import pytest
import torch
from support.observed import saved_besides
from support.small_llama import MODEL, VOCABULARY
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from switchtitan.distributed.blocks import checkpoint_activations
from switchtitan.distributed.config import ActivationCheckpointConfig
from switchtitan.distributed.fsdp import materialize
from switchtitan.methods import METHODS
from switchtitan.methods.lora import LoraConfig
from switchtitan.models import MODELS

pytestmark = pytest.mark.usefixtures("fresh_compiler")

BATCH, SEQ, HIDDEN = 7, 16, MODEL.intermediate_size
WEIGHT_SHAPES = {(12, 12), (6, 12), (17, 12), (12, 17)}
PARTITIONED = "aot_eager_decomp_partition"
"""Partitions as for Inductor, without generating code."""


def build_model(mode, backend=None, dropout=0.0):
    with torch.device("meta"):
        model = MODELS.build(MODEL)
    method = LoraConfig(rank=5, alpha=1.0, init="balanced", dropout=dropout)
    METHODS.build(method, 10, seed=0).prepare_model(model)
    checkpoint_activations(model, ActivationCheckpointConfig(mode=mode))
    if backend is not None:
        for block in model.blocks().values():
            block.compile(fullgraph=True, dynamic=False, backend=backend)
    materialize(model, torch.device("cpu"), seed=1)
    return model


def loss_of(model):
    tokens = torch.randint(VOCABULARY, (BATCH, SEQ), generator=torch.Generator().manual_seed(0))
    return model(tokens, torch.zeros(BATCH, SEQ, dtype=torch.int32)).square().sum()


def gradients_of(model):
    model.zero_grad()
    torch.manual_seed(3)
    loss_of(model).backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


class LiveResults(TorchDispatchMode):
    """Records the results of all operations without keeping them alive."""

    def __init__(self):
        super().__init__()
        self._results = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for result in results if isinstance(results, (tuple, list)) else [results]:
            if isinstance(result, Tensor):
                storage = StorageWeakRef(result.untyped_storage())
                self._results.append((tuple(result.shape), storage))
        return results

    def shapes(self, apart_from):
        """Shapes of live results that share no memory with a module's parameters."""
        gc.collect()
        held = {StorageWeakRef(p.untyped_storage()).cdata for p in apart_from.parameters()}
        return {
            shape for shape, ref in self._results if not ref.expired() and ref.cdata not in held
        }


def saved_shapes(model, compiled):
    """Shapes saved for the backward pass, without the model's tensors."""
    if not compiled:
        with LiveResults() as results:
            loss = loss_of(model)
        shapes = results.shapes(apart_from=model)
        del loss
        return shapes
    # A compiled block saves the tensors that selective checkpointing keeps.
    _, saved = saved_besides(model.parameters(), lambda: loss_of(model))
    return {tuple(tensor.shape) for tensor in saved}


@pytest.mark.parametrize(
    ("mode", "compiled", "dropout"),
    [
        *(("selective", False, 0.0), ("selective", False, 0.5), ("selective", True, 0.0)),
        *(("full", False, 0.0), ("full", False, 0.5)),
    ],
)
def test_modes_save_the_documented_tensors_and_have_equal_gradients(mode, compiled, dropout):
    plain = build_model("none", dropout=dropout)
    model = build_model(mode, PARTITIONED if compiled else None, dropout)
    widest = {(BATCH * SEQ, HIDDEN), (BATCH, SEQ, HIDDEN)}
    assert widest & saved_shapes(plain, False)
    alive = saved_shapes(model, compiled)
    # Matrix products of the MLP, and no merged weight.
    assert bool(widest & alive) == (mode == "selective")
    assert not WEIGHT_SHAPES & alive
    for ours, expected in zip(gradients_of(model), gradients_of(plain), strict=True):
        # Eager modes repeat the same operations; other fusions round differently in fp32.
        bound = 1e-5 * expected.abs().max().item() if compiled else 0
        torch.testing.assert_close(ours, expected, rtol=1e-5 if compiled else 0, atol=bound)


class Attend(torch.autograd.Function):
    """As in the package flash-attn: the operation has no backward of its own."""

    @staticmethod
    def forward(ctx, x):
        result = torch.ops.flash_attn._flash_attn_forward(x)
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx, grad):
        (result,) = ctx.saved_tensors
        return grad * result


class Attention(nn.Module):
    """A model of one block, that is itself."""

    def forward(self, x):
        return Attend.apply(x.exp()).exp()

    def blocks(self):
        return {"block": self}


@pytest.mark.parametrize(("mode", "num_calls"), [("selective", 1), ("full", 2)])
def test_selective_keeps_the_result_of_the_package_flash_attn(mode, num_calls):
    """A stand-in under the name of the package's operation; `full` shows that calls are counted."""
    calls, model = [], Attention()
    checkpoint_activations(model, ActivationCheckpointConfig(mode=mode))
    with torch.library._scoped_library("flash_attn", "FRAGMENT") as library:
        library.define("_flash_attn_forward(Tensor x) -> Tensor")
        library.impl("_flash_attn_forward", lambda x: calls.append(1) or x * 2, "CPU")
        model(torch.tensor([0.1, 0.2], requires_grad=True)).sum().backward()
    assert len(calls) == num_calls
