"""Tokenizes a corpus into memory-mapped shards, once, before training, or shows a corpus.

    switchtitan prepare --config train_configs/llama_350m_switchlora.toml
    switchtitan prepare --dataset text --path books/ --vocab_size 8192
    switchtitan prepare --corpus corpora/pystdlib-0123456789ab --show 3

--config FILE uses the [data] section of a training configuration. Its keys are options too, with or
without `data.`; docs/CONFIGURATION.md and `switchtitan train --help-all` describe them. The same
command resumes a stopped preparation. --show also prints sequences as the model sees them, with
the end tokens of documents."""

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np

from switchtitan.cli.main import positive_int
from switchtitan.config import find_config, load_config, read_with_bases, split_arguments
from switchtitan.data.config import DataConfig
from switchtitan.data.corpus import Corpus, SplitName, open_prepared
from switchtitan.data.prepare import open_corpus
from switchtitan.errors import ConfigError
from switchtitan.job.config import JobConfig, print_note
from switchtitan.registry import Section


class DataJobConfig(Section):
    """The configuration without --config."""

    data: DataConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--corpus", type=Path, metavar="FOLDER", help="only show a prepared corpus")
    parser.add_argument(
        "--show", type=positive_int, nargs="?", const=3, metavar="N", help="show N sequences (3)"
    )
    parser.add_argument(
        "--split", choices=["train", "validation", "test"], default="train", help="of --show"
    )
    seed = "show what a run with [job] seed = S reads first (default: the start of the split)"
    parser.add_argument("--seed", type=int, metavar="S", help=seed)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Prepares or opens the corpus; prints and returns its counts, and sequences. Raises a
    UserError if it cannot be read or prepared, or has no such split."""
    config = read_data_config(options.keys)
    if options.corpus is None:
        corpus = open_corpus(config)
        corpus.verify(math.inf)
    else:
        corpus = open_prepared(options.corpus)
        for key in config.model_fields_set - {"seq_len"}:
            raise ConfigError(f"[data] {key}: has no effect with --corpus; leave one out")
    tokenizer = corpus.index.tokenizer
    result = {
        "description": corpus.description,
        "fingerprint": corpus.fingerprint,
        "tokenizer": tokenizer.model_dump(mode="json"),
        "corpora": [_show_source(source) for source in corpus.sources],
    }
    if corpus.parts:
        print(f"mixture      {corpus.description}")
    print(f"tokenizer    {tokenizer.vocab_size:,} tokens, documents end in {tokenizer.eos_token}")
    print(f"fingerprint  {corpus.fingerprint}")
    if options.show is not None:
        result |= _show_sequences(corpus, options.split, config.seq_len, options.show, options.seed)
    return result


def read_data_config(words: list[str]) -> DataConfig:
    """Returns the section that a command line describes."""
    file, wants_help, overrides = split_arguments(words, section="data")
    if wants_help:
        raise ConfigError("--help-all: `switchtitan train --help-all` describes the keys of [data]")
    if file is None:
        config = load_config(DataJobConfig, [], overrides, print_note).data
    else:
        tables = read_with_bases(find_config(file))
        config = load_config(JobConfig, tables, overrides, print_note).data
    for message in config.without_effect():
        print_note(f"[data] {message}; remove it")
    return config


def _show_source(source: Corpus) -> dict[str, Any]:
    index, splits = source.index, {}
    print(f"folder       {source.folder}\nsource       {source.description}")
    if index.revision is not None:
        print(f"revision     {index.revision}")
    for split in index.splits:
        num_tokens, num_documents = index.num_tokens(split), index.num_documents(split)
        print(f"{split:<12} {num_tokens:,} tokens, {num_documents:,} documents")
        splits[split] = {"tokens": num_tokens, "documents": num_documents}
    return {
        "folder": str(source.folder),
        "source": source.description,
        "revision": index.revision,
        "fingerprint": source.fingerprint,
        "splits": splits,
    }


def _show_sequences(
    corpus: Corpus, split: SplitName, seq_len: int, num_sequences: int, seed: int | None
) -> dict[str, Any]:
    """Prints and returns some sequences of a corpus."""
    if seed is not None and split != "train":
        raise ConfigError(f"--seed {seed} has no effect with --split {split}; leave one out")
    sequences, shown = corpus.split(split, seq_len), []
    tokenizer = corpus.tokenizer().tokenizer
    total = len(sequences) if split == "train" else sequences.num_unshuffled
    for index in sequences.ordered(seed, np.arange(min(num_sequences, total))).tolist():
        tokens = sequences[index][:-1].tolist()
        text = tokenizer.decode(tokens, skip_special_tokens=False)
        shown.append({"index": index, "tokens": tokens, "text": text})
        print(f"\n--- sequence {index:,} of {total:,} in the {split} split: {seq_len} tokens ---")
        print(text)
    return {"split": split, "seq_len": seq_len, "num_sequences": total, "sequences": shown}
