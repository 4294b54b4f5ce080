"""--audit: the attack again under each of the nearest defences, and what would stop it."""

import shlex

import pytest
from conftest import CPU, SMALL, config_of, generator, metrics_of, resolved, without_times

import main_MAGIA_sel as magia
from cli import audit
from cli.audit import NEAREST, relative_change
from cli.victim import victim
from client.defences import defend_received
from judge.gallery import PAGE
from judge.report import read_facts
from judge.run_directory import DEFENDED

FEW = ("float16", "topk:0.1")


@pytest.fixture(autouse=True)
def _few(monkeypatch):
    monkeypatch.setattr(audit, "NEAREST", FEW)


def rows_of(run):
    return {row["defence"]: row for row in read_facts(run)["defences"]["rows"]}


def test_the_nearest_defences_can_all_be_applied():
    plain = victim(resolved("--batch_size", 2, "--image_size", 16), CPU)[0]
    changes = {name: relative_change(plain, defend_received(plain, name, generator=generator())) for name in NEAREST}
    assert relative_change(plain, plain) == 0
    with pytest.raises(ValueError, match="clients' images"):
        defend_received(plain, "secure_sum:2")
    assert all(change > 0 for change in changes.values())
    assert changes["noise:1e-2"] == pytest.approx(10 * changes["noise:1e-3"])


def test_each_defence_has_a_run_and_a_row(cli):
    run = cli("--audit")
    facts, rows = read_facts(run), rows_of(run)
    assert list(rows) == list(FEW)
    assert facts["defences"]["conclusion"] == cli.out.splitlines()[-1]
    page = (run / "report.html").read_text()
    assert "What would stop it" in page
    for defence, name in (("float16", "float16"), ("topk:0.1", "topk_0.1")):
        folder = run / DEFENDED / name
        assert rows[defence]["run"] == f"{DEFENDED}/{name}"
        assert f'href="{DEFENDED}/{name}/report.html"' in page
        assert rows[defence]["psnr_mean"] == metrics_of(folder)["psnr_mean"]
        assert rows[defence]["identification"] == metrics_of(folder)["identification"]
        assert rows[defence]["level"] == read_facts(folder)["verdict"]["level"]
        assert read_facts(folder)["defences"] is None
        assert config_of(folder)["defence"] == defence
        assert rows[defence]["pictures"]
        assert all((run / picture).is_file() for picture in rows[defence]["pictures"])
    assert rows["float16"]["change"] < rows["topk:0.1"]["change"]
    assert (cli.folder / PAGE).read_text().count("report.html") == 1


def test_a_run_of_an_audit_is_the_one_that_its_own_command_makes(cli, tmp_path):
    run = cli("--audit", "--seed", 3, "--max_evals", 20)
    inside = run / DEFENDED / "topk_0.1"
    program, *words = shlex.split(config_of(inside)["command"])[1:]
    assert program == "main_MAGIA_sel.py"
    assert magia.main([*words, "--save_dir", str(tmp_path / "again")]) == 0
    assert without_times(inside) == without_times(tmp_path / "again" / "topk_0.1")
    assert metrics_of(inside)["evaluations"] <= 20


def test_an_attack_that_breaks_down_on_a_defence_is_a_result(cli, monkeypatch):
    monkeypatch.setattr(audit, "NEAREST", ("noise:1e30",))
    row = rows_of(cli("--audit"))["noise:1e30"]
    assert row["level"] == "failed"
    assert row["note"] == "the attack broke down on it"
    assert "No defence was tried to the end" in cli.out or "nothing for one to stop" in cli.out


def test_a_defence_that_cannot_be_applied_has_its_reason(cli, monkeypatch):
    monkeypatch.setattr(audit, "NEAREST", ("noise:1e308", "float16"))
    run = cli("--audit")
    row = rows_of(run)["noise:1e308"]
    assert row["level"] is None
    assert "not finite" in row["note"]
    assert "not finite" in (run / "report.html").read_text()
    assert rows_of(run)["float16"]["level"]


def test_an_update_without_its_truth_is_judged_by_its_own_evidence(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(audit, "NEAREST", ("topk:0.1",))
    path = tmp_path / "update.npz"
    cli("--labels", "unique", "--model", "lenet5", "--save_update", path)
    run = cli("--update", path, "--signals", "auto", "--audit", name="theirs")
    facts, rows = read_facts(run), rows_of(run)
    assert not facts["truth_known"]
    assert facts["verdict"]["level"] == facts["defences"]["undefended"]["level"] == "apart"
    row = rows["topk:0.1"]
    assert row["level"] in ("apart", "same", "other")
    assert -1 <= row["likeness"] <= 1
    assert row["psnr_mean"] is None
    page = (run / "report.html").read_text()
    assert "own evidence" in page
    assert "PSNR" not in page


def test_an_interrupted_audit_shows_what_it_has_and_goes_on(cli, monkeypatch):
    whole = cli("--audit", name="whole")
    step = magia.magia_step
    left = [4 + 1]  # all steps of the first run, and one of the second

    def stopped(*arguments):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return step(*arguments)

    monkeypatch.setattr(magia, "magia_step", stopped)
    run = cli("--audit", expect=130)
    assert list(rows_of(run)) == ["float16"]
    assert "interrupted" in rows_of(run)["float16"]["note"]
    monkeypatch.undo()
    monkeypatch.setattr(audit, "NEAREST", FEW)
    cli("--resume", run)  # it began as an audit
    assert list(rows_of(run)) == list(FEW)
    for name in ("float16", "topk_0.1"):
        assert without_times(run / DEFENDED / name) == without_times(whole / DEFENDED / name)


def test_a_finished_run_can_be_audited_later_and_replaced(cli):
    run = cli()
    before = without_times(run)
    cli("--resume", run, "--audit")
    assert without_times(run) == before
    assert len(rows_of(run)) == len(FEW)
    (run / DEFENDED / "notes.txt").write_text("mine")
    cli("--overwrite")
    assert read_facts(run)["defences"] is None
    assert [file.name for file in (run / DEFENDED).rglob("*") if file.is_file() and ".locks" not in file.parts] == [
        "notes.txt"
    ]


def test_an_audit_goes_without_a_defence_and_quietly_if_asked(cli):
    assert "--defence float16" in cli.error("--audit", "--defence", "float16")
    cli("--audit", "--quiet")
    assert len(cli.out.splitlines()) == 1 + len(FEW) + 1


def test_the_default_name_is_made_once(tmp_path):
    assert magia.main([*SMALL, "--audit", "--quiet", "--save_dir", str(tmp_path)]) == 0
    (run,) = (entry for entry in tmp_path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    assert len(rows_of(run)) == len(FEW)
