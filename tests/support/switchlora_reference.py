"""A reference SwitchLoRA: vector by vector in Python, with explicit pointers, slots and timers."""

import hashlib
import math

import torch
import torch.nn.functional as F
from torch import nn

GOLDEN_RATIO = (1 + math.sqrt(5)) / 2


class Vectors:
    """The vectors of one factor, [rank, width], a view; and its candidates, [candidates, width].

    `slots[i]` is the candidate in vector i; `rest[i]` are the steps for which it remains frozen.
    """

    def __init__(self, vectors, candidates, first):
        rank = len(vectors)
        self.vectors, self.candidates = vectors, candidates.clone()
        self.slots, self.rest, self.steps = [0] * rank, [0] * rank, [0] * rank
        self.mean, self.square = torch.zeros_like(vectors), torch.zeros_like(vectors)
        self.next = first
        for i in range(rank):
            vector, slot = (first + i) % rank, len(candidates) - rank + i
            self.slots[vector] = slot
            vectors[vector] = candidates[slot]

    def switch(self, slot, puts_back):
        """Puts a candidate in place of the next vector; returns its index, and old minus new."""
        i = self.next
        old = self.vectors[i].clone()
        self.vectors[i] = self.candidates[slot]
        if puts_back:
            self.candidates[self.slots[i]] = old
        self.slots[i] = slot
        self.next = (i + 1) % len(self.slots)
        return i, old - self.vectors[i]

    def reset(self, i):
        self.mean[i] = self.square[i] = 0
        self.steps[i] = 0

    def update(self, gradients, lr, betas, eps, weight_decay):
        """AdamW on each vector, then decrements the freeze timers."""
        for i, vector in enumerate(self.vectors):
            gradient = torch.zeros_like(gradients[i]) if self.rest[i] > 0 else gradients[i]
            self.steps[i] += 1
            self.mean[i] = betas[0] * self.mean[i] + (1 - betas[0]) * gradient
            self.square[i] = betas[1] * self.square[i] + (1 - betas[1]) * gradient**2
            if self.rest[i] > 0:
                self.rest[i] -= 1
                continue
            mean = self.mean[i] / (1 - betas[0] ** self.steps[i])
            square = self.square[i] / (1 - betas[1] ** self.steps[i])
            vector -= lr * weight_decay * vector
            vector -= lr * mean / (square.sqrt() + eps)


class ReferenceLayer(nn.Module):
    """x W^T + s (x A^T) B^T with candidates; W [out, in] is the plain layer's initial weight.

    Args:
        puts_back: whether switched-out vectors become candidates; otherwise they are dropped.
        resets: moments that a switch resets: "counterpart", "both" or "none"; "momentum": only the
            counterpart's first moment.
    """

    def __init__(self, weight, candidates_a, candidates_b, rank, scale, puts_back, resets):
        super().__init__()
        self.puts_back, self.resets = puts_back, resets
        self.rank, self.scale, self.num_candidates = rank, scale, min(weight.shape)
        self.A = nn.Parameter(torch.zeros(rank, weight.shape[1], dtype=weight.dtype))
        self.B = nn.Parameter(torch.zeros(weight.shape[0], rank, dtype=weight.dtype))
        self.of_a = Vectors(self.A.data, candidates_a, first=0)
        self.of_b = Vectors(self.B.data.T, candidates_b, first=rank // 2)
        self.W = weight - scale * self.B.detach() @ self.A.detach()
        self.next_candidate = 0

    def forward(self, x):
        return F.linear(x, self.W) + self.scale * F.linear(F.linear(x, self.A), self.B)

    @torch.no_grad()
    def switch(self, asked, freeze_steps):
        """Switches at most `asked` vectors of each factor; returns the number."""
        num_resting = sum(rest > 0 for rest in self.of_a.rest)
        count = max(0, min(asked, self.rank // 2 - num_resting, self.num_candidates - self.rank))
        for side, other in ((self.of_a, self.of_b), (self.of_b, self.of_a)):
            for n in range(count):
                slot = (self.next_candidate + n) % self.num_candidates
                i, difference = side.switch(slot, self.puts_back)
                product = torch.outer(other.vectors[i], difference)
                self.W += self.scale * (product if side is self.of_a else product.T)
                other.rest[i] = freeze_steps
                if self.resets in ("counterpart", "both"):
                    other.reset(i)
                if self.resets == "momentum":
                    other.mean[i] = 0
                if self.resets == "both":
                    side.reset(i)
        self.next_candidate = (self.next_candidate + count) % self.num_candidates
        return count

    @torch.no_grad()
    def update(self, **hyper):
        self.of_a.update(self.A.grad, **hyper)
        self.of_b.update(self.B.grad.T, **hyper)


class ReferenceSwitchLora:
    """One step of all layers; torch's AdamW trains the other parameters."""

    def __init__(self, layers, others, rates, interval, freeze_steps, **hyper):
        self.layers, self.rates = layers, rates
        self.interval, self.freeze_steps = interval, freeze_steps
        self.hyper = hyper  # of AdamW
        self.dense = torch.optim.AdamW(others, foreach=False, **self.hyper)
        self.step_number = 0
        self.num_switched = [0] * len(layers)
        self.last_resting = 0

    def step(self):
        t = self.step_number
        for index, layer in enumerate(self.layers):
            phase = (index + 0.5) / GOLDEN_RATIO % 1
            before, after = (
                layer.rank / self.interval * math.fsum(self.rates[:end]) + phase
                for end in (t, t + 1)
            )
            self.num_switched[index] += layer.switch(
                math.floor(after) - math.floor(before), self.freeze_steps
            )
        self.last_resting = sum(
            rest > 0 for layer in self.layers for rest in layer.of_a.rest + layer.of_b.rest
        )
        for layer in self.layers:
            layer.update(**self.hyper)
        self.dense.step()
        self.step_number += 1


def switch_rate(config, step, num_steps):
    """The formulas of the three decays, number by number."""
    horizon = config.decay_ratio * num_steps
    if config.decay == "exponential":
        return 0.3 ** ((step + 1) / horizon)
    if config.decay == "sigmoid":
        return 1 - 1 / (1 + math.exp(-10 * (step / horizon - 1)))
    return 1.0


def splitmix64_outputs(seed, count):
    """The published generator, with Python integers: an incremented state, and a mix of it."""
    outputs = []
    for _ in range(count):
        seed = (seed + 0x9E3779B97F4A7C15) % 2**64
        z = (seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        outputs.append(z ^ (z >> 31))
    return outputs


def constant_candidates(seed, name, num_candidates, width, bound):
    """[num_candidates, width] fp32: a generator seeds one per slot, which draws the elements."""
    key = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1
    # The upper 24 bits as a signed number, over 2^23.
    rows = [
        [((output >> 40) ^ 2**23) - 2**23 for output in splitmix64_outputs(slot_key, width)]
        for slot_key in splitmix64_outputs(key, num_candidates)
    ]
    return torch.tensor(rows, dtype=torch.float32) * (
        torch.tensor(bound, dtype=torch.float32) / 2**23
    )
