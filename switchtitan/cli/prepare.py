"""Tokenizes a corpus into memory-mapped shards, once, before training.

    switchtitan prepare --config train_configs/llama_350m_switchlora.toml
    switchtitan prepare --dataset text --path books/ --vocab_size 8192

Training does the same on first use. Prepare a large corpus in advance, on a machine with many
cores. The same command resumes a stopped preparation."""

import logging
from collections.abc import Sequence

from switchtitan.config.command_line import HELP_ALL, split_arguments
from switchtitan.config.help import print_full_help, print_short_help
from switchtitan.config.load import load_config
from switchtitan.config.section import Section
from switchtitan.config.shipped import find_config
from switchtitan.data import Corpus, DataConfig, open_corpus
from switchtitan.data.corpus_files import CorpusIndex, verify_files
from switchtitan.errors import UserError, exit_for
from switchtitan.job.config import JobConfig

INTRODUCTION = """\
Tokenizes a corpus into memory-mapped shards. --config FILE uses the [data]
section of a training configuration. The keys below override it; the defaults
shown are its values.
"""
COMMON_KEYS = ("data.dataset", "data.path", "data.tokenizer", "data.vocab_size", "data.cache_dir")
"""Keys that `--help` describes."""


class DataJobConfig(Section):
    """The configuration without --config."""

    data: DataConfig


def main(argv: Sequence[str]) -> None:
    """Prepares the given corpus and prints a summary."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        config = read_data_config(argv)
        if config is None:
            return
        corpus = open_corpus(config)
        for source in corpus.sources:
            verify_files(source.folder, source.index)
    except UserError as error:
        exit_for(error)
    print(summary(corpus))


def read_data_config(argv: Sequence[str]) -> DataConfig | None:
    """Returns the section that a command line describes, or None after printing help.

    Raises:
        ConfigError: with all mistakes in one message.
    """
    # Keys may have their section, `--data.path`, or not, `--path`.
    arguments = split_arguments(argv, section="data")
    config: JobConfig | DataJobConfig
    if arguments.config_file is None:
        config = load_config(arguments, None, DataJobConfig)
    else:
        config = load_config(arguments, find_config(arguments.config_file), JobConfig)
    if arguments.wants_help:
        usage, sections = "switchtitan prepare [--config FILE]", {"data": config.data}
        if HELP_ALL in arguments.flags:
            print_full_help(sections, usage, INTRODUCTION, has_prefixes=False)
        else:
            print_short_help(sections, usage, INTRODUCTION, COMMON_KEYS, has_prefixes=False)
        return None
    return config.data


def summary(corpus: Corpus) -> str:
    """Returns a summary of the corpus."""
    if corpus.parts:
        summaries = [summary(source) for source in corpus.sources]
        return "\n\n".join(
            [
                *summaries,
                f"mixture      {corpus.description}\nfingerprint  {corpus.fingerprint}",
            ]
        )
    index = corpus.index
    lines = [
        f"folder       {corpus.folder}",
        f"source       {corpus.description}",
        *([] if index.revision is None else [f"revision     {index.revision}"]),
        f"tokenizer    {corpus.vocab_size:,} tokens, documents end in {index.tokenizer.eos_token}",
    ]
    for split, shards in index.splits.items():
        num_bytes = sum(shard.bytes_of_text for shard in shards)
        # Sources of token ids have none.
        text = f", {num_bytes / 1e6:,.1f} MB of text" if num_bytes else ""
        lines.append(
            f"{split:<12} {index.num_tokens(split):,} tokens, {index.num_documents(split):,} "
            f"documents{text}{_cut(index, split)}"
        )
    lines.append(f"fingerprint  {corpus.fingerprint} (all checksums match)")
    return "\n".join(lines)


def _cut(index: CorpusIndex, split: str) -> str:
    cap = index.document_caps.get(split)
    return "" if cap is None else f", documents cut to {cap:,} tokens"
