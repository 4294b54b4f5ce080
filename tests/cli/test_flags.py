"""One text per flag: the comment beside its default, which help and docs/flags.md repeat."""

import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, config_of

import main_MAGIA_sel as magia
import train_victim
from cli.flags import TYPES, flags_page, read_flags

BLOCK = "# " + "-" * 40


def flags_of(tmp_path, *lines, **values):
    script = tmp_path / "script.py"
    script.write_text("\n".join(["import x", "", BLOCK, "# Defaults.", "", *lines, "", BLOCK, "REST = 1", ""]))
    return read_flags(script, values)


def test_help_names_every_default(capsys):
    with pytest.raises(SystemExit) as stop:
        magia.main(["-h"])
    assert stop.value.code == 0
    out = " ".join(capsys.readouterr().out.split())  # as if lines did not wrap
    defaults = {flag.name for flag in magia.FLAGS}
    for name in defaults:
        assert f"--{name}" in out
    assert out.count("; default") == len(defaults)
    for flag in ("sel_mode", "sel_k", "sel_l_iter", "sig_a", "sig_b", "n_iter", "batch_size", "tv_weight", "seed"):
        assert flag in defaults


def test_defaults_are_edited_in_the_script(tmp_path):
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path / file.name)
    for folder in ("attack", "cli", "client", "judge", "network", "samples", "update"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    script = tmp_path / "main_MAGIA_sel.py"
    text = re.sub(r"^SEL_MODE = .*$", 'SEL_MODE = "const1"', script.read_text(), flags=re.M)
    script.write_text(re.sub(r"^N_ITER = .*$", "N_ITER = 2", text, flags=re.M))
    flags = ["--batch_size", "2", "--image_size", "16", "--signals", "off", "--run_name", "edited"]
    subprocess.run([sys.executable, script, *flags], cwd=tmp_path, check=True, capture_output=True)
    assert config_of(tmp_path / "results" / "edited")["schedule"] == [1, 1]


def test_a_flag_is_what_stands_beside_its_default(tmp_path):
    lines = ["# the run", 'NAME = "a # b"  # who: it', "# is", "SEED = 3  # 0: none", "", "# rest", "LAST = None"]
    flags = flags_of(tmp_path, *lines, NAME="a # b", SEED=3, LAST=None)
    assert [(f.name, f.default, f.text, f.group) for f in flags] == [
        ("name", "a # b", "who: it is", "the run"),
        ("seed", 3, "0: none", "the run"),
        ("last", None, "", "rest"),
    ]


def test_a_default_that_cannot_be_read_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"script\.py.*cannot read '    3'"):
        flags_of(tmp_path, "SEED = (", "    3", ")  # long", SEED=3)


def test_every_flag_has_a_text_that_names_its_choices():
    assert len(magia.FLAGS) > 60
    assert TYPES.keys() <= {flag.name for flag in (*magia.FLAGS, *train_victim.FLAGS)}
    for flag in (*magia.FLAGS, *train_victim.FLAGS):
        assert flag.text
        words = set(re.findall(r"[a-z0-9_]+", flag.text))
        for choice in getattr(TYPES.get(flag.name), "choices", ()):
            assert choice in words, (flag.name, choice)


def test_a_default_of_the_wrong_kind_is_refused_like_a_flag(monkeypatch, capsys, tmp_path):
    wrong = [f if f.name != "alpha" else type(f)("alpha", 1.5, f.text, f.group) for f in magia.FLAGS]
    monkeypatch.setattr(magia, "FLAGS", wrong)
    assert magia.main(["--save_dir", str(tmp_path)]) == 2
    assert "ALPHA = 1.5 in the script: 1.5 is out of range" in capsys.readouterr().err


def test_the_default_schedule_is_the_small_constant_subset_of_the_source_document():
    defaults = {flag.name: flag.default for flag in magia.FLAGS}
    assert (defaults["sel_mode"], defaults["sel_k"]) == ("constk", 2)


def test_the_flags_page_is_what_make_docs_writes():
    assert (ROOT / "docs" / "flags.md").read_text() == flags_page(magia.FLAGS)
