"""What made a cell: the program's sources, its libraries, the files that it read."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from cli.provenance import program, version_of, versions
from data import FolderImages

ROOT = Path(__file__).parent.parent
# What a figure can depend on: all that a cell runs, and nothing that only shows what was measured.
SOURCES = (
    "*.py",
    "attack/**/*.py",
    "network/**/*.py",
    "cli/*.py",
    "client/*.py",
    "update/*.py",
    "judge/metrics.py",
    "judge/layers.py",
)
MEASURING = ("bench/measures.py", "bench/peers.py", "bench/guesses.py", "bench/batches.py", "samples/*.npz")
LEFT_OUT = ("benchmark.py", "train_victim.py", "cli/docs.py", "cli/console.py")
PEERS = ("breaching", "joblib")  # packages beside those of every run


def origin(files: Iterable[Path] = ()) -> dict[str, object]:
    """The commit for a person, and for the program what must agree: digests of sources and files, and versions.

    Sources rather than the commit decide, so that a working tree with changes is told from one without. Of a
    folder its images count, and their names.

    Raises:
        ValueError: a folder holds no images.
        OSError: a file cannot be read.
    """
    made = program()
    commit = (made["git_commit"] or "none") + ("+" if made["git_dirty"] else "")
    return {"commit": commit} | loaded() | {"files": {str(path): _digest(*_parts(path)) for path in files}}


def loaded() -> dict[str, object]:
    """The sources and versions that this process runs, whatever has become of the files since it imported them."""
    return dict(_LOADED)


def sources() -> list[Path]:
    """The files whose contents decide what a cell measures."""
    found = {path for pattern in (*SOURCES, *MEASURING) for path in ROOT.glob(pattern)}
    return sorted(found - {ROOT / name for name in LEFT_OUT})


def _parts(path: Path) -> tuple[list[Path], Path | None]:
    """The files that are read where this one is named, and the folder that they are named in."""
    return (FolderImages(path).files, path) if path.is_dir() else ([path], None)


def _digest(paths: Iterable[Path], folder: Path | None = None) -> str:
    """Of the contents, and of names within a folder; 12 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in paths:
        if folder:
            digest.update(f"{path.relative_to(folder)} {path.stat().st_size} ".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


# With the import, as the other modules of a process are: a cluster's worker keeps them when their files change.
_LOADED = {
    "sources": _digest(sources()),
    "versions": versions() | {name: version_of(name) for name in PEERS},
}
