"""The arrays of an .npz file: their headers are read first, and no array that does not fit is unpacked.

An .npz file is a zip archive with an array in each member. A few megabytes unpack to gigabytes, and a header may claim
terabytes: numpy would take the memory before it finds that the numbers are missing.
"""

import math
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy

from network.memory import check_room
from update.checked import DamagedError

ENDING = ".npy"
# errors of zipfile and numpy on a damaged archive; RuntimeError on an encrypted one, or an unknown compression
DAMAGED = (OSError, ValueError, EOFError, LookupError, RuntimeError, zipfile.BadZipFile, zlib.error)


def check_arrays(path: Path, wanted: Callable[[str], bool] = lambda name: True, most: int | None = None) -> list[str]:
    """The names of the wanted arrays, all of which can be unpacked.

    Args:
        path: the file.
        wanted: whether the array of a name is to be read; others are not looked at.
        most: bytes of all wanted arrays together; None: as many as fit into memory.

    Raises:
        DamagedError: the archive is damaged, or a header claims what is not there.
        ValueError: the arrays are too large.
    """
    sizes: dict[str, int] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                name = member.filename.removesuffix(ENDING)
                if member.filename.endswith(ENDING) and wanted(name):
                    sizes[name] = member.file_size
                    with archive.open(member) as file:
                        _check_header(file, name, member.file_size)
    except DAMAGED as error:
        raise DamagedError(f"{path} is damaged or not an .npz file: {error}") from None
    check_size(path, sum(sizes.values()), most)
    return list(sizes)


def read_arrays(
    path: Path, wanted: Callable[[str], bool] = lambda name: True, most: int | None = None
) -> dict[str, np.ndarray]:
    """The wanted arrays by name. Arguments and errors are those of `check_arrays`."""
    names = check_arrays(path, wanted, most)
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names}
    except DAMAGED as error:
        raise DamagedError(f"{path} is damaged or not an .npz file: {error}") from None


def check_size(path: Path, size: int, most: int | None) -> None:
    """Refuse a file that unpacks to more bytes than `most`, or than memory has.

    Raises:
        ValueError: it does.
    """
    if most is not None and size > most:
        raise ValueError(f"{path} unpacks to {size / 1e6:.1f} MB: tensors of this model take {most / 1e6:.1f} at most")
    check_room(size, str(path))


def _check_header(file: IO[bytes], name: str, size: int) -> None:
    """Raise ValueError unless the header of an array asks for exactly the bytes that its member has."""
    version = npy.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"{name!r} is an array of npy version {version[0]}.{version[1]}")
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read(file)
    if dtype.hasobject:
        raise ValueError(f"{name!r} holds objects: Object arrays cannot be loaded, numbers can")
    claimed = math.prod(shape) * dtype.itemsize
    if any(side < 0 for side in shape) or claimed != size - file.tell():
        raise ValueError(f"{name!r} claims {claimed} bytes, the file has {size - file.tell()} of it")
