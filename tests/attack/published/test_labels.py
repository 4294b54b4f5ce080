import itertools

import pytest
import torch
from conftest import config_of, metrics_of
from hypothesis import given
from hypothesis import strategies as st

from attack.published.labels import STRATEGIES, infer_labels
from attack.read.label_counts import whole_counts
from client.victim import share_update
from data import load_batch, open_source
from network.zoo import build_model


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def case(labels, num_classes=20):
    """An update of real images with the given labels, on a ConvNet, and its model."""
    images = load_batch(
        open_source("sample", None), range(len(labels)), labels="dataset", num_classes=10, generator=generator(),
        image_size=16,
    ).images  # fmt: skip
    model = build_model("convnet", image_shape=(3, 16, 16), num_classes=num_classes, generator=generator(1))
    return share_update(model, "convnet", images, torch.tensor(labels), num_classes), model


@pytest.mark.parametrize("strategy", ["idlg", "yin", "ilrg"])
def test_labels_that_differ_are_read(strategy):
    update, model = case([3, 11, 0, 19, 5])
    assert infer_labels(strategy, update, model, None).tolist() == [0, 3, 5, 11, 19]


def test_ilrg_counts_labels_that_repeat_and_the_others_name_the_classes():
    update, model = case([4, 4, 9, 4, 2])
    assert infer_labels("ilrg", update, model, None).tolist() == [2, 4, 4, 4, 9]
    assert set(infer_labels("idlg", update, model, None).tolist()) == {2, 4, 9}
    assert len(infer_labels("yin", update, model, None).unique()) == 5


def test_known_labels_come_without_their_order_and_only_if_granted():
    update, model = case([3, 1, 2])
    assert infer_labels("known", update, model, torch.tensor([3, 1, 2])).tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="not at hand"):
        infer_labels("known", update, model, None)
    assert infer_labels("optimise", update, model, None) is None


def test_what_cannot_be_read_is_an_error_that_says_why():
    update, model = case([0, 1, 0, 1], num_classes=2)
    with pytest.raises(ValueError, match="2 different labels at most, not 4"):
        infer_labels("yin", update, model, None)
    update.gradients.pop("head.bias")
    with pytest.raises(ValueError, match="holds no gradient of the head"):
        infer_labels("ilrg", update, model, None)


@given(st.lists(st.floats(-5, 9), min_size=1, max_size=10), st.integers(0, 40))
def test_whole_counts_sum_to_the_total_and_stay_near(expected, total):
    expected = torch.tensor(expected).double()
    counts = whole_counts(expected, total)
    assert counts.sum() == total
    assert (counts >= 0).all()
    assert torch.equal(counts, counts.round())
    for less, more in itertools.permutations(range(len(counts)), 2):  # no exchange of one label comes nearer
        if counts[less] > 0:
            nearer = counts.clone()
            nearer[less] -= 1
            nearer[more] += 1
            assert (nearer - expected).norm() >= (counts - expected).norm() - 1e-9


@given(st.lists(st.integers(0, 9), min_size=1, max_size=10))
def test_counts_that_are_whole_already_stay_as_they_are(expected):
    expected = torch.tensor(expected).double()
    assert torch.equal(whole_counts(expected, int(expected.sum())), expected)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_runs(cli, strategy):
    run = cli("--label_strategy", strategy, "--signals", "off", "--labels", "unique")
    assert config_of(run)["label_strategy"] == strategy
    assert metrics_of(run)["label_accuracy"] == 1


def test_known_labels_of_a_saved_update_are_refused(cli, tmp_path):
    path = tmp_path / "u.npz"
    cli("--save_update", path)
    assert "not at hand" in cli.error("--update", path, "--label_strategy", "known")
