"""The figure that docs/defences.md begins with: the identification rate by defence and strength, for each network."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from bench.results_page import DATA, read_rows

TABLE = "identification"
FIGURE = DATA.parent / "figures" / f"{TABLE}.png"
ROW, WIDTH = 0.21, 3.3  # inches of a defence and of a panel
STYLES = {"magia --signals auto": ("o", "C3", "reading and loop"), "magia --signals off": ("x", "C0", "loop alone")}


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
        axis.set(title=network, xlim=(-0.05, 1.05), xlabel="identification rate")
        axis.grid(axis="y", color="0.9")
    axes[0].set_yticks(range(len(updates)), updates, fontsize=8)
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(STYLES), fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Draw the figure of today's rows."""
    plot_decision(read_rows(DATA, TABLE), FIGURE)
    print(FIGURE)


if __name__ == "__main__":
    main()
