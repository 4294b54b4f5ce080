"""The pages as a browser shows them: nothing on the console, every picture there, readable on a phone."""

import pytest
from browser import Browser, find_browser
from conftest import SMALL

import main_MAGIA_sel as magia
from cli import audit
from judge.gallery import PAGE

PROGRAM = find_browser()
pytestmark = [
    pytest.mark.skipif(PROGRAM is None, reason="no Chromium or Chrome on the path to look at pages with"),
    pytest.mark.xdist_group("browser"),  # one worker runs them all: the browser and the pages are made once
]

# Runs whose pages differ: with the truth and the table of defences, without the truth, with special characters.
NAMES = ("audited", "theirs", "R&D <b>'é' " + "long" * 20)
LOADED = "document.images.length > 0 && [...document.images].every(i => i.complete && i.naturalWidth > 0 && i.alt)"
SIZES = """[...document.querySelectorAll("body *")].filter(e => [...e.childNodes].some(n => n.nodeType == 3 &&
    n.data.trim()) && e.checkVisibility()).map(e => parseFloat(getComputedStyle(e).fontSize))"""
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
CONTRAST = """(() => {
  const linear = value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const light = colour => { const [r, g, b] = colour.match(/[\\d.]+/g).map(v => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05; };
  const back = light(getComputedStyle(document.body).backgroundColor);
  return [...document.querySelectorAll("p, dd, dt, td, th, h1, h2, figcaption, .level")].map(element => {
    const ink = light(getComputedStyle(element).color); return Math.max(ink, back) / Math.min(ink, back); }); })()"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audit, "NEAREST", ("float16", "topk:0.1"))
        flags = [*SMALL, "--quiet", "--save_dir", str(folder), "--n_iter", "2"]
        update = str(folder / "update.npz")
        assert magia.main([*flags, "--run_name", NAMES[0], "--audit", "--save_update", update]) == 0
        assert magia.main([*flags, "--run_name", NAMES[1], "--update", update, "--signals", "auto"]) == 0
        assert magia.main([*flags, "--run_name", NAMES[2], "--batch_size", "1"]) == 0
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(PROGRAM, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1200])
@pytest.mark.parametrize("page", [*(f"{name}/report.html" for name in NAMES), PAGE])
def test_a_page_is_whole_and_readable(browser, folder, page, width, dark):
    browser.open(folder / page, width=width, dark=dark)
    assert browser.evaluate("innerWidth") == width
    assert browser.evaluate(LOADED)
    assert browser.evaluate(OVERFLOW) <= 0
    assert min(browser.evaluate(SIZES)) >= 14 * 0.99
    assert min(browser.evaluate(CONTRAST)) >= 4.5  # contrast that WCAG 2.2 asks of text, level AA
    assert browser.messages == []


def test_links_of_the_gallery_lead_to_the_reports(browser, folder):
    browser.open(folder / PAGE)
    links = browser.evaluate("[...document.querySelectorAll('a')].map(a => a.href)")
    assert len(links) == len(NAMES)
    for link in links:
        browser.visit(link)
        assert browser.evaluate("document.querySelector('h1').textContent") in NAMES


def test_trouble_in_a_page_is_seen(browser, tmp_path):
    (tmp_path / "bad.html").write_text("<img src='gone.png'><script>console.error('no'); nothing()</script>")
    browser.open(tmp_path / "bad.html")
    assert len(browser.messages) >= 3
    assert not browser.evaluate(LOADED)
