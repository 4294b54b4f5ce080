"""Tables that a run or a benchmark leaves, in CSV and markdown."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """The rows, their columns in the order in which they first appear; None becomes an empty cell."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns_of(rows))
        writer.writeheader()
        writer.writerows(rows)


def markdown(rows: Sequence[Mapping[str, object]]) -> str:
    """The rows as a markdown table, numbers to four digits."""
    names = columns_of(rows)
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(in_short(row.get(name)) for name in names) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def columns_of(rows: Sequence[Mapping[str, object]]) -> list[str]:
    """The names in any of the rows."""
    return list(dict.fromkeys(name for row in rows for name in row))


def in_short(value: object) -> str:
    """A cell's text for a person."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def aligned(rows: Sequence[Mapping[str, object]]) -> str:
    """The rows as a table for a terminal."""
    names = columns_of(rows)
    cells = [names, *([in_short(row.get(name)) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)
    return "\n".join(line.rstrip() for line in lines)
