"""The measurements behind the tables and plots of docs/results.md and docs/defences.md.

    python benchmark.py grid --presets magia,paper --batch_sizes 4,8 --seeds 0,1 --max_evals 300 --out results/grid
    python benchmark.py signals --out results/signals      # images read from the head's gradient, against batch size
    python benchmark.py defences --out results/defences    # signals and images under defences
    python benchmark.py schedules --out results/schedules  # S(t) with and without the subset term, each to its end
    python benchmark.py tune --out results/tune            # settings, on images that no other command shows
    python benchmark.py speed --out results/speed          # time and memory of an evaluation, and their parts
    python benchmark.py audit --updates 'inbox/*.npz' --out results/audit  # many updates that came from outside

Every measurement is a grid of cells. A finished cell lies in OUT/cells as one JSON file and is not run again, so an
interrupted grid goes on where it stopped. A model or a preset may bring flags of its own, as in
--models "lenet,convnet --num_classes 10 --labels dataset --weights FILE"; further flags go to all runs.
"""

import argparse
import itertools
import shlex
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import main_MAGIA_sel as magia
from attack.prepare import INITS
from attack.published.presets import PRESETS
from bench.audits import add_audit, audits
from bench.batches import batch_indices
from bench.beforehand import flags_behind, mark, refuse_foreign, refuse_own, refuse_unfit, refuse_unknown
from bench.cells import FAILED, Cell, has_failed, run_cells
from bench.figures import (
    WALL,
    file_suffix,
    picture_wall,
    plot_grid,
    plot_signals,
    summarise,
    write_overview,
    write_table,
)
from bench.guesses import GUESSES, MEAN, PRIOR
from bench.measures import (
    DIVERGED,
    FIGURES,
    READ,
    mean_image_scores,
    measure,
    measure_signals,
    perceived,
    run_folder,
    truth_of,
)
from bench.networks import one_with_flags, own_flags, short_names
from bench.origin import loaded, origin
from bench.peers import PEERS
from bench.searches import SEARCHES, variants
from bench.speed import devices, speed
from bench.strengths import DEFENCES, NONE, plot_strengths, weakest, write_strengths
from cli.flags import OneLineParser, number
from cli.output import lasting_output, refused
from cli.runtime import INTERRUPTED, choose_device
from cli.settings import resolve
from data import LABEL_MODES, open_source
from judge.perceptual import Lpips
from network.zoo import MODELS
from schedules import MODES

ATTACKS = ("magia --signals auto", "magia --signals off")  # attacks of `defences`
ALPHAS = (0.999, 1.0)  # values of alpha in `schedules`: with the subset term and without
BATCH = ("batch_size", "labels", "model", "batch", "seed", "indices")  # entries of a cell that name its update
BUDGETS = ("max_evals", "max_seconds")

# ----------------------------------------------------------------------------------------------------
# The command line


def listed(kind: Callable[[str], object], choices: Sequence[str] = ()) -> Callable[[str], list]:
    """An argparse type: values between commas, each once, of this kind or among the choices."""

    def parse(text: str) -> list:
        values = list(dict.fromkeys(kind(part.strip()) for part in text.split(",")))
        for value in values:
            if choices and value not in choices:
                raise argparse.ArgumentTypeError(f"{value!r} is none of {', '.join(choices)}")
        return values

    return parse


def defence_words(text: str) -> list[str]:
    """An argparse type: words between blanks, each once."""
    if not text.split():
        raise argparse.ArgumentTypeError(f"no defence is named: {NONE!r} is the update as it is")
    return list(dict.fromkeys(text.split()))


SIZE, SECONDS = number(int, 1), number(float, 0, above=True)
Commands = argparse._SubParsersAction


def add(commands: Commands, name: str, text: str, batch_sizes: list[int]) -> argparse.ArgumentParser:
    """A subcommand with the flags that all subcommands of cells have."""
    command = commands.add_parser(name, help=text)
    command.add_argument("--batch_sizes", type=listed(SIZE), default=batch_sizes, metavar="LIST")
    command.add_argument(
        "--batches", type=listed(number(int, 0)), default=[0, 1, 2], metavar="LIST",
        help="which of the disjoint batches of each size; default 0,1,2",
    )  # fmt: skip
    command.add_argument("--seeds", type=listed(number(int, 0)), default=[0, 1, 2], metavar="LIST")
    command.add_argument("--labels", type=listed(str, LABEL_MODES), default=["random"], metavar="LIST")
    command.add_argument(
        "--models", type=listed(one_with_flags(MODELS, outside=True)), default=["lenet"], metavar="LIST",
        help="networks, each with flags of its own where needed; its --labels then stand alone",
    )  # fmt: skip
    return add_places(command)


def add_places(command: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The flags of where cells run, and where what they leave goes."""
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="where tables, plots and cells go")
    command.add_argument("--jobs", type=SIZE, default=1, metavar="N", help="cells at a time; default 1")
    command.add_argument("--threads", type=SIZE, metavar="N", help="of each process; default the cores shared out")
    command.add_argument("--scheduler", metavar="ADDRESS", help="run cells on this Dask cluster, tcp://host:8786 say")
    return command


def add_budget(command: argparse.ArgumentParser) -> None:
    """The flags that bound each run."""
    budget = command.add_mutually_exclusive_group()
    budget.add_argument(
        "--max_evals", type=listed(SIZE), default=[2500], metavar="LIST",
        help="closure evaluations that each run may take, one run for each number; default 2500",
    )  # fmt: skip
    budget.add_argument("--max_seconds", type=listed(SECONDS), metavar="LIST", help="wall time instead")


def add_lpips(command: argparse.ArgumentParser) -> None:
    """The flag of a measure whose weights the program does not bring."""
    command.add_argument(
        "--lpips", type=Path, metavar="FILE", help="weights of LPIPS, which is then measured (docs/benchmark.md)"
    )


def build_parser() -> OneLineParser:
    """The subcommands and their flags."""
    parser = OneLineParser(
        prog=Path(__file__).name, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, parser_class=OneLineParser)
    command = add(
        commands, "grid", "attacks, peers and guesses against each other on the same updates", [1, 4, 8, 16, 32]
    )
    rows = [*PRESETS, *GUESSES, PRIOR]
    command.add_argument("--presets", type=listed(one_with_flags(rows)), default=rows, metavar="LIST")
    command.add_argument("--peer", choices=PEERS, help="also run this package's attacks on the same updates")
    command.add_argument(
        "--peer_attacks", type=listed(str), metavar="LIST", help="which of them; default all that are known"
    )
    add_budget(command)
    add_lpips(command)
    command = add(commands, "signals", "images read from the head's gradient", [1, 2, 4, 8, 16, 24, 32])
    command.add_argument("--num_classes", type=listed(SIZE), default=[100, 10], metavar="LIST")
    command = add(commands, "defences", "what defences leave of signals and images", [8])
    command.add_argument(
        "--defences", type=defence_words, default=list(DEFENCES), metavar="'WORD WORD ...'",
        help="between blanks: each as --defence takes it, such as clip:1,noise:0.01, or a flag, such as --frozen=head",
    )  # fmt: skip
    command.add_argument("--presets", type=listed(one_with_flags(rows)), default=list(ATTACKS), metavar="LIST")
    command.add_argument("--signals_only", action="store_true", help="no images, signals alone: seconds, not minutes")
    add_lpips(command)
    command = add(commands, "schedules", "S(t) with the subset term and without, each run to its end", [16])
    command.add_argument("--schedules", type=listed(str, MODES), default=list(MODES), metavar="LIST")
    add_lpips(command)
    command = add(commands, "tune", "settings of attacks, on images that no table shows", [8])
    command.add_argument("--presets", type=listed(one_with_flags(SEARCHES)), default=list(SEARCHES), metavar="LIST")
    add_budget(command)
    add_lpips(command)
    command = commands.add_parser(
        "speed", help="time and memory of an evaluation, whole attacks, and a reading's stages"
    )
    command.add_argument("--batch_sizes", type=listed(SIZE), default=[4, 16, 64, 256], metavar="LIST")
    command.add_argument("--course", type=listed(SIZE), default=[16], metavar="LIST", help="B of whole attacks")
    command.add_argument("--reading", type=listed(SIZE), default=[4, 8, 16], metavar="LIST", help="B of readings")
    command.add_argument("--max_evals", type=SIZE, default=2500, metavar="N", help="of a whole attack; default 2500")
    command.add_argument(
        "--models", type=listed(one_with_flags(MODELS)), default=[], metavar="LIST",
        help="networks, each with flags of its own where needed; default the one of --model",
    )  # fmt: skip
    command.add_argument("--evaluations_only", action="store_true", help="no whole attacks and no readings")
    command.add_argument("--device", type=listed(str), default=devices(), metavar="LIST", help="default: all there are")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the tables go")
    add_places(add_audit(commands))
    return parser


@lasting_output
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Exit status: 0 done, 1 some cells failed, 2 wrong input, 130 interrupted."""
    asked, flags = build_parser().parse_known_args(argv)
    try:
        refuse_own(flags, asked.command)
        refuse_foreign(asked.out)
        if asked.command == "speed":
            for device in asked.device:
                choose_device(device)
            mark(asked.out, origin())
            speed(asked, flags)
            print((asked.out / "speed.md").read_text(), end="")
            return 0
        refuse_unknown(asked, flags)
        if asked.scheduler is None and asked.command != "audit":  # devices and files of a cluster's workers are theirs
            networks = [["--model", *shlex.split(text)] for text in asked.models]
            every = [resolve([*words, *flags], magia.FLAGS)[0] for words in (*networks, *flags_behind(asked))]
            refuse_unfit(every, len(networks), asked.num_classes if asked.command == "signals" else [None])
        rows = COMMANDS[asked.command](asked, flags)
    except (ValueError, OSError) as error:
        return refused(Path(__file__).name, error)
    except KeyboardInterrupt:
        print("interrupted: finished cells are kept, the same command goes on from there", file=sys.stderr)
        return INTERRUPTED
    write_table(rows, asked.out / "table")
    print((asked.out / "table.md").read_text(), end="")
    failed = [row for row in rows if has_failed(row)]
    if failed:
        why = str(failed[0]["status"]).removeprefix(FAILED)
        print(f"{len(failed)} of {len(rows)} cells failed: {why}", file=sys.stderr)
    return int(bool(failed))


# ----------------------------------------------------------------------------------------------------
# The comparisons


def victims(asked: argparse.Namespace, flags: Sequence[str], *, tuning: bool = False) -> list[Cell]:
    """A cell for every network, batch size, batch and seed: images, weights and labels differ."""
    settings, _ = resolve(flags, magia.FLAGS)
    count = len(open_source(settings.dataset, settings.data_path))
    cells = []
    for size, model in itertools.product(asked.batch_sizes, asked.models):
        own = own_flags(model).get("labels")
        for labels, batch, seed in itertools.product([own] if own else asked.labels, asked.batches, asked.seeds):
            indices = batch_indices(batch, size, count, tuning=tuning)
            cells.append(dict(zip(BATCH, (size, labels, model, batch, seed, indices), strict=True)))
    return cells


def budgets(asked: argparse.Namespace) -> tuple[str, list]:
    """The name of the runs' budget, and its values."""
    return ("max_seconds", asked.max_seconds) if asked.max_seconds else ("max_evals", asked.max_evals)


def grid(asked: argparse.Namespace, flags: Sequence[str]) -> list[Cell]:
    """The rows of `grid`; it also writes means over batches and seeds, an overview, plots, and walls of pictures.

    Raises:
        ValueError: a peer is not installed or has no such attack, or a peer has a budget of seconds.
    """
    budget, values = budgets(asked)
    attacks = [*asked.presets, *peer_attacks(asked)]
    each = itertools.product(attacks, victims(asked, flags), values)
    cells = [victim | {"preset": attack, budget: value} for attack, victim, value in each]
    rows, lines = compared(cells, flags, asked, ("preset", "batch_size", "labels", "model", budget))
    write_overview(lines, budget, asked.out / "overview.md")
    plot_grid(lines, budget, asked.out)
    names = short_names(asked.models)
    for model in asked.models:
        write_wall(
            [cell for cell in cells if cell["model"] == model], flags, asked.out, file_suffix(names[model], lines)
        )
    return rows


def compared(
    cells: Sequence[Cell], flags: Sequence[str], asked: argparse.Namespace, names: Sequence[str]
) -> tuple[list[Cell], list[Cell]]:
    """The rows of attacks, and their means over all rows that agree in `names`, also written to summary.csv and .md.

    Raises:
        StorageError: --lpips is no file of its weights.
    """
    distance = Lpips.load(asked.lpips) if asked.lpips else None
    if distance is None:
        print("no LPIPS: --lpips names no file of its weights (docs/benchmark.md#lpips)", file=sys.stderr)
    figures = (*FIGURES, "status")
    measured = _measured(partial(measure, flags=flags, out=asked.out), figures, cells, flags, asked)
    front = [name for name in names if name not in BUDGETS]
    columns = (*front, "batch", "seed", *figures, *(name for name in names if name in BUDGETS))
    rows = [{name: row.get(name) for name in columns} for row in measured]
    rows = [row | perceived(cell, flags, asked.out, distance) for row, cell in zip(rows, cells, strict=True)]
    counted = [row | worth(row, cell, flags, distance) for row, cell in zip(rows, cells, strict=True)]
    lines = summarise(counted, names)
    write_table(lines, asked.out / "summary")
    return rows, lines


def worth(row: Cell, cell: Cell, flags: Sequence[str], distance: Lpips | None) -> Cell:
    """A row's part in a mean: a run that failed or diverged counts with the figures of the mean image."""
    if not (has_failed(row) or row["status"] == DIVERGED):
        return {"lost": False}
    try:
        return {"lost": True} | mean_image_scores(cell, flags, distance)
    except (ValueError, OSError):  # the images are missing too
        return {"lost": True, "psnr_mean": None, "ssim_mean": None}


def write_wall(cells: Sequence[Cell], flags: Sequence[str], out: Path, suffix: str) -> None:
    """Write a network's picture wall, of the first labels, batch, seed and budget, at the size that best fills a row.

    `suffix` is the ending of the file's name.
    """
    alike = [cell for cell in cells if cell.items() >= {k: cells[0][k] for k in ("labels", "batch", "seed")}.items()]
    ran = [cell for cell in alike if (run_folder(cell, flags, out) / "metrics.json").is_file()]
    if not ran:
        return
    shown = min(ran, key=lambda cell: (cell["batch_size"] < WALL, abs(cell["batch_size"] - WALL)))
    beside = [cell for cell in ran if cell == shown | {"preset": cell["preset"]}]
    runs = {cell["preset"]: run_folder(cell, flags, out) for cell in beside}
    picture_wall(truth_of(shown, flags).images, runs, out / f"wall{suffix}.png")


def peer_attacks(asked: argparse.Namespace) -> list[str]:
    """The names of the peer's attacks that were asked for, each behind the package's name."""
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


def signals(asked: argparse.Namespace, flags: Sequence[str]) -> list[Cell]:
    """The rows of `signals`; it also writes a plot, signals.png."""
    cells = []
    for victim in victims(asked, flags):
        own = own_flags(str(victim["model"])).get("num_classes")
        cells += [victim | {"num_classes": classes} for classes in ([int(own)] if own else asked.num_classes)]
    rows = read_signals(cells, flags, asked, ("model", "num_classes", "labels", "batch_size"))
    plot_signals([row for row in rows if not has_failed(row)], asked.out / "signals.png")
    return rows


def read_signals(
    cells: Sequence[Cell], flags: Sequence[str], asked: argparse.Namespace, names: Sequence[str]
) -> list[Cell]:
    """Rows of searches for signals, the columns of `names` in front."""
    rows = _measured(partial(measure_signals, flags=flags), READ, cells, flags, asked)
    front = (*names, "batch", "seed")
    return [
        {name: row[name] for name in front} | {name: value for name, value in row.items() if name not in BATCH}
        for row in rows
    ]


def defences(asked: argparse.Namespace, flags: Sequence[str]) -> list[Cell]:
    """The rows of `defences`: signals alone, or whole attacks beside the mean image; it also writes means and plots."""
    each = list(itertools.product(asked.defences, victims(asked, flags)))
    if asked.signals_only:
        cells = [victim | {"defence": defence} for defence, victim in each]
        return read_signals(cells, flags, asked, ("model", "defence", "labels", "batch_size"))
    cells = [
        victim | {"preset": attack, "defence": defence}
        for (defence, victim), attack in itertools.product(each, dict.fromkeys([*asked.presets, MEAN]))
    ]
    rows, lines = compared(cells, flags, asked, ("model", "labels", "batch_size", "defence", "preset"))
    write_strengths(lines, asked.out / "overview.md")
    plot_strengths(lines, asked.out)
    write_table(weakest(lines), asked.out / "weakest")
    return rows


def schedules(asked: argparse.Namespace, flags: Sequence[str]) -> list[Cell]:
    """The rows of `schedules`: every S(t) with the subset term and without, for all its steps."""
    each = itertools.product(asked.schedules, ALPHAS, victims(asked, flags))
    cells = [
        victim | {"preset": "magia --signals off", "sel_mode": mode, "alpha": alpha} for mode, alpha, victim in each
    ]
    return compared(cells, flags, asked, ("model", "labels", "batch_size", "sel_mode", "alpha"))[0]


def tune(asked: argparse.Namespace, flags: Sequence[str]) -> list[Cell]:
    """The rows of `tune`: each attack with each value of each searched setting; the summary has the best first."""
    budget, values = budgets(asked)
    tried = []
    for preset in asked.presets:
        tried += variants(preset, resolve(["--preset", *shlex.split(preset), *flags], magia.FLAGS)[0])
    each = itertools.product(dict.fromkeys(tried), victims(asked, flags, tuning=True), values)
    cells = [victim | {"preset": attack, budget: value} for attack, victim, value in each]
    rows, lines = compared(cells, flags, asked, ("preset", "batch_size", "labels", "model", budget))
    order = list(asked.presets)
    lines.sort(key=lambda line: (order.index(_searched(line, order)), -(line["psnr_mean"] or 0)))
    write_table(lines, asked.out / "summary")
    return rows


def _searched(line: Cell, presets: Sequence[str]) -> str:
    """The longest of the presets of which a line's preset is a variant."""
    return max((preset for preset in presets if str(line["preset"]).startswith(preset)), key=len)


def _measured(
    measured: Callable[[Cell], Cell],
    figures: Collection[str],
    cells: Sequence[Cell],
    flags: Sequence[str],
    asked: argparse.Namespace,
) -> list[Cell]:
    """The cells with their measured figures, networks by short names; origin.json has their origin."""
    how = {"figures": figures, "jobs": asked.jobs, "threads": asked.threads, "scheduler": asked.scheduler}
    made_by = origin(files_read(asked, flags))
    rows = run_cells(measured, cells, flags, out=asked.out, origin=made_by, loaded=loaded, **how)
    mark(asked.out, made_by)
    names = short_names(asked.models)
    return [row | {"model": names[str(row["model"])]} for row in rows]


def files_read(asked: argparse.Namespace, flags: Sequence[str]) -> Iterator[Path]:
    """The checkpoints, and the files and folders of images, that the cells read; they are part of a cell's origin."""
    for words in flags_behind(asked):
        settings, _ = resolve([*words, *flags], magia.FLAGS)
        images = settings.data_path if settings.dataset in ("folder", "npz") else None
        start = settings.init if settings.init not in INITS else None
        yield from (Path(name) for name in (settings.weights, images, start) if name and Path(name).exists())


COMMANDS = {
    "grid": grid, "signals": signals, "defences": defences, "schedules": schedules, "tune": tune, "audit": audits,
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
