import pytest
import torch
from torch import nn

from network.chain import index_of, input_shapes, measured, parametrised, substituted
from network.head import features_of
from network.stage import Residual, Stage, run
from network.tracing import stages
from network.zoo import MODELS, build_model

OPTIONS = [{"activation": a, "depth": d, "width": 24} for a in ("relu", "sigmoid", "tanh", "gelu") for d in (1, 5)]


def model(name, side=16, **options):
    generator = torch.Generator().manual_seed(0)
    return build_model(name, image_shape=(3, side, side), num_classes=7, generator=generator, **options)


def images(count=2, side=16):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("name", "options"), [(name, {}) for name in MODELS] + [("mlp", o) for o in OPTIONS])
def test_the_chain_is_the_model(name, options):
    net = model(name, **options)
    chain = stages(net)
    assert torch.equal(run(chain, images()), net(images()))
    assert torch.equal(run(chain[:-1], images()), features_of(net, images()))
    for start in (1, len(chain) // 2, len(chain) - 1):
        assert torch.equal(run(chain[start:], run(chain[:start], images())), net(images()))


@pytest.mark.parametrize("name", MODELS)
def test_every_weight_but_batch_norm_is_a_stage(name):
    net = model(name)
    wide = {n.removesuffix(".weight") for n, p in net.named_parameters() if p.dim() > 1}
    found = list(parametrised(stages(net)))
    assert {stage.name for stage in found} == wide
    assert all(net.get_submodule(stage.name) is stage.module for stage in found)


def test_geometry_says_what_the_layer_sees():
    net = model("resnet18_cifar", side=32)
    layers = {layer.name: layer for layer in measured(stages(net), (3, 32, 32))}
    last, shortcut = layers["body.layer4.1.conv1"], layers["body.layer4.0.downsample.0"]
    assert (last.input_shape, last.positions, last.channels_out, last.patch) == ((512, 4, 4), 16, 512, 512 * 9)
    assert (shortcut.input_shape, shortcut.output_shape) == ((256, 8, 8), (512, 4, 4))
    assert (layers["head"].input_shape, layers["head"].positions) == ((512,), 1)


def test_shapes_before_every_stage():
    chain = stages(model("lenet5", side=32))
    shapes = input_shapes(chain, (3, 32, 32))
    assert len(shapes) == len(chain) + 1
    assert shapes[index_of(chain, "conv2")] == (6, 14, 14)
    assert shapes[index_of(chain, "hidden1")] == (400,)
    assert shapes[-1] == (7,)


def test_a_layer_inside_a_block_is_found_at_the_block():
    chain = stages(model("resnet18"))
    assert index_of(chain, "body.layer3.0.conv2") == index_of(chain, "body.layer3.0")
    with pytest.raises(ValueError, match=r"layer9"):
        index_of(chain, "body.layer9")


def test_substitution_reaches_into_residual_stages():
    chain = [Stage("block", Residual([Stage("relu", nn.ReLU())], [Stage("tanh", nn.Tanh())]))]
    changed = substituted(chain, lambda module: nn.Identity() if isinstance(module, nn.ReLU) else module)
    x = torch.randn(3, 4)
    assert torch.equal(run(changed, x), x + x.tanh())
    assert torch.equal(run(chain, x), x.relu() + x.tanh())
