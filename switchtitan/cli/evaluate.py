"""Evaluates weights on held-out text: loss, perplexity and bits per byte.

    switchtitan evaluate TARGET [--corpus FOLDER] [--split validation|test] [--tokens N]
    switchtitan evaluate TARGET --text FILE

A checkpoint of any method is merged into dense weights, and evaluated in its run's dtype, on its
run's corpus or other text. Other weights (a folder in Hugging Face's layout, a LoRA adapter's
folder, a safetensors file) need --corpus, --text or --config, which says model and corpus."""

import argparse
from functools import partial
from pathlib import Path
from typing import Any, Literal

from switchtitan.cli.main import add_model_arguments, positive_int
from switchtitan.data.corpus import VERIFIED_BYTES, Corpus, open_prepared
from switchtitan.data.loader import ValidationBatches
from switchtitan.data.prepare import open_corpus
from switchtitan.data.tokenizer import TextSize
from switchtitan.distributed.config import ParallelismConfig
from switchtitan.distributed.dtype import dtype_on
from switchtitan.distributed.world import World, start_world, temporary_world
from switchtitan.errors import ConfigError, CorpusError
from switchtitan.generation.text import held_out_text
from switchtitan.generation.trained import (
    TrainedModel,
    check_tokens,
    corpus_of_run,
    find_tokenizer,
    for_evaluation,
    open_tokenizer,
    open_trained_model,
)
from switchtitan.job.config import EvaluationConfig, JobConfig, parse_saved, parse_unchecked
from switchtitan.models.loss import CrossEntropy
from switchtitan.observability.log import perplexity_of
from switchtitan.progress import progress_bar
from switchtitan.training.evaluate import Evaluator

_LOCAL_BATCH_SIZE = 8
_MAX_SEQ_LEN = 1024
"""Defaults for weights without a configuration. The model's own maximum is used if it is lower."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    text = parser.add_mutually_exclusive_group()
    corpus = "a prepared corpus (default: that of the run, or of --config)"
    text.add_argument("--corpus", type=Path, metavar="FOLDER", help=corpus)
    text.add_argument("--text", metavar="FILE", help="a UTF-8 text file")
    parser.add_argument(
        "--split", choices=["validation", "test"], help="of the corpus (default: validation)"
    )
    tokens = "from the start (default: as in the configuration, else 10 million; all of --text)"
    parser.add_argument("--tokens", type=positive_int, metavar="N", help=tokens)
    seq_len = "tokens per sequence (default: as configured, else the model's, at most 1024)"
    parser.add_argument("--seq-len", type=positive_int, metavar="N", help=seq_len)


def run(options: argparse.Namespace) -> dict[str, Any] | None:
    """Returns loss (nats per token), perplexity, bits per byte, and the data used; None on other
    ranks than the main one. Raises a UserError if weights, model and text do not match, or one of
    them cannot be read."""
    if options.text is not None and options.split is not None:
        raise ConfigError(f"--split {options.split} has no effect with --text; leave it out")
    config = None
    if options.config is not None:
        config = for_evaluation(parse_unchecked(["--config", options.config]))
    trained = open_trained_model(options.target, None if config is None else config.model)
    if trained.metadata is not None:
        config = for_evaluation(parse_saved(trained.metadata.config))
    with temporary_world():
        world = start_world(ParallelismConfig())
        longest = min(trained.max_positions or _MAX_SEQ_LEN, _MAX_SEQ_LEN)
        seq_len = options.seq_len or (longest if config is None else config.data.seq_len)
        batches, size, described = _open_held_out(options, trained, config, seq_len, world)
        dtype = options.dtype
        if dtype == "auto" and config is not None:
            dtype = config.training.dtype
        compute_dtype = dtype_on(world.device, dtype, trained.compute_dtype)
        model = trained.load(world.device, compute_dtype.dtype)
        shown = progress_bar("evaluating", batches, total=len(batches), unit="batches")
        loss = Evaluator(shown, CrossEntropy(compile_regions=False), world)(model)
        if not world.is_main:
            return None
    result = {
        "weights": str(trained.source),
        **described,
        "compute_dtype": compute_dtype.name,
        "seq_len": seq_len,
        "tokens": size.num_tokens,
        "bytes": size.num_bytes,
        "loss": loss,
        "perplexity": perplexity_of(loss),
        "bits_per_byte": size.bits_per_byte(loss),
    }
    for name in ("weights", "text", "corpus", "split"):
        if name in result:
            print(f"{name:<12}{result[name]}")
    print(f"{'length':<12}{result['tokens']:,} tokens, {result['bytes']:,} bytes of text")
    print(f"{'loss':<12}{loss:.4f}\n{'perplexity':<12}{result['perplexity']:.2f}")
    if result["bits_per_byte"] is not None:
        print(f"{'bits/byte':<12}{result['bits_per_byte']:.4f}")
    return result


def _open_held_out(
    options: argparse.Namespace,
    trained: TrainedModel,
    config: JobConfig | None,
    seq_len: int,
    world: World,
) -> tuple[ValidationBatches, TextSize, dict[str, Any]]:
    """Returns this rank's batches of a corpus or a text, the size of all, and what it is."""
    batch_size = _LOCAL_BATCH_SIZE if config is None else config.training.local_batch_size
    batches_of = partial(
        ValidationBatches, local_batch_size=batch_size, rank=world.rank, num_ranks=world.size
    )
    if options.text is not None:
        tokenizer = open_tokenizer(trained, options.tokenizer)
        check_tokens(trained, [tokenizer.vocab_size - 1])
        text, targets, size = held_out_text(options.text, options.tokens, tokenizer, seq_len)
        batches = batches_of(text, len(text), targets=targets)
        return batches, size, {"text": options.text}
    split: Literal["validation", "test"] = options.split or "validation"
    evaluation = EvaluationConfig() if config is None else config.evaluation
    configured = evaluation.test_tokens if split == "test" else None
    num_tokens = options.tokens or configured or evaluation.tokens
    if num_tokens < seq_len:
        raise ConfigError(
            f"--tokens {num_tokens}: expected at least one sequence, [data] seq_len = {seq_len}"
        )
    corpus = _open_corpus(options, trained, config)
    corpus.check_vocabulary(trained.config.vocab_size)
    sequences, num_sequences = corpus.split(split, seq_len), num_tokens // seq_len
    if options.tokens is None:
        # A default is no request for more than there is.
        num_sequences = min(num_sequences, sequences.num_unshuffled)
    batches = batches_of(sequences, num_sequences)
    described = {"corpus": corpus.description, "fingerprint": corpus.fingerprint, "split": split}
    return batches, batches.text_size(corpus.tokenizer()), described


def _open_corpus(
    options: argparse.Namespace, trained: TrainedModel, config: JobConfig | None
) -> Corpus:
    """Opens the corpus of the options, or of the run; checks that the model has its tokenizer."""
    metadata = trained.metadata
    trained_on = metadata and metadata.identity_value("corpus", "fingerprint", str)
    if options.corpus is not None:
        corpus = open_prepared(options.corpus)
    elif metadata is not None:
        corpus = corpus_of_run(metadata, trained.source)
        corpus.verify(VERIFIED_BYTES)
    elif config is not None:
        corpus = open_corpus(config.data, prepares=False)
    else:
        raise ConfigError(
            f"{trained.source} is no checkpoint, so it names no text to evaluate on; pass --corpus "
            "FOLDER, --text FILE or --config FILE"
        )
    if trained_on == corpus.fingerprint and options.tokenizer is None:
        return corpus
    # Without one next to the weights, --config says that the corpus's is the model's.
    find = find_tokenizer if options.corpus is None else open_tokenizer
    own = find(trained, options.tokenizer)
    found = corpus.index.tokenizer.sha256
    if own is not None and found not in (own.sha256, own.without_bos().sha256):
        raise CorpusError(
            f"{corpus.folder}: its tokenizer is not that of {trained.source}; prepare the corpus "
            "with that one ([data] tokenizer), or pass --text FILE"
        )
    return corpus
