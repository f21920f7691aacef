"""Continues a text with a trained model.

    switchtitan generate TARGET --prompt TEXT [--max-new-tokens N] [--temperature T] [--top-p P]
    switchtitan generate TARGET --prompt-file FILE

TARGET is a run, a checkpoint, a folder in Hugging Face's layout or a LoRA adapter's folder. Prints
the prompt and its continuation as it comes, and what ended it on standard error."""

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from tokenizers import Tokenizer

from switchtitan.cli.main import add_model_arguments, number, positive_int
from switchtitan.distributed.dtype import dtype_on
from switchtitan.distributed.precision import use_full_precision
from switchtitan.distributed.world import device_type
from switchtitan.errors import ConfigError
from switchtitan.generation.text import Sampler, continuation, read_text, text_pieces
from switchtitan.generation.trained import (
    check_tokens,
    for_evaluation,
    open_tokenizer,
    open_trained_model,
    stop_tokens,
)
from switchtitan.job.config import parse_unchecked


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the text to continue; may be empty")
    file = "a UTF-8 file with the text; - is standard input"
    prompt.add_argument("--prompt-file", metavar="FILE", help=file)
    most = "stop after N tokens, unless the text ends before (default: 128)"
    parser.add_argument("--max-new-tokens", type=positive_int, default=128, metavar="N", help=most)
    temperature = number(float, lambda value: 0 <= value < math.inf, "a number >= 0")
    divides = "divides the logits; 0 takes the most probable token (default: 1)"
    parser.add_argument("--temperature", type=temperature, default=1.0, metavar="T", help=divides)
    top_k = "draw among the K most probable tokens"
    parser.add_argument("--top-k", type=positive_int, metavar="K", help=top_k)
    share = number(float, lambda value: 0 < value <= 1, "a number above 0 and at most 1")
    top_p = "draw among the fewest tokens with a probability of P together"
    parser.add_argument("--top-p", type=share, metavar="P", help=top_p)
    seed = number(int, lambda value: 0 <= value < 1 << 63, "an integer >= 0 and below 2^63")
    repeats = "of the draws; the same N repeats them (default: 0)"
    parser.add_argument("--seed", type=seed, metavar="N", help=repeats)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Prints the prompt and its continuation; returns text and tokens. Raises a UserError if model,
    tokenizer or prompt cannot be read."""
    draws = {"--top-k": options.top_k, "--top-p": options.top_p, "--seed": options.seed}
    for name, value in draws.items():
        if options.temperature == 0 and value is not None:
            raise ConfigError(f"{name} has no effect with --temperature 0; leave one out")
    prompt: str | None = options.prompt
    if prompt is None:
        prompt = read_text("--prompt-file", options.prompt_file)
    section = None
    if options.config is not None:
        section = for_evaluation(parse_unchecked(["--config", options.config])).model
    trained = open_trained_model(options.target, section)
    documents = open_tokenizer(trained, options.tokenizer)
    tokenizer = documents.tokenizer
    # As transformers does: a prompt may have special tokens, unlike a document.
    tokenizer.encode_special_tokens = False
    # An empty prompt begins a document, which follows the end of another.
    prompt_tokens = documents.encode_documents([prompt])[0] or [documents.eos_id]
    check_tokens(trained, prompt_tokens)
    num_tokens, limit = len(prompt_tokens) + options.max_new_tokens, trained.max_positions
    if limit is not None and num_tokens > limit:
        print(
            f"warning: prompt and continuation may have {num_tokens} tokens, and the model knows "
            f"sequences of {limit}; its text may get worse after that",
            file=sys.stderr,
        )

    device = torch.device(device_type())
    use_full_precision(device.type)
    compute_dtype = dtype_on(device, options.dtype, trained.compute_dtype)
    sampler = Sampler(options.temperature, options.top_k, options.top_p, options.seed or 0)
    model = trained.load(device, compute_dtype.dtype)
    tokens = continuation(model, prompt_tokens, sampler, options.max_new_tokens, device)
    print(prompt, end="", flush=True)
    try:
        result = _print_text(tokenizer, prompt_tokens, tokens, stop_tokens(trained, documents))
    finally:
        print(flush=True)
    print(f"{len(result['tokens'])} tokens; stopped by: {result['stopped_by']}", file=sys.stderr)
    return {
        "model": str(trained.source),
        "compute_dtype": compute_dtype.name,
        "prompt": prompt,
        "prompt_tokens": prompt_tokens,
        **result,
        **asdict(sampler),
    }


def _print_text(
    tokenizer: Tokenizer, prompt: list[int], tokens: Iterator[int], stops: frozenset[int]
) -> dict[str, Any]:
    """Prints text as it comes; returns it with its tokens."""
    new_tokens, pieces = list[int](), list[str]()

    def until_stop() -> Iterator[int]:
        for token in tokens:
            new_tokens.append(token)
            if token in stops:
                return
            yield token

    for piece in text_pieces(tokenizer, prompt, until_stop()):
        pieces.append(piece)
        print(piece, end="", flush=bool(piece))
    ending = "end of text" if new_tokens[-1] in stops else "length"
    return {"text": "".join(pieces), "tokens": new_tokens, "stopped_by": ending}
