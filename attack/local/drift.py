"""Drift: how far local training takes an update from the gradient at the server's weights.

A reading takes the update for a gradient. The update of a client that made several steps is the mean gradient along the
way, and the difference is an error of the order of steps times rate times curvature. The server can measure the size of
this error before it knows any image, by training on random images.
"""

import math

import torch
from torch import nn

from attack.match.entries import squared_distance
from attack.read.random_images import random_images
from attack.solve.budget import WorkBudget, unlimited
from update.shared import SharedUpdate
from update.training import LocalTraining, train_locally

DRAWS = 4  # random batches; their largest drift counts
EXACT = 1e-3  # drift up to which an update is read as a gradient: docs/local-training.md


def expected_drift(
    update: SharedUpdate, model: nn.Module, generator: torch.Generator, budget: WorkBudget | None = None
) -> float:
    """The largest |u - g| / |g| over random batches, u the update of this client's training and g the gradient.

    Infinite where such training does not end in finite numbers.

    Args:
        update: says how the client trained, and on how many images.
        model: the model that the server sent out.
        generator: the source of random images and labels (on the CPU).
        budget: once its clock has run out, no further batch is drawn; None: no clock.
    """
    budget = budget or unlimited()
    like, count = next(model.parameters()), update.batch_size
    at_once = LocalTraining(batchnorm=update.training.batchnorm, loss=update.training.loss)
    drifts = []
    for _ in range(DRAWS):
        images = random_images(update.image_shape, count, generator).to(like)
        labels = torch.randint(update.num_classes, (count,), generator=generator).to(like.device)
        own = train_locally(model, images, labels, update.training).average
        gradient = train_locally(model, images, labels, at_once).average
        size = sum(q.square().sum() for q in gradient)
        drift = float((squared_distance(own, gradient) / size).sqrt())
        drifts.append(math.inf if math.isnan(drift) else drift)
        budget.tick()
        if budget.is_out_of_time:
            break
    return max(drifts)
