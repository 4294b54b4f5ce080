"""Verdicts: each from figures that a run can have, and thresholds that chance does not reach."""

from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, generator
from torch.nn.functional import interpolate

from data import load_batch, open_source
from judge.metrics import assign, guess_psnr, guessed_label_accuracy, label_accuracy, psnr_matrix, ssim
from judge.recorder import in_words
from judge.verdict import (
    BY_CHANCE,
    CERTAIN,
    EXACT_PSNR,
    MARGIN,
    are_certain,
    belief_of,
    counts_of,
    level_of,
    percent,
    similarity_level,
    stops,
    verdict,
)

FIGURES = {"final_loss": 1e-3, "ended_by": "n_iter", "signals": [], "signals_found": 0}
FIGURES |= {"evidence": [], "unexplained": None, "noise_share": 0.0, "replays": None}


def of(levels, **figures):
    return verdict(counts_of(levels), FIGURES | figures)


@pytest.mark.parametrize(
    ("psnr", "similarity", "level"),
    [
        (100, 1.0, "exact"),
        (EXACT_PSNR, 0.9, "exact"),
        (EXACT_PSNR - 0.1, 0.9, "recognisable"),
        (20, 0.6, "recognisable"),
        (20, 0.59, "traces"),
        (12 + MARGIN, 0.1, "traces"),
        (12 + MARGIN - 0.1, 0.7, "none"),  # flat images are alike whatever they show
        (5, 0.0, "none"),
    ],
)
def test_levels_of_images(psnr, similarity, level):
    assert level_of(psnr, similarity, 12.0) == level


@pytest.mark.parametrize(("guess", "level"), [(100.0, "none"), (98.0, "none"), (97.0, "exact"), (60.0, "exact")])
def test_no_picture_that_can_be_guessed_is_exact(guess, level):
    assert level_of(100.0, 1.0, guess) == level


def test_an_error_of_one_step_in_255_is_exact():
    image = torch.full((1, 3, 8, 8), 0.5)
    assert psnr_matrix(image, image + 0.999 / 255)[0, 0] > EXACT_PSNR > psnr_matrix(image, image + 1.001 / 255)[0, 0]


@pytest.mark.parametrize(
    ("confidence", "has_pixels", "level"),
    [
        (None, True, "unknown"),
        (0.99, True, "unknown"),
        (CERTAIN, True, "read"),
        (CERTAIN, False, "apart"),
        (1.0, True, "read"),
        (0.9995, False, "apart"),
    ],
)
def test_without_the_truth_only_certainty_counts(confidence, has_pixels, level):
    assert belief_of(confidence, has_pixels=has_pixels) == level


def test_pixels_are_only_believed_where_their_error_is_small():
    assert are_certain([{"uncertainty": 1e-4}, {"uncertainty": 0.5}])
    assert not any(map(are_certain, ([], [{"uncertainty": None}], [{"uncertainty": 0.02}])))


def test_a_run_is_what_its_worst_image_is():
    assert of(["none", "recognisable", "none"])["level"] == "recognisable"
    assert of(["none", "exact", "recognisable"])["headline"] == "1 of 3 images came out pixel for pixel"
    assert of(["exact"])["headline"] == "The one image came out pixel for pixel"
    assert of(["recognisable"] * 2)["headline"] == "All 2 images are recognisable"
    assert of(["unknown", "apart"])["level"] == "apart"


def test_traces_that_chance_leaves_are_none():
    count = round(1 / BY_CHANCE)
    assert of(["traces"] + ["none"] * (count - 1))["level"] == "none"
    assert of(["traces"] + ["none"] * (count - 2))["level"] == "traces"


def test_failure_is_never_called_safety():
    for figures in ({"final_loss": None, "ended_by": "non-finite"}, {"final_loss": None, "ended_by": "interrupt"}):
        said = of(["none"], **figures)
        assert said["level"] == "failed"
        assert "Nothing follows" in said["meaning"][0]
    assert of(["exact"], final_loss=None, ended_by="exact")["level"] == "exact"
    for level in ("none", "unknown"):
        words = " ".join(of([level])["meaning"]).lower()
        assert "safe" not in words
        assert "protect" not in words


def test_what_else_leaked_is_said():
    signals = [{"confidence": 1.0}, {"confidence": 0.5}]
    words = of(["none"] * 4, signals=signals, signals_found=2, label_accuracy=0.75, label_accuracy_guess=0.3)["meaning"]
    assert "3 of 4 labels are right, of which the attack was told none; a guess has 1.2." in words
    assert "2 of 4 images were told apart by features and label, 1 of them with certainty." in words
    granted = verdict({"none": 4}, FIGURES | {"label_accuracy": 1.0, "label_accuracy_guess": 0.3}, granted_labels=True)
    assert "The attack was told the labels, so nothing is said of them." in granted["meaning"]


def images(first, count):
    return load_batch(
        open_source("sample", None),
        range(first, first + count),
        labels="dataset",
        num_classes=10,
        generator=generator(),
    ).images


@pytest.mark.parametrize("count", [4, 16, 64])
@pytest.mark.parametrize("side", [1, 2, 4, 32])  # of what is left of pictures of other images
def test_chance_makes_no_image_recognisable_and_few_traces(count, side):
    truth = images(0, count)
    others = interpolate(interpolate(images(64, count), size=side, mode="area"), size=32, mode="bilinear")
    matrix = psnr_matrix(truth, others)
    pairs = enumerate(assign(matrix))
    levels = [
        level_of(matrix[i, j], ssim(truth[i], others[j]), g) for (i, j), g in zip(pairs, guess_psnr(truth), strict=True)
    ]
    assert of(levels)["level"] == "none"


def test_guesses_are_the_own_colour_or_the_others_mean():
    flat = torch.stack([torch.full((3, 4, 4), value) for value in (0.2, 0.9)])
    assert guess_psnr(flat) == [100, 100]  # its own colour
    striped = torch.zeros(3, 1, 4, 4)
    striped[:, :, ::2] = 1.0
    striped[2] = 1 - striped[2]
    own = psnr_matrix(striped[:1], torch.full((1, 1, 4, 4), 0.5))[0, 0]
    assert guess_psnr(striped) == pytest.approx([own] * 3)  # its twin is no other image


@pytest.mark.parametrize("classes", [2, 5, 10])
def test_guessed_labels_score_what_drawn_ones_score_on_average(classes):
    labels, draw = torch.tensor([0, 0, 0, 1, 1, 1, 1]), generator()
    each, over = divmod(len(labels), classes)
    scores = []
    for _ in range(3000):
        extra = torch.randperm(classes, generator=draw)[:over]
        scores.append(label_accuracy(labels, torch.cat([torch.arange(classes).repeat(each), extra])))
    assert guessed_label_accuracy(labels, classes) == pytest.approx(sum(scores) / len(scores), abs=0.01)


def test_the_mildest_defence_that_stops_the_attack_is_named():
    rows = [
        {"defence": "float16", "level": "exact", "change": 1e-4},
        {"defence": "noise:1", "level": "none", "change": 0.5},
        {"defence": "topk:0.1", "level": "none", "change": 0.031},
        {"defence": "broken", "level": "failed", "change": 0.001},
        {"defence": "refused", "level": None},
    ]
    assert f"is topk:0.1: it moves the update by {percent(0.031)} of its length" in stops(rows, "exact")
    assert stops(rows[:1], "exact") == "The one defence that was tried does not stop this attack."
    assert stops(rows[:1] * 2, "apart") == "None of the 2 defences that were tried stops this attack."
    assert stops(rows[3:], "exact") == "No defence was tried to the end."
    assert "nothing for one to stop" in stops(rows, "none")


def test_every_level_of_the_documentation_is_one():
    page = (ROOT / "results" / "README.md").read_text()
    assert all(
        f"`{level}`" in page
        for level in ("exact", "recognisable", "traces", "none", "read", "apart", "unknown", "failed")
    )


def test_pictures_that_show_nothing_are_not_seen_again():
    flat = {"psnr": [35.0, 30.0], "ssim": [0.9, 0.8]}
    assert similarity_level(flat, [40.0, 33.0], 0) is None
    assert similarity_level(flat, [40.0, 33.0], 1) == "apart"
    assert similarity_level(flat, [40.0, 12.0], 0) == "same"
    assert similarity_level({"psnr": [14.0], "ssim": [0.7]}, [12.0], 0) == "other"  # smooth pictures are alike by SSIM


def test_images_read_in_part_are_certified_by_themselves_and_not_by_a_whole_replay():
    signals = [{"confidence": 1.0}] * 2
    facts = {"signals": signals, "replays": True, "unexplained": 0.28, "explains_first_layer": False}
    said = " ".join(of(["apart"] * 2 + ["unknown"] * 30, signals_found=2, **facts)["meaning"])
    assert "says nothing of the others" in said
    assert "make the update" not in said
    whole = " ".join(of(["apart"] * 2, signals_found=2, **facts)["meaning"])
    assert "make the update: that is the certificate" in whole


@pytest.mark.parametrize(("confidence", "words"), [(0.999, "certain"), (0.9985, "99 % sure"), (0.29, "29 % sure")])
def test_a_caption_calls_certain_what_the_verdict_does_and_nothing_else_wholly_sure(confidence, words):
    signals = SimpleNamespace(confidence=torch.tensor([confidence]).double(), error=torch.tensor([1e-3]))
    assert in_words(signals, 0) == [f"signal {words}", "±1e-3"]
