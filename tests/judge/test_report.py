"""report.html and audit.json: right for every kind of run, and one file that needs no script and no network."""

import json
import shlex
import shutil
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from conftest import SIGNALS, SMALL, config_of, metrics_of, without_times

import main_MAGIA_sel as magia
from judge.gallery import PAGE, write_gallery
from judge.pictures import comparison
from judge.report import SCHEMA, audit_facts, brief, embedded, read_facts, report_page

LARGE = """from torch import nn
def net():
    return nn.Sequential(nn.Conv2d(3, 2, 8, stride=8), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 28 * 28, 10))
"""
LINKS = ("src", "href", "action", "poster", "data")
VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """What is in a page: its tags with their attributes, and its text."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def links(self):
        return [value for _, attributes in self.tags for name, value in attributes.items() if name in LINKS]


def test_errors_are_short():
    errors = [None, 2.34e-12, 2.34e-4, 9.9e-4, 1e-3, 0.0234, 0.5, 1.0]
    assert list(map(brief, errors)) == ["", "2e-12", "2e-4", "1e-3", "0.001", "0.023", "0.5", "1"]


def page_of(run):
    """The page of a run, after what must hold for all of them."""
    page = Page(run / "report.html")
    assert page.all("html") == [{"lang": "en"}]
    assert [len(page.all(tag)) for tag in ("title", "h1", "main")] == [1, 1, 1]
    assert page.all("script") == page.all("iframe") == []
    assert all(link.startswith(("data:", "defences/")) for link in page.links())
    assert all(image["alt"] for image in page.all("img"))
    assert "url(" not in (run / "report.html").read_text().replace("url(data:", "")
    assert read_facts(run)["schema"] == SCHEMA
    return page


def test_a_run_with_its_truth(cli, curves):
    run = cli("--seed", 3)
    page, facts = page_of(run), read_facts(run)
    assert facts["truth_known"]
    assert facts["verdict"]["headline"] in page.text
    assert facts["command"] == config_of(run)["command"]
    assert facts["command"] in page.text
    assert len(page.all("figure")) == 3
    assert len(page.all("img")) == 3 * 2 + 1  # and the curves
    for image, psnr in zip(facts["images"], metrics_of(run)["psnr"], strict=True):
        assert image["psnr"] == psnr
        assert (run / image["truth"]).is_file()
        assert (run / image["reconstruction"]).is_file()
        assert f"{psnr:.1f} dB" in page.text
    assert "lower bound" in page.text
    assert "failure is not safety" in page.text
    assert f"verdict: {facts['verdict']['level']}" in cli.out or "verdict: no better than a guess" in cli.out
    assert f"report: {run}/report.html" in cli.out
    identified = sum(image["identified"] for image in facts["images"])
    assert f"identified {identified}/3 among 127 others | bit for bit 0/3 | certified 0/3" in cli.out


def test_what_was_read_is_told_layer_by_layer(cli):
    run = cli("--labels", "unique", "--model", "lenet5", *SIGNALS)
    page, rows = page_of(run), metrics_of(run)["layers"]
    assert {"conv2", "hidden1"} <= {row["layer"] for row in rows if row["note"]}
    for row in rows:
        assert row["layer"] in page.text
        assert row["note"] in page.text
    assert "3 images told apart" in " ".join(page.text.split()) or "All 3 images were told apart" in page.text


def test_an_update_without_its_truth(cli, curves, tmp_path):
    path = tmp_path / "update.npz"
    cli("--labels", "unique", "--save_update", path, *SIGNALS)
    run = cli("--update", path, *SIGNALS, name="theirs")
    page, facts = page_of(run), read_facts(run)
    assert not facts["truth_known"]
    assert set(facts["verdict"]["images"]) == {"read", "apart", "unknown"}
    assert len(page.all("figure")) == 3
    assert "not at hand" in page.text
    assert "PSNR" not in page.text
    assert "What the client did to the update is not known" in page.text
    assert not (run / "truth").exists()


def test_pixels_that_were_read_need_no_truth(cli, tmp_path):
    path = tmp_path / "update.npz"
    flags = ["--model", "mlp", "--activation", "relu", "--depth", 3, "--width", 100, "--labels", "unique", *SIGNALS]
    cli(*flags, "--save_update", path)
    facts = read_facts(cli("--update", path, *SIGNALS, name="theirs"))
    assert facts["verdict"]["images"] == {"read": 3, "apart": 0, "unknown": 0}
    assert facts["verdict"]["headline"] == "All 3 images are read from the update, pixels and all"
    assert facts["figures"]["certified"] == 1
    assert "identification" not in facts["figures"]
    assert cli.out.rstrip().splitlines()[-1].startswith("certified 3/3 | ")
    told = read_facts(cli.folder / "run")
    assert told["verdict"]["images"]["exact"] == 3
    shares = ("identification", "bit_exact", "certified", "identified_among")
    assert [told["figures"][name] for name in shares] == [1, 1, 1, 127]
    assert all(image["identified"] and image["equal_bits"] for image in told["images"])
    text = " ".join(page_of(cli.folder / "run").text.split())
    assert "nearer to the truth than to 127 other images of sample" in text
    assert "Bit for bit3 of 3" in text
    assert "Certified3 of 3" in text


@pytest.mark.parametrize("batch_size", [1, 64])
def test_one_image_and_many(cli, batch_size):
    page = page_of(cli("--batch_size", batch_size, "--n_iter", 1))
    assert len(page.all("figure")) == batch_size


def test_images_of_one_channel(cli, tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "grey.npz", images=rng.integers(0, 256, (4, 28, 28), np.uint8), labels=np.arange(4))
    run = cli("--dataset", "npz", "--data_path", tmp_path / "grey.npz")
    assert len(page_of(run).all("img")) == 7


def test_large_images_are_embedded_small(cli, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (1, 224, 224, 3), np.uint8)
    np.savez(tmp_path / "large.npz", images=pixels, labels=[0])
    (tmp_path / "net.py").write_text(LARGE)
    flags = ["--dataset", "npz", "--data_path", tmp_path / "large.npz", "--batch_size", 1, "--image_size", 224]
    run = cli(*flags, "--model", f"{tmp_path / 'net.py'}:net", "--n_iter", 1, "--inner_iter", 1)
    assert len(page_of(run).all("img")) == 3
    truth = run / "truth" / "true_000.png"
    assert embedded(truth).startswith("data:image/jpeg")
    assert len(embedded(truth)) < truth.stat().st_size


def test_names_are_text_and_never_markup(cli):
    name = """R&D <b onload="x">'é'"""
    run = cli(name=name)
    page = page_of(run)
    assert page.all("b") == []
    assert name in page.text
    write_gallery(cli.folder)
    gallery = Page(cli.folder / PAGE)
    assert gallery.all("b") == []
    (href,) = (link["href"] for link in gallery.all("a"))
    assert href.startswith("R%26D%20%3Cb")


def test_a_run_that_broke_down_gets_no_verdict(cli):
    run = cli("--tv_weight", 1e308, expect=1)
    facts = read_facts(run)
    assert facts["verdict"]["level"] == "failed"
    assert "no verdict" in page_of(run).text
    assert "verdict: no verdict" in cli.out


def test_an_interrupted_run_says_so_and_its_page_is_written_anew(cli, monkeypatch):
    step = magia.magia_step

    def stopped(state, *rest):
        if state.step == 2:
            raise KeyboardInterrupt
        return step(state, *rest)

    monkeypatch.setattr(magia, "magia_step", stopped)
    run = cli(expect=130)
    assert "The attack was interrupted" in page_of(run).text
    monkeypatch.undo()
    cli("--resume", run)
    assert "The attack was interrupted" not in page_of(run).text
    assert "--resume" not in read_facts(run)["command"]
    _, *words = shlex.split(read_facts(run)["command"])[1:]
    assert magia.main([*words, "--run_name", "anew"]) == 0
    assert without_times(cli.folder / "anew") == without_times(run)


def test_granted_labels_and_models_with_normalisation_are_assumptions(cli):
    page = page_of(cli("--label_strategy", "known", "--mean", "0.5,0.4,0.3", "--max_evals", 50, "--max_seconds", 9))
    assert "Granted to the attack" in page.text
    assert "The attack was told the labels" in page.text
    assert "normalised" in page.text
    assert "50 evaluations, 9 seconds" in page.text


def test_pictures_that_are_gone_leave_a_word(cli):
    run = cli()
    (run / "images" / "rec_001.png").write_bytes(b"torn")
    shutil.rmtree(run / "truth")
    page = report_page(read_facts(run), run)
    assert page.count(">missing<") == 4


def test_facts_are_made_of_the_two_files_alone(cli):
    run = cli()
    again = audit_facts(config_of(run), metrics_of(run), run.name)
    assert again | {"finished": None} == read_facts(run) | {"finished": None}


# ---------------------------------------------------------------------------------------------------- the gallery


def test_the_gallery_lists_runs_newest_first_and_nothing_else(cli):
    first, second = cli("--n_iter", 1, name="first"), cli("--n_iter", 1, "--overwrite", name="second")
    for run, when in ((first, "2031-01-01T00:00:00+00:00"), (second, "2030-01-01T00:00:00+00:00")):
        facts = read_facts(run)
        (run / "audit.json").write_text(json.dumps(facts | {"finished": when}))
    damage = {
        "torn": '{"schema": "magia',
        "list": "[]",
        "other": '{"schema": "magia-audit-0"}',
        "empty": json.dumps({"schema": SCHEMA}),
        "types": json.dumps(read_facts(first) | {"images": 3}),
        "level": json.dumps(read_facts(first) | {"verdict": {"level": "<b>", "headline": ""}}),
    }
    for name, text in damage.items():
        shutil.copytree(first, cli.folder / name)
        (cli.folder / name / "audit.json").write_text(text)
    shutil.copytree(first, cli.folder / "pixels")
    (cli.folder / "pixels" / "images" / "rec_000.png").write_bytes(b"no picture")
    (cli.folder / "photos").mkdir()
    write_gallery(cli.folder)
    page = Page(cli.folder / PAGE)
    assert [link["href"] for link in page.all("a")] == ["first/report.html", "second/report.html"]
    shown = [image["reconstruction"] for image in read_facts(first)["images"]]
    assert [image["src"] for image in page.all("img")][:3] == [f"first/{name}" for name in shown]
    assert all((cli.folder / image["src"]).is_file() for image in page.all("img"))


def test_the_gallery_never_replaces_another_page(cli):
    (cli.folder / PAGE).write_text("<h1>my home page</h1>")
    cli("--n_iter", 1)
    assert (cli.folder / PAGE).read_text() == "<h1>my home page</h1>"


def test_runs_that_end_at_once_are_all_listed(cli):
    run = cli("--n_iter", 1)
    for index in range(4):
        shutil.copytree(run, cli.folder / f"copy{index}")
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(write_gallery, [cli.folder] * 3))
    assert len(Page(cli.folder / PAGE).all("a")) == 5
    assert not list(cli.folder.glob("*.partial"))


def test_a_gallery_that_cannot_be_written_costs_nothing(cli):
    (cli.folder / PAGE).mkdir()
    assert read_facts(cli("--n_iter", 1))
    assert magia.main([*SMALL, "--n_iter", "1", "--save_dir", str(cli.folder), "--run_name", "b"]) == 0
    assert torch.load(cli.folder / "b" / "checkpoint.pt", weights_only=True)


def test_captions_and_terminal_know_of_a_training_that_does_not_replay(cli, monkeypatch):
    captions = []

    def seen(truth, reconstruction, lines, note):
        captions.extend(lines)
        return comparison(truth, reconstruction, lines, note)

    monkeypatch.setattr("attack.match.replay.left_over", lambda *_: 1.0)
    monkeypatch.setattr("judge.recorder.comparison", seen)
    cli("--model", "mlp", "--activation", "relu", *SIGNALS)
    assert [lines[1] for lines in captions] == ["signal contradicted"] * 3
    assert "contradiction: the training, replayed on the images that were found" in cli.out
