"""The loss in chunks equals torch's cross entropy of all logits."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.tiny import tiny_config
from torch import nn
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_leaves

from switchtitan.benchmark.peak_memory import peak_extra_bytes
from switchtitan.benchmark.steppers import fake_stepper
from switchtitan.contracts import IGNORED_TARGET
from switchtitan.distributed.count_collectives import CountingMode
from switchtitan.models import loss as loss_module
from switchtitan.models.head import Head
from switchtitan.models.loss import CrossEntropy

VOCABULARY, DIM, DIVISOR = 61, 12, 7
CPU = torch.device("cpu")
EAGER = CrossEntropy(compile_regions=False)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """15 tokens of [3, 5] make 4 chunks of 4, so the last one is padded."""
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 4 * 4 * VOCABULARY)


def draw(
    dtype: torch.dtype, shape: tuple[int, int] = (3, 5)
) -> tuple[torch.Tensor, Head, torch.Tensor]:
    """Hidden states, head and targets, some of which are ignored."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(*shape, DIM, generator=generator)
    head = Head(DIM, VOCABULARY)
    head.weight.data.normal_(generator=generator)
    targets = torch.randint(VOCABULARY, shape, generator=generator)
    targets[0, 2] = targets[-1, -2:] = IGNORED_TARGET
    return hidden.to(dtype).requires_grad_(), head.to(dtype), targets


def of_all_logits(
    hidden: torch.Tensor, head: nn.Linear, targets: torch.Tensor
) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Loss and gradients by torch's operations, in float64."""
    hidden = hidden.detach().double().requires_grad_()
    weight = head.weight.detach().double().requires_grad_()
    logits = F.linear(hidden, weight).flatten(0, 1)
    loss = (
        F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED_TARGET, reduction="sum")
        / DIVISOR
    )
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return loss.item(), hidden.grad, weight.grad


@pytest.mark.parametrize("tokens_per_chunk", [1, 4, 5, 15, 100])
def test_loss_and_gradients_equal_those_of_all_logits(
    monkeypatch: pytest.MonkeyPatch, tokens_per_chunk: int
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 4 * tokens_per_chunk * VOCABULARY)
    # 21 tokens in at most 16 chunks: 11 chunks of 2.
    hidden, head, targets = draw(torch.float64, (3, 7))
    expected, grad_hidden, grad_weight = of_all_logits(hidden, head, targets)
    loss = EAGER(hidden, head, targets, DIVISOR)
    # Scaled, since callers may scale the loss.
    (3 * loss).backward()
    # float64 rounds some hundred terms by 1e-16 each.
    assert math.isclose(loss.item(), expected, rel_tol=1e-14)
    torch.testing.assert_close(hidden.grad, 3 * grad_hidden, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(head.weight.grad, 3 * grad_weight, rtol=1e-12, atol=1e-13)
    with torch.no_grad():
        assert EAGER(hidden, head, targets, DIVISOR).item() == loss.item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_aligned_rows_compute_the_same(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    hidden, head, targets = draw(dtype)
    results, strides = [], []

    def loss_and_gradient(logits: torch.Tensor, *args: torch.Tensor) -> tuple:
        strides.append(logits.stride(0))
        return loss_module.chunk_loss_and_gradient_(logits, *args)

    loss_fn = CrossEntropy(compile_regions=False)
    loss_fn._chunk_loss_and_gradient = loss_and_gradient
    for devices in ({"cuda"}, {"cpu"}):
        monkeypatch.setattr(loss_module, "_DEVICES_WITH_ALIGNED_ROWS", devices)
        loss = loss_fn(hidden, head, targets, DIVISOR)
        with torch.no_grad():
            alone = loss_fn(hidden, head, targets, DIVISOR)
        results.append((loss.detach(), alone, *torch.autograd.grad(loss, (hidden, head.weight))))
    # 61 numbers take 244 or 122 bytes.
    assert strides == [VOCABULARY] * 4 + [64] * 4
    # Products may sum in another order.
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


def test_ignored_targets_have_no_gradient_and_no_loss() -> None:
    hidden, head, targets = draw(torch.float32)
    EAGER(hidden, head, targets).backward()
    is_ignored = targets == IGNORED_TARGET
    assert not hidden.grad[is_ignored].any()
    assert hidden.grad[~is_ignored].any(dim=-1).all()
    assert EAGER(hidden, head, torch.full_like(targets, IGNORED_TARGET)).item() == 0.0


def test_large_logits_neither_overflow_nor_round_in_bfloat16() -> None:
    hidden, head, targets = draw(torch.bfloat16)
    head.weight.data *= 100
    logits = F.linear(hidden, head.weight).double().flatten(0, 1)
    expected = F.cross_entropy(logits, targets.flatten(), reduction="sum").item()
    loss = EAGER(hidden, head, targets)
    assert loss.dtype == torch.float32
    # fp32 rounds 12 terms of order 1000 by 6e-8 each; bfloat16 would by 4e-3.
    assert math.isclose(loss.item(), expected, rel_tol=1e-6)


def test_bfloat16_gradients_are_about_as_good_as_those_of_all_logits() -> None:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(1, 200, DIM, generator=generator).bfloat16().requires_grad_()
    head = draw(torch.bfloat16)[1]
    targets = torch.randint(VOCABULARY, (1, 200), generator=generator)
    _, *exact = of_all_logits(hidden, head, targets)
    errors = []
    for loss in (
        EAGER(hidden, head, targets, DIVISOR),
        F.cross_entropy(head(hidden).float().flatten(0, 1), targets.flatten(), reduction="sum")
        / DIVISOR,
    ):
        grads = torch.autograd.grad(loss, (hidden, head.weight))
        errors.append(
            [
                ((grad - true).norm() / true.norm()).item()
                for grad, true in zip(grads, exact, strict=True)
            ]
        )
    (ours_hidden, ours_weight), (plain_hidden, plain_weight) = errors
    assert ours_hidden < 1.01 * plain_hidden
    # The products of 16 chunks are rounded to bfloat16, accumulated in fp32 and rounded again: a
    # factor of sqrt(2) for equal independent errors. Accumulating in bfloat16 gives about 4.
    assert ours_weight < 1.5 * plain_weight


def test_either_gradient_is_computed_without_the_other() -> None:
    hidden, head, targets = draw(torch.float32)
    both = torch.autograd.grad(EAGER(hidden, head, targets), (hidden, head.weight))
    of_weight = torch.autograd.grad(EAGER(hidden.detach(), head, targets), head.weight)
    head.requires_grad_(False)
    of_hidden = torch.autograd.grad(EAGER(hidden, head, targets), hidden)
    assert all(map(torch.equal, (*of_hidden, *of_weight), both))


def test_the_loss_is_differentiated_once() -> None:
    hidden, head, targets = draw(torch.float32)
    loss = EAGER(hidden, head, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


class Doubled(nn.Module):
    """A head that is not a plain linear layer."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.head = head

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return 2 * self.head(hidden)


def test_any_other_head_computes_its_own_logits() -> None:
    hidden, head, targets = draw(torch.float32)
    loss = EAGER(hidden, Doubled(head), targets, DIVISOR)
    loss.backward()
    twice = nn.Linear(DIM, VOCABULARY, bias=False)
    twice.weight.data = 2 * head.weight.data
    expected, grad_hidden, _ = of_all_logits(hidden, twice, targets)
    # fp32 sums of 61 and of 12 terms.
    assert math.isclose(loss.item(), expected, rel_tol=1e-6)
    torch.testing.assert_close(hidden.grad.double(), grad_hidden, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_chunks_share_a_graph_and_compute_the_same() -> None:
    hidden, head, targets = draw(torch.float32)
    compiled = CrossEntropy(compile_regions=True)
    results = []
    for loss_of in (compiled, EAGER):
        loss = loss_of(hidden, head, targets)
        with torch.no_grad():
            alone = loss_of(hidden, head, targets)
        results.append((loss.detach(), alone, *torch.autograd.grad(loss, (hidden, head.weight))))
    # fp32 sums in another order.
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)
    # One with gradients and one without; the padded last chunk shares them.
    assert counters["stats"]["unique_graphs"] == 2
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(hidden, head, targets).backward()


def test_the_peak_holds_a_fraction_of_the_logits() -> None:
    """16 chunks at 4 + 4 bytes per logit (gradients overwrite logits); 4 + 4 * 3 without chunks."""
    hidden, head, targets = draw(torch.float32, (4, 240))
    ours = peak_extra_bytes(lambda: EAGER(hidden, head, targets).backward(), CPU)
    plain = peak_extra_bytes(
        lambda: F.cross_entropy(
            head(hidden).flatten(0, 1), targets.flatten(), reduction="sum"
        ).backward(),
        CPU,
    )
    assert plain > 2 * 4 * 960 * VOCABULARY
    assert ours < plain / 4


class MostLogits(CountingMode):
    """Finds the most rows of a tensor whose rows are as long as the vocabulary."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.num_rows = 0
        self._vocabulary = vocabulary

    def count(self, func: Any, args: tuple, kwargs: Mapping[str, Any], result: Any) -> None:
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (self._vocabulary,):
                self.num_rows = max(self.num_rows, tensor.numel() // self._vocabulary)


@pytest.mark.parametrize("num_ranks", [1, 8])
@pytest.mark.parametrize("method", ["full_rank", "switchlora"])
def test_a_sharded_model_computes_its_loss_in_chunks(
    method: str, num_ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FSDP changes the class of the head, and gathers its weight in hooks of its call."""
    batch = ("--training.local_batch_size", "16", "--training.global_batch_size")
    config = tiny_config(tmp_path, method, *batch, f"{32 * num_ranks}", num_ranks=num_ranks)
    num_tokens, vocabulary = 16 * config.data.seq_len, config.model.vocab_size
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 4 * (num_tokens // 4) * vocabulary)
    with fake_stepper(config, num_ranks) as stepper:
        for _ in range(2):
            with MostLogits(vocabulary) as logits:
                stepper.step()
            assert logits.num_rows == num_tokens // 4
