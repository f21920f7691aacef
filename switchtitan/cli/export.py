"""Writes a checkpoint as a folder that `transformers.AutoModelForCausalLM.from_pretrained` loads.

    switchtitan export outputs/RUN [--folder OUT] [--dtype float32|bfloat16]

The low-rank factors of any method are merged into dense weights in float32. The run's tokenizer is
exported too if the run's corpus is in its [data] cache_dir, relative to the current folder."""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from switchtitan.builders.trained_corpus import find_corpus, trained_corpus
from switchtitan.checkpoint import find_given, read_metadata
from switchtitan.checkpoint.layout import CHECKPOINTS_FOLDER
from switchtitan.data.corpus_files import TOKENIZER_FILE
from switchtitan.errors import UserError, exit_for
from switchtitan.hub.export_folder import export_dense
from switchtitan.hub.initial_weights import read_dense_checkpoint, saved_model_config


def main(argv: Sequence[str]) -> None:
    """Exports the given checkpoint and prints a summary."""
    options = read_options(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        checkpoint = find_given(options.checkpoint)
        folder = options.folder or export_folder(checkpoint)
        print(export(checkpoint, folder, getattr(torch, options.dtype)))
    except UserError as error:
        exit_for(error)


def read_options(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line; argparse exits with status 2 on an error."""
    parser = argparse.ArgumentParser(
        prog="switchtitan export",
        description="Writes a checkpoint as a folder that transformers loads.",
        allow_abbrev=False,
    )
    sources = parser.add_mutually_exclusive_group(required=True)
    sources.add_argument(
        "checkpoint",
        nargs="?",
        type=Path,
        metavar="CHECKPOINT",
        help="a folder step-000001000, or a run's output folder, which means its newest checkpoint",
    )
    # Its own `dest`: a positional argument that is absent would set its default over this value.
    sources.add_argument(
        "--checkpoint", dest="named", type=Path, metavar="CHECKPOINT", help="the same, by name"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="folder to write, absent or empty (default: exports/STEP in the run's output folder)",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="dtype of the stored weights (default: float32)",
    )
    options = parser.parse_args(argv)
    options.checkpoint = options.checkpoint or options.named
    return options


def export_folder(checkpoint: Path) -> Path:
    """Returns the default folder: `exports/step-000001000`, next to the run's `checkpoints/`."""
    parent = checkpoint.resolve().parent
    return (
        (parent.parent if parent.name == CHECKPOINTS_FOLDER else parent)
        / "exports"
        / checkpoint.resolve().name
    )


def export(checkpoint: Path, folder: Path, dtype: torch.dtype) -> str:
    """Writes `checkpoint` to `folder` and returns a summary.

    Raises:
        CheckpointError: if the checkpoint is corrupted, transformers has no class for its model, or
            `folder` is not empty.
        CorpusError: if the corpus folder exists but is damaged or holds another corpus.
    """
    metadata = read_metadata(checkpoint)
    corpus_folder = find_corpus(metadata)
    index = trained_corpus(corpus_folder, metadata)
    export_dense(
        read_dense_checkpoint(checkpoint),
        saved_model_config(checkpoint),
        folder,
        dtype,
        seq_len=metadata.identity_number("data", "seq_len"),
        tokenizer_file=corpus_folder / TOKENIZER_FILE if index else None,
        eos_id=index.tokenizer.eos_id if index else None,
    )
    tokenizer = (
        f"that of {corpus_folder}" if index else f"none: the run's corpus is not at {corpus_folder}"
    )
    return "\n".join(
        [
            f"checkpoint  {checkpoint}",
            f"folder      {folder}",
            f"weights     {str(dtype).removeprefix('torch.')}, merged in float32",
            f"tokenizer   {tokenizer}",
        ]
    )
