"""An attack on the images whose pixels are not known, beside others whose are."""

import pytest
import torch
from conftest import SIGNALS, metrics_of
from passes import generator, sample_images

from attack import ahead
from attack.match.rest import without_known
from attack.prepare import Known
from attack.read import reader
from attack.read.candidates import nobody
from client.victim import share_update
from network.chain import index_of
from network.stage import run
from network.tracing import stages
from network.zoo import build_model
from update.loss import Loss
from update.training import LocalTraining

FLAGS = ("--model", "mlp", "--activation", "relu", "--depth", 2, "--width", 80, "--batch_size", 6, *SIGNALS)


@pytest.mark.parametrize("weights", [(), tuple(0.5 + k / 4 for k in range(10))])
def test_what_is_left_of_an_update_is_that_of_the_others(weights):
    net = build_model("convnet", image_shape=(3, 16, 16), num_classes=10, generator=generator(1))
    batch, training = sample_images(range(5)), LocalTraining(loss=Loss(weights=weights))
    images, labels = batch.images, batch.labels
    update = share_update(net, "convnet", images, labels, 10, training=training)
    start = index_of(stages(net), "head")
    with torch.no_grad():
        inputs = run(stages(net)[:start], images)
    known = Known(5, None, inputs, labels, start, inputs, pixels=images[:2])
    rest, others = without_known(update, net, known)
    assert (rest.batch_size, others.batch_size) == (3, 3)
    assert torch.equal(others.inputs, inputs[2:])
    assert torch.equal(others.labels, labels[2:])
    assert others.is_complete
    loss = training.loss.of_batch(labels)
    alone = share_update(net, "convnet", images[2:], labels[2:], 10, training=LocalTraining(loss=loss))
    for name, gradient in rest.gradients.items():
        assert (gradient - alone.gradients[name]).norm() < 1e-4 * update.gradients[name].norm()


def no_walk(*_, **__):
    """A walk that ends where it begins."""
    raise ArithmeticError


@pytest.fixture
def four_of_six(monkeypatch):
    """A reading of which four images alone lead down to their pixels."""
    down, unmix = reader.carried_down, reader.unmix
    monkeypatch.setattr(reader, "descend", no_walk)
    monkeypatch.setattr(reader, "carried_down", lambda *given: down(*given).pick([5, 1, 0, 3]))
    peeled = lambda span, *given, **how: nobody(span) if how["given"] else unmix(span, *given, **how)  # noqa: E731
    monkeypatch.setattr(reader, "unmix", peeled)


def test_pixels_of_some_images_stay_as_they_were_read(cli, monkeypatch, four_of_six):
    found = metrics_of(run := cli(*FLAGS))
    assert "4 of them to their pixels" in cli.out
    assert (found["signals_found"], found["pixels_read"], sum(found["equal_bits"])) == (6, 4, 4)
    assert all(found["psnr"][i] > 90 for i, j in enumerate(found["assignment"]) if j < 4)
    assert found["certified"] == pytest.approx(4 / 6)
    assert found["label_accuracy"] == 1
    monkeypatch.setattr(ahead, "read_layers", lambda *_, **__: pytest.fail("read again"))
    more = metrics_of(cli("--resume", run, "--n_iter", 8, *FLAGS))
    assert (more["steps"], more["pixels_read"], sum(more["equal_bits"])) == (8, 4, 4)
    assert more["final_loss"] < found["final_loss"]
