"""The table of torchvision's families is made by a command."""

import pytest

from bench import families, remeasure
from bench.families import FAMILIES, TABLE
from bench.results_page import read_rows

FIGURES = {
    "signals_found": 2, "label_accuracy": 0.5, "seconds": 12.4, "ended_by": "max_evals", "psnr_mean": 11.0,
    "levels": {"exact": 0, "recognisable": 0, "traces": 1, "none": 1},
    "layers": [
        {"layer": "features.0.0", "uncertainty": None}, {"layer": "features.11.block.2.fc1", "uncertainty": 1e-5},
        {"layer": "features.11.block.3.0", "uncertainty": 1e-5}, {"layer": "classifier.0", "uncertainty": 1e-6},
    ],
}  # fmt: skip


@pytest.fixture
def measured(monkeypatch):
    monkeypatch.setattr(remeasure, "program", lambda: {"commit": "c3", "date": "2026-03-03 10:00"})
    monkeypatch.setattr(families, "measure", lambda *_: FIGURES)


def test_every_family_has_a_row_in_its_place(measured, tmp_path):
    for name in ("squeezenet", "mobilenet_v3", "squeezenet"):
        assert families.main(["--rows", name, "--folder", str(tmp_path), "--machine", "a core"]) == 0
    first, second = read_rows(tmp_path, TABLE)
    assert (first["family"], second["family"]) == ("MobileNetV3", "SqueezeNet")
    assert first["deepest"] == "classifier.0"
    assert first["reached"] == "features.11.block.3.0"
    assert first["better"] == "1 of 2"
    assert first["only_run"] == ""
    assert second["only_run"].startswith("all of it (the last stage, classifier.3, is not linear")
    assert second["labels_right"] == "1"
    assert second["exact_psnr"] == ""


def test_a_run_that_fails_leaves_the_table(measured, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise ValueError("no room")

    monkeypatch.setattr(families, "measure", fail)
    assert families.main(["--rows", "squeezenet", "--folder", str(tmp_path)]) == 1
    assert "squeezenet1_1: no room" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_wrong_rows_are_one_line(tmp_path, capsys):
    assert families.main(["--rows", "lenet5", "--folder", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_all_families_of_torchvision_are_there():
    assert len({each.family for each in FAMILIES}) == 21
