"""A text as the sequences of a model, and its continuation, one token at a time."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from switchtitan.contracts import LanguageModel
from switchtitan.data.sequences import ONE_SOURCE, Sequences, TokenSequences
from switchtitan.data.tokenizer import DocumentTokenizer, TextSize
from switchtitan.errors import ConfigError


def read_text(option: str, file: str) -> str:
    """Returns the UTF-8 text of the file that a command's option gives; `-` is standard input.
    Raises a ConfigError if it cannot be read."""
    try:
        with open(0 if file == "-" else file, "rb") as stream:
            return stream.read().decode()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"{option} {file}: cannot be read ({reason}); expected a UTF-8 file"
        ) from error


def held_out_text(
    file: str, num_tokens: int | None, own: DocumentTokenizer, seq_len: int
) -> tuple[Sequences, range, TextSize]:
    """Returns the sequences of a text file, one document without its end, the last one padded; the
    places of its tokens among their targets, of which each is one once; and its size. Takes only
    its first `num_tokens` tokens if that is not None. Raises a ConfigError if the file cannot be
    read, is not UTF-8 or is empty."""
    text = read_text("--text", file)
    encoding = own.tokenizer.encode(text, add_special_tokens=False)
    ids = encoding.ids
    if num_tokens is not None and num_tokens < len(ids):
        ids = ids[:num_tokens]
        text = text[: encoding.offsets[num_tokens - 1][1]]
    if not ids:
        raise ConfigError(f"--text {file}: has no text; expected a UTF-8 file with text")
    # A text follows what the tokenizer begins with, or the end of a document.
    context = own.bos_ids or [own.eos_id]
    end = len(context) - 1 + len(ids)
    padded = np.full(-(-end // seq_len) * seq_len + 1, own.eos_id)
    padded[: end + 1] = [*context, *ids]
    sequences = Sequences([TokenSequences([padded], seq_len, own.eos_id)], [file], ONE_SOURCE)
    return sequences, range(len(context) - 1, end), TextSize(len(ids), len(text.encode()))


# The continuation.
def continuation(
    model: LanguageModel,
    prompt: Sequence[int],
    choose: Callable[[Tensor], int],
    num_tokens: int,
    device: torch.device,
) -> Iterator[int]:
    """Yields the next token of a sequence, `num_tokens` times.

    Args:
        model: for passes without gradients, on `device`; see `TrainedModel.load`.
        prompt: its tokens, at least one.
        choose: logits [vocabulary] -> the next token, e.g. a `Sampler`.
    """
    cache = model.new_cache(len(prompt) + num_tokens, device)
    cached = {} if cache is None else {"cache": cache}
    sequence = unread = list(prompt)
    for _ in range(num_tokens):
        tokens = torch.tensor([unread], device=device)
        document_ids = torch.zeros_like(tokens, dtype=torch.int32)
        token = choose(model(tokens, document_ids, lambda x, head: head(x[:, -1])[0], **cached))
        yield token
        sequence.append(token)
        unread = sequence if cache is None else [token]


@dataclass
class Sampler:
    """Chooses tokens; the same logits in the same order give the same tokens."""

    temperature: float = 1.0
    """Divides the logits; 0 always chooses the most probable token."""
    top_k: int | None = None
    """Only the `top_k` most probable tokens, and those as probable as the last of them."""
    top_p: float | None = None
    """Only the fewest most probable tokens whose probabilities add up to `top_p` or more."""
    seed: int = 0
    """Of the random numbers, at least 0. Without effect at temperature 0."""

    def __post_init__(self) -> None:
        # Not the global generator, whose state belongs to training.
        self._generator = torch.Generator().manual_seed(self.seed)

    def __call__(self, logits: Tensor) -> int:
        """Returns a token for `logits` [vocabulary], on any device."""
        if self.temperature == 0:
            return int(logits.argmax())
        # Drawn on the CPU, so that a seed means the same on every device.
        chances = self.probabilities(logits.float().cpu())
        return int(torch.multinomial(chances, 1, generator=self._generator))

    def probabilities(self, logits: Tensor) -> Tensor:
        """Returns the probabilities of tokens [vocabulary] at a temperature above 0, of logits
        [vocabulary] in fp32 or wider."""
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < len(logits):
            last_kept = logits.topk(self.top_k).values[-1]
            logits = logits.masked_fill(logits < last_kept, -torch.inf)
        if self.top_p is not None:
            ordered, order = logits.sort(descending=True, stable=True)
            chances = ordered.softmax(dim=-1)
            # A token stays if those before it do not suffice. So the first one always stays.
            is_dropped = chances.cumsum(dim=-1) - chances >= self.top_p
            is_dropped[0] = False
            logits[order[is_dropped]] = -torch.inf
        return logits.softmax(dim=-1)


def text_pieces(
    tokenizer: Tokenizer, prompt: Sequence[int], tokens: Iterable[int]
) -> Iterator[str]:
    """Yields the text after a prompt while its tokens come, in pieces that end between characters.

    Special tokens have no text. The last piece is what was held back until the tokens ended.
    """
    read, num_shown = list(prompt), len(tokenizer.decode(list(prompt)))
    for token in tokens:
        read.append(token)
        # The text of a token depends on those before it.
        piece = tokenizer.decode(read)[num_shown:]
        if piece.endswith("\N{REPLACEMENT CHARACTER}"):  # a part of a character, so far
            piece = ""
        num_shown += len(piece)
        yield piece
    yield tokenizer.decode(read)[num_shown:]
