import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bench.decision import STYLES, plot_decision
from bench.guesses import MEAN
from bench.strengths import DEFENCES, by_kind, kind_and_strength, plot_strengths, weakest
from cli.flags import TYPES

ATTACK = "magia"


def line(defence, psnr, preset=ATTACK, ssim=0.5, size=4):
    figures = {"psnr_mean": psnr, "ssim_mean": ssim, "label_accuracy": 0.5, "signals_found": 2, "psnr_spread": None}
    figures |= {"identification": 0.5, "bit_exact": 0.0, "certified": 0.0}
    where = {"model": "lenet", "labels": "random", "batch_size": size, "failed": 0, "seconds": 1.0}
    return where | {"defence": defence, "preset": preset} | figures


def lines(**scores):
    """A line of the attack and one of the mean image, 12 dB, for each strength of noise."""
    found = [line(f"noise:{std}", psnr) for std, psnr in scores.items()]
    return found + [line(one["defence"], 12.0, MEAN, ssim=0.1) for one in found]


def test_every_default_is_a_defence_or_a_flag():
    for text in DEFENCES:
        assert text.startswith("--") or TYPES["defence"](text) == text


@pytest.mark.parametrize(
    ("defence", "kind"),
    [
        ("noise:1e-3", ("noise", 1e-3)),
        ("topk:0.1", ("topk", -0.1)),
        ("quantise:4", ("quantise", -4)),
        ("secure_sum:8", ("secure_sum", 8)),
        ("dpsgd:0.5:1e-2", ("dpsgd:0.5", 1e-2)),
        ("sign", ("sign", 0)),
        ("localdp:1:0.5:10:1e-5", ("localdp:1:0.5:*:1e-5", -10)),
        ("feedback:0.1:5", ("feedback:*:5", -0.1)),
        ("truncate:1e-3", ("truncate", -1e-3)),
        ("percentile:90", ("percentile", 90)),
        ("clip:1,noise:0.1", ("clip:1,noise:0.1", 0)),
        ("--frozen=head", ("--frozen=head", 0)),
    ],
)
def test_a_defence_is_of_a_kind_and_has_a_strength(defence, kind):
    assert kind_and_strength(defence) == kind


def test_kinds_list_their_members_from_the_weakest_on():
    given = [
        "topk:0.01",
        "none",
        "noise:1",
        "topk:0.5",
        "noise:1e-5",
        "dpsgd:1:0.1",
        "dpsgd:2:0.1",
        "clip:0.1",
        "clip:1",
    ]
    assert by_kind([line(text, 20) for text in given]) == {
        "topk": ["topk:0.5", "topk:0.01"],
        "noise": ["noise:1e-5", "noise:1"],
        "dpsgd:1": ["dpsgd:1:0.1"],
        "dpsgd:2": ["dpsgd:2:0.1"],
        "clip": ["clip:1", "clip:0.1"],
    }


def noise_from(rows):
    (row,) = (row for row in rows if row["kind"] == "noise")
    assert row["attack"] == ATTACK
    return row["from PSNR"]


def test_the_weakest_strength_is_the_first_from_which_on_the_mean_image_is_as_good():
    assert noise_from(weakest(lines(**{"1e-3": 30, "1e-2": 12, "1e-1": 6}))) == "noise:1e-2"
    assert noise_from(weakest(lines(**{"1e-3": 11, "1e-2": 13, "1e-1": 6}))) == "noise:1e-1"  # 1e-3 was chance
    assert noise_from(weakest(lines(**{"1e-3": 30, "1e-2": 20}))) == "none measured"
    (row,) = weakest(lines(**{"1e-3": 5}))
    assert (row["from PSNR"], row["from SSIM"]) == ("noise:1e-3", "none measured")


@given(st.lists(st.floats(0, 30), min_size=1, max_size=8))
def test_no_measured_strength_from_the_weakest_on_leaves_the_attack_anything(scores):
    stds = [f"1e-{8 - i}" for i in range(len(scores))]
    found = noise_from(weakest(lines(**dict(zip(stds, scores, strict=True)))))
    at = stds.index(found.removeprefix("noise:")) if found != "none measured" else len(scores)
    assert max(scores[at:], default=0) <= 12
    assert at == 0 or scores[at - 1] > 12


def test_networks_and_batch_sizes_have_plots_of_their_own(tmp_path):
    several = [
        line(text, psnr, size=size) for size in (4, 8) for text, psnr in (("none", 30), ("noise:1", 5), ("noise:2", 4))
    ]
    guesses = [line(one["defence"], 12.0, MEAN, size=one["batch_size"]) for one in several]
    plot_strengths([*several, *guesses, line("sign", 6, size=16)], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["leakage_B4.png", "leakage_B8.png"]
    assert all(path.stat().st_size > 5000 for path in tmp_path.iterdir())


def test_the_figure_of_the_decision_has_a_line_for_each_defence(tmp_path):
    rows = [
        {"network": network, "update": update, "attack": attack}
        | {"identification": "0.50", "told_apart": "2", "batch_size": "4"}
        for network in ("lenet", "mlp")
        for update in ("none", "int8", "sign")
        for attack in STYLES
    ]
    plot_decision(rows, tmp_path / "figure.png")
    plot_decision(rows * 4 + [row | {"update": f"{row['update']}2"} for row in rows], tmp_path / "taller.png")
    heights = []
    for name in ("figure", "taller"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            heights.append(picture.height)
    assert heights[1] > heights[0]
