"""Reading files that somebody else may have put there: regular files only, of a bounded size, and no deep nesting.

A pipe would be waited for without end, and a file of many gigabytes would take the machine's memory.
"""

import json
import stat
from pathlib import Path


def read_regular(path: Path, most: int | None = None) -> bytes:
    """The content of a regular file, or of the regular file that a link names.

    Args:
        most: bytes that the file may have; None: no bound.

    Raises:
        ValueError: the file is a pipe, a device or a folder, or is too large.
        OSError: the file is missing or cannot be read.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is not a regular file")
    if most is not None and status.st_size > most:
        raise ValueError(f"{path} has {status.st_size} bytes: too large")
    return path.read_bytes()


def read_json(path: Path, most: int | None = None) -> object:
    """The content of a JSON file, see `read_regular`.

    Raises:
        ValueError: as `read_regular`, or the content is not JSON, or nested too deeply to be read.
        OSError: as `read_regular`.
    """
    try:
        return json.loads(read_regular(path, most).decode("utf-8"))
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None
