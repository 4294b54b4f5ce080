import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
from conftest import ROOT
from distributed import Client
from inbox import QUICKLY, inbox
from joblib.externals.loky.process_executor import TerminatedWorkerError

import benchmark
from bench import cells
from bench.cells import cell_name, has_failed, run_cells
from bench.origin import origin, sources

cluster = pytest.mark.xdist_group("cluster")  # one worker runs all its tests: it is started once
CELLS = [{"number": number} for number in range(6)]


@contextmanager
def cluster_in(folder, workers, *, threads=1, home=ROOT):
    """A scheduler with so many workers that run the program in `home`: its address and its process.

    Several workers have nannies, which start a worker that dies anew. A single worker is one process, and needs two
    threads: on a cluster of one thread joblib runs cells in the process that asks.
    """
    alone = ["--no-nanny"] * (workers == 1)
    file, python = folder / "scheduler.json", [sys.executable, "-m"]
    words = ["distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard"]
    processes = [subprocess.Popen([*python, *words, "--scheduler-file", file], cwd=folder)]
    try:
        wait_for(lambda: file.exists() and file.read_text().endswith("}"))  # it is there before all of it is written
        address = json.loads(file.read_text())["address"]
        words = ["distributed.cli.dask_worker", address, "--nworkers", str(workers), "--nthreads", str(threads), *alone]
        environment = os.environ | {"PYTHONPATH": str(home)}
        processes.append(subprocess.Popen([*python, *words, "--no-dashboard"], cwd=folder, env=environment))
        with Client(address) as client:
            client.wait_for_workers(workers, timeout=60)
        yield address, processes[0]
    finally:
        for process in reversed(processes):
            process.kill() if alone else process.terminate()  # nannies must have time to end their workers
            process.wait(30)


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory):
    """The address of a scheduler with two workers, started as the README does; workers that die are started anew."""
    with cluster_in(tmp_path_factory.mktemp("cluster"), 2) as (address, _):
        yield address


def logged(log, seconds=0.0):
    """A measurement that notes in `log` that it has begun, and takes so long."""

    def measure(cell):
        with log.open("a") as file:
            file.write(f"{cell['number']}\n")
        time.sleep(seconds)
        return {"square": cell["number"] ** 2}

    return measure


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_cells_are_measured_once_and_read_back_in_order(tmp_path):
    rows = run_cells(logged(tmp_path / "log"), CELLS, [], out=tmp_path)
    assert rows == [{"number": n, "square": n * n} for n in range(6)]
    nobody = "tcp://127.0.0.1:1"  # where nothing is left to be measured, nobody is asked
    assert run_cells(logged(tmp_path / "log"), CELLS, [], out=tmp_path, scheduler=nobody) == rows
    (tmp_path / "cells" / f"{cell_name(CELLS[2], [])}.json").unlink()
    assert run_cells(logged(tmp_path / "log"), CELLS, [], out=tmp_path) == rows
    assert (tmp_path / "log").read_text().split() == ["5", "4", "3", "2", "1", "0", "2"]
    run_cells(logged(tmp_path / "log"), CELLS[:1], ["--seed", "1"], out=tmp_path)  # further flags: another cell
    assert len(list((tmp_path / "cells").iterdir())) == 7


@cluster
def test_a_dask_worker_that_is_killed_costs_its_cell_only(tmp_path, scheduler):
    """MAGIA_CELLS=200 makes it two hundred. Who begins a cell twice has seen its first process die."""
    log, count = tmp_path / "log", int(os.environ.get("MAGIA_CELLS", "16"))
    numbered, rows = [{"number": number} for number in range(count)], []

    def measure(cell):
        with log.open("a") as file:
            file.write(f"{cell['number']} {os.getpid()}\n")
        time.sleep(0.2)
        return {"square": cell["number"] ** 2}

    with Client(scheduler) as client:
        client.wait_for_workers(2, timeout=60)
        dead = client.run(os.getpid).popitem()[1]
    thread = threading.Thread(
        target=lambda: rows.extend(run_cells(measure, numbered, [], out=tmp_path, scheduler=scheduler))
    )
    thread.start()
    wait_for(lambda: log.exists() and log.read_text().count(f" {dead}\n") >= count // 8)
    os.kill(dead, signal.SIGKILL)
    thread.join(60 + count)
    assert rows == [{"number": n, "square": n * n} for n in range(count)]
    assert len(list((tmp_path / "cells").iterdir())) == count
    begun = [line.split() for line in log.read_text().splitlines()]
    assert len({process for _, process in begun}) >= 2
    for number in map(str, range(count)):
        processes = [process for cell, process in begun if cell == number]
        assert len(processes) == 1 or (len(processes) == 2 and processes[0] == str(dead))
    assert len(begun) == count + 1  # it was at one cell, which it had just begun


@pytest.mark.long
@cluster
def test_a_worker_that_is_killed_costs_its_audit_only(tmp_path, scheduler):
    """MAGIA_CELLS=200 makes it two hundred updates."""
    count, folder, out = int(os.environ.get("MAGIA_CELLS", "12")), inbox(tmp_path / "inbox", 2), tmp_path / "out"
    for number in range(2, count):
        shutil.copy(folder / f"client{number % 2}.npz", folder / f"client{number}.npz")
    with Client(scheduler) as client:
        client.wait_for_workers(2, timeout=60)
        dead = client.run(os.getpid).popitem()[1]
    words = ["audit", "--updates", str(folder / "*.npz"), "--out", str(out), "--scheduler", scheduler, *QUICKLY]
    ended: list[int] = []
    thread = threading.Thread(target=lambda: ended.append(benchmark.main(words)))
    thread.start()
    wait_for(lambda: len(list((out / "cells").glob("*.json"))) >= count // 4, seconds=240)
    os.kill(dead, signal.SIGKILL)
    thread.join(240 + 2 * count)
    assert ended == [0]
    rows = read(out / "table.csv")
    assert sorted(row["update"] for row in rows) == sorted(path.name for path in folder.iterdir())
    assert {row["verdict"] for row in rows} <= {"read", "apart"}
    assert len(list((out / "runs").glob("*/report.html"))) == count
    assert (out / "runs" / "index.html").read_text().count("/report.html") >= count


@pytest.mark.long
@cluster
def test_a_cluster_measures_what_one_process_does(tmp_path, scheduler, capsys):
    """Workers run cells, attacks in them, in threads, where no signal handler can be set."""
    words = [
        "grid",
        "--presets",
        "magia,dlg",
        "--batch_sizes",
        "2",
        "--batches",
        "0,1",
        "--seeds",
        "0",
        "--threads",
        "1",
    ]
    words += ["--max_evals", "12", "--image_size", "16", "--inner_iter", "4", "--num_classes", "20"]
    assert benchmark.main([*words, "--out", str(tmp_path / "here")]) == 0
    assert benchmark.main([*words, "--out", str(tmp_path / "there"), "--scheduler", scheduler]) == 0
    here, there = (read(tmp_path / name / "table.csv") for name in ("here", "there"))
    assert len(here) == 4
    for one, other in zip(here, there, strict=True):
        assert not one["status"].startswith("failed")
        assert one | {"seconds": ""} == other | {"seconds": ""}


def test_two_processes_do_not_race_for_a_cell(tmp_path):
    """Both ask for the same cells: each is begun once, and both have all of them in the end."""
    log, rows = tmp_path / "log", [[], []]
    threads = [
        threading.Thread(target=lambda own=own: own.extend(run_cells(logged(log, 0.2), CELLS, [], out=tmp_path)))
        for own in rows
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert rows[0] == rows[1] == [{"number": n, "square": n * n} for n in range(6)]
    assert sorted(log.read_text().split()) == list("012345")


def test_a_process_measures_one_cell_at_a_time(tmp_path):
    """As the threads of a cluster's worker ask for; of two grids, so that no cell's lock keeps them apart."""
    under_way, most = [], []

    def measure(cell):
        under_way.append(cell)
        most.append(len(under_way))
        time.sleep(0.05)
        under_way.pop()
        return {}

    threads = [
        threading.Thread(target=lambda own=own: run_cells(measure, CELLS[:3], [], out=tmp_path / own)) for own in "ab"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert most == [1] * 6


def test_a_cell_that_fails_costs_itself_only_and_is_tried_again(tmp_path):
    def measure(cell):
        row = logged(tmp_path / "log")(cell)
        if cell["number"] == 3 and (tmp_path / "log").read_text().split().count("3") == 1:
            raise OSError("disk\nfull")
        if cell["number"] == 4 and (tmp_path / "log").read_text().split().count("4") == 1:
            sys.exit("wrong flag")
        return row

    rows = run_cells(measure, CELLS, [], out=tmp_path)
    assert [row.get("square") for row in rows] == [0, 1, 4, None, None, 25]
    assert rows[3]["status"] == "failed: OSError: disk full"
    assert has_failed(rows[3])
    assert run_cells(measure, CELLS, [], out=tmp_path)[3:5] == [{"number": n, "square": n * n} for n in (3, 4)]
    assert len((tmp_path / "log").read_text().split()) == 8


def test_ctrl_c_is_no_failure_of_a_cell(tmp_path):
    def measure(cell):
        if cell["number"] == 3:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        run_cells(measure, CELLS, [], out=tmp_path)
    assert len(list((tmp_path / "cells").iterdir())) == 2  # the last come first


def test_cells_of_another_origin_are_measured_anew(tmp_path):
    log = tmp_path / "log"
    made = {"commit": "a", "sources": "x", "versions": {"torch": "2"}}
    for made_by, runs in (
        (made, 6),
        (made | {"commit": "b"}, 6),  # which changed none of the sources
        (made | {"sources": "y"}, 12),
        (made | {"sources": "y", "versions": {"torch": "3"}}, 18),
    ):
        rows = run_cells(logged(log), CELLS, [], out=tmp_path, origin=made_by)
        assert rows == [{"number": n, "square": n * n} for n in range(6)]
        assert len(log.read_text().split()) == runs
    file = next((tmp_path / "cells").iterdir())
    assert json.loads(file.read_text())["made_by"]["versions"] == {"torch": "3"}
    file.write_text("{")  # damaged
    run_cells(logged(log), CELLS, [], out=tmp_path, origin=made_by)
    assert len(log.read_text().split()) == 19


@pytest.mark.parametrize("made", [None, {"sources": "x"}])
def test_a_file_that_holds_no_cell_is_measured_anew(tmp_path, made):
    log, own = tmp_path / "log", {"made_by": made or {}}
    how = {"out": tmp_path, "origin": made, "figures": ("square",)}
    run_cells(logged(log), CELLS[:1], [], **how)
    (file,) = (tmp_path / "cells").iterdir()
    for held in (
        None, [], 3, {}, {"number": 0, "square": 0, "made_by": None}, {"number": 0, "square": 0, "made_by": []}, own,
        {"number": 0} | own, {"square": 0} | own, {"number": 1, "square": 1} | own,
    ):  # fmt: skip
        log.write_text("")
        file.write_text(json.dumps(held))
        assert run_cells(logged(log), CELLS[:1], [], **how) == [{"number": 0, "square": 0}]
        assert log.read_text().split() == ["0"]
    file.write_bytes(b"\xff\xfe{")
    run_cells(logged(log), CELLS[:1], [], **how)
    assert log.read_text().split() == ["0", "0"]
    run_cells(logged(log), CELLS[:1], [], **how)
    assert log.read_text().split() == ["0", "0"]


def test_a_process_that_runs_another_program_measures_nothing(tmp_path):
    log, made = tmp_path / "log", {"sources": "new", "files": {}}
    for own in ({"sources": "old"}, {"sources": "new", "versions": {}}):
        (row,) = run_cells(logged(log), CELLS[:1], [], out=tmp_path, origin=made, loaded=lambda own=own: own)
        assert row == {"number": 0, "status": "failed: worker runs another program: restart it"}
        (file,) = (tmp_path / "cells").iterdir()
        assert json.loads(file.read_text())["made_by"] == made | own
    assert not log.exists()
    rows = run_cells(logged(log), CELLS[:1], [], out=tmp_path, origin=made, loaded=lambda: {"sources": "new"})
    assert rows == [{"number": 0, "square": 0}]


@pytest.mark.long
def test_a_process_states_the_sources_that_it_imported(tmp_path):
    """A copy of the program, of which a file is edited while a process has it loaded, as a cluster's worker may."""
    for folder in ("bench", "cli", "client", "network", "update"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    shutil.copy(ROOT / "data.py", tmp_path)
    script = (
        "import pathlib; from bench.origin import loaded, origin; pathlib.Path('priors.py').write_text('two'); "
        "print(loaded()['sources'], origin()['sources'])"
    )
    said = [
        subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    first, second = (each.stdout.split() for each in said)
    assert first[0] == first[1]
    assert second[0] == second[1] != first[0]


def test_the_origin_names_sources_versions_and_files(tmp_path):
    (tmp_path / "a").write_text("one")
    first = origin([tmp_path / "a"])
    assert first["versions"]["torch"]
    assert {
        "main_MAGIA_sel.py",
        "attack/match/gradients.py",
        "judge/metrics.py",
        "bench/peers.py",
        "bench/batches.py",
        "samples/cifar10_sample128.npz",
    } <= {str(path.relative_to(ROOT)) for path in sources()}
    assert not any("tests" in path.parts or path.name == "figures.py" for path in sources())
    (tmp_path / "a").write_text("two")
    assert {name for name, value in origin([tmp_path / "a"]).items() if value != first[name]} == {"files"}


@pytest.mark.long
@pytest.mark.xdist_group("pool")
def test_a_local_process_that_is_killed_costs_the_cells_under_way(tmp_path):
    log = tmp_path / "log"

    def measure(cell):
        row = logged(log, 0.1)(cell)
        if cell["number"] == 3 and log.read_text().split().count("3") == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return row

    assert len(run_cells(measure, CELLS, [], out=tmp_path, jobs=2)) == 6
    assert 7 <= len(log.read_text().split()) <= 8


def test_a_process_that_always_dies_is_an_error(tmp_path, monkeypatch):
    starts = []

    def dying(**_):
        starts.append(1)
        raise TerminatedWorkerError("killed")  # as the test above has it from a real one

    monkeypatch.setattr(cells, "Parallel", dying)
    with pytest.raises(ValueError, match="died 3 times"):
        run_cells(lambda cell: {}, CELLS[:2], [], out=tmp_path, jobs=2)
    assert len(starts) == 3


def test_a_scheduler_that_does_not_answer_is_one_line(tmp_path, capsys, monkeypatch):
    import dask

    with dask.config.set({"distributed.comm.timeouts.connect": "1s"}):
        words = ["signals", "--batch_sizes", "2", "--out", str(tmp_path), "--scheduler", "tcp://127.0.0.1:1"]
        assert benchmark.main(words) == 2
    assert "tcp://127.0.0.1:1" in capsys.readouterr().err.splitlines()[-1]


@pytest.fixture(scope="module")
def foreign_worker(tmp_path_factory):
    """A scheduler, its process, and the folder of its one worker, whose copy of the program differs in a constant."""
    home = tmp_path_factory.mktemp("foreign")
    for name in ("benchmark.py", "main_MAGIA_sel.py", "data.py", "priors.py", "schedules.py"):
        shutil.copy(ROOT / name, home / name)
    for name in ("attack", "bench", "cli", "client", "judge", "network", "samples", "update"):
        shutil.copytree(ROOT / name, home / name)
    with (home / "schedules.py").open("a") as file:
        file.write("\nOTHER = 1\n")
    with cluster_in(home, 1, threads=2, home=home) as (address, process):
        yield address, process


@pytest.mark.long
@cluster
def test_a_worker_of_another_version_measures_nothing(tmp_path, foreign_worker):
    words = ["signals", "--batch_sizes", "2", "--batches", "0", "--seeds", "0", "--num_classes", "20"]
    assert benchmark.main([*words, "--out", str(tmp_path / "out"), "--scheduler", foreign_worker[0]]) == 1
    (row,) = read(tmp_path / "out" / "table.csv")
    assert row["status"] == "failed: worker runs another program: restart it"


@pytest.mark.long
@cluster
def test_a_scheduler_that_dies_ends_a_benchmark_in_a_line(tmp_path, foreign_worker):
    """The last test of this cluster."""
    import dask

    address, process = foreign_worker

    def kill_once_begun():
        wait_for(log.exists)
        process.kill()

    log = tmp_path / "log"
    threading.Thread(target=kill_once_begun, daemon=True).start()
    with (
        dask.config.set({"distributed.comm.timeouts.connect": "2s"}),
        pytest.raises(OSError, match="does not answer any more"),
    ):
        run_cells(logged(log, 30), CELLS[:1], [], out=tmp_path / "out", scheduler=address)
    assert not list((tmp_path / "out" / "cells").iterdir())
