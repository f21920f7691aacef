"""Shows a corpus as the model sees it: counts, and sequences with their documents.

switchtitan inspect corpora/pystdlib-0123456789ab
switchtitan inspect --config train_configs/llama_350m_switchlora.toml --split validation"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from switchtitan.cli.prepare import read_data_config
from switchtitan.cli.record import check_json_option, write_json
from switchtitan.config.command_line import positive_int
from switchtitan.data import Corpus, open_corpus
from switchtitan.data.corpus import open_prepared
from switchtitan.data.corpus_files import INDEX_FILE
from switchtitan.data.loader import HeldOutSequences, TrainSequences
from switchtitan.data.sequences import TokenSequence
from switchtitan.errors import ConfigError, UserError, exit_for

_SEQ_LEN = 128


def main(argv: Sequence[str]) -> None:
    """Prints counts and sequences of a corpus."""
    options = read_options(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        check_json_option(options.json)
        corpus, seq_len = open_given(options)
        result = describe(corpus, options.split, seq_len, options.num, options.seed)
        if options.json is not None:
            write_json(options.json, result)
    except UserError as error:
        exit_for(error)
    if options.json != Path("-"):
        print(text_of(result))


def read_options(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line; argparse exits with status 2 on an error."""
    parser = argparse.ArgumentParser(
        prog="switchtitan inspect",
        description="Shows a corpus as the model sees it: counts, and sequences of tokens.",
        allow_abbrev=False,
    )
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument(
        "corpus", type=Path, nargs="?", metavar="CORPUS", help="the folder of a prepared corpus"
    )
    given.add_argument(
        "--config", metavar="FILE", help="a configuration; its corpus is prepared if it is not yet"
    )
    parser.add_argument(
        "--split",
        choices=["train", "validation", "test"],
        default="train",
        help="(default: train)",
    )
    parser.add_argument(
        "--num", type=positive_int, default=3, metavar="N", help="sequences to show (default: 3)"
    )
    parser.add_argument(
        "--seed",
        type=int,
        metavar="S",
        help="the first training sequences of a run with [job] seed = S; of other splits, "
        "sequences drawn with it (default: the first ones of the corpus)",
    )
    parser.add_argument(
        "--seq-len",
        type=positive_int,
        metavar="N",
        help=f"tokens per sequence (default: as in --config, else {_SEQ_LEN})",
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="also write the result to FILE; - prints it instead of the text",
    )
    return parser.parse_args(argv)


def open_given(options: argparse.Namespace) -> tuple[Corpus, int]:
    """Returns the corpus, and the tokens per sequence.

    Raises:
        UserError: if it cannot be read or prepared.
    """
    if options.config is not None:
        config = read_data_config(["--config", options.config])
        assert config is not None
        return open_corpus(config), options.seq_len or config.seq_len
    if not (options.corpus / INDEX_FILE).is_file():
        raise ConfigError(
            f"{options.corpus}: no file {INDEX_FILE}; expected a folder that `switchtitan prepare` "
            "has written, or --config FILE"
        )
    return open_prepared(options.corpus), options.seq_len or _SEQ_LEN


def describe(
    corpus: Corpus, split: str, seq_len: int, num_sequences: int, seed: int | None
) -> dict[str, Any]:
    """Returns counts of a corpus and some of its sequences, as JSON values.

    Raises:
        CorpusError: if there is no such split, or it is shorter than one sequence.
    """
    sequences: TrainSequences | HeldOutSequences
    if split == "train":
        sequences = corpus.train_split(seq_len)
    else:
        sequences = corpus.held_out_split("test" if split == "test" else "validation", seq_len)
    num_shown = min(num_sequences, len(sequences))
    if seed is None:
        indices = np.arange(num_shown)
    elif isinstance(sequences, TrainSequences) and split == "train":
        indices = sequences.ordered(seed, np.arange(num_shown))
    else:
        indices = np.random.default_rng(seed).choice(len(sequences), num_shown, replace=False)
    return {
        "description": corpus.description,
        "fingerprint": corpus.fingerprint,
        "corpora": [_describe_source(source) for source in corpus.sources],
        "tokenizer": corpus.index.tokenizer.model_dump(mode="json"),
        "split": split,
        "seq_len": seq_len,
        "num_sequences": len(sequences),
        "sequences": [
            {"index": int(index), "documents": _documents(corpus, sequences[int(index)])}
            for index in indices
        ],
    }


def _describe_source(corpus: Corpus) -> dict[str, Any]:
    index = corpus.index
    return {
        "folder": str(corpus.folder),
        "source": index.source,
        "fingerprint": index.fingerprint,
        "splits": {
            split: {
                "tokens": index.num_tokens(split),
                "documents": index.num_documents(split),
                "bytes_of_text": sum(shard.bytes_of_text for shard in shards),
                "document_cap": index.document_caps.get(split),
            }
            for split, shards in index.splits.items()
        },
    }


def _documents(corpus: Corpus, sequence: TokenSequence) -> list[dict[str, Any]]:
    """The inputs of a sequence, by document."""
    tokens, ids = sequence.tokens[:-1].numpy(), sequence.document_ids.numpy()
    pieces = []
    for number in np.unique(ids):
        own = tokens[ids == number].tolist()
        ends = own[-1] == corpus.eos_id
        text = corpus.tokenizer().tokenizer.decode(
            own[:-1] if ends else own, skip_special_tokens=False
        )
        pieces.append({"text": text, "ends": ends, "tokens": own})
    return pieces


def text_of(result: dict[str, Any]) -> str:
    """Returns a result as text; the end token follows each document that ends."""
    tokenizer = result["tokenizer"]
    lines = []
    for source in result["corpora"]:
        lines += [f"folder       {source['folder']}", f"source       {source['source']}"]
        for split, counts in source["splits"].items():
            cap = counts["document_cap"]
            cut = "" if cap is None else f", documents cut to {cap:,} tokens"
            lines.append(
                f"{split:<12} {counts['tokens']:,} tokens, {counts['documents']:,} documents{cut}"
            )
    if len(result["corpora"]) > 1:
        lines.append(f"mixture      {result['description']}")
    lines += [
        f"tokenizer    {tokenizer['vocab_size']:,} tokens, documents end in "
        f"{tokenizer['eos_token']} ({tokenizer['eos_id']})",
        f"fingerprint  {result['fingerprint']}",
    ]
    for sequence in result["sequences"]:
        lines += [
            "",
            f"--- sequence {sequence['index']:,} of {result['num_sequences']:,} in the "
            f"{result['split']} split: {result['seq_len']} tokens, "
            f"{len(sequence['documents'])} document(s) ---",
        ]
        lines += [
            piece["text"] + (f"[{tokenizer['eos_token']}]" if piece["ends"] else "")
            for piece in sequence["documents"]
        ]
    return "\n".join(lines)
