"""Locks between processes: empty files in a folder `.locks`, which stay; the lock of a dead process does not hold."""

import errno
from pathlib import Path

from filelock import FileLock

LOCKS = ".locks"


def lock_in(folder: Path, name: str, *, timeout: float) -> FileLock:
    """The lock of that name in the folder, not yet acquired.

    filelock empties the file that it opens. So a symbolic link in the lock's place is unlinked, as is a hard link to a
    file with content, and a file with content that has no other name is refused. An empty file may be held by a
    process, whatever its links, and is never unlinked.

    Args:
        timeout: seconds to wait for another process; 0: do not wait, -1: wait without end.

    Raises:
        OSError: the folder cannot be written, or the lock's file has content.
    """
    file = folder / LOCKS / name
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.is_symlink():
        file.unlink(missing_ok=True)
    elif file.is_file() and (status := file.stat()).st_size:
        if status.st_nlink == 1:
            raise FileExistsError(errno.EEXIST, f"{file} has content, so it is no lock: move it away")
        file.unlink(missing_ok=True)
    return FileLock(file, timeout=timeout)
