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
import os
import sys
import tempfile
import time
from functools import cache, partial
from itertools import count
from pathlib import Path

PROJECT = Path(__file__).parents[2]
STORED = PROJECT / "tests/data/reference_numbers.json"
BASE = STORED.with_suffix(".toml")
# CPUs of any age take the same operations in the same order. Read when torch is imported.
PORTABLE = {
    "ATEN_CPU_CAPABILITY": "default",
    "CUDA_VISIBLE_DEVICES": "",
    "MKL_CBWR": "COMPATIBLE",
    "OMP_NUM_THREADS": "1",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
}
TAGS = {
    "losses": "basics/loss_train",
    "validation": "basics/loss_validation",
    "gradient_norms": "optimizer/grad_norm",
    "vectors_switched": "switch/vectors_switched",
    "frozen_share": "switch/frozen_share",
}

LOW_RANK = {
    "apollo": "--method.rank 6 --method.update_interval 7",
    "fira": "--method.rank 6 --method.update_interval 7",
    "galore": "--method.rank 6 --method.update_interval 7",
    "lora": "--method.rank 6 --method.alpha 1",
    "low_rank": "--method.rank 6",
    # Resets after 9, 18, 27 and 36 steps; step 20 is inside a warmup.
    "relora": "--method.rank 6 --method.alpha 1 --method.reset_interval 9 "
    "--method.restart_warmup_steps 4",
    "sltrain": "--method.rank 6 --method.density 0.1",
    # Switches 6 / 5 vectors of each factor a step.
    "switchlora": "--method.rank 6 --method.interval 5 --method.freeze_steps 2",
}
METHODS = {
    "full_rank": "--method.name full_rank",
    **{name: f"--method.name {name} {keys}" for name, keys in LOW_RANK.items()},
}
LORA, SWITCHLORA = METHODS["lora"], METHODS["switchlora"] + " --method.decay constant"
CONSTANT = f"{SWITCHLORA} --method.candidates constant"
GENTLE = (
    "--method.name switchlora --method.rank 6 --method.candidates constant --method.freeze_steps 0 "
    "--method.switches_per_vector 9.4 --method.decay constant --method.reset_moments momentum"
)
# Moments in 8 bits are those of matrices of at least 4096 elements.
WIDE = "--model.hidden_size 64 --model.intermediate_size 128"
RUNS = {
    **METHODS,
    "apollo_mini": "--method.name apollo --method.rank 1 --method.update_interval 7 "
    "--method.scaling tensor",
    **{
        f"full_rank, {name}": f"{METHODS['full_rank']} --optimizer.name {name}"
        for name in ("adafactor", "muon", "scale", "sgd")
    },
    "full_rank, adamw8bit": f"{METHODS['full_rank']} --optimizer.name adamw8bit {WIDE}",
    "lora, muon": f"{LORA} --optimizer.name muon",
    "lora, scale": f"{LORA} --optimizer.name scale",
    "switchlora, muon": f"{SWITCHLORA} --optimizer.name muon",
    "full_rank, qwen2": f"{METHODS['full_rank']} --model.name qwen2",
    "switchlora, qwen2": f"{SWITCHLORA} --model.name qwen2",
    "full_rank, cola": f"{METHODS['full_rank']} --model.name cola --model.rank 4",
    "full_rank, tied head": f"{METHODS['full_rank']} --model.tied_head true",
    "switchlora, constant candidates": CONSTANT,
    "switchlora, host candidates": f"{SWITCHLORA} --method.candidates_device host",
    "switchlora, gentle": GENTLE,
    "switchlora, constant decay": SWITCHLORA,
    "switchlora, lora init": f"{SWITCHLORA} --method.init lora --method.reset_moments both",
    "switchlora, bf16 weights": f"{SWITCHLORA} --training.frozen_dtype bfloat16",
    "switchlora, recomputed": f"{SWITCHLORA} --activation_checkpoint.mode full",
    "switchlora, compiled": f"{SWITCHLORA} --compile.blocks true --compile.optimizer true",
}
EXPORTS = {
    "full_rank": (METHODS["full_rank"], "transformers"),
    "switchlora": (SWITCHLORA, "transformers"),
    "switchlora, peft": (SWITCHLORA, "peft"),
    "lora, peft": (LORA, "peft"),
}


class CommandError(Exception):
    """A command has failed."""


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
            tolerances = (tolerance(part, i) if is_up_to_rounding else 0 for i in count())
            difference = moved(old.get(part), new.get(part), tolerances)
            num_equal, num_moved = num_equal + (not difference), num_moved + bool(difference)
            if difference:
                print(f"moved: {name}, {part}: {difference}")
    print(f"{num_equal} numbers as stored, {num_moved} moved")
    return num_moved


def tolerance(part, position):
    """Returns how much a float may differ, relative, up to rounding."""
    return 1e-5 if part == "losses" and position < 20 else 1e-2


def moved(old, new, tolerances):
    """Says how a number, or a list of them, differs from the stored one; "" if it does not."""
    if old is None or new is None:
        return "absent now" if new is None else "not stored; use --write"
    if not isinstance(old, list):
        old, new = [old], [new]
    if len(old) != len(new):
        return f"{len(old)} -> {len(new)} values"
    differences = [
        f"[{position}] {before} -> {after}"
        for position, (before, after, most) in enumerate(zip(old, new, tolerances, strict=False))
        if not is_same(before, after, most)
    ]
    return f"{len(differences)} of {len(old)}, first {differences[0]}" if differences else ""


def is_same(old, new, most):
    if most and isinstance(old, float) and isinstance(new, float):
        return abs(old - new) <= most * max(abs(old), abs(new))
    return old == new or bool(most and str(old).startswith("sha256 "))


def measured(text):
    """Yields the name of a run, and its numbers by name, of runs with this text in their name."""
    parts = {
        **{f"run {name}": partial(curves, keys) for name, keys in RUNS.items()},
        **{f"export {name}": partial(exported, *how) for name, how in EXPORTS.items()},
    }
    for name, measure in parts.items():
        if text in name:
            start = time.monotonic()
            try:
                yield name, measure()
            except CommandError as error:
                print(f"failed: {name}: {error}")
            print(f"{time.monotonic() - start:5.1f} s  {name}", file=sys.stderr, flush=True)


def curves(keys):
    """Returns the values of all steps by metric."""
    import numpy
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = str(train(keys) / "tensorboard")
    events = EventAccumulator(folder, size_guidance={"scalars": 0}).Reload()
    return {
        # Values are float32.
        name: [float(str(numpy.float32(event.value))) for event in events.Scalars(tag)]
        for name, tag in TAGS.items()
        if tag in events.Tags()["scalars"]
    }


def exported(keys, form):
    """Returns dtype, shape, norm and checksum of each tensor that a run exports, by its name."""
    from safetensors.torch import load_file

    run = train(keys)
    folder = run / form
    command("export", run, "--folder", folder, "--format", form, "--no-verify")
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
    run = Path(tempfile.mkdtemp(dir=".")).absolute()
    command("train", "--config", BASE, "--job.output_dir", run, *keys.split())
    return run


def command(*words):
    from support.commands import run

    outcome = run(*words)
    if outcome.status != 0:
        raise CommandError(f"switchtitan {words}:\n{outcome.output}\n{outcome.errors}")


if __name__ == "__main__":
    main()
