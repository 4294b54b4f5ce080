"""The chain that a forward pass is read as, and what keeps it from being read."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

from network.chain import index_of, inputs_along, measured, parametrised, unmixed_from
from network.head import Head, feature_range, features_of
from network.kinds import kind_of, pulled_below
from network.kinds.rearranged import Rearranged
from network.known_outputs import KnownOutputs
from network.normalise import normalised
from network.outside import outside_model, try_out
from network.stage import Residual, run
from network.tracing import stages, verify, why_not_walked
from network.unwalked import Unwalked
from network.zoo import build_model
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


OPAQUE_BELOW = {  # by what is said of it: a forward pass, and the stages that are walked above the opaque one
    "torch.cat joins": (
        lambda m, x: m.head(m.fc(torch.cat([pooled(m, x)[:, :9], pooled(m, x)[:, 9:]], 1)).relu()),
        ["fc", "head"],
    ),
    "multiplied, as by a gate": (lambda m, x: m.head(m.fc(gated(m.conv(x)).relu().flatten(1))), ["fc", "head"]),
    "weight is used twice": (lambda m, x: m.head(m.fc(pooled(m, x) * m.fc.weight[0])), ["head"]),
    "a softmax mixes": (lambda m, x: plain(m, x.softmax(1)), None),
    "another shape than one for each": (lambda m, x: m.head(m.fc(pooled(m, x).view(3, -1))), ["fc", "head"]),
    "dropout is switched on": (lambda m, x: plain(m, functional.dropout(x)), None),
    "function sin is no stage": (lambda m, x: m.head(m.fc(pooled(m, x)).sin()), ["head"]),
    "order (permute)": (lambda m, x: m.head(m.fc(pooled(m, x.permute(1, 0, 2, 3).permute(1, 0, 2, 3)))), None),
    "only a part": (lambda m, x: m.head(m.fc(pooled(m, x))[:, :12].relu()), ["head"]),
    "as a class token": (lambda m, x: m.head(m.fc(torch.stack([pooled(m, x)], 1)[:, 0]).relu()), ["fc", "head"]),
    "each position's channels": (
        lambda m, x: m.head(m.fc(functional.layer_norm(pooled(m, x), (96,))).relu()),
        ["fc", "head"],
    ),
    "cut into windows": (
        lambda m, x: m.head(m.fc(pooled(m, x).view(3, 6, 2, 2, 2, 2).flatten(1)).relu()),
        ["fc", "head"],
    ),
    "attention, which mixes": (lambda m, x: m.head(m.fc(attended(pooled(m, x))).relu()), ["fc", "head"]),
}


def attended(x):
    return functional.scaled_dot_product_attention(x, x, x)


def pooled(m, x):
    return functional.max_pool2d(m.conv(x), 2).flatten(1)


def gated(x):
    return functional.max_pool2d(torch.mul(input=x, other=x.mean((2, 3), keepdim=True).sigmoid()), 2)


@pytest.mark.parametrize("word", OPAQUE_BELOW)
def test_what_cannot_be_walked_is_one_stage_below_all_that_can(word):
    compute, above = OPAQUE_BELOW[word]
    model = net(compute)
    chain = stages(model)
    assert isinstance(chain[0].module, Unwalked)
    assert word in chain[0].module.reason
    assert word in why_not_walked(model)
    if above:
        assert [stage.name for stage in parametrised(chain)] == above
    if "dropout" in word:
        return
    assert torch.allclose(run(chain, images()), model(images()), atol=1e-6)
    twin = copy.deepcopy(model).double()  # a copy's chain is of the copy's own layers
    twin.conv.weight.data *= 2
    assert torch.allclose(run(stages(twin), images().double()), twin(images().double()))
    assert Head.of(model).layer is model.head


def test_no_stage_is_named_as_a_node_of_the_graph_is():
    def twice_in_order(m, x):
        x = torch.stack([m.conv(x)]).sum(0)
        return m.head(
            m.fc(functional.max_pool2d(x.permute(0, 2, 3, 1).relu().permute(0, 3, 1, 2), 2).flatten(1)).relu()
        )

    names = [stage.name for stage in stages(net(twice_in_order))]
    assert names == [
        "all below fc",
        "permute 1",
        "relu 1",
        "permute 2",
        "max_pool2d",
        "flatten",
        "fc",
        "relu 2",
        "head",
    ]


def test_gradients_pass_through_an_opaque_stage_twice():
    model = net(lambda m, x: m.head(m.fc(torch.cat([functional.hardsigmoid(m.conv(x))], 1)[:, :, ::2, ::2].flatten(1))))
    x = images().requires_grad_()
    (first,) = torch.autograd.grad(run(stages(model), x).square().sum(), x, create_graph=True)
    assert torch.autograd.grad(first.square().sum(), x)[0].any()


HEADLESS = {
    "puts out a tuple": lambda m, x: (plain(m, x), x),
    "is not linear": lambda m, x: plain(m, x).relu(),
    "the softmax is taken twice": lambda m, x: plain(m, x).softmax(1),
    "does not end in a linear layer": lambda m, x: torch.cat([plain(m, x), plain(m, x)], 1),
    "cannot be traced": lambda m, x: plain(m, x) if x.sum() > 0 else x,
}


@pytest.mark.parametrize("word", HEADLESS)
def test_a_model_without_a_head_at_its_end_has_no_chain(word):
    model = net(HEADLESS[word])
    for _ in range(2):  # asked again, it says the same
        with pytest.raises(ValueError, match=word):
            stages(model)
    assert word in why_not_walked(model)
    if "tuple" not in word:
        assert feature_range(model) == (-float("inf"), float("inf"))


UNCHANGED = {
    "log_softmax": lambda m, x: functional.log_softmax(plain(m, x), dim=1),
    "method": lambda m, x: plain(m, x).log_softmax(-1),
    "log of softmax": lambda m, x: torch.log(plain(m, x).softmax(dim=-1)),
    "view behind": lambda m, x: plain(m, x).flatten(1).contiguous().log_softmax(1),
    "module": lambda m, x: m.last(m.idle(plain(m, x))),
}


@pytest.mark.parametrize("name", UNCHANGED)
def test_a_log_softmax_in_the_end_is_left_out(name):
    model = net(UNCHANGED[name], last=lambda: nn.LogSoftmax(dim=1), idle=lambda: nn.Dropout())
    verify(model, images())
    assert stages(model)[-1].module is model.head
    assert torch.allclose(run(stages(model), images()).log_softmax(1), model(images()), atol=1e-6)


def test_a_softmax_over_the_images_is_not_left_out():
    with pytest.raises(ValueError, match="log_softmax is no stage"):
        stages(net(lambda m, x: plain(m, x).log_softmax(0)))


SCALED = {
    "numbers": lambda m, x: (x - 0.5) / 0.25,
    "buffers": lambda m, x: (x - m.mean[None, :, None, None]) / m.std.view(-1, 1, 1),
    "methods": lambda m, x: x.sub(m.mean.view(1, 3, 1, 1)).div_(0.3),
    "to both ends": lambda m, x: 2 * x - 1,
    "from above": lambda m, x: 1 - x,
    "constants": lambda m, x: torch.sub(x, torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) * 4,
    "parameter": lambda m, x: x + m.shift,
}


@pytest.mark.parametrize("name", SCALED)
def test_a_normalisation_in_the_forward_pass_is_walked_through(name):
    model = net(lambda m, x: plain(m, SCALED[name](m, x)))
    model.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]))
    model.register_buffer("std", torch.tensor([0.2, 0.3, 0.4]))
    model.shift = nn.Parameter(torch.rand(3, 8, 8))
    verify(model, images())
    assert not why_not_walked(model)
    model.std.copy_(torch.tensor([0.5, 0.6, 0.7]))  # as --weights does once the model has been read
    twin, x = copy.deepcopy(model).double(), images().double()
    chain = stages(twin)
    assert torch.equal(run(chain, x), twin(x))
    first = next(i for i, stage in enumerate(chain) if stage.name == "conv")
    y = run(chain[:first], x)
    for stage in reversed(chain[:first]):
        y = kind_of(stage.module).inverted(stage.module, y, x.shape[1:])
    assert torch.allclose(y, x)


def test_a_constant_that_makes_more_channels_is_not_inverted():
    model = net(lambda m, x: plain(m, x[:, :1] + torch.ones(3, 1, 1)))
    (stage,) = [stage for stage in stages(model) if stage.name.startswith("add")]
    assert "more entries" in kind_of(stage.module).why_not(stage.module, (1, 8, 8), (3, 8, 8))


IDLE = {
    "dropouts": lambda m, x: m.quiet(m.dropped(x)),
    "calls": lambda m, x: functional.dropout2d(x.contiguous().clone(), training=m.training),
    "shapes": lambda m, x: x.unsqueeze(2).squeeze(2).view(x.size(0), 3, 8, 8).to(torch.float32),
    "view of sizes": lambda m, x: x.reshape(-1, 3, 64).unflatten(2, (8, 8)),
}


@pytest.mark.parametrize("name", IDLE)
def test_what_changes_nothing_does_not_stop_the_walk(name):
    model = net(
        lambda m, x: plain(m, IDLE[name](m, x)), quiet=lambda: nn.AlphaDropout(), dropped=lambda: nn.Dropout2d()
    )
    assert not why_not_walked(model)
    chain = stages(model)
    assert all(kind_of(stage.module).is_reshape for stage in chain[: [s.name for s in chain].index("conv")])
    assert torch.equal(run(chain, images()), model(images()))


def test_batch_statistics_are_not_walked_and_those_of_one_image_mix_nothing():
    model = net(plain, bn=lambda: nn.BatchNorm2d(6, track_running_stats=False))
    assert "bn has no running statistics" in why_not_walked(model)
    assert unmixed_from(stages(model)) == 1  # the opaque stage mixes the images, those above it do not
    model = net(plain, bn=lambda: nn.InstanceNorm2d(6, affine=True))
    assert not why_not_walked(model)
    assert unmixed_from(stages(model)) == 0


def aliased(m, x):
    x = m.conv(x)
    kept = x
    x += m.bn(x)  # kept is now the sum, and the graph does not show it
    return m.head(m.fc(functional.max_pool2d(x + kept, 2).flatten(1)))


def undecided(m, x):
    assert x.sum() < 1e9  # a stand-in for a tensor has no truth
    return m.head(m.fc(pooled(m, x))).log_softmax(1)


@pytest.mark.parametrize(("compute", "word"), [(aliased, "not what it computes"), (undecided, "cannot be traced")])
def test_of_a_graph_that_is_not_what_is_computed_the_head_is_left(compute, word):
    model = normalised(net(compute, late=lambda: nn.Linear(5, 5)), 3, [0.5], [0.2])
    verify(model, images())
    for read in (model, copy.deepcopy(model)):
        chain = stages(read)
        assert [stage.module for stage in parametrised(chain)] == [read.head]
        assert word in why_not_walked(read)
        assert torch.allclose(run(chain, images()).log_softmax(1), read(images()).log_softmax(1), atol=1e-6)
    good = net(plain)
    verify(good, images())
    assert not why_not_walked(good)


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
    assert front.eps > 0  # several versions of torch refuse a BatchNorm without
    assert torch.equal(front.running_var + front.eps, front.running_var)
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
    assert "layer same, Conv2d: a weight is used twice" in why_not_walked(model)
    assert [stage.name for stage in parametrised(stages(model))] == ["fc", "head"]
    tied = net(
        lambda m, x: m.head(m.fc(m.b(m.a(x)).flatten(1))), a=lambda: nn.Conv2d(3, 3, 1), fc=lambda: nn.Linear(192, 12)
    )
    tied.b = nn.Conv2d(3, 3, 1)
    tied.b.weight = tied.a.weight
    assert "layer b, Conv2d: a weight is used twice" in why_not_walked(tied)


@pytest.mark.parametrize("parametrise", [weight_norm, spectral_norm, orthogonal, torch.nn.utils.weight_norm])
def test_two_parametrised_layers_are_not_one(parametrise):
    model = net(plain)
    for name in ("conv", "fc", "head"):
        setattr(model, name, parametrise(getattr(model, name)))
    assert not why_not_walked(model.eval())
    assert len(list(parametrised(stages(model)))) == 3


@pytest.mark.parametrize("container", [nn.Sequential, "own"])
def test_a_container_that_calls_its_children_normalises_once(container):
    class Own(nn.Module):
        def __init__(self, *layers):
            super().__init__()
            self.layers = nn.ModuleList(layers)
            for index, layer in enumerate(layers):
                self.add_module(f"layer{index}", layer)

        def forward(self, x):
            for name, layer in self.named_children():
                x = layer(x) if name.startswith("layer") and name != "layers" else x
            return x

    layers = [nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5)]
    model = (Own if container == "own" else container)(*layers)
    expected = model((images() - 0.5) / 0.25)
    names = [*model.state_dict()]
    model = normalised(model, 3, [0.5], [0.25])
    assert torch.allclose(model(images()), expected, atol=1e-5)
    assert [*model.state_dict()] == names
    twin = copy.deepcopy(model).double()
    assert torch.allclose(run(stages(twin), images().double()), twin(images().double()))


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "alexnet", "mobilenet_v2"])
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


def test_a_channel_shuffle_is_one_stage_and_its_inputs_are_its_outputs_in_another_order():
    def shuffled(m, x):
        z = m.conv(x)
        count, channels, height, width = z.size()
        z = z.view(count, 2, channels // 2, height, width).transpose(1, 2).contiguous()
        return m.head(m.fc(functional.max_pool2d(z.view(count, channels, height, width), 2).flatten(1)))

    model = net(shuffled)
    chain = stages(model)
    assert not why_not_walked(model)
    assert torch.allclose(run(chain, images()), model(images()), atol=1e-6)
    module = next(stage.module for stage in chain if isinstance(stage.module, Rearranged))
    z = torch.randn(2, 6, 4, 5)
    assert not torch.equal(module(z), z)
    told = pulled_below(module, KnownOutputs.of(module(z), module(2 * z), torch.ones_like(z)), z.shape[1:])
    assert torch.equal(told.values, z)
    assert torch.equal(told.delta, 2 * z)
    assert torch.equal(kind_of(module).inverted(module, module(z), z.shape[1:]), z)


JOINED = {  # what is joined of the convolution's six channels
    "parts of a split": lambda m, z: torch.cat([z.split(2, 1)[2], z.split(2, 1)[0].relu(), z.split(2, 1)[1]], 1),
    "three branches": lambda m, z: torch.cat((z.chunk(3, 1)[0], z.chunk(3, 1)[1].tanh(), z.chunk(3, 1)[2]), dim=1),
    "one tensor": lambda m, z: torch.cat([z], 1),
}


class Branching(nn.Module):
    """A block with a join inside a branch of another join, as Inception's last ones have it."""

    def __init__(self):
        super().__init__()
        self.low, self.left, self.right = nn.Conv2d(6, 4, 1), nn.Conv2d(4, 3, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        y = self.low(x).relu()
        return torch.cat([x, torch.cat([self.left(y), self.right(y)], 1)], 1)


def test_a_join_inside_a_branch_has_a_name_of_its_own():
    layers = {"block": Branching, "fc": lambda: nn.Linear(11 * 16, 12)}
    model = net(lambda m, x: m.head(m.fc(functional.max_pool2d(m.block(m.conv(x)), 2).flatten(1))), **layers)
    chain = stages(model)
    assert not why_not_walked(model)
    assert torch.allclose(run(chain, images()), model(images()), atol=1e-6)
    shapes = {}
    for stage, x in inputs_along(chain, images()):
        assert shapes.setdefault(stage.name, x.shape) == x.shape
        assert index_of(chain, stage.name) < len(chain)


@pytest.mark.parametrize("case", JOINED)
def test_joined_channels_are_those_of_the_model(case):
    model = net(lambda m, x: m.head(m.fc(functional.max_pool2d(JOINED[case](m, m.conv(x)), 2).flatten(1))))
    assert torch.allclose(run(stages(model), images()), model(images()), atol=1e-6)
    assert not why_not_walked(model)


@pytest.mark.parametrize("name", ["densenet121", "googlenet", "shufflenet_v2_x0_5"])
def test_families_that_join_channels_are_walked(name):
    model = build_model(f"torchvision:{name}", image_shape=(3, 64, 64), num_classes=10, generator=torch.Generator())
    assert not why_not_walked(model)
    assert len(list(parametrised(stages(model)))) > 50
