"""How much memory is free, and a refusal of what would not fit, before any of it is taken.

A process that takes more memory than there is gets no error on most systems: it is killed, or everything else stalls.
"""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

CGROUPS = (  # limit of a container, and what is taken of it
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
MEMINFO = Path("/proc/meminfo")
CPU = torch.device("cpu")


class TooLargeError(ValueError):
    """More memory would be needed than is free; the message says for what, and how much."""


def check_room(need: int, what: str, device: torch.device = CPU) -> None:
    """Refuse what needs more bytes than are free on a device; where nothing tells how many are, nothing is refused.

    Args:
        need: bytes, at least.
        what: the subject of the message.

    Raises:
        TooLargeError: it does not fit.
    """
    free = free_bytes(device)
    if free is not None and need > free:
        raise TooLargeError(f"{what} needs at least {_shown(need)} of memory: {_shown(free)} are free")


def free_bytes(device: torch.device = CPU) -> int | None:
    """The bytes that are free for this process on a device; None where nothing tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(_free_of_machine(), default=None)


def _free_of_machine() -> Iterator[int]:
    """The free bytes by each account that there is: of the machine, of the container, of the process."""
    with suppress(OSError, ValueError, LookupError):
        lines = dict(line.split(":") for line in MEMINFO.read_text().splitlines())
        yield 1024 * int(lines["MemAvailable"].split()[0])
    for limit, taken in CGROUPS:
        with suppress(OSError, ValueError):  # the limit may be the word "max"
            yield max(0, int(Path(limit).read_text()) - int(Path(taken).read_text()))
    with suppress(ImportError, OSError, ValueError, IndexError):
        import resource

        most = resource.getrlimit(resource.RLIMIT_AS)[0]
        if most != resource.RLIM_INFINITY:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            yield max(0, most - pages * resource.getpagesize())


def _shown(size: int) -> str:
    unit, name = (1e9, "GB") if size >= 1e8 else (1e6, "MB")
    return f"{size / unit:.1f} {name}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory has run out, on the CPU or a GPU."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
