"""Keras's layout of kernels, which is that of Flax too, against torch's."""

import numpy as np
import pytest
import torch
from conftest import generator
from torch import nn

from network.flattening import flattened_shapes
from update.received import averaged_gradients, recognised
from update.storage import StorageError
from update.training import FEDSGD
from update.weights import load_checkpoint

SHAPE = (3, 8, 10)


class Functional(nn.Module):
    """Flattens in forward, behind a pool and in front of dropout, as most models do."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(6 * 4 * 5, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = nn.functional.max_pool2d(self.conv(x).relu(), 2)
        x = nn.functional.dropout(x.view(x.size(0), -1), training=self.training)
        return self.head(self.fc2(self.fc1(x).relu()).relu())


class ChannelsLast(Functional):
    def forward(self, x):
        x = nn.functional.max_pool2d(self.conv(x).relu(), 2).permute(0, 2, 3, 1)
        return self.head(self.fc2(self.fc1(torch.flatten(x, 1)).relu()).relu())


class ThereAndBack(Functional):
    def forward(self, x):
        return super().forward(x.transpose(1, 3).relu().transpose(1, 3))


def depthwise():
    layers = [nn.Conv2d(3, 6, 3, groups=3), nn.ReLU(), nn.Conv2d(6, 5, 1), nn.BatchNorm2d(5), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4))


def dense():
    return nn.Sequential(nn.Flatten(), nn.Linear(240, 240), nn.Sigmoid(), nn.Linear(240, 4))


MODELS = {  # with the shape before the flattening, by the name of the dense layer behind it
    Functional: {"fc1.weight": (6, 4, 5)},
    ChannelsLast: {},
    ThereAndBack: {"fc1.weight": (6, 4, 5)},
    depthwise: {},
    dense: {"1.weight": (3, 8, 10)},
}


@pytest.mark.parametrize("make", MODELS)
def test_layers_behind_a_flattening_are_found(make):
    assert flattened_shapes(make().eval(), SHAPE) == MODELS[make]


class Keras:
    """The layers of a model as Keras runs them: images (B, h, w, c), kernels of Keras's shapes."""

    def __init__(self, model, make):
        self.kernels = [self.kernel(name, value, MODELS[make].get(name)) for name, value in model.state_dict().items()]

    @staticmethod
    def kernel(name, value, flattened):
        value = value.numpy()
        if value.ndim == 4 and value.shape[1] == 1:
            return value.reshape(3, -1, *value.shape[2:]).transpose(2, 3, 0, 1)  # (h, w, in, m)
        if value.ndim == 4:
            return value.transpose(2, 3, 1, 0)
        if flattened:
            c, h, w = flattened
            return value.reshape(-1, c, h, w).transpose(2, 3, 1, 0).reshape(h * w * c, -1)
        return value.T if value.ndim == 2 else value


@pytest.mark.parametrize("make", MODELS)
def test_every_kernel_comes_back_from_keras(make):
    model = make().eval()
    state = [name for name in model.state_dict() if "tracked" not in name]
    arrays = [a for a in Keras(model, make).kernels if np.ndim(a)]
    tensors = {f"arr_{index}": torch.from_numpy(np.ascontiguousarray(a)) for index, a in enumerate(arrays)}
    found, notes = recognised(tensors, model, SHAPE, "u.npz")
    assert all(torch.equal(found[name], model.state_dict()[name]) for name in state)
    (note,) = [note for note in notes if "Keras's layout" in note]
    assert ("(h, w, in, out)" in note) == (make is not dense)
    assert all(repr(name) in note and "(h, w, c)" in note for name in MODELS[make])
    assert ("transpose the kernels in the file yourself" in note) == (make is dense)


KERAS_NAMES = {
    "Keras": [
        "conv2d/kernel:0",
        "conv2d/bias:0",
        "bn/gamma:0",
        "bn/beta:0",
        "bn/moving_mean:0",
        "bn/moving_variance:0",
    ],
    "Flax": [
        "Conv_0/bias",
        "Conv_0/kernel",
        "Norm_0/bias",
        "Norm_0/scale",
        "Norm_0/moving_mean",
        "Norm_0/moving_variance",
    ],
}
TORCH_NAMES = {"kernel": "0.weight", "gamma": "1.weight", "scale": "1.weight", "beta": "1.bias"}
TORCH_NAMES |= {"moving_mean": "1.running_mean", "moving_variance": "1.running_var"}


@pytest.mark.parametrize("names", KERAS_NAMES)
def test_arrays_by_keras_names_are_taken_in_the_order_of_their_layers(names):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 6 * 8, 5)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(generator=generator())
    tensors = {}
    for name in KERAS_NAMES[names]:
        layer, end = name.partition(":")[0].split("/")
        own = TORCH_NAMES.get(end) or ("0.bias" if layer.lower().startswith("conv") else "1.bias")
        value = model.state_dict()[own]
        tensors[name] = value.permute(2, 3, 1, 0) if value.dim() == 4 else value
    head = model.state_dict()["3.weight"].reshape(5, 4, 6, 8).permute(2, 3, 1, 0).reshape(-1, 5)
    tensors |= {"dense/kernel:0": head, "dense/bias:0": model.state_dict()["3.bias"]}
    found, notes = recognised(tensors, model, SHAPE, "u.npz")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in found.items())
    assert len(found) == 8
    assert "names are Keras's" in notes[0]


def test_a_dense_layer_in_keras_gives_the_same_logits(tmp_path):
    """Against numpy's own arithmetic on images with channels last."""
    images = torch.rand(2, *SHAPE, generator=generator())
    draw = np.random.default_rng(0)
    first, second = draw.normal(size=(240, 240)).astype(np.float32) / 20, draw.normal(size=(240, 4)).astype(np.float32)
    flat = images.permute(0, 2, 3, 1).reshape(2, -1).numpy()
    expected = 1 / (1 + np.exp(-flat @ first)) @ second
    np.savez(tmp_path / "w.npz", first, np.zeros(240, np.float32), second, np.zeros(4, np.float32))
    model = dense()
    load_checkpoint(model, tmp_path / "w.npz", SHAPE)
    np.testing.assert_allclose(model(images).detach().numpy(), expected, rtol=1e-4, atol=1e-4)


def test_kernels_that_are_alike_in_both_layouts_are_torchs_and_said():
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
    found, (note,) = recognised(tensors, model, (6, 1, 1), "u.npz")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert "same shape" in note


def test_torchs_own_layout_is_left_alone():
    model = Functional().eval()
    tensors = dict(model.state_dict())
    assert recognised(tensors, model, SHAPE, "u.npz") == (tensors, [])


@pytest.mark.parametrize(
    ("name", "axes", "words"), [("conv.weight", (2, 3, 1, 0), r"\(3, 2, 0, 1\)"), ("fc1.weight", (1, 0), "rows")]
)
def test_a_file_that_mixes_layouts_is_refused_with_the_way_on(name, axes, words):
    model = Functional().eval()
    tensors = dict(model.named_parameters())
    tensors[name] = tensors[name].detach().permute(axes)
    tensors, notes = recognised(tensors, model, SHAPE, "u.npz")
    assert notes == []
    with pytest.raises(StorageError, match=words):
        averaged_gradients(tensors, model, "gradient", FEDSGD.combination(), "u.npz")
    with pytest.raises(ValueError, match=words):
        load_into(model, tensors)


def load_into(model, tensors):
    from update.weights import load_weights

    load_weights(model, tensors, "w.npz")
