"""Tokenises a corpus into memory-mapped shards, once, before the runs that train on it.

    switchtitan prepare --config train_configs/llama_350m_switchlora.toml
    switchtitan prepare --dataset text --path books/ --vocab_size 8192

Training does the same on first use; a large corpus is better prepared beforehand, on a machine with many
cores. A stopped preparation goes on where it was when the same command is given again.
"""

import logging
import os
from collections.abc import Sequence

from switchtitan.config.help import print_help
from switchtitan.config.load import load_sections
from switchtitan.config.overrides import split_arguments
from switchtitan.config.section import Section
from switchtitan.config.shipped import find_config
from switchtitan.data import Corpus, DataConfig, open_corpus
from switchtitan.data.corpus_files import verify_files
from switchtitan.errors import ConfigError, UserError, exit_for
from switchtitan.job.config import section_types

INTRODUCTION = """\
Tokenises a corpus into memory-mapped shards. --config FILE takes the [data]
section of a training configuration; the keys below go over it, and the
defaults shown are what it says.
"""


def main(argv: Sequence[str]) -> None:
    """Prepares what the command line asks for and prints a summary."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        config = read_data_config(argv)
        if config is None:
            return
        corpus = open_corpus(config)
        verify_files(corpus.folder, corpus.index)
    except UserError as error:
        exit_for(error)
    print(summary(corpus))


def read_data_config(argv: Sequence[str]) -> DataConfig | None:
    """The section that a command line describes; None where it asked for help, which is then printed.

    Raises:
        ConfigError: with all mistakes in one message.
    """
    arguments = split_arguments(argv)
    # A key may be written as in training, `--data.path`, or without its section, `--path`.
    arguments.overrides = {
        path if path[0] == "data" else ("data", *path): words for path, words in arguments.overrides.items()
    }
    file = find_config(arguments.config_file or os.devnull)
    types = section_types() if arguments.config_file else {"data": DataConfig}
    try:
        section: Section = load_sections(arguments, file, types)["data"]
    except ConfigError as error:
        raise ConfigError(str(error).replace("--data.", "--")) from error
    assert isinstance(section, DataConfig)
    if arguments.wants_help:
        print_help(section, "switchtitan prepare [--config FILE]", INTRODUCTION)
        return None
    return section


def summary(corpus: Corpus) -> str:
    """What lies where, in lines of at most 80 columns where names allow it."""
    index = corpus.index
    lines = [
        f"folder       {corpus.folder}",
        f"source       {corpus.description}",
        f"tokenizer    {corpus.vocab_size:,} tokens, documents end with {index.tokenizer.eos_token}",
    ]
    for split, shards in index.splits.items():
        num_bytes = sum(shard.bytes_of_text for shard in shards)
        lines.append(
            f"{split:<12} {index.num_tokens(split):,} tokens of {index.num_documents(split):,} documents, "
            f"{num_bytes / 1e6:,.1f} MB of text"
        )
    lines.append(f"fingerprint  {corpus.fingerprint} (all checksums agree)")
    return "\n".join(lines)
