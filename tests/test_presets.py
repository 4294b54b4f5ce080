"""Published attacks as settings of the one loop."""

import re

import pytest
from conftest import ROOT, config_of, metrics_of

import main_MAGIA_sel as magia

PEERS = [name for name in magia.PRESETS if name != "magia"]


@pytest.mark.parametrize("preset", PEERS)
def test_every_published_attack_runs_and_is_beaten(cli, preset):
    flags = ["--batch_size", 2, "--n_iter", 1000, "--max_evals", 120, "--inner_iter", 20, "--log_every", 20]
    peer = metrics_of(cli("--preset", preset, *flags, name="peer"))
    ours = metrics_of(cli(*flags, name="ours"))
    assert ours["psnr_mean"] > peer["psnr_mean"] + 3 > 6
    assert peer["evaluations"] > 90
    assert peer["signals_found"] == 0


@pytest.mark.parametrize(
    ("preset", "settings"),
    [
        ("paper", {"optimizer": "lbfgs", "line_search": "none", "alpha": 0.999, "sel_mode": "constk", "sel_k": 2}),
        ("dlg", {"optimizer": "lbfgs", "distance": "l2", "label_strategy": "optimise", "tv_weight": 0.0}),
        ("idlg", {"optimizer": "lbfgs", "distance": "l2", "label_strategy": "idlg", "tv_weight": 0.0}),
        (
            "invertinggradients",
            {"distance": "cosine", "signed": True, "lr_schedule": "step", "label_strategy": "known"},
        ),
        ("gradinversion", {"distance": "l2", "lr_schedule": "cosine", "label_strategy": "yin", "bn_weight": 0.1}),
        ("cpa", {"signals": "ica", "feature_distance": "cosine", "distance": "cosine", "label_strategy": "optimise"}),
    ],
)
def test_presets_are_what_their_sources_say(preset, settings):
    resolved = vars(magia.resolve(["--preset", preset])[0])
    assert {name: resolved[name] for name in settings} == settings


@pytest.mark.parametrize("preset", PEERS)
def test_no_published_attack_has_what_is_new_here(cli, preset):
    config = config_of(cli("--preset", preset))
    assert config["signals"] in ("off", "ica")
    assert (config["spectral_power"], config["prior"], config["tv_final"]) == (0.0, "anisotropic", 1.0)


def test_batchnorm_statistics_enter_where_the_model_has_them(cli):
    settings, _ = magia.resolve(["--preset", "gradinversion", "--batch_size", "2", "--model", "resnet18"])
    place = {"device": magia.choose_device("cpu"), "dtype": magia.torch.float32}
    update, model, _ = magia.victim(settings, place)
    names = [type(penalty).__name__ for _, penalty in magia.prepare(update, model, settings)[1].penalties]
    assert "BatchNormLoss" in names
    settings.model = "lenet"
    update, model, _ = magia.victim(settings, place)
    names = [type(penalty).__name__ for _, penalty in magia.prepare(update, model, settings)[1].penalties]
    assert "BatchNormLoss" not in names


def test_the_readme_says_of_every_preset_what_it_is():
    text = (ROOT / "README.md").read_text()
    table = text[text.index("### Presets") :]
    assert re.findall(r"^\| `(\w+)` \|", table, flags=re.M) == list(magia.PRESETS)
