"""Says what this machine has and lacks for training, and how to fix it.

    switchtitan doctor [--output-dir FOLDER]

Each line is `ok`, `optional` (an extra that is not installed), `warning` (training works, perhaps
slowly or not compiled) or `missing`, with what to do. Exit status 1 if something is missing."""

import argparse
import fcntl
import importlib
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from switchtitan.registry import is_installed

_EXTRAS = {
    "gpu-compile": ("triton", "for switchtitan benchmark gpu, without a GPU"),
    "flash": ("flash_attn", 'for [model] attention = "flash_attn", on GPUs'),
    "wandb": ("wandb", 'for [metrics] trackers = ["wandb"]'),
}
"""Extra of switchtitan -> its package, and what it is for."""
_EAGER = "pass --compile.blocks false --compile.loss false --compile.optimizer false"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    where = "where runs go; need not exist (default: outputs)"
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"), help=where)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Prints and returns the findings."""
    findings = []
    for finding in _checks(options.output_dir):
        print("{status:<8} {name:<15} {detail}".format_map(finding), flush=True)
        if finding["fix"] is not None:
            print(f"{'':<25}-> {finding['fix']}", flush=True)
        findings.append(finding)
    can_train = all(finding["status"] != "missing" for finding in findings)
    print("training works here" if can_train else "training cannot work here: see what is missing")
    return {"can_train": can_train, "findings": findings, "exit_status": 0 if can_train else 1}


def _found(
    name: str, fine: str, problem: str = "", fix: str = "", severity: str = "warning"
) -> dict[str, str | None]:
    """Returns what is fine, or a problem, if there is one."""
    status, detail = (severity, problem) if problem else ("ok", fine)
    return {"status": status, "name": name, "detail": detail, "fix": fix if problem else None}


def _checks(output_dir: Path) -> Iterator[dict[str, str | None]]:
    yield _found("Python", f"{sys.version.split()[0]}, {sys.executable}")
    try:
        torch = importlib.import_module("torch")
    except Exception as error:  # a broken installation raises many kinds
        reason = str(error).partition("\n")[0] or type(error).__name__
        fix = "install torch as pytorch.org/get-started says"
        yield _found("torch", "", f"cannot be imported ({reason})", fix, "missing")
    else:
        yield _found("torch", torch.__version__)
        yield from _checks_with_torch()
    for extra, (package, purpose) in _EXTRAS.items():
        problem = "" if is_installed(package) else f"{package} is not installed, {purpose}"
        fix = f"run pip install '.[{extra}]' in the checkout if you need it"
        yield _found(extra, f"{package} is installed, {purpose}", problem, fix, "optional")
    folder = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
    workers = "start the container with --shm-size 8g, or set [data] num_workers = 0"
    for name, place, least_gib, fix in (
        ("outputs", folder, 5, "free space"),  # for a few checkpoints
        ("temp", Path(tempfile.gettempdir()), 1, "free space"),  # for compiled code
        ("shared memory", Path("/dev/shm"), 1, workers),  # for batches
    ):
        if place.is_dir():
            free_gib = shutil.disk_usage(place).free / 2**30
            detail = f"{free_gib:.1f} GiB free for {place}"
            problem = detail if free_gib < least_gib else ""
            yield _found(name, detail, problem, f"{fix}: less than {least_gib} GiB is short")
    problem = ""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        problem = f"no file can be written and locked in {folder} ({error.strerror})"
    fix = "choose another folder as [job] output_dir; on Lustre, mount with -o flock"
    yield _found("writing", f"files are written and locked in {folder}", problem, fix, "missing")


def _checks_with_torch() -> Iterator[dict[str, str | None]]:
    import torch

    from switchtitan.distributed.dtype import bf16_support
    from switchtitan.distributed.world import unusable_gpu
    from switchtitan.job.checks import missing_toolchain

    # The driver may list GPUs that this torch cannot use.
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = "cuda" if num_gpus else "cpu"
    problem, _, fix = (missing_toolchain(device) or "").partition("; ")
    yield _found("compiler", "torch.compile builds code", problem, f"{fix}; until then, {_EAGER}")
    support = bf16_support(torch.device(device))
    problem = "" if support.is_native else support.evidence
    yield _found("bfloat16", support.evidence, problem, 'dtype = "auto" trains in float32')
    for index in range(num_gpus):
        gpu = torch.cuda.get_device_properties(index)
        yield _found(f"GPU {index}", f"{gpu.name}, {gpu.total_memory / 2**30:.1f} GiB")
    if not num_gpus:
        problem, _, fix = (unusable_gpu() or "").partition("; ")
        yield _found("GPU", "none: trains on the CPU", problem, fix, "missing")
