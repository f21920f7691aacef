"""The loss in chunks equals torch's cross entropy of all logits, also with a tied head."""

import math

import pytest
import torch
import torch.nn.functional as F
from support.insides import align_rows, record_strides
from support.tiny import tiny_config
from torch import nn

from switchtitan.contracts import IGNORED_TARGET
from switchtitan.models import loss as loss_module
from switchtitan.models.loss import CrossEntropy, Head, TiedHead, summed_cross_entropy
from switchtitan.workbench.benchmark.steppers import fake_stepper

VOCABULARY, DIM, DIVISOR = 61, 12, 7
EAGER = CrossEntropy(compile_regions=False)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """15 tokens of [3, 5] make 4 chunks of 4, so the last one is padded."""
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 4 * 4 * VOCABULARY)


def draw(dtype, shape=(3, 5)):
    """Hidden states, head and targets, some of which are ignored."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(*shape, DIM, generator=generator)
    head = Head(DIM, VOCABULARY)
    head.weight.data.normal_(generator=generator)
    targets = torch.randint(VOCABULARY, shape, generator=generator)
    targets[0, 2] = targets[-1, -2:] = IGNORED_TARGET
    return hidden.to(dtype).requires_grad_(), head.to(dtype), targets


def reference_loss(hidden, head, targets):
    """Loss and gradients by torch's operations, in float64."""
    hidden = hidden.detach().double().requires_grad_()
    weight = head.weight.detach().double().requires_grad_()
    logits = F.linear(hidden, weight).flatten(0, 1)
    keys = {"ignore_index": IGNORED_TARGET, "reduction": "sum"}
    loss = F.cross_entropy(logits, targets.flatten(), **keys) / DIVISOR
    loss.backward()
    return loss.item(), hidden.grad, weight.grad


@pytest.mark.parametrize("tokens_per_chunk", [1, 4, 5, 15, 100])
def test_loss_and_gradients_equal_those_of_all_logits(monkeypatch, tokens_per_chunk):
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 4 * tokens_per_chunk * VOCABULARY)
    # 21 tokens in at most 16 chunks: 11 chunks of 2.
    hidden, head, targets = draw(torch.float64, (3, 7))
    expected, grad_hidden, grad_weight = reference_loss(hidden, head, targets)
    loss = EAGER(hidden, head, targets, DIVISOR)
    # Scaled, since callers may scale the loss.
    (3 * loss).backward()
    # float64 rounds some hundred terms by 1e-16 each.
    assert math.isclose(loss.item(), expected, rel_tol=1e-14)
    torch.testing.assert_close(hidden.grad, 3 * grad_hidden, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(head.weight.grad, 3 * grad_weight, rtol=1e-12, atol=1e-13)
    with torch.no_grad():
        assert EAGER(hidden, head, targets, DIVISOR).item() == loss.item()
    assert EAGER(hidden, head, torch.full_like(targets, IGNORED_TARGET)).item() == 0.0


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_aligned_rows_compute_the_same(monkeypatch, dtype, tolerance):
    (hidden, head, targets), loss_fn = draw(dtype), CrossEntropy(compile_regions=False)
    results, strides = [], record_strides(loss_fn)
    for is_aligned in (False, True):
        align_rows(monkeypatch, is_aligned)
        loss = loss_fn(hidden, head, targets, DIVISOR)
        with torch.no_grad():
            alone = loss_fn(hidden, head, targets, DIVISOR)
        results.append((loss, alone, *torch.autograd.grad(loss, (hidden, head.weight))))
    # 61 numbers take 244 or 122 bytes.
    # 4 chunks, with a gradient and without.
    assert strides == [VOCABULARY] * 8 + [64] * 8
    # Products may sum in another order.
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


def test_large_logits_neither_overflow_nor_round_in_bfloat16():
    hidden, head, targets = draw(torch.bfloat16)
    head.weight.data *= 100
    logits = F.linear(hidden, head.weight)
    expected = F.cross_entropy(logits.double().flatten(0, 1), targets.flatten(), reduction="sum")
    for loss in (EAGER(hidden, head, targets), summed_cross_entropy(logits, targets)):
        assert loss.dtype == torch.float32
        # fp32 rounds 12 terms of order 1000 by 6e-8 each; bfloat16 would by 4e-3.
        assert math.isclose(loss.item(), expected.item(), rel_tol=1e-6)


def test_bfloat16_gradients_are_about_as_good_as_those_of_all_logits():
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(1, 200, DIM, generator=generator).bfloat16().requires_grad_()
    head = draw(torch.bfloat16)[1]
    targets = torch.randint(VOCABULARY, (1, 200), generator=generator)
    _, *exact = reference_loss(hidden, head, targets)

    def errors(loss):
        grads = torch.autograd.grad(loss, (hidden, head.weight))
        pairs = zip(grads, exact, strict=True)
        return [((grad - true).norm() / true.norm()).item() for grad, true in pairs]

    ours_hidden, ours_weight = errors(EAGER(hidden, head, targets, DIVISOR))
    plain = summed_cross_entropy(head(hidden), targets) / DIVISOR
    plain_hidden, plain_weight = errors(plain)
    assert ours_hidden < 1.01 * plain_hidden
    # The products of 16 chunks are rounded to bfloat16, accumulated in fp32 and rounded again: a
    # factor of sqrt(2) for equal independent errors. Accumulating in bfloat16 gives about 4.
    assert ours_weight < 1.5 * plain_weight


def test_either_gradient_is_computed_without_the_other_and_once():
    hidden, head, targets = draw(torch.float32)
    both = torch.autograd.grad(EAGER(hidden, head, targets), (hidden, head.weight))
    of_weight = torch.autograd.grad(EAGER(hidden.detach(), head, targets), head.weight)
    head.requires_grad_(False)
    loss = EAGER(hidden, head, targets)
    of_hidden = torch.autograd.grad(loss, hidden, retain_graph=True)
    assert all(map(torch.equal, (*of_hidden, *of_weight), both))
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()
    # Any other head computes its own logits; fp32 sums of 61 and of 12 terms.
    other = EAGER(hidden, lambda hidden: 2 * head(hidden), targets)
    expected = summed_cross_entropy(2 * head(hidden), targets)
    torch.testing.assert_close(other, expected, rtol=1e-6, atol=0)


def test_a_sharded_model_computes_its_loss_in_chunks(monkeypatch, tmp_path):
    """FSDP changes the class of the head, and gathers its weight in hooks of its call."""
    num_ranks, num_micro_batches = 2, 2
    batch = ("--training.local_batch_size", "16", "--training.global_batch_size", "64")
    config = tiny_config(tmp_path, "full_rank", *batch, num_ranks=num_ranks)
    num_tokens, vocabulary = 16 * config.data.seq_len, config.model.vocab_size
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 4 * (num_tokens // 4) * vocabulary)
    with fake_stepper(config, num_ranks) as stepper:
        chunks = record_strides(stepper.loss)
        stepper.step()
    assert len(chunks) == 4 * num_micro_batches


def test_a_tied_head_has_no_parameter_of_its_own_and_adds_to_the_embeddings_gradient():
    torch.manual_seed(0)
    embedding = nn.Embedding(11, 5)
    head = TiedHead(embedding)
    assert not list(head.parameters())
    tokens, targets = torch.randint(11, (2, 7)), torch.randint(11, (2, 7))

    def gradient(loss):
        return torch.autograd.grad(loss, embedding.weight)[0]

    hidden = embedding(tokens).sin()
    expected = gradient(summed_cross_entropy(hidden @ embedding.weight.t(), targets))
    torch.testing.assert_close(gradient(EAGER(embedding(tokens).sin(), head, targets)), expected)
    # The control: without the embedding's part, the gradient is another one.
    assert (gradient(EAGER(hidden.detach(), head, targets)) - expected).abs().max() > 0.1
