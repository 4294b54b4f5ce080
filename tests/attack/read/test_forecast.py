import pytest
import torch

from attack.read.forecast import explain
from network.tracing import stages
from network.zoo import MODELS, build_model


def rows(name, batch_size, side=32, num_classes=10):
    generator = torch.Generator().manual_seed(0)
    net = build_model(name, image_shape=(3, side, side), num_classes=num_classes, generator=generator)
    return {row["layer"]: row for row in explain(stages(net), (3, side, side), batch_size)}


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
    # 4,608 rows for each of 256 channels in the body, 512 in the shortcut, half of what conv1 and the block put out
    assert table["body.layer4.0.conv1"]["equations"] == 256 * (4608 + 512) + 2 * (4 * 512 * 16 // 2)


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
