"""How a new run takes its directory, at once or not at all, and what of an earlier run is removed.

A new run is staged in a folder whose name nobody guesses. Where there is no directory yet, the staging folder lies
beside its place and is renamed to it. Where there is one, the staging folder lies inside, and the user's files never
move:

1. the new run's files are written to the staging folder,
2. the staging folder is renamed, from when on it is ready: the new run will take the directory,
3. the files of the earlier run are removed, and the new files renamed over config.json and checkpoint.pt.

A process that dies before the second step has changed nothing. After one that dies later, `recover` repeats the third
step. No link in a run directory is ever followed: a link in the place of one of the run's own names is unlinked.
"""

import hashlib
import os
import re
import secrets
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from judge.reading import read_json, read_regular
from update.defences import AMOUNTS
from update.storage import TEMPORARY

DEFENDED = "defences"  # the folder in a run directory that holds its runs under defences
# All files that a run writes; --overwrite removes these files and no others. The star stands for a number.
FILES = (
    "config.json", "metrics.json", "trace.csv", "checkpoint.pt", "original.png", "reconstruction.png", "comparison.png",
    "history.gif", "curves.png", "audit.json", "report.html",
    "layers.csv", "images/rec_*.png", "truth/true_*.png", f"{DEFENDED}/index.html",
)  # fmt: skip
STAGED = ("config.json", "checkpoint.pt")  # the files with which a new run takes its directory
PICTURES = ("images", "truth")  # the folders of numbered pictures
OWN_KEYS = {"sel_mode", "tv_weight", "versions"}  # a config.json with these keys is of this program
GENERATOR = "MAGIA"
MARK = f'<meta name="generator" content="{GENERATOR}">'  # in every page of this program
MOST = 1 << 26  # bytes of a config.json or a page that is looked into: more than millions of steps need

_NUMBER = r"(?:[0-9]{3}|[1-9][0-9]{3,})"  # as {:03d} writes it
_OWN = re.compile("|".join(re.escape(name).replace(r"\*", _NUMBER) for name in FILES))
_STAGING = re.compile(r"\.magia-[0-9a-f]{16}-[0-9a-f]{32}(?:\.ready)?")
_READY = ".ready"


def is_run(path: Path) -> bool:
    """Whether a run wrote the config.json in this directory."""
    try:
        config = read_json(path / "config.json", MOST)
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.keys() >= OWN_KEYS


def is_own_picture(name: object) -> bool:
    """Whether this is the name of a numbered picture of a run, from the run directory on."""
    return isinstance(name, str) and name.startswith(PICTURES) and _OWN.fullmatch(name) is not None


def is_page(path: Path) -> bool:
    """Whether this is a page that this program has made."""
    try:
        return MARK.encode() in read_regular(path, MOST)
    except (OSError, ValueError):
        return False


def is_folder(path: Path) -> bool:
    """Whether this is a folder itself, and no link to one."""
    return path.is_dir() and not path.is_symlink()


def without_links(path: Path, names: str) -> Path:
    """The place `names` below the run directory `path`, after every link on the way was unlinked."""
    place = path
    for name in Path(names).parts:
        place = place / name
        if place.is_symlink():
            place.unlink()
    return place


def own_folder(path: Path, names: str) -> Path:
    """The folder `names` below the run directory `path`, made if need be, and no link.

    Raises:
        OSError: a file is in the way, or the run directory cannot be written.
    """
    folder = without_links(path, names)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def obstacle(path: Path, count: int = 0) -> str:
    """The reason why a run of `count` images cannot write in the directory `path`; empty where it can."""
    for folder in (path / name for name in PICTURES):
        if os.path.lexists(folder) and not folder.is_dir() and not folder.is_symlink():
            return f"{folder} is a file, where a run keeps a folder: move it away"
    numbers = [f"{number:03d}" for number in range(count)]
    for name in FILES:
        for file in (path / name.replace("*", number) for number in (numbers if "*" in name else [""])):
            if is_folder(file.parent) and is_folder(file):
                return f"{file} is a folder, where a run writes a file: move it away"
    inside = [path / name for name in (*PICTURES, DEFENDED)]
    for folder in (path, *inside, *_defended(path)):
        if is_folder(folder) and not os.access(folder, os.W_OK | os.X_OK):
            return f"{folder} may not be written: permission denied"
    return ""


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A folder for the files STAGED of a new run, which takes the directory `path` where the block ends well.

    Raises:
        OSError: the directory cannot be written; after the files were written the run is taken over by `recover`.
    """
    is_new = not path.is_dir()
    folder = (path.parent if is_new else path) / f".magia-{_digest(path)}-{secrets.token_hex(16)}"
    try:
        folder.mkdir()
        yield folder
        if is_new:
            (folder / "images").mkdir()
        folder = folder.rename(path if is_new else folder.with_name(folder.name + _READY))
    except BaseException:
        _discard(folder)
        raise
    if not is_new:
        _take(folder, path)


def is_interrupted(path: Path) -> bool:
    """Whether a process died while a run took the directory `path`."""
    return any(True for _ in _leftovers(path))


def recover(path: Path) -> None:
    """Finish what a process that died has begun, or undo it; the caller holds the lock of the directory `path`.

    Raises:
        OSError: the directory cannot be written.
    """
    for folder in sorted(_leftovers(path)):
        if folder.name.endswith(_READY):
            _take(folder, path)
        else:
            _discard(folder)
    for file in _own_files(path):
        if TEMPORARY.fullmatch(file.name):
            file.unlink()


def _digest(path: Path) -> str:
    """A name for the run directory of a fixed length, so that no name becomes too long."""
    return hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]


def _leftovers(path: Path) -> Iterator[Path]:
    """The staging folders of processes that died: inside the run directory, and beside it those of its name."""
    for folder, start in ((path, ".magia-"), (path.parent, f".magia-{_digest(path)}-")):
        for name in os.listdir(folder) if is_folder(folder) else ():
            if name.startswith(start) and _STAGING.fullmatch(name) and is_folder(folder / name):
                yield folder / name


def _take(ready: Path, path: Path) -> None:
    """Put the new run's files in the place of those of the earlier run."""
    _remove_run(path, keep=STAGED)
    own_folder(path, "images")
    for name in STAGED:
        if (ready / name).is_file():
            os.replace(ready / name, path / name)
    _discard(ready)


def _discard(folder: Path) -> None:
    """Remove a staging folder, as far as a run has written it."""
    with suppress(OSError):
        _remove_run(folder)
        folder.rmdir()


def _remove_run(path: Path, keep: Collection[str] = ()) -> None:
    """Remove the files that a run writes, its runs under defences, and the folders inside that this leaves empty."""
    for folder in (path / name for name in (*PICTURES, DEFENDED)):
        if folder.is_symlink():
            folder.unlink()
    for file in list(_own_files(path)):
        if file.name not in keep:
            file.unlink()
    for folder in list(_defended(path)):
        for leftover in list(_leftovers(folder)):
            _discard(leftover)
        _remove_run(folder)
        with suppress(OSError):
            folder.rmdir()
    for folder in (path / name for name in (*PICTURES, DEFENDED)):
        with suppress(OSError):
            folder.rmdir()


def _own_files(path: Path) -> Iterator[Path]:
    """The files and links in a run directory that have a name of the program's; of the runs under defences the links.

    A page that another program has made is none of them.
    """
    for folder in ("", *PICTURES, DEFENDED):
        for file in (path / folder).iterdir() if is_folder(path / folder) else ():
            name = f"{folder}/{file.name}" if folder else file.name
            if folder == DEFENDED:
                is_defence = re.split("[_+]", file.name)[0] in AMOUNTS
                is_own = is_defence if file.is_symlink() else _OWN.fullmatch(name) and is_page(file)
            else:
                is_own = _OWN.fullmatch(name) and not is_folder(file)
            if is_own or (TEMPORARY.fullmatch(file.name) and not is_folder(file)):
                yield file


def _defended(path: Path) -> Iterator[Path]:
    """The runs under defences in a run directory."""
    folder = path / DEFENDED
    for run in folder.iterdir() if is_folder(folder) else ():
        if is_folder(run) and is_run(run):
            yield run
