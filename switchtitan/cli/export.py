"""Writes a checkpoint as a folder that `transformers.AutoModelForCausalLM.from_pretrained` loads.

    switchtitan export outputs/RUN [--folder OUT] [--dtype float32|bfloat16] [--format peft]

The low-rank factors of any method are merged into dense weights in float32. The run's tokenizer is
exported too if the run's corpus is in its [data] cache_dir, relative to the current folder."""

import argparse
import logging
import re
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from switchtitan.builders.trained_corpus import find_corpus, trained_corpus
from switchtitan.checkpoint import find_given, read_metadata
from switchtitan.checkpoint.layout import CHECKPOINTS_FOLDER
from switchtitan.data.corpus_files import TOKENIZER_FILE
from switchtitan.errors import UserError, exit_for
from switchtitan.hub.dense_checkpoint import DenseCheckpoint
from switchtitan.hub.export_folder import MAX_SHARD_BYTES, export_dense
from switchtitan.hub.model_card import write_model_card
from switchtitan.hub.peft_folder import BASE_FOLDER, BaseWeights, write_adapter
from switchtitan.hub.verify_export import verify_export

_DENSE_FILES = "Load it with `transformers.AutoModelForCausalLM.from_pretrained(FOLDER)`."
_ADAPTER_FILES = (
    "`base` is the frozen model, and this folder its LoRA adapter. Load them with "
    "`peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained('FOLDER/base'), "
    "'FOLDER')`."
)


def main(argv: Sequence[str]) -> None:
    """Exports the given checkpoint and prints a summary."""
    options = read_options(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        checkpoint = find_given(options.checkpoint)
        folder = options.folder or export_folder(checkpoint)
        print(
            export(
                checkpoint,
                folder,
                getattr(torch, options.dtype),
                options.max_shard_size,
                is_adapter=options.format == "peft",
                is_verified=not options.no_verify,
                command=shlex.join(["switchtitan", "export", *argv]),
            )
        )
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


def export(
    checkpoint: Path,
    folder: Path,
    dtype: torch.dtype,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    is_adapter: bool = False,
    is_verified: bool = True,
    command: str = "switchtitan export",
) -> str:
    """Writes `checkpoint` to `folder` and returns a summary.

    Args:
        max_shard_bytes: maximum size of a weights file.
        is_adapter: whether to write a PEFT adapter and its base model.
        is_verified: whether to compare the logits before the folder gets its name.
        command: for the model card.

    Raises:
        CheckpointError: if the checkpoint is corrupted, transformers has no class for its model,
            `folder` is not empty, or its logits differ.
        CorpusError: if the corpus folder exists but is damaged or holds another corpus.
    """
    metadata = read_metadata(checkpoint)
    corpus_folder = find_corpus(metadata)
    index = trained_corpus(corpus_folder, metadata)
    weights = DenseCheckpoint(checkpoint)
    error: float | None = None

    def finish(partial: Path) -> None:
        nonlocal error
        files = _DENSE_FILES
        if is_adapter:
            files = _ADAPTER_FILES
            _move_into_base(partial)
            write_adapter(weights, partial, folder.resolve() / BASE_FOLDER, dtype)
        if is_verified:
            error = verify_export(weights, partial, dtype)
        write_model_card(metadata, partial, command, files)

    export_dense(
        BaseWeights(weights) if is_adapter else weights,
        weights.config,
        folder,
        dtype,
        seq_len=metadata.identity_number("data", "seq_len"),
        tokenizer_file=corpus_folder / TOKENIZER_FILE if index else None,
        eos_id=index.tokenizer.eos_id if index else None,
        max_shard_bytes=max_shard_bytes,
        finish=finish,
    )
    tokenizer = (
        f"that of {corpus_folder}" if index else f"none: the run's corpus is not at {corpus_folder}"
    )
    stored = str(dtype).removeprefix("torch.")
    form = "an adapter and its base" if is_adapter else "merged in float32"
    compared = "not compared" if error is None else f"as the checkpoint's, up to {error:.1e}"
    return "\n".join(
        [
            f"checkpoint  {checkpoint}",
            f"folder      {folder}",
            f"weights     {stored}, {form}",
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
