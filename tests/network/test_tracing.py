"""The chain that a forward pass is read as, and what keeps it from being read."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from network.chain import measured
from network.head import Head, feature_range, features_of
from network.kinds import kind_of
from network.normalise import normalised
from network.outside import outside_model, try_out
from network.stage import Residual, run
from network.tracing import stages, verify
from update.gradients import gradient_and_part

LAYERS = {
    "conv": lambda: nn.Conv2d(3, 6, 3, padding=1),
    "bn": lambda: nn.BatchNorm2d(6),
    "fc": lambda: nn.Linear(96, 12),
    "head": lambda: nn.Linear(12, 5),
}


class Net(nn.Module):
    """Four layers, applied as a function of them and of images says."""

    def __init__(self, compute, **layers):
        super().__init__()
        for name, make in (LAYERS | layers).items():
            self.add_module(name, make())
        self.compute = compute

    def forward(self, x, scale=None):
        x = self.compute(self, x)
        return x if scale is None else scale * x


def net(compute, **layers):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net(compute, **layers).eval()


def images(count=3):
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def plain(m, x):
    x = functional.max_pool2d(functional.relu(m.bn(m.conv(x))), 2)
    return m.head(torch.tanh(m.fc(torch.flatten(x, 1))))


WALKED = {
    "functions": plain,
    "methods": lambda m, x: m.head(m.fc(functional.avg_pool2d(m.conv(x).relu(), 2).flatten(1)).sigmoid()),
    "view": lambda m, x: m.head(m.fc(functional.max_pool2d(m.conv(x), 3, 2, 1).view(x.size(0), -1)).relu_()),
    "reshape": lambda m, x: m.head(functional.gelu(m.fc(functional.max_pool2d(m.conv(x), 2).reshape(-1, 96)))),
    "shape": lambda m, x: m.head(m.fc(functional.adaptive_avg_pool2d(m.conv(x), (4, 4)).view((x.shape[0], -1))).relu()),
    "sum": lambda m, x: m.head(m.fc(functional.max_pool2d(m.bn(m.conv(x)) + m.conv2(x), 2).flatten(1)).relu()),
    "own sum": lambda m, x: m.head(m.fc(functional.max_pool2d(twice(m, m.conv(x)), 2).flatten(1)).relu()),
    "dropout": lambda m, x: m.head(
        functional.dropout(m.fc(functional.max_pool2d(m.conv(x), 2).flatten(1)), training=m.training)
    ),
}


def twice(m, x):
    y = m.bn(x)
    y += x
    return y


@pytest.mark.parametrize("name", WALKED)
def test_what_can_be_walked_is_what_is_computed(name):
    model = net(WALKED[name], conv2=lambda: nn.Conv2d(3, 6, 3, padding=1))
    assert torch.equal(run(stages(model), images()), model(images()))
    assert torch.equal(run(stages(model)[:-1], images()), features_of(model, images()))


def test_the_mean_over_positions_is_a_pool():
    model = net(lambda m, x: m.head(m.conv(x).relu().mean([2, 3])), head=lambda: nn.Linear(6, 5))
    assert torch.allclose(run(stages(model), images()), model(images()), atol=1e-6)
    kept = net(
        lambda m, x: m.head(m.conv(x).relu().mean((-2, -1), keepdim=True).flatten(1)), head=lambda: nn.Linear(6, 5)
    )
    assert torch.allclose(run(stages(kept), images()), kept(images()), atol=1e-6)


def test_the_branch_with_more_layers_is_the_body():
    model = net(WALKED["own sum"])
    (block,) = [stage for stage in stages(model) if isinstance(stage.module, Residual)]
    assert [stage.name for stage in block.module.body] == ["bn"]
    assert list(block.module.shortcut) == []
    model = net(WALKED["sum"], conv2=lambda: nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1)))
    (block,) = [stage for stage in stages(model) if isinstance(stage.module, Residual)]
    assert [stage.name for stage in block.module.body] == ["conv2.0", "conv2.1"]
    assert [stage.name for stage in block.module.shortcut] == ["conv", "bn"]


NOT_WALKED = {
    "function cat": lambda m, x: m.head(m.fc(torch.cat([functional.max_pool2d(m.conv(x), 2).flatten(1)], 1))),
    "function mul": lambda m, x: plain(m, x * 2),
    "function mul_1": lambda m, x: plain(m, torch.mul(x.mul(1), 2)),
    "function add": lambda m, x: plain(m, m.conv.weight[:1] + x),
    "function softmax": lambda m, x: plain(m, x.softmax(1)),
    "function view": lambda m, x: m.head(m.fc(functional.max_pool2d(m.conv(x), 2).view(3, -1))),
    "function dropout": lambda m, x: plain(m, functional.dropout(x)),
    "cannot be traced": lambda m, x: plain(m, x) if x.sum() > 0 else x,
    "puts out a tuple": lambda m, x: (plain(m, x), x),
    "is not linear": lambda m, x: plain(m, x).relu(),
}


@pytest.mark.parametrize("word", NOT_WALKED)
def test_the_reason_names_the_node(word):
    model = net(NOT_WALKED[word])
    for _ in range(2):  # asked again, it says the same
        with pytest.raises(ValueError, match=word.replace(".", r"\.")):
            stages(model)
    if "tuple" not in word:
        assert Head.of(model).layer is model.head  # the loop still knows its last layer
        assert feature_range(model) == (-float("inf"), float("inf"))


def test_batch_statistics_are_not_walked():
    model = net(plain, bn=lambda: nn.BatchNorm2d(6, track_running_stats=False))
    with pytest.raises(ValueError, match="bn has no running statistics"):
        stages(model)


def test_a_graph_that_is_not_what_is_computed_is_not_walked():
    def aliased(m, x):
        x = m.conv(x)
        kept = x
        x += m.bn(x)  # kept is now the sum, and the graph does not show it
        return m.head(m.fc(functional.max_pool2d(x + kept, 2).flatten(1)))

    model = net(aliased)
    verify(model, images())
    with pytest.raises(ValueError, match="not what it computes"):
        stages(model)
    good = net(plain)
    verify(good, images())
    assert stages(good)


def test_the_head_is_the_last_layer_used_not_the_last_registered():
    model = net(plain, late=lambda: nn.Linear(5, 5))
    assert Head.of(model).weight == "head.weight"
    assert feature_range(model) == (-1.0, 1.0)


def test_a_normalised_model_is_a_stage_longer_and_keeps_its_names():
    model, bare = net(plain), net(plain)
    normalised(model, 3, [0.4, 0.5, 0.6], [0.2])
    assert model.state_dict().keys() == bare.state_dict().keys()
    x = images()
    expected = bare((x - torch.tensor([0.4, 0.5, 0.6])[:, None, None]) / 0.2)
    assert torch.allclose(model(x), expected, atol=1e-5)
    assert torch.allclose(run(stages(model), x), expected, atol=1e-5)
    twin = copy.deepcopy(model).double()
    assert torch.allclose(run(stages(twin), x.double()), expected.double(), atol=1e-5)
    front = stages(model)[0].module
    assert torch.allclose(kind_of(front).inverted(front, front(x), x.shape[1:]), x, atol=1e-6)
    assert not front.train().training
    with pytest.raises(ValueError, match="2 numbers: images have 3 channels"):
        normalised(bare, 3, [0.1, 0.2], None)


def test_a_function_that_works_in_place_does_not_spoil_the_gradient_of_a_part():
    model = net(lambda m, x: m.head(functional.relu(m.fc(m.conv(x).relu_()[:, :, ::2, ::2].flatten(1)), inplace=True)))
    model.bn.requires_grad_(False)
    labels, subset = torch.tensor([0, 3, 1]), torch.tensor([0, 2])
    _, part = gradient_and_part(model, images(), labels, subset)
    alone, _ = gradient_and_part(model, images()[subset], labels[subset], torch.tensor([0, 1]))
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(part, alone, strict=True))


def test_a_shared_layer_is_not_walked():
    model = net(
        lambda m, x: m.head(m.fc(m.same(m.same(x)).flatten(1))),
        same=lambda: nn.Conv2d(3, 3, 1),
        fc=lambda: nn.Linear(192, 12),
    )
    with pytest.raises(ValueError, match="a weight is used twice"):
        stages(model)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "vgg11", "alexnet", "mobilenet_v2"])
def test_torchvision_s_classifiers_are_walked(name):
    generator = torch.Generator().manual_seed(0)
    before = torch.get_rng_state()
    model = outside_model(f"torchvision:{name}", num_classes=7, generator=generator)
    assert torch.equal(torch.get_rng_state(), before)
    try_out(model, name, (3, 64, 64), 7, generator)
    x = torch.rand(1, 3, 64, 64, generator=generator)
    assert torch.equal(run(stages(model), x), model(x))
    weights = [n for n, p in model.named_parameters() if p.dim() > 1]
    assert {f"{layer.name}.weight" for layer in measured(stages(model), (3, 64, 64))} == set(weights)
