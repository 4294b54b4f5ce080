"""One client's step: the averaged gradient of its batch, defended as it sees fit, and shared; or several, summed."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from client.defences import defend
from client.privacy import private_gradient
from update.defences import Defences
from update.gradients import averaged_gradient, freeze, named_by, trainable
from update.shared import SharedUpdate


def share_update(
    model: nn.Module,
    name: str,
    images: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    options: Mapping[str, str | int] | None = None,
    frozen: Sequence[str] = (),
    defence: str = "none",
    generator: torch.Generator | None = None,
) -> SharedUpdate:
    """What the server sees after one FedSGD step on images (B, C, H, W) with labels (B,).

    Args:
        model: what the server sent out; the parameters that start with one of `frozen` are frozen in it.
        images: of one client, or, in equal parts, of as many as `defence` sums over.
        name: of its architecture, as in `update.models.MODELS`.
        options: what else it was told.
        defence: as `update.defences` reads it and `client.defences.defend` does it; both draw from `generator`.

    Raises:
        ValueError: the gradient is not finite, a name in `frozen` fits no parameter, an unknown defence.
    """
    freeze(model, named_by(model, frozen))
    defences = Defences.parse(defence)

    def one_client(images: Tensor, labels: Tensor) -> SharedUpdate:
        if defences.private:
            gradients = private_gradient(model, images, labels, *defences.private, generator)
        else:
            gradients = averaged_gradient(model, images, labels)
        update = SharedUpdate(
            gradients={name: gradient.detach() for name, gradient in zip(trainable(model), gradients, strict=True)},
            weights={n: w.detach().clone() for n, w in model.state_dict().items()},
            model=name,
            batch_size=len(images),
            image_shape=tuple(images.shape[1:]),
            num_classes=num_classes,
            options=dict(options or {}),
        )
        update.check("the client's update")
        return update

    batches = zip(images.chunk(defences.clients), labels.chunk(defences.clients), strict=True)
    return defend([one_client(*batch) for batch in batches], defences, generator=generator)
