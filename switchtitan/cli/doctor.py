"""Says what this machine has and lacks for training, and how to fix it.

    switchtitan doctor [--output-dir FOLDER]

Each line is `ok`, `optional` (an extra that is not installed), `warning` (training works, perhaps
slowly) or `missing`, with what to do. Exit status 1 if training could not work at all, else 0."""

import argparse
import fcntl
import importlib
import re
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

from switchtitan.files import format_bytes

_GIB = 1 << 30
_EXTRAS = {
    "torchao": ("torchao", 'for [optimizer] name = "adamw8bit"'),
    "flash": ("flash_attn", 'for [model] attention = "flash_attn", on GPUs'),
    "wandb": ("wandb", 'for [metrics] trackers = ["wandb"]'),
    "trackio": ("trackio", 'for [metrics] trackers = ["trackio"]'),
}
"""Extra of the package -> its module, and what it is for."""
_MIN_OPEN_FILES = 1024
"""A rank has about 100 files open, and two or three connections to every other rank."""
_EAGER = "pass --compile.blocks false --compile.loss false --compile.optimizer false"
_INSTALL_TORCH = "install torch as pytorch.org/get-started says"


class Finding(NamedTuple):
    """One line of the report."""

    status: Literal["ok", "optional", "warning", "missing"]
    name: str
    detail: str
    fix: str | None = None
    is_required: bool = False
    """Whether training cannot work if it is missing."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the folder of runs."""
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=Path("outputs"),
        metavar="FOLDER",
        help="where runs go; need not exist (default: outputs)",
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Prints and returns the findings."""
    findings = []
    for finding in _findings(options.output_dir):
        findings.append(finding)
        print(f"{finding.status:<8} {finding.name:<15} {finding.detail}", flush=True)
        if finding.fix is not None:
            print(f"{'':<25}-> {finding.fix}", flush=True)
    can_train = not any(found.is_required and found.status == "missing" for found in findings)
    print("training works here" if can_train else "training cannot work here: see what is missing")
    return {
        "can_train": can_train,
        "findings": [finding._asdict() for finding in findings],
        "exit_status": 0 if can_train else 1,
    }


def _findings(output_dir: Path) -> Iterator[Finding]:
    yield Finding("ok", "Python", f"{sys.version.split()[0]}, {sys.executable}")
    yield _packages()
    try:
        torch = importlib.import_module("torch")
    except Exception as error:  # a broken installation raises many kinds
        reason = str(error).partition("\n")[0] or type(error).__name__
        yield Finding("missing", "torch", f"cannot be imported ({reason})", _INSTALL_TORCH, True)
    else:
        yield Finding("ok", "torch", torch.__version__)
        yield from _findings_with_torch()
    for extra, (module, purpose) in _EXTRAS.items():
        spec = find_spec(module)
        # A folder of this name in the working directory has no origin: wandb writes one.
        if spec is not None and spec.origin is not None:
            yield Finding("ok", extra, f"{module} is installed, {purpose}")
        else:
            fix = f"run pip install 'switchtitan[{extra}]' if you need it"
            yield Finding("optional", extra, f"{module} is not installed, {purpose}", fix)
    folder = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
    # For a few checkpoints; for compiled code; for the data loader's batches.
    yield _free_space("outputs", folder, 5 * _GIB, "free space")
    yield _free_space("temp", Path(tempfile.gettempdir()), _GIB, "free space")
    if Path("/dev/shm").is_dir():
        fix = "start the container with --shm-size 8g, or set [data] num_workers = 0"
        yield _free_space("shared memory", Path("/dev/shm"), _GIB, fix)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]  # training raises its own limit to it
    if limit == resource.RLIM_INFINITY or limit >= _MIN_OPEN_FILES:
        yield Finding("ok", "open files", "as many as several ranks need")
    else:
        fix = "increase it: ulimit -Hn, LimitNOFILE of the service, or /etc/security/limits.conf"
        yield Finding("warning", "open files", f"at most {limit} for each process", fix)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield Finding("ok", "writing", f"files can be written and locked in {folder}")
    except OSError as error:
        fix = "choose another folder as [job] output_dir; on Lustre, mount with -o flock"
        detail = f"no file can be written and locked in {folder} ({error.strerror})"
        yield Finding("missing", "writing", detail, fix, is_required=True)


def _packages() -> Finding:
    try:
        requirements = metadata.requires("switchtitan") or []
    except metadata.PackageNotFoundError:
        fix = "run pip install --editable . in the checkout"
        return Finding("warning", "packages", "not checked: switchtitan is not installed", fix)
    installed = {_normal(found.metadata["Name"]) for found in metadata.distributions()}
    needed = [re.split(r"[^\w.-]", line)[0] for line in requirements if "extra ==" not in line]
    lacking = [name for name in needed if _normal(name) not in installed]
    if lacking:
        fix = f"run pip install {' '.join(lacking)}"
        return Finding("missing", "packages", ", ".join(lacking), fix, is_required=True)
    return Finding("ok", "packages", "all that switchtitan depends on")


def _normal(name: str) -> str:
    return name.lower().replace("_", "-")


def _findings_with_torch() -> Iterator[Finding]:
    import torch
    import torch.distributed as dist

    from switchtitan.distributed.dtype import bf16_support
    from switchtitan.distributed.world import unusable_gpu
    from switchtitan.job.checks import missing_toolchain

    has_gpu = torch.cuda.is_available()
    device = "cuda" if has_gpu else "cpu"
    lacking, _, fix = (missing_toolchain(device) or "").partition("; ")
    if lacking:
        advice = f"{fix}; until then, {_EAGER}"
        yield Finding("missing", "compiler", f"torch.compile: {lacking}", advice)
    else:
        yield Finding("ok", "compiler", "torch.compile can build code")
    support = bf16_support(torch.device(device))
    if support.is_native:
        yield Finding("ok", "bfloat16", support.evidence)
    else:
        yield Finding("warning", "bfloat16", support.evidence, 'dtype = "auto" trains in float32')
    for index in range(torch.cuda.device_count() if has_gpu else 0):
        memory = format_bytes(torch.cuda.get_device_properties(index).total_memory)
        yield Finding("ok", f"GPU {index}", f"{torch.cuda.get_device_name(index)}, {memory}")
    if has_gpu and not dist.is_nccl_available():
        yield Finding("missing", "NCCL", "not in this build of torch", _INSTALL_TORCH, True)
    if not has_gpu:
        problem, _, advice = (unusable_gpu() or "").partition("; ")
        if problem:
            yield Finding("missing", "GPU", problem, advice)
        else:
            yield Finding("ok", "GPU", "none: trains on the CPU")


def _free_space(name: str, folder: Path, least: int, fix: str) -> Finding:
    free = shutil.disk_usage(folder).free
    detail = f"{format_bytes(free)} free for {folder}"
    if free >= least:
        return Finding("ok", name, detail)
    return Finding("warning", name, detail, f"{fix}: less than {format_bytes(least)} is short")
