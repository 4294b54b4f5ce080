"""Tables of results: docs/results.md and the README's are what the rows in results/data make, and nothing else."""

import re
import shlex
from dataclasses import replace

import pytest
from conftest import ROOT, resolved

import benchmark
from bench.beforehand import refuse_unknown
from bench.results_page import DATA, PAGES, beneath, marks, read_rows, results_page, table_text, with_tables
from bench.results_tables import OTHER_TABLES, TABLES, Table

SMALL = Table(
    "small", "What?", "This.", {"method": "`{method}`"}, {"PSNR": ("{psnr}", " ± {spread}")}, "B = {batch_size}"
)


def row(method="a", batch_size="1", psnr="30.0", commit="c2", date="2026-02-02 10:00", device="a core", **more):
    origin = {"command": f"python {method}.py", "commit": commit, "date": date, "device": device, "seconds": "1"}
    return {"method": method, "batch_size": batch_size, "psnr": psnr, "spread": "", "note": ""} | origin | more


def test_the_pages_are_what_make_docs_writes():
    assert (ROOT / "docs" / "results.md").read_text() == results_page()
    for page in PAGES:
        text = (ROOT / page).read_text()
        assert text == with_tables(text), page


def test_every_row_says_how_it_came_about():
    assert {file.stem for file in DATA.iterdir()} == {table.name for table in (*TABLES, *OTHER_TABLES)}
    for table in (*TABLES, *OTHER_TABLES):
        for one in read_rows(DATA, table.name):
            assert one["command"].startswith("python "), table.name
            assert re.fullmatch(r"[0-9a-f]{7,}", one["commit"])
            assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d", one["date"])
            assert one["device"]
            assert re.fullmatch(r"(\d+(\.\d+)?)?", one["seconds"])  # empty where they were never recorded


def test_every_command_is_one_that_its_program_takes():
    parser = benchmark.build_parser()
    for command in {one["command"] for table in (*TABLES, *OTHER_TABLES) for one in read_rows(DATA, table.name)}:
        _, script, *words = shlex.split(command)
        if script == "benchmark.py":
            asked, words = parser.parse_known_args(words)
            assert asked.out.name == "DIR"
            if asked.command != "speed":  # which has one network, and no attacks of others
                refuse_unknown(asked, words)
                continue
        elif script == "-m":
            assert words[0] == "bench.scale"
            continue
        else:
            assert script == "main_MAGIA_sel.py"
        resolved(*words)


def test_a_table_has_a_line_for_each_method_and_a_column_for_each_size():
    rows = [row(), row(batch_size="4", spread="0.5"), row("b", batch_size="4", psnr="9.9")]
    assert table_text(SMALL, rows).splitlines() == [
        "| method | B = 1 | B = 4 |",
        "|---|---|---|",
        "| `a` | 30.0 | 30.0 ± 0.5 |",
        "| `b` |  | 9.9 |",
    ]


def test_rows_of_another_commit_device_or_kind_are_marked_and_explained():
    rows = [
        row(),
        row("b", commit="c1", date="2026-01-01 10:00"),
        row("c", device="a GPU"),
        row("d", note="stopped"),
        row("e"),
    ]
    text, below = table_text(SMALL, rows), beneath(SMALL, rows)
    assert [line.split("|")[2].strip() for line in text.splitlines()[2:]] == [
        "30.0", "30.0 <sup>a</sup>", "30.0 <sup>b</sup>", "30.0 <sup>c</sup>", "30.0",
    ]  # fmt: skip
    assert "(../results/data/small.csv): commit `c2` of 2026-02-02, a core." in below
    assert [line for line in below.splitlines() if line.startswith("- ")] == [
        "- *a*: commit `c1` of 2026-01-01",
        "- *b*: a GPU",
        "- *c*: stopped",
    ]
    lines = table_text(replace(SMALL, across=""), rows).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["", "a", "b", "c", ""]


def test_rows_of_one_commit_and_device_have_no_marks():
    rows = [row(), row("b")]
    assert marks(rows) == {}
    assert "<sup>" not in table_text(SMALL, rows)


def test_two_rows_for_one_cell_are_an_error():
    with pytest.raises(ValueError, match=r"small\.csv: two rows for `a`"):
        table_text(SMALL, [row(), row(psnr="31.0")])


def test_a_page_without_a_place_and_a_place_without_a_table_are_errors():
    with pytest.raises(ValueError, match="no place for a table"):
        with_tables("# A page\n")
    with pytest.raises(ValueError, match="no table none"):
        with_tables("<!-- `make docs` makes none -->\n<!-- end -->\n")


def test_links_between_pages_lead_to_headings():
    pages = {page.name: page.read_text() for page in (ROOT / "docs").glob("*.md")}
    pages |= {"README.md": (ROOT / "README.md").read_text()}
    for name, text in pages.items():
        for target, anchor in re.findall(r"\]\((?:docs/)?([\w-]*\.md)?#([\w-]+)\)", text):
            headings = re.findall(r"^#+ (.*)$", pages[target or name], re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, (name, target, anchor)
