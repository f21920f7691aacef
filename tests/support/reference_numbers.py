"""Compares what the command line computes with stored numbers, from before a change.

    ./scripts/test.sh --numbers                      compares; status 1 if a number moved
    ./scripts/test.sh --numbers -k galore            those of runs with this text in their name
    ./scripts/test.sh --numbers --rounding           floats may differ, see below
    ./scripts/test.sh --numbers --write              stores this checkout's numbers

tests/data/reference_numbers.json has, for tiny runs of every method, optimizer and model, the
training and validation losses and norms of gradients of 40 steps, and the tensors of exports.

Runs take one thread and torch's portable kernels, so CPUs agree on the bits. Another version of
torch and compiled regions may differ. There, and for a change of the order of operations, use
--rounding: the first 20 losses may then differ by 1e-5, relative, and other floats by 1e-2, since
training amplifies rounding. (Kernels for AVX-512 instead of the portable ones move later losses by
1e-4, norms of gradients by 4e-3.) A tensor's checksum is not compared then, but its norm. An
intended change of a number is stored with --write, in a commit that says why.
"""

import argparse
import hashlib
import json
import math
import os
import sys
import tempfile
from functools import cache, partial
from itertools import zip_longest
from pathlib import Path

PROJECT = Path(__file__).parents[2]
STORED = PROJECT / "tests/data/reference_numbers.json"
# CPUs of any age take the same operations in the same order. Read when torch is imported.
PORTABLE = {
    "ATEN_CPU_CAPABILITY": "default",
    "CUDA_VISIBLE_DEVICES": "",
    "MKL_CBWR": "COMPATIBLE",
    "OMP_NUM_THREADS": "1",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
}
METRICS = {
    "losses": "loss/train",
    "validation": "loss/validation",
    "gradient_norms": "optimizer/grad_norm",
    "vectors_switched": "switch/vectors_switched",
    "frozen_share": "switch/frozen_share",
}

# Moments in 8 bits are those of rows of at least 64 elements.
WIDE = "--model.hidden_size 64 --model.intermediate_size 128"
GENTLE = (
    "--method.candidates constant --method.freeze_steps 0 --method.interval 40 "
    "--method.switches_per_vector 9.4 --method.reset_moments momentum"
)
RUNS = {
    **{
        f"full_rank, {name}": f"full_rank --optimizer.name {name}"
        for name in ("adafactor", "muon", "scale", "sgd")
    },
    "full_rank, adamw8bit": f"full_rank --optimizer.name adamw8bit {WIDE}",
    "lora, muon": "lora --optimizer.name muon",
    "lora, scale": "lora --optimizer.name scale",
    "switchlora, muon": "switchlora --optimizer.name muon",
    "full_rank, qwen2": "full_rank --model.name qwen2",
    "switchlora, qwen2": "switchlora --model.name qwen2",
    "full_rank, cola": "full_rank --model.name cola --model.rank 4",
    "full_rank, tied head": "full_rank --model.tied_head true",
    "switchlora": "switchlora --method.decay exponential",
    "switchlora, constant candidates": "switchlora --method.candidates constant",
    "switchlora, host candidates": "switchlora --method.candidates_device host",
    "switchlora, gentle": f"switchlora {GENTLE}",
    "switchlora, constant decay": "switchlora",
    "switchlora, lora init": "switchlora --method.init lora --method.reset_moments both",
    "switchlora, int16 weights": "switchlora --training.frozen_dtype int16",
    "switchlora, 24-bit weights": "switchlora --training.trained_dtype bfloat16 "
    f"--optimizer.name muon8bit {WIDE}",
    "switchlora, recomputed": "switchlora --activation_checkpoint.mode full",
    "switchlora, compiled": "switchlora --compile.blocks true --compile.optimizer true",
}
"""Name -> a method of tiny.py, and options. Every method also runs without options."""
EXPORTS = {
    "full_rank": ("full_rank", "transformers"),
    "switchlora": ("switchlora", "transformers"),
    "switchlora, peft": ("switchlora", "peft"),
    "lora, peft": ("lora", "peft"),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-k", dest="text", default="", help="runs with this text in their name")
    parser.add_argument("--write", action="store_true", help="store this checkout's numbers")
    parser.add_argument("--rounding", action="store_true", help="compare floats up to rounding")
    options = parser.parse_args()
    if any(os.environ.get(key) != PORTABLE[key] for key in PORTABLE):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **PORTABLE})
    sys.path[:1] = [str(PROJECT), str(PROJECT / "tests")]  # instead of this file's folder
    stored = json.loads(STORED.read_text()) if STORED.exists() else {"numbers": {}}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        if options.write:
            write(options.text, stored["numbers"])
        else:
            sys.exit(1 if compare(options.text, stored, options.rounding) else 0)


def write(text, old):
    """Stores the numbers of this checkout, each in a line; keeps old ones of other runs."""
    import torch

    kept = {name: parts for name, parts in old.items() if text not in name}
    numbers = {**kept, **dict(measured(text))}
    shown = [
        f"{json.dumps(name)}: {{\n"
        + ",\n".join(f"  {json.dumps(part)}: {json.dumps(parts[part])}" for part in sorted(parts))
        + "\n}"
        for name, parts in sorted(numbers.items())
    ]
    version = json.dumps(str(torch.__version__))
    STORED.write_text(f'{{"torch": {version}, "numbers": {{\n{",".join(shown)}\n}}}}\n')


def compare(text, stored, is_up_to_rounding):
    """Prints a line per number that moved; returns how many."""
    import torch

    if stored["torch"] != torch.__version__:
        print(f"torch {torch.__version__}; the numbers are of torch {stored['torch']}")
    expected = {name: parts for name, parts in stored["numbers"].items() if text in name}
    found = dict(measured(text))
    num_equal = num_moved = 0
    for name in sorted(expected.keys() | found.keys()):
        old, new = expected.get(name, {}), found.get(name, {})
        for part in sorted(old.keys() | new.keys()):
            difference = moved(part, old.get(part), new.get(part), is_up_to_rounding)
            num_equal, num_moved = num_equal + (not difference), num_moved + bool(difference)
            if difference:
                print(f"moved: {name}, {part}: {difference}")
    print(f"{num_equal} numbers as stored, {num_moved} moved")
    return num_moved


def moved(part, old, new, is_up_to_rounding):
    """Says how a list of numbers differs from the stored one; "" if it does not."""
    if old is None or new is None:
        return "absent now" if new is None else "not stored; use --write"
    differences = []
    for position, (before, after) in enumerate(zip_longest(old, new)):
        most = 1e-5 if part == "losses" and position < 20 else 1e-2
        is_same = before == after
        if is_up_to_rounding and isinstance(before, float) and isinstance(after, float):
            is_same = math.isclose(before, after, rel_tol=most)
        if is_up_to_rounding and str(before).startswith("sha256 "):
            is_same = True
        if not is_same:
            differences.append(f"[{position}] {before} -> {after}")
    return f"{len(differences)} of {len(old)}, first {differences[0]}" if differences else ""


def measured(text):
    """Yields the name of a run, and its numbers by name, of runs with this text in their name."""
    from support.tiny import METHOD_KEYS

    runs = {method: method for method in METHOD_KEYS} | RUNS
    parts = {
        **{f"run {name}": partial(curves, keys) for name, keys in runs.items()},
        **{f"export {name}": partial(exported, *how) for name, how in EXPORTS.items()},
    }
    for name, measure in parts.items():
        if text in name:
            try:
                yield name, measure()
            except AssertionError as error:
                print(f"failed: {name}: {error}")


def curves(keys):
    """Returns the values of all steps by metric."""
    import numpy

    from switchtitan.observability.tensorboard import read_curves

    found = read_curves(train(keys))
    return {
        # Values are float32.
        name: [float(str(numpy.float32(value))) for value in found[metric][1]]
        for name, metric in METRICS.items()
        if metric in found
    }


def exported(keys, form):
    """Returns dtype, shape, norm and checksum of each tensor that a run exports, by its name."""
    from safetensors.torch import load_file

    from support.commands import succeed

    run = train(keys)
    folder = run / form
    succeed("export", run, "--folder", folder, "--format", form, "--no-verify")
    return {
        str(file.parent.relative_to(folder) / name): [
            str(tensor.dtype).removeprefix("torch."),
            "x".join(map(str, tensor.shape)),
            tensor.double().norm().item(),
            "sha256 " + hashlib.sha256(tensor.numpy().tobytes()).hexdigest(),
        ]
        for file in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


@cache
def train(keys):
    """Returns the folder of a finished run."""
    from support.commands import succeed
    from support.tiny import tiny_toml

    folder = Path(tempfile.mkdtemp(dir=".")).absolute()
    method, *options = keys.split()
    config = folder / "run.toml"
    config.write_text(tiny_toml(folder, method))
    fixed = ("--training.local_batch_size", "4", "--metrics.tensorboard", "true")
    succeed("train", "--config", config, *fixed, *options)
    return folder / "run"


if __name__ == "__main__":
    main()
