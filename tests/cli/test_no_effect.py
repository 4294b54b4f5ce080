"""No flag is ignored without a word: each changes the run or is named, with the reason, as one that does not."""

import re
from functools import cache

import pytest
import torch
from conftest import CPU, resolved

import main_MAGIA_sel as magia
from cli.no_effect import without_effect
from cli.settings import schedule_of
from cli.start import first_state, pixel_map
from cli.victim import victim

# Another value for each flag of objective, variables and optimiser than the one it has in the cases below.
OTHER = {
    "sel_mode": "linear_dec_total", "sel_k": 1, "sel_l_iter": 3, "sig_a": -2.0, "sig_b": 1.0, "resample": "closure",
    "distance": "cosine", "soften": "off", "alpha": 0.2, "subset_loss": "mean", "rescale": "none",
    "prior": "anisotropic", "tv_weight": 1.0, "tv_final": 0.5, "tv_evals": 3, "noise_weight": 1e12,
    "chroma_weight": 9.0, "curvature_weight": 9.0, "third_weight": 9.0, "prior_power": 1.5,
    "l2_weight": 1.0, "bn_weight": 1.0, "scale_weight": 9.0, "feature_weight": 30.0, "feature_distance": "cosine",
    "init": "uniform", "box": "clamp", "spectral_power": 2.0, "chroma_gain": 3.0,
    "label_gain": 9.0, "label_std": 0.1, "restarts": 2, "group_weight": 10.0,
    "optimizer": "adam", "lr": 0.3, "lr_schedule": "cosine", "signed": None,
    "inner_iter": 1, "history": 1, "line_search": "none",
}  # fmt: skip
ELSEWHERE = {
    "signals", "label_strategy",  # what is known before: other tests
    "n_iter", "max_evals", "max_seconds", "show_schedule",  # when it ends, what is shown: other tests
}  # fmt: skip
GROUPS = ("objective", "selection schedule", "signals", "labels", "variables", "optimiser")

FEW = "--batch_size 3 --image_size 16 --num_classes 10 --labels dataset --n_iter 2 --inner_iter 3"
CASES = {
    "the loop": f"{FEW} --model mlp --activation relu --width 64 --signals off",
    "some features": f"{FEW} --model lenet --defence noise:5e-4",
    "activations": f"{FEW} --model lenet --image_size 32",
    "exact": f"{FEW} --model mlp",
}


@cache
def prepared(case):
    """Update, model and what is known before the first step: the same for all flags of a case."""
    settings = resolved(*CASES[case].split())
    update, model, _ = victim(settings, CPU)
    return update, model, magia.prepare(update, model, settings)[2]


def attacked(case, *flags):
    """The images at the end of a short attack, and the flags that are said to have no effect."""
    update, model, known = prepared(case)
    words = [*CASES[case].split(), *map(str, flags)]
    settings, given = magia.resolve(words, magia.FLAGS)
    pixels = pixel_map(update, model, known, settings)
    state = first_state(update, known, pixels, settings)
    objective = magia.build_objective(update, model, known, pixels, settings)
    budget = magia.Budget(settings.n_iter, settings.max_evals, settings.max_seconds)
    magia.attack(state, objective, schedule_of(settings), budget, lambda *_: None)
    lines = without_effect(given, settings, known, model, objective.annealing, holds_scale=objective.scale is not None)
    named = {flag for line in lines for flag in re.findall(r"--(\w+)", line.partition(" (")[0])}
    return objective.images(state)[state.leader].detach(), named


def test_every_flag_of_objective_variables_and_optimiser_is_tried():
    headings = {flag.group for flag in magia.FLAGS}
    groups = {h for h in headings if h.startswith(GROUPS)}
    names = {flag.name for flag in magia.FLAGS if flag.group in groups}
    assert len(groups) == len(GROUPS)
    assert names - ELSEWHERE == set(OTHER)


LONG = "some features"  # asks of a flag what the loop and activations ask of it too


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.long) if c == LONG else c for c in CASES])
def test_a_flag_changes_the_images_or_is_said_to_have_no_effect(case):
    usual, _ = attacked(case)
    silent, wrong = [], []
    for name, value in OTHER.items():
        images, named = attacked(case, f"--{name}", *([] if value is None else [value]))
        changes, is_named = not torch.equal(images, usual), name in named
        silent += [name] if not changes and not is_named else []
        wrong += [name] if changes and is_named else []
    assert (silent, wrong) == ([], [])


def test_the_priors_weight_scales_the_course_of_known_activations():
    *_, known = prepared("activations")
    assert known.is_followed
    assert not known.is_exact
    assert not torch.equal(attacked("activations", "--tv_weight", 4e-2)[0], attacked("activations")[0])
    assert torch.equal(attacked("activations", "--tv_weight", 4e-3)[0], attacked("activations")[0])


def test_the_terminal_names_them(cli):
    cli("--sel_mode", "const1", "--sel_k", 2, "--history", 7, "--optimizer", "adam")
    assert "no effect here: --sel_k (only --sel_mode constk has it)" in cli.out
    assert "no effect here: --inner_iter, --history (only --optimizer lbfgs has it)" in cli.out
