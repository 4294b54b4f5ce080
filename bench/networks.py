"""Networks and attacks that come with flags of their own, such as "convnet --num_classes 10 --weights FILE"."""

import argparse
import shlex
from collections.abc import Callable, Collection
from pathlib import Path


def one_with_flags(choices: Collection[str]) -> Callable[[str], str]:
    """An argparse type: one of the choices, and whatever flags of main_MAGIA_sel.py behind it."""

    def parse(text: str) -> str:
        try:
            first = shlex.split(text)[:1]
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None
        if not first or first[0] not in choices:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(choices)}")
        return text

    return parse


def own_flags(text: str) -> dict[str, str]:
    """The flags behind a name, each with its value; a switch has none."""
    flags: dict[str, str] = {}
    last = ""
    for word in shlex.split(text)[1:]:
        if word.startswith("--"):
            last, _, value = word.removeprefix("--").partition("=")
            flags[last] = value
        elif last:
            flags[last] = word
    return flags


def short_name(text: str) -> str:
    """A network as tables show it: of a checkpoint its name, and no labels, which have a column of their own."""
    words = shlex.split(text)[:1]
    for name, value in own_flags(text).items():
        if name == "weights":
            words.append(f"({Path(value).stem})")
        elif name == "num_classes":
            words.append(f"K={value}")
        elif name != "labels":
            words.append(f"{name} {value}".strip())
    return " ".join(words)
