import pytest
import torch
from batchnorm import Blocks, Shared, drawn
from conftest import generator
from torch import nn

from attack.read.forecast import explain
from attack.read.reader import read_layers
from client.victim import share_update
from data import load_batch, open_source
from network.tracing import stages
from network.zoo import MODELS, build_model
from update.batchnorm import use_batch_statistics
from update.training import LocalTraining


def built(name, side=32, num_classes=10):
    generator = torch.Generator().manual_seed(0)
    return build_model(name, image_shape=(3, side, side), num_classes=num_classes, generator=generator)


def explained(net, batch_size, side):
    return {row["layer"]: row for row in explain(stages(net), (3, side, side), batch_size)}


def rows(name, batch_size, side=32, num_classes=10):
    return explained(built(name, side, num_classes), batch_size, side)


def test_small_maps_of_wide_layers_are_spanned():
    table = rows("resnet18_cifar", 16)
    last = table["body.layer4.1.conv1"]
    assert (last["positions"], last["rank_bound"], last["rank_room"], last["spanned"]) == (16, 256, 512, True)
    assert not table["body.layer3.1.conv1"]["spanned"]  # 1,024 patches in 256 channels
    assert table["body.layer3.1.conv1"]["known"]  # but determined from above
    assert not table["body.conv1"]["known"]


def test_as_many_channels_as_patches_are_spanned_where_patches_overlap():
    assert rows("resnet18_cifar", 32)["body.layer4.1.conv1"]["spanned"]  # 32 x 16 patches in 512 channels
    assert rows("resnet18_cifar", 32)["body.layer4.1.conv1"]["known"]
    assert not rows("resnet18_cifar", 33)["body.layer4.1.conv1"]["spanned"]


def test_larger_batches_leave_more_unknown():
    known = [sum(row["known"] for row in rows("resnet18_cifar", size).values()) for size in (1, 4, 16, 64)]
    assert known == sorted(known, reverse=True)
    assert known[0] > known[1] > known[2] > known[3]


def test_both_branches_of_a_block_share_their_input():
    table = rows("resnet18_cifar", 4)
    assert table["body.layer4.0.conv1"]["equations"] == table["body.layer4.0.downsample.0"]["equations"]
    # 4,608 rows for each of 256 channels in the body, in the shortcut 512 for a quarter of the 4 x 64 entries that it
    # leaves no more open, half of what conv1 and the block put out
    assert table["body.layer4.0.conv1"]["equations"] == 256 * (4608 + 64) + 2 * (4 * 512 * 16 // 2)


def test_pools_keep_delta_from_coming_down():
    table = rows("vgg11", 40)
    assert table["conv7"]["known"]
    assert not table["conv6"]["known"]  # 40 x 16 patches, and a pool above
    assert table["conv6"]["equations"] == 0


def test_the_head_tells_fewer_images_than_it_has_classes():
    assert rows("lenet", 9)["head"]["spanned"]
    assert not rows("lenet", 10)["head"]["spanned"]
    assert not any(row["known"] for row in rows("lenet", 10).values())


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_has_a_row_and_one_is_the_deepest(name):
    table = rows(name, 2, side=16)
    assert sum(row["deepest"] for row in table.values()) == 1
    for row in table.values():
        assert row["known"] or not row["deepest"]
        assert row["rank_bound"] == 2 * row["positions"]


# ----------------------------------------------------------------------------------------------------
# The forecast promises nothing that the walk refuses


def sequential(*layers):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(*layers).eval()


def grouped():
    """A convolution in groups, of too few rows each, between a layer that is spanned and the images."""
    entry = nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.ReLU()
    middle = nn.Conv2d(32, 128, 3, stride=4, padding=1, groups=32), nn.ReLU()
    return sequential(*entry, *middle, nn.Conv2d(128, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))


def read(net, count, **training):
    found = load_batch(
        open_source("sample", None),
        range(count),
        labels="dataset",
        num_classes=10,
        generator=torch.Generator().manual_seed(0),
        image_size=16,
    )
    update = share_update(net, "net", found.images, found.labels, 10, training=LocalTraining(**training))
    return read_layers(update, net, generator=torch.Generator().manual_seed(1))


def test_inputs_of_a_grouped_convolution_are_not_promised():
    table, reading = explained(grouped(), 2, 16), read(grouped(), 2)
    assert not table["2"]["known"]
    assert not table["2"]["spanned"]
    assert table["2"]["equations"] < table["2"]["unknowns"]
    assert any("equations for" in row["note"] for row in reading.layers)
    assert "2" not in reading.recovered


@pytest.mark.parametrize("activation", [nn.ReLU6, nn.Hardswish, nn.ELU], ids=lambda kind: kind.__name__)
def test_a_body_with_any_activation_is_explained(activation):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.activation = activation()

        def forward(self, x):
            return (x + self.second(self.activation(self.first(x)))).relu()

    net = sequential(nn.Conv2d(3, 8, 3, stride=4, padding=1), Block(), nn.Flatten(), nn.Linear(128, 10))
    table = explained(net, 1, 16)
    assert table["1.second"]["reason"] == ""
    assert (activation.__name__ in table["1.first"]["reason"]) == (activation is nn.ELU)


@pytest.mark.parametrize("mode", ["train", "train_private"])
def test_batchnorm_in_training_mode_is_walked_through_as_promised(mode):
    """Images that it mixes are told apart all at once below it; what is promised is read."""
    model = drawn(Blocks())
    shared = Shared(model, 3, mode)
    table = {row["layer"]: row for row in explain(shared.chain, (3, 8, 8), 3)}
    known = {name for name, row in table.items() if row["known"]}
    assert known == {"0", "3.body.0", "3.body.3", "4.body.0", "4.body.3", "5.body.0", "5.body.3", "6.body.0"} | (
        known & {"3.shortcut.0", "5.shortcut.0", "9"}
    )
    reading = read_layers(shared.update, shared.model, generator=generator())
    assert set(reading.recovered) <= {*known, "3", "4", "5", "6"}
    if mode == "train":  # where statistics stay with the client, factors may be open
        assert "0" in reading.recovered


def test_what_batchnorm_in_training_mode_mixes_is_walked_through_below_a_layer_only():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 10))
    use_batch_statistics(model)
    table = {row["layer"]: row for row in explain(stages(model), (3, 8, 8), 2)}
    assert "mixes the images" in table["0"]["reason"]


@pytest.mark.parametrize("name", ["mlp", "lenet", "resnet18"])
def test_the_deepest_layer_that_is_promised_is_read(name):
    table, reading = rows(name, 2, side=16), read(built(name, 16), 2)
    deepest = next(layer for layer, row in table.items() if row["deepest"])
    assert deepest in reading.recovered or f"{deepest.rpartition('.')[0]}.add" in reading.recovered


class InPart(nn.Module):
    """Two convolutions, of which every second column is left out, below two layers, which alone can be walked."""

    def __init__(self, last=None):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.fc, self.last = nn.Linear(128, 20), last or nn.Linear(20, 10)

    def forward(self, x):
        x = (self.left(x) + self.right(x))[..., ::2].relu()
        return self.last(self.fc(x.flatten(1)).sigmoid())


def test_of_a_model_that_is_walked_in_part_the_layers_of_that_part_are_foretold():
    table = explained(InPart().eval(), 2, 8)
    assert list(table) == ["fc", "last"]
    assert table["fc"]["deepest"]
    assert table["last"]["known"]


def test_the_reading_goes_down_to_the_part_that_cannot_be_walked_and_says_why():
    torch.manual_seed(0)
    net = InPart().eval()
    update = share_update(net, "in part", torch.rand(2, 3, 8, 8), torch.tensor([3, 7]), 10)
    reading = read_layers(update, net, generator=torch.Generator().manual_seed(0))
    assert len(reading) == 2
    assert stages(net)[reading.start].name in ("fc", "flatten")
    assert "only a part of a tensor is taken" in reading.layers[0]["note"]


def test_a_layer_whose_gradient_is_not_told_is_not_promised():
    net = InPart(nn.utils.parametrizations.spectral_norm(nn.Linear(20, 10))).eval()
    row = explained(net, 2, 8)["last"]
    assert (row["equations"], row["known"], row["spanned"]) == (0, False, False)
    assert "SpectralNorm" in row["reason"]


def test_a_block_without_layers_is_foretold_and_read():
    class Block(nn.Module):
        def forward(self, x):
            return torch.nn.functional.elu(x) + x

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), Block(), nn.Flatten(), nn.Linear(512, 10)).eval()
    assert explained(net, 1, 8)["4"]["known"]
    update = share_update(net, "block", torch.rand(1, 3, 8, 8), torch.tensor([3]), 10)
    reading = read_layers(update, net, generator=torch.Generator().manual_seed(0))
    assert "ELU cannot be inverted" in reading.layers[0]["note"]


def test_a_linear_layer_on_tokens_is_no_layer_of_one_position():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch, self.fc, self.head = nn.Conv2d(3, 6, 4, 4), nn.Linear(4, 5), nn.Linear(30, 10)

        def forward(self, x):
            return self.head(self.fc(self.patch(x).flatten(2)).sigmoid().flatten(1))

    table = explained(Tokens().eval(), 1, 8)
    assert table["fc"]["positions"] == 6
    assert "several tokens" in table["fc"]["reason"]
    assert table["head"]["known"]


def test_where_an_image_has_no_active_output_in_a_group_its_inputs_there_are_not_promised():
    def net(groups, channels):
        return sequential(
            nn.Conv2d(3, channels, 3, stride=8, padding=1), nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, groups=groups), nn.ReLU(), nn.Flatten(),
            nn.Linear(4 * channels, 64), nn.ReLU(), nn.Linear(64, 10),
        )  # fmt: skip

    few, many = (explained(net(groups, 64), 2, 16)["2"] for groups in (16, 64))
    assert not few["reason"]
    assert "of its 64 groups, in about 8 cases" in many["reason"]


class Bottleneck(nn.Module):
    """A grouped convolution of stride 2 between two of one pixel, beside a shortcut."""

    def __init__(self):
        super().__init__()
        self.first, self.inner = nn.Conv2d(32, 32, 1), nn.Conv2d(32, 32, 3, 2, 1, groups=2)
        self.last, self.shortcut = nn.Conv2d(32, 64, 1), nn.Conv2d(32, 64, 1, 2)

    def forward(self, x):
        return (self.last(self.inner(self.first(x).relu()).relu()) + self.shortcut(x)).relu()


def test_rows_of_a_strided_layer_that_tell_some_positions_do_not_count_for_others():
    net = sequential(nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), Bottleneck(), nn.Flatten(), nn.Linear(64 * 16, 10))
    step = explained(net, 2, 16)["2.inner"]
    # of each of 32 channels 16, 32, 32 and 64 rows for 32 entries each, and half of what comes out
    assert step["equations"] == 32 * (16 + 32 + 32 + 32) + 32 * 16
    assert step["unknowns"] == 32 * 64 * 2
    assert not step["determined"]  # what the ReLU has cut off of the layer's input tells nothing of the block's
    assert explained(net, 1, 16)["2.inner"]["determined"]
