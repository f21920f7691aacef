"""Tokenizers: read from a file or the hub, or trained on the corpus; and the token that ends a document."""

import hashlib
import json
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from switchtitan.errors import CorpusError

logger = logging.getLogger(__name__)

TRAINED_EOS = "<|endoftext|>"

_EOS_TOKENS = (
    "</s>",
    "<|endoftext|>",
    "<eos>",
    "<|end_of_text|>",
    "<|eos|>",
    "[EOS]",
    "<｜end▁of▁sentence｜>",
)


@dataclass(frozen=True)
class DocumentTokenizer:
    """A tokenizer ready to turn whole documents into ids, each closed by `eos_id`."""

    tokenizer: Tokenizer
    eos_token: str

    @cached_property
    def eos_id(self) -> int:
        eos_id = self.tokenizer.token_to_id(self.eos_token)
        assert eos_id is not None
        return eos_id

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id: what a model's embedding must hold at least."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def serialized(self) -> str:
        """The contents of its `tokenizer.json`."""
        return self.tokenizer.to_str()

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.serialized.encode()).hexdigest()

    def encode_documents(self, documents: list[str]) -> list[list[int]]:
        """Token ids of each document, without its end token; on all cores."""
        # Read by the tokenizers library: unless set, it warns in every process that is forked later.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        encodings = self.tokenizer.encode_batch_fast(documents, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]


def read_tokenizer(path: Path, eos_token: str | None = None) -> DocumentTokenizer:
    """Reads a `tokenizer.json`, or the one in a folder.

    Args:
        path: the file or the folder.
        eos_token: the token that ends a document; None takes `eos_token` of the settings next to the file, or
            else the first of the usual ones that the vocabulary has.

    Raises:
        CorpusError: if there is none, it cannot be parsed, or it has no token that ends a document.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise CorpusError(
            f'[data] tokenizer = "{path}": there is no file {file}; expected a tokenizer.json, a folder with '
            f'one, a name on the Hugging Face hub, or "train"'
        )
    try:
        tokenizer = Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # The library raises bare Exception.
        raise CorpusError(
            f"{file}: not a tokenizer that the tokenizers library reads ({error})"
        ) from error
    return _document_tokenizer(tokenizer, str(file), eos_token or _configured_eos(file.parent))


def fetch_tokenizer(name: str) -> DocumentTokenizer:
    """Fetches a tokenizer by its name on the Hugging Face hub, from the local cache where it is there.

    Raises:
        CorpusError: if the hub does not give it, or it has no token that ends a document.
    """
    try:
        tokenizer = Tokenizer.from_pretrained(name)
    except Exception as error:  # The library raises bare Exception; the hub's client raises its transport's errors.
        raise CorpusError(
            f'[data] tokenizer = "{name}": the Hugging Face hub does not give {name}/tokenizer.json '
            f"({error}); expected the "
            f"name of a repository that has one, or a local path"
        ) from error
    return _document_tokenizer(tokenizer, name, None)


def is_cached(name: str) -> bool:
    """Whether a hub tokenizer lies in the local cache, so that the hub is not needed."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "tokenizer.json"), str)


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> DocumentTokenizer:
    """Trains a byte-level BPE (Sennrich et al. 2016; bytes as in GPT-2) whose first token ends a document.

    Every text can be encoded and comes back exactly, since the 256 bytes are in the vocabulary. It is smaller
    than `vocab_size` where the documents do not have that many pairs to merge.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # See encode_documents.
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
    return _document_tokenizer(tokenizer, "the trained tokenizer", TRAINED_EOS)


def _document_tokenizer(
    tokenizer: Tokenizer, where: str, eos_token: str | None
) -> DocumentTokenizer:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # A document that spells out "</s>" must not end there.
    tokenizer.encode_special_tokens = True
    for token in (eos_token, *_EOS_TOKENS):
        if token is not None and tokenizer.token_to_id(token) is not None:
            return DocumentTokenizer(tokenizer, token)
    raise CorpusError(
        f"{where}: the tokenizer has no token that ends a document; expected one of "
        f"{', '.join(_EOS_TOKENS)}, or eos_token in a tokenizer_config.json next to it"
    )


def _configured_eos(folder: Path) -> str | None:
    """`eos_token` of a Hugging Face tokenizer folder: a string, or an object with its content."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        try:
            settings = json.loads((folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except ValueError as error:
            raise CorpusError(f"{folder / name}: expected JSON ({error})") from error
        token = settings.get("eos_token") if isinstance(settings, dict) else None
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            return token
    return None
