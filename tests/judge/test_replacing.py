"""A new run takes the place of an old one at once or not at all, and no file of anybody else's is lost."""

import itertools
import json
import os
import shutil

import pytest
import torch
from conftest import SMALL, config_of, metrics_of, trace_of
from processes import KILLED, Child, dies_at, forked

import main_MAGIA_sel as magia
from cli import audit
from judge.run_directory import RunDirectory


def files_of(folder):
    """All files and links below a folder, with their contents; locks apart."""
    files = [file for file in folder.rglob("*") if file.is_symlink() or file.is_file()]
    return {
        str(file.relative_to(folder)): os.readlink(file) if file.is_symlink() else file.read_bytes()
        for file in files
        if ".locks" not in file.parts
    }


def staged_in(folder):
    return [file for file in folder.rglob(".*") if file.name != ".locks"]


@pytest.fixture
def elsewhere(tmp_path):
    """A folder of the user's with pictures that are named as those of a run."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    for name in ("rec_000.png", "rec_001.png", "true_000.png", "config.json", "notes.txt", "sign"):
        (folder / name).write_text(f"precious {name}")
    return folder


# ------------------------------------------------------------------------------------------ a process that is killed

MINE = {"notes.txt": b"mine", "images/mine.png": b"mine", "images/rec_x.png": b"mine", "defences/notes.txt": b"mine"}


def old_run(path):
    """A small run directory with files of the user's, and all its files."""
    config = json.dumps({"sel_mode": "const1", "tv_weight": 0, "versions": {}, "seed": "old"}).encode()
    defended = {f"defences/float16/{name}": content for name, content in (("config.json", config), ("a.txt", b"mine"))}
    own = {"config.json": config, "metrics.json": b"{}", "images/rec_000.png": b"png", "truth/true_000.png": b"png"}
    for name, content in (MINE | own | defended).items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    torch.save({"of": "old"}, path / "checkpoint.pt")
    return files_of(path)


def check_is_one_run(path, before):
    """The directory holds the old run or the new one, whole, and the files of the user's; returns whose run it is."""
    seed = config_of(path)["seed"]
    assert torch.load(path / "checkpoint.pt", weights_only=True) == {"of": seed}
    after = files_of(path)
    if seed == "old":
        assert after == before
    else:
        mine = MINE | {"defences/float16/a.txt": b"mine"}
        assert {
            name: content for name, content in after.items() if name not in ("config.json", "checkpoint.pt")
        } == mine
    assert staged_in(path.parent) == []
    return seed


NEW = {"sel_mode": "const1", "tv_weight": 0, "versions": {}, "seed": "new"}


@forked
def test_whenever_a_run_is_killed_the_next_finds_the_old_run_or_the_new_one(tmp_path):
    first = tmp_path / "first" / "run"
    before, found, ready = old_run(first), [], None
    for step in itertools.count(1):
        path = tmp_path / f"killed{step}" / "run"
        shutil.copytree(first, path, symlinks=True)
        status = Child(tmp_path / "child", dies_at, step, path, NEW).wait()
        if status != KILLED:
            break
        if any(file.name.endswith(".ready") for file in staged_in(path.parent)) and ready is None:
            ready = tmp_path / "ready"
            shutil.copytree(path.parent, ready, symlinks=True)
        RunDirectory(path, overwrite=True).close()
        found.append(check_is_one_run(path, before))
    assert status == 0
    assert found == sorted(found, reverse=True)
    assert set(found) == {"old", "new"}
    for step in itertools.count(1):  # the one that finishes is killed too
        path = tmp_path / f"again{step}" / "run"
        shutil.copytree(ready, path.parent, symlinks=True)
        if Child(tmp_path / "child", dies_at, step, path, None).wait() != KILLED:
            break
        RunDirectory(path, resume=True).close()
        assert check_is_one_run(path, before) == "new"
    assert step > 5


@forked
def test_whenever_a_first_run_is_killed_the_next_can_begin(tmp_path):
    for step in itertools.count(1):
        path = tmp_path / f"killed{step}" / "run"
        path.parent.mkdir()
        if Child(tmp_path / "child", dies_at, step, path, NEW).wait() != KILLED:
            break
        if path.exists():
            assert set(files_of(path)) == {"config.json", "checkpoint.pt"}
        with RunDirectory(path, overwrite=True) as run:
            run.begin(NEW, {"of": "new"})
        assert config_of(path) == NEW
        assert set(files_of(path)) == {"config.json", "checkpoint.pt"}
        assert staged_in(path.parent) == []
    assert step > 3


@forked
def test_a_killed_takeover_is_finished_before_a_run_is_resumed(cli):
    run = cli("--n_iter", 2)
    checkpoint, new = (run / "checkpoint.pt").read_bytes(), config_of(cli("--n_iter", 2, "--seed", 5, name="other"))
    step = next(
        step
        for step in itertools.count(1)
        if Child(cli.folder / "child", dies_at, step, run, new).wait() == KILLED
        and any(file.name.endswith(".ready") for file in run.iterdir())
    )
    assert step > 1
    assert (run / "checkpoint.pt").read_bytes() == checkpoint
    assert "is not the checkpoint of a run" in cli.error("--resume", run, "--seed", 5)  # that of the new run, a stub
    assert staged_in(run) == []
    assert not (run / "metrics.json").exists()


# --------------------------------------------------------------------------------------- names that others have given


@pytest.mark.parametrize("name", [".run.new", ".run.old"])
def test_folders_of_others_beside_a_run_are_left_alone(cli, name):
    mine = cli.folder / name
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    (mine / "config.json").write_text("{}")
    run = cli()
    run.rename(cli.folder / "moved")
    assert "no run to resume" in cli.error("--resume", run)
    cli()
    cli("--overwrite")
    assert files_of(mine) == {"thesis.tex": b"years of work", "config.json": b"{}"}


@pytest.mark.parametrize("name", [".a.new", ".locks", "..", ".", "a/b"])
def test_a_name_begins_with_no_dot_and_has_no_separators(cli, name):
    assert "does not begin with a dot" in cli.error("--run_name", name)
    assert list(cli.folder.iterdir()) == []


def test_a_default_name_that_is_taken_gets_a_number(tmp_path, monkeypatch):
    class Stopped(magia.resolve.__globals__["datetime"]):
        @classmethod
        def now(cls, tz=None):
            return cls(2030, 1, 1, tzinfo=tz)

    monkeypatch.setitem(magia.resolve.__globals__, "datetime", Stopped)
    words = [*SMALL, "--n_iter", "1", "--inner_iter", "1", "--save_dir", str(tmp_path), "--quiet"]
    assert [magia.main(words) for _ in range(3)] == [0, 0, 0]
    names = sorted(path.name for path in tmp_path.iterdir() if (path / "metrics.json").exists())
    start = "sample_B3_constk_seed0_20300101-000000"
    assert names == [start, f"{start}-2", f"{start}-3"]


# ------------------------------------------------------------------------------------------------- what is removed


def test_overwriting_follows_no_link(cli, elsewhere):
    run, other = cli(name="run"), cli("--seed", 1, name="b")
    before, b = files_of(elsewhere), files_of(other)
    for folder in ("images", "truth"):
        shutil.rmtree(run / folder)
        (run / folder).symlink_to(elsewhere)
    (run / "defences").mkdir()
    for name in ("float16", "noise_1e-2", "mine"):
        (run / "defences" / name).symlink_to("../../b")
    (run / "history.gif").unlink()
    (run / "history.gif").symlink_to(elsewhere / "notes.txt")
    (run / "mine").symlink_to(elsewhere)
    cli("--overwrite")
    assert files_of(elsewhere) == before
    assert files_of(other) == b
    assert not (run / "images").is_symlink()
    assert len(list((run / "truth").iterdir())) == 3
    assert [path.name for path in (run / "defences").iterdir()] == ["mine"]
    assert os.readlink(run / "mine") == str(elsewhere)


def test_a_link_in_the_place_of_all_defended_runs_is_unlinked(cli, elsewhere):
    run, before = cli(), files_of(elsewhere)
    (run / "defences").symlink_to(elsewhere)
    cli("--overwrite")
    assert not (run / "defences").is_symlink()
    assert files_of(elsewhere) == before


def test_only_numbered_pictures_are_removed(cli):
    run = cli()
    mine = ["images/rec_x.png", "images/rec_0001.png", "images/rec_1.png", "truth/true_.png", "defences/index.html"]
    (run / "images" / "rec_folder.png").mkdir()
    (run / "images" / "rec_007.png").mkdir()  # the run has three images: this place stays free
    (run / "defences").mkdir()
    mine += ["images/rec_folder.png/a.txt", "images/rec_007.png/a.txt"]
    stale = ["images/rec_999.png", "images/rec_1000.png", "truth/true_003.png"]
    for name in mine + stale:
        (run / name).write_text("mine")
    cli("--overwrite")
    cli("--overwrite")
    assert [(run / name).read_text() for name in mine] == ["mine"] * len(mine)
    assert not any((run / name).exists() for name in stale)


@pytest.mark.parametrize(("name", "flags"), [
    ("metrics.json", ["--overwrite"]), ("images/rec_001.png", ["--overwrite"]), ("curves.png", ["--resume"]),
])  # fmt: skip
def test_a_folder_in_a_files_place_is_said_before_anything_changes(cli, name, flags):
    run = cli()
    (run / name).unlink()
    (run / name).mkdir()
    (run / name / "thesis.tex").write_text("years of work")
    before = files_of(run)
    message = cli.error("--run_name", "run", *flags)
    assert f"{run / name} is a folder" in message
    assert "move it away" in message
    assert files_of(run) == before


def test_a_file_in_a_folders_place_is_said_before_anything_changes(cli):
    run = cli()
    shutil.rmtree(run / "images")
    (run / "images").write_text("mine")
    before = files_of(run)
    assert f"{run / 'images'} is a file" in cli.error("--run_name", "run", "--overwrite")
    assert files_of(run) == before


def test_what_came_while_a_run_was_prepared_is_not_replaced(cli, monkeypatch):
    other, prepare = cli(name="other"), magia.prepare

    def moved_meanwhile(*arguments):
        other.rename(cli.folder / "bad")
        return prepare(*arguments)

    monkeypatch.setattr(magia, "prepare", moved_meanwhile)
    assert "exists by now" in cli.error()
    assert metrics_of(cli.folder / "bad")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("flag", ["--quiet", "--overwrite", "--resume"])
def test_a_folder_that_may_not_be_written_is_said_at_once(cli, flag):
    run = cli()
    for folder in (cli.folder, run):
        folder.chmod(0o555)
    try:
        message = cli.error("--run_name", "new" if flag == "--quiet" else "run", flag)
    finally:
        for folder in (cli.folder, run):
            folder.chmod(0o755)
    assert "cannot write the run directory" in message


# ------------------------------------------------------------------------------ a run directory that came from others


def test_a_resumed_run_writes_where_the_command_line_says(cli, elsewhere):
    run, before = cli(), files_of(elsewhere)
    planted = {
        "save_update": str(elsewhere / "notes.npz"),
        "save_batch": str(elsewhere / "batch.npz"),
        "show_schedule": True,
        "explain": True,
        "save_dir": str(elsewhere),
    }
    (run / "config.json").write_text(json.dumps(config_of(run) | planted))
    cli("--resume", run, "--n_iter", 6)
    assert metrics_of(run)["steps"] == 6
    cli("--resume", "--n_iter", 7)
    assert metrics_of(run)["steps"] == 7
    assert files_of(elsewhere) == before
    assert config_of(run)["save_update"] is None
    assert not list(cli.folder.glob("*schedule*"))


def test_a_resumed_run_follows_no_link_in_its_directory(cli, elsewhere, monkeypatch):
    monkeypatch.setattr(audit, "NEAREST", ("float16", "sign"))
    run, other = cli(), cli("--seed", 1, name="b")
    before, b = files_of(elsewhere), files_of(other)
    for folder in ("images", "truth"):
        shutil.rmtree(run / folder)
        (run / folder).symlink_to(elsewhere)
    (run / "defences").mkdir()
    (run / "defences" / "float16").symlink_to("../../b")
    (run / "defences" / ".locks").symlink_to(elsewhere)
    (run / "metrics.json").unlink()
    (run / "metrics.json").symlink_to(elsewhere / "notes.txt")
    cli("--resume", run, "--audit")
    assert files_of(elsewhere) == before
    assert files_of(other) == b
    assert config_of(run / "defences" / "float16")["seed"] == 0
    shutil.rmtree(run / "defences")
    (run / "defences").symlink_to(elsewhere)
    cli("--resume", run, "--audit")
    assert files_of(elsewhere) == before


@pytest.mark.parametrize("kind", ["hard link", "symbolic link"])
def test_a_resumed_runs_trace_is_a_file_of_its_own(cli, tmp_path, kind):
    run = cli()
    backup = tmp_path / "backup.csv"
    if kind == "hard link":
        os.link(run / "trace.csv", backup)
    else:
        (run / "trace.csv").rename(backup)
        (run / "trace.csv").symlink_to(backup)
    before = backup.read_bytes()
    cli("--resume", run, "--n_iter", 6)
    assert backup.read_bytes() == before
    assert [row["step"] for row in trace_of(run)] == list("012345")


@pytest.mark.parametrize("name", ["config.json", "trace.csv", "checkpoint.pt"])
def test_a_pipe_in_a_run_directory_is_never_waited_for(cli, name):
    run = cli()
    (run / name).unlink()
    os.mkfifo(run / name)
    cli.error("--resume", run)
    if name == "config.json":
        assert "is not a run directory" in cli.error("--run_name", "run", "--overwrite")
    else:
        cli("--overwrite")


def test_a_folder_named_by_a_dot_can_be_resumed(cli, monkeypatch):
    run = cli()
    monkeypatch.chdir(run)
    assert magia.main(["--resume", ".", "--n_iter", "5", "--quiet"]) == 0
    assert metrics_of(run)["steps"] == 5
    assert not (run / "index.html").exists()
    assert json.loads((run / "audit.json").read_text())["run"] == "run"


# ---------------------------------------------------------------------------------------------------------- locks


@pytest.mark.parametrize("kind", ["hard link", "symbolic link", "dangling link"])
@pytest.mark.parametrize("name", ["run", "index.html"])
def test_what_a_link_among_the_locks_names_is_kept(cli, tmp_path, kind, name):
    mine = tmp_path / "thesis.tex"
    if kind != "dangling link":
        mine.write_text("years of work")
    (cli.folder / ".locks").mkdir()
    if kind == "hard link":
        os.link(mine, cli.folder / ".locks" / name)
    else:
        (cli.folder / ".locks" / name).symlink_to(mine)
    cli("--n_iter", 1)
    assert (cli.folder / "index.html").exists()
    assert mine.exists() == (kind != "dangling link")
    assert kind == "dangling link" or mine.read_text() == "years of work"


def test_a_users_file_among_the_locks_is_kept(cli):
    mine = cli.folder / ".locks" / "bad"
    mine.parent.mkdir()
    mine.write_text("mine")
    assert "has content" in cli.error()
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("through", ["the run", "the folder"])
def test_a_linked_run_directory_has_the_lock_of_the_real_one(cli, tmp_path, through):
    run = cli("--n_iter", 2)
    link = tmp_path / "other" / "link"
    link.parent.mkdir()
    link.symlink_to(run if through == "the run" else cli.folder)
    name = link if through == "the run" else link / "run"
    with RunDirectory(run, resume=True):
        assert "another run is writing there" in cli.error("--resume", name)
    with RunDirectory(name, resume=True):
        assert "another run is writing there" in cli.error("--resume", run)
        assert "another run is writing there" in cli.error("--run_name", "run", "--overwrite")
    cli("--overwrite")


def test_links_in_a_circle_are_refused(cli):
    (cli.folder / "bad").symlink_to("bad")
    cli.error()
    cli.error("--overwrite")
    cli.error("--resume", cli.folder / "bad")
