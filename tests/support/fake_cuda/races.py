"""Finds accesses to memory that do not wait for each other, on the host and on streams."""

import weakref

from support.fake_cuda import collectives, python_api
from support.fake_cuda.operations import arguments_of, is_on_cuda, project_line
from support.fake_cuda.python_api import host
from support.fake_cuda.waits import is_non_blocking
from switchtitan.workbench.benchmark.counters import CountingMode, tensors_in

_COPIES = ("aten::copy_", "aten::_to_copy")
# Their results have no values yet, and they read none.
_ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


class _Accesses:
    """The accesses to one storage that a later access must wait for.

    Attributes:
        owner: the stream whose later allocations may reuse the memory at once.
        write: the last write: actor, number, operation.
        reads: since then, by actor: number, operation.
    """

    def __init__(self, owner):
        self.owner = owner
        self.write = None
        self.reads = {}

    def all(self):
        reads = [(actor, number, name) for actor, (number, name) in self.reads.items()]
        return reads if self.write is None else [self.write, *reads]


class FindRaces(CountingMode):
    """A context that finds races: two accesses to a storage, at least one a write, without order.

    A device operation runs in the current stream, after what the host did before; the host runs
    on. So the host must wait for an event before it uses the result of a copy. An asynchronous
    collective runs in a stream of its group; see `collectives`. Released memory counts as written
    by the next allocation in its owner's stream, to which torch's allocator may give it, unless
    `record_stream` has named the streams that use it. `found` describes them.
    """

    def __init__(self):
        super().__init__()
        self.found = []
        self._accesses = {}
        self._released = {}

    def count(self, func, args, kwargs, result):
        name = func.name().split(".")[0]
        if func.is_view or name.startswith("prim::") or name == "aten::is_pinned":
            return
        inputs, outputs = tensors_in((args, kwargs)), tensors_in(result)
        stream = python_api.current_stream().actor
        on_device = any(map(is_on_cuda, inputs + outputs))
        for tensor in outputs:
            self._know(tensor, stream)
        if name.partition("::")[2] in _ALLOCATIONS:
            return
        if name == collectives.WAIT:
            collectives.wait_for_result(inputs[0])
            return
        actor = host
        if on_device:
            actor = stream
            stream.wait_for(host.clock)
            communication = collectives.stream_of(func, args, kwargs)
            if communication is not None:
                actor = communication
                actor.wait_for(stream.clock)
        number = actor.advance()
        host_number = number if actor is host else host.advance()
        written = _written(func, args, kwargs, result)
        for tensor in inputs:
            if not any(tensor is other for other in written):
                # A host scalar is a kernel's argument, which the host reads at the launch.
                if on_device and _is_host_scalar(tensor):
                    self._read(tensor, host, host_number, name)
                else:
                    self._read(tensor, actor, number, name)
        for tensor in written:
            self._write(tensor, actor, number, name)
        if actor not in (host, stream):
            collectives.start(actor, inputs + outputs, result)
        devices = {tensor.device.type for tensor in inputs + outputs}
        if name in _COPIES and len(devices) > 1 and not is_non_blocking(args, kwargs):
            host.wait_for(stream.clock)

    def _know(self, tensor, stream):
        """The accesses to the tensor's storage; `stream` allocates it if it is new."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address not in self._accesses:
            is_cuda = is_on_cuda(tensor)
            self._accesses[address] = _Accesses(stream if is_cuda else host)
            weakref.finalize(storage, self._release, address, is_cuda)
            if is_cuda:
                stream.wait_for(host.clock)
                for access in self._released.pop(stream, ()):
                    self._check(stream, access, "an allocation reuses memory")
        return self._accesses[address]

    def _release(self, address, is_cuda):
        accesses = self._accesses.pop(address, None)
        recorded = python_api.recorded_streams.pop(address, [])
        # The allocator of page-locked memory waits for copies that use it.
        if accesses is None or not is_cuda:
            return
        recorded_actors = {stream.actor for stream in recorded}
        self._released.setdefault(accesses.owner, []).extend(
            access
            for access in accesses.all()
            if access[0] not in (accesses.owner, host) and access[0] not in recorded_actors
        )

    def _read(self, tensor, actor, number, name):
        accesses = self._know(tensor, actor)
        if accesses.write is not None:
            self._check(actor, accesses.write, f"{name} reads")
        accesses.reads[actor] = number, name

    def _write(self, tensor, actor, number, name):
        accesses = self._know(tensor, actor)
        for access in accesses.all():
            self._check(actor, access, f"{name} writes")
        accesses.write = actor, number, name
        accesses.reads.clear()

    def _check(self, actor, earlier, what):
        other, number, name = earlier
        if not actor.has_seen(other, number):
            self.found.append(
                f"{what} on {actor.name} at {project_line()} without waiting for {name} on "
                f"{other.name}"
            )


def _written(func, args, kwargs, result):
    """Results and arguments that the operation writes."""
    written = tensors_in(result)
    for argument, given in arguments_of(func, args, kwargs):
        # The schemas of c10d's collectives do not say which arguments they write.
        is_output = func.namespace == "c10d" and not argument.name.startswith("input")
        if is_output or (argument.alias_info is not None and argument.alias_info.is_write):
            written += tensors_in(given)
    return written


def _is_host_scalar(tensor):
    return tensor.device.type == "cpu" and tensor.ndim == 0
