"""What in an evaluation would wait for a GPU, found out on the CPU."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
WAITING = (aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero, aten.lift_fresh, aten.lift_fresh_copy)
INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)


class Waits(TorchDispatchMode):
    """Notes what would wait for a GPU: numbers or sizes that the device is asked for, and numbers sent to it.

    Numbers in float64 are tables of an attack in float32, which stay on the CPU.
    """

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = func.overloadpacket
        asks = packet is aten._local_scalar_dense and args[0].dtype != torch.float64
        masks = packet in INDEXING and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if asks or masks or packet in WAITING:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def waits_of(work):
    """What a work waits for when it is done once more; tensors that name no device are on none."""
    work()
    with Waits() as waits, torch.device("meta"):
        work()
    return waits.found
