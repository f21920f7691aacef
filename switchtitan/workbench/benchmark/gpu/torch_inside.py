"""Everything private of torch and Triton that taking steps for a GPU without one depends on.

`install` changes torch for the rest of its process, in which `device.load` came first.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from pkgutil import resolve_name
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from switchtitan.distributed.gpus import ARCHS, card_of
from switchtitan.errors import EnvironmentMismatchError

_INDUCTOR = "torch._inductor"
_TUNER = f"{_INDUCTOR}.runtime.triton_heuristics.CachingAutotuner"
_FOLDER = f"{_INDUCTOR}.fx_passes.joint_graph.UniformValueConstantFolder"
_GUARDS = "torch._C._dynamo.guards"


def _private(name: str) -> Any:
    """Returns a private part of torch; an EnvironmentMismatchError if this torch has moved it."""
    try:
        return resolve_name(name)
    except (ImportError, AttributeError) as error:
        raise EnvironmentMismatchError(
            f"torch {torch.__version__}: `benchmark gpu` needs {name}; use torch 2.13"
        ) from error


def _replace(name: str, value: object) -> None:
    _private(name)
    owner, _, attribute = name.rpartition(".")
    setattr(resolve_name(owner), attribute, value)


def install(arch: str) -> None:
    """Lets torch take steps on fake tensors of a GPU, and Inductor compile for it. Raises an
    EnvironmentMismatchError if this torch has moved what is private."""
    # First: torch._dynamo keeps functions of torch.cuda when it is imported.
    _install_device(arch)
    _install_inductor()
    _install_triton(int(arch.removeprefix("sm_")))


# The device.
class _Generator(torch.Generator):
    device = property(lambda self: torch.device("cuda", 0))

    def clone_state(self) -> "_Generator":
        return _Generator()

    def graphsafe_get_state(self) -> "_Generator":
        return self

    def graphsafe_set_state(self, state: torch.Generator) -> "_Generator":
        return self


def _install_device(arch: str) -> None:
    given = ARCHS[arch]
    major, minor = divmod(int(arch.removeprefix("sm_")), 10)
    properties = SimpleNamespace(
        name=card_of(arch).device_name,
        major=major,
        minor=minor,
        multi_processor_count=given.num_processors,
        total_memory=80 << 30,
        shared_memory_per_block=48 << 10,
        shared_memory_per_block_optin=given.shared_kib << 10,
        shared_memory_per_multiprocessor=(given.shared_kib + 1) << 10,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=given.threads_per_processor,
        max_threads_per_block=1024,
        warp_size=32,
        L2_cache_size=50 << 20,
        is_integrated=False,
        gcnArchName="",
    )
    state = torch.empty(16, dtype=torch.uint8)
    functions: dict[str, object] = {
        "Stream": torch.Stream,
        "Event": torch.Event,
        "stream": lambda stream: nullcontext(),
        "current_stream": lambda device=None: torch.accelerator.current_stream(),
        "set_device": lambda device: None,
        "device_count": lambda: 1,
        "synchronize": lambda device=None: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "memory_allocated": lambda device=None: 0,
        "get_device_properties": lambda device=None: properties,
        "default_generators": (_Generator(),),
        "get_rng_state": lambda device="cuda": state,
        "set_rng_state": lambda new, device="cuda": None,
    }
    for name, function in functions.items():
        setattr(torch.cuda, name, function)
    for name in ("get_rng_state", "set_rng_state"):
        setattr(torch.cuda.random, name, functions[name])
    _replace("torch.cuda._lazy_init", lambda: None)
    _replace("torch.cuda._exchange_device", lambda device: 0)
    _replace("torch.cuda._maybe_exchange_device", lambda device: 0)
    # A CPU build has neither of them, nor a version of CUDA.
    torch._C._cuda_getCurrentRawStream = lambda device: 0
    torch._C._cuda_getDevice = lambda: 0
    torch.version.cuda = "13.0"
    # Else `torch.tensor(2.0, device="cuda")` allocates.
    _replace("torch._subclasses.fake_tensor.FakeTensorMode.avoid_device_init", True)
    _replace("torch._C._distributed_c10d.FakeWork.wait", lambda work, timeout=None: True)
    # A fake tensor has no address: what tells storages apart.
    torch.Tensor.data_ptr = lambda tensor: tensor.untyped_storage()._cdata  # type: ignore
    torch.Tensor.pin_memory = lambda tensor, device=None: tensor.clone()  # type: ignore
    torch.Tensor.record_stream = lambda tensor, stream: None  # type: ignore


# Compilation.
class _OnCpu(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(kwargs.get("device"), "type", None) == "cuda":
            kwargs["device"] = torch.device("cpu")
        return func(*args, **kwargs)


def _on_cpu(method: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Any, *args: Any) -> Any:
        with _OnCpu():
            return method(self, *args)

    return call


def _install_inductor() -> None:
    # Constants of one element are computed on the device.
    for name in (f"{_FOLDER}._deduce_value", f"{_FOLDER}._add_peephole_patterns"):
        _replace(name, _on_cpu(_private(name)))
    torch.compiler.config.force_disable_caches = True  # cached graphs have no kernels to read
    config = _private(f"{_INDUCTOR}.config")
    config.compile_threads = 1  # processes that compile lack these changes
    config.use_static_triton_launcher = False  # it loads kernels on the device
    config.benchmark_kernel = True  # lets Inductor note the bytes of each kernel
    config.shape_padding = False  # it times padded products of odd sizes, as in LLaMA 1B
    _replace(
        f"{_GUARDS}._empty_strided_cuda",
        lambda *layout: torch.empty_strided(*layout[:2], dtype=layout[2], device="cuda"),
    )
    _replace(
        f"{_GUARDS}._reinterpret_tensor",
        lambda t, size, stride, offset=0: t.as_strided(size, stride, t.storage_offset() + offset),
    )
    _replace(f"{_GUARDS}.assert_alignment", lambda *args: None)
    _replace(f"{_INDUCTOR}.codegen.simd.SIMDKernel.estimate_kernel_num_bytes", num_bytes_of_kernel)
    name = f"{_INDUCTOR}.output_code.CompiledFxGraph.__call__"
    call = _private(name)

    def call_and_tell(graph: Any, inputs: Any) -> Any:
        running_graphs.append(graph)
        try:
            return call(graph, inputs)
        finally:
            running_graphs.pop()

    _replace(name, call_and_tell)


def num_bytes_of_kernel(kernel: Any) -> int:
    """Returns the bytes of a Triton kernel's arguments, and of strided ones only what is accessed.

    Inductor's own estimate counts such a part once for each way to index it.
    """
    V = _private(f"{_INDUCTOR}.virtualized.V")
    in_place = kernel.args.inplace_buffers.values()
    # Without those that Inductor removed, which are no arguments.
    num_in_place = len({id(buffer) for buffer in in_place if hasattr(buffer, "inner_name")})
    accesses, total = kernel.features.buf_accesses(), 0
    for index, name in enumerate(kernel.args.python_argdefs()[1]):
        if name in accesses:
            buffer = V.graph.try_get_buffer(name)
            size, stride = buffer.get_size(), buffer.get_stride()
            num_values = _num_accessed([*map(int, size)], [*map(int, stride)], accesses[name])
            num_values *= buffer.get_dtype().itemsize
            # One that is overwritten is read, too.
            total += num_values * (2 if index < num_in_place else 1)
    return total


def _num_accessed(size: list[int], stride: list[int], accesses: list[Any]) -> int:
    """Counts the values of rows that are accessed; all of a tensor that is not made of rows."""
    full = math.prod(size)
    if len(size) < 2 or stride[-1] != 1:
        return full
    width = stride[-2]
    num_rows, num_gathered, columns = 0, 0, set[int]()
    for access in accesses:
        if not hasattr(access, "var_names"):
            return full
        strides = access.index.as_coefficients_dict()
        lengths = dict(zip(access.var_names, map(int, access.size), strict=True))
        if any(variable != 1 and variable not in lengths for variable in strides):
            num_gathered += math.prod(lengths.values())
            continue
        start, span, num_rows_here = int(strides.pop(1, 0)), 1, 1
        for variable, step in strides.items():
            # A loop may go on over the ends of rows.
            last = int(step) * (lengths[variable] - 1)
            num_rows_here *= lengths[variable] if step >= width else max(1, last // width + 1)
            span += last if step < width else 0
        # A masked access may start before the row.
        first = start % width if start >= 0 else start
        columns.update(range(max(first, 0), min(first + span, width)))
        num_rows = max(num_rows, num_rows_here)
    return min(full, num_rows * len(columns) + num_gathered)


running_graphs: list[object] = []
"""Compiled graphs that are running: operations in them are called by generated code."""
tuners: list[Any] = []
"""What holds the compiled configurations of a Triton kernel, of all that were compiled."""
on_launch: Callable[[Any], None] = lambda tuner: None  # noqa: E731
"""Called instead of each launch of a Triton kernel."""


def _install_triton(capability: int) -> None:
    import triton
    from triton.backends.compiler import GPUTarget

    driver = SimpleNamespace(
        is_active=lambda: True,
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device=None: 0,
        get_active_torch_device=lambda: torch.device("cuda", 0),
        get_device_interface=lambda: torch.cuda,
    )
    triton.runtime.driver.set_active(driver)
    _replace(f"{_INDUCTOR}.runtime.triton_helpers.set_driver_to_gpu", lambda: None)

    _replace(f"{_TUNER}._make_launchers", lambda tuner: tuners.append(tuner))
    _replace(f"{_TUNER}._dynamic_scale_rblock", lambda tuner: None)
    _replace(f"{_TUNER}.run", lambda tuner, *args, **keys: on_launch(tuner))


def value_error() -> type[Exception]:
    """Returns what is raised where the host reads a value, which a fake tensor does not have."""
    return _private("torch._subclasses.fake_tensor.DataDependentOutputException")


def forget_compiled() -> None:
    """Lets the next configuration compile from scratch."""
    torch.compiler.reset()
    _private(f"{_INDUCTOR}.codecache.PyCodeCache.cache_clear")()
    newly_compiled()
    tuners.clear()


def newly_compiled() -> list[str]:
    """Returns the functions that were compiled since the last call."""
    metrics = _private("torch._dynamo.utils.get_compilation_metrics")()
    _private("torch._dynamo.utils.clear_compilation_metrics")()
    return [str(entry.co_name) for entry in metrics]


def let_random_pass(mode: type[TorchDispatchMode]) -> None:
    """Lets attention that is recomputed, with its random numbers, pass a mode of this class."""

    @_private("torch._prims.rng_prims.graphsafe_run_with_rng_state").py_impl(mode)
    def run(mode: Any, operation: Any, *args: Any, rng_state: Any = None, **kwargs: Any) -> Any:
        with mode:
            return operation(*args, **kwargs)
