"""Updates from outside whose client is not the declared one: it is said, and nothing false is certain."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from attack.read import origin
from data import load_batch, open_source

NET = """
import torch
from torch import nn

def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()

def mlp():
    return seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, 64), nn.ReLU(), nn.Linear(64, 10)))

def binary():
    return seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, 64), nn.ReLU(), nn.Linear(64, 1)))

def dropping():
    below = [nn.Flatten(), nn.Linear(768, 64), nn.Sigmoid()]
    return seeded(lambda: nn.Sequential(*below, nn.Dropout(0.5), nn.Linear(64, 40)))

def unread():
    return seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 5, stride=2, padding=2), nn.ReLU(), nn.Flatten(),
                                        nn.Linear(512, 10)))

def norms():
    return seeded(lambda: nn.Sequential(nn.Conv2d(3, 12, 5, stride=2, padding=2), nn.BatchNorm2d(12), nn.ReLU(),
                                        nn.Conv2d(12, 12, 3, stride=2), nn.BatchNorm2d(12), nn.ReLU(),
                                        nn.Flatten(), nn.Linear(12 * 9, 10)))
"""
LABELS = torch.tensor([3, 7])
ONE_HOT = nn.functional.one_hot(LABELS, 10).float()
cross_entropy, mse = nn.functional.cross_entropy, nn.functional.mse_loss
bce = nn.functional.binary_cross_entropy_with_logits


def images(count=2):
    draw = {"labels": "dataset", "num_classes": 10, "generator": torch.Generator(), "image_size": 16}
    return load_batch(open_source("sample", None), range(count), **draw).images


class Client:
    """A client of another framework, with the network of a file, and the attack on what it sends."""

    def __init__(self, cli, folder, factory="mlp"):
        self.cli, self.folder, self.flags = cli, folder, ["--model", f"{folder / 'net.py'}:{factory}"]
        (folder / "net.py").write_text(NET)
        space = {}
        exec(NET, space)
        self.net = space[factory]().eval()

    def gradients(self, loss=lambda z: cross_entropy(z, LABELS), pictures=None):
        value = loss(self.net(images() if pictures is None else pictures))
        names, parameters = zip(*self.net.named_parameters(), strict=True)
        return dict(zip(names, torch.autograd.grad(value, parameters), strict=True))

    def attacked(self, tensors, *flags, num_classes=10, batch_size=2, name="run"):
        """The facts of the report; `pixels` are the reconstructions."""
        torch.save(tensors, self.folder / "update.pt")
        words = ["--update", self.folder / "update.pt", *self.flags, "--num_classes", num_classes, "--signals", "auto"]
        words += [] if batch_size is None else ["--batch_size", batch_size]
        run = self.cli(*words, *flags, name=name)
        facts = json.loads((run / "audit.json").read_text())
        self.said = {piece["topic"]: piece for piece in facts["evidence"]}
        self.levels = [image["level"] for image in facts["images"]]
        return facts


@pytest.fixture(autouse=True)
def short_glances(monkeypatch):
    """These images are told apart in no time, or never."""
    monkeypatch.setattr(origin, "GLANCE", 1e6)


@pytest.fixture
def client(cli, tmp_path):
    return Client(cli, tmp_path)


def test_an_honest_update_says_nothing(client):
    client.attacked(client.gradients())
    assert client.said == {}
    assert client.levels == ["read", "read"]


@pytest.mark.parametrize("factor", [2.0, 65536.0, 0.37, -1.0, -2.0])
def test_a_factor_and_a_sign_are_found(client, factor):
    client.attacked({name: factor * g for name, g in client.gradients().items()})
    assert client.said["scale"]["figure"] == pytest.approx(factor, rel=1e-4)
    assert not client.said["scale"]["contradicts"]
    assert client.levels == ["read", "read"]


DECAY = (lambda w: w, "weight decay")
PENALTIES = [(*DECAY, False), (*DECAY, True), (torch.sign, "an L1 penalty", False)]


@pytest.mark.parametrize(("pull", "said", "spares_biases"), PENALTIES)
def test_a_penalty_on_the_weights_is_subtracted(client, pull, said, spares_biases):
    parameters = dict(client.net.named_parameters())
    decayed = {
        name: g + 5e-4 * pull(parameters[name].detach()) * (g.dim() > 1 or not spares_biases)
        for name, g in client.gradients().items()
    }
    client.attacked(decayed)
    assert client.said["decay"]["figure"] == pytest.approx(5e-4, rel=2e-3)
    assert f": {said} of so much" in client.said["decay"]["said"]
    assert client.levels == ["read", "read"]


@pytest.mark.parametrize(
    ("loss", "found"),
    [
        (lambda z: cross_entropy(z, LABELS, label_smoothing=0.1), "label smoothing 0.1"),
        (lambda z: mse(z, ONE_HOT), "mse"),
        (lambda z: bce(z, ONE_HOT), "bce"),
    ],
)
def test_another_loss_is_found(client, loss, found):
    client.attacked(client.gradients(loss))
    assert found in client.said["loss"]["said"]
    assert client.levels == ["read", "read"]


def test_a_declared_loss_needs_no_word(client):
    client.attacked(client.gradients(lambda z: mse(z, ONE_HOT)), "--loss", "mse")
    assert client.said == {}
    assert client.levels == ["read", "read"]


@pytest.mark.long
def test_a_network_that_has_learnt_its_images_is_no_other_client(client):
    optimiser, batch = torch.optim.Adam(client.net.parameters(), 0.003), images()
    while (loss := cross_entropy(client.net(batch), LABELS)) > 1e-6:
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    torch.save(client.net.state_dict(), client.folder / "weights.pt")
    client.attacked(client.gradients(), "--weights", client.folder / "weights.pt")
    assert client.said["errors"]["figure"] < 1e-5
    assert not any(piece["contradicts"] for piece in client.said.values())


LONG = pytest.mark.long


@pytest.mark.parametrize(
    ("loss", "topics"),
    [
        (lambda z: bce(z, ONE_HOT + ONE_HOT.roll(1, 1)), {"loss", "fit"}),  # two labels for each image
        pytest.param(lambda z: cross_entropy(z, 0.7 * ONE_HOT + 0.3 * ONE_HOT.flip(0)), {"fit"}, marks=LONG),  # mixup
    ],
)
def test_what_fits_nothing_is_said_and_nothing_is_certain(client, loss, topics):
    client.attacked(client.gradients(loss))
    assert {topic for topic, piece in client.said.items() if piece["contradicts"]} >= topics
    assert client.levels == ["unknown", "unknown"]


WEIGHTS_OF_TEN = torch.linspace(0.5, 2, 10)


def weighted_sum(z, labels=LABELS):
    return (WEIGHTS_OF_TEN[labels] * cross_entropy(z, labels, reduction="none")).mean()


def focal(z):
    own = z.softmax(1).gather(1, LABELS[:, None])[:, 0]
    return ((1 - own) ** 2 * cross_entropy(z, LABELS, reduction="none")).mean()


def test_class_weights_are_read_off_single_images(client):
    client.attacked(client.gradients(lambda z: cross_entropy(z, LABELS, weight=WEIGHTS_OF_TEN)))
    own = 2 * WEIGHTS_OF_TEN[LABELS] / WEIGHTS_OF_TEN[LABELS].sum()
    assert client.said["weights"]["figure"] == pytest.approx(float(own[1] / own[0]), rel=1e-4)
    assert f"{own[0]:.3g} (label 3), {own[1]:.3g} (label 7)" in client.said["weights"]["said"]
    assert not client.said["weights"]["contradicts"]
    assert client.levels == ["read", "read"]


@pytest.mark.parametrize("loss", [weighted_sum, focal])
def test_other_weights_of_single_images_are_attacked_alike(client, loss):
    client.attacked(client.gradients(loss))
    assert "a focal loss, or class weights" in client.said["weights"]["said"]
    assert client.levels == ["read", "read"]


@pytest.mark.parametrize("loss", [lambda z: cross_entropy(z, LABELS, weight=WEIGHTS_OF_TEN), weighted_sum])
def test_declared_class_weights_need_no_word(client, loss):
    client.attacked(client.gradients(loss), "--class_weights", ",".join(map(str, WEIGHTS_OF_TEN.tolist())))
    assert client.said == {}
    assert client.levels == ["read", "read"]


def test_a_wrong_sign_is_found_under_declared_class_weights(client):
    update = client.gradients(lambda z: cross_entropy(z, LABELS, weight=WEIGHTS_OF_TEN))
    turned = {name: -g for name, g in update.items()}
    client.attacked(turned, "--class_weights", ",".join(map(str, WEIGHTS_OF_TEN.tolist())))
    assert client.said["scale"]["figure"] == -1
    assert client.levels == ["read", "read"]


def test_class_weights_that_the_client_did_not_have_are_contradicted(client):
    client.attacked(client.gradients(), "--class_weights", ",".join(map(str, WEIGHTS_OF_TEN.tolist())))
    assert client.said["weights"]["contradicts"]
    assert client.levels == ["unknown", "unknown"]


def test_images_of_one_label_that_weigh_differently_have_no_class_weights(client):
    same, each = torch.tensor([3, 3]), torch.tensor([1.0, 3.0])
    client.attacked(client.gradients(lambda z: (each * cross_entropy(z, same, reduction="none")).mean()))
    assert client.said["weights"]["contradicts"]
    assert client.levels == ["unknown", "unknown"]


def test_a_batch_smaller_than_declared_is_taken_for_what_its_ranks_show(client):
    client.attacked(client.gradients(), batch_size=8)
    assert client.said["batch size"]["figure"] == 2
    assert client.levels == ["read", "read"]


def test_one_logit_is_two_classes(cli, tmp_path):
    client = Client(cli, tmp_path, "binary")
    target = torch.tensor([[0.0], [1.0]])
    for flags in ([], ["--loss", "bce"]):
        facts = client.attacked(client.gradients(lambda z: bce(z, target)), *flags, num_classes=1, name=f"{len(flags)}")
        assert sorted(image["label"] for image in facts["images"]) == [0, 1]
        assert set(client.said) == {"logits"}


def test_a_sum_of_one_logit_s_errors_is_found_although_nothing_tells_its_factor(cli, tmp_path):
    client, target = Client(cli, tmp_path, "binary"), torch.tensor([[0.0], [1.0]])
    facts = client.attacked(client.gradients(lambda z: bce(z, target, reduction="sum")), num_classes=1)
    assert client.said["scale"]["figure"] == 2
    assert facts["verdict"]["level"] == "read"


# ----------------------------------------------------------------------------------------------------
# Entries


def largest(tensors, share):
    bound = torch.cat([t.flatten() for t in tensors.values()]).abs().quantile(1 - share)
    return {name: torch.where(t.abs() >= bound, t, 0) for name, t in tensors.items()}


ENTRIES = [
    ("pruned", "topk:0.1", lambda g: largest(g, 0.1)),
    ("signs", "sign", lambda g: {name: t.sign() * t.abs().mean() for name, t in g.items()}),
    (
        "quantised",
        "quantise:4",
        lambda g: {n: (t / t.abs().max() * 15).round() / 15 * t.abs().max() for n, t in g.items()},
    ),
    ("truncated", "clip:1", lambda g: {name: t.clamp(-1e-4, 1e-4) for name, t in g.items()}),
]


@pytest.mark.parametrize(("word", "declared", "changed"), ENTRIES)
def test_what_was_done_to_the_entries_is_said_unless_it_was_declared(client, word, declared, changed):
    update = changed(client.gradients())
    client.attacked(update)
    assert word in client.said["entries"]["said"]
    assert client.said["entries"]["contradicts"]
    assert "read" not in client.levels
    assert "apart" not in client.levels
    client.attacked(update, "--defended", declared, name="declared")
    assert not any(piece["contradicts"] for topic, piece in client.said.items() if topic == "entries")


def test_weights_in_a_gradients_place_are_noticed(client):
    weights = {name: p.detach().clone() for name, p in client.net.named_parameters()}
    client.attacked(weights)
    assert "--update_kind weights?" in client.said["kind"]["said"]
    gradients = client.gradients()
    client.attacked(gradients, "--update_kind", "weights", "--local_lr", 0.1, name="other")
    assert "--update_kind gradient" in client.said["kind"]["said"]


@pytest.mark.parametrize("rate", [1e-4, 1e-5, 1e-6])
def test_coarsely_rounded_weights_say_nothing_of_their_client(client, rate):
    new = {
        name: (p - rate * g).detach()
        for (name, p), g in zip(client.net.named_parameters(), client.gradients().values(), strict=True)
    }
    client.attacked(new, "--update_kind", "weights", "--local_lr", rate, "--signals", "off")
    assert client.said == {}


def test_a_step_of_adam_is_told_from_plain_sgd(client):
    old = {name: p.detach().clone() for name, p in client.net.named_parameters()}
    optimiser = torch.optim.Adam(client.net.parameters(), 1e-3)
    cross_entropy(client.net(images()), LABELS).backward()
    optimiser.step()
    new = {name: p.detach().clone() for name, p in client.net.named_parameters()}
    client.net.load_state_dict(old)
    client.attacked(new, "--update_kind", "weights", "--local_lr", 1e-3)
    assert "Adam" in client.said["optimiser"]["said"]
    assert set(client.levels) == {"unknown"}


# ----------------------------------------------------------------------------------------------------
# BatchNorm, dropout, pixels


@pytest.fixture
def trained(cli, tmp_path):
    """A client whose BatchNorm was in training mode, and its new weights, statistics among them."""
    client = Client(cli, tmp_path, "norms")
    before = {name: t.clone() for name, t in client.net.state_dict().items()}
    client.net.train()
    optimiser = torch.optim.SGD(client.net.parameters(), 0.1)
    cross_entropy(client.net(images()), LABELS).backward()
    client.own = {name: p.grad.clone() for name, p in client.net.named_parameters()}
    optimiser.step()
    new = {name: t.clone() for name, t in client.net.state_dict().items()}
    client.net.load_state_dict(before)
    client.net.eval()
    return client, new


WEIGHTS = ("--update_kind", "weights", "--local_lr", 0.1)


def test_statistics_that_moved_set_the_mode_unless_it_was_given(trained):
    client, new = trained
    client.attacked(new, *WEIGHTS)
    assert not client.said["batchnorm"]["contradicts"]
    assert json.loads((client.folder / "run" / "config.json").read_text())["bn"] == "train"
    client.attacked(new, *WEIGHTS, "--bn", "eval", name="given")
    assert client.said["batchnorm"]["contradicts"]
    assert set(client.levels) == {"unknown"}


def test_gradients_without_statistics_show_the_mode_as_well(trained):
    client, _ = trained
    client.attacked(client.own)
    assert "training mode" in client.said["batchnorm"]["said"]
    assert set(client.levels) == {"unknown"}
    client.attacked(client.gradients(), name="eval")
    assert "batchnorm" not in client.said
    client.attacked(client.gradients(), "--bn", "train_private", name="false")
    assert client.said["batchnorm"]["contradicts"]


def test_batches_that_were_counted_contradict_the_steps(trained):
    client, new = trained
    for name in list(new):
        if name.endswith("num_batches_tracked"):
            new[name] = new[name] + 4
    client.attacked(new, *WEIGHTS)
    assert client.said["steps"]["figure"] == 5


def test_dropout_is_seen_in_features_that_are_never_off(cli, tmp_path):
    client = Client(cli, tmp_path, "dropping")
    client.net.train()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        dropped = client.gradients()
    client.attacked(dropped, num_classes=40)
    assert client.said["dropout"]["figure"] == pytest.approx(0.5, abs=0.15)
    assert set(client.levels) == {"unknown"}
    client.net.eval()
    client.attacked(client.gradients(), num_classes=40, name="eval")
    assert "dropout" not in client.said


def is_named_and_then_taken(client, mean, std, level):
    """An update of normalised images: the normalisation is named, and declared it contradicts nothing."""
    m, s = (torch.tensor([float(v) for v in text.split(",")]).view(1, -1, 1, 1) for text in (mean, std))
    update = client.gradients(pictures=(images() - m) / s)
    client.attacked(update)
    assert f"--mean {mean} --std {std}" in client.said["pixels"]["said"]
    assert client.levels == ["unknown", "unknown"]
    client.attacked(update, "--mean", mean, "--std", std, name="declared")
    assert client.said == {}
    assert client.levels == [level, level]


@pytest.mark.parametrize(("mean", "std"), [("0.5", "0.5"), ("0.485,0.456,0.406", "0.229,0.224,0.225")])
def test_a_forgotten_normalisation_is_read_off_the_pixels(client, mean, std):
    is_named_and_then_taken(client, mean, std, "read")


@pytest.mark.parametrize(("mean", "std"), [("0.485,0.456,0.406", "0.229,0.224,0.225")])
def test_a_forgotten_normalisation_shows_where_only_features_are_read(cli, tmp_path, mean, std):
    client = Client(cli, tmp_path, "unread")
    is_named_and_then_taken(client, mean, std, "apart")


def test_evidence_is_in_the_terminal_and_the_report(client):
    client.attacked({name: 2 * g for name, g in client.gradients().items()})
    assert "the update says: it is the sum over 2 images, not their mean" in client.cli.out
    assert "the sum over 2 images" in (client.folder / "run" / "report.html").read_text()


@pytest.mark.long
def test_a_resumed_run_keeps_the_evidence(client):
    wrong = client.gradients(lambda z: bce(z, ONE_HOT + ONE_HOT.roll(1, 1)))
    whole = client.attacked(wrong)
    client.cli("--resume", client.folder / "run", *client.flags, "--batch_size", 2, "--signals", "auto", "--n_iter", 6)
    assert json.loads((client.folder / "run" / "audit.json").read_text())["evidence"] == whole["evidence"]


def test_what_the_pictures_leave_of_the_update_is_told(client):
    facts = client.attacked(client.gradients())
    assert facts["figures"]["unexplained"] < 1e-4
    assert np.isfinite(facts["figures"]["noise_share"])
    assert any("unexplained" in sentence for sentence in facts["verdict"]["meaning"])
