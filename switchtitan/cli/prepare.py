"""Tokenizes a corpus into memory-mapped shards, once, before training, or shows a corpus.

    switchtitan prepare --config train_configs/llama_350m_switchlora.toml
    switchtitan prepare --dataset text --path books/ --vocab_size 8192
    switchtitan prepare --corpus corpora/pystdlib-0123456789ab --show 3

--config FILE uses the [data] section of a training configuration. Its keys are options too, with or
without `data.`; docs/CONFIGURATION.md and `switchtitan train --help-all` describe them.
Training does the same on first use. Prepare a large corpus in advance, on a machine with many
cores. The same command resumes a stopped preparation.
--show N also prints sequences as the model sees them: each document as text, and the end token in
brackets where it ends."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from switchtitan.cli.main import positive_int
from switchtitan.config.command_line import split_arguments
from switchtitan.config.load import load_config
from switchtitan.config.section import Section
from switchtitan.config.shipped import find_config
from switchtitan.data import Corpus, DataConfig, open_corpus
from switchtitan.data.corpus import open_prepared
from switchtitan.data.corpus_files import INDEX_FILE, verify_files
from switchtitan.data.loader import HeldOutSequences, TrainSequences
from switchtitan.data.sequences import TokenSequence
from switchtitan.errors import ConfigError
from switchtitan.job.config import JobConfig

_SEQ_LEN = 128
"""Of a corpus without a configuration."""


class DataJobConfig(Section):
    """The configuration without --config."""

    data: DataConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options next to `--config` and keys of `[data]`."""
    parser.add_argument("--corpus", type=Path, metavar="FOLDER", help="only show a prepared corpus")
    parser.add_argument(
        "--show", type=positive_int, nargs="?", const=3, metavar="N", help="show N sequences (3)"
    )
    parser.add_argument(
        "--split", choices=["train", "validation", "test"], default="train", help="of --show"
    )
    parser.add_argument(
        "--seed",
        type=int,
        metavar="S",
        help="show the first training sequences of a run with [job] seed = S (default: the first "
        "ones of the split)",
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Prepares or opens the corpus; returns its counts, and sequences.

    Raises:
        UserError: if it cannot be read or prepared, or has no such split.
    """
    config = read_data_config(options.keys)
    if options.corpus is None:
        corpus, seq_len = open_corpus(config), config.seq_len
        for source in corpus.sources:
            verify_files(source.folder, source.index)
    else:
        corpus = open_given(options.corpus)
        seq_len = config.seq_len if "seq_len" in config.model_fields_set else _SEQ_LEN
        for key in config.model_fields_set - {"seq_len"}:
            raise ConfigError(f"[data] {key}: has no effect with --corpus; leave one out")
    result = describe(corpus)
    print(_counts(result))
    if options.show is not None:
        result |= sequences_of(corpus, options.split, seq_len, options.show, options.seed)
        print(_texts(result))
    return result


def read_data_config(words: list[str]) -> DataConfig:
    """Returns the section that a command line describes.

    Raises:
        ConfigError: with all mistakes in one message.
    """
    arguments = split_arguments(words, section="data")
    if arguments.config_file is None:
        return load_config(arguments, None, DataJobConfig).data
    return load_config(arguments, find_config(arguments.config_file), JobConfig).data


def open_given(folder: Path) -> Corpus:
    """Opens the corpus of `--corpus FOLDER`.

    Raises:
        ConfigError: if it is no prepared corpus.
        CorpusError: if a file is damaged.
    """
    if not (folder / INDEX_FILE).is_file():
        raise ConfigError(
            f"--corpus {folder}: no file {folder / INDEX_FILE}; expected a folder that "
            "`switchtitan prepare` has written"
        )
    return open_prepared(folder)


def describe(corpus: Corpus) -> dict[str, Any]:
    """Returns the counts of a corpus, as JSON values."""
    return {
        "description": corpus.description,
        "fingerprint": corpus.fingerprint,
        "tokenizer": corpus.index.tokenizer.model_dump(mode="json"),
        "corpora": [
            {
                "folder": str(source.folder),
                "source": source.description,
                "revision": source.index.revision,
                "fingerprint": source.fingerprint,
                "splits": {
                    split: {
                        "tokens": source.index.num_tokens(split),
                        "documents": source.index.num_documents(split),
                        "bytes_of_text": sum(shard.bytes_of_text for shard in shards),
                        "document_cap": source.index.document_caps.get(split),
                    }
                    for split, shards in source.index.splits.items()
                },
            }
            for source in corpus.sources
        ],
    }


def sequences_of(
    corpus: Corpus, split: str, seq_len: int, num_sequences: int, seed: int | None
) -> dict[str, Any]:
    """Returns some sequences of a corpus, by documents, as JSON values.

    Raises:
        CorpusError: if there is no such split, or it is shorter than one sequence.
    """
    sequences: TrainSequences | HeldOutSequences
    if split == "train":
        sequences = corpus.train_split(seq_len)
    else:
        sequences = corpus.held_out_split("test" if split == "test" else "validation", seq_len)
    indices = np.arange(min(num_sequences, len(sequences)))
    if seed is not None:
        if split != "train" or not isinstance(sequences, TrainSequences):
            raise ConfigError(f"--seed {seed} has no effect with --split {split}; leave one out")
        indices = sequences.ordered(seed, indices)
    return {
        "split": split,
        "seq_len": seq_len,
        "num_sequences": len(sequences),
        "sequences": [
            {"index": int(index), "documents": _documents(corpus, sequences[int(index)])}
            for index in indices
        ],
    }


def _documents(corpus: Corpus, sequence: TokenSequence) -> list[dict[str, Any]]:
    """The inputs of a sequence, by document."""
    tokens, ids = sequence.tokens[:-1].numpy(), sequence.document_ids.numpy()
    tokenizer = corpus.tokenizer().tokenizer
    pieces = []
    for number in np.unique(ids):
        own = tokens[ids == number].tolist()
        ends = own[-1] == corpus.eos_id
        text = tokenizer.decode(own[:-1] if ends else own, skip_special_tokens=False)
        pieces.append({"text": text, "ends": ends, "tokens": own})
    return pieces


def _counts(result: dict[str, Any]) -> str:
    lines = []
    for source in result["corpora"]:
        lines += [f"folder       {source['folder']}", f"source       {source['source']}"]
        if source["revision"] is not None:
            lines.append(f"revision     {source['revision']}")
        for split, counts in source["splits"].items():
            line = f"{split:<12} {counts['tokens']:,} tokens, {counts['documents']:,} documents"
            if counts["bytes_of_text"]:  # sources of token ids have none
                line += f", {counts['bytes_of_text'] / 1e6:,.1f} MB of text"
            if counts["document_cap"] is not None:
                line += f", documents cut to {counts['document_cap']:,} tokens"
            lines.append(line)
    if len(result["corpora"]) > 1:
        lines.append(f"mixture      {result['description']}")
    tokenizer = result["tokenizer"]
    return "\n".join(
        [
            *lines,
            f"tokenizer    {tokenizer['vocab_size']:,} tokens, documents end in "
            f"{tokenizer['eos_token']} ({tokenizer['eos_id']})",
            f"fingerprint  {result['fingerprint']}",
        ]
    )


def _texts(result: dict[str, Any]) -> str:
    lines = []
    for sequence in result["sequences"]:
        lines += [
            "",
            f"--- sequence {sequence['index']:,} of {result['num_sequences']:,} in the "
            f"{result['split']} split: {result['seq_len']} tokens, "
            f"{len(sequence['documents'])} document(s) ---",
        ]
        end = f"[{result['tokenizer']['eos_token']}]"
        lines += [piece["text"] + end * piece["ends"] for piece in sequence["documents"]]
    return "\n".join(lines)
