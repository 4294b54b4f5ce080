"""The origin of a cell: the program's sources, its libraries, the files that it read."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from cli.provenance import program, version_of, versions
from data import FolderImages

ROOT = Path(__file__).parent.parent
# The sources that a figure can depend on: all that a cell runs, without those that only show figures.
SOURCES = (
    "*.py",
    "attack/**/*.py",
    "network/**/*.py",
    "cli/*.py",
    "client/*.py",
    "update/*.py",
    "judge/metrics.py",
    "judge/layers.py",
    "judge/verdict.py",
)
MEASURING = (
    "bench/measures.py",
    "bench/audits.py",
    "bench/peers.py",
    "bench/guesses.py",
    "bench/batches.py",
    "samples/*.npz",
)
LEFT_OUT = ("benchmark.py", "train_victim.py", "cli/docs.py", "cli/console.py")
PEERS = ("breaching", "joblib")  # packages of benchmarks, beside those of every run


def origin(files: Iterable[Path] = ()) -> dict[str, object]:
    """The commit, for a person, and the digests of sources and files and the versions, which must agree.

    Sources rather than the commit decide, so that a working tree with changes differs from one without. The digest of a
    folder is of its images and their names.

    Raises:
        ValueError: a folder holds no images.
        OSError: a file cannot be read.
    """
    made = program()
    commit = (made["git_commit"] or "none") + ("+" if made["git_dirty"] else "")
    return {"commit": commit} | loaded() | {"files": {str(path): _digest(*_parts(path)) for path in files}}


def loaded() -> dict[str, object]:
    """The sources and versions that this process has imported; the files may have changed since."""
    return dict(_LOADED)


def sources() -> list[Path]:
    """The files whose contents decide what a cell measures."""
    found = {path for pattern in (*SOURCES, *MEASURING) for path in ROOT.glob(pattern)}
    return sorted(found - {ROOT / name for name in LEFT_OUT})


def _parts(path: Path) -> tuple[list[Path], Path | None]:
    """The files behind a path, and the folder that holds them: all images of a folder, or the file itself."""
    return (FolderImages(path).files, path) if path.is_dir() else ([path], None)


def _digest(paths: Iterable[Path], folder: Path | None = None) -> str:
    """The digest of the contents, and of names within a folder; 12 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in paths:
        if folder:
            digest.update(f"{path.relative_to(folder)} {path.stat().st_size} ".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


# Read at import, like the other modules of a process: a cluster's worker keeps its modules when their files change.
_LOADED = {
    "sources": _digest(sources()),
    "versions": versions() | {name: version_of(name) for name in PEERS},
}
