"""The measurements behind the README's tables and plots.

    python benchmark.py grid --presets magia,paper --batch_sizes 4,8 --seeds 0,1 --max_evals 300 --out results/grid
    python benchmark.py signals --out results/signals      # images read from the head's gradient, against batch size
    python benchmark.py defences --out results/defences    # what defences leave of signals and images

Every measurement is a grid of cells. A finished cell lies in OUT/cells as one JSON file and is not run again, so an
interrupted grid goes on where it stopped; delete the file to measure anew. Unknown flags go to main_MAGIA_sel.py.
"""

import argparse
import csv
import hashlib
import io
import itertools
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from joblib import Parallel, delayed
from matplotlib.figure import Figure
from PIL import Image
from scipy.optimize import linear_sum_assignment
from tqdm import tqdm

import main_MAGIA_sel as magia
from data import Batch
from gradients import SharedUpdate
from runtime import OneLineParser, number, stream
from signals import recover_signals
from storage import replace_atomically

WALL = 8  # images in a row of the picture wall
CLOSE = 0.01  # features count as read when their relative error is below this
DEFENCES = (
    "none", "--frozen=head.bias", "--frozen=head", "float16", "bfloat16", "topk:0.5", "topk:0.1", "topk:0.01",
    "noise:1e-6", "noise:1e-5", "noise:1e-4", "noise:1e-3", "noise:1e-2",
)  # fmt: skip

Cell = dict[str, object]
FIGURES = ("psnr_mean", "ssim_mean", "label_accuracy", "signals_found", "evaluations", "seconds", "status")


# ----------------------------------------------------------------------------------------------------
# Cells


def measure_signals(cell: Cell, flags: Sequence[str]) -> Cell:
    """How many images of one batch the head's gradient gives away, judged by the true labels and features."""
    update, model, truth, settings = _victim(cell, flags)
    row = {"found": 0, "labels_right": 0, "within_1_percent": 0, "worst_error": None, "signal_seconds": 0.0, "note": ""}
    try:
        signals = recover_signals(update, model, generator=stream(settings.seed, "signals"))
    except ValueError as error:
        return row | {"note": str(error)}
    row |= {"found": len(signals), "signal_seconds": round(signals.seconds, 2)}
    if len(signals):
        with torch.no_grad():
            features = model.features(truth.images.to(next(model.parameters()))).to(signals.features)
        distance = torch.cdist(signals.features, features) / features.norm(dim=1)
        found, true = (torch.from_numpy(i) for i in linear_sum_assignment(distance.cpu().numpy()))
        error = distance[found, true]
        row["labels_right"] = int((signals.labels.cpu()[found] == truth.labels[true]).sum())
        row["within_1_percent"] = int((error < CLOSE).sum())
        row["worst_error"] = float(error.max())
    return row


def _victim(cell: Cell, flags: Sequence[str]) -> tuple[SharedUpdate, torch.nn.Module, Batch, argparse.Namespace]:
    settings, _ = magia.resolve([*_flags(cell), *flags])
    place = {"device": magia.choose_device(settings.device), "dtype": getattr(torch, settings.dtype)}
    return *magia.victim(settings, place), settings


def measure_attack(cell: Cell, flags: Sequence[str], out: Path) -> Cell:
    """One run of the command line, and what its metrics.json says."""
    name = _key(cell, flags)
    argv = [*_flags(cell), *flags, "--quiet", "--overwrite", "--save_dir", str(out / "runs"), "--run_name", name]
    with redirect_stdout(io.StringIO()):
        status = magia.main(argv)
    if status:
        return dict.fromkeys(FIGURES) | {"status": f"exit {status}"}
    figures = json.loads((out / "runs" / name / "metrics.json").read_text())
    seconds = round(figures["seconds"] + figures["signals_seconds"], 1)
    own = {"seconds": seconds, "status": figures["ended_by"]}
    return {name: own[name] if name in own else figures[name] for name in FIGURES}


def run_cells(
    measure: Callable[[Cell], Cell], cells: Sequence[Cell], flags: Sequence[str], asked: argparse.Namespace
) -> list[Cell]:
    """All cells with what was measured, in their order; those that are finished are read back, not run again."""
    folder, jobs = asked.out / "cells", asked.jobs
    folder.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // jobs)

    def finish(cell: Cell) -> None:
        torch.set_num_threads(threads)
        row = json.dumps(cell | measure(cell))
        replace_atomically(folder / f"{_key(cell, flags)}.json", lambda temporary: temporary.write_text(row))

    missing = [cell for cell in cells if not (folder / f"{_key(cell, flags)}.json").is_file()]
    finished = Parallel(n_jobs=jobs, return_as="generator_unordered")(delayed(finish)(cell) for cell in missing)
    for _ in tqdm(finished, total=len(missing), unit="cell", dynamic_ncols=True):
        pass
    return [json.loads((folder / f"{_key(cell, flags)}.json").read_text()) for cell in cells]


def _key(cell: Cell, flags: Sequence[str]) -> str:
    """A file name of its own for each cell and set of further flags, readable as far as it goes."""
    readable = "_".join(str(value).strip("-").replace("/", "-") for value in cell.values())[:60]
    return f"{readable}_{hashlib.sha256(json.dumps([cell, list(flags)]).encode()).hexdigest()[:8]}"


def _flags(cell: Cell) -> list[str]:
    """The cell as flags of main_MAGIA_sel.py; a value that is a flag itself stands as it is."""
    pairs = [([str(v)] if str(v).startswith("--") else [f"--{name}", str(v)]) for name, v in cell.items()]
    return [word for pair in pairs for word in pair]


# ----------------------------------------------------------------------------------------------------
# Tables and plots


def write_tables(rows: Sequence[Cell], out: Path) -> None:
    """table.csv and table.md of the rows."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with (out / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    write_markdown(rows, out / "table.md")


def write_markdown(rows: Sequence[Cell], path: Path) -> None:
    """The rows as a markdown table."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(_text(row.get(name)) for name in names) + " |" for row in rows]
    path.write_text("\n".join(lines) + "\n")


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


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


def summarise(rows: Sequence[Cell], names: Sequence[str]) -> list[Cell]:
    """Mean and spread over seeds of all rows that agree in `names`."""
    groups: dict[tuple, list[Cell]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return [dict(zip(names, key, strict=True)) | _means(own) for key, own in groups.items()]


def _means(rows: Sequence[Cell]) -> Cell:
    done = [row for row in rows if row["psnr_mean"] is not None]
    means: Cell = {"runs": len(done)}
    for name in FIGURES[:-1]:  # all but the status
        means[name] = round(mean(row[name] for row in done), 3) if done else None
    means["psnr_spread"] = round(stdev(row["psnr_mean"] for row in done), 3) if len(done) > 1 else None
    return means


def plot_grid(rows: Sequence[Cell], out: Path) -> None:
    """psnr_vs_batch.png and psnr_vs_seconds.png: one line for each preset, labels and model; bars span the seeds."""
    lines = summarise(rows, ("preset", "labels", "model", "batch_size"))
    groups = list(dict.fromkeys((line["preset"], line["labels"], line["model"]) for line in lines))
    batch, seconds = (Figure(figsize=(6.4, 4.2), layout="constrained") for _ in range(2))
    by_batch, by_seconds = batch.subplots(), seconds.subplots()
    for group in groups:
        own = [line for line in lines if (line["preset"], line["labels"], line["model"]) == group and line["runs"]]
        sizes, psnr = [line["batch_size"] for line in own], [line["psnr_mean"] for line in own]
        spread = [line["psnr_spread"] or 0 for line in own]
        by_batch.errorbar(sizes, psnr, yerr=spread, marker="o", capsize=3, label=", ".join(group))
        seconds_taken = [max(line["seconds"], 0.1) for line in own]  # a tenth is all that the table resolves
        by_seconds.scatter(seconds_taken, psnr, label=", ".join(group))
        for size, taken, value in zip(sizes, seconds_taken, psnr, strict=True):
            by_seconds.annotate(f"B={size}", (taken, value), fontsize=7)
    by_batch.set(xlabel="batch size B", ylabel="mean PSNR (dB)", xscale="log")
    by_seconds.set(xlabel="seconds", ylabel="mean PSNR (dB)", xscale="log")
    for figure, axis, name in ((batch, by_batch, "psnr_vs_batch.png"), (seconds, by_seconds, "psnr_vs_seconds.png")):
        axis.legend()
        figure.savefig(out / name, dpi=110)


def picture_wall(cells: Sequence[Cell], flags: Sequence[str], out: Path) -> None:
    """wall.png: the truth, and below it one row for each preset, of the first batch size, labels, model and seed."""
    same = {name: value for name, value in cells[0].items() if name != "preset"}
    rows = {"truth": list(_victim(cells[0], flags)[2].images[:WALL].permute(0, 2, 3, 1).numpy())}
    for cell in cells:
        run = out / "runs" / _key(cell, flags)
        if cell.items() >= same.items() and (run / "metrics.json").is_file():
            order = json.loads((run / "metrics.json").read_text())["assignment"][:WALL]
            rows[cell["preset"]] = [np.asarray(Image.open(run / "images" / f"rec_{i:03d}.png")) for i in order]
    columns = len(rows["truth"])
    figure = Figure(figsize=(1.1 * columns + 0.6, 1.1 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, (name, pictures) in zip(axes, rows.items(), strict=True):
        for axis, picture in zip(line, pictures, strict=True):
            axis.imshow(picture.squeeze(), cmap="gray", interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(name)
    figure.savefig(out / "wall.png", dpi=110)


# ----------------------------------------------------------------------------------------------------
# The command line


def build_parser() -> OneLineParser:
    """The subcommands and their flags."""
    parser = OneLineParser(
        prog=Path(__file__).name, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, parser_class=OneLineParser)
    size = number(int, 1)

    def listed(kind: Callable[[str], object]) -> Callable[[str], list]:
        return lambda text: [kind(part) for part in text.split(",")]

    def common(command: argparse.ArgumentParser) -> None:
        command.add_argument("--seeds", type=listed(int), default=[0, 1, 2], metavar="LIST")
        command.add_argument("--out", type=Path, required=True, metavar="DIR", help="where tables, plots and cells go")
        command.add_argument("--jobs", type=size, default=1, metavar="N", help="cells at a time; default 1")

    command = commands.add_parser("grid", help="presets against each other on the same updates")
    command.add_argument("--presets", type=listed(str), default=list(magia.PRESETS), metavar="LIST")
    command.add_argument("--batch_sizes", type=listed(size), default=[1, 4, 8, 16, 32, 64], metavar="LIST")
    command.add_argument("--labels", type=listed(str), default=["random"], metavar="LIST")
    command.add_argument("--models", type=listed(str), default=["lenet"], metavar="LIST")
    command.add_argument("--max_evals", type=size, default=2500, metavar="N", help="evaluations of each; default 2500")
    common(command)
    command = commands.add_parser("signals", help="images read from the head's gradient, against batch size")
    command.add_argument("--batch_sizes", type=listed(size), default=[1, 2, 4, 8, 16, 24, 32, 48, 64], metavar="LIST")
    command.add_argument("--num_classes", type=listed(size), default=[100, 10], metavar="LIST")
    command.add_argument("--labels", type=listed(str), default=["random"], metavar="LIST")
    command.add_argument("--models", type=listed(str), default=["lenet"], metavar="LIST")
    common(command)
    command = commands.add_parser("defences", help="what defences leave of signals and images")
    command.add_argument("--defences", type=listed(str), default=list(DEFENCES), metavar="LIST")
    command.add_argument("--batch_sizes", type=listed(size), default=[16], metavar="LIST")
    command.add_argument("--labels", type=listed(str), default=["random"], metavar="LIST")
    command.add_argument("--signals_only", action="store_true", help="no images, signals alone: seconds, not minutes")
    common(command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Exit status: 0 done, 2 wrong input."""
    asked, flags = build_parser().parse_known_args(argv)
    try:
        rows = {"grid": grid, "signals": signals, "defences": defences}[asked.command](asked, flags)
    except (ValueError, OSError) as error:
        print(f"{Path(__file__).name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    write_tables(rows, asked.out)
    print((asked.out / "table.md").read_text(), end="")
    return 0


def grid(asked: argparse.Namespace, flags: Sequence[str]) -> list[Cell]:
    """The grid of `grid`: rows, means over seeds in summary.md, plots, and a wall of pictures."""
    values = itertools.product(asked.batch_sizes, asked.labels, asked.models, asked.seeds, asked.presets)
    names = ("batch_size", "labels", "model", "seed", "preset")
    cells = [dict(zip(names, value, strict=True)) | {"max_evals": asked.max_evals} for value in values]
    rows = run_cells(lambda cell: measure_attack(cell, flags, asked.out), cells, flags, asked)
    rows = [{name: row[name] for name in ("preset", "batch_size", "labels", "model", "seed", *FIGURES)} for row in rows]
    write_markdown(summarise(rows, ("preset", "batch_size", "labels", "model")), asked.out / "summary.md")
    plot_grid(rows, asked.out)
    picture_wall(cells, flags, asked.out)
    return rows


def signals(asked: argparse.Namespace, flags: Sequence[str]) -> list[Cell]:
    """The grid of `signals`: rows, and a plot in signals.png."""
    grid = itertools.product(asked.models, asked.num_classes, asked.labels, asked.batch_sizes, asked.seeds)
    names = ("model", "num_classes", "labels", "batch_size", "seed")
    cells = [dict(zip(names, values, strict=True)) for values in grid]
    rows = run_cells(lambda cell: measure_signals(cell, flags), cells, flags, asked)
    plot_signals(rows, asked.out / "signals.png")
    return rows


def defences(asked: argparse.Namespace, flags: Sequence[str]) -> list[Cell]:
    """The grid of `defences`: signals and, unless left out, the images of a whole attack."""
    grid = itertools.product(asked.defences, asked.labels, asked.batch_sizes, asked.seeds)
    cells = [dict(zip(("defence", "labels", "batch_size", "seed"), values, strict=True)) for values in grid]

    def measure(cell: Cell) -> Cell:
        read = measure_signals(cell, flags)
        return read if asked.signals_only else read | measure_attack(cell, flags, asked.out)

    return run_cells(measure, cells, flags, asked)


if __name__ == "__main__":
    sys.exit(main())
