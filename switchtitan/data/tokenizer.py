"""Tokenizers from a file, the hub or trained on the corpus; the tokens that begin and end a
document, and bytes of text."""

import hashlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from switchtitan.errors import CorpusError
from switchtitan.files import file_inside

# Unless this is set, the tokenizers library warns in every process forked later.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

TRAINED_EOS = "<|endoftext|>"
_COMMON_EOS_TOKENS = "</s> <|endoftext|> <eos> <|end_of_text|> <|eos|> [EOS] <｜end▁of▁sentence｜>"
_EOS_TOKENS = tuple(_COMMON_EOS_TOKENS.split())
_SETTINGS_FILE = "tokenizer_config.json"


@dataclass(frozen=True)
class DocumentTokenizer:
    """A tokenizer and the tokens that begin and end a document."""

    tokenizer: Tokenizer
    """Changed: it neither cuts nor pads, and reads "</s>" within a document as text."""
    eos_token: str

    def __post_init__(self) -> None:
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True

    @cached_property
    def bos_ids(self) -> list[int]:
        """The tokens that the tokenizer puts before every text, such as a BOS; empty if none."""
        encoding = self.tokenizer.encode("a")
        tokens = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
        return [token for token, _ in takewhile(lambda pair: pair[1] == 1, tokens)]

    @property
    def bos_token(self) -> str | None:
        """The first of the tokens that begin a document; None without one."""
        return self.tokenizer.id_to_token(self.bos_ids[0]) if self.bos_ids else None

    @cached_property
    def eos_id(self) -> int:
        eos_id = self.tokenizer.token_to_id(self.eos_token)
        assert eos_id is not None
        return eos_id

    @cached_property
    def vocab_size(self) -> int:
        """The largest id plus one: the smallest embedding that fits."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def dtype(self) -> Literal["uint16", "uint32"]:
        """Of token files."""
        return "uint16" if self.vocab_size <= 1 << 16 else "uint32"

    @cached_property
    def serialized(self) -> str:
        """The contents of `tokenizer.json`."""
        return self.tokenizer.to_str()

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.serialized.encode()).hexdigest()

    def without_bos(self) -> "DocumentTokenizer":
        """Returns the tokenizer that puts nothing before a text, nor after it."""
        if not self.bos_ids:
            return self
        tokenizer = Tokenizer.from_str(self.serialized)
        tokenizer.post_processor = None
        return DocumentTokenizer(tokenizer, self.eos_token)

    def encode_documents(self, documents: list[str]) -> list[list[int]]:
        """Returns the token ids of each document, with what begins it, without end token; uses all
        cores."""
        encodings = self.tokenizer.encode_batch_fast(documents, add_special_tokens=False)
        return [self.bos_ids + encoding.ids for encoding in encodings]


def check_vocabulary(vocab_size: int, model_vocab_size: int, where: str) -> None:
    """Raises a CorpusError if the tokenizer `where` has more tokens than a model can embed."""
    if vocab_size > model_vocab_size:
        raise CorpusError(
            f"[model] vocab_size = {model_vocab_size}: {where} has {vocab_size} tokens; increase "
            "[model] vocab_size to at least that, or choose a smaller tokenizer ([data] tokenizer, "
            "or [data] vocab_size if it is trained)"
        )


def read_tokenizer(path: Path, eos_token: str | None = None) -> DocumentTokenizer:
    """Reads a `tokenizer.json`, or the one in a folder. Raises a CorpusError if that fails.

    Args:
        eos_token: the token that ends a document; by default `eos_token` of a
            `tokenizer_config.json` or a corpus's index next to the file, or the first common one in
            the vocabulary.
    """
    try:
        path = path.expanduser()
        file = file_inside(path, "tokenizer.json") if path.is_dir() else path
        tokenizer = Tokenizer.from_str(file.read_text(encoding="utf-8"))
    # The library raises bare Exception, and for its own bugs a class outside of it.
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CorpusError(
            f"[data] tokenizer or --tokenizer = {str(path)!r}: cannot be read ({error}); expected "
            "a tokenizer.json or a folder with one; [data] tokenizer can also be 'train', or a "
            "name on the Hugging Face hub"
        ) from error
    for token in (eos_token or _configured_eos(file.parent), *_EOS_TOKENS):
        if token is not None and tokenizer.token_to_id(token) is not None:
            return DocumentTokenizer(tokenizer, token)
    raise CorpusError(
        f"{file}: the tokenizer has no end-of-document token; expected one of "
        f"{', '.join(_EOS_TOKENS)}, or eos_token in a tokenizer_config.json next to it"
    )


def fetch_tokenizer(name: str) -> DocumentTokenizer:
    """Loads a tokenizer by its name on the hub, from the local cache if it is there; see
    `read_tokenizer`."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=["tokenizer.json", _SETTINGS_FILE]))
        (folder / "tokenizer.json").stat()
    except Exception as error:  # the errors of the client's transport
        raise CorpusError(
            f"[data] tokenizer = {name!r}: cannot download {name}/tokenizer.json from the Hugging "
            f"Face hub ({error}); expected the name of a repository that has one, or a local path"
        ) from error
    return read_tokenizer(folder)


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> DocumentTokenizer:
    """Trains a byte-level BPE (Sennrich et al. 2016; bytes as in GPT-2); token 0 ends a document.

    It has all 256 bytes, and less than `vocab_size` tokens if there are too few pairs to merge."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[TRAINED_EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return DocumentTokenizer(tokenizer, TRAINED_EOS)


def _configured_eos(folder: Path) -> str | None:
    """Returns `eos_token`, a string or an object with `content`, of a Hugging Face folder or of a
    prepared corpus."""
    places = ((_SETTINGS_FILE, "eos_token", "content"), ("index.json", "tokenizer", "eos_token"))
    for name, *keys in places:
        try:
            value = json.loads(file_inside(folder, name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError) as error:
            raise CorpusError(f"{folder / name}: expected a file of JSON ({error})") from error
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else value
        return value if isinstance(value, str) else None
    return None


# The text that tokens stand for.
class TextSize(NamedTuple):
    """The size of text that a model is evaluated on."""

    num_tokens: int
    """Tokens that are predicted."""
    num_bytes: int
    """UTF-8 bytes of their text. Ends of documents have none."""

    def bits_per_byte(self, loss: float) -> float | None:
        """Returns the bits that a model needs for one byte of text; None without text. `loss` is
        its mean over the tokens, in nats."""
        if self.num_bytes == 0:
            return None
        return loss * self.num_tokens / (math.log(2) * self.num_bytes)


def num_text_bytes(tokens: NDArray[np.int64], documents: DocumentTokenizer) -> int:
    """Returns the UTF-8 bytes of the text of `tokens[1:]`, [tokens], without what begins and ends
    documents.

    A byte-level tokenizer's are exact for any part of a document. Those of others are counted in
    the decoded text, which lacks what the tokenizer drops, such as T5's line breaks.
    """
    tokenizer = documents.tokenizer
    if isinstance(tokenizer.decoder, decoders.ByteLevel):
        table = np.zeros(documents.vocab_size, dtype=np.int64)
        for piece, token in tokenizer.get_vocab(with_added_tokens=False).items():
            table[token] = len(piece)  # one character for each byte
        for token, added in tokenizer.get_added_tokens_decoder().items():
            table[token] = 0 if added.special else len(added.content.encode())
        return int(table[tokens[1:]].sum())
    ends = np.flatnonzero(tokens == documents.eos_id)
    no_text = [*documents.bos_ids, documents.eos_id]
    ids = [part[~np.isin(part, no_text)].tolist() for part in np.split(tokens, ends)]
    context = tokens[:1][~np.isin(tokens[:1], no_text)].tolist()
    decoded = tokenizer.decode_batch([*ids, context], skip_special_tokens=False)
    *texts, before = (len(text.encode()) for text in decoded)
    return sum(texts) - before
