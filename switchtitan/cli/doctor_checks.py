"""What `switchtitan doctor` looks at. torch may be broken: imported only where it is looked at."""

import errno
import fcntl
import importlib
import os
import re
import resource
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Final, Literal

from switchtitan.cores import num_cores
from switchtitan.files import format_bytes

Status = Literal["ok", "optional", "warning", "missing"]
OK: Final = "ok"
OPTIONAL: Final = "optional"
WARNING: Final = "warning"
MISSING: Final = "missing"
_GIB = 1 << 30
_MIN_FREE_BYTES = {"outputs": 5 * _GIB, "temp": _GIB, "shared memory": _GIB}
"""Less is a warning: for a few checkpoints; for compiled code; for the data loader's batches."""
_EXTRAS = {
    "torchao": ("torchao", 'for [optimizer] name = "adamw8bit"'),
    "flash": ("flash_attn", 'for [model] attention = "flash_attn", on GPUs'),
    "wandb": ("wandb", 'for [metrics] trackers = ["wandb"]'),
    "trackio": ("trackio", 'for [metrics] trackers = ["trackio"]'),
}
"""Extra of the package -> its module, and what it is for."""
_MIN_OPEN_FILES = 1024
"""A rank has about 100 files open, and two or three connections to every other rank."""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    status: Status
    detail: str
    fix: str | None = None
    is_required: bool = False
    """Whether training cannot work if it is missing."""


def all_findings(output_dir: Path, uses_network: bool) -> Iterator[Finding]:
    """Yields what this machine has and lacks.

    Args:
        output_dir: the folder of runs; need not exist.
        uses_network: whether to ask the Hugging Face hub.
    """
    yield python_version()
    yield python_headers()
    yield required_packages()
    torch_finding = torch_build()
    yield torch_finding
    yield cores()
    if torch_finding.status != MISSING:
        yield from findings_with_torch()
    for extra, (module, purpose) in _EXTRAS.items():
        yield extra_package(extra, module, purpose)
    yield free_space("outputs", nearest_folder(output_dir))
    yield free_space("temp", Path(tempfile.gettempdir()))
    if Path("/dev/shm").is_dir():
        yield free_space("shared memory", Path("/dev/shm"))
    yield open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    yield locked_memory(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0])
    yield from folder_of_runs(output_dir)
    if uses_network:
        yield hub()


def python_version() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding("Python", OK, f"{version}, {sys.executable}")


def python_headers() -> Finding:
    header = Path(sysconfig.get_path("include"), "Python.h")
    if header.exists():
        return Finding("Python headers", OK, str(header.parent))
    fix = "install python3-dev (Debian, Ubuntu) or python3-devel, for torch.compile"
    return Finding("Python headers", MISSING, f"no {header}", fix)


def required_packages() -> Finding:
    """Whether the packages that switchtitan depends on are installed."""
    try:
        requirements = metadata.requires("switchtitan") or []
    except metadata.PackageNotFoundError:
        fix = "run pip install --editable . in the checkout"
        return Finding("packages", WARNING, "not checked: switchtitan is not installed", fix)
    names = [
        re.split(r"[^\w.-]", requirement)[0]
        for requirement in requirements
        if "extra ==" not in requirement
    ]
    lacking = [name for name in names if not _has_package(name)]
    if lacking:
        fix = f"run pip install {' '.join(lacking)}"
        return Finding("packages", MISSING, ", ".join(lacking), fix, is_required=True)
    return Finding("packages", OK, f"all {len(names)} that switchtitan depends on")


def _has_package(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def torch_build() -> Finding:
    try:
        torch = importlib.import_module("torch")
    except Exception as error:  # a broken installation raises many kinds
        reason = str(error).partition("\n")[0] or type(error).__name__
        fix = "install torch as pytorch.org/get-started says"
        return Finding("torch", MISSING, f"cannot be imported ({reason})", fix, is_required=True)
    build = "for CPUs"
    if torch.version.cuda is not None:
        build = f"for CUDA {torch.version.cuda}"
    elif torch.version.hip is not None:
        build = f"for ROCm {torch.version.hip}"
    return Finding("torch", OK, f"{torch.__version__}, {build}")


def cores() -> Finding:
    usable, present = num_cores(), os.cpu_count() or 1
    detail = f"{usable} of {present} may be used"
    if usable < present:
        detail += " (affinity mask or control group)"
    return Finding("cores", OK, detail)


def findings_with_torch() -> Iterator[Finding]:
    """Yields what needs torch: compiler, bf16, GPUs, communication, attention."""
    import torch
    import torch.distributed as dist

    from switchtitan.distributed.dtype import bf16_support
    from switchtitan.distributed.world import unusable_gpu
    from switchtitan.job.checks import missing_toolchain

    has_gpu = torch.cuda.is_available()
    lacking = missing_toolchain("cuda" if has_gpu else "cpu")
    yield compiler(lacking)
    support = bf16_support(torch.device("cuda" if has_gpu else "cpu"))
    if support.is_native:
        yield Finding("bfloat16", OK, support.evidence)
    else:
        yield Finding("bfloat16", WARNING, support.evidence, 'dtype = "auto" trains in float32')
    if has_gpu:
        for index in range(torch.cuda.device_count()):
            memory = torch.cuda.get_device_properties(index).total_memory
            name = torch.cuda.get_device_name(index)
            yield Finding(f"GPU {index}", OK, f"{name}, {format_bytes(memory)}")
    elif (problem := unusable_gpu()) is not None:
        detail, _, advice = problem.partition("; ")
        yield Finding("GPU", MISSING, detail, advice)
    else:
        yield Finding("GPU", OK, "none: trains on the CPU")
    yield communication("NCCL", dist.is_nccl_available(), is_needed=has_gpu)
    yield communication("gloo", dist.is_gloo_available(), is_needed=True)
    backends = "sdpa and flex" if has_gpu else "sdpa; flex needs a GPU"
    yield Finding("attention", OK, backends)


def compiler(lacking: str | None) -> Finding:
    """Args: lacking: see `job.checks.missing_toolchain`."""
    if lacking is None:
        return Finding("compiler", OK, "torch.compile can build code")
    detail, _, fix = lacking.partition("; ")
    return Finding("compiler", MISSING, f"torch.compile: {detail}", f"{fix}; until then, {_EAGER}")


_EAGER = "pass --compile.blocks false --compile.loss false --compile.optimizer false"


def communication(name: str, is_available: bool, is_needed: bool) -> Finding:
    if is_available:
        return Finding(name, OK, "in this build of torch")
    if not is_needed:
        return Finding(name, OK, "not in this build of torch, and not needed without a GPU")
    fix = "install a build of torch with it, as pytorch.org/get-started says"
    return Finding(name, MISSING, "not in this build of torch", fix, is_required=True)


def extra_package(extra: str, module: str, purpose: str) -> Finding:
    spec = find_spec(module)
    # A folder of this name in the working directory has no origin: wandb writes one.
    if spec is not None and spec.origin is not None:
        return Finding(extra, OK, f"{module} is installed, {purpose}")
    fix = f"run pip install 'switchtitan[{extra}]' if you need it"
    return Finding(extra, OPTIONAL, f"{module} is not installed, {purpose}", fix)


def nearest_folder(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def free_space(name: str, folder: Path) -> Finding:
    free, least = shutil.disk_usage(folder).free, _MIN_FREE_BYTES[name]
    detail = f"{format_bytes(free)} free for {folder}"
    if free >= least:
        return Finding(name, OK, detail)
    fix = f"free space: less than {format_bytes(least)} is short"
    if name == "shared memory":
        fix = "start the container with --shm-size 8g, or set [data] num_workers = 0"
    return Finding(name, WARNING, detail, fix)


def open_files(hard_limit: int) -> Finding:
    """Args: hard_limit: of open files of a process, which switchtitan raises its own limit to."""
    if hard_limit == resource.RLIM_INFINITY:
        return Finding("open files", OK, "no limit")
    fix = "increase it: ulimit -Hn, LimitNOFILE of the service, or /etc/security/limits.conf"
    detail = f"at most {hard_limit} for each process"
    if hard_limit < _MIN_OPEN_FILES:
        return Finding("open files", WARNING, detail, fix)
    return Finding("open files", OK, detail)


def locked_memory(limit: int) -> Finding:
    """Args: limit: bytes that a process may lock into memory."""
    if limit == resource.RLIM_INFINITY:
        return Finding("locked memory", OK, "no limit")
    detail = f"at most {format_bytes(limit)}"
    if limit >= _GIB:
        return Finding("locked memory", OK, detail)
    fix = "only for InfiniBand: ulimit -l unlimited on every machine"
    return Finding("locked memory", WARNING, detail, fix)


def folder_of_runs(output_dir: Path) -> Iterator[Finding]:
    """Yields whether files can be written and locked where runs go."""
    folder = nearest_folder(output_dir)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            yield Finding("writing", OK, f"{folder} can be written")
            yield locks(folder, lambda: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB))
    except OSError as error:
        fix = "choose another folder as [job] output_dir"
        detail = f"{folder} cannot be written ({error.strerror})"
        yield Finding("writing", MISSING, detail, fix, is_required=True)


def locks(folder: Path, acquire: Callable[[], object]) -> Finding:
    """Args: acquire: locks a file of the folder."""
    try:
        acquire()
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            raise
        fix = "mount it with locks, so that a run whose process was killed is noticed at once"
        detail = f"the file system of {folder} has no locks ({error.strerror})"
        return Finding("file locks", WARNING, detail, fix)
    return Finding("file locks", OK, f"the file system of {folder} has them")


def hub() -> Finding:
    from switchtitan.data.corpus_plan import hub_error

    reason = hub_error()
    if reason is None:
        return Finding("hub", OK, "the Hugging Face hub answers")
    fix = "check the connection and proxies, or use local files ([data] path, tokenizer)"
    return Finding("hub", WARNING, f"the Hugging Face hub cannot be reached ({reason})", fix)
