"""Many updates from outside, audited in one go."""

import csv
import json

import pytest
from inbox import QUICKLY, inbox

import benchmark
from bench import audits
from judge import gallery

pytestmark = pytest.mark.usefixtures("quick_pictures")


def audit(pattern, out, *words, expect=0):
    status = benchmark.main(["audit", "--updates", str(pattern), "--out", str(out), *words])
    assert status == expect
    with (out / "table.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_update_has_one_row_and_one_report(tmp_path, capsys):
    folder = inbox(tmp_path / "inbox" / "monday", 2)
    (folder / "torn.npz").write_bytes(b"PK")
    out = tmp_path / "out"
    rows = audit(tmp_path / "inbox" / "**" / "*.npz", out, *QUICKLY, expect=1)
    assert [row["update"] for row in rows] == ["client0.npz", "client1.npz", "torn.npz"]
    assert [row["batch_size"] for row in rows] == ["1", "2", ""]
    assert [row["signals_found"] for row in rows] == ["1", "2", ""]
    assert [row["certain"] for row in rows] == ["1", "2", ""]
    assert rows[0]["verdict"] in ("read", "apart")
    assert rows[2]["status"].startswith("failed: ")
    assert "torn.npz" in rows[2]["status"]
    runs = [path for path in (out / "runs").iterdir() if path.is_dir() and not path.name.startswith(".")]
    assert len([path for path in runs if (path / "report.html").is_file()]) == 2
    page = (out / "runs" / "index.html").read_text()
    assert page.count("report.html") >= 2
    said = capsys.readouterr()
    assert f"gallery: {out / 'runs' / 'index.html'}" in said.out
    assert "1 of 3 cells failed" in said.err

    assert "3 updates: 2 read in closed form, 1 failed" in said.out
    times = {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}
    (folder / "torn.npz").unlink()
    (folder / "client2.npz").write_bytes((folder / "client0.npz").read_bytes())
    rows = audit(folder / "*.npz", out, *QUICKLY)
    assert [row["update"] for row in rows] == ["client0.npz", "client1.npz", "client2.npz"]
    assert [path for path, time in times.items() if path.stat().st_mtime_ns != time] == []  # no update anew


def test_the_gallery_is_written_once_in_the_end_also_of_an_interrupted_audit(tmp_path, monkeypatch):
    folder, out, written = inbox(tmp_path / "inbox", 2), tmp_path / "out", []
    words = [*QUICKLY, "--signals", "off"]
    measured, page = audits.measure_audit, gallery.gallery_page
    monkeypatch.setattr(gallery, "gallery_page", lambda folder: written.append(folder) or page(folder))

    def interrupted(cell, **how):
        if cell["name"] == "client0":
            raise KeyboardInterrupt
        return measured(cell, **how)

    monkeypatch.setattr(audits, "measure_audit", interrupted)
    assert benchmark.main(["audit", "--updates", str(folder / "*.npz"), "--out", str(out), *words]) == 130
    assert written == [out / "runs"]
    assert "client1" in (out / "runs" / "index.html").read_text()
    monkeypatch.setattr(audits, "measure_audit", measured)
    assert len(audit(folder / "*.npz", out, *words)) == 2
    assert written == [out / "runs"] * 2
    assert "client0" in (out / "runs" / "index.html").read_text()


def test_updates_are_in_the_order_of_their_numbers(tmp_path):
    names = ["client1.npz", "client2.npz", "client10.npz", "day2/client1.npz", "day10/client1.npz"]
    for name in reversed(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = audits.files_of(f"{tmp_path}/**/*.npz")
    assert [str(path.relative_to(tmp_path)) for path in found] == names


def test_flags_go_to_every_audit(tmp_path):
    (row,) = audit(inbox(tmp_path / "inbox", 1) / "*.npz", tmp_path / "out", *QUICKLY, "--signals", "off")
    assert (row["signals_found"], row["evaluations"] != "0") == ("0", True)
    (cell,) = (tmp_path / "out" / "cells").iterdir()
    assert json.loads(cell.read_text())["status"] == "n_iter"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--updates", "nowhere/*.npz"], "--updates nowhere/*.npz: no file fits"),
        ([], "--updates"),
        (["--updates", "x", "--save_update", "y.npz"], "--save_update"),
    ],
)
def test_errors_name_the_value(tmp_path, capsys, words, said):
    try:
        status = benchmark.main(["audit", *words, "--out", str(tmp_path / "out")])
    except SystemExit as stop:
        status = stop.code
    err = capsys.readouterr().err
    assert (status, err.count("\n")) == (2, 1)
    assert said in err
