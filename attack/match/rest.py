"""Images whose pixels are not known, where those of others are: an attack on a smaller batch.

What the known images add to the update is taken out of it. What is left is the update of the others. An attack on that
is as strong as one on a batch of so many images: nothing has to be weighed against images that are right already.
"""

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from attack.match.entries import observed
from attack.prepare import Known
from network.parameters import trainable
from update.gradients import averaged_gradient
from update.shared import SharedUpdate


def without_known(update: SharedUpdate, model: nn.Module, known: Known) -> tuple[SharedUpdate, Known]:
    """The update of the images whose pixels are not known, and what is known of these; both as they are without such.

    An update that is not whole, or of several steps, tells no gradient of some of its images alone: none is left.

    Args:
        update: the client's.
        model: that it was computed on.
        known: of all images, in the update's order.
    """
    count = known.apart
    left = known.batch_size - count
    if not count:
        return update, known
    loss = update.training.loss.of_batch(known.labels)
    gradients: dict[str, Tensor] = {}
    if update.training.is_gradient and observed(update, model).is_whole:
        own = copy.deepcopy(model).double()
        with torch.enable_grad():
            of_known = averaged_gradient(own, known.pixels.double(), known.labels[:count], loss=loss)
        parts = {name: count * part for name, part in zip(trainable(own), of_known, strict=True)}
        sums = {name: known.batch_size * sent.double() - parts[name] for name, sent in update.gradients.items()}
        gradients = {name: (sums[name] / left).to(sent) for name, sent in update.gradients.items()}
    rest = replace(
        known,
        batch_size=left,
        signals=known.signals and replace(known.signals.pick(slice(count, None)), batch_size=left),
        features=known.features[count:],
        labels=known.labels[count:],
        inputs=known.inputs[count:],
        pixels=None,
    )
    training = replace(update.training, loss=loss)
    return replace(update, batch_size=left, gradients=gradients, training=training), rest
