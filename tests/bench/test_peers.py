import pytest
import torch

from bench.peers import BREACHING, breaching_attack
from client.victim import share_update
from data import load_batch, open_source
from judge import metrics
from update.gradients import freeze, named_by
from update.models import build_model


def case(**kwargs):
    """An update of two real images, its model, and the truth."""
    generator = torch.Generator().manual_seed(0)
    batch = load_batch(
        open_source("sample", None), range(2), labels="unique", num_classes=10, generator=generator, image_size=16
    )
    model = build_model("lenet", image_shape=(3, 16, 16), num_classes=10, generator=generator)
    return share_update(model, "lenet", batch.images, batch.labels, 10), model, batch


@pytest.mark.parametrize("name", BREACHING)
def test_every_attack_keeps_to_its_budget_and_is_repeatable(name):
    update, model, batch = case()
    drawn = torch.get_rng_state()
    images, labels, evaluations = breaching_attack(name, update, model, batch.labels, max_evals=30, seed=1)
    assert images.shape == batch.images.shape
    assert images.min() >= 0
    assert images.max() <= 1
    assert labels.shape == (2,)
    assert evaluations == 30
    assert torch.equal(drawn, torch.get_rng_state())
    again, _, _ = breaching_attack(name, update, model, batch.labels, max_evals=30, seed=1)
    assert torch.equal(images, again)


def test_labels_are_granted_where_the_paper_grants_them():
    update, model, batch = case()
    wrong = (batch.labels + 1) % 10
    for name, granted in BREACHING.items():
        labels = breaching_attack(name, update, model, wrong, max_evals=2, seed=0)[1]
        assert (labels.sort().values.tolist() == wrong.sort().values.tolist()) == granted
    read = breaching_attack("seethroughgradients", update, model, wrong, max_evals=2, seed=0)[1]
    assert sorted(read.tolist()) == sorted(batch.labels.tolist())


def test_a_peer_gets_somewhere():
    update, model, batch = case()
    few, many = (
        breaching_attack("invertinggradients", update, model, batch.labels, max_evals=budget, seed=0)[0]
        for budget in (5, 300)
    )
    assert metrics.mean_psnr(batch.images, many) > metrics.mean_psnr(batch.images, few) + 2


def test_frozen_parameters_are_refused():
    update, model, batch = case()
    freeze(model, named_by(model, ["conv1"]))
    del update.gradients["conv1.weight"], update.gradients["conv1.bias"]
    with pytest.raises(ValueError, match="frozen"):
        breaching_attack("modern", update, model, batch.labels, max_evals=2, seed=0)
