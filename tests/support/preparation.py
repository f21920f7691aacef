"""Preparations of a corpus that stop, and the documents of a corpus."""

import subprocess
import sys

import numpy as np
import pytest

from support.tiny_documents import write_json_lines
from switchtitan.data import prepare
from switchtitan.data.config import DataConfig
from switchtitan.data.prepare import open_corpus
from switchtitan.data.tokenizer import DocumentTokenizer

ONE_RUN = """
import sys
from switchtitan.data import prepare
from switchtitan.data.config import DataConfig
from switchtitan.data.prepare import open_corpus

prepare.CHUNK_DOCUMENTS, prepare.SEGMENT_TOKENS = 8, 500
print(open_corpus(DataConfig.model_validate_json(sys.argv[1])).fingerprint)
"""


def write_documents(folder, documents, **keys):
    """Writes documents as JSON Lines; returns the configuration of their corpus."""
    write_json_lines(folder / "in" / "a.jsonl", documents)
    return DataConfig(dataset="jsonl", path=folder / "in", cache_dir=folder / "out", **keys)


def start_preparation(config):
    """Starts a preparation in its own process, which prints the fingerprint."""
    command = [sys.executable, "-c", ONE_RUN, config.model_dump_json()]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def use_small_batches(monkeypatch, num_documents=8):
    """Lets preparations tokenize few documents at a time, in small segments."""
    monkeypatch.setattr(prepare, "CHUNK_DOCUMENTS", num_documents)
    monkeypatch.setattr(prepare, "SEGMENT_TOKENS", 500)


def count_encoded(monkeypatch, stop_after=None):
    """Returns a list that grows by the number of documents of each batch that is tokenized.

    Args:
        stop_after: raises KeyboardInterrupt in place of the batch after so many.
    """
    counts, encode = [], DocumentTokenizer.encode_documents

    def encode_and_count(tokenizer, documents):
        if len(counts) == stop_after:
            raise KeyboardInterrupt
        counts.append(len(documents))
        return encode(tokenizer, documents)

    monkeypatch.setattr(DocumentTokenizer, "encode_documents", encode_and_count)
    return counts


def prepare_until_the_rename(config):
    """Prepares a corpus until it would get its name; returns the unfinished folder."""

    def stop(*arguments):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("os.rename", stop)
        with pytest.raises(KeyboardInterrupt):
            open_corpus(config)
    (unfinished,) = config.cache_dir.glob("*.partial")
    return unfinished


def tokens_of(corpus, split):
    """Returns the tokens of a split as they are stored."""
    files = [corpus.folder / shard.file for shard in corpus.index.splits[split]]
    return np.concatenate([np.fromfile(file, corpus.index.dtype) for file in files]).tolist()


def read_split(corpus, split):
    """Decodes the documents of a split."""
    tokens = tokens_of(corpus, split)
    tokenizer = corpus.tokenizer().tokenizer
    documents, start = [], 0
    for place, token in enumerate(tokens):
        if token == corpus.index.tokenizer.eos_id:
            documents.append(tokenizer.decode(tokens[start:place], skip_special_tokens=False))
            start = place + 1
    assert start == len(tokens)
    return documents
