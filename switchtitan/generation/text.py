"""Prompts to tokens, and tokens to text as they come."""

from collections.abc import Sequence

from tokenizers import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What decoders put in place of bytes that are no character, or not yet one."""
_CONTEXT = 8
"""Tokens before a new one that are decoded with it: a token's text can depend on those before."""


def prefix_ids(tokenizer: Tokenizer) -> list[int]:
    """Returns the tokens that the tokenizer puts before every text, such as a BOS."""
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    full = tokenizer.encode("a", add_special_tokens=True).ids
    starts = range(len(full) - len(plain) + 1)
    start = next((at for at in starts if full[at : at + len(plain)] == plain), 0)
    ids: list[int] = full[:start]
    return ids


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Returns the tokens of a text that is to be continued: without a token that ends a text."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return prefix_ids(tokenizer) + ids


class TextStream:
    """The text of a growing sequence of tokens, in pieces that end between characters.

    The pieces together are the text of all tokens. Special tokens have no text.

    Args:
        prompt: the tokens before the first new one.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-_CONTEXT:])
        self._shown = self._decode()

    def add(self, token: int) -> str:
        """Returns the new characters; none while the bytes of a character are incomplete."""
        self._ids.append(token)
        text = self._decode()
        if text.endswith(REPLACEMENT):
            return ""
        new = text[len(self._shown) :]
        if len(self._ids) > 2 * _CONTEXT:
            self._ids = self._ids[-_CONTEXT:]
            text = self._decode()
        self._shown = text
        return new

    def rest(self) -> str:
        """Returns what `add` still holds back, at the end of the sequence."""
        return self._decode()[len(self._shown) :]

    def _decode(self) -> str:
        text: str = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        return text
