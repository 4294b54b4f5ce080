"""Processes of the program for tests that kill, interrupt or starve them: forked from one that imported it once."""

import multiprocessing
import os
import resource
import signal
import sys
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

import main_MAGIA_sel as magia
from judge.run_directory import RunDirectory

CONTEXT = multiprocessing.get_context("forkserver")
forked = pytest.mark.xdist_group("forked")  # for tests with children: one worker runs them, and imports once
KILLED = 9  # exit status of a process that ends on the spot, with nothing closed or written


class Child:
    """A process of its own that calls `work(*args)`; `out` and `err` hold what it has written so far.

    Args:
        folder: where these two files are; made if need be.
        limit: bytes that a file of the process may have; a write beyond fails as on a full disk.
    """

    def __init__(self, folder: Path, work, *args, limit: int | None = None) -> None:
        _serve()
        folder.mkdir(exist_ok=True)
        self._out, self._err = folder / "out", folder / "err"
        self.process: BaseProcess = CONTEXT.Process(
            target=_child, args=(work, args, str(self._out), str(self._err), limit)
        )
        self.process.start()

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    def wait(self, seconds: float = 120) -> int:
        """Its exit status."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, "it does not end"
        return self.process.exitcode


def _serve() -> None:
    """Start the process that children are forked from, unless it runs."""
    folders = [str(Path(magia.__file__).parent), str(Path(__file__).parent)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(folders))
        patch.setenv("OMP_NUM_THREADS", "1")
        CONTEXT.set_forkserver_preload([__name__])
        forkserver.ensure_running()


def _child(work, args, out: str, err: str, limit: int | None) -> None:
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    work(*args)


def program(*words: object) -> None:
    """The command line with these words."""
    sys.exit(magia.main(list(map(str, words))))


def program_that_dies_in(name: str, *words: object) -> None:
    """The same, but the function `name` of the main script ends the process."""
    setattr(magia, name, lambda *_, **__: os._exit(KILLED))
    program(*words)


STEPS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir"}  # audit events of steps that change a folder


def dies_at(step: int, path: Path, config: dict | None) -> None:
    """A process that ends just before its change number `step` of the folder of the run directory `path`.

    A new run with this config takes the directory; where there is none, the directory is only opened.
    """
    left = [step]

    def count(event: str, arguments: tuple) -> None:
        changes = event in STEPS or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if changes and str(arguments[0]).startswith(str(path.parent)) and ".locks" not in str(arguments[0]):
            left[0] -= 1
            if not left[0]:
                os._exit(KILLED)

    sys.addaudithook(count)
    with RunDirectory(path, overwrite=config is not None, resume=config is None) as run:
        if config is not None:
            run.begin(config, {"of": config["seed"]}, count=1)
    os._exit(0)


def holder_that_dies(path: Path) -> None:
    """A process that ends while it holds a run directory."""
    held = RunDirectory(path, resume=True)  # noqa: F841
    os._exit(KILLED)
