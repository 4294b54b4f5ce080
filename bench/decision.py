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
from itertools import product
from pathlib import Path

from matplotlib.figure import Figure

from bench.local_training import CONVNET, RANDOM, RESNET, TRUE
from bench.planned import Planned, measure_planned
from bench.results_page import DATA, read_rows

TABLE = "identification"
FIGURE = DATA.parent / "figures" / f"{TABLE}.png"
COLUMNS = ("told_apart", TABLE, "bit_exact", "certified", "label_accuracy", "psnr")
ROW, WIDTH = 0.19, 2.3  # inches of a defence and of a panel
LETTERS = 26  # in a line of a panel's title
STYLES = {"magia --signals auto": ("o", "C3", "reading and loop"), "magia --signals off": ("x", "C0", "loop alone")}
UPDATES = (
    "none", "float16", "int8", "noise:1e-3", "noise:1e-2", "noise:1e-1", "topk:0.1", "topk:0.01", "topk:0.001",
    "percentile:10,truncate:0.01", "truncate:1e-2", "truncate:1e-3", "truncate:1e-4", "svt:0.1:0.1:0.1:1e-5:1e-6",
    "localdp:1:1:1e4:1e-5", "localdp:1:1:1e3:1e-5", "localdp:1:1:100:1e-5", "dpsgd:1:1e-3", "dpsgd:1:1e-2",
    "dpsgd:1:1e-1", "sign", "--hidden=head",
)  # fmt: skip


@dataclass(frozen=True)
class Victim:
    """A network of the figure: its name there, its name for --models, further flags, evaluations, and B."""

    name: str
    model: str
    flags: str
    evaluations: int
    images: int = 4
    updates: tuple[str, ...] = UPDATES


IN_TRAINING = tuple(
    update for update in UPDATES if not update.startswith("dpsgd")
)  # it needs each image's own gradient
VICTIMS = (
    Victim("MLP, ReLU", "mlp --activation relu", RANDOM, 300),
    Victim("LeNet", "lenet", RANDOM, 300),
    Victim("ConvNet, trained", CONVNET.removeprefix("--model "), TRUE, 200),
    Victim("ResNet-18, trained", RESNET.removeprefix("--model "), TRUE, 100),
    Victim(
        "ResNet-18, trained, BatchNorm in training mode", RESNET.removeprefix("--model "), f"{TRUE} --bn train", 100,
        updates=IN_TRAINING,
    ),
)  # fmt: skip


def _planned() -> Iterator[Planned]:
    for victim in VICTIMS:
        for update, attack in product(victim.updates, STYLES):
            command = (
                f'python benchmark.py defences --defences "{update}" --presets "{attack}" --models "{victim.model}" '
                f"--batch_sizes {victim.images} --batches 0 --seeds 0 --max_evals {victim.evaluations} {victim.flags} "
                "--out DIR"
            )
            names = {"update": update, "network": victim.name, "attack": attack}
            yield Planned(TABLE, names, {"batch_size": str(victim.images)}, command)


PLANNED = list(_planned())


def plot_decision(rows: Sequence[Mapping[str, str]], path: Path) -> None:
    """A panel for each network, a line for each defence in the order of the rows, a mark for each attack.

    Args:
        rows: of results/data/identification.csv.
        path: of the picture.
    """
    networks, updates = (list(dict.fromkeys(row[name] for row in rows)) for name in ("network", "update"))
    figure = Figure(figsize=(WIDTH * len(networks) + 2.4, ROW * len(updates) + 1.1), layout="constrained")
    axes = figure.subplots(1, len(networks), squeeze=False, sharey=True)[0]
    for axis, network in zip(axes, networks, strict=True):
        for attack, (marker, color, name) in STYLES.items():
            own = [row for row in rows if (row["network"], row["attack"]) == (network, attack)]
            heights = [updates.index(row["update"]) for row in own]
            axis.plot([float(row[TABLE]) for row in own], heights, marker, color=color, label=name, fillstyle="none")
        axis.set(xlim=(-0.05, 1.05), xlabel="identification rate")
        axis.set_title(textwrap.fill(network, LETTERS), fontsize=9)
        axis.grid(axis="y", color="0.9")
    axes[0].set_yticks(range(len(updates)), updates, fontsize=8)
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(STYLES), fontsize=8)
    figure.savefig(path, dpi=110)


def draw() -> None:
    """Draw the figure of today's rows."""
    plot_decision(read_rows(DATA, TABLE), FIGURE)
    print(FIGURE)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Exit status: 0 done, 1 some rows failed, 2 wrong input."""
    return measure_planned("bench.decision", __doc__, PLANNED, COLUMNS, argv)


if __name__ == "__main__":
    sys.exit(main())
