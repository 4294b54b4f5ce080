"""What a program says in the terminal. It goes on where the terminal is closed, full, or knows few characters.

The files of a run are what counts: a line that cannot be printed must not keep one of them from being written.
"""

import functools
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TextIO

LONGEST = 2000  # characters of a message, at most: flags and names from files may be of any length

Main = Callable[..., int]


class LastingStream:
    """A text stream that never raises: characters that it does not know are escaped, and all is dropped once it fails.

    Args:
        stream: the stream that is written to; None where the process was started without it.

    `has_failed` says whether something was dropped.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = open(os.devnull, "w", encoding="utf-8") if stream is None else stream  # noqa: SIM115
        self.has_failed = False

    def write(self, text: str) -> int:
        """Write text, or drop it. Returns the number of characters, as a stream does."""
        encoding = self._stream.encoding or "utf-8"
        shown = text.encode(encoding, "backslashreplace").decode(encoding)
        self._try(lambda: self._stream.write(shown))
        return len(text)

    def flush(self) -> None:
        """Flush the stream, or note that it fails."""
        self._try(self._stream.flush)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def _try(self, act: Callable[[], object]) -> None:
        if self.has_failed:
            return
        try:
            act()
        except (OSError, ValueError):  # the latter where the stream is closed
            self.has_failed = True
            with suppress(OSError, ValueError, AttributeError):
                # what is left in its buffers would raise again when the process ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


def lasting_output(main: Main) -> Main:
    """A `main` whose stdout and stderr last, see `LastingStream`; where stdout does not take its lines it returns 1."""

    @functools.wraps(main)
    def wrapped(*args: object, **how: object) -> int:
        before = sys.stdout, sys.stderr
        out, err = map(LastingStream, before)
        sys.stdout, sys.stderr = out, err
        try:
            status = main(*args, **how)
        finally:
            out.flush()
            err.flush()
            sys.stdout, sys.stderr = before
        return status or int(out.has_failed)

    return wrapped


def refused(program: str, error: object) -> int:
    """Say in one line why a program does not run. Returns its exit status, 2."""
    print(one_line(f"{program}: error: {error}"), file=sys.stderr)
    return 2


def one_line(text: str) -> str:
    """A text on one line, its middle left out where it is very long."""
    text = " ".join(text.split())
    half = LONGEST // 2
    return text if len(text) <= LONGEST else f"{text[:half]} ... {text[-half:]}"
