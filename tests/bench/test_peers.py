import os
import signal
import threading
import time

import pytest
import torch
from batchnorm import Plain, Shared, drawn

from bench import measures
from bench.peers import BREACHING, Result, breaching_attack
from client.victim import share_update
from data import load_batch, open_source
from judge import metrics
from network.parameters import freeze, named_by
from network.vision import torchvision
from network.zoo import build_model
from update.batchnorm import batchnorms
from update.loss import Loss
from update.optimiser import LocalOptimiser
from update.training import LocalTraining


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
    result = breaching_attack(name, update, model, batch.labels, max_evals=30, seed=1)
    images = result.images
    assert images.shape == batch.images.shape
    assert images.min() >= 0
    assert images.max() <= 1
    assert result.labels.shape == (2,)
    assert result.evaluations == 30
    assert torch.equal(drawn, torch.get_rng_state())
    again = breaching_attack(name, update, model, batch.labels, max_evals=30, seed=1)
    assert torch.equal(images, again.images)


def test_labels_are_granted_where_the_paper_grants_them():
    update, model, batch = case()
    wrong = (batch.labels + 1) % 10
    for name, granted in BREACHING.items():
        labels = breaching_attack(name, update, model, wrong, max_evals=2, seed=0).labels
        assert (labels.sort().values.tolist() == wrong.sort().values.tolist()) == granted
    read = breaching_attack("seethroughgradients", update, model, wrong, max_evals=2, seed=0).labels
    assert sorted(read.tolist()) == sorted(batch.labels.tolist())


@pytest.mark.long
def test_a_peer_gets_somewhere():
    update, model, batch = case()
    few, many = (
        breaching_attack("invertinggradients", update, model, batch.labels, max_evals=budget, seed=0).images
        for budget in (5, 300)
    )
    assert metrics.mean_psnr(batch.images, many) > metrics.mean_psnr(batch.images, few) + 2


@pytest.mark.long
def test_a_peer_is_told_of_several_steps_and_makes_them():
    _, model, batch = case()
    training = LocalTraining(4, 2, 0.1)
    update = share_update(model, "lenet", batch.images, batch.labels, 10, training=training)
    few, many = (
        breaching_attack("invertinggradients", update, model, batch.labels, max_evals=budget, seed=0)
        for budget in (5, 150)
    )
    assert (few.evaluations, many.evaluations) == (5, 150)
    assert metrics.mean_psnr(batch.images, many.images) > metrics.mean_psnr(batch.images, few.images) + 2


@pytest.mark.parametrize(
    ("name", "training", "words"),
    [
        ("invertinggradients", LocalTraining(2, 1, 0.1, optimiser=LocalOptimiser("adam")), "plain SGD"),
        ("deepleakage", LocalTraining(2, 1, 0.1), "need the labels"),
    ],
)
def test_steps_that_a_peer_does_not_know_are_refused(name, training, words):
    _, model, batch = case()
    update = share_update(model, "lenet", batch.images, batch.labels, 10, training=training)
    with pytest.raises(ValueError, match=words):
        breaching_attack(name, update, model, batch.labels, max_evals=2, seed=0)


def test_a_peer_is_told_of_momentum_smoothing_and_the_order_that_was_drawn(monkeypatch):
    """Momentum as steps of plain SGD that go as far, the labels of each step, and the client's own loss."""
    told = {}

    def attacker(model, loss, config, place):
        told["loss"] = loss
        return Told()

    class Told:
        def reconstruct(self, payload, shared, secrets):
            told.update(shared[0]["metadata"]["local_hyperparams"])
            return [{"data": torch.zeros(4, 3, 16, 16), "labels": torch.zeros(4).long()}, {}]

    import breaching

    monkeypatch.setattr(breaching.attacks, "prepare_attack", attacker)
    generator = torch.Generator().manual_seed(0)
    model = build_model("lenet", image_shape=(3, 16, 16), num_classes=10, generator=generator)
    rules = {"optimiser": LocalOptimiser(momentum=0.5), "loss": Loss(smoothing=0.1), "shuffle": True}
    training = LocalTraining(2, 2, 0.1, **rules, order=((3, 0), (2, 1)))
    images, labels = torch.rand(4, 3, 16, 16, generator=generator), torch.tensor([1, 5, 7, 2])
    update = share_update(model, "lenet", images, labels, 10, training=training)
    breaching_attack("invertinggradients", update, model, labels, max_evals=2, seed=0)
    assert [part.tolist() for part in told["labels"]] == [[1, 2], [5, 7]]
    assert told["lr"] == pytest.approx(0.1 * (1.5 + 1) / 2)
    assert told["loss"].label_smoothing == 0.1


def test_a_loss_that_a_peer_does_not_know_is_refused():
    _, model, batch = case()
    update = share_update(model, "lenet", batch.images, batch.labels, 10, training=LocalTraining(loss=Loss("mse")))
    with pytest.raises(ValueError, match="cross-entropy"):
        breaching_attack("modern", update, model, batch.labels, max_evals=2, seed=0)


def test_a_peer_works_on_images_normalised_as_its_attacks_expect():
    """One step from its start, normal in units of CIFAR-10's colours, few pixels lie at the edges of the box."""
    update, model, batch = case()
    images = breaching_attack("invertinggradients", update, model, batch.labels, max_evals=1, seed=0).images
    assert float(((images == 0) | (images == 1)).double().mean()) < 0.2
    assert images.mean((0, 2, 3)).tolist() == pytest.approx([0.49, 0.48, 0.45], abs=0.06)


def test_the_clock_of_a_peer_starts_after_its_import_and_set_up(monkeypatch):
    import breaching

    configure = breaching.get_attack_config
    monkeypatch.setattr(breaching, "get_attack_config", lambda *args: time.sleep(1) or configure(*args))
    update, model, batch = case()
    started = time.perf_counter()
    result = breaching_attack("modern", update, model, batch.labels, max_evals=2, seed=0)
    assert result.seconds < time.perf_counter() - started - 1


def test_ctrl_c_ends_a_peer_and_its_images_are_not_a_result(monkeypatch):
    """breaching itself takes Ctrl-C for the end of its budget, and returns what it has."""
    update, model, batch = case()
    timer = threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        breaching_attack("invertinggradients", update, model, batch.labels, max_evals=10**5, seed=0)
    timer.join()


def test_a_peer_has_as_many_threads_as_the_programs_own_attacks(tmp_path, monkeypatch):
    """Two threads for a small net mostly wait for each other, which would be counted as the peer's seconds."""
    seen = []

    def attack(name, update, model, granted, *, max_evals, seed):
        seen.append(torch.get_num_threads())
        return Result(torch.zeros(2, 3, 16, 16), granted, max_evals, 0.0)

    monkeypatch.setattr(measures, "breaching_attack", attack)
    torch.set_num_threads(2)
    cell = {"preset": "breaching modern", "batch_size": 2, "image_size": 16, "max_evals": 2}
    measures.measure(cell, [], tmp_path)
    assert seen == [1]
    assert torch.get_num_threads() == 2


def test_frozen_parameters_are_refused():
    update, model, batch = case()
    freeze(model, named_by(model, ["conv1"]))
    del update.gradients["conv1.weight"], update.gradients["conv1.bias"]
    with pytest.raises(ValueError, match="frozen"):
        breaching_attack("modern", update, model, batch.labels, max_evals=2, seed=0)


@pytest.mark.parametrize("mode", ["train", "train_private"])
def test_a_peer_takes_buffers_as_its_own_clients_send_them(mode, monkeypatch):
    """The batch's own statistics, by which the client's forward pass is that of eval mode; or none, and it trains."""
    torchvision()  # as the attack itself does before it imports the package
    breaching = pytest.importorskip("breaching")
    shared = Shared(drawn(Plain()), mode=mode)
    seen = []

    def reconstruct(self, payload, data, *_, **__):
        (model,) = self._construct_models_from_payload_and_buffers(payload, data)
        seen.append(model)
        return {"data": torch.zeros(3, 3, 8, 8), "labels": shared.labels}, None

    monkeypatch.setattr(
        breaching.attacks.optimization_based_attack.OptimizationBasedAttacker, "reconstruct", reconstruct
    )
    breaching_attack("invertinggradients", shared.update, shared.model, shared.labels, max_evals=1, seed=0)
    (model,) = seen
    with torch.no_grad():
        normalised = (shared.images - model.mean) / model.std
        assert torch.allclose(
            model(normalised), shared.model(shared.images), atol=0.03
        )  # running variances are unbiased
    assert any(layer.training for layer in batchnorms(model)) == (mode == "train_private")
