"""What a benchmark shows: tables in CSV and markdown, plots, and a wall of pictures."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from bench.cells import Cell
from judge.tables import markdown, write_csv

WALL = 8  # images in a row of the picture wall
LEAST_SECONDS = 0.1  # what the tables resolve: shorter runs have their place on a logarithmic axis too
MEANS = ("psnr_mean", "ssim_mean", "label_accuracy", "signals_found", "evaluations", "seconds")
MEASURES = {"psnr": "mean PSNR (dB)", "ssim": "mean SSIM"}
PANEL = {"batch_size": "B = {}", "max_evals": "{} evaluations", "max_seconds": "{} seconds"}
MARKERS = "os^v"  # the next for every ten lines
DECADE = 10
PANELS = 3  # in a row


def write_table(rows: Sequence[Cell], stem: Path) -> None:
    """The rows as `stem`.csv and `stem`.md."""
    write_csv(stem.with_suffix(".csv"), rows)
    stem.with_suffix(".md").write_text(markdown(rows), encoding="utf-8")


def summarise(rows: Sequence[Cell], names: Sequence[str]) -> list[Cell]:
    """Means over all rows that agree in `names`, those over seeds say, with their number and PSNR's spread."""
    groups: dict[tuple, list[Cell]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return [dict(zip(names, key, strict=True)) | _means(own) for key, own in groups.items()]


def _means(rows: Sequence[Cell]) -> Cell:
    done = [row for row in rows if row["psnr_mean"] is not None]
    means: Cell = {"runs": len(done)}
    for name in MEANS:
        means[name] = round(mean(row[name] for row in done), 3) if done else None
    means["psnr_spread"] = round(stdev(row["psnr_mean"] for row in done), 3) if len(done) > 1 else None
    return means


def plot_signals(rows: Sequence[Cell], path: Path) -> None:
    """Images read against batch size, one line for each number of classes and kind of labels, mean over seeds."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axis = figure.subplots()
    groups = sorted({(row["num_classes"], row["labels"]) for row in rows}, reverse=True)
    most = max(row["batch_size"] for row in rows)
    axis.plot([0, most], [0, most], color="0.8", zorder=0, label="all of them")
    for classes, labels in groups:
        own = [row for row in rows if (row["num_classes"], row["labels"]) == (classes, labels)]
        sizes = sorted({row["batch_size"] for row in own})
        counts = [[row["within_1_percent"] for row in own if row["batch_size"] == size] for size in sizes]
        axis.plot(sizes, [mean(c) for c in counts], marker="o", label=f"{classes} classes, {labels} labels")
    axis.set(xlabel="batch size B", ylabel="images whose features are read within 1 %")
    axis.legend()
    figure.savefig(path, dpi=110)


def plot_grid(lines: Sequence[Cell], budget: str, out: Path) -> None:
    """psnr_vs_batch.png, psnr_vs_evaluations.png, psnr_vs_seconds.png, and the same three of SSIM.

    `lines` are a grid's means over seeds, `budget` the column that names what each run was given: max_evals or
    max_seconds. Over the batch size each budget has a panel; over evaluations and seconds each batch size has one, and
    each budget is a point.
    """
    lines = [line | {"seconds": max(line["seconds"], LEAST_SECONDS)} for line in lines if line["runs"]]
    for measure in MEASURES if lines else ():
        plot_lines(lines, out / f"{measure}_vs_batch.png", measure, x="batch_size", panel=budget)
        plot_lines(lines, out / f"{measure}_vs_evaluations.png", measure, x="evaluations", panel="batch_size")
        plot_lines(lines, out / f"{measure}_vs_seconds.png", measure, x="seconds", panel="batch_size")


def plot_lines(lines: Sequence[Cell], path: Path, measure: str, *, x: str, panel: str) -> None:
    """A measure over column `x`: a panel for each value of column `panel`, a line for each preset, labels and model.

    Labels and model are named where there are several. PSNR has bars of a standard deviation over the seeds.
    """
    telling = ["preset", *(name for name in ("labels", "model") if len({line[name] for line in lines}) > 1)]
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
        if max(reach) > DECADE * min(reach):  # on less, a logarithmic axis has no place for its labels
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
    """The leading true images (B, C, H, W), and below them a row from each named run directory, in the same order."""
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
