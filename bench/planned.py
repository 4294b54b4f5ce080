"""Rows that a program plans: their names, their commands, and one command line that measures the chosen ones."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.remeasure import device_of, measure, one_by_one, renewed, row_parser
from bench.results_page import Row, read_rows, write_rows


@dataclass(frozen=True)
class Planned:
    """One row of results/data/TABLE.csv, before it is measured.

    Attributes:
        table: the file's name.
        names: the columns that name the row; no two rows of a table have the same.
        says: further columns that are not measured.
        command: that measures the row.
    """

    table: str
    names: Mapping[str, str]
    says: Mapping[str, str]
    command: str

    @property
    def key(self) -> tuple[str, ...]:
        """The row's name in its table."""
        return tuple(self.names.values())

    def __str__(self) -> str:
        return f"{self.table}: {', '.join(self.key)}"


def measure_planned(
    prog: str, description: str, planned: Sequence[Planned], columns: Sequence[str], argv: Sequence[str] | None
) -> int:
    """Run a command line that measures planned rows. Exit status: 0 done, 1 some rows failed, 2 wrong input.

    Args:
        prog: the command, which its messages begin with.
        description: for --help.
        planned: every row, in the order of the tables.
        columns: that are measured.
        argv: the words of the command line; None: the process's own.
    """
    parser = row_parser(prog, description)
    parser.add_argument("--rows", nargs="+", default=[""], metavar="NAME", help="only rows whose name has one of these")
    parser.add_argument("--list", action="store_true", help="print the rows' names and commands, and stop")
    parser.add_argument("--data_path", type=Path, help="the file that stands for the .npz file of a command")
    parser.add_argument("--weights_dir", type=Path, help="the folder of the checkpoints (train_victim.py makes them)")
    asked = parser.parse_args(argv)
    chosen = [row for row in planned if any(text in str(row) for text in asked.rows)]
    if not chosen:
        print(f"{prog}: error: no row has {' or '.join(map(repr, asked.rows))}", file=sys.stderr)
        return 2

    def measured(row: Planned, origin: Row) -> None:
        print(f"{row}\n    {row.command}", flush=True)
        if asked.list:
            return
        figures = measure(row.command, asked.data_path, asked.weights_dir)
        empty = {**row.names, **row.says} | dict.fromkeys((*columns, "note"), "") | {"command": row.command}
        found = renewed(empty, figures) | origin | {"device": asked.machine or device_of(row.command)}
        keep(asked.folder, row, found, planned)

    return one_by_one(prog, chosen, measured)


def keep(folder: Path, row: Planned, found: Row, planned: Sequence[Planned]) -> None:
    """Put a measured row into its table, in the order of the plan, in the place of one of the same name.

    Rows that are no longer planned are left out.
    """
    try:
        held = {tuple(each[name] for name in row.names): each for each in read_rows(folder, row.table)}
    except (OSError, KeyError):  # no file yet, or one whose rows have other names
        held = {}
    held[row.key] = found
    every = [each.key for each in planned if each.table == row.table]
    write_rows(folder, row.table, [{name: held[key].get(name, "") for name in found} for key in every if key in held])
