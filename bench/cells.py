"""The cells of a benchmark: each is measured once, by some process somewhere, and then lies in OUT/cells as JSON.

A finished cell is not run again, so an interrupted benchmark goes on where it stopped, and a process that dies costs
the cells it was at: they are started anew. Delete a file to measure its cell anew.
"""

import hashlib
import json
import os
import site
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from joblib import Parallel, delayed, parallel_config
from joblib.externals.loky.process_executor import TerminatedWorkerError
from tqdm import tqdm

from update.storage import replace_atomically

ATTEMPTS = 3  # times that the cells of a local process that died are started, in all; a Dask scheduler counts its own

Cell = dict[str, object]


def run_cells(
    measure: Callable[[Cell], Cell],
    cells: Sequence[Cell],
    flags: Sequence[str],
    *,
    out: Path,
    jobs: int = 1,
    threads: int | None = None,
    scheduler: str | None = None,
) -> list[Cell]:
    """All cells with what was measured, in their order; those that are finished are read back, not run again.

    Args:
        measure: maps a cell to its figures. It runs in other processes where there are several.
        flags: further flags that all cells share; they are part of a cell's name.
        out: the folder that holds `cells`; with a scheduler all machines must see it.
        jobs: local processes.
        threads: of each process; None shares the machine's cores out among them, and leaves a cluster's workers as
            they were started.
        scheduler: address of a Dask scheduler that runs the cells instead.

    Raises:
        ValueError: a scheduler is asked for and Dask is not installed.
        OSError: it does not answer.
    """
    folder = out.resolve() / "cells"
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{cell_name(cell, flags)}.json" for cell in cells]
    if threads is None and scheduler is None:
        threads = max(1, (os.cpu_count() or 1) // jobs)

    def finish(cell: Cell, file: Path) -> None:
        if threads:
            torch.set_num_threads(threads)
        row = json.dumps(cell | measure(cell))
        replace_atomically(file, lambda temporary: temporary.write_text(row))

    def missing() -> list[tuple[Cell, Path]]:
        # the last first: batch sizes mostly ascend, and a long cell at the end would leave the other processes idle
        return [(cell, file) for cell, file in zip(cells, files, strict=True) if not file.is_file()][::-1]

    with processes(jobs, scheduler), tqdm(total=len(missing()), unit="cell", dynamic_ncols=True) as bar:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                for _ in Parallel(return_as="generator_unordered")(delayed(finish)(*one) for one in missing()):
                    bar.update()
                break
            except TerminatedWorkerError:
                if attempt == ATTEMPTS:
                    raise ValueError(f"a process died {ATTEMPTS} times, out of memory say: try fewer --jobs") from None
    return [json.loads(file.read_text()) for file in files]


@contextmanager
def processes(jobs: int, scheduler: str | None) -> Iterator[None]:
    """Let joblib run on so many local processes, or on the Dask cluster whose scheduler has this address."""
    if scheduler is None:
        with parallel_config(n_jobs=jobs):
            yield
        return
    try:
        from distributed import Client
    except ImportError:
        raise ValueError("--scheduler needs Dask: pip install -r requirements-cluster.txt") from None
    with Client(scheduler) as client, parallel_config(backend="dask"):
        home = str(Path(__file__).parent.parent)
        client.run_on_scheduler(site.addsitedir, home)  # it reads what it hands on, and waits for ever if it cannot
        client.run(site.addsitedir, home)  # workers that join later need a PYTHONPATH
        yield


def cell_name(cell: Cell, flags: Sequence[str]) -> str:
    """A file name of its own for each cell and set of further flags, readable as far as it goes."""
    readable = "_".join(str(value).strip("-").replace("/", "-") for value in cell.values())[:60]
    return f"{readable}_{hashlib.sha256(json.dumps([cell, list(flags)]).encode()).hexdigest()[:8]}"
