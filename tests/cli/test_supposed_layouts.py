"""Updates whose kernels are in another layout than torch's, which no shape shows: the layout that fits is taken."""

import json

import pytest
import torch
from torch import nn

from attack.read import origin
from data import load_batch, open_source
from judge.metrics import mean_psnr
from update.evidence import PIXELS
from update.layouts import relaid, suspected

NET = """
import torch
from torch import nn

def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()

def conv():
    below = [nn.Conv2d(3, 12, 5, stride=2, padding=2), nn.Sigmoid(), nn.Flatten(), nn.Linear(768, 32), nn.Sigmoid()]
    return seeded(lambda: nn.Sequential(*below, nn.Linear(32, 10)))

def mlp():
    return seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, 64), nn.ReLU(), nn.Linear(64, 10)))

def square():
    layers = [nn.Flatten(), nn.Linear(48, 48), nn.Sigmoid(), nn.Linear(48, 48), nn.Sigmoid(), nn.Linear(48, 48)]
    return seeded(lambda: nn.Sequential(*layers))
"""
LABELS = torch.tensor([3, 7])


def rows(tensor, shape):
    """The rows of a dense kernel behind a flattening of the shape (c, h, w), in the order (h, w, c)."""
    return tensor.reshape(-1, *shape).permute(0, 2, 3, 1).reshape(tensor.shape)


def sides(kernel):
    return kernel.transpose(2, 3).contiguous()


class Client:
    def __init__(self, cli, folder, factory, side=16):
        self.cli, self.folder, self.side = cli, folder, side
        (folder / "net.py").write_text(NET)
        space = {}
        exec(NET, space)
        self.net, self.factory = space[factory]().eval(), factory
        draw = {"labels": "dataset", "num_classes": 10, "generator": torch.Generator(), "image_size": 16}
        self.images = load_batch(open_source("sample", None), range(2), **draw).images[..., :side, :side]

    def sent(self, change, pictures=None, *, weights_too=True):
        """Gradients, and weights, as the client keeps them: each changed by the layer's `change`, if it has one."""
        loss = nn.functional.cross_entropy(self.net(self.images if pictures is None else pictures), LABELS)
        named = dict(self.net.named_parameters())
        gradients = dict(zip(named, torch.autograd.grad(loss, tuple(named.values())), strict=True))

        def changed(tensors):
            return {name: change.get(name, lambda t: t)(t.detach()).contiguous() for name, t in tensors.items()}

        torch.save(changed(gradients), self.folder / "update.pt")
        torch.save(changed(named) if weights_too else dict(named), self.folder / "weights.pt")

    def attacked(self, *flags, classes=10, name="run"):
        files = ["--update", self.folder / "update.pt", "--weights", self.folder / "weights.pt"]
        model = ["--model", f"{self.folder / 'net.py'}:{self.factory}", "--num_classes", classes]
        size = ["--image_size", self.side, "--batch_size", 2, "--signals", "auto"]
        run = self.cli(*files, *model, *size, *flags, name=name)
        facts = json.loads((run / "audit.json").read_text())
        self.said = {piece["topic"]: piece for piece in facts["evidence"]}
        pictures = load_batch(
            open_source("folder", str(run / "images")),
            range(2),
            labels="random",
            num_classes=10,
            generator=torch.Generator(),
            image_size=None,
        ).images
        return mean_psnr(self.images, pictures)


@pytest.fixture(autouse=True)
def short_glances(monkeypatch):
    """These images are told apart in no time, or never."""
    monkeypatch.setattr(origin, "GLANCE", 2e7)


def behind_conv(tensor):
    return rows(tensor, (12, 8, 8))


CHANGES = {
    "as in torch": {},
    "sides": {"0.weight": sides},
    "both": {"0.weight": sides, "3.weight": behind_conv},
}


@pytest.mark.parametrize(
    ("change", "weights_too"),
    [("as in torch", True), ("sides", True), pytest.param("both", False, marks=pytest.mark.long)],
)
def test_the_layout_that_fits_is_taken(cli, tmp_path, change, weights_too):
    client = Client(cli, tmp_path, "conv")
    client.sent(CHANGES[change], weights_too=weights_too)
    assert client.attacked() > 60
    assert ("layout" in client.said) == (change != "as in torch")
    assert not any(piece["contradicts"] for piece in client.said.values())
    if change != "as in torch":
        assert ("weights and update are" if weights_too else "the update is") in client.said["layout"]["said"]


def test_pixels_are_put_in_the_order_in_which_they_are_a_picture(cli, tmp_path):
    client = Client(cli, tmp_path, "mlp")
    client.sent({"1.weight": lambda tensor: rows(tensor, (3, 16, 16))})
    assert client.attacked() > 60
    assert "(h, w, c)" in client.said["layout"]["said"]


@pytest.mark.long
def test_a_model_whose_kernels_are_all_square_may_be_kerass(cli, tmp_path):
    client = Client(cli, tmp_path, "square", side=4)
    dense = {f"{index}.weight": lambda tensor: tensor.T for index in (3, 5)}
    client.sent(dense | {"1.weight": lambda tensor: rows(tensor, (3, 4, 4)).T})
    assert client.attacked(classes=48) > 60
    assert "Keras's layout" in client.said["layout"]["said"]


@pytest.mark.long
def test_a_forgotten_normalisation_is_no_layout(cli, tmp_path):
    client = Client(cli, tmp_path, "conv")
    client.sent({}, (client.images - 0.5) / 0.5)
    client.attacked()
    assert "layout" not in client.said
    assert client.said[PIXELS]["contradicts"]


@pytest.mark.long
def test_a_resumed_run_keeps_the_layout(cli, tmp_path):
    client = Client(cli, tmp_path, "conv")
    client.sent(CHANGES["both"])
    first = client.attacked()
    run = cli(
        "--resume",
        tmp_path / "run",
        "--model",
        f"{tmp_path / 'net.py'}:conv",
        "--n_iter",
        6,
        "--batch_size",
        2,
        "--signals",
        "auto",
    )
    pieces = json.loads((run / "audit.json").read_text())["evidence"]
    assert [piece["topic"] for piece in pieces] == ["layout"]
    assert first > 60


def test_a_layout_and_back_is_no_change():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 5))
    own = model.state_dict()
    assert set(suspected(model, (3, 6, 6))) == {("rows",), ("rows", "sides"), ("sides",)}
    theirs = own | {"0.weight": sides(own["0.weight"]), "3.weight": rows(own["3.weight"], (4, 6, 6))}
    back = relaid(theirs, model, (3, 6, 6), ("rows", "sides"))
    assert all(torch.equal(back[name], own[name]) for name in own)
