import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from client.victim import share_update
from network.parameters import freeze, named_by, trainable
from network.zoo import build_model
from update.gradients import averaged_gradient, gradient_and_part
from update.loss import CROSS_ENTROPY
from update.shared import SharedUpdate
from update.storage import StorageError, read_tensors, write_tensors


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def case(dtype=torch.float64, name="lenet"):
    model = build_model(name, image_shape=(3, 16, 16), num_classes=5, generator=generator()).to(dtype)
    images = torch.rand(3, 3, 16, 16, generator=generator(1)).to(dtype)
    return model, images, torch.tensor([4, 0, 4])


@pytest.mark.parametrize("name", ["lenet", "mlp", "convnet"])
def test_the_batch_gradient_is_the_mean_of_the_images_gradients(name):
    model, images, labels = case(name=name)
    together = averaged_gradient(model, images, labels)
    alone = [averaged_gradient(model, images[i : i + 1], labels[i : i + 1]) for i in range(3)]
    for whole, parts in zip(together, zip(*alone, strict=True), strict=True):
        assert torch.allclose(whole, sum(parts) / 3)


def test_gradient_agrees_with_finite_differences():
    model, images, labels = case()
    gradient = dict(zip(dict(model.named_parameters()), averaged_gradient(model, images, labels), strict=True))
    h = 1e-6
    for name, index in [("conv1.weight", 0), ("conv2.bias", 3), ("head.weight", 17), ("head.bias", 4)]:
        flat = model.get_parameter(name).data.view(-1)
        losses = []
        for sign in (1, -1):
            flat[index] += sign * h
            losses.append(CROSS_ENTROPY.each(model(images), labels).mean().item())
            flat[index] -= sign * h
        assert gradient[name].flatten()[index].item() == pytest.approx((losses[0] - losses[1]) / (2 * h), rel=1e-5)


def test_head_bias_gradient_is_the_mean_softmax_error():
    model, images, labels = case()
    error = model(images).softmax(1) - torch.nn.functional.one_hot(labels, 5)
    assert torch.allclose(averaged_gradient(model, images, labels)[-1], error.mean(0))


def test_soft_labels_that_are_one_hot_are_class_indices():
    model, images, labels = case()
    soft = torch.nn.functional.one_hot(labels, 5).double()
    pairs = zip(averaged_gradient(model, images, labels), averaged_gradient(model, images, soft), strict=True)
    assert all(torch.allclose(hard, easy) for hard, easy in pairs)


@pytest.mark.parametrize("ending", [".npz", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_saved_update_comes_back_bit_for_bit(tmp_path, ending, dtype):
    model, images, labels = case(dtype)
    update = share_update(model, "lenet", images, labels, 5)
    path = tmp_path / "folder" / f"update{ending}"
    update.save(path)
    loaded = SharedUpdate.load(path)
    assert (loaded.model, loaded.batch_size, loaded.image_shape, loaded.num_classes) == ("lenet", 3, (3, 16, 16), 5)
    for mine, theirs in ((update.gradients, loaded.gradients), (update.weights, loaded.weights)):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert list(tmp_path.rglob("*.partial")) == []


def test_an_update_holds_nothing_of_the_images_or_labels():
    model, images, labels = case()
    update = share_update(model, "lenet", images, labels, 5)
    parameters = {name: p.shape for name, p in model.named_parameters()}
    assert {name: g.shape for name, g in update.gradients.items()} == parameters
    assert {name: w.shape for name, w in update.weights.items()} == parameters
    assert not any(g.requires_grad for g in update.gradients.values())


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([".npz", ".safetensors"]), st.integers(0, 4), st.text(max_size=20))
def test_stored_tensors_round_trip(tmp_path_factory, ending, dimensions, text):
    path = tmp_path_factory.mktemp("round") / f"tensors{ending}"
    tensor = torch.randn([2] * dimensions, generator=generator())
    text = text.replace("\0", "")  # numpy drops trailing NULs
    write_tensors(path, {"a/b.c": tensor}, {"note": text})
    tensors, notes = read_tensors(path)
    assert torch.equal(tensors["a/b.c"], tensor)
    assert notes == {"note": text}


@pytest.mark.parametrize("ending", [".npz", ".safetensors"])
def test_damaged_and_missing_files_are_refused(tmp_path, ending):
    model, images, labels = case()
    path = tmp_path / f"update{ending}"
    share_update(model, "lenet", images, labels, 5).save(path)
    content = path.read_bytes()
    array = io.BytesIO()
    np.save(array, np.zeros(3))
    for damage in (content[: len(content) // 2], b"", b"not a file of tensors", array.getvalue()):
        path.write_bytes(damage)
        with pytest.raises(StorageError, match=rf"{path.name} is damaged or not an? {ending} file") as error:
            SharedUpdate.load(path)
        assert not any(word in str(error.value) for word in ("pickle", "numpy"))
    with pytest.raises(StorageError, match="no such file"):
        SharedUpdate.load(tmp_path / f"none{ending}")


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")  # deprecated, but files have them
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.5, 0, torch.qint8),
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.empty(3, device="meta"),
    ],
    ids=["quantised", "sparse", "meta"],
)
def test_a_tensor_that_holds_no_plain_numbers_is_named(tmp_path, make):
    torch.save({"weight": torch.ones(3)}, tmp_path / "good.pt")
    assert torch.equal(read_tensors(tmp_path / "good.pt")[0]["weight"], torch.ones(3))
    torch.save({"weight": torch.ones(3), "bias": make()}, tmp_path / "bad.pt")
    with pytest.raises(StorageError, match=r"bad\.pt: 'bias' is not a dense tensor of numbers"):
        read_tensors(tmp_path / "bad.pt")


def test_other_tensors_are_no_update(tmp_path):
    write_tensors(tmp_path / "weights.npz", {"a": torch.zeros(2)})
    with pytest.raises(StorageError, match="not a shared update"):
        SharedUpdate.load(tmp_path / "weights.npz")
    with pytest.raises(StorageError, match=r"\.safetensors or \.npz"):
        SharedUpdate.load(tmp_path / "weights.txt")


def test_a_gradient_that_is_not_finite_is_refused(tmp_path):
    model, images, labels = case()
    update = share_update(model, "lenet", images, labels, 5)
    update.gradients["conv2.bias"][3] = float("nan")
    update.save(tmp_path / "nan.npz")
    with pytest.raises(StorageError, match=r"conv2\.bias.*not finite"):
        SharedUpdate.load(tmp_path / "nan.npz")
    with pytest.raises(ValueError, match="not finite"):
        share_update(model, "lenet", images * float("inf"), labels, 5)


def test_targets_refuse_another_models_update():
    model, images, labels = case()
    update = share_update(model, "lenet", images, labels, 5)
    other = build_model("mlp", image_shape=(3, 16, 16), num_classes=5, generator=generator())
    with pytest.raises(ValueError, match="disagree"):
        update.targets(other)
    wider = build_model("lenet", image_shape=(3, 16, 16), num_classes=6, generator=generator())
    with pytest.raises(ValueError, match=r"head\.weight"):
        update.targets(wider)


@pytest.mark.parametrize("name", ["lenet", "mlp", "convnet", "resnet18"])
@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_a_part_of_the_batch_has_its_own_mean_in_the_same_pass(name, labels):
    model, images, hard = case(name=name)
    chosen = hard if labels == "hard" else torch.rand(3, 5, generator=generator(2)).double().softmax(1)
    images.requires_grad_()
    subset = torch.tensor([2, 0])
    whole, part = gradient_and_part(model, images, chosen, subset)
    expected = (
        averaged_gradient(model, images, chosen, create_graph=True),
        averaged_gradient(model, images[subset], chosen[subset], create_graph=True),
    )
    for mine, theirs in zip((whole, part), expected, strict=True):
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(mine, theirs, strict=True))
        slopes = [
            torch.autograd.grad(sum(g.square().sum() for g in t), images, retain_graph=True) for t in (mine, theirs)
        ]
        assert torch.allclose(*(slope for (slope,) in slopes), rtol=1e-6, atol=1e-12)


def test_a_part_in_a_model_with_frozen_or_unknown_layers():
    model, images, labels = case()
    freeze(model, ["conv1.weight", "conv1.bias", "head.bias"])
    subset = torch.tensor([1])
    for net in (model, torch.nn.Sequential(model, torch.nn.PReLU(dtype=torch.float64))):
        whole, part = gradient_and_part(net, images, labels, subset)
        for mine, rows in ((whole, slice(None)), (part, subset)):
            expected = averaged_gradient(net, images[rows], labels[rows])
            assert len(mine) == len(expected)
            assert all(torch.allclose(a, b) for a, b in zip(mine, expected, strict=True))


def test_freezing_goes_by_whole_names_and_prefixes_are_spelled_out_first():
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.ab = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))

    model = Two()
    freeze(model, ["a"])
    assert list(trainable(model)) == ["ab"]
    assert named_by(Two(), ["a"]) == ["a", "ab"]
    with pytest.raises(ValueError, match="nothing is left"):
        freeze(model, ["a", "ab"])
    with pytest.raises(ValueError, match=r"'b'.*the model has a, ab"):
        named_by(model, ["b"])
