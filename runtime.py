"""What surrounds a run: the seed's streams, the device, signals, provenance, and flags refused in one line."""

import argparse
import hashlib
import importlib.metadata
import math
import platform
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

PACKAGES = ("torch", "torchvision", "numpy", "scipy", "scikit-image", "pillow", "matplotlib")


def stream(seed: int, name: str) -> torch.Generator:
    """A generator of its own for each use of the seed, so that drawing more for one leaves the others as they were."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))  # torch heeds no more than 32 bits


def choose_device(name: str) -> torch.device:
    """The device of --device, set to exact and repeatable arithmetic.

    Raises:
        ValueError: it is not there.
    """
    device = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(f"--device {name}: not available here; use auto, cpu or cuda") from None
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False  # ten bits of mantissa would drown the small residuals that matter
    return torch.device(device)


def provenance() -> dict:
    """The exact command line, the git commit (None outside a checkout) and the versions that figures depend on."""

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    changes = git("status", "--porcelain")
    versions = {name: _version(name) for name in PACKAGES} | {"torch": torch.__version__}  # with its build, +cpu say
    return {
        "command": shlex.join([sys.executable, *sys.argv]),
        "git_commit": git("rev-parse", "HEAD"),
        "git_dirty": None if changes is None else bool(changes),
        "versions": {"python": platform.python_version()} | versions,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Yields whether Ctrl-C (or SIGTERM) was asked for: the first lets the step finish, a second stops at once."""
    asked = False

    def ask(*_: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        print("\nstopping after this step (again: at once)", file=sys.stderr)

    before = {sign: signal.signal(sign, ask) for sign in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler)


class OneLineParser(argparse.ArgumentParser):
    """argparse, but a wrong flag is answered by one line on stderr."""

    def error(self, message: str) -> None:
        """Print the message on stderr and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(kind: type, least: float, most: float = math.inf, *, above: bool = False) -> Callable[[str], float]:
    """An argparse type: a finite number of the kind within [least, most], or above least."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a{'n integer' if kind is int else ' number'}") from None
        if not math.isfinite(value) or not least <= value <= most or (above and value == least):
            bound = f"above {least}" if above else f"at least {least}"
            bound += f" and at most {most}" if math.isfinite(most) else ""
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {bound}")
        return value

    return parse
