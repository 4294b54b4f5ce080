"""The output of a benchmark: tables in CSV and markdown, plots, and a wall of pictures."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from bench.cells import Cell
from bench.guesses import GUESSES
from judge.tables import markdown, write_csv

WALL = 8  # images in a row of the picture wall
LEAST = {"evaluations": 1, "seconds": 0.1}  # resolution of the tables, and lower bound on a logarithmic axis
MEANS = (
    "psnr_mean", "ssim_mean", "lpips_mean", "label_accuracy", "identification", "bit_exact", "certified",
    "signals_found", "evaluations", "seconds",
)  # fmt: skip
OVERVIEW = {
    "psnr_mean": "PSNR (dB)",
    "ssim_mean": "SSIM",
    "lpips_mean": "LPIPS",
    "label_accuracy": "labels right",
    "identification": "identified",
    "bit_exact": "bit for bit",
    "certified": "exact with a certificate",
    "signals_found": "images told apart",
    "seconds": "seconds",
}
MEASURES = {"psnr": "mean PSNR (dB)", "ssim": "mean SSIM"}
PANEL = {"batch_size": "B = {}", "max_evals": "{} evaluations", "max_seconds": "{} seconds"}
MARKERS = "os^v"  # one for every ten lines
DECADE = 10
# Figures between 0 and 1.
SHARES = ("ssim_mean", "lpips_mean", "label_accuracy", "identification", "bit_exact", "certified")
PANELS = 3  # in a row


def write_table(rows: Sequence[Cell], stem: Path) -> None:
    """The rows as `stem`.csv and `stem`.md."""
    write_csv(stem.with_suffix(".csv"), rows)
    stem.with_suffix(".md").write_text(markdown(rows), encoding="utf-8")


def summarise(rows: Sequence[Cell], names: Sequence[str]) -> list[Cell]:
    """Means over all rows that agree in `names`, such as over batches and seeds, with their number and PSNR's spread.

    `failed` is the share of runs whose column `lost` is true. The caller has given such a run the PSNR and SSIM of the
    mean image, which count in the means. A run without these figures does not count.
    """
    groups: dict[tuple, list[Cell]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return [dict(zip(names, key, strict=True)) | _means(own) for key, own in groups.items()]


def _means(rows: Sequence[Cell]) -> Cell:
    means: Cell = {"runs": len(rows), "failed": round(mean(bool(row["lost"]) for row in rows), 3)}
    for name in (name for name in MEANS if name in rows[0]):
        values = [row[name] for row in rows if row.get(name) is not None]
        means[name] = round(mean(values), 3) if values else None
        if name == "psnr_mean":
            means["psnr_spread"] = round(stdev(values), 3) if len(values) > 1 else None
    return means


def write_overview(lines: Sequence[Cell], budget: str, path: Path) -> None:
    """A markdown page of the means: for each network and budget, and for each measure, methods against batch sizes."""
    page: list[str] = []
    sizes = sorted({line["batch_size"] for line in lines})
    for key in dict.fromkeys((line["model"], line["labels"], line[budget]) for line in lines):
        own = [line for line in lines if (line["model"], line["labels"], line[budget]) == key]
        page.append(f"## {key[0]}, {key[1]} labels, {PANEL[budget].format(key[2])}\n")
        for name, title in shown(lines).items():
            rows = []
            for preset in dict.fromkeys(line["preset"] for line in own):
                at = {line["batch_size"]: line for line in own if line["preset"] == preset}
                rows.append({title: preset} | {f"B = {b}": in_a_word(at[b], name) for b in sizes if b in at})
            page.append(markdown(rows))
    path.write_text("\n".join(page), encoding="utf-8")


def shown(lines: Sequence[Cell]) -> dict[str, str]:
    """The measures of OVERVIEW that the means have, and their titles."""
    return {name: title for name, title in OVERVIEW.items() if name in lines[0]}


def in_a_word(line: Cell, name: str) -> str:
    """A mean as the overview's tables show it, PSNR with its spread and the share of failures."""
    if line[name] is None:
        return ""
    text = f"{line[name]:.2f}" if name in SHARES else f"{line[name]:.1f}"
    if name == "psnr_mean":
        text += f" ± {line['psnr_spread']:.1f}" if line["psnr_spread"] is not None else ""
        text += f" ({100 * line['failed']:.0f} % failed)" if line["failed"] else ""
    return text


def plot_signals(rows: Sequence[Cell], path: Path) -> None:
    """Images read against batch size, mean over batches and seeds: a line for each network, K and kind of labels."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axis = figure.subplots()
    telling = ("model", "num_classes", "labels")
    groups = dict.fromkeys(tuple(row[name] for name in telling) for row in rows)
    most = max((row["batch_size"] for row in rows), default=1)
    axis.plot([0, most], [0, most], color="0.8", zorder=0, label="all of them")
    for group in groups:
        own = [row for row in rows if tuple(row[name] for name in telling) == group]
        sizes = sorted({row["batch_size"] for row in own})
        counts = [[row["within_1_percent"] for row in own if row["batch_size"] == size] for size in sizes]
        axis.plot(sizes, [mean(c) for c in counts], marker="o", label="{}, {} classes, {} labels".format(*group))
    axis.set(xlabel="batch size B", ylabel="images whose features are read within 1 %")
    axis.legend()
    figure.savefig(path, dpi=110)


def plot_grid(lines: Sequence[Cell], budget: str, out: Path) -> None:
    """psnr_vs_batch.png, psnr_vs_evaluations.png, psnr_vs_seconds.png, and the same three of SSIM, for each network.

    `lines` are a grid's means over batches and seeds, `budget` the column of each run's budget: max_evals or
    max_seconds. Over the batch size each budget has a panel. Over evaluations and seconds each batch size has a panel,
    and each budget is a point. Guesses spend nothing, so only the plots over the batch size show guesses. An attack
    that ended before its first step is shown at one evaluation.
    """
    lines = [line for line in lines if line["psnr_mean"] is not None]
    for model in dict.fromkeys(line["model"] for line in lines):
        own = [line for line in lines if line["model"] == model]
        spent = [
            line | {name: max(line[name], least) for name, least in LEAST.items()}
            for line in own
            if line["preset"] not in GUESSES and line["seconds"] is not None
        ]
        suffix = file_suffix(model, lines)
        for measure in MEASURES:
            plot_lines(own, out / f"{measure}_vs_batch{suffix}.png", measure, x="batch_size", panel=budget)
            for x in ("evaluations", "seconds") if spent else ():
                plot_lines(spent, out / f"{measure}_vs_{x}{suffix}.png", measure, x=x, panel="batch_size")


def file_suffix(model: str, among: Sequence[Cell]) -> str:
    """The ending of a network's file names; empty where there is one network only."""
    return "" if len({line["model"] for line in among}) == 1 else "_" + re.sub(r"\W+", "-", model).strip("-")


def plot_lines(lines: Sequence[Cell], path: Path, measure: str, *, x: str, panel: str) -> None:
    """A measure over column `x`: a panel for each value of column `panel`, a line for each preset and kind of labels.

    Labels are named where there are several. PSNR has bars of a standard deviation over batches and seeds.
    """
    telling = ["preset", *(name for name in ("labels",) if len({line[name] for line in lines}) > 1)]
    named = {", ".join(str(line[name]) for name in telling): [] for line in lines}
    for line in lines:
        named[", ".join(str(line[name]) for name in telling)].append(line)
    values = sorted({line[panel] for line in lines})
    columns = min(PANELS, len(values))
    rows = -(-len(values) // columns)
    figure = Figure(figsize=(3.6 * columns + 2.4, 3.4 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, value in zip(axes, values, strict=False):
        for number, (name, own) in enumerate(named.items()):
            own = sorted((line for line in own if line[panel] == value), key=lambda line: line[x])
            spread = [line["psnr_spread"] or 0 for line in own] if measure == "psnr" else None
            at, y = [line[x] for line in own], [line[f"{measure}_mean"] for line in own]
            axis.errorbar(
                at, y, spread, label=name, color=f"C{number % 10}", marker=MARKERS[number // 10 % 4], capsize=3
            )
        axis.set(xlabel="batch size B" if x == "batch_size" else x, ylabel=MEASURES[measure])
        reach = [line[x] for line in lines if line[panel] == value]
        if max(reach) > DECADE * min(reach):  # on a shorter reach, a logarithmic axis has no place for its labels
            axis.set_xscale("log")
        else:
            axis.xaxis.set_major_locator(MaxNLocator(4))
        axis.set_title(PANEL[panel].format(value))
        if x == "batch_size":
            sizes = sorted({line[x] for line in lines})
            axis.set_xticks(sizes, map(str, sizes))
            axis.minorticks_off()
    for axis in axes[len(values) :]:
        axis.set_axis_off()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=110)


def picture_wall(truth: Tensor, runs: Mapping[str, Path], path: Path) -> None:
    """The leading true images (B, C, H, W), and below a row from each named run directory, in the same order."""
    rows = {"truth": list(truth[:WALL].permute(0, 2, 3, 1).numpy())}
    for name, run in runs.items():
        order = json.loads((run / "metrics.json").read_text())["assignment"][:WALL]
        rows[name] = [np.asarray(Image.open(run / "images" / f"rec_{i:03d}.png")) for i in order]
    columns = len(rows["truth"])
    figure = Figure(figsize=(1.1 * columns + 2.2, 1.1 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, (name, pictures) in zip(axes, rows.items(), strict=True):
        for axis, picture in zip(line, pictures, strict=True):
            axis.imshow(picture.squeeze(), cmap="gray", interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(name.replace(" ", "\n"), rotation=0, ha="right", va="center", fontsize=9)
    figure.savefig(path, dpi=110)
