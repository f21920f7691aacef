"""Evaluates weights on held-out text.

    switchtitan evaluate TARGET [--corpus FOLDER] [--split validation|test] [--tokens N]
    switchtitan evaluate TARGET --text FILE

A checkpoint of any method is merged into dense weights, and evaluated in its run's dtype, on its
run's corpus or other text. Other weights (a folder in Hugging Face's layout, a LoRA adapter's
folder, a safetensors file) need --corpus, --text or --config, which says model and corpus."""

import argparse
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from switchtitan.checkpoint import CheckpointMetadata
from switchtitan.cli.record import check_json_option, write_json
from switchtitan.cli.target import add_target_options
from switchtitan.config.command_line import positive_int
from switchtitan.contracts import Batch
from switchtitan.data import Corpus, open_corpus
from switchtitan.data.corpus import open_prepared
from switchtitan.data.corpus_files import INDEX_FILE
from switchtitan.data.tokenizer import DocumentTokenizer
from switchtitan.distributed.config import ParallelismConfig
from switchtitan.distributed.dtype import dtype_on
from switchtitan.distributed.fsdp import materialize, shard_model
from switchtitan.distributed.world import World, start_world, temporary_world
from switchtitan.errors import (
    ConfigError,
    CorpusError,
    UserError,
    exit_for,
    exit_for_interrupt,
)
from switchtitan.generation.held_out import (
    HeldOut,
    Shape,
    SplitName,
    held_out_documents,
    held_out_split,
    held_out_text,
)
from switchtitan.generation.trained import (
    TrainedModel,
    find_tokenizer,
    load_for_evaluation,
    open_tokenizer,
    open_trained_model,
    saved_config,
)
from switchtitan.job.config import JobConfig
from switchtitan.job.sections import EvaluationConfig
from switchtitan.models import MODELS
from switchtitan.models.loss import CrossEntropy
from switchtitan.observability.console import perplexity_of
from switchtitan.training.evaluate import Evaluator

_LOCAL_BATCH_SIZE = 8
_MAX_SEQ_LEN = 1024
"""Defaults for weights without a configuration. The model's own maximum is used if it is lower."""


def main(argv: Sequence[str]) -> None:
    """Evaluates the given weights and prints a summary."""
    options = read_options(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        check_json_option(options.json)
        result = evaluate(options)
        if result is None:
            return
        # Before the file, which may fail to be written.
        if options.json != Path("-"):
            _print_summary(result)
        if options.json is not None:
            write_json(options.json, result)
    except UserError as error:
        exit_for(error)
    except KeyboardInterrupt as stop:
        exit_for_interrupt(stop, "\nstopped; nothing was written")


def read_options(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line; argparse exits with status 2 on an error."""
    parser = argparse.ArgumentParser(
        prog="switchtitan evaluate",
        description="Evaluates weights on held-out text: loss, perplexity and bits per byte.",
        allow_abbrev=False,
    )
    add_target_options(parser)
    text = parser.add_mutually_exclusive_group()
    text.add_argument(
        "--corpus",
        type=Path,
        metavar="FOLDER",
        help="a prepared corpus (default: that of the run, or of --config)",
    )
    text.add_argument("--text", type=Path, metavar="FILE", help="a UTF-8 text file")
    parser.add_argument(
        "--split", choices=["validation", "test"], help="of the corpus (default: validation)"
    )
    parser.add_argument(
        "--tokens",
        type=positive_int,
        metavar="N",
        help="number of tokens, from the start (default: as in the configuration, else 10 million; "
        "all of --text)",
    )
    parser.add_argument(
        "--seq-len",
        type=positive_int,
        metavar="N",
        help="tokens per sequence (default: as in the configuration; for other weights the model's "
        "maximum, at most 1024)",
    )
    options = parser.parse_args(argv)
    if options.text is not None and options.split is not None:
        parser.error(f"--split {options.split} has no effect with --text; leave it out")
    return options


def evaluate(options: argparse.Namespace) -> dict[str, object] | None:
    """Returns loss (nats per token), perplexity, bits per byte, and the data used.

    None on other ranks than the main one.

    Raises:
        UserError: if weights, model and text do not match, or one of them cannot be read.
    """
    config = None if options.config is None else load_for_evaluation(options.config)
    trained = open_trained_model(options.target, None if config is None else config.model)
    if trained.metadata is not None:
        config = saved_config(trained.metadata)
    shape = _shape(trained, config, options.seq_len)
    num_tokens = _num_tokens(options, config)
    if options.text is None and num_tokens is not None and num_tokens < shape.seq_len:
        raise ConfigError(
            f"--tokens {num_tokens}: expected at least one sequence, [data] seq_len = "
            f"{shape.seq_len}"
        )
    with temporary_world():
        world = start_world(ParallelismConfig())
        with torch.device("meta"):
            model = MODELS.build(trained.config)
        held_out, described = open_held_out(options, trained, config, num_tokens, shape, world)
        key = options.dtype
        if key == "auto" and config is not None:
            key = config.training.dtype
        compute_dtype = dtype_on(world.device, key, trained.compute_dtype)
        shard_model(model, world.shard_mesh, compute_dtype.dtype, ParallelismConfig())
        materialize(model, world.device, 0, trained.tensors)
        trained.tensors.clear()
        batches = _with_progress(held_out, world)
        loss = Evaluator(batches, CrossEntropy(compile_regions=False), world)(model)
        if not world.is_main:
            return None
    return {
        "weights": str(trained.source),
        **described,
        "compute_dtype": compute_dtype.name,
        "seq_len": shape.seq_len,
        "tokens": held_out.size.num_tokens,
        "bytes": held_out.size.num_bytes,
        "loss": loss,
        "perplexity": perplexity_of(loss),
        "bits_per_byte": held_out.size.bits_per_byte(loss),
    }


def open_held_out(
    options: argparse.Namespace,
    trained: TrainedModel,
    config: JobConfig | None,
    num_tokens: int | None,
    shape: Shape,
    world: World,
) -> tuple[HeldOut, dict[str, object]]:
    """Returns what to evaluate on, and its description for the result.

    Raises:
        UserError: if the text or a tokenizer cannot be read, or does not fit the model.
    """
    if options.text is not None:
        own = open_tokenizer(trained, options.tokenizer)
        _check_vocabulary(trained, own.vocab_size)
        held_out = held_out_text(options.text, num_tokens, own, shape, world)
        return held_out, {"text": str(options.text)}
    corpus = _open_corpus(options.corpus, trained, config, world)
    own_tokenizer = _other_tokenizer(options, trained, corpus)
    split: SplitName = "test" if options.split == "test" else "validation"
    described: dict[str, object] = {
        "corpus": corpus.description,
        "fingerprint": corpus.fingerprint,
        "split": split,
        "tokenizer": "the corpus's" if own_tokenizer is None else "the model's",
    }
    assert num_tokens is not None
    _check_split(corpus, split)
    if own_tokenizer is None:
        corpus.check_vocabulary(trained.config.vocab_size)
        if options.tokens is None:
            # A default is no request for more than there is.
            num_sequences = len(corpus.held_out_split(split, shape.seq_len))
            num_tokens = min(num_tokens, num_sequences * shape.seq_len)
        return held_out_split(corpus, split, num_tokens, shape, world), described
    _check_vocabulary(trained, own_tokenizer.vocab_size)
    held_out = held_out_documents(corpus, split, num_tokens, own_tokenizer, shape, world)
    return held_out, described


def _check_split(corpus: Corpus, split: SplitName) -> None:
    for source in corpus.sources:
        if split not in source.index.splits:
            raise ConfigError(
                f"--split {split}: the corpus in {source.folder} has no {split} split, only "
                f"{', '.join(source.index.splits)}; leave --split out, or prepare a corpus with "
                "[data] test_fraction"
            )


def _other_tokenizer(
    options: argparse.Namespace, trained: TrainedModel, corpus: Corpus
) -> DocumentTokenizer | None:
    """Returns the model's tokenizer; None if it is the corpus's."""
    if options.tokenizer is None:
        metadata = trained.metadata
        if metadata is not None:
            trained_on = metadata.identity_value("corpus", "fingerprint")
            if trained_on == corpus.fingerprint:
                return None
    if options.corpus is None:
        # --config says the corpus, and without a tokenizer next to the weights also how to read it.
        own = find_tokenizer(trained, options.tokenizer)
    else:
        own = open_tokenizer(trained, options.tokenizer)
    is_same = own is not None and own.sha256 == corpus.index.tokenizer.sha256
    return None if is_same else own


def _open_corpus(
    folder: Path | None, trained: TrainedModel, config: JobConfig | None, world: World
) -> Corpus:
    if folder is not None:
        if not (folder / INDEX_FILE).is_file():
            raise ConfigError(
                f"--corpus {folder}: no file {folder / INDEX_FILE}; expected a folder that "
                "`switchtitan prepare` has written"
            )
        return open_prepared(folder)
    if config is None:
        raise ConfigError(
            f"{trained.source} is no checkpoint, so it names no text to evaluate on; pass --corpus "
            "FOLDER, --text FILE or --config FILE"
        )
    corpus = open_corpus(config.data, ranks=world)
    if trained.metadata is not None:
        _check_corpus(corpus.fingerprint, trained.metadata, corpus.folder)
    return corpus


def _check_vocabulary(trained: TrainedModel, tokenizer_size: int) -> None:
    if tokenizer_size > trained.config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer_size} tokens, and {trained.source} has a vocabulary of "
            f"{trained.config.vocab_size}; pass --tokenizer FILE, the one it was trained with"
        )


def _shape(trained: TrainedModel, config: JobConfig | None, seq_len: int | None) -> Shape:
    if config is not None:
        return Shape(seq_len or config.data.seq_len, config.training.local_batch_size)
    default = min(trained.max_positions or _MAX_SEQ_LEN, _MAX_SEQ_LEN)
    return Shape(seq_len or default, _LOCAL_BATCH_SIZE)


def _num_tokens(options: argparse.Namespace, config: JobConfig | None) -> int | None:
    """Returns the number of tokens to predict; None for all of a text."""
    if options.tokens is not None or options.text is not None:
        given: int | None = options.tokens
        return given
    if config is None:
        return EvaluationConfig().tokens
    of_test = config.evaluation.test_tokens if options.split == "test" else None
    return of_test or config.evaluation.tokens


def _with_progress(held_out: HeldOut, world: World) -> Iterable[Batch]:
    """Returns the batches; draws a progress bar on standard error if it is a terminal."""
    return tqdm(
        held_out.batches,
        desc="evaluating",
        total=held_out.num_batches,
        unit="batch",
        leave=False,
        dynamic_ncols=True,
        disable=None if world.is_main else True,
    )


def _print_summary(result: dict) -> None:
    counts = f"{result['tokens']:,} tokens, {result['bytes']:,} bytes of text"
    rows = {"weights": result["weights"]}
    if "text" in result:
        rows |= {"text": result["text"], "length": counts}
    else:
        rows |= {"corpus": result["corpus"], "split": f"{result['split']}, {counts}"}
    rows |= {"loss": f"{result['loss']:.4f}", "perplexity": f"{result['perplexity']:.2f}"}
    if result["bits_per_byte"] is not None:
        rows["bits/byte"] = f"{result['bits_per_byte']:.4f}"
    for name, value in rows.items():
        print(f"{name:<12}{value}")


def _check_corpus(fingerprint: str, metadata: CheckpointMetadata, folder: Path) -> None:
    expected = metadata.identity_value("corpus", "fingerprint")
    if fingerprint != expected:
        raise CorpusError(
            f"{folder}: its fingerprint is {fingerprint}, but the run trained on {expected}; pass "
            "--corpus FOLDER or --config FILE to evaluate on another corpus"
        )
