"""Text from files, prompts to tokens, and tokens to text as they come."""

from collections.abc import Iterable, Iterator, Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from switchtitan.data.tokenizer import DocumentTokenizer
from switchtitan.errors import ConfigError


def read_text(option: str, file: str) -> str:
    """Returns the UTF-8 text of the file that a command's option gives; `-` is standard input.

    Raises:
        ConfigError: if it cannot be read.
    """
    try:
        with open(0 if file == "-" else file, "rb") as stream:
            return stream.read().decode()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"{option} {file}: cannot be read ({reason}); expected a UTF-8 file"
        ) from error


def prompt_ids(documents: DocumentTokenizer, text: str) -> list[int]:
    """Returns the tokens of a text that is to be continued: without a token that ends a text."""
    ids: list[int] = documents.tokenizer.encode(text, add_special_tokens=False).ids
    return documents.bos_ids + ids


def text_pieces(
    tokenizer: Tokenizer, prompt: Sequence[int], tokens: Iterable[int]
) -> Iterator[str]:
    """Yields the text after a prompt while its tokens come, in pieces that end between characters.

    Special tokens have no text. The last piece is what was held back until the tokens ended.
    """
    stream = DecodeStream(ids=list(prompt), skip_special_tokens=True)
    read, num_shown = list(prompt), len(tokenizer.decode(list(prompt)))
    for token in tokens:
        read.append(token)
        try:
            piece = stream.step(tokenizer, token) or ""
        except Exception:  # nothing narrower: bytes that are no character took back a shown one
            piece = tokenizer.decode(read)[num_shown:]
            stream = DecodeStream(ids=list(read), skip_special_tokens=True)
        num_shown += len(piece)
        yield piece
    yield tokenizer.decode(read)[num_shown:]
