"""The cells of a benchmark: one process measures a cell once, and the cell then lies in OUT/cells as JSON.

A finished cell is not run again, so an interrupted benchmark goes on where it stopped. A process that dies costs the
cells that it was at, which are started again. A failed cell is not finished. A cell of another version of the program
or of its libraries is not finished either: rows of two versions are not comparable. Of the processes that share OUT, on
one machine or many, the process that has a cell's lock runs the cell.
"""

import _thread
import hashlib
import json
import os
import site
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock, Thread

import torch
from filelock import FileLock, Timeout
from joblib import Parallel, delayed, parallel_config
from joblib.externals.loky.process_executor import TerminatedWorkerError
from tqdm import tqdm

from judge.locks import lock_in
from update.storage import replace_atomically

ATTEMPTS = 3  # starts, in all, of the cells of a local process that died; a Dask scheduler counts its own
WATCH = 0.5  # seconds between looks at whether a scheduler is still there
STALE = "worker runs another program: restart it"
FAILED = "failed: "  # the beginning of the status of a cell that could not be measured

# Held while a cell is measured. Output, another package's random draws and settings, and the number of threads belong
# to the whole process, and a cluster may give a worker several cells at a time.
ALONE = Lock()

Cell = dict[str, object]


def run_cells(
    measure: Callable[[Cell], Cell],
    cells: Sequence[Cell],
    flags: Sequence[str],
    *,
    out: Path,
    origin: Mapping[str, object] | None = None,
    loaded: Callable[[], Mapping[str, object]] = dict,
    figures: Collection[str] = (),
    jobs: int = 1,
    threads: int | None = None,
    scheduler: str | None = None,
) -> list[Cell]:
    """All cells with their measured figures, in their order; finished cells are read back, not run again.

    A cell whose measurement raises an exception has the exception in its `status`; other cells are not affected.

    Args:
        measure: maps a cell to its figures, in other processes where there are several.
        flags: further flags that all cells share, and a part of each cell's name.
        out: the folder that holds `cells`; with a scheduler all machines must see it.
        origin: what the figures depend on beside cell and flags, see `bench.origin`. Each cell keeps its origin, and a
            cell of another origin is measured again.
        loaded: returns the origin that the measuring process has loaded. Where it differs from `origin`, the cell has
            failed, and is kept with the process's own origin.
        figures: names of the measured figures: a file without one of these holds no finished cell.
        jobs: number of local processes.
        threads: of each process; None divides the machine's cores among local processes, and leaves a cluster's workers
            unchanged.
        scheduler: address of a Dask scheduler that runs the cells instead; not asked where none is left.

    Raises:
        ValueError: a scheduler is asked for and Dask is not installed, or local processes keep dying.
        OSError: the scheduler does not answer, or does not any more.
        KeyboardInterrupt: Ctrl-C; the cells that were being measured are not finished.
    """
    shared_out = max(1, (os.cpu_count() or 1) // jobs) if scheduler is None else None
    folder = Folder(out.resolve(), flags, frozenset(figures), dict(origin or {}))
    worker = Worker(folder, measure, loaded, threads or shared_out)
    over: set[str] = set()  # names of cells that are over in this call, be it with a failure

    def missing() -> list[Cell]:
        # the last first: batch sizes mostly ascend, and a long cell at the end would leave the other processes idle
        return [cell for cell in cells if folder.name(cell) not in over and not folder.is_finished(cell)][::-1]

    deaths, wait, count = 0, False, len(missing())
    with processes(jobs, scheduler if count else None), tqdm(total=count, unit="cell", dynamic_ncols=True) as bar:
        while left := missing():
            try:
                for name in Parallel(return_as="generator_unordered")(
                    delayed(worker.finish)(cell, wait) for cell in left
                ):
                    if name:
                        over.add(name)
                        bar.update()
                wait = True  # the cells that are left now are under way in another process
            except TerminatedWorkerError:
                if (deaths := deaths + 1) == ATTEMPTS:
                    raise ValueError(f"a process died {ATTEMPTS} times, out of memory say: try fewer --jobs") from None
    return [folder.row(cell) for cell in cells]


@dataclass(frozen=True, eq=False)  # hashed by identity, as a scheduler asks of what it runs
class Folder:
    """Cells on disk, one file each, and the locks of those that are under way.

    Attributes:
        out: the folder that holds `cells` and `.locks`.
        flags: that all cells share.
        figures: names that the file of a finished cell holds.
        made_by: the origin of the cells.
    """

    out: Path
    flags: Sequence[str]
    figures: frozenset[str]
    made_by: Mapping[str, object]

    def __post_init__(self) -> None:
        for name in ("cells", ".locks"):
            (self.out / name).mkdir(parents=True, exist_ok=True)

    def name(self, cell: Cell) -> str:
        """The name of a cell's files."""
        return cell_name(cell, self.flags)

    def file(self, cell: Cell) -> Path:
        """Where a cell's figures lie."""
        return self.out / "cells" / f"{self.name(cell)}.json"

    def lock(self, cell: Cell, *, wait: bool) -> FileLock:
        """The lock of the process that measures a cell."""
        return lock_in(self.out, self.name(cell), timeout=-1 if wait else 0)

    def is_finished(self, cell: Cell) -> bool:
        """Whether the file holds this very cell, measured by this very program."""
        row = _read(self.file(cell))
        whole = cell.items() <= row.items() and row.keys() >= self.figures and not has_failed(row)
        return whole and _deciding(row.get("made_by")) == _deciding(self.made_by)

    def write(self, cell: Cell, outcome: Mapping[str, object], made_by: Mapping[str, object]) -> None:
        """Keep what came of a cell."""
        row = json.dumps(cell | outcome | {"made_by": made_by})
        replace_atomically(self.file(cell), lambda temporary: temporary.write_text(row))

    def row(self, cell: Cell) -> Cell:
        """A cell with its figures."""
        row = json.loads(self.file(cell).read_text())
        return {name: value for name, value in row.items() if name != "made_by"}


@dataclass(frozen=True, eq=False)
class Worker:
    """Measures cells in the process that calls it, with so many threads."""

    folder: Folder
    measure: Callable[[Cell], Cell]
    loaded: Callable[[], Mapping[str, object]]
    threads: int | None

    def finish(self, cell: Cell, wait: bool) -> str | None:
        """Measure a cell, unless it is finished by now, and return its name.

        None: another process is at it, and this one did not wait.
        """
        try:
            with self.folder.lock(cell, wait=wait):
                if not self.folder.is_finished(cell):
                    own = self.loaded()
                    is_same = own.items() <= self.folder.made_by.items()
                    outcome = _outcome(self.measure, cell, self.threads) if is_same else {"status": FAILED + STALE}
                    self.folder.write(cell, outcome, {**self.folder.made_by, **own})
        except Timeout:
            return None
        return self.folder.name(cell)


def has_failed(row: Cell) -> bool:
    """Whether a cell could not be measured."""
    return str(row.get("status") or "").startswith(FAILED)


def _outcome(measure: Callable[[Cell], Cell], cell: Cell, threads: int | None) -> Cell:
    """The figures of a cell, measured alone in this process and on `threads` threads, or the reason of a failure."""
    with ALONE:
        if threads:
            torch.set_num_threads(threads)
        try:
            return measure(cell)
        except (Exception, SystemExit) as error:  # any error fails this cell only
            return {"status": FAILED + " ".join(f"{type(error).__name__}: {error}".split())[:300]}


def _read(file: Path) -> Cell:
    """The cell in the file; empty where the file is missing or holds no cell."""
    try:
        row = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return row if isinstance(row, dict) else {}


def _deciding(made_by: object) -> dict[str, object] | None:
    """The parts of an origin that must agree: all but the commit, which is for a person. None for no origin."""
    if not isinstance(made_by, Mapping):
        return None
    return {name: value for name, value in made_by.items() if name != "commit"}


@contextmanager
def processes(jobs: int, scheduler: str | None) -> Iterator[None]:
    """Let joblib run on `jobs` local processes, or on the Dask cluster whose scheduler has this address."""
    if scheduler is None:
        with parallel_config(n_jobs=jobs):
            yield
        return
    try:
        from distributed import Client
    except ImportError:
        raise ValueError("--scheduler needs Dask: pip install -r requirements-cluster.txt") from None
    with Client(scheduler) as client, _watched(client, scheduler), parallel_config(backend="dask"):
        home = str(Path(__file__).parent.parent)
        client.run_on_scheduler(site.addsitedir, home)  # the scheduler must be able to read tasks
        client.run(site.addsitedir, home)  # workers that join later need a PYTHONPATH
        yield


@contextmanager
def _watched(client: "Client", address: str) -> Iterator[None]:  # noqa: F821, Dask need not be installed
    """End the block where the scheduler has died: joblib would wait for its answers for ever.

    Raises:
        OSError: the scheduler does not answer any more, and Dask has given up to reach it.
    """
    is_lost, is_over = Event(), Event()

    def watch() -> None:
        while not is_over.wait(WATCH):
            if client.status in ("closing", "closed") and not is_over.is_set():
                is_lost.set()
                _thread.interrupt_main()
                return

    Thread(target=watch, daemon=True).start()
    try:
        yield
    except BaseException as error:  # joblib raises, or waits, as the cells' futures happen to stand
        is_lost_now = isinstance(error, Exception) and client.status != "running"
        if not (is_lost.is_set() or is_lost_now):
            raise
        raise OSError(f"{address} does not answer any more: start a scheduler, the same command goes on") from None
    finally:
        is_over.set()


def cell_name(cell: Cell, flags: Sequence[str]) -> str:
    """A file name for a cell and its further flags: a readable part, and a digest that makes it unique."""
    words = "_".join(str(value).strip("-") for value in cell.values())[:60]
    readable = "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in words).lstrip(".-")
    return f"{readable}_{hashlib.sha256(json.dumps([cell, list(flags)]).encode()).hexdigest()[:8]}"
