"""The measurements behind the README's tables and plots.

    python benchmark.py signals --out results/signals      # images read from the head's gradient, against batch size
    python benchmark.py defences --out results/defences    # what defences leave of signals and images

Every measurement is a grid of cells. A finished cell lies in OUT/cells as one JSON file and is not run again, so an
interrupted grid goes on where it stopped; delete the file to measure anew. Unknown flags go to main_MAGIA_sel.py.
"""

import argparse
import csv
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from joblib import Parallel, delayed
from matplotlib.figure import Figure
from scipy.optimize import linear_sum_assignment
from tqdm import tqdm

import main_MAGIA_sel as magia
from runtime import OneLineParser, number, stream
from signals import recover_signals
from storage import replace_atomically

CLOSE = 0.01  # features count as read when their relative error is below this
DEFENCES = (
    "none", "--frozen=head.bias", "--frozen=head", "float16", "bfloat16", "topk:0.5", "topk:0.1", "topk:0.01",
    "noise:1e-6", "noise:1e-5", "noise:1e-4", "noise:1e-3", "noise:1e-2",
)  # fmt: skip

Cell = dict[str, object]


# ----------------------------------------------------------------------------------------------------
# Cells


def measure_signals(cell: Cell, flags: Sequence[str]) -> Cell:
    """How many images of one batch the head's gradient gives away, judged by the true labels and features."""
    settings, _ = magia.resolve([*_flags(cell), *flags])
    place = {"device": magia.choose_device(settings.device), "dtype": getattr(torch, settings.dtype)}
    update, model, truth = magia.victim(settings, place)
    row = {"found": 0, "labels_right": 0, "within_1_percent": 0, "worst_error": None, "seconds": 0.0, "note": ""}
    try:
        signals = recover_signals(update, model, generator=stream(settings.seed, "signals"))
    except ValueError as error:
        return row | {"note": str(error)}
    row |= {"found": len(signals), "seconds": round(signals.seconds, 2)}
    if len(signals):
        with torch.no_grad():
            features = model.features(truth.images.to(**place)).to(signals.features)
        distance = torch.cdist(signals.features, features) / features.norm(dim=1)
        found, true = (torch.from_numpy(i) for i in linear_sum_assignment(distance.cpu().numpy()))
        error = distance[found, true]
        row["labels_right"] = int((signals.labels.cpu()[found] == truth.labels[true]).sum())
        row["within_1_percent"] = int((error < CLOSE).sum())
        row["worst_error"] = float(error.max())
    return row


def measure_attack(cell: Cell, flags: Sequence[str], out: Path) -> Cell:
    """One run of the command line, and what its metrics.json says."""
    name = _key(cell)
    argv = [*_flags(cell), *flags, "--quiet", "--overwrite", "--save_dir", str(out / "runs"), "--run_name", name]
    with open(os.devnull, "w") as nowhere:
        stdout, sys.stdout = sys.stdout, nowhere
        try:
            status = magia.main(argv)
        finally:
            sys.stdout = stdout
    if status:
        return {"status": f"exit {status}"}
    figures = json.loads((out / "runs" / name / "metrics.json").read_text())
    return {
        "psnr_mean": figures["psnr_mean"],
        "ssim_mean": figures["ssim_mean"],
        "label_accuracy": figures["label_accuracy"],
        "evaluations": figures["evaluations"],
        "attack_seconds": round(figures["seconds"] + figures["signals_seconds"], 1),
        "status": figures["ended_by"],
    }


def run_cells(measure: Callable[[Cell], Cell], cells: Sequence[Cell], out: Path, jobs: int) -> list[Cell]:
    """All cells with what was measured, in their order; those that are finished are read back, not run again."""
    folder = out / "cells"
    folder.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // jobs)

    def finish(cell: Cell) -> None:
        torch.set_num_threads(threads)
        row = json.dumps(cell | measure(cell))
        replace_atomically(folder / f"{_key(cell)}.json", lambda temporary: temporary.write_text(row))

    missing = [cell for cell in cells if not (folder / f"{_key(cell)}.json").is_file()]
    finished = Parallel(n_jobs=jobs, return_as="generator_unordered")(delayed(finish)(cell) for cell in missing)
    for _ in tqdm(finished, total=len(missing), unit="cell", dynamic_ncols=True):
        pass
    return [json.loads((folder / f"{_key(cell)}.json").read_text()) for cell in cells]


def _key(cell: Cell) -> str:
    text = json.dumps(cell, sort_keys=True)
    return "_".join(str(v).strip("-").replace("/", "-") for v in cell.values())[:60] + (
        "_" + hashlib.sha256(text.encode()).hexdigest()[:8]
    )


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
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(_text(row.get(name)) for name in names) + " |" for row in rows]
    (out / "table.md").write_text("\n".join(lines) + "\n")


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


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
        axis.plot(sizes, [sum(c) / len(c) for c in counts], marker="o", label=f"{classes} classes, {labels} labels")
    axis.set(xlabel="batch size B", ylabel="images whose features are read within 1 %")
    axis.legend()
    figure.savefig(path, dpi=110)


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
        rows = {"signals": signals, "defences": defences}[asked.command](asked, flags)
    except (ValueError, OSError) as error:
        print(f"{Path(__file__).name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    write_tables(rows, asked.out)
    print((asked.out / "table.md").read_text(), end="")
    return 0


def signals(asked: argparse.Namespace, flags: Sequence[str]) -> list[Cell]:
    """The grid of `signals`: rows, and a plot in signals.png."""
    grid = itertools.product(asked.models, asked.num_classes, asked.labels, asked.batch_sizes, asked.seeds)
    names = ("model", "num_classes", "labels", "batch_size", "seed")
    cells = [dict(zip(names, values, strict=True)) for values in grid]
    rows = run_cells(lambda cell: measure_signals(cell, flags), cells, asked.out, asked.jobs)
    plot_signals(rows, asked.out / "signals.png")
    return rows


def defences(asked: argparse.Namespace, flags: Sequence[str]) -> list[Cell]:
    """The grid of `defences`: signals and, unless left out, the images of a whole attack."""
    grid = itertools.product(asked.defences, asked.labels, asked.batch_sizes, asked.seeds)
    cells = [dict(zip(("defence", "labels", "batch_size", "seed"), values, strict=True)) for values in grid]

    def measure(cell: Cell) -> Cell:
        read = measure_signals(cell, flags)
        return read if asked.signals_only else read | measure_attack(cell, flags, asked.out)

    return run_cells(measure, cells, asked.out, asked.jobs)


if __name__ == "__main__":
    sys.exit(main())
