"""The options of commands that use a trained model."""

import argparse
from pathlib import Path


def add_target_options(parser: argparse.ArgumentParser) -> None:
    """Adds the model, `--tokenizer`, `--config`, `--dtype` and `--json`."""
    parser.add_argument(
        "target",
        type=Path,
        metavar="TARGET",
        help="a run's folder, a checkpoint, a Hugging Face folder, a LoRA adapter's folder (of "
        "switchtitan or PEFT) or a safetensors file",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FILE",
        help="a tokenizer.json or a folder with one (default: that of the run's corpus, or the one "
        "next to the weights)",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="a configuration with the model (default: that of the checkpoint, or of config.json)",
    )
    parser.add_argument(
        "--dtype",
        choices=["auto", "bfloat16", "float32"],
        default="auto",
        help="dtype of the computation (default: as in the checkpoint; for other weights bfloat16 "
        "if the device multiplies it natively, else float32)",
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="also write the result to FILE; - prints it instead of the text",
    )
