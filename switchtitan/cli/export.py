"""Writes a checkpoint as a folder that `transformers.AutoModelForCausalLM.from_pretrained` loads.

    switchtitan export outputs/RUN [--folder OUT] [--dtype float32|bfloat16] [--format peft]

The low-rank factors of any method are merged into dense weights in float32. The tokenizer of the
run's corpus is exported too."""

import argparse
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from pydantic import ByteSize, TypeAdapter

from switchtitan.checkpoint.load import find_given
from switchtitan.checkpoint.save import CHECKPOINTS_FOLDER
from switchtitan.cli.main import number
from switchtitan.generation.trained import corpus_of_run
from switchtitan.hub.export_folder import (
    MAX_SHARD_BYTES,
    export_dense,
    new_folder,
    verify_export,
    write_model_card,
)
from switchtitan.hub.initial_weights import DenseCheckpoint
from switchtitan.hub.peft_folder import BASE_FOLDER, write_adapter

_LOADED_BY = {
    "transformers": "Load it with `transformers.AutoModelForCausalLM.from_pretrained(FOLDER)`.",
    "peft": "`base` is the frozen model, and this folder its LoRA adapter. Load them with "
    "`peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained('FOLDER/base'), "
    "'FOLDER')`.",
}
"""Format -> a sentence of the model card."""


def _num_bytes(word: str) -> int:
    # pydantic ignores what follows a number or a unit.
    if not re.fullmatch(r"\d+(\.\d+)? ?[KMGT]?i?B", word, re.IGNORECASE):
        raise ValueError
    return TypeAdapter(ByteSize).validate_python(word)


_size = number(_num_bytes, lambda size: size >= 1, "a size such as 500MB or 2GB")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    checkpoint = "a folder step-000001000, or a run's output folder: its newest checkpoint"
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help=checkpoint)
    folder = "to write, absent or empty (default: exports/STEP in the run's output folder)"
    parser.add_argument("--folder", type=Path, help=folder)
    form = "peft: a LoRA adapter, and its base model in `base` (default: transformers)"
    parser.add_argument("--format", choices=_LOADED_BY, default="transformers", help=form)
    size = "of a weights file, such as 500MB (default: 5GB); memory holds one file"
    parser.add_argument(
        "--max-shard-size", type=_size, default=MAX_SHARD_BYTES, metavar="SIZE", help=size
    )
    no_tokenizer = "export weights alone, for which the run's corpus need not be there"
    parser.add_argument("--no-tokenizer", action="store_true", help=no_tokenizer)
    no_verify = "do not compare the logits of the export with those of the checkpoint"
    parser.add_argument("--no-verify", action="store_true", help=no_verify)
    dtype = "of the stored weights (default: float32)"
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help=dtype)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Writes the folder; returns where its parts come from, and the relative error of its logits.
    Raises a UserError if the checkpoint is corrupted or has no form of this format, the corpus is
    not the run's, the folder is not empty or cannot be written, or its logits differ."""
    checkpoint = find_given(options.checkpoint)
    folder: Path = options.folder
    if folder is None:
        parent = checkpoint.resolve().parent
        run_folder = parent.parent if parent.name == CHECKPOINTS_FOLDER else parent
        folder = run_folder / "exports" / checkpoint.resolve().name
    dtype: torch.dtype = getattr(torch, options.dtype)
    is_adapter = options.format == "peft"
    weights = DenseCheckpoint(checkpoint)
    metadata = weights.metadata
    corpus = None if options.no_tokenizer else corpus_of_run(metadata, checkpoint)
    with new_folder(folder) as partial:
        base = partial / BASE_FOLDER if is_adapter else partial
        export_dense(
            weights.reader_of_base() if is_adapter else weights.read,
            weights.config,
            base,
            dtype,
            seq_len=metadata.identity_value("data", "seq_len", int),
            tokenizer=None if corpus is None else corpus.tokenizer(),
            max_shard_bytes=options.max_shard_size,
        )
        if is_adapter:
            for file in base.glob("tokenizer*"):  # PEFT's users load it next to the adapter
                shutil.copyfile(file, partial / file.name)
            base = folder.resolve() / BASE_FOLDER
            write_adapter(weights.updates(), partial, base, dtype, "CAUSAL_LM")
        error = None if options.no_verify else verify_export(weights, partial, dtype)
        write_model_card(metadata, partial, options.command, _LOADED_BY[options.format])
    same = f"as those of the checkpoint's weights in {options.dtype}"
    result = {
        "checkpoint": str(checkpoint),
        "folder": str(folder),
        "weights": f"{options.dtype}, {'adapter and base' if is_adapter else 'merged in float32'}",
        "tokenizer": "none" if corpus is None else f"that of {corpus.folder}",
        "logits": "not compared" if error is None else f"{same}, up to {error:.1e}",
    }
    for name, value in result.items():
        print(f"{name:<12}{value}")
    return result
