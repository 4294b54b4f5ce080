import numpy as np
import pytest
import torch

from network.head import features_of
from network.zoo import MODELS, build_model
from update.storage import write_tensors
from update.weights import load_checkpoint


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def model(name="lenet", channels=3, side=16, num_classes=10, seed=0, **options):
    shape = (channels, side, side)
    return build_model(name, image_shape=shape, num_classes=num_classes, generator=generator(seed), **options)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("channels", "side"), [(1, 16), (3, 28), (3, 33), (3, 64)])
def test_models_take_every_square_input(name, channels, side):
    net = model(name, channels, side, 7)
    images = torch.rand(2, channels, side, side, generator=generator())
    assert net(images).shape == (2, 7)
    assert features_of(net, images).shape == (2, net.head.in_features)
    assert torch.equal(net.head(features_of(net, images)), net(images))
    assert not net.training


def test_lenet_is_that_of_deep_leakage_from_gradients():
    net = model(side=32, num_classes=100)
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}
    assert shapes["conv1.weight"] == (12, 3, 5, 5)
    assert shapes["head.weight"] == (100, 768)
    assert [net.conv1.stride, net.conv2.stride, net.conv3.stride] == [(2, 2), (2, 2), (1, 1)]
    for parameter in net.parameters():
        assert parameter.abs().max() <= 0.5
    assert net.head.weight.abs().mean().item() == pytest.approx(0.25, rel=0.05)


def test_weights_come_from_the_generator_alone():
    before = torch.random.get_rng_state()
    one, same, other = model(seed=1), model(seed=1), model(seed=2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(one.conv1.weight, same.conv1.weight)
    assert not torch.equal(one.conv1.weight, other.conv1.weight)


@pytest.mark.parametrize(
    ("change", "word"),
    [({"name": "vgg"}, "vgg"), ({"side": 8}, "8x8"), ({"side": 65}, "65x65"), ({"num_classes": 1}, "1")],
)
def test_errors_name_the_value(change, word):
    with pytest.raises(ValueError, match=word):
        model(**change)


def test_the_mlp_stays_what_it_was_unless_told_otherwise():
    shapes = {name: tuple(p.shape) for name, p in model("mlp", side=32).named_parameters()}
    assert shapes["hidden1.weight"] == (256, 3072)
    assert shapes["hidden2.weight"] == (256, 256)
    assert shapes["head.weight"] == (10, 256)
    assert len(shapes) == 6
    deep = model("mlp", activation="relu", depth=5, width=200)
    assert [len(p) for n, p in deep.named_parameters() if n.endswith("weight")] == [200] * 5 + [10]


@pytest.mark.parametrize(
    ("name", "options"),
    [("mlp", {"activation": a, "depth": 5, "width": 200}) for a in ("relu", "tanh", "gelu")]
    + [(name, {}) for name in ("vgg11", "lenet5", "resnet18_cifar")],
)
def test_untrained_deep_nets_tell_images_apart(name, options):
    images = torch.rand(8, 3, 32, 32, generator=generator(3))
    features = features_of(model(name, side=32, **options), images)
    assert 0.1 < features.square().mean().sqrt() < 100
    assert (features - features.mean(0)).norm() > 0.02 * features.norm()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"name": "lenet", "depth": 3}, "--depth is no option of lenet: it is one of mlp"),
        ({"name": "mlp", "size": 3}, "no model has it"),
        ({"name": "mlp", "activation": "swish"}, "swish"),
        ({"name": "mlp", "depth": 0}, "depth 0"),
        ({"name": "mlp", "width": 0}, "width 0"),
    ],
)
def test_options_are_checked(change, word):
    with pytest.raises(ValueError, match=word):
        model(**change)


def test_the_small_resnet_keeps_its_resolution_and_its_names():
    small, large = model("resnet18_cifar", side=32), model("resnet18", side=32)
    assert small.state_dict().keys() == large.state_dict().keys()
    assert small.body.conv1.weight.shape == (64, 3, 3, 3)
    assert small.body.layer4(torch.zeros(1, 256, 8, 8)).shape == (1, 512, 4, 4)


@pytest.mark.parametrize("ending", [".pt", ".npz", ".safetensors"])
def test_checkpoints_load_from_every_format(tmp_path, ending):
    source, target = model(seed=1), model(seed=2)
    path = tmp_path / f"weights{ending}"
    torch.save(source.state_dict(), path) if ending == ".pt" else write_tensors(path, source.state_dict())
    load_checkpoint(target, path)
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))


def test_a_checkpoint_is_never_unpickled(tmp_path):
    path = tmp_path / "evil.pt"
    torch.save({"conv1.weight": Path_like()}, path)
    with pytest.raises(ValueError, match="safely"):
        load_checkpoint(model(), path)


class Path_like:  # noqa: N801
    """Any class that only unpickling could bring back."""


def test_a_checkpoint_that_does_not_fit_names_the_weight(tmp_path):
    weights = model().state_dict()
    weights["head.weight"] = weights["head.weight"][:, :-1]
    write_tensors(tmp_path / "a.npz", weights)
    with pytest.raises(ValueError, match=r"head\.weight.*\(10, 191\).*\(10, 192\)"):
        load_checkpoint(model(), tmp_path / "a.npz")
    del weights["head.weight"]
    write_tensors(tmp_path / "b.npz", weights)
    with pytest.raises(ValueError, match=r"head\.weight' is missing"):
        load_checkpoint(model(), tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", extra=np.zeros(2), **{k: v.numpy() for k, v in model().state_dict().items()})
    with pytest.raises(ValueError, match="extra"):
        load_checkpoint(model(), tmp_path / "c.npz")
    with pytest.raises(ValueError, match="no such file"):
        load_checkpoint(model(), tmp_path / "none.pt")
