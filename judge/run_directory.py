"""The run directory: which files a run writes, which process may write there, and how no file is ever lost."""

import csv
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from update.checked import DamagedError
from update.storage import replace_atomically

DEFENDED = "defences"  # the folder in a run directory that holds its runs under defences
# All files that a run writes; --overwrite removes these files and no others.
FILES = (
    "config.json", "metrics.json", "trace.csv", "checkpoint.pt", "original.png", "reconstruction.png", "comparison.png",
    "history.gif", "curves.png", "audit.json", "report.html",
    "layers.csv", "images/rec_*.png", "truth/true_*.png", f"{DEFENDED}/index.html",
)  # fmt: skip
OWN_KEYS = {"sel_mode", "tv_weight", "versions"}  # a config.json with these keys is of this program
CHECKPOINT_KEYS = {
    "variables",
    "optimizer",
    "signals",
    "signals_seconds",
    "start",
    "inputs",
    "layers",
    "film",
    "sizes",
    "rows",
    "final_loss",
    "digests",
}
TRACE = ("step", "S", "loss", "loss_full", "loss_subset", "prior", "evaluations", "seconds", "psnr_mean")


class RunDirectory:
    """`save_dir/run_name`, held by one process at a time, until `close`.

    A new run is built beside the directory and takes the directory's place, whole, in `begin`: a process that dies
    before `begin` has changed nothing. A file that cannot be written later is noted in `failures`, and only that file
    is missing.

    Args:
        path: the directory.
        resume: the directory must hold a checkpoint, and its run is continued.
        overwrite: an earlier run in the directory is replaced.

    Raises:
        ValueError: the directory exists without `resume` or `overwrite`, is no run directory, is held by another
            process, or cannot be written.
    """

    def __init__(self, path: Path, *, resume: bool = False, overwrite: bool = False) -> None:
        self.path, self.overwrite, self.failures = path, overwrite, []
        self._staging, self._old = (path.with_name(f".{path.name}.{kind}") for kind in ("new", "old"))
        self._lock = _lock(path)
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future | None = None
        try:
            restore(path)
            _check(path, resume=resume, overwrite=overwrite)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def begin(self, config: Mapping, checkpoint: Mapping) -> None:
        """Let a new run take the directory, with its settings and a first checkpoint.

        Raises:
            ValueError: the directory cannot be written.
        """
        try:
            shutil.rmtree(self._staging, ignore_errors=True)
            (self._staging / "images").mkdir(parents=True)
            (self._staging / "config.json").write_text(_json(config), encoding="utf-8")
            replaced = self.path.exists()
            try:
                torch.save(dict(checkpoint), self._staging / "checkpoint.pt")
            except (OSError, RuntimeError) as error:  # torch raises the latter on a full disk
                if replaced:  # the old run is worth more than a run that cannot be kept
                    raise
                self.fail("checkpoint.pt", error)
            if replaced:
                self.path.rename(self._old)
            self._staging.rename(self.path)
            if replaced:
                _remove_run(self._old)
                _move_rest(self._old, self.path)
        except (OSError, RuntimeError) as error:
            shutil.rmtree(self._staging, ignore_errors=True)
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"cannot write the run directory {self.path}: {reason}") from None

    def close(self) -> None:
        """Wait for the checkpoint that is being written, and release the directory."""
        self._wait()
        self._writer.shutdown()
        self._lock.release()

    def write(self, name: str, write: Callable[[Path], None]) -> None:
        """Replace the file `name` by the one that `write` makes at a temporary path; a failure is told once."""
        try:
            (self / name).parent.mkdir(exist_ok=True)
            replace_atomically(self / name, write)
        except (OSError, RuntimeError, ValueError) as error:
            self.fail(name, error)

    def fail(self, name: str, error: Exception) -> None:
        """Note that the file `name` could not be written."""
        if name not in self.failures:
            self.failures.append(name)
            print(f"{self / name} could not be written: {' '.join(str(error).split())}", file=sys.stderr)

    def write_json(self, name: str, content: Mapping) -> None:
        """Write `content` as strict JSON; NaN and infinity are refused."""
        self.write(name, lambda temporary: temporary.write_text(_json(content), encoding="utf-8"))

    def write_checkpoint(self, state: Mapping) -> None:
        """Replace checkpoint.pt, in the background; a crash in the middle leaves the last checkpoint.

        The file holds all of L-BFGS's curvature pairs, by far most of its size: without the pairs a resumed run would
        take another way than a run that never stopped. The state is copied, so the run goes on during the writing.
        """
        copy = _copied(state)
        self._wait()
        save = lambda temporary: torch.save(copy, temporary)  # noqa: E731
        self._writing = self._writer.submit(self.write, "checkpoint.pt", save)

    def read_checkpoint(self) -> dict:
        """The content of checkpoint.pt: tensors and numbers only, nothing else is unpickled.

        Raises:
            ValueError: the file is damaged, or not of a run.
        """
        path = self / "checkpoint.pt"
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds on a damaged file
            raise ValueError(f"{path} is damaged: {' '.join(str(error).split())[:200]}") from None
        if not isinstance(checkpoint, dict) or not checkpoint.keys() >= CHECKPOINT_KEYS:
            raise ValueError(f"{path} is not the checkpoint of a run of this version")
        return checkpoint

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Name checkpoint.pt in the message where the block finds one of its entries damaged.

        Raises:
            ValueError: the checkpoint is damaged, or of a run with other settings.
        """
        try:
            yield
        except DamagedError as error:
            raise ValueError(f"{self / 'checkpoint.pt'} is damaged or of another run: {error}") from None

    def _wait(self) -> None:
        if self._writing:
            self._writing.result()
            self._writing = None


class Trace:
    """trace.csv, one row per logged step, flushed as it grows; a resumed run keeps the rows up to its checkpoint.

    Raises:
        ValueError: the file of the run to be resumed is not such a table.
    """

    def __init__(self, run: RunDirectory, *, keep: int = 0) -> None:
        self.rows: list[dict[str, str]] = _read_trace(run / "trace.csv")[:keep] if keep else []
        self._run, self._file = run, None
        try:
            self._file = (run / "trace.csv").open("w", newline="", encoding="utf-8")
            self._writer = csv.DictWriter(self._file, TRACE)
            self._writer.writeheader()
            self._write(self.rows)
        except OSError as error:
            self._fail(error)

    def append(self, row: Mapping[str, object]) -> None:
        """Write one row; None becomes an empty cell."""
        text = {name: "" if row[name] is None else str(row[name]) for name in TRACE}
        self.rows.append(text)
        self._write([text])

    def close(self) -> None:
        """Close the file; `rows` stays."""
        if self._file:
            try:
                self._file.close()
            except OSError as error:
                self._fail(error)

    def _write(self, rows: Sequence[Mapping[str, str]]) -> None:
        if self._file:
            try:
                self._writer.writerows(rows)
                self._file.flush()
            except OSError as error:
                self._fail(error)

    def _fail(self, error: OSError) -> None:
        self._run.fail("trace.csv", error)
        with suppress(OSError):
            self._file.close()
        self._file = None


def restore(path: Path) -> None:
    """Bring back a run whose process died between the two renames of `RunDirectory.begin`."""
    old = path.with_name(f".{path.name}.old")
    if old.is_dir() and not os.path.lexists(path):
        old.rename(path)


def _lock(path: Path) -> FileLock:
    """The lock of a run directory, an empty file that stays in `.locks`; the lock of a dead process does not hold."""
    folder = path.parent / ".locks"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / path.name, timeout=0)
        lock.acquire()
    except Timeout:
        raise ValueError(f"{path}: another run is writing there; give another --run_name, or wait for it") from None
    except OSError as error:
        raise ValueError(f"cannot write the run directory {path}: {error.strerror or error}") from None
    return lock


def _check(path: Path, *, resume: bool, overwrite: bool) -> None:
    if resume and not (path / "checkpoint.pt").is_file():
        raise ValueError(f"{path} has no checkpoint.pt to resume from")
    if path.exists() and not os.access(path, os.W_OK):
        raise ValueError(f"cannot write the run directory {path}: permission denied")
    if resume or not os.path.lexists(path) or (path.is_dir() and not path.is_symlink() and not any(path.iterdir())):
        return
    if not overwrite:
        raise ValueError(f"{path} exists: give another --run_name, or --resume or --overwrite")
    if path.is_symlink():
        raise ValueError(f"{path} is a symbolic link: it will not be overwritten, name the directory itself")
    if not is_run(path):
        raise ValueError(f"{path} is not a run directory (no config.json of a run): it will not be overwritten")


def is_run(path: Path) -> bool:
    """Whether a run wrote the config.json in this directory."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.keys() >= OWN_KEYS


def _remove_run(path: Path) -> None:
    """Remove the files that a run writes, its runs under defences, and the directories that this leaves empty."""
    for folder in path.glob(f"{DEFENDED}/*"):
        if is_run(folder):
            _remove_run(folder)
    for file in (file for name in FILES for file in path.glob(name)):
        file.unlink()
    for folder in (path / "images", path / "truth", path / DEFENDED, path):
        with suppress(OSError):
            folder.rmdir()


def _move_rest(old: Path, new: Path) -> None:
    """Move all other files of the old directory into the new one."""
    for entry in old.iterdir() if old.is_dir() else ():
        if entry.is_dir() and (new / entry.name).is_dir():
            _move_rest(entry, new / entry.name)
        else:
            entry.rename(new / entry.name)
    with suppress(OSError):
        old.rmdir()


def _read_trace(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if tuple(reader.fieldnames or ()) != TRACE:
        raise ValueError(f"{path} is not the trace of a run: its columns must be {', '.join(TRACE)}")
    for number, row in enumerate(rows, 1):
        try:
            _check_row(row)
        except (TypeError, ValueError):
            raise ValueError(f"{path}: row {number} is not one of numbers") from None
    return rows


def _check_row(row: Mapping[str, str]) -> None:
    """Raise TypeError or ValueError unless each cell is a number; `psnr_mean` is empty where no truth is known."""
    for name in TRACE:
        if name in ("step", "S", "evaluations"):
            int(row[name])
        elif row[name] != "" or name != "psnr_mean":
            float(row[name])


def _json(content: Mapping) -> str:
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def _copied(state: object) -> object:
    """The same tensors and numbers, none shared with the original."""
    if isinstance(state, Tensor):
        return state.detach().clone()
    if isinstance(state, Mapping):
        return {key: _copied(value) for key, value in state.items()}
    return [_copied(value) for value in state] if isinstance(state, list) else state
