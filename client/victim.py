"""One client's step: the averaged gradient of its batch, defended as it sees fit, and shared."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from client.defences import defend
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
    """What one client sends after one FedSGD step on images (B, C, H, W) with labels (B,).

    Args:
        model: what the server sent out; the parameters that start with one of `frozen` are frozen in it.
        name: of its architecture, as in `update.models.MODELS`.
        options: what else it was told.
        defence: see `client.defences.defend`, which draws from `generator`.

    Raises:
        ValueError: the gradient is not finite, a name in `frozen` fits no parameter, an unknown defence.
    """
    freeze(model, named_by(model, frozen))
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
    return defend(update, defence, generator=generator)
