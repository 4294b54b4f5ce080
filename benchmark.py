"""The measurements behind the tables and plots of docs/results.md and docs/defences.md.

    python benchmark.py grid --presets magia,paper --batch_sizes 4,8 --seeds 0,1 --max_evals 300 --out results/grid
    python benchmark.py signals --out results/signals      # images read from the head's gradient, against batch size
    python benchmark.py defences --out results/defences    # what defences leave of signals and images

Every measurement is a grid of cells. A finished cell lies in OUT/cells as one JSON file and is not run again, so an
interrupted grid goes on where it stopped; delete the file to measure anew. Unknown flags go to main_MAGIA_sel.py.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import main_MAGIA_sel as magia
from attack.published.presets import PRESETS
from bench.cells import Cell, run_cells
from bench.figures import WALL, picture_wall, plot_grid, plot_signals, summarise, write_table
from bench.measures import (
    FIGURES,
    measure_attack,
    measure_peer,
    measure_signals,
    run_folder,
    victim_of,
)
from bench.peers import PEERS
from cli.flags import OneLineParser, number
from cli.settings import resolve
from data import LABEL_MODES
from update.models import MODELS

# flags that each cell sets itself
OWN = ("resume", "overwrite", "run_name", "save_dir", "update", "save_update", "save_batch", "show_schedule", "quiet")
DEFENCES = (
    "none", "--frozen=head.bias", "--frozen=head", "float16", "bfloat16", "topk:0.5", "topk:0.1", "topk:0.01",
    "noise:1e-6", "noise:1e-5", "noise:1e-4", "noise:1e-3", "noise:1e-2",
)  # fmt: skip

# ----------------------------------------------------------------------------------------------------
# The command line


def build_parser() -> OneLineParser:
    """The subcommands and their flags."""
    parser = OneLineParser(
        prog=Path(__file__).name, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, parser_class=OneLineParser)
    size = number(int, 1)

    def listed(kind: Callable[[str], object], choices: Sequence[str] = ()) -> Callable[[str], list]:
        def parse(text: str) -> list:
            values = list(dict.fromkeys(kind(part) for part in text.split(",")))  # each once
            for value in values:
                if choices and value not in choices:
                    raise argparse.ArgumentTypeError(f"{value!r} is none of {', '.join(choices)}")
            return values

        return parse

    def common(command: argparse.ArgumentParser) -> None:
        command.add_argument("--seeds", type=listed(int), default=[0, 1, 2], metavar="LIST")
        command.add_argument("--out", type=Path, required=True, metavar="DIR", help="where tables, plots and cells go")
        command.add_argument("--jobs", type=size, default=1, metavar="N", help="cells at a time; default 1")
        command.add_argument("--threads", type=size, metavar="N", help="of each process; default the cores shared out")
        command.add_argument(
            "--scheduler", metavar="ADDRESS", help="run cells on this Dask cluster, tcp://host:8786 say"
        )

    command = commands.add_parser("grid", help="presets and peers against each other on the same updates")
    command.add_argument("--presets", type=listed(str, PRESETS), default=list(PRESETS), metavar="LIST")
    command.add_argument("--peer", choices=PEERS, help="also run this package's attacks on the same updates")
    command.add_argument(
        "--peer_attacks", type=listed(str), metavar="LIST", help="which of them; default all that are known"
    )
    command.add_argument("--batch_sizes", type=listed(size), default=[1, 4, 8, 16, 32, 64], metavar="LIST")
    command.add_argument("--labels", type=listed(str, LABEL_MODES), default=["random"], metavar="LIST")
    command.add_argument("--models", type=listed(str, MODELS), default=["lenet"], metavar="LIST")
    budget = command.add_mutually_exclusive_group()
    budget.add_argument(
        "--max_evals", type=listed(size), default=[2500], metavar="LIST",
        help="closure evaluations that each run may take, one run for each number; default 2500",
    )  # fmt: skip
    budget.add_argument(
        "--max_seconds", type=listed(number(float, 0, above=True)), metavar="LIST", help="wall time instead"
    )
    common(command)
    command = commands.add_parser("signals", help="images read from the head's gradient, against batch size")
    command.add_argument("--batch_sizes", type=listed(size), default=[1, 2, 4, 8, 16, 24, 32, 48, 64], metavar="LIST")
    command.add_argument("--num_classes", type=listed(size), default=[100, 10], metavar="LIST")
    command.add_argument("--labels", type=listed(str, LABEL_MODES), default=["random"], metavar="LIST")
    command.add_argument("--models", type=listed(str, MODELS), default=["lenet"], metavar="LIST")
    common(command)
    command = commands.add_parser("defences", help="what defences leave of signals and images")
    command.add_argument("--defences", type=listed(str), default=list(DEFENCES), metavar="LIST")
    command.add_argument("--batch_sizes", type=listed(size), default=[16], metavar="LIST")
    command.add_argument("--labels", type=listed(str, LABEL_MODES), default=["random"], metavar="LIST")
    command.add_argument("--signals_only", action="store_true", help="no images, signals alone: seconds, not minutes")
    common(command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Exit status: 0 done, 1 some cells failed, 2 wrong input."""
    asked, flags = build_parser().parse_known_args(argv)
    try:
        refuse_own(flags)
        resolve(flags, magia.FLAGS)  # refuses at once what no cell could run with
        rows = {"grid": grid, "signals": signals, "defences": defences}[asked.command](asked, flags)
    except (ValueError, OSError) as error:
        print(f"{Path(__file__).name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    write_table(rows, asked.out / "table")
    print((asked.out / "table.md").read_text(), end="")
    failed = [row for row in rows if failed_cell(row)]
    if failed:
        print(f"{len(failed)} of {len(rows)} cells failed: {failed_cell(failed[0])}", file=sys.stderr)
    return int(bool(failed))


def refuse_own(flags: Sequence[str]) -> None:
    """Refuse further flags that a cell of a benchmark sets itself, or cannot have.

    Raises:
        ValueError: there is one.
    """
    for flag in flags:
        if flag.split("=")[0].removeprefix("--") in OWN:
            raise ValueError(
                f"{flag.split('=')[0]}: not in a benchmark, whose cells have runs and updates of their own"
            )


def failed_cell(row: Cell) -> str:
    """Why a cell has no figures; empty where it has."""
    status = str(row.get("status") or "")
    return status if row.get("psnr_mean", 0) is None else ""


def grid(asked: argparse.Namespace, flags: Sequence[str]) -> list[Cell]:
    """The grid of `grid`: rows, means over seeds in summary.csv and .md, plots, and a wall of pictures.

    Raises:
        ValueError: a peer that is not installed or has no such attack, or a peer under a budget of seconds.
    """
    attacks = [*asked.presets, *peer_attacks(asked)]
    budget = "max_seconds" if asked.max_seconds else "max_evals"
    names = ("batch_size", "labels", "model", "seed", "preset", budget)
    values = (asked.batch_sizes, asked.labels, asked.models, asked.seeds, attacks, getattr(asked, budget))
    cells = [dict(zip(names, value, strict=True)) for value in itertools.product(*values)]
    rows = _measured(partial(measure_preset_or_peer, flags=flags, out=asked.out), cells, flags, asked)
    columns = ("preset", "batch_size", "labels", "model", "seed", *FIGURES, budget)
    rows = [{name: row[name] for name in columns} for row in rows]
    lines = summarise(rows, ("preset", "batch_size", "labels", "model", budget))
    write_table(lines, asked.out / "summary")
    plot_grid(lines, budget, asked.out)
    write_wall(cells, flags, asked.out)
    return rows


def write_wall(cells: Sequence[Cell], flags: Sequence[str], out: Path) -> None:
    """wall.png of the grid's first labels, model, seed and budget, at the batch size that best fills a row."""
    alike = [cell for cell in cells if cell.items() >= {k: cells[0][k] for k in ("labels", "model", "seed")}.items()]
    ran = [cell for cell in alike if (run_folder(cell, flags, out) / "metrics.json").is_file()]
    if not ran:
        return
    shown = min(ran, key=lambda cell: (cell["batch_size"] < WALL, abs(cell["batch_size"] - WALL)))
    beside = [cell for cell in ran if cell == shown | {"preset": cell["preset"]}]
    runs = {cell["preset"]: run_folder(cell, flags, out) for cell in beside}
    picture_wall(victim_of(shown | {"preset": "magia"}, flags)[2].images, runs, out / "wall.png")


def peer_attacks(asked: argparse.Namespace) -> list[str]:
    """The attacks of the peer that are asked for, each with the package's name before it."""
    if not asked.peer:
        if asked.peer_attacks:
            raise ValueError("--peer_attacks: whose? give --peer")
        return []
    if find_spec(asked.peer) is None:
        raise ValueError(f"--peer {asked.peer}: pip install -r requirements-benchmark.txt")
    if asked.max_seconds:
        raise ValueError("--max_seconds: the attacks of a peer are bounded by evaluations, give --max_evals")
    for name in asked.peer_attacks or ():
        if name not in PEERS[asked.peer]:
            raise ValueError(f"--peer_attacks {name}: {asked.peer} has {', '.join(PEERS[asked.peer])}")
    return [f"{asked.peer} {name}" for name in asked.peer_attacks or PEERS[asked.peer]]


def measure_preset_or_peer(cell: Cell, flags: Sequence[str], out: Path) -> Cell:
    """What a cell of `grid` measures."""
    return (measure_attack if cell["preset"] in PRESETS else measure_peer)(cell, flags, out)


def signals(asked: argparse.Namespace, flags: Sequence[str]) -> list[Cell]:
    """The grid of `signals`: rows, and a plot in signals.png."""
    grid = itertools.product(asked.models, asked.num_classes, asked.labels, asked.batch_sizes, asked.seeds)
    names = ("model", "num_classes", "labels", "batch_size", "seed")
    cells = [dict(zip(names, values, strict=True)) for values in grid]
    rows = _measured(partial(measure_signals, flags=flags), cells, flags, asked)
    plot_signals(rows, asked.out / "signals.png")
    return rows


def defences(asked: argparse.Namespace, flags: Sequence[str]) -> list[Cell]:
    """The grid of `defences`: signals and, unless left out, the images of a whole attack."""
    grid = itertools.product(asked.defences, asked.labels, asked.batch_sizes, asked.seeds)
    cells = [dict(zip(("defence", "labels", "batch_size", "seed"), values, strict=True)) for values in grid]

    def measure(cell: Cell) -> Cell:
        read = measure_signals(cell, flags)
        return read if asked.signals_only else read | measure_attack(cell, flags, asked.out)

    return _measured(measure, cells, flags, asked)


def _measured(
    measure: Callable[[Cell], Cell], cells: Sequence[Cell], flags: Sequence[str], asked: argparse.Namespace
) -> list[Cell]:
    how = {"jobs": asked.jobs, "threads": asked.threads, "scheduler": asked.scheduler}
    return run_cells(measure, cells, flags, out=asked.out, **how)


if __name__ == "__main__":
    sys.exit(main())
