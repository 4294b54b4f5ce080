"""The run directory: which files a run writes, which process may write there, and how no file is ever lost."""

import csv
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from judge import replacing
from judge.locks import lock_in
from judge.replacing import DEFENDED, FILES, is_folder, is_run
from update.checked import DamagedError
from update.storage import replace_atomically

__all__ = ["DEFENDED", "FILES", "TRACE", "RunDirectory", "Trace", "recover"]

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

    A new run is staged, and takes the directory as a whole in `begin`: a process that dies before `begin` has changed
    nothing, and the next run finishes what a process that died in `begin` has left. A file that cannot be written later
    is noted in `failures`, and only that file is missing. No link inside the directory is followed in writing.

    Args:
        path: the directory.
        resume: the directory must hold a checkpoint, and its run is continued.
        overwrite: an earlier run in the directory is replaced.

    Raises:
        ValueError: the directory exists without `resume` or `overwrite`, is no run directory, is held by another
            process, or cannot be written, or a folder is in the place of a file of the run.
    """

    def __init__(self, path: Path, *, resume: bool = False, overwrite: bool = False) -> None:
        self.path, self.overwrite, self.failures = path, overwrite, []
        self._lock = _lock(path)
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future | None = None
        try:
            _recover(path)
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

    def begin(self, config: Mapping, checkpoint: Mapping, *, count: int = 0) -> None:
        """Let a new run take the directory, with its settings and a first checkpoint.

        Args:
            count: the number of images whose pictures the run will write.

        Raises:
            ValueError: the directory cannot be written, or is not as it was when the run was prepared.
        """
        try:
            _check_unchanged(self.path, count, overwrite=self.overwrite)
            with replacing.staged(_real(self.path)) as folder:
                (folder / "config.json").write_text(_json(config), encoding="utf-8")
                try:
                    torch.save(dict(checkpoint), folder / "checkpoint.pt")
                except (OSError, RuntimeError) as error:  # torch raises the latter on a full disk
                    if self.path.exists():  # the old run is worth more than a run that cannot be kept
                        raise
                    (folder / "checkpoint.pt").unlink(missing_ok=True)
                    self.fail("checkpoint.pt", error)
        except (OSError, RuntimeError) as error:
            raise _not_written(self.path, error) from None

    def close(self) -> None:
        """Wait for the checkpoint that is being written, and release the directory."""
        self._wait()
        self._writer.shutdown()
        self._lock.release()

    def without_links(self, names: str) -> None:
        """Unlink every link on the way from the directory to `names`.

        Raises:
            OSError: the directory cannot be written.
        """
        replacing.without_links(self.path, names)

    def write(self, name: str, write: Callable[[Path], None]) -> None:
        """Replace the file `name` by the one that `write` makes at a temporary path; a failure is told once."""
        try:
            folder = replacing.own_folder(self.path, str(Path(name).parent))
            replace_atomically(folder / Path(name).name, write)
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
        run.write("trace.csv", self._start)  # a new file: the old one may have a second name, in a backup
        if "trace.csv" not in run.failures:
            try:
                self._file = (run / "trace.csv").open("a", newline="", encoding="utf-8")
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

    def _start(self, temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, TRACE)
            writer.writeheader()
            writer.writerows(self.rows)

    def _write(self, rows: Sequence[Mapping[str, str]]) -> None:
        if self._file:
            try:
                csv.DictWriter(self._file, TRACE).writerows(rows)
                self._file.flush()
            except OSError as error:
                self._fail(error)

    def _fail(self, error: OSError) -> None:
        self._run.fail("trace.csv", error)
        if self._file:
            with suppress(OSError):
                self._file.close()
        self._file = None


def recover(path: Path) -> None:
    """Finish or undo what a process that died in `RunDirectory.begin` has left, before the directory is looked at.

    Raises:
        ValueError: another run is writing there, or the directory cannot be written.
    """
    try:
        if not replacing.is_interrupted(_real(path)):
            return
    except OSError:
        return
    lock = _lock(path)
    try:
        _recover(path)
    finally:
        lock.release()


def _recover(path: Path) -> None:
    try:
        replacing.recover(_real(path))
    except OSError as error:
        raise _not_written(path, error) from None


def _real(path: Path) -> Path:
    """The path without links: a directory has one lock, whatever its names."""
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:  # links in a circle
        raise _not_written(path, error) from None


def _not_written(path: Path, error: Exception) -> ValueError:
    return ValueError(f"cannot write the run directory {path}: {getattr(error, 'strerror', None) or error}")


def _lock(path: Path) -> FileLock:
    """The acquired lock of a run directory."""
    try:
        real = _real(path)
        lock = lock_in(real.parent, real.name, timeout=0)
        lock.acquire()
    except Timeout:
        raise ValueError(f"{path}: another run is writing there; give another --run_name, or wait for it") from None
    except (OSError, NotImplementedError) as error:  # filelock raises the latter where a file system has no locks
        raise _not_written(path, error) from None
    return lock


def _check(path: Path, *, resume: bool, overwrite: bool) -> None:
    if resume and not (path / "checkpoint.pt").is_file():
        raise ValueError(f"{path} has no checkpoint.pt to resume from")
    above = path if path.exists() else path.parent
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"cannot write the run directory {path}: {above} may not be written")
    if resume or not os.path.lexists(path) or (is_folder(path) and not any(path.iterdir())):
        _check_free(path)
        return
    if not overwrite:
        raise ValueError(f"{path} exists: give another --run_name, or --resume or --overwrite")
    if path.is_symlink():
        raise ValueError(f"{path} is a symbolic link: it will not be overwritten, name the directory itself")
    if not is_run(path):
        raise ValueError(f"{path} is not a run directory (no config.json of a run): it will not be overwritten")
    _check_free(path)


def _check_unchanged(path: Path, count: int, *, overwrite: bool) -> None:
    """A new run may take the directory, which somebody may have filled while the run was prepared."""
    is_taken = any(os.path.lexists(path / name) for name in FILES) and not (overwrite and is_run(path))
    if is_taken or path.is_symlink():
        raise ValueError(f"{path} exists by now: give another --run_name")
    _check_free(path, count)


def _check_free(path: Path, count: int = 0) -> None:
    if reason := replacing.obstacle(_real(path), count):
        raise ValueError(f"cannot write the run directory {path}: {reason}")


def _read_trace(path: Path) -> list[dict[str, str]]:
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a regular file")
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
