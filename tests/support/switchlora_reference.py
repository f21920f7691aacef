"""A reference SwitchLoRA: vector by vector in Python, with explicit pointers, slots and timers."""

import hashlib
import math

import torch
import torch.nn.functional as F
from torch import nn

GOLDEN_RATIO = (1 + math.sqrt(5)) / 2


class ReferenceLayer(nn.Module):
    """x W^T + s (x A^T) B^T with candidates; W [out, in] is the plain layer's initial weight.

    `slot_a[i]`, `slot_b[i]` are the candidates in row i of A and column i of B; `rest_a[i]`,
    `rest_b[i]` are the steps for which they remain frozen.

    Args:
        puts_back: whether switched-out vectors become candidates; otherwise they are dropped.
        resets: moments that a switch resets: "counterpart", "both" or "none"; "momentum": only the
            counterpart's first moment.
    """

    def __init__(self, weight, candidates_a, candidates_b, rank, scale, puts_back, resets):
        super().__init__()
        self.puts_back, self.resets = puts_back, resets
        self.rank, self.scale, self.num_candidates = rank, scale, min(weight.shape)
        self.candidates_a, self.candidates_b = candidates_a.clone(), candidates_b.clone()
        self.A = nn.Parameter(torch.zeros(rank, weight.shape[1], dtype=weight.dtype))
        self.B = nn.Parameter(torch.zeros(weight.shape[0], rank, dtype=weight.dtype))
        self.slot_a, self.slot_b = {}, {}
        for i in range(rank):
            slot, column = self.num_candidates - rank + i, (rank // 2 + i) % rank
            self.slot_a[i] = self.slot_b[column] = slot
            self.A.data[i] = candidates_a[slot]
            self.B.data[:, column] = candidates_b[:, slot]
        self.W = weight - scale * self.B.detach() @ self.A.detach()
        self.next_row, self.next_column, self.next_candidate = 0, rank // 2, 0
        self.rest_a, self.rest_b = [0] * rank, [0] * rank
        self.steps_a, self.steps_b = [0] * rank, [0] * rank
        self.moments_a = torch.zeros_like(self.A.data), torch.zeros_like(self.A.data)
        self.moments_b = torch.zeros_like(self.B.data), torch.zeros_like(self.B.data)

    def forward(self, x):
        return F.linear(x, self.W) + self.scale * F.linear(F.linear(x, self.A), self.B)

    @torch.no_grad()
    def switch(self, asked, freeze_steps):
        """Switches at most `asked` vectors of each factor; returns the number."""
        num_resting = sum(rest > 0 for rest in self.rest_a)
        count = max(0, min(asked, self.rank // 2 - num_resting, self.num_candidates - self.rank))
        first_candidate = self.next_candidate
        for n in range(count):
            i, slot = self.next_row, (first_candidate + n) % self.num_candidates
            old, new = self.A[i].clone(), self.candidates_a[slot].clone()
            self.W += self.scale * torch.outer(self.B[:, i], old - new)
            if self.puts_back:
                self.candidates_a[self.slot_a[i]] = old
            self.A[i], self.slot_a[i] = new, slot
            self.rest_b[i] = freeze_steps
            if self.resets in ("counterpart", "both"):
                self.reset_b(i)
            if self.resets == "momentum":
                self.moments_b[0][:, i] = 0
            if self.resets == "both":
                self.reset_a(i)
            self.next_row = (self.next_row + 1) % self.rank
        for n in range(count):
            j, slot = self.next_column, (first_candidate + n) % self.num_candidates
            old, new = self.B[:, j].clone(), self.candidates_b[:, slot].clone()
            self.W += self.scale * torch.outer(old - new, self.A[j])
            if self.puts_back:
                self.candidates_b[:, self.slot_b[j]] = old
            self.B[:, j], self.slot_b[j] = new, slot
            self.rest_a[j] = freeze_steps
            if self.resets in ("counterpart", "both"):
                self.reset_a(j)
            if self.resets == "momentum":
                self.moments_a[0][j] = 0
            if self.resets == "both":
                self.reset_b(j)
            self.next_column = (self.next_column + 1) % self.rank
        self.next_candidate = (first_candidate + count) % self.num_candidates
        return count

    def reset_a(self, row):
        self.moments_a[0][row] = self.moments_a[1][row] = 0
        self.steps_a[row] = 0

    def reset_b(self, column):
        self.moments_b[0][:, column] = self.moments_b[1][:, column] = 0
        self.steps_b[column] = 0

    @torch.no_grad()
    def update(self, lr, betas, eps, weight_decay):
        """AdamW on each vector, then decrements the freeze timers."""
        moments_b = [moment.T for moment in self.moments_b]
        for vectors, gradients, moments, steps, rest in (
            (self.A, self.A.grad, self.moments_a, self.steps_a, self.rest_a),
            (self.B.T, self.B.grad.T, moments_b, self.steps_b, self.rest_b),
        ):
            for i in range(self.rank):
                gradient = torch.zeros_like(gradients[i]) if rest[i] > 0 else gradients[i]
                steps[i] += 1
                mean, square = moments[0][i], moments[1][i]
                mean.copy_(betas[0] * mean + (1 - betas[0]) * gradient)
                square.copy_(betas[1] * square + (1 - betas[1]) * gradient**2)
                if rest[i] > 0:
                    rest[i] -= 1
                    continue
                mean = mean / (1 - betas[0] ** steps[i])
                square = square / (1 - betas[1] ** steps[i])
                vectors[i] -= lr * weight_decay * vectors[i]
                vectors[i] -= lr * mean / (square.sqrt() + eps)


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
            rest > 0 for layer in self.layers for rest in layer.rest_a + layer.rest_b
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
