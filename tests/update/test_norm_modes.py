"""The mode of each BatchNorm layer, read from an update in which some were frozen."""

import pytest
import torch
from batchnorm import Blocks, Plain, drawn, smooth
from conftest import generator

from client.victim import share_update
from network.chain import below_norms
from network.tracing import stages
from update.batchnorm import batchnorms, frozen_among, statistic_names, use_batch_statistics
from update.norm_modes import of_orthogonality, of_statistics
from update.training import LocalTraining

TRAIN = LocalTraining(batchnorm="train")


def trained_by_torch(model, frozen):
    """Running statistics and counts of a torch client after one step with these BatchNorm layers in eval mode."""
    client = drawn(type(model)()).train()
    for layer, name in batchnorms(client).items():
        layer.train(name not in frozen)
    client(smooth(3, generator(7)))
    buffers = dict(client.named_buffers())
    counts = {name: value for name, value in buffers.items() if name.endswith("num_batches_tracked")}
    return {name: buffers[name] for name in statistic_names(model)}, counts


@pytest.mark.parametrize("has_counts", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_layers_whose_statistics_stand_still_are_in_eval_mode(has_counts, dtype):
    model = drawn(Plain())
    found, counted = trained_by_torch(model, ["4"])
    found = {name: value.to(dtype) for name, value in found.items()}
    training, (moved, still) = of_statistics(found, counted if has_counts else {}, model, LocalTraining())
    assert training == LocalTraining(batchnorm="train", frozen_norms=("4",))
    assert not moved.contradicts
    assert "1 of 3 BatchNorm layers" in still.said


def test_what_was_declared_by_hand_stays_and_is_contradicted():
    model = drawn(Plain())
    found, counted = trained_by_torch(model, ["1"])
    declared = LocalTraining(batchnorm="train", frozen_norms=("4",))
    training, (said,) = of_statistics(found, counted, model, declared, ["bn", "bn_frozen"])
    assert training == declared
    assert said.contradicts
    assert "--bn_frozen 1" in said.said
    agreed = LocalTraining(batchnorm="train", frozen_norms=("1",))
    assert of_statistics(found, counted, model, agreed, ["bn", "bn_frozen"]) == (agreed, [])


def test_a_module_that_holds_layers_names_all_of_them():
    norms = ["stem.1", "layer1.0.bn1", "layer1.1.bn1", "layer10.0.bn1"]
    assert frozen_among(norms, ["layer1", "stem.1"]) == norms[:3]


@pytest.mark.parametrize("frozen", [(), ("1", "3"), ("6",)])
def test_gradients_tell_the_mode_of_each_layer(frozen):
    model = drawn(Blocks())
    training = LocalTraining(batchnorm="train_private", frozen_norms=frozen)
    update = share_update(model, "net", smooth(3, generator(7)), torch.tensor([3, 8, 1]), 10, training=training)
    pairs = below_norms(stages(model))
    assert of_orthogonality(update.gradients, pairs, model, training) == []
    others = [LocalTraining(), LocalTraining(batchnorm="train"), LocalTraining(batchnorm="train", frozen_norms=("5",))]
    for other in others:
        if other.frozen_norms != frozen or other.batchnorm == "eval":
            (said,) = of_orthogonality(update.gradients, pairs, model, other)
            assert said.contradicts
            named = frozen_among(pairs.values(), frozen)
            assert f"--bn_frozen {','.join(named)}" in said.said if named else "--bn_frozen" not in said.said


@pytest.mark.parametrize(
    ("frozen", "said"), [(("2",), "no BatchNorm layer is named '2'"), (("1", "4", "7"), "--bn eval")]
)
def test_names_that_leave_nothing_or_fit_nothing_are_refused(frozen, said):
    with pytest.raises(ValueError, match=said):
        use_batch_statistics(drawn(Plain()), frozen)


def test_frozen_layers_belong_to_training_mode():
    with pytest.raises(ValueError, match="--bn_frozen goes with --bn train"):
        LocalTraining(frozen_norms=("1",))


def test_only_layers_in_training_mode_have_statistics_of_the_batch():
    model = drawn(Plain())
    training = LocalTraining(batchnorm="train", frozen_norms=("1",))
    update = share_update(model, "net", smooth(3, generator(7)), torch.tensor([3, 8, 1]), 10, training=training)
    assert list(update.statistics) == statistic_names(model)[2:]
    assert list(update.batch_moments(model)) == list(batchnorms(model))[1:]
    assert TRAIN.frozen_norms == ()
