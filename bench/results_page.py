"""Tables of results, made of the rows in results/data: `make docs` writes docs/results.md and the other pages' tables.

Each CSV file is one table. Each row is one measurement: its subject, its figures, and its origin. `command` repeats the
row, `commit` is the version of the program that measured the row, `date` the time of that version (UTC), `device` the
machine, and `seconds` the duration. `bench.results_tables` says which columns a table shows. A row of another origin
than the table's usual one gets a letter, which is explained beneath the table.
"""

import csv
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Formatter
from string import ascii_lowercase as LETTERS

from bench.results_tables import AHEAD, ALONE, COMPARED, OTHER_TABLES, OTHERS_EXCEPT, TABLES, Table

Row = dict[str, str]

DATA = Path(__file__).parent.parent / "results" / "data"
# The columns of a row's origin that are told beneath a table, and their words.
TOLD = {"commit": "commit `{commit}` of {date:.10}", "device": "{device}", "note": "{note}"}
WIDTH = 112  # characters of a line, which a command's indent and backslash still lengthen
# A table's place in another page: `README` is the README's table, all others are those of OTHER_TABLES.
PLACE = re.compile(r"(<!-- `make docs` makes (\w+) -->\n).*?(<!-- end -->\n)", re.DOTALL)
# Pages that have such places.
PAGES = ("README.md", "docs/cluster.md", "docs/defences.md", "docs/local-training.md", "docs/networks.md")
HEADER = "| network | B | this program | its loop alone | MAGIA | best other | mean image | seconds |"


def read_rows(folder: Path, name: str) -> list[Row]:
    """The rows of results/data/NAME.csv, all values as text.

    Raises:
        OSError: there is no such file.
    """
    with (folder / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_rows(folder: Path, name: str, rows: Sequence[Row]) -> None:
    """Put the rows into results/data/NAME.csv, all of them or none; the columns are those of the first row."""
    path = folder / f"{name}.csv"
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)


def results_page(folder: Path = DATA) -> str:
    """docs/results.md: every table with the question it answers.

    Raises:
        OSError: a table's file is not there.
        ValueError: two rows of a table claim the same cell.
    """
    parts = [refilled(paragraph) for paragraph in AHEAD.strip().split("\n\n")]
    for table in TABLES:
        rows = read_rows(folder, table.name)
        parts += [f"## {table.title}", refilled(table.says), table_text(table, rows), beneath(table, rows)]
        parts += [table.pictures.strip()] if table.pictures else []
    return "\n\n".join(parts) + "\n"


def table_text(table: Table, rows: Sequence[Row]) -> str:
    """The rows as a markdown table: a line for each row, or, with `across`, a line for each text of `lines`.

    Raises:
        ValueError: two rows claim the same cell.
    """
    letters = marks(rows)
    if not table.across:
        lines = [["", *table.lines, *table.cells]]
        for row in rows:
            texts = (*table.lines.values(), *table.cells.values())
            lines.append([letters.get(how(row), ""), *(filled(parts, row) for parts in texts)])
        return markdown_table(lines if letters else [line[1:] for line in lines])
    (parts,) = table.cells.values()
    heads = list(dict.fromkeys(filled(table.across, row) for row in rows))
    grid: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        cells = grid.setdefault(tuple(filled(part, row) for part in table.lines.values()), {})
        head, letter = filled(table.across, row), letters.get(how(row))
        if head in cells:
            raise ValueError(f"{table.name}.csv: two rows for {' '.join(filled(p, row) for p in table.lines.values())}")
        cells[head] = filled(parts, row) + (f" <sup>{letter}</sup>" if letter else "")
    lines = [[*table.lines, *heads]]
    lines += [[*line, *(cells.get(head, "") for head in heads)] for line, cells in grid.items()]
    return markdown_table(lines)


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells, the first of them the heads, as a markdown table."""
    rows = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([rows[0], "|" + "---|" * len(lines[0]), *rows[1:]])


def filled(parts: str | Iterable[str], row: Mapping[str, str]) -> str:
    """Templates such as ("{psnr}", " ± {spread}") filled from a row; one that names an empty column is left out."""
    texts = []
    for part in (parts,) if isinstance(parts, str) else parts:
        names = [name for _, name, _, _ in Formatter().parse(part) if name]
        texts += [part.format(**row)] if all(row[name] for name in names) else []
    return "".join(texts)


def how(row: Mapping[str, str]) -> tuple[str, ...]:
    """A row's origin: the columns of TOLD, in words, empty where the row says nothing."""
    return tuple(filled(words, {"note": ""} | dict(row)) for words in TOLD.values())


def usual(rows: Sequence[Row]) -> tuple[str, ...]:
    """The origin of a table's rows without a letter: the newest commit, the commonest device, no note."""
    newest = max(rows, key=lambda row: row["date"])
    device = Counter(row["device"] for row in rows).most_common(1)[0][0]
    return how(newest | {"device": device, "note": ""})


def marks(rows: Sequence[Row]) -> dict[tuple[str, ...], str]:
    """A letter for each origin other than the usual one, in the order of the rows."""
    others = [way for way in dict.fromkeys(map(how, rows)) if way != usual(rows)]
    return {way: LETTERS[i % len(LETTERS)] * (i // len(LETTERS) + 1) for i, way in enumerate(others)}


def beneath(table: Table, rows: Sequence[Row]) -> str:
    """The text beneath a table: the rows' usual origin, the letters' meanings, and a command that repeats a row."""
    common = usual(rows)
    text = f"[{table.name}.csv](../results/data/{table.name}.csv): {', '.join(filter(None, common))}."
    parts = [refilled(text + (f" Each cell: {', '.join(table.cells)}." if table.across else ""))]
    if letters := marks(rows):
        lines = (refilled(f"- *{letter}*: {differing(way, common)}") for way, letter in letters.items())
        parts.append("\n".join(line.replace("\n", "\n  ") for line in lines))
    command = refilled(rows[0]["command"]).replace("\n", " \\\n      ")
    return "\n\n".join([*parts, "The first row again:", f"    {command}"])


def differing(way: Sequence[str], common: Sequence[str]) -> str:
    """The parts of an origin that differ from the usual one, in words."""
    return ", ".join(own for own, same in zip(way, common, strict=True) if own != same)


def refilled(text: str) -> str:
    """A paragraph with lines of at most WIDTH characters, its words never broken."""
    return textwrap.fill(" ".join(text.split()), WIDTH, break_long_words=False, break_on_hyphens=False)


def readme_table(folder: Path = DATA) -> str:
    """The README's table: PSNR in dB of this program, of others on the same updates, and of a guess.

    Rows with a note had another budget than their neighbours and are left out.

    Raises:
        OSError: a table's file is not there.
        KeyError: a network or batch size that the table is to show was not measured.
    """
    lines = [HEADER, "|" + "---|" * HEADER.count(" |")]
    for network, name, sizes in COMPARED:
        rows = read_rows(folder, name)
        for size in sizes:
            at = {row["method"]: row for row in rows if row["batch_size"] == str(size) and not row["note"]}
            others = [row for row in at.values() if not row["method"].startswith(OTHERS_EXCEPT) and not is_lost(row)]
            best = max(others, key=lambda row: float(row["psnr"]))
            shown = [at["magia"], at.get("magia --signals off"), at.get("paper_tuned"), best, at["mean_image"]]
            figures = " | ".join("" if row is None else "diverged" if is_lost(row) else row["psnr"] for row in shown)
            lines.append(f"| {network} | {size} | {figures} | {at['magia']['seconds']} |")
    for network, name, label, sizes in ALONE:
        rows = [row for row in read_rows(folder, name) if "--device cuda" not in row["command"]]
        at = {row["batch_size"]: row for row in rows if label in (row.get("network"), row.get("client"))}
        lines += [f"| {network} | {s} | {at[str(s)]['psnr']} | | | | | {at[str(s)]['seconds']} |" for s in sizes]
    return "\n".join(lines)


def is_lost(row: Mapping[str, str]) -> bool:
    """Whether all runs of a row diverged, so that its PSNR says nothing."""
    return bool(row["diverged"]) and row["diverged"] == row["runs"]


def with_tables(page: str, folder: Path = DATA) -> str:
    """The text of a page, with tables of today's rows in the places that the page names.

    Raises:
        ValueError: the page names no place, or a table that does not exist.
    """
    others = {table.name: table for table in OTHER_TABLES}

    def made(place: re.Match) -> str:
        begin, name, end = place.groups()
        if name != "README" and name not in others:
            raise ValueError(f"there is no table {name} for a page")
        if name == "README":
            return f"{begin}{readme_table(folder)}\n{end}"
        rows = read_rows(folder, name)
        return f"{begin}{table_text(others[name], rows)}\n\n{beneath(others[name], rows)}\n{end}"

    if not PLACE.search(page):
        raise ValueError("the page has no place for a table")
    return PLACE.sub(made, page)
