"""Measure an audit of many updates on a Dask cluster that loses a worker midway: the rows of results/data/scale.csv.

    python -m bench.scale --updates 200 --workers 2
    python -m bench.docs

The updates are those of a LeNet on one or two images of 16 pixels, so that an audit takes about a second. Once half of
them are audited, a worker is killed; its nanny starts another. A row is kept only where every update has one row of its
own in the audit's table. `bench.docs` puts the rows into docs/cluster.md.
"""

import csv
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from bench.remeasure import ROOT, device_of, one_by_one, row_parser
from bench.results_page import Row, read_rows, write_rows
from cli.flags import number
from cli.runtime import stream
from client.victim import share_update
from judge.gallery import PAGE
from network.zoo import build_model

TABLE = "scale"
MODEL, SIDE, CLASSES = "lenet", 16, 10
STARTED = 60.0  # seconds that a cluster may take to start, and to end
WATCH = 0.1  # seconds between looks at what has been audited
KIB = 2**10


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Exit status: 0 done, 1 an update has no row or several, 2 wrong input."""
    parser = row_parser("bench.scale", __doc__)
    parser.add_argument("--updates", type=number(int, 2), default=200, metavar="N", help="how many; default 200")
    parser.add_argument("--workers", type=number(int, 2), default=2, metavar="N", help="how many; default 2")
    asked = parser.parse_args(argv)

    def measured(size: tuple[int, int], origin: Row) -> None:
        command = "python -m bench.scale --updates {} --workers {}".format(*size)
        with tempfile.TemporaryDirectory() as folder:
            row = measure(Path(folder), *size) | {"command": command}
        keep(asked.folder, row | origin | {"device": asked.machine or device_of(command)})
        print(", ".join(f"{name} {value}" for name, value in row.items()))

    return one_by_one("bench.scale", [(asked.updates, asked.workers)], measured)


def keep(folder: Path, row: Row) -> None:
    """Put a row into the table, in the place of one of as many updates and workers."""
    try:
        held = {(each["updates"], each["workers"]): each for each in read_rows(folder, TABLE)}
    except OSError:
        held = {}
    held[row["updates"], row["workers"]] = row
    write_rows(folder, TABLE, list(held.values()))


def measure(folder: Path, updates: int, workers: int) -> Row:
    """The figures of an audit in an empty folder, as text.

    Raises:
        ValueError: the cluster did not start, the audit failed, or an update has no row or several.
    """
    inbox, out = folder / "inbox", folder / "out"
    fill(inbox, updates)
    with cluster(folder, workers) as (address, on_workers):
        audit = [sys.executable, str(ROOT / "benchmark.py"), "audit", "--updates", str(inbox / "*.npz")]
        audit += ["--out", str(out), "--scheduler", address, "--threads", "1"]
        began = time.monotonic()
        process = subprocess.Popen(audit, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        killed_after = lose_a_worker(process, out / "cells", updates // 2, on_workers)
        _, said = process.communicate()
        seconds = time.monotonic() - began
        own = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss  # no other child has ended
        theirs = max(on_workers(_peak).values())
        check(inbox, out / "table.csv", process.returncode, said)
        began = time.monotonic()
        subprocess.run(audit, capture_output=True, check=True)
        again = time.monotonic() - began
    files = sum(file.stat().st_size for file in (out / "runs").rglob("*") if file.is_file())
    return {
        "updates": str(updates),
        "workers": str(workers),
        "killed_after": str(killed_after),
        "audit_seconds": f"{seconds:.0f}",
        "again_seconds": f"{again:.1f}",
        "program_mib": f"{own / KIB:.0f}",
        "worker_mib": f"{theirs / KIB:.0f}",
        "gallery_kib": f"{(out / 'runs' / PAGE).stat().st_size / KIB:.0f}",
        "runs_mib": f"{files / KIB**2:.0f}",
        "seconds": f"{seconds + again:.0f}",
    }


def fill(inbox: Path, updates: int) -> None:
    """Write so many updates into a new folder: update0.npz, ..."""
    inbox.mkdir()
    model = build_model(MODEL, image_shape=(3, SIDE, SIDE), num_classes=CLASSES, generator=stream(0, "model"))
    for index in range(updates):
        draw = stream(index, "images")
        images = torch.rand(1 + index % 2, 3, SIDE, SIDE, generator=draw)
        labels = torch.randperm(CLASSES, generator=draw)[: len(images)]
        share_update(model, MODEL, images, labels, CLASSES).save(inbox / f"update{index}.npz")


@contextmanager
def cluster(folder: Path, workers: int) -> Iterator[tuple[str, Callable[[Callable[[], int]], dict[str, int]]]]:
    """A scheduler and workers with nannies: its address, and what calls a function on every worker.

    Raises:
        ValueError: it did not start.
    """
    file, python = folder / "scheduler.json", [sys.executable, "-m"]
    words = ["distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard"]
    quiet = {"cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    processes = [subprocess.Popen([*python, *words, "--scheduler-file", str(file)], **quiet)]
    try:
        from distributed import Client

        _wait(lambda: file.exists() and file.read_text().endswith("}"))
        address = json.loads(file.read_text())["address"]
        words = ["distributed.cli.dask_worker", address, "--nworkers", str(workers), "--nthreads", "1"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        processes.append(subprocess.Popen([*python, *words, "--no-dashboard"], env=environment, **quiet))
        with Client(address) as client:
            client.wait_for_workers(workers, timeout=STARTED)
            yield address, client.run
    except ImportError:
        raise ValueError("Dask is not installed: pip install -r requirements-cluster.txt") from None
    except TimeoutError:
        raise ValueError(f"the workers did not start within {STARTED:g} s") from None
    finally:
        for process in reversed(processes):
            process.terminate()  # nannies must have time to end their workers
            process.wait(STARTED)


def lose_a_worker(
    audit: subprocess.Popen, cells: Path, after: int, on_workers: Callable[[Callable[[], int]], dict[str, int]]
) -> int:
    """Kill a worker once so many cells lie in the folder, or the audit has ended; returns their number."""
    while audit.poll() is None and len(list(cells.glob("*.json"))) < after:
        time.sleep(WATCH)
    os.kill(next(iter(on_workers(os.getpid).values())), signal.SIGKILL)
    return len(list(cells.glob("*.json")))


def check(inbox: Path, table: Path, status: int, said: str) -> None:
    """Refuse an audit that left an update out, or has it twice, or failed on one.

    Raises:
        ValueError: it did.
    """
    if status or not table.is_file():
        raise ValueError(f"the audit failed: {(said.splitlines() or [f'exit status {status}'])[-1]}")
    with table.open(newline="") as file:
        rows = sorted(row["update"] for row in csv.DictReader(file))
    if rows != (names := sorted(path.name for path in inbox.iterdir())):
        raise ValueError(f"{len(rows)} rows of {len(set(rows))} updates, and there were {len(names)}")


def _peak() -> int:
    """KiB that the calling process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _wait(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + STARTED
    while not condition():
        if time.monotonic() > until:
            raise ValueError(f"the scheduler did not start within {STARTED:g} s")
        time.sleep(WATCH)


if __name__ == "__main__":
    sys.exit(main())
