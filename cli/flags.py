"""Flags, made from the script's block of defaults: the comment beside a default is its flag's help and documentation.

The block holds assignments, each with a comment. A comment line after a blank line heads a group; a comment line after
an assignment continues that assignment's comment. This module adds each flag's type.
"""

import argparse
import math
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from attack.match.gradients import DISTANCES, RESCALES, SUBSET_LOSSES
from attack.match.penalties import FEATURE_DISTANCES
from attack.match.softening import SOFTENINGS
from attack.optimise.budget import LEARNING_RATES, LINE_SEARCHES, LR_SCHEDULES
from attack.optimise.capture import CUDA_GRAPHS
from attack.optimise.pixels import BOXES
from attack.published.labels import STRATEGIES
from attack.published.presets import PRESETS
from cli.output import one_line
from data import DATASETS, LABEL_MODES
from network.outside import OUTSIDE, is_outside
from network.zoo import ACTIVATIONS, MODELS
from priors import PRIORS
from schedules import MODES, RESAMPLES
from update import checked
from update.batchnorm import BATCHNORMS
from update.defences import Defences
from update.loss import LOSSES
from update.optimiser import OPTIMISERS
from update.received import KINDS
from update.training import PRECISIONS

SIGNALS = ("auto", "on", "off", "ica")
DTYPES = ("float32", "float64")
BANNER = re.compile(r"^# -{20,}$", re.MULTILINE)  # above each section of the script; the block is the first
ASSIGNMENT = re.compile(r"([A-Z][A-Z_0-9]*) = (?:\"[^\"]*\"|'[^']*'|[^#\"'])*(?:# (.*))?")
NEGATIVE = re.compile(r"-\d+(\.\d*)?e[+-]?\d+", re.IGNORECASE)  # a number that argparse takes for a flag


@dataclass(frozen=True)
class Flag:
    """One setting: its name, its default in the script, the text beside the default, the heading above it."""

    name: str
    default: object
    text: str
    group: str

    @property
    def shown(self) -> str:
        """The default as help and documentation show it."""
        return "off" if self.default is False else str(self.default)


def read_flags(script: Path, values: Mapping[str, object]) -> list[Flag]:
    """The flags of the script's block of defaults; `values` are the running module's globals, with the defaults.

    Raises:
        ValueError: a line of the block is neither assignment nor comment.
    """
    flags, group, before = [], "", ""
    for line in BANNER.split(script.read_text(encoding="utf-8"))[1].splitlines():
        comment = line.removeprefix("# ") if line.startswith("# ") else ""
        if assignment := ASSIGNMENT.fullmatch(line):
            name, text = assignment.groups()
            flags.append(Flag(name.lower(), values[name], text or "", group))
        elif comment and not before:
            group = comment
        elif comment and ASSIGNMENT.fullmatch(before):
            flags[-1] = replace(flags[-1], text=f"{flags[-1].text} {comment}")
        elif line and not comment:
            raise ValueError(f"{script.name}: defaults look like NAME = value  # what it means; cannot read {line!r}")
        before = before if comment and before else line
    return flags


def number(kind: type, least: float, most: float = math.inf, *, above: bool = False) -> Callable[[str], float]:
    """An argparse type: a finite number of the kind within [least, most], or above least."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a{'n integer' if kind is int else ' number'}") from None
        if value in (math.inf, -math.inf) or not least <= value <= most or (above and value == least):
            bound = f"above {least}" if above else f"at least {least}"
            bound += f" and at most {most}" if math.isfinite(most) else ""
            raise argparse.ArgumentTypeError(f"{text[:40]} is out of range: it must be {bound}")
        return value

    return parse


def one_of(choices: Collection[str]) -> Callable[[str], str]:
    """An argparse type: one of the choices. The flag's own text names the choices."""

    def parse(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(choices)}")
        return text

    parse.choices = tuple(choices)
    return parse


def model_name(text: str) -> str:
    """An argparse type: a model of this project, or a model from outside."""
    if text not in MODELS and not is_outside(text):
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(MODELS)}, {OUTSIDE}")
    return text


model_name.choices = tuple(MODELS)


def image_size(text: str) -> int | str:
    """An argparse type: the side of square images, or HEIGHTxWIDTH; a square by both sides is its one side."""
    height, by, width = text.lower().replace(",", "x").partition("x")
    one_side = number(int, 1, 1024)
    if not by:
        return one_side(text)
    height, width = one_side(height), one_side(width)
    return height if height == width else f"{height}x{width}"


def names(text: str) -> str:
    """An argparse type: names with commas between them, none of which is empty: that would fit everything."""
    parts = [part.strip() for part in text.split(",")]
    if "" in parts:
        raise argparse.ArgumentTypeError(f"{text!r}: a name is missing before or after a comma")
    return ",".join(parts)


def sizes(text: str) -> int | str:
    """An argparse type: a number of minibatches, or the sizes of several."""
    parts = [number(int, 1, 10**6)(part) for part in text.split(",")]
    return parts[0] if len(parts) == 1 else ",".join(map(str, parts))


def betas(text: str) -> str:
    """An argparse type: Adam's two betas, each at least 0 and below 1."""
    parts = numbers(0)(text)
    if len(parts) != 2 or max(parts) >= 1:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not two numbers that are at least 0 and below 1")
    return ",".join(map(str, parts))


def defence(text: str) -> str:
    """An argparse type: defences that a client may apply to its update."""
    try:
        Defences.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("--defence ")) from None
    return text


def numbers(least: float, *, above: bool = False) -> Callable[[str], list[float]]:
    """An argparse type: finite numbers such as 0.5,0.4,0.3, each at least or above `least`."""
    parse_one = number(float, least, above=above)
    return lambda text: [parse_one(part) for part in text.split(",")]


_MANY = 10**9
_steps, _size, _count = number(int, 1, _MANY), number(int, 1, 10**6), number(int, 0, _MANY)
_positive, _weight, _share = number(float, 0, above=True), number(float, 0), number(float, 0, 1)
_chance = number(float, 0, 1, above=True)
_real = number(float, -sys.float_info.max)

# Every flag that is not a plain string, by its type. True and False: a switch.
TYPES: dict[str, Callable[[str], object]] = {
    "preset": one_of(PRESETS),
    "dataset": one_of(DATASETS),
    "batch_size": _size,
    "labels": one_of(LABEL_MODES),
    "image_size": image_size,
    "channels": number(int, 1, 1000),
    "model": model_name,
    "activation": one_of(ACTIVATIONS),
    "depth": number(int, 1, 1000),
    "width": number(int, 1, 10**5),
    "num_classes": number(int, 1, 100_000),
    "mean": numbers(-1e6),
    "std": numbers(0, above=True),
    "frozen": names,
    "hidden": names,
    "defence": defence,
    "defended": defence,
    "dp_delta": _chance,
    "dp_rate": _chance,
    "dp_rounds": _steps,
    "update_kind": one_of(KINDS),
    "local_lr": _positive,
    "local_steps": number(int, 1, 10_000),
    "local_batches": sizes,
    "local_optimizer": one_of(OPTIMISERS),
    "local_momentum": number(float, 0, 1),
    "local_weight_decay": _weight,
    "local_prox": _weight,
    "local_clip": _positive,
    "local_betas": betas,
    "local_eps": _positive,
    "local_precision": one_of(PRECISIONS),
    "loss": one_of(LOSSES),
    "label_smoothing": number(float, 0, 0.99),
    "class_weights": numbers(0, above=True),
    "bn": one_of(BATCHNORMS),
    "bn_frozen": names,
    "sel_mode": one_of(MODES),
    "sel_k": _size,
    "sel_l_iter": _count,
    "sig_a": _real,
    "sig_b": _real,
    "resample": one_of(RESAMPLES),
    "distance": one_of(DISTANCES),
    "soften": one_of(SOFTENINGS),
    "alpha": _share,
    "subset_loss": one_of(SUBSET_LOSSES),
    "rescale": one_of(RESCALES),
    "prior": one_of(PRIORS),
    "tv_weight": _weight,
    "tv_final": number(float, 0, 1, above=True),
    "tv_evals": _steps,
    "noise_weight": _weight,
    "chroma_weight": _weight,
    "curvature_weight": _weight,
    "third_weight": _weight,
    "prior_power": number(float, 0, 2, above=True),
    "l2_weight": _weight,
    "bn_weight": _weight,
    "scale_weight": _weight,
    "signals": one_of(SIGNALS),
    "feature_weight": _weight,
    "feature_distance": one_of(FEATURE_DISTANCES),
    "label_strategy": one_of(STRATEGIES),
    "box": one_of(BOXES),
    "spectral_power": number(float, 0, 8),
    "chroma_gain": number(float, 1e-3, 1e3),
    "label_gain": number(float, 1e-3, 1e3),
    "label_std": _weight,
    "restarts": number(int, 1, 1000),
    "group_weight": _weight,
    "optimizer": one_of(LEARNING_RATES),
    "n_iter": _steps,
    "lr": _positive,
    "lr_schedule": one_of(LR_SCHEDULES),
    "inner_iter": number(int, 1, 10**6),
    "history": number(int, 1, 10**4),
    "line_search": one_of(LINE_SEARCHES),
    "max_evals": _steps,
    "max_seconds": _positive,
    "seed": number(int, 0, 2**31 - 1),
    "cuda_graphs": one_of(CUDA_GRAPHS),
    "dtype": one_of(DTYPES),
    "checkpoint_every": _count,
    "log_every": _steps,
    "epochs": _count,
    "train_batch": _size,
    "hold_out": _share,
}
LISTS = ("mean", "std", "class_weights")  # flags of several numbers


class OneLineParser(argparse.ArgumentParser):
    """argparse, but a wrong flag is one line on stderr, -1e3 is a number, and no flag is known by its beginning."""

    def __init__(self, **how: object) -> None:
        super().__init__(allow_abbrev=False, **how)

    def error(self, message: str) -> None:
        """Print the message on stderr and exit with status 2."""
        self.exit(2, one_line(f"{self.prog}: error: {message}") + "\n")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: object = None) -> tuple:
        """As argparse does, with numbers such as -1e3 joined to the flag before them."""
        words: list[str] = []
        for word in sys.argv[1:] if args is None else args:
            if NEGATIVE.fullmatch(word) and words and words[-1].startswith("--"):
                words[-1] += f"={word}"
            else:
                words.append(word)
        return super().parse_known_args(words, namespace)


def build_parser(flags: Sequence[Flag], description: str, prog: str = "main_MAGIA_sel.py") -> OneLineParser:
    """The parser of the flags, in their groups. It has no defaults: it returns only the flags given by hand.

    Raises:
        ValueError: a default in the script is not of its flag's type.
    """
    parser = OneLineParser(
        prog=prog,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    groups: dict[str, argparse._ArgumentGroup] = {}
    for flag in flags:
        if flag.group not in groups:
            groups[flag.group] = parser.add_argument_group(flag.group)
        text = f"{flag.text}; default {flag.shown}".replace("%", "%%")
        groups[flag.group].add_argument(f"--{flag.name}", help=text, **_how(flag))
    return parser


def _how(flag: Flag) -> dict[str, object]:
    """The keywords by which argparse reads a flag; the flag's default is checked too."""
    if flag.default is False or flag.default is True:
        return {"action": argparse.BooleanOptionalAction} if flag.default else {"action": "store_true"}
    parse = TYPES.get(flag.name, str)
    if flag.default is not None:
        try:
            parse(str(flag.default))
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"{flag.name.upper()} = {flag.default!r} in the script: {error}") from None
    how = {"type": parse, "metavar": flag.name.upper()}
    return how | {"nargs": "?", "const": True} if flag.name == "resume" else how


def value_in_file(flag: Flag, value: object) -> object:
    """The value that a run's file holds for a flag, checked as the flag's text on a command line is.

    Raises:
        ValueError: the flag does not take it.
    """
    if isinstance(flag.default, bool):
        return checked.switch(value, flag.name)
    if (value is None and flag.default is None) or (value is True and flag.name == "resume"):
        return value
    return checked_value(flag.name, value)


def checked_value(name: str, value: object) -> object:
    """A number, text or list of numbers from a file, checked as the text of the flag of this name is.

    Raises:
        ValueError: the flag does not take it.
    """
    parts = value if isinstance(value, list) and name in LISTS else [value]
    if not all(isinstance(part, (str, int, float)) and not isinstance(part, bool) for part in parts):
        raise ValueError(f"{name} is {'null' if value is None else f'a {type(value).__name__}'}, not a value of it")
    parse = TYPES.get(name)
    if parse is None:
        if not isinstance(value, str):
            raise ValueError(f"{name} is {value!r}, not a text")
        return value
    try:
        return parse(",".join(map(str, parts)))
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"{name}: {error}") from None


def flags_page(flags: Sequence[Flag]) -> str:
    """docs/flags.md: a table of flags for every group."""
    lines = [
        "# Which flag does what, and what is its default?",
        "",
        "`make docs` makes this page from the comments at the top of `main_MAGIA_sel.py`: change them there.",
        "A flag given by hand beats `--preset`, which beats these defaults.",
    ]
    for group in dict.fromkeys(flag.group for flag in flags):
        lines += ["", f"## {group[0].upper()}{group[1:]}", "", "| flag | default | |", "|---|---|---|"]
        own = [flag for flag in flags if flag.group == group]
        lines += [f"| `--{f.name}` | `{f.shown}` | {f.text.replace('|', chr(92) + '|')} |" for f in own]
    return "\n".join(lines) + "\n"
