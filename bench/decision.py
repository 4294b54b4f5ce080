"""The figure that docs/defences.md begins with: the identification rate by defence and strength, for each network.

    python -m bench.decision --data_path cifar10_test.npz --weights_dir checkpoints
    python -m bench.decision --rows "ConvNet" --data_path cifar10_test.npz --weights_dir checkpoints
    python -m bench.docs

A row of results/data/identification.csv is a network, a defence, an attack, and the command that measures them. --rows
takes parts of the rows' names, as --list prints them. Each row is kept as soon as it is measured. `bench.docs` draws
the figure.
"""

import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from bench.local_training import CONVNET, RANDOM, RESNET, TRUE
from bench.planned import Planned, measure_planned
from bench.results_page import DATA, read_rows

TABLE = "identification"
FIGURE = DATA.parent / "figures" / f"{TABLE}.png"
COLUMNS = ("told_apart", TABLE, "bit_exact", "certified", "label_accuracy", "psnr")
ROW, WIDTH = 0.19, 2.1  # inches of a defence and of a panel
LETTERS = 26  # in a line of a panel's title
READ, LOOP, READING = "magia --signals auto", "magia --signals off", "reading"
STYLES = {  # marker, colour and name of an attack's identification rate, and of the share that a reading tells apart
    READ: ("o", "C3", "identified: reading and loop"),
    LOOP: ("x", "C0", "identified: loop alone"),
    READING: ("|", "C2", "told apart by the reading, with label"),
}
UPDATES = (
    "none", "float16", "int8", "noise:1e-3", "noise:1e-2", "noise:1e-1", "topk:0.1", "topk:0.01",
    "percentile:10,truncate:0.01", "truncate:1e-2", "truncate:1e-4", "svt:0.1:0.1:0.1:1e-5:1e-6",
    "localdp:1:1:1e4:1e-5", "localdp:1:1:1e3:1e-5", "dpsgd:1:1e-2", "dpsgd:1:1e-1", "sign", "--hidden=head",
)  # fmt: skip
SOME = (
    "none", "int8", "noise:1e-3", "noise:1e-2", "topk:0.1", "topk:0.01", "localdp:1:1:1e4:1e-5", "--hidden=head",
)  # fmt: skip
FEWER = ("none", "int8", "noise:1e-3", "topk:0.1", "topk:0.01", "--hidden=head")
BOTH = {READ: UPDATES, LOOP: UPDATES}


@dataclass(frozen=True)
class Victim:
    """A network of the figure: its name there, its name for --models, its flags, and the updates of each attack.

    The attacks have `evaluations`; a reading alone has none.
    """

    name: str
    model: str
    flags: str
    evaluations: int
    attacks: Mapping[str, Sequence[str]]

    def command(self, attack: str, update: str) -> str:
        """That measures the row."""
        how = f'--presets "{attack}"' if attack != READING else "--signals_only"
        words = f'python benchmark.py defences --defences="{update}" {how} --models "{self.model}" --batch_sizes 4'
        budget = f" --max_evals {self.evaluations}" if attack != READING else ""
        return f"{words} --batches 0 --seeds 0{budget} {self.flags} --out DIR"


RESNET_18 = RESNET.removeprefix("--model ")
VICTIMS = (
    Victim("MLP, ReLU", "mlp --activation relu", RANDOM, 300, BOTH),
    Victim("LeNet", "lenet", RANDOM, 300, BOTH),
    Victim("ConvNet, trained", CONVNET.removeprefix("--model "), TRUE, 100, {READ: SOME, LOOP: SOME}),
    Victim("ResNet-18, trained", RESNET_18, TRUE, 0, {READING: FEWER}),
    Victim(
        "ResNet-18, trained, BatchNorm in training mode", RESNET_18, f"{TRUE} --bn train", 0, {READING: FEWER}
    ),
)  # fmt: skip


def _planned() -> Iterator[Planned]:
    for victim in VICTIMS:
        for attack, updates in victim.attacks.items():
            for update in updates:
                names = {"update": update, "network": victim.name, "attack": attack}
                yield Planned(TABLE, names, {"batch_size": "4"}, victim.command(attack, update))


PLANNED = list(_planned())


def plot_decision(rows: Sequence[Mapping[str, str]], path: Path) -> None:
    """A panel for each network, a line for each defence in the order of the rows, a mark for each attack.

    Args:
        rows: of results/data/identification.csv.
        path: of the picture.
    """
    networks, updates = (list(dict.fromkeys(row[name] for row in rows)) for name in ("network", "update"))
    figure = Figure(figsize=(WIDTH * len(networks) + 2.4, ROW * len(updates) + 1.3), layout="constrained")
    axes = figure.subplots(1, len(networks), squeeze=False, sharey=True)[0]
    for axis, network in zip(axes, networks, strict=True):
        own = [row for row in rows if row["network"] == network]
        for style, (marker, color, name) in STYLES.items():
            points = [(share_of(row, style), updates.index(row["update"])) for row in own if is_shown(row, style)]
            across, heights = zip(*points, strict=True) if points else ((), ())
            axis.plot(across, heights, marker, color=color, label=name, fillstyle="none", linestyle="none")
        axis.set(xlim=(-0.05, 1.05), xlabel="share of the images")
        axis.set_title(textwrap.fill(network, LETTERS), fontsize=9)
        axis.grid(axis="y", color="0.9")
    axes[0].set_yticks(range(len(updates)), updates, fontsize=8)
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(STYLES), fontsize=8)
    figure.savefig(path, dpi=110)


def is_shown(row: Mapping[str, str], style: str) -> bool:
    """Whether a row has a mark of this style: an attack that reads has the reading's as well, where it was counted."""
    return row["attack"] == style or (style == READING and row["attack"] == READ and bool(row["told_apart"]))


def share_of(row: Mapping[str, str], style: str) -> float:
    """The share of the images that are identified, or that the reading has told apart."""
    return float(row["told_apart"]) / float(row["batch_size"]) if style == READING else float(row[TABLE])


def draw() -> None:
    """Draw the figure of today's rows."""
    plot_decision(read_rows(DATA, TABLE), FIGURE)
    print(FIGURE)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Exit status: 0 done, 1 some rows failed, 2 wrong input."""
    return measure_planned("bench.decision", __doc__, PLANNED, COLUMNS, argv)


if __name__ == "__main__":
    sys.exit(main())
