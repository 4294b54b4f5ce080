"""The row of an audit of many updates."""

import pytest

from bench import scale
from bench.results_page import read_rows
from bench.scale import check, fill, keep


def test_an_update_that_is_left_out_or_there_twice_is_no_row(tmp_path):
    inbox, table = tmp_path / "inbox", tmp_path / "table.csv"
    fill(inbox, 2)
    for names, said in (
        (["update0.npz", "update1.npz"], None),
        (["update0.npz"], "1 rows of 1 updates, and there were 2"),
        (["update0.npz", "update1.npz", "update1.npz"], "3 rows of 2 updates"),
    ):
        table.write_text("\n".join(["update", *names]) + "\n")
        if said is None:
            check(inbox, table, 0, "")
        else:
            with pytest.raises(ValueError, match=said):
                check(inbox, table, 0, "")
    with pytest.raises(ValueError, match="the audit failed: 1 of 2 cells failed"):
        check(inbox, table, 1, "a warning\n1 of 2 cells failed: why\n")


def test_a_row_takes_the_place_of_one_of_as_many_updates_and_workers(tmp_path):
    for updates, workers, seconds in ((8, 2, 1), (8, 3, 2), (8, 2, 3)):
        keep(tmp_path, {"updates": str(updates), "workers": str(workers), "seconds": str(seconds)})
    assert [row["seconds"] for row in read_rows(tmp_path, scale.TABLE)] == ["3", "2"]


@pytest.mark.long
def test_an_audit_that_loses_a_worker_is_a_row(tmp_path, capsys):
    assert scale.main(["--updates", "4", "--workers", "2", "--folder", str(tmp_path), "--machine", "here"]) == 0
    (row,) = read_rows(tmp_path, scale.TABLE)
    assert (row["updates"], row["workers"], row["device"]) == ("4", "2", "here")
    assert 2 <= int(row["killed_after"]) <= 4
    assert row["command"] == "python -m bench.scale --updates 4 --workers 2"
    assert all(float(row[name]) > 0 for name in ("audit_seconds", "again_seconds", "program_mib", "worker_mib"))
    assert "updates 4" in capsys.readouterr().out
