"""Only block inputs are in host memory between the forward and the backward pass."""

import pytest
import torch
from support.tiny import tiny_config
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.multiprocessing.reductions import StorageWeakRef

from switchtitan.contracts import default_call_block
from switchtitan.distributed.blocks import CallWithInputOnHost, checkpoint_activations
from switchtitan.distributed.config import ActivationCheckpointConfig
from switchtitan.distributed.fsdp import materialize
from switchtitan.distributed.host_copies import CopyToDevice, CopyToHost, HostCopies
from switchtitan.errors import ConfigError
from switchtitan.models import MODELS
from switchtitan.models.llama.config import LlamaConfig

pytestmark = pytest.mark.usefixtures("fresh_compiler")

NUM_BLOCKS = 3
SHAPE = (2, 16, 20)
MODEL = LlamaConfig(
    size="9m",
    hidden_size=SHAPE[-1],
    intermediate_size=28,
    num_layers=NUM_BLOCKS,
    num_heads=2,
    num_kv_heads=1,
    vocab_size=31,
)


class RecordedCopies(HostCopies):
    """Records copies in order: ("out" or "back", index of the tensor)."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.events: list[tuple[str, int]] = []
        self.shapes: list[tuple[int, ...]] = []
        self._numbers: dict[int, int] = {}

    def to_host(self, tensor: Tensor) -> CopyToHost:
        copy = super().to_host(tensor)
        self._numbers[id(copy)] = len(self.shapes)
        self.events.append(("out", len(self.shapes)))
        self.shapes.append(tuple(tensor.shape))
        return copy

    def back_to_device(self, copy: CopyToHost) -> CopyToDevice:
        self.events.append(("back", self._numbers[id(copy)]))
        return super().back_to_device(copy)


def build_model(backend: object = None) -> nn.Module:
    with torch.device("meta"):
        model = MODELS.build(MODEL)
    checkpoint_activations(model, ActivationCheckpointConfig(mode="full"))
    if backend is not None:
        for block in model.blocks().values():
            block.compile(fullgraph=True, dynamic=False, backend=backend)
    materialize(model, torch.device("cpu"), seed=1)
    return model


def loss_of(model: nn.Module) -> Tensor:
    tokens = torch.randint(31, SHAPE[:2], generator=torch.Generator().manual_seed(0))
    return model(tokens, torch.zeros(SHAPE[:2], dtype=torch.int32)).square().sum()


def gradients_of(model: nn.Module) -> list[Tensor]:
    model.zero_grad()
    loss_of(model).backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_are_the_same_without_recompilation(compiled):
    # Partitions as for Inductor, without generating code.
    counter = CompileCounterWithBackend("aot_eager_decomp_partition")
    model = build_model(counter if compiled else None)
    kept = gradients_of(model)
    assert counter.frame_count == compiled
    copies = RecordedCopies()
    model.call_block = CallWithInputOnHost(copies)
    for _ in range(2):
        for ours, expected in zip(gradients_of(model), kept, strict=True):
            assert torch.equal(ours, expected)
    assert copies.shapes == [SHAPE] * 2 * NUM_BLOCKS, "must offload exactly the block inputs"
    assert counter.frame_count == compiled


@pytest.mark.parametrize("backend", [None, "aot_eager_decomp_partition"])
def test_block_inputs_are_freed_until_they_are_needed(backend):
    model = build_model(backend)
    on_device: list[StorageWeakRef] = []

    def remember(call_block, block, hidden, *args):
        on_device.append(StorageWeakRef(hidden.untyped_storage()))
        return call_block(block, hidden, *args)

    def num_alive() -> int:
        return sum(not storage.expired() for storage in on_device)

    model.call_block = lambda *args: remember(default_call_block, *args)
    loss = loss_of(model)
    assert num_alive() == NUM_BLOCKS, "the test must see the inputs"
    del loss
    on_device.clear()
    offload = CallWithInputOnHost(HostCopies(torch.device("cpu")))
    model.call_block = lambda *args: remember(offload, *args)
    loss = loss_of(model)
    assert num_alive() == 1, "the last block's input, which backward needs first"
    assert not on_device[-1].expired()
    assert [tuple(tensor.shape) for tensor in offload.tensors_on_host()] == [SHAPE] * NUM_BLOCKS
    loss.backward()
    assert num_alive() == 0
    assert offload.tensors_on_host() == []


def test_each_input_but_the_last_is_fetched_one_block_ahead():
    copies = RecordedCopies()
    model = build_model()
    offload = CallWithInputOnHost(copies)

    def call(block, hidden, *args):
        number = len(copies.shapes)
        output = offload(block, hidden, *args)
        # Called when the gradient reaches the block, before its backward pass.
        output.register_hook(lambda grad: copies.events.append(("needed", number)))
        return output

    model.call_block = call
    loss_of(model).backward()
    first, second, third = range(NUM_BLOCKS)
    assert copies.events == [
        *(("out", number) for number in (first, second, third)),
        *(("needed", third), ("back", second)),
        *(("needed", second), ("back", first)),
        ("needed", first),
    ]


def test_a_forward_pass_without_a_backward_pass_frees_its_inputs():
    model = build_model()
    expected = gradients_of(model)
    model.call_block = CallWithInputOnHost(HostCopies(torch.device("cpu")))
    abandoned = loss_of(model)
    assert len(model.call_block.tensors_on_host()) == NUM_BLOCKS
    with torch.no_grad():
        loss_of(model)
    assert len(model.call_block.tensors_on_host()) == NUM_BLOCKS
    del abandoned
    for ours, plain in zip(gradients_of(model), expected, strict=True):
        assert torch.equal(ours, plain)
    assert model.call_block.tensors_on_host() == []


@pytest.mark.parametrize("mode", ["none", "selective"])
def test_offload_requires_full_checkpointing(tmp_path, mode):
    with pytest.raises(ConfigError, match=f"offload = true requires mode = 'full', got {mode!r}"):
        tiny_config(
            tmp_path,
            "full_rank",
            *("--activation_checkpoint.mode", mode),
            *("--activation_checkpoint.offload", "true"),
        )
