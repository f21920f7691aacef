"""Reaches inside the product, where no public name shows what it does."""

from switchtitan.data import sources
from switchtitan.methods.adapter import contraction as contractions
from switchtitan.models import loss
from switchtitan.training import output


def wait_for_shared_folders(seconds):
    """Sets how long a rank waits, in this process, to see a folder that another has made."""
    output._VISIBLE_WITHIN_S = seconds


def wait_for_owners(monkeypatch, seconds):
    """Sets how long a run waits, in this process, for another one to leave its folder."""
    monkeypatch.setattr(output, "_ENDS_WITHIN_S", seconds)


def agree_on(monkeypatch, stop, number):
    """Lets a `Stop` find this signal when it asks all ranks."""
    monkeypatch.setattr(stop, "_agree", lambda: number)


def read_tokens_at_a_time(monkeypatch, num_tokens):
    """Sets how many tokens of a file of token ids are read at a time."""
    monkeypatch.setattr(sources, "_BLOCK_TOKENS", num_tokens)


def align_rows(monkeypatch, is_aligned):
    """Pads rows of logits on a CPU as on a GPU, or does not."""
    devices = {"cpu"} if is_aligned else {"cuda"}
    monkeypatch.setattr(loss, "_DEVICES_WITH_ALIGNED_ROWS", devices)


def record_strides(cross_entropy):
    """Returns a list to which each chunk adds its logits' stride of rows."""
    strides, compute = [], cross_entropy._loss_and_gradient

    def recorded(logits, *args):
        strides.append(logits.stride(0))
        return compute(logits, *args)

    cross_entropy._loss_and_gradient = recorded
    return strides


def num_flops(contraction, out_features, *rest):
    """Returns the FLOPs of forward and backward, by the table that chooses among contractions.

    Args:
        rest: in_features, rank and the number of tokens.
    """
    products = contractions._products(contraction.__name__, out_features, *rest)
    return sum(2 * m * k * n for m, k, n in products)
