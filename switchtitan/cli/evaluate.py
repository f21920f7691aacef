"""Evaluates weights on held-out tokens of a prepared corpus.

    switchtitan evaluate outputs/RUN [--split validation|test] [--tokens N] [--json FILE]
    switchtitan evaluate WEIGHTS --config FILE

A checkpoint of any method is merged into dense weights and evaluated on its run's corpus, in the
run's dtype. Other weights (a folder in Hugging Face's layout, a safetensors file) need --config for
model and corpus."""

import argparse
import json
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

from switchtitan.builders.stepper import build_plain_model
from switchtitan.checkpoint import CheckpointMetadata, find_given, read_metadata
from switchtitan.cli.record import check_json_option
from switchtitan.config.command_line import positive_int
from switchtitan.data import build_validation_batches, open_corpus
from switchtitan.distributed.compute_dtype import dtype_on
from switchtitan.distributed.config import ParallelismConfig
from switchtitan.distributed.fsdp import materialize, shard_model
from switchtitan.distributed.world import device_type, start_world, temporary_world
from switchtitan.errors import (
    CheckpointError,
    CheckpointFormatError,
    ConfigError,
    CorpusError,
    UserError,
    exit_for,
)
from switchtitan.files import write_atomically
from switchtitan.hub.initial_weights import read_dense_checkpoint, read_initial_weights
from switchtitan.job.checks import evaluation_checks
from switchtitan.job.config import JobConfig, parse_arguments
from switchtitan.models.loss import CrossEntropy
from switchtitan.observability.console import perplexity_of
from switchtitan.training.description import compute_dtype_of
from switchtitan.training.evaluate import Evaluator


def main(argv: Sequence[str]) -> None:
    """Evaluates the given weights and prints a summary."""
    options = read_options(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        check_json_option(options.json)
        result = evaluate(options.weights, options.config, options.split, options.tokens)
    except UserError as error:
        exit_for(error)
    if options.json is not None:
        try:
            write_atomically(options.json, json.dumps(result, indent=2) + "\n")
        except OSError as error:
            exit_for(
                ConfigError(f"--json {options.json}: the file cannot be written: {error.strerror}")
            )
    for name in ("weights", "corpus"):
        print(f"{name:<12}{result[name]}")
    print(f"{'split':<12}{result['split']}, {result['tokens']:,} tokens")
    print(f"{'loss':<12}{result['loss']:.4f}")
    print(f"{'perplexity':<12}{result['perplexity']:.2f}")


def read_options(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line; argparse exits with status 2 on an error."""
    parser = argparse.ArgumentParser(
        prog="switchtitan evaluate",
        description="Evaluates weights on held-out tokens of a prepared corpus.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "weights",
        type=Path,
        metavar="WEIGHTS",
        help="a run's folder, a checkpoint, a Hugging Face folder or a safetensors file",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="model and corpus (default: the configuration saved in the checkpoint)",
    )
    parser.add_argument(
        "--split", choices=["validation", "test"], default="validation", help="default: validation"
    )
    parser.add_argument(
        "--tokens",
        type=positive_int,
        metavar="N",
        help="number of tokens, from the start of the split (default: as in the configuration)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result to FILE")
    return parser.parse_args(argv)


def evaluate(weights: Path, config_file: str | None, split: str, num_tokens: int | None) -> dict:
    """Returns loss (nats per token) and perplexity of `weights`, and the data used.

    Raises:
        UserError: if weights, model and corpus do not match, or one of them cannot be read.
    """
    metadata = None
    if config_file is None:
        weights, metadata = _find_checkpoint(weights)
        config = saved_config(metadata)
    else:
        config = load_for_evaluation(config_file)
    seq_len = config.data.seq_len
    if num_tokens is None:
        num_tokens = (
            config.evaluation.test_tokens if split == "test" else None
        ) or config.evaluation.tokens
    if num_tokens < seq_len:
        raise ConfigError(
            f"--tokens {num_tokens}: expected at least one sequence, [data] seq_len = {seq_len}"
        )
    tensors = (
        read_initial_weights(weights, config.model).tensors
        if metadata is None
        else read_dense_checkpoint(weights)
    )
    with temporary_world():
        world = start_world(ParallelismConfig())
        corpus = open_corpus(config.data, ranks=world, model_vocab_size=config.model.vocab_size)
        model = build_plain_model(config)
        if metadata is not None:
            _check_corpus(corpus.fingerprint, metadata, corpus.folder)
        saved = None if metadata is None else compute_dtype_of(metadata)
        compute_dtype = dtype_on(world.device, config.training.dtype, saved)
        shard_model(
            model,
            world.shard_mesh,
            compute_dtype.dtype,
            ParallelismConfig(),
        )
        materialize(model, world.device, config.job.seed, tensors)
        batches = build_validation_batches(
            corpus.split("test" if split == "test" else "validation", seq_len),
            num_sequences=num_tokens // seq_len,
            local_batch_size=config.training.local_batch_size,
            rank=world.rank,
            num_ranks=world.size,
        )
        loss = Evaluator(batches, CrossEntropy(compile_regions=False), world)(model)
    return {
        "weights": str(weights),
        "corpus": corpus.description,
        "fingerprint": corpus.fingerprint,
        "compute_dtype": compute_dtype.name,
        "split": split,
        "tokens": batches.num_sequences * seq_len,
        "loss": loss,
        "perplexity": perplexity_of(loss),
    }


def saved_config(metadata: CheckpointMetadata) -> JobConfig:
    """Returns the configuration of the run that saved a checkpoint.

    Raises:
        ConfigError: if this version does not accept it.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.toml"
        file.write_text(metadata.config, encoding="utf-8", errors="replace")
        return load_for_evaluation(str(file))


def load_for_evaluation(file: str) -> JobConfig:
    """Loads a configuration and checks only what an evaluation needs.

    Raises:
        ConfigError: if it is invalid.
    """
    return parse_arguments(["--config", file], checks=evaluation_checks(device_type()))


def _find_checkpoint(path: Path) -> tuple[Path, CheckpointMetadata]:
    try:
        checkpoint = find_given(path)
    except CheckpointFormatError:
        raise
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; for weights other than a checkpoint, pass --config FILE"
        ) from error
    return checkpoint, read_metadata(checkpoint)


def _check_corpus(fingerprint: str, metadata: CheckpointMetadata, folder: Path) -> None:
    expected = metadata.identity_value("corpus", "fingerprint")
    if fingerprint != expected:
        raise CorpusError(
            f"{folder}: its fingerprint is {fingerprint}, but the run trained on {expected}; pass "
            "--config FILE with the [data] to evaluate on"
        )
