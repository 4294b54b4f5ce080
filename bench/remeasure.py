"""Measure rows of results/data again, and put their new figures, commit, date, device and seconds into the file.

    python -m bench.remeasure parts --data_path cifar10_test.npz
    python -m bench.remeasure networks --rows "--model convnet" --data_path cifar10_test.npz --weights_dir checkpoints
    make docs

A new row is written into the file with its name and its command, and its other columns empty; then it is measured.

The commands of the rows run one after the other, each in a temporary folder. Three kinds of commands can be run so:
those of main_MAGIA_sel.py, which leaves metrics.json, those of `benchmark.py grid` and `defences`, which leave
summary.csv, or table.csv of readings alone, and those of `benchmark.py speed`, of which each row takes the line of its
variant. A row whose command fails stays unchanged.
"""

import argparse
import csv
import json
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import torch

from bench.results_page import DATA, Row, read_rows, write_rows
from judge.verdict import is_certain

T = TypeVar("T")
ROOT = Path(__file__).parent.parent
# Columns of results/data that a run measures: the run's own name for the figure, and how the file spells it.
MEASURED = {
    "psnr": ("psnr_mean", ".1f"),
    "psnr_least": ("psnr_least", ".1f"),
    "psnr_spread": ("psnr_spread", ".1f"),
    "ssim": ("ssim_mean", ".2f"),
    "lpips": ("lpips_mean", ".3f"),
    "label_accuracy": ("label_accuracy", ".2f"),
    "identification": ("identification", ".2f"),
    "bit_exact": ("bit_exact", ".2f"),
    "certified": ("certified", ".2f"),
    "told_apart": ("signals_found", ".0f"),
    "exact": ("exact", ".0f"),
    "certain": ("certain", ".0f"),
    "error": ("error", ".0e"),
    "unexplained": ("unexplained", ".0e"),
    "runs": ("runs", ".0f"),
    "milliseconds": ("ms_per_evaluation", ".1f"),
    "ratio": ("ratio_to_published", ".1f"),
    "share": ("share_of_limit", ".1%"),
}
EXACT = 60.0  # dB from which on an image counts as exact: pixels are off by a quarter of a step of 1/255, rms
SPEED = "python benchmark.py speed"
ALONE = ("activations", "forward")  # what is matched, and the row's variant: the tool's variant is then `activations`
READING = "--signals_only"  # the flag of a command of `benchmark.py defences` that attacks no images
SHORT = 10  # seconds below which a digit behind the point is kept


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Exit status: 0 done, 1 some rows failed, 2 wrong input."""
    parser = row_parser("bench.remeasure", __doc__)
    parser.add_argument("table", help="NAME of results/data/NAME.csv")
    parser.add_argument("--rows", default="", metavar="TEXT", help="only rows whose command contains this")
    parser.add_argument("--data_path", type=Path, help="the file that stands for the .npz file of a command")
    parser.add_argument("--weights_dir", type=Path, help="the folder of the checkpoints that commands name")
    asked = parser.parse_args(argv)
    try:
        rows = read_rows(asked.folder, asked.table)
    except OSError as error:
        print(f"bench.remeasure: error: {error}", file=sys.stderr)
        return 2
    chosen = [number for number, row in enumerate(rows) if asked.rows in row["command"]]
    if not chosen:
        print(f"bench.remeasure: error: no command of {asked.table} contains {asked.rows!r}", file=sys.stderr)
        return 2

    def again(number: int, origin: Row) -> None:
        row = rows[number]
        print(row["command"], flush=True)
        figures = figures_of(row, asked.data_path, asked.weights_dir)
        rows[number] = renewed(row, figures) | origin | {"device": asked.machine or device_of(row["command"])}
        write_rows(asked.folder, asked.table, rows)

    return one_by_one("bench.remeasure", chosen, again)


def one_by_one(prog: str, rows: Iterable[T], measured: Callable[[T, Row], None]) -> int:
    """Measure rows in turn, and go on behind one that fails. Exit status: 0 done, 1 some failed, 2 no git checkout.

    Args:
        prog: the command, which its messages begin with.
        rows: of any kind.
        measured: called with a row and the program's commit and date; a ValueError says why the row failed.
    """
    try:
        origin = program()
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    failed = 0
    for row in rows:
        try:
            measured(row, origin)
        except ValueError as error:
            failed += 1
            print(f"{prog}: {error}", file=sys.stderr)
    return int(bool(failed))


def row_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """A command line that measures rows: the name of their device, and the folder of the tables."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--machine", default="", metavar="TEXT", help="the column `device`; default: the processor's name"
    )
    parser.add_argument("--folder", type=Path, default=DATA, help="where the tables are; default results/data")
    return parser


def figures_of(row: Row, data_path: Path | None, weights_dir: Path | None) -> dict[str, object]:
    """The figures of a row, whose command may measure others as well.

    Raises:
        ValueError: as in `measure`, or the command measures no such row.
    """
    if not row["command"].startswith(SPEED):
        return measure(row["command"], data_path, weights_dir)
    wanted = "activations" if (row.get("matched"), row.get("variant")) == ALONE else row.get("variant")
    for line in speeds(row["command"], data_path, weights_dir):
        if (line["variant"], line["batch_size"]) == (wanted, row["batch_size"]):
            return line
    raise ValueError(f"{row['command']}: it measures no {wanted} at B = {row['batch_size']}")


@cache  # several rows are of one command
def speeds(command: str, data_path: Path | None, weights_dir: Path | None) -> list[dict[str, object]]:
    """The lines of a `benchmark.py speed`, each with those of its limits, and the seconds of them all.

    Raises:
        ValueError: as in `measure`.
    """
    words, began = with_paths(shlex.split(command), data_path, weights_dir), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        files = ran(words, ["--out", "out"], Path(folder), "out/speed.csv", "out/limits.csv")
        tables = [list(csv.DictReader(file.read_text().splitlines())) for file in files]
    return [one | other | {"seconds": time.monotonic() - began} for one, other in zip(*tables, strict=True)]


def ran(words: Sequence[str], end: Sequence[str], folder: Path, *files: str) -> list[Path]:
    """What a command with this end leaves in the folder that it is run in.

    Raises:
        ValueError: it failed, or did not leave the files.
    """
    run = subprocess.run(
        [sys.executable, ROOT / words[1], *words[2:], *end], cwd=folder, capture_output=True, text=True
    )
    left = [folder / file for file in files]
    if run.returncode or not all(file.is_file() for file in left):
        raise ValueError((run.stderr.splitlines() or [f"exit status {run.returncode}"])[-1])
    return left


def measure(command: str, data_path: Path | None, weights_dir: Path | None) -> dict[str, object]:
    """The figures of one command, run in a folder of its own, with these data and checkpoints.

    Raises:
        ValueError: the command cannot be measured here, or it failed.
    """
    words = with_paths(shlex.split(command), data_path, weights_dir)
    if words[1:2] == ["main_MAGIA_sel.py"]:
        out, end = "results/run/metrics.json", ["--save_dir", "results", "--run_name", "run", "--quiet"]
    elif words[1:3] in (["benchmark.py", "grid"], ["benchmark.py", "defences"]):
        out, end = f"out/{'table' if READING in words else 'summary'}.csv", ["--out", "out"]
    else:
        raise ValueError("only main_MAGIA_sel.py and benchmark.py grid and defences can be measured so")
    with tempfile.TemporaryDirectory() as folder:
        (file,) = ran(words, end, Path(folder), out)
        if file.suffix == ".json":
            return of_run(json.loads(file.read_text()), json.loads(file.with_name("audit.json").read_text()))
        with file.open(newline="") as table:
            if READING in words:
                return of_reading(next(csv.DictReader(table)))
            return next(line for line in csv.DictReader(table) if line["preset"] == attack_of(words))


def of_reading(line: Mapping[str, str]) -> dict[str, object]:
    """The figures of a line of table.csv of a reading alone, by the names that a whole attack gives them."""
    found = {"signals_found": line["found"], "seconds": line["signal_seconds"]}
    return found | {"label_accuracy": int(line["labels_right"]) / int(line["batch_size"])}


def of_run(metrics: dict, audit: Mapping) -> dict[str, object]:
    """The figures of a run's metrics.json, with those that follow from them and from its audit.json.

    `error` is the largest of an image's inputs at the layer that was read; `certain` counts images, and `levels` how
    many of them have each level of the verdict.
    """
    errors = [row.get("relative_error") for row in metrics["layers"] if row.get("relative_error") is not None]
    return metrics | {
        "psnr_least": min(metrics["psnr"]),
        "exact": sum(psnr >= EXACT for psnr in metrics["psnr"]),
        "error": errors[0] if errors else None,
        "levels": audit["verdict"]["images"],
        "certain": sum(is_certain(image["confidence"]) for image in audit["images"]),
    }


def with_paths(words: Sequence[str], data_path: Path | None, weights_dir: Path | None) -> list[str]:
    """A command's words with these data behind --data_path and checkpoints from the folder, all paths absolute.

    The file of a model from outside is one of the project's.
    """
    there = (weights_dir or Path()).resolve()
    new = list(words[:1])
    for flag, word in pairwise(words):
        if flag == "--data_path":
            word = str((data_path if data_path and word.endswith(".npz") else Path(word)).resolve())
        elif flag in ("--weights", "--lpips"):
            word = str(there / word)
        elif flag == "--model" and ".py:" in word:
            word = str(ROOT / word)
        elif flag == "--models":
            word = re.sub(r"(?<=--weights )\S+", lambda name: shlex.quote(str(there / name[0])), word)
            word = re.sub(r"^\S+(?=\.py:)", lambda name: shlex.quote(str(ROOT / name[0])), word)
        new.append(word)
    return new


def attack_of(words: Sequence[str]) -> str:
    """The attack of a grid's command, as the grid's summary names it: the peer's attack, where there is a peer."""
    value = dict(pairwise(words))
    return f"{value['--peer']} {value['--peer_attacks']}" if "--peer" in value else value["--presets"]


def renewed(row: Row, figures: Mapping[str, object]) -> Row:
    """The row with the measured figures in its columns; a column without a measured figure becomes empty."""
    new = {name: rounded(figures.get(key), spelt) for name, (key, spelt) in MEASURED.items() if name in row}
    if "labels_right" in row:
        new["labels_right"] = rounded(figures["label_accuracy"], ".0f", times=int(row["batch_size"]))
    if "diverged" in row:  # the number of runs, none of them empty
        new["diverged"] = rounded(float(figures.get("failed") or 0) or None, ".0f", times=int(figures.get("runs") or 1))
    return row | new | {"seconds": rounded(figures["seconds"], ".1f" if float(figures["seconds"]) < SHORT else ".0f")}


def rounded(value: object, spelt: str, times: int = 1) -> str:
    """A figure as the file keeps it; empty where there is no figure."""
    return "" if value in (None, "") else format(times * float(value), spelt)


def program() -> Row:
    """Commit and date (UTC) of the program; where the sources differ from the commit, the commit ends in -dirty.

    Raises:
        OSError: git is not installed.
        subprocess.CalledProcessError: the project is no git checkout.
    """

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results", ":!docs", ":!README.md")
    date = datetime.fromtimestamp(int(git("show", "-s", "--format=%ct")), timezone.utc)
    commit = git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    return {"commit": commit, "date": f"{date:%Y-%m-%d %H:%M}"}


def device_of(command: str) -> str:
    """The device of a command: the name of the GPU that it asks for, or the number of threads and the processor."""
    if "--device cuda" in command:
        return torch.cuda.get_device_name()
    file = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", file.read_text()) if file.is_file() else []
    return f"{torch.get_num_threads()} threads of {names[0] if names else 'a CPU'}"


if __name__ == "__main__":
    sys.exit(main())
