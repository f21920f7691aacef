"""Operations for which the host would wait if their tensors were on a GPU."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_READS_BACK = {
    # `item()`, `float()` and `bool()` call this.
    torch.ops.aten._local_scalar_dense,
    torch.ops.aten.is_nonzero,
    torch.ops.aten.equal,
    # The lengths of their results depend on values.
    torch.ops.aten.nonzero,
    torch.ops.aten.masked_select,
    torch.ops.aten._unique2,
}


class RecordReadsBack(TorchDispatchMode):
    """Records such operations; not `tolist`, `numpy` and `cpu`, which are none on a CPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in _READS_BACK or _picks_by_mask(func, args):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def _picks_by_mask(func, args):
    return func.overloadpacket is torch.ops.aten.index and any(
        index is not None and index.dtype == torch.bool for index in args[1]
    )
