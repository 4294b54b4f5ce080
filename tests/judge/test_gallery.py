"""The gallery beside strange neighbours: they have no card, and cost a later run neither its end nor its time."""

import json
import os
import shutil
import struct
import time
import zlib

import pytest

from judge.gallery import PAGE, write_gallery
from judge.report import read_facts

NAME = "neighbour"


@pytest.fixture
def folder(cli):
    """A folder with a run, and a copy of it that a test damages."""
    shutil.copytree(cli("--n_iter", 1), cli.folder / NAME)
    return cli.folder


def with_facts(path, **facts):
    (path / "audit.json").write_text(json.dumps(read_facts(path) | facts))


def large(path):
    with (path / "audit.json").open("ab") as file:
        file.truncate(9_000_000_000)  # a hole: it takes no room on the disk


def deep(path):
    (path / "audit.json").write_text("[" * 1_000_000)


def deep_in_facts(path):
    text = json.dumps(read_facts(path))
    (path / "audit.json").write_text(text[:-1] + ', "more": ' + "[" * 100_000 + "]" * 100_000 + "}")


def huge_picture(path):
    png = path / "images" / "rec_000.png"
    content = bytearray(png.read_bytes())
    content[16:24] = struct.pack(">II", 60_000, 60_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    png.write_bytes(content)


def pipe(name):
    def damage(path):
        (path / name).unlink()
        os.mkfifo(path / name)

    return damage


def pipe_named(path):
    os.mkfifo(path / "pipe")
    with_facts(path, images=[{"reconstruction": "pipe"}])


def circle(path):
    (path / "audit.json").unlink()
    (path / "audit.json").symlink_to("audit.json")


HAS_NO_CARD = {
    "9 GB": large,
    "deep": deep,
    "deep in facts": deep_in_facts,
    "huge picture": huge_picture,
    "facts are a pipe": pipe("audit.json"),
    "report is a pipe": pipe("report.html"),
    "facts are a folder": lambda path: [(path / "audit.json").unlink(), (path / "audit.json").mkdir()],
    "circle": circle,
    "level is a list": lambda path: with_facts(path, verdict={"level": [], "headline": ""}),
    "not UTF-8": lambda path: (path / "audit.json").write_bytes(b"\xff\xfe{}"),
    "digits": lambda path: (path / "audit.json").write_text('{"schema": ' + "1" * 100_000 + "}"),
}


@pytest.mark.parametrize("damage", HAS_NO_CARD.values(), ids=HAS_NO_CARD)
def test_a_damaged_run_has_no_card_and_costs_nothing(folder, damage):
    damage(folder / NAME)
    started = time.perf_counter()
    write_gallery(folder)
    assert time.perf_counter() - started < 5
    page = (folder / PAGE).read_text()
    assert 'href="run/report.html"' in page
    assert NAME not in page


HAS_A_CARD = {
    "lone surrogate": lambda path: with_facts(path, verdict={"level": "none", "headline": "a \ud800 b"}),
    "long": lambda path: with_facts(path, verdict={"level": "none", "headline": "x" * 1_000_000}),
    "picture elsewhere": lambda path: with_facts(path, images=[{"reconstruction": "../run/images/rec_000.png"}]),
    "picture is a pipe": pipe("images/rec_000.png"),
    "names a pipe": pipe_named,
    "markup": lambda path: with_facts(path, defence="<script>"),
}


@pytest.mark.parametrize("damage", HAS_A_CARD.values(), ids=HAS_A_CARD)
def test_a_strange_run_has_a_card_that_is_safe(folder, damage):
    damage(folder / NAME)
    write_gallery(folder)
    page = (folder / PAGE).read_text(encoding="utf-8")
    assert f'href="{NAME}/report.html"' in page
    assert 'href="run/report.html"' in page
    assert len(page) < 30_000
    assert "../" not in page
    assert "<script" not in page


def test_a_name_that_is_not_utf_8_has_a_card(folder):
    os.rename(os.fsencode(folder / NAME), os.fsencode(folder) + b"/a\xff")
    write_gallery(folder)
    assert 'href="a%FF/report.html"' in (folder / PAGE).read_text(encoding="utf-8")


def test_a_run_ends_well_beside_them_all(cli):
    first = cli("--n_iter", 1)
    damages = HAS_NO_CARD | HAS_A_CARD
    for number, damage in enumerate(damages.values()):
        damage(shutil.copytree(first, cli.folder / f"copy{number}"))
    os.mkfifo(cli.folder / "pipe")
    cli("--n_iter", 1, "--quiet", name="last")
    assert cli.err == ""
    assert 'href="last/report.html"' in (cli.folder / PAGE).read_text(encoding="utf-8")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda page: os.symlink("index.html", page)])
def test_a_page_that_is_no_file_is_left_alone(cli, make):
    make(cli.folder / PAGE)
    before = os.lstat(cli.folder / PAGE)
    cli("--n_iter", 1)
    assert os.lstat(cli.folder / PAGE).st_ino == before.st_ino
