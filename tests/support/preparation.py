"""Preparations of a corpus in their own process, and their documents."""

import subprocess
import sys

import numpy as np

from switchtitan.data import Corpus, DataConfig

ONE_RUN = """
import os, signal, sys
from pathlib import Path
from switchtitan.data import DataConfig, open_prepared, prepare_corpus
from switchtitan.data import prepare, segments

segments._BATCH_DOCUMENTS = 8
config = DataConfig.model_validate_json(sys.argv[1])
stop_after = int(sys.argv[2])
finished = 0
write_segment = prepare.write_segment

def write_and_stop(batches, *arguments, **settings):
    global finished
    progress = write_segment(batches, *arguments, **settings)
    finished += 1
    if finished == stop_after:
        os.kill(os.getpid(), signal.SIGKILL)
    return progress

prepare.write_segment = write_and_stop
folder = prepare_corpus(config, show_progress=False, segment_tokens=500)
print(open_prepared(folder).fingerprint)
"""


def run_alone(config: DataConfig, stop_after: int = 0) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", ONE_RUN, config.model_dump_json(), str(stop_after)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def read_split(corpus: Corpus, split: str) -> list[str]:
    """Decodes the documents of a split."""
    tokens = np.concatenate(
        [
            np.fromfile(corpus.folder / shard.file, dtype=corpus.index.dtype)
            for shard in corpus.index.splits[split]
        ]
    ).tolist()
    tokenizer = corpus.tokenizer().tokenizer
    documents, start = [], 0
    for place, token in enumerate(tokens):
        if token == corpus.eos_id:
            documents.append(tokenizer.decode(tokens[start:place], skip_special_tokens=False))
            start = place + 1
    assert start == len(tokens)
    return documents
