"""The origin of a run: the command that repeats the run, the commit, the versions."""

import importlib.metadata
import platform
import shlex
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

PACKAGES = ("torch", "torchvision", "numpy", "scipy", "scikit-image", "pillow", "matplotlib")


def provenance(argv: Sequence[str]) -> dict:
    """The command with these words, the git commit (None outside a checkout), and the versions that figures depend on.

    The words come from the caller: a process that serves many runs, such as a benchmark's, has another `sys.argv`.
    """
    return {"command": shlex.join(["python", "main_MAGIA_sel.py", *argv])} | program()


@cache
def program() -> dict:
    """Commit and versions of the program that this process runs. The program was loaded once, so both are read once."""

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(Path(__file__).parent.parent), *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    changes = git("status", "--porcelain")
    return {
        "git_commit": git("rev-parse", "HEAD"),
        "git_dirty": None if changes is None else bool(changes),
        "versions": versions(),
    }


def versions() -> dict[str, str | None]:
    """The versions of Python and of the packages that figures depend on."""
    packages = {name: version_of(name) for name in PACKAGES} | {"torch": torch.__version__}  # with its build
    return {"python": platform.python_version()} | packages


def version_of(package: str) -> str | None:
    """The installed version; None where the package is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
