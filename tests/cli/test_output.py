"""A terminal that is closed, full, or knows few characters costs a run none of its files."""

import io
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, SMALL

import main_MAGIA_sel as magia
from cli.output import LONGEST, LastingStream, lasting_output, one_line

FILES = {
    "audit.json", "checkpoint.pt", "comparison.png", "config.json", "curves.png", "history.gif", "images",
    "metrics.json", "original.png", "reconstruction.png", "report.html", "trace.csv", "truth",
}  # fmt: skip


class Full(io.TextIOBase):
    """A stream with no room left."""

    encoding = "utf-8"

    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def names_in(run):
    return {entry.name for entry in run.iterdir()}


@pytest.mark.parametrize("which", ["stdout", "stderr"])
@pytest.mark.parametrize("kind", ["full", "closed", "none"])
def test_a_run_is_whole_whatever_becomes_of_its_output(quick_pictures, tmp_path, monkeypatch, which, kind):
    closed = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    closed.close()
    monkeypatch.setattr(sys, which, {"full": Full(), "closed": closed, "none": None}[kind])
    status = magia.main([*SMALL, "--save_dir", str(tmp_path), "--run_name", "run"])
    assert status == int(which == "stdout" and kind != "none")  # the figures did not reach anybody
    assert names_in(tmp_path / "run") == FILES


def test_full_devices_of_a_real_process_cost_no_file(tmp_path):
    command = [sys.executable, ROOT / "main_MAGIA_sel.py", *SMALL, "--save_dir", tmp_path, "--run_name", "run"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert names_in(tmp_path / "run") == FILES


def test_characters_that_a_terminal_does_not_know_are_escaped():
    raw = io.BytesIO()
    stream = LastingStream(io.TextIOWrapper(raw, encoding="latin-1"))
    stream.write("± 1, 2², \u2588, \udcff")
    stream.flush()
    assert raw.getvalue().decode("latin-1") == "± 1, 2², \\u2588, \\udcff"
    assert not stream.has_failed


def test_bytes_in_a_path_that_are_no_utf8_cost_no_report(cli, tmp_path):
    name = os.fsdecode(b"b\xff\xc3")
    run = cli("--save_update", tmp_path / f"{name}.npz", name=name)
    assert names_in(run) == FILES
    assert json.loads((run / "audit.json").read_text())["run"] == name
    assert "\\udcff" in (run / "report.html").read_text(encoding="utf-8")
    assert "b%FF%C3/report.html" in (cli.folder / "index.html").read_text(encoding="utf-8")
    again = cli("--update", tmp_path / f"{name}.npz", name="again")
    assert names_in(again) >= FILES - {"original.png", "truth", "comparison.png"}


def test_streams_are_given_back_and_a_status_is_kept(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)

    @lasting_output
    def main(status):
        print("said")
        return status

    assert [main(0), main(2)] == [0, 2]
    assert sys.stdout is out
    assert out.getvalue() == "said\nsaid\n"


def test_a_message_is_one_line_of_bounded_length():
    assert one_line("a\n b  c") == "a b c"
    assert len(one_line("9" * 10**6)) < LONGEST + 10
