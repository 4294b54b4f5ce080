"""Networks and attacks that come with flags of their own, such as "convnet --num_classes 10 --weights FILE"."""

import argparse
import shlex
from collections.abc import Callable, Collection
from pathlib import Path

from network.outside import OUTSIDE, is_outside, resolved


def one_with_flags(choices: Collection[str], outside: bool = False) -> Callable[[str], str]:
    """An argparse type: one of the choices, followed by flags of main_MAGIA_sel.py; blanks do not count.

    `outside` allows models from outside as well.
    """

    def parse(text: str) -> str:
        try:
            words = shlex.split(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None
        if words and outside and is_outside(words[0]):
            return shlex.join([resolved(words[0]), *words[1:]])
        if not words or words[0] not in choices:
            others = [OUTSIDE] if outside else []
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join([*choices, *others])}")
        return shlex.join(words)

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


def short_names(texts: Collection[str]) -> dict[str, str]:
    """Each network's name in tables: with the name of its checkpoint, and without labels, which have a column.

    Two networks never share a name: paths of checkpoints are as long as is needed to tell the networks apart.
    """
    return {text: _telling_name(text, [other for other in texts if not _is_same(text, other)]) for text in texts}


def _is_same(text: str, other: str) -> bool:
    """Whether two texts name one network, perhaps with other labels."""
    return _name(text, None) == _name(other, None)


def _telling_name(text: str, others: Collection[str]) -> str:
    """The shortest name of a network that no other network has."""
    for parts in range(1, max(1, len(Path(own_flags(text).get("weights", "")).parts)) + 1):
        name = _name(text, parts)
        if all(name != _name(other, parts) for other in others):
            return name
    return _name(text, None)


def _name(text: str, parts: int | None) -> str:
    """A network's name with the last `parts` parts of its checkpoint's path; None: every path as it is spelt."""
    way = shlex.split(text)[0]
    words = [way if parts is None else way.rpartition("/")[2]]
    for name, value in own_flags(text).items():
        if name == "weights":
            way = Path(value) if parts is None else Path(*Path(value).with_suffix("").parts[-parts:])
            words.append(f"({way})")
        elif name == "num_classes":
            words.append(f"K={value}")
        elif name != "labels":
            words.append(f"{name} {value}".strip())
    return " ".join(words)
