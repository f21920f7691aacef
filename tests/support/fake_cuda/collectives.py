"""The streams of collectives: what runs before an asynchronous collective, and who waits for it.

NCCL runs an asynchronous collective in a stream of its process group, after what the current stream
has done so far. `Work.wait`, or `wait_tensor` of a functional collective, makes the current stream
wait for it; the host runs on. Until then the work keeps its tensors. A synchronous collective is
work of the current stream.
(torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp)
"""

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FakeWork

from support.fake_cuda import python_api
from support.fake_cuda.operations import arguments_of
from support.fake_cuda.python_api import Actor
from switchtitan.workbench.benchmark.counters import group_of, tensors_in

WAIT = "_c10d_functional::wait_tensor"
_NAMESPACES = ("c10d", "_c10d_functional")

_streams = {}
"""By the name of the process group."""
_ends_of_works = {}
"""Work -> what has ended once it is waited for. Works are known by their Python objects."""
_ends_of_results = {}
"""Address of a functional collective's result -> the same."""
_tensors_of_works = {}
"""The tensors that a work keeps alive until it is waited for."""


def stream_of(func, args, kwargs):
    """Returns the stream of an asynchronous collective; None for any other operation."""
    if func.namespace not in _NAMESPACES or not _is_asynchronous(func, args, kwargs):
        return None
    name = group_of(args).group_name
    return _streams.setdefault(name, Actor(f"the stream of group {name}"))


def start(stream, tensors, result):
    """Lets others wait for the collective that `stream` has started last, on these tensors."""
    results = result if isinstance(result, (list, tuple)) else [result]
    works = [dist.Work.unbox(part) for part in results if isinstance(part, torch.ScriptObject)]
    for work in works:
        _ends_of_works[work] = dict(stream.clock)
        _tensors_of_works[work] = tensors
    if not works:
        for tensor in tensors_in(result):
            _ends_of_results[tensor.untyped_storage()._cdata] = dict(stream.clock)


def wait_for_result(tensor):
    """Makes the current stream wait for a functional collective. Later calls do nothing."""
    end = _ends_of_results.pop(tensor.untyped_storage()._cdata, {})
    python_api.current_stream().actor.wait_for(end)


def forget_streams():
    """Forgets all process groups and their works."""
    for known in (_streams, _ends_of_works, _ends_of_results, _tensors_of_works):
        known.clear()


def install():
    """Lets `Work.wait` of the fake process group be seen, for the rest of this process."""
    FakeWork.wait = FakeWork.synchronize = _wait_for_work


def _wait_for_work(work, timeout=None):
    python_api.current_stream().actor.wait_for(_ends_of_works.get(work, {}))
    _tensors_of_works.pop(work, None)
    return True


def _is_asynchronous(func, args, kwargs):
    if func.namespace == "_c10d_functional":
        return True
    return all(
        given for argument, given in arguments_of(func, args, kwargs) if argument.name == "async_op"
    )
