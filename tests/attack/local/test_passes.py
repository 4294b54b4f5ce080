"""A client that goes through its images several times: each use of an image is read as if it were another image."""

import copy

import pytest
import torch
from passes import OnePass, generator
from torch import nn
from torch.func import functional_call

from attack.ahead import Means, read_ahead
from attack.local.passes import as_one_pass
from attack.match.followed import known_activations
from client.victim import share_update
from network.parameters import trainable
from network.stage import run
from network.tracing import stages
from update.optimiser import LocalOptimiser
from update.training import LocalTraining, train_locally


class Passes:
    """Three images in minibatches of two and one, used twice; what is sent, and the images of each step."""

    def __init__(self, rate=0.5, *, sizes=(2, 1), shuffle=False, **rules):
        scene = OnePass("convnet", 3, 1, rate)
        self.net, self.batch, count = scene.net, scene.batch, len(sizes)
        rule = LocalOptimiser(**rules)
        self.training = LocalTraining(2 * count, count, rate, optimiser=rule, sizes=sizes, shuffle=shuffle)
        sent = {"training": self.training, "generator": generator(2)}
        self.update = share_update(self.net, "convnet", self.batch.images, self.batch.labels, 10, **sent)
        self.parts = self.training.shuffled(3, generator(2)).schedule(3)

    def read(self):
        return read_ahead(self.update, self.net, Means("on", "optimise", 1e9, lambda: None), generator(3))

    def inputs(self, start):
        """The inputs of a stage (U, ...), of every use at its own step's weights."""
        net, found, learnt = copy.deepcopy(self.net).double(), [], []
        first, table = {n: w.detach().clone() for n, w in trainable(net).items()}, self.training.coefficients()
        for step, part in enumerate(self.parts):
            now = {n: table.weights(step, w, [own[n] for own in learnt]).requires_grad_() for n, w in first.items()}
            images = self.batch.images[part].double()
            loss = nn.functional.cross_entropy(functional_call(net, now, (images,)), self.batch.labels[part])
            learnt.append(dict(zip(now, torch.autograd.grad(loss, list(now.values())), strict=True)))
            moved = copy.deepcopy(net)
            moved.load_state_dict({n: w.detach() for n, w in now.items()}, strict=False)
            with torch.no_grad():
                found.append(run(stages(moved)[:start], images))
        return torch.cat(found)


RULES = [{}, {"sizes": (3,)}, {"momentum": 0.9, "schedule": "1,0.3"}, {"shuffle": True}]


@pytest.mark.parametrize("how", RULES)
def test_each_use_is_read_and_known_for_the_image_that_it_is_of(how):
    client = Passes(**how)
    known, order = client.read(), torch.cat(client.parts)
    assert known.in_steps
    assert known.is_complete
    truth = client.inputs(known.start).flatten(1)
    apart = torch.cdist(known.inputs.flatten(1), truth) / truth.norm(dim=1)
    assert (apart.amin(1) < 1e-3).all()
    whose = order[apart.argmin(1)]  # of each use
    assert torch.equal(whose[:3][list(known.uses)], whose)
    assert torch.equal(known.labels, client.batch.labels[whose[:3]])
    images = client.batch.images[whose[:3]]
    assert float(known_activations(client.update, client.net, known)(images)[0].detach()) < 1e-3
    again = train_locally(client.net, images, known.labels, known.as_trained(client.update).training).average
    for own, sent in zip(again, client.update.gradients.values(), strict=True):
        assert float((own - sent).norm()) < 1e-3 * float(sent.norm())


def test_a_schedule_of_passes_is_one_of_steps():
    update = Passes(momentum=0.5, schedule="1,0.1").update
    whole = as_one_pass(update)
    assert (whole.batch_size, whole.training.passes) == (6, 1)
    assert torch.equal(whole.training.coefficients().beta, update.training.coefficients().beta)


def test_a_pass_that_leaves_images_out_is_not_read_so():
    with pytest.raises(ValueError, match="leaves out"):
        as_one_pass(Passes(sizes=(1, 1), shuffle=True).update)


def test_steps_that_are_no_sum_over_images_are_not_read_so():
    with pytest.raises(ValueError, match="no sum"):
        as_one_pass(Passes(0.01, name="adam").update)
