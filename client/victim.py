"""A round of one client, which trains on its batch, defends the update and shares it; or of several clients, summed."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from client.defences import defend, encrypted
from client.privacy import private_gradient
from network.parameters import freeze, named_by, trainable
from update.batchnorm import after_training, use_batch_statistics
from update.defences import Defences
from update.shared import SharedUpdate
from update.training import FEDSGD, LocalTraining, train_locally


def share_update(
    model: nn.Module,
    name: str,
    images: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    options: Mapping[str, str | int] | None = None,
    frozen: Sequence[str] = (),
    training: LocalTraining = FEDSGD,
    defence: str = "none",
    hidden: Sequence[str] = (),
    generator: torch.Generator | None = None,
) -> SharedUpdate:
    """The update that the server sees after training on images (B, C, H, W) with labels (B,).

    Args:
        model: the model that the server sent out. Its parameters that start with one of `frozen` are frozen, and its
            BatchNorm layers are put into the mode of the training; weights and statistics stay.
        images: of one client, or, in equal parts, of the clients that `defence` sums over.
        name: of the model's architecture, as in `network.zoo.MODELS`.
        options: further settings of the architecture.
        training: one step of FedSGD, or local training.
        defence: defences as `update.defences` reads them.
        hidden: beginnings of the names of parameters that are encrypted, as in `client.defences.encrypted`.
        generator: the source of random numbers of the defences, on the CPU.

    Raises:
        ValueError: the gradient is not finite, a name fits no parameter, or what is asked for does not go together.
    """
    freeze(model, named_by(model, frozen))
    training.check(len(images))
    defences = Defences.parse(defence)
    if not training.is_plain and (defences.private or defences.clients > 1):
        raise ValueError(f"--defence {defence}: for one local step with --bn eval only")
    if training.uses_batch_statistics:
        use_batch_statistics(model, training.frozen_norms)

    def one_client(images: Tensor, labels: Tensor) -> SharedUpdate:
        if defences.private:
            gradients = private_gradient(model, images, labels, *defences.private, generator, loss=training.loss)
            statistics: dict[str, Tensor] = {}
        else:
            gradients, statistics = trained_update(model, images, labels, training.shuffled(len(images), generator))
        update = SharedUpdate(
            gradients={name: gradient.detach() for name, gradient in zip(trainable(model), gradients, strict=True)},
            weights={n: w.detach().clone() for n, w in model.state_dict().items()},
            model=name,
            batch_size=len(images),
            image_shape=tuple(images.shape[1:]),
            num_classes=num_classes,
            options=dict(options or {}),
            training=training,
            statistics=statistics,
        )
        update.check("the client's update")
        return update

    each = map(one_client, images.chunk(defences.clients), labels.chunk(defences.clients))
    return encrypted(defend(list(each), defences, generator=generator), model, hidden)


def trained_update(
    model: nn.Module, images: Tensor, labels: Tensor, training: LocalTraining
) -> tuple[Sequence[Tensor], dict[str, Tensor]]:
    """The averaged update of local training, one tensor per trainable parameter, and its BatchNorm statistics."""
    old, trained = trainable(model), train_locally(model, images, labels, training)
    gradients = trained.average
    if not training.is_gradient:  # such a client has only weights, with their rounding
        moved, combination = zip(old.values(), trained.weights, strict=True), training.combination()
        gradients = [combination.difference(weight.detach(), new) for weight, new in moved]
    shares_statistics = training.batchnorm == "train"
    return gradients, after_training(model, trained.statistics, training.steps) if shares_statistics else {}
