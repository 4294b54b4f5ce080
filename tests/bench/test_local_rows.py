"""Rows of several local steps are measured singly, and kept in the order of their table."""

from bench import planned, remeasure
from bench.local_training import TABLES, main
from bench.results_page import read_rows

FIGURES = {"psnr_mean": 30.0, "label_accuracy": 1.0, "signals_found": 4, "seconds": 3.0, "unexplained": 0.01}
ORIGIN = {"commit": "c3", "date": "2026-03-03 10:00"}


def test_rows_are_measured_singly_and_kept_in_their_order(tmp_path, monkeypatch):
    monkeypatch.setattr(planned, "measure", lambda *_: FIGURES)
    monkeypatch.setattr(remeasure, "program", lambda: ORIGIN)
    words = ["--folder", str(tmp_path), "--machine", "a core", "--rows"]
    for name in ("5 steps at rate 0.001", "1 step at rate 0.001"):
        assert main([*words, name]) == 0
    rows = read_rows(tmp_path, "local_adam")
    assert [row["client"] for row in rows] == [TABLES["local_adam"][i].name for i in (0, 2)]
    assert (rows[0]["psnr"], rows[0]["labels_right"], rows[0]["unexplained"]) == ("30.0", "4", "1e-02")
    assert main([*words, "no such row"]) == 2


def test_every_row_of_a_table_is_another_client():
    for clients in TABLES.values():
        assert len({(client.name, client.images) for client in clients}) == len(clients)
