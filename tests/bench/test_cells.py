import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT
from distributed import Client

import benchmark
from bench.cells import cell_name, run_cells

CELLS = [{"number": number} for number in range(6)]


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory):
    """The address of a scheduler with two workers, started as the README does; workers that die are started anew."""
    folder = tmp_path_factory.mktemp("cluster")
    file, python = folder / "scheduler.json", [sys.executable, "-m"]
    words = ["distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard"]
    processes = [subprocess.Popen([*python, *words, "--scheduler-file", file], cwd=folder)]
    try:
        wait_for(file.exists)
        address = json.loads(file.read_text())["address"]
        words = ["distributed.cli.dask_worker", address, "--nworkers", "2", "--nthreads", "1", "--no-dashboard"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        processes.append(subprocess.Popen([*python, *words], cwd=folder, env=environment))
        with Client(address) as client:
            client.wait_for_workers(2, timeout=60)
        yield address
    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait(30)


def logged(log, seconds=0.0):
    """A measurement that notes in `log` that it has begun, and takes so long."""

    def measure(cell):
        with log.open("a") as file:
            file.write(f"{cell['number']}\n")
        time.sleep(seconds)
        return {"square": cell["number"] ** 2}

    return measure


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_cells_are_measured_once_and_read_back_in_order(tmp_path):
    rows = run_cells(logged(tmp_path / "log"), CELLS, [], out=tmp_path)
    assert rows == [{"number": n, "square": n * n} for n in range(6)]
    (tmp_path / "cells" / f"{cell_name(CELLS[2], [])}.json").unlink()
    assert run_cells(logged(tmp_path / "log"), CELLS, [], out=tmp_path) == rows
    assert (tmp_path / "log").read_text().split() == ["5", "4", "3", "2", "1", "0", "2"]
    run_cells(logged(tmp_path / "log"), CELLS[:1], ["--seed", "1"], out=tmp_path)  # further flags: another cell
    assert len(list((tmp_path / "cells").iterdir())) == 7


def test_a_dask_worker_that_is_killed_costs_its_cell_only(tmp_path, scheduler):
    log, rows = tmp_path / "log", []

    def run():
        rows.extend(run_cells(logged(log, 0.5), CELLS, [], out=tmp_path, scheduler=scheduler))

    with Client(scheduler) as client:
        workers = list(client.run(os.getpid).values())
    thread = threading.Thread(target=run)
    thread.start()
    wait_for(lambda: log.exists() and len(log.read_text().split()) >= 3)  # the third has just begun
    os.kill(workers[0], signal.SIGKILL)
    thread.join(120)
    assert rows == [{"number": n, "square": n * n} for n in range(6)]
    assert len(list((tmp_path / "cells").iterdir())) == 6
    assert sorted(set(log.read_text().split())) == list("012345")
    assert 7 <= len(log.read_text().split()) <= 8  # the killed worker's cell twice, and one it may have been handed


def test_a_local_process_that_is_killed_costs_the_cells_under_way(tmp_path):
    log = tmp_path / "log"

    def measure(cell):
        row = logged(log, 0.1)(cell)
        if cell["number"] == 3 and log.read_text().split().count("3") == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return row

    assert len(run_cells(measure, CELLS, [], out=tmp_path, jobs=2)) == 6
    assert 7 <= len(log.read_text().split()) <= 8


def test_a_process_that_always_dies_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="died 3 times"):
        run_cells(lambda cell: os.kill(os.getpid(), signal.SIGKILL), CELLS[:2], [], out=tmp_path, jobs=2)


def test_a_cluster_measures_what_one_process_does(tmp_path, scheduler, capsys):
    words = ["signals", "--batch_sizes", "2,3", "--num_classes", "20", "--seeds", "0,1", "--image_size", "16"]
    assert benchmark.main([*words, "--out", str(tmp_path / "here")]) == 0
    assert benchmark.main([*words, "--out", str(tmp_path / "there"), "--scheduler", scheduler]) == 0
    here, there = ((tmp_path / name / "table.md").read_text().splitlines() for name in ("here", "there"))
    assert len(here) == 6
    assert [line.split("|")[:9] for line in here] == [line.split("|")[:9] for line in there]


def test_a_scheduler_that_does_not_answer_is_one_line(tmp_path, capsys, monkeypatch):
    import dask

    with dask.config.set({"distributed.comm.timeouts.connect": "1s"}):
        words = ["signals", "--batch_sizes", "2", "--out", str(tmp_path), "--scheduler", "tcp://127.0.0.1:1"]
        assert benchmark.main(words) == 2
    assert "tcp://127.0.0.1:1" in capsys.readouterr().err.splitlines()[-1]
