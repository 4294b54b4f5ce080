"""Leakage against the epsilon of differential privacy: the rows of results/data/epsilon.csv, and their figure.

    python -m bench.epsilons --data_path cifar10_test.npz
    python -m bench.epsilons --rows "example, LeNet" --data_path cifar10_test.npz
    python -m bench.docs

The noise of a row is the least with which one release of the update, without sampling, has the row's epsilon at DELTA
(`client.privacy.gaussian_multiplier`). --rows takes parts of the rows' names, as --list prints them. Each row is kept
as soon as it is measured. `bench.docs` draws the figure.
"""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.guesses import MEAN
from bench.local_training import CONVNET, RANDOM, TRUE
from bench.planned import Planned, measure_planned
from bench.results_page import DATA, read_rows
from client.privacy import gaussian_multiplier

TABLE = "epsilon"
FIGURE = DATA.parent / "figures" / f"{TABLE}.png"
COLUMNS = ("runs", "identification", "label_accuracy", "psnr", "psnr_spread", "ssim", "certified")
DELTA = 1e-5
UNLIMITED = "none"  # epsilon of an update without a defence
EPSILONS = ("10", "1e3", "1e4", "1e5", "1e6")
LEVELS = {"example": "dpsgd:1:{:.4g}", "client": "clip:1,noise:{:.4g}"}  # clipped to 1: the noise is the multiplier
PANELS = {"identification": "identification rate", "label_accuracy": "labels right", "psnr": "PSNR (dB)"}
LINES = {"example": "-", "client": "--"}
WIDTH, HEIGHT = 3.6, 3.4  # inches of a panel
SHARP = 40.0  # dB at which a panel ends: the eye sees no error there, and exact images have 100


class Network(NamedTuple):
    """A network of the figure: its name there, its name for --models, its flags, and batches of three seeds each."""

    name: str
    model: str
    flags: str
    batches: str = "0"

    def command(self, defence: str, attack: str) -> str:
        """That measures the row of a defence and an attack."""
        words = f'python benchmark.py defences --defences "{defence}" --presets "{attack}" --models "{self.model}"'
        runs = f"--batch_sizes 4 --batches {self.batches} --seeds 0,1,2 --max_evals 60"
        return f"{words} {runs} {self.flags} --out DIR"


NETWORKS = (
    Network("LeNet", "lenet", RANDOM, "0,1,2"),
    Network("MLP, ReLU", "mlp --activation relu", RANDOM),
    Network("ConvNet, trained", CONVNET.removeprefix("--model "), TRUE),
)


def defence_of(level: str, epsilon: float) -> str:
    """The defence with which one release has this epsilon at this level, at DELTA."""
    return LEVELS[level].format(gaussian_multiplier(epsilon, DELTA))


def _planned() -> Iterator[Planned]:
    for network, level in product(NETWORKS, LEVELS):
        for epsilon in EPSILONS:
            yield _row(level, network, epsilon, defence_of(level, float(epsilon)), "magia")
    for network, attack in product(NETWORKS, ("magia", MEAN)):
        yield _row(UNLIMITED, network, UNLIMITED, UNLIMITED, attack)


def _row(level: str, network: Network, epsilon: str, defence: str, attack: str) -> Planned:
    names = {"level": level, "network": network.name, "epsilon": epsilon, "attack": attack}
    says = {"defence": defence, "delta": f"{DELTA:g}", "batch_size": "4"}
    return Planned(TABLE, names, says, network.command(defence, attack))


PLANNED = list(_planned())


def plot_epsilons(rows: Sequence[Mapping[str, str]], path: Path) -> None:
    """A panel for each measure, a line for each network and level over epsilon; behind it the update without noise.

    Args:
        rows: of results/data/epsilon.csv.
        path: of the picture.
    """
    epsilons = sorted({row["epsilon"] for row in rows} - {UNLIMITED}, key=float)
    places = {epsilon: math.log10(float(epsilon)) for epsilon in epsilons}
    places[UNLIMITED] = max(places.values()) + 1
    figure = Figure(figsize=(WIDTH * len(PANELS), HEIGHT), layout="constrained")
    axes = figure.subplots(1, len(PANELS), squeeze=False)[0]
    for axis, (measure, title) in zip(axes, PANELS.items(), strict=True):
        for number, network in enumerate(dict.fromkeys(row["network"] for row in rows)):
            own = [row for row in rows if row["network"] == network]
            for level, style in LINES.items():
                line = [row for row in own if row["level"] in (level, UNLIMITED) and row["attack"] != MEAN]
                _draw(
                    axis, line, measure, places, color=f"C{number}", linestyle=style, label=f"{network}, {level} level"
                )
            for row in own:
                if row["attack"] == MEAN and row[measure]:
                    axis.axhline(float(row[measure]), color=f"C{number}", linestyle=":", linewidth=1)
        axis.set_xticks(list(places.values()), [*epsilons, "no noise"], fontsize=8)
        axis.set(title=title, xlabel="ε of one release")
        axis.grid(color="0.9")
        if measure != "psnr":
            axis.set_ylim(-0.03, 1.03)
        elif any(float(row[measure] or 0) > SHARP for row in rows):
            axis.set_ylim(top=SHARP)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=110)


def _draw(axis: Axes, rows: Sequence[Mapping[str, str]], measure: str, places: Mapping[str, float], **how: str) -> None:
    """One line, with bars of a standard deviation where the rows have one."""
    across, heights = [places[row["epsilon"]] for row in rows], [float(row[measure]) for row in rows]
    spread = [float(row.get(f"{measure}_spread") or 0) for row in rows]
    axis.errorbar(across, heights, spread if any(spread) else None, marker="o", markersize=3, capsize=2, **how)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Exit status: 0 done, 1 some rows failed, 2 wrong input."""
    return measure_planned("bench.epsilons", __doc__, PLANNED, COLUMNS, argv)


def draw() -> None:
    """Draw the figure of today's rows."""
    plot_epsilons(read_rows(DATA, TABLE), FIGURE)
    print(FIGURE)


if __name__ == "__main__":
    sys.exit(main())
