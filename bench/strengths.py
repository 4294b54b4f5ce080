"""The figures of an attack against the strength of defences: tables, a plot, and the strength that stops the attack."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from bench.cells import Cell
from bench.figures import OVERVIEW, file_suffix, in_a_word, shown
from bench.guesses import MEAN
from judge.tables import markdown
from update.defences import Defences

NONE = "none"
DEFENCES = (
    NONE, "--frozen=head.bias", "--frozen=head", "float16", "bfloat16", "int8",
    "noise:1e-5", "noise:1e-4", "noise:1e-3", "noise:1e-2", "noise:1e-1",
    "topk:0.5", "topk:0.1", "topk:0.01", "topk:0.001", "feedback:0.1:5", "feedback:0.01:5",
    "percentile:10,truncate:0.01", "percentile:90", "truncate:1e-2", "truncate:1e-3", "truncate:1e-4",
    "svt:0.1:0.1:0.1:1e-5:1e-6", "localdp:1:1:1e5:1e-5", "localdp:1:1:1e4:1e-5", "localdp:1:1:1e3:1e-5",
    "localdp:1:1:100:1e-5", "localdp:1:1:10:1e-5",
    "quantise:8", "quantise:4", "quantise:2", "quantise:1", "sign",
    "clip:1", "clip:0.1", "secure_sum:2", "secure_sum:4", "secure_sum:8",
    "dpsgd:1:1e-4", "dpsgd:1:1e-3", "dpsgd:1:1e-2", "dpsgd:1:1e-1", "dpsgd:1:1",
)  # fmt: skip
# Defences that are stronger the smaller their number is.
STRONGER_BELOW = ("topk", "feedback", "truncate", "svt", "localdp", "quantise", "clip")
STRENGTHS = {"feedback": 0, "svt": 2, "localdp": 2}  # which of a defence's numbers is its strength, where not the last
LEAKS = ("psnr_mean", "ssim_mean", "label_accuracy", "identification", "signals_found")  # of OVERVIEW, which are drawn
WORTH = {"psnr_mean": "from PSNR", "ssim_mean": "from SSIM"}  # figures that the mean image has too
WIDTH, HEIGHT = 3.0, 2.2  # of a panel, inches


def kind_and_strength(defence: str) -> tuple[str, float]:
    """A defence's kind and strength, such as ("noise", 0.01): defences of one kind differ in strength alone.

    A stronger defence has the larger strength. The strength of DP-SGD is SIGMA, and CLIP is part of the kind; STRENGTHS
    has others. A defence without a number, a flag, and a composition of defences are kinds of their own.
    """
    steps = () if defence.startswith("--") else Defences.parse(defence).steps
    if len(steps) != 1 or not steps[0].amounts:
        return defence, 0.0
    name, *numbers = defence.split(":")
    at = STRENGTHS.get(name, len(numbers) - 1)
    behind = ["*", *numbers[at + 1 :]] if numbers[at + 1 :] else []
    return ":".join([name, *numbers[:at], *behind]), float(numbers[at]) * (-1 if name in STRONGER_BELOW else 1)


def strength_in_words(defence: str) -> str:
    """The number of a defence that is its strength, as it was written; the whole defence where it has none."""
    name, *numbers = defence.split(":")
    return numbers[STRENGTHS.get(name, -1)] if numbers and kind_and_strength(defence)[0] != defence else defence


def panels(lines: Sequence[Cell]) -> dict[tuple, list[Cell]]:
    """The means of each network, kind of labels and batch size."""
    each: dict[tuple, list[Cell]] = {}
    for line in lines:
        each.setdefault((line["model"], line["labels"], line["batch_size"]), []).append(line)
    return each


def by_kind(lines: Sequence[Cell]) -> dict[str, list[str]]:
    """The kinds of defences in the lines, each with its members from the weakest to the strongest; not `none`."""
    kinds: dict[str, list[str]] = {}
    for defence in dict.fromkeys(line["defence"] for line in lines if line["defence"] != NONE):
        kinds.setdefault(kind_and_strength(defence)[0], []).append(defence)
    return {kind: sorted(own, key=lambda text: kind_and_strength(text)[1]) for kind, own in kinds.items()}


def write_strengths(lines: Sequence[Cell], path: Path) -> None:
    """A markdown page of the means: for each network and batch size, a table of defences against attacks."""
    page: list[str] = []
    for (model, labels, size), own in panels(lines).items():
        rows: dict[str, Cell] = {}
        for (name, title), line in itertools.product(shown(own).items(), own):
            row = rows.setdefault(line["defence"], {"defence": line["defence"]})
            if line["preset"] != MEAN or name in WORTH:
                row[f"{title}, {line['preset']}"] = in_a_word(line, name)
        page += [f"## {model}, {labels} labels, B = {size}\n", markdown(list(rows.values()))]
    path.write_text("\n".join(page), encoding="utf-8")


def weakest(lines: Sequence[Cell]) -> list[Cell]:
    """For each attack and kind of defence, the weakest strength at which it is no better than the mean image.

    The attack must be no better at every stronger strength that was measured. `none measured` stands where the attack
    is better at the strongest.
    """
    rows = []
    for key, own in panels(lines).items():
        at = {(line["defence"], line["preset"]): line for line in own}
        attacks = [preset for preset in dict.fromkeys(line["preset"] for line in own) if preset != MEAN]
        for (kind, members), attack in itertools.product(by_kind(own).items(), attacks):
            row = dict(zip(("model", "labels", "batch_size"), key, strict=True)) | {"attack": attack, "kind": kind}
            for name, title in WORTH.items():
                row[title] = _last_stand(
                    [(text, at.get((text, attack)), at.get((text, MEAN))) for text in members], name
                )
            rows.append(row)
    return rows


def _last_stand(members: Sequence[tuple[str, Cell | None, Cell | None]], name: str) -> str:
    """The first defence from which on the attack's figure is no better than the mean image's."""
    found = "none measured"
    for defence, attack, guess in reversed(members):
        scores = [line and line[name] for line in (attack, guess)]
        if None in scores or scores[0] > scores[1]:
            break
        found = defence
    return found


def plot_strengths(lines: Sequence[Cell], out: Path) -> None:
    """leakage_B<size>.png for each network: a column for each kind with several strengths, a row for each measure.

    The leftmost point is the undefended update, where it was measured; the dashed line is the mean image.
    """
    for (model, labels, size), own in panels(lines).items():
        kinds = {kind: members for kind, members in by_kind(own).items() if len(members) > 1}
        if kinds:
            suffix = file_suffix(model, lines) + (f"_{labels}" if len({line["labels"] for line in lines}) > 1 else "")
            _plot(own, kinds, out / f"leakage{suffix}_B{size}.png", f"{model}, {labels} labels, B = {size}")


def _plot(lines: Sequence[Cell], kinds: Mapping[str, Sequence[str]], path: Path, title: str) -> None:
    figure = Figure(figsize=(WIDTH * len(kinds) + 1, HEIGHT * len(LEAKS) + 0.8), layout="constrained")
    axes = figure.subplots(len(LEAKS), len(kinds), squeeze=False, sharex="col", sharey="row")
    at = {(line["defence"], line["preset"]): line for line in lines}
    for row, measure in zip(axes, LEAKS, strict=True):
        row[0].set_ylabel(OVERVIEW[measure])
        for axis, members in zip(row, kinds.values(), strict=True):
            shown = [NONE, *members] if any(defence == NONE for defence, _ in at) else list(members)
            for number, preset in enumerate(dict.fromkeys(line["preset"] for line in lines)):
                points = [(i, at[text, preset][measure]) for i, text in enumerate(shown) if (text, preset) in at]
                style = (
                    {"color": "0.5", "linestyle": "--"} if preset == MEAN else {"color": f"C{number}", "marker": "o"}
                )
                if preset != MEAN or measure in WORTH:
                    axis.plot(*zip(*((i, y) for i, y in points if y is not None), strict=True), label=preset, **style)
            names = [strength_in_words(text) for text in shown]
            axis.set_xticks(range(len(shown)), names, rotation=45)
    for axis, kind in zip(axes[-1], kinds, strict=True):
        axis.set_xlabel(kind)
    figure.suptitle(title)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=110)
