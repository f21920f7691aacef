"""Continues a text with a trained model.

    switchtitan generate TARGET --prompt TEXT [--max-new-tokens N] [--temperature T] [--top-p P]
    switchtitan generate TARGET --prompt-file FILE

TARGET is a run, a checkpoint, a folder in Hugging Face's layout or a LoRA adapter's folder. Prints
the prompt and its continuation as it comes, and the speed on standard error."""

import argparse
import logging
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer

from switchtitan.cli.record import check_json_option, write_json
from switchtitan.cli.target import add_target_options
from switchtitan.config.command_line import positive_int
from switchtitan.distributed.dtype import dtype_on
from switchtitan.distributed.precision import use_full_precision
from switchtitan.distributed.world import device_type
from switchtitan.errors import ConfigError, UserError, exit_for, exit_for_interrupt
from switchtitan.generation.decoding import continuations
from switchtitan.generation.sampling import Sampler, Sampling
from switchtitan.generation.text import TextStream, prompt_ids
from switchtitan.generation.trained import (
    TrainedModel,
    check_tokens,
    load_for_evaluation,
    open_tokenizer,
    open_trained_model,
    stop_tokens,
)


def main(argv: Sequence[str]) -> None:
    """Continues the prompt, and prints it."""
    options = read_options(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        check_json_option(options.json)
        result = generate(options)
        if options.json is not None:
            write_json(options.json, result)
    except UserError as error:
        exit_for(error)
    except KeyboardInterrupt as stop:
        exit_for_interrupt(stop, "\nstopped")


def read_options(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line; argparse exits with status 2 on an error."""
    parser = argparse.ArgumentParser(
        prog="switchtitan generate",
        description="Continues a text with a trained model.",
        allow_abbrev=False,
    )
    add_target_options(parser)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the text to continue; may be empty")
    prompt.add_argument(
        "--prompt-file", metavar="FILE", help="a UTF-8 file with the text; - is standard input"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=positive_int,
        default=128,
        metavar="N",
        help="stop after N tokens, unless the text ends before (default: 128)",
    )
    parser.add_argument(
        "--temperature",
        type=_temperature,
        default=1.0,
        metavar="T",
        help="divides the logits; 0 takes the most probable token (default: 1)",
    )
    parser.add_argument(
        "--top-k", type=positive_int, metavar="K", help="draw among the K most probable tokens"
    )
    parser.add_argument(
        "--top-p",
        type=_share,
        metavar="P",
        help="draw among the fewest tokens with a probability of P together, up to 1",
    )
    parser.add_argument(
        "--seed", type=_seed, metavar="N", help="of the draws; the same N repeats them (default: 0)"
    )
    options = parser.parse_args(argv)
    if options.temperature == 0:
        for name in ("top_k", "top_p", "seed"):
            if getattr(options, name) is not None:
                option = "--" + name.replace("_", "-")
                parser.error(f"{option} has no effect with --temperature 0; leave one out")
    return options


def generate(options: argparse.Namespace) -> dict[str, object]:
    """Prints the prompt and its continuation; returns text, tokens and speed.

    Raises:
        UserError: if model, tokenizer or prompt cannot be read.
    """
    prompt = read_prompt(options)
    section = None if options.config is None else load_for_evaluation(options.config).model
    trained = open_trained_model(options.target, section)
    documents = open_tokenizer(trained, options.tokenizer)
    tokenizer = documents.tokenizer
    # As transformers does: a prompt may have special tokens, unlike a document.
    tokenizer.encode_special_tokens = False
    # An empty prompt begins a document, which follows the end of another.
    prompt_tokens = prompt_ids(tokenizer, prompt) or [documents.eos_id]
    check_tokens(trained, prompt_tokens)
    _warn_of_length(trained, len(prompt_tokens) + options.max_new_tokens)

    device = torch.device(device_type())
    use_full_precision(device.type)
    compute_dtype = dtype_on(device, options.dtype, trained.compute_dtype)
    sampling = Sampling(options.temperature, options.top_k, options.top_p)
    steps = continuations(
        trained.load(device, compute_dtype.dtype),
        [prompt_tokens],
        Sampler(sampling, options.seed or 0),
        options.max_new_tokens,
        device,
    )
    is_shown = options.json != Path("-")
    result = _stream(
        (step[0] for step in steps),
        stop_tokens(trained, documents),
        tokenizer,
        prompt,
        prompt_tokens,
        is_shown,
    )
    return {
        "model": str(trained.source),
        "compute_dtype": compute_dtype.name,
        "prompt": prompt,
        "prompt_tokens": prompt_tokens,
        **result,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "seed": options.seed or 0,
    }


def read_prompt(options: argparse.Namespace) -> str:
    """Returns the text to continue.

    Raises:
        ConfigError: if the file cannot be read, or is not UTF-8.
    """
    if options.prompt is not None:
        text: str = options.prompt
        return text
    try:
        if options.prompt_file == "-":
            return sys.stdin.buffer.read().decode()
        return Path(options.prompt_file).read_bytes().decode()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--prompt-file {options.prompt_file}: cannot be read ({error}); expected a UTF-8 file"
        ) from error


def _stream(
    tokens: Iterator[int],
    stops: frozenset[int],
    tokenizer: Tokenizer,
    prompt: str,
    prompt_tokens: list[int],
    is_shown: bool,
) -> dict[str, object]:
    """Prints text as it comes, and the speed at the end."""
    stream = TextStream(tokenizer, prompt_tokens)
    pieces: list[str] = []
    new_tokens: list[int] = []
    times = [time.perf_counter()]

    def show(piece: str) -> None:
        if is_shown and piece:
            print(piece, end="", flush=True)

    show(prompt)
    ending = "length"
    for token in tokens:
        times.append(time.perf_counter())
        new_tokens.append(token)
        if token in stops:
            ending = "end of text"
            break
        pieces.append(stream.add(token))
        show(pieces[-1])
    pieces.append(stream.rest())
    show(pieces[-1] + "\n")
    # The first token takes the pass over the prompt.
    num_timed, elapsed_s = len(new_tokens) - 1, times[-1] - times[1]
    speed = num_timed / elapsed_s if elapsed_s > 0 else None
    said = "" if speed is None else f", {speed:.1f} tokens/s after the first"
    print(
        f"{len(new_tokens)} tokens{said}; prompt: {len(prompt_tokens)} tokens, "
        f"{times[1] - times[0]:.2f} s; stopped by: {ending}",
        file=sys.stderr,
    )
    return {
        "text": "".join(pieces),
        "tokens": new_tokens,
        "stopped_by": ending,
        "tokens_per_s": speed,
        "first_token_s": times[1] - times[0],
    }


def _warn_of_length(trained: TrainedModel, num_tokens: int) -> None:
    limit = trained.max_positions
    if limit is not None and num_tokens > limit:
        print(
            f"warning: prompt and continuation may have {num_tokens} tokens, and the model knows "
            f"sequences of {limit}; its text may get worse after that",
            file=sys.stderr,
        )


def _temperature(word: str) -> float:
    number = _number(word)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{word}: expected a number >= 0")
    return number


def _share(word: str) -> float:
    number = _number(word)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{word}: expected a number above 0 and at most 1")
    return number


def _seed(word: str) -> int:
    if not word.isdecimal() or int(word) >= 1 << 63:
        raise argparse.ArgumentTypeError(f"{word}: expected an integer >= 0 and below 2^63")
    return int(word)


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        return math.nan
