"""Writes a checkpoint as a folder that `transformers.AutoModelForCausalLM.from_pretrained` loads.

    switchtitan export outputs/RUN [--folder OUT] [--dtype float32|bfloat16] [--format peft]

The low-rank factors of any method are merged into dense weights in float32. The run's tokenizer is
exported too if the run's corpus is in its [data] cache_dir, relative to the current folder."""

import argparse
import logging
import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from switchtitan.checkpoint import CHECKPOINTS_FOLDER, find_given, read_metadata
from switchtitan.data.corpus_files import TOKENIZER_FILE
from switchtitan.errors import (
    UserError,
    exit_for,
    exit_for_interrupt,
    interrupt_on_sigterm,
)
from switchtitan.generation.trained import find_corpus, trained_corpus
from switchtitan.hub.dense_checkpoint import DenseCheckpoint
from switchtitan.hub.export_folder import MAX_SHARD_BYTES, DenseWeights, export_dense
from switchtitan.hub.model_card import write_model_card
from switchtitan.hub.peft_folder import BASE_FOLDER, BaseWeights, write_adapter
from switchtitan.hub.verify_export import verify_export

_DENSE_FILES = "Load it with `transformers.AutoModelForCausalLM.from_pretrained(FOLDER)`."
_ADAPTER_FILES = (
    "`base` is the frozen model, and this folder its LoRA adapter. Load them with "
    "`peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained('FOLDER/base'), "
    "'FOLDER')`."
)


@dataclass(frozen=True)
class Target:
    """What to write, and where."""

    folder: Path
    """Absent or empty."""
    dtype: torch.dtype = torch.float32
    """Of the stored weights."""
    max_shard_bytes: int = MAX_SHARD_BYTES
    """Maximum size of a weights file."""
    verify: Callable[[DenseCheckpoint, Path, torch.dtype], float] | None = verify_export
    """Compares the logits before the folder gets its name; returns their relative error."""
    command: str = "switchtitan export"
    """For the model card."""


def main(argv: Sequence[str]) -> None:
    """Exports the given checkpoint and prints a summary."""
    options = read_options(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    interrupt_on_sigterm()
    try:
        checkpoint = find_given(options.checkpoint)
        target = Target(
            options.folder or export_folder(checkpoint),
            getattr(torch, options.dtype),
            options.max_shard_size,
            None if options.no_verify else verify_export,
            shlex.join(["switchtitan", "export", *argv]),
        )
        export = export_adapter if options.format == "peft" else export_merged
        print(export(checkpoint, target))
    except UserError as error:
        exit_for(error)
    except KeyboardInterrupt as stop:
        exit_for_interrupt(stop, "interrupted; run the same command to export")


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
        "--format",
        choices=["transformers", "peft"],
        default="transformers",
        help="peft: a LoRA adapter, and its base model in `base` (default: transformers)",
    )
    parser.add_argument(
        "--max-shard-size",
        type=_size,
        default=MAX_SHARD_BYTES,
        metavar="SIZE",
        help="maximum size of a weights file, such as 500MB (default: 5GB); memory holds one file",
    )
    parser.add_argument(
        "--no-verify",
        action="store_true",
        help="do not compare the logits of the export with those of the checkpoint",
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


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG])B", text, re.IGNORECASE)
    unit = {"K": 10**3, "M": 10**6, "G": 10**9}
    num_bytes = int(float(match[1]) * unit[match[2].upper()]) if match else 0
    if num_bytes < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a size, for example 500MB or 2GB")
    return num_bytes


def export_folder(checkpoint: Path) -> Path:
    """Returns the default folder: `exports/step-000001000`, next to the run's `checkpoints/`."""
    parent = checkpoint.resolve().parent
    return (
        (parent.parent if parent.name == CHECKPOINTS_FOLDER else parent)
        / "exports"
        / checkpoint.resolve().name
    )


def export_merged(checkpoint: Path, target: Target) -> str:
    """Writes a checkpoint's merged weights and returns a summary.

    Raises:
        CheckpointError: if the checkpoint is corrupted, transformers has no class for its model,
            the folder is not empty, or its logits differ.
        CorpusError: if the corpus folder exists but is damaged or holds another corpus.
        OutputError: if the folder cannot be written, or another process is writing it.
    """
    weights = DenseCheckpoint(checkpoint)
    described = ("merged in float32", _DENSE_FILES)
    return _export(checkpoint, weights, weights, target, lambda partial: None, *described)


def export_adapter(checkpoint: Path, target: Target) -> str:
    """Writes a PEFT adapter and its base model, and returns a summary.

    Raises:
        CheckpointError: as `export_merged`, and if the checkpoint has no low-rank factors.
        CorpusError: as `export_merged`.
        OutputError: as `export_merged`.
    """
    weights = DenseCheckpoint(checkpoint)

    def add_adapter(partial: Path) -> None:
        _move_into_base(partial)
        write_adapter(weights, partial, target.folder.resolve() / BASE_FOLDER, target.dtype)

    described = ("an adapter and its base", _ADAPTER_FILES)
    return _export(checkpoint, weights, BaseWeights(weights), target, add_adapter, *described)


def _export(
    checkpoint: Path,
    weights: DenseCheckpoint,
    stored: DenseWeights,
    target: Target,
    add_files: Callable[[Path], None],
    form: str,
    card: str,
) -> str:
    metadata = read_metadata(checkpoint)
    corpus_folder = find_corpus(metadata)
    index = trained_corpus(corpus_folder, metadata)
    error: float | None = None

    def finish(partial: Path) -> None:
        nonlocal error
        add_files(partial)
        if target.verify is not None:
            error = target.verify(weights, partial, target.dtype)
        write_model_card(metadata, partial, target.command, card)

    export_dense(
        stored,
        weights.config,
        target.folder,
        target.dtype,
        seq_len=metadata.identity_number("data", "seq_len"),
        tokenizer_file=corpus_folder / TOKENIZER_FILE if index else None,
        eos_id=index.tokenizer.eos_id if index else None,
        max_shard_bytes=target.max_shard_bytes,
        finish=finish,
    )
    tokenizer = (
        f"that of {corpus_folder}" if index else f"none: the run's corpus is not at {corpus_folder}"
    )
    dtype = str(target.dtype).removeprefix("torch.")
    compared = (
        "not compared"
        if error is None
        else f"as those of the checkpoint's weights in {dtype}, up to {error:.1e}"
    )
    return "\n".join(
        [
            f"checkpoint  {checkpoint}",
            f"folder      {target.folder}",
            f"weights     {dtype}, {form}",
            f"tokenizer   {tokenizer}",
            f"logits      {compared}",
        ]
    )


def _move_into_base(folder: Path) -> None:
    """Moves the model's files to `base`; the tokenizer stays, since PEFT's users load it there."""
    base = folder / BASE_FOLDER
    base.mkdir()
    for file in list(folder.iterdir()):
        if file.name.startswith("tokenizer"):
            shutil.copyfile(file, base / file.name)
        elif file != base:
            file.rename(base / file.name)
