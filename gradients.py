"""The victim's side: the averaged gradient of a batch, and the SharedUpdate that carries it to the server.

`SharedUpdate` is the one object between the two sides. It holds what an honest-but-curious server has (the averaged
gradient, the model it sent out, the batch size, the image shape) and nothing of the images or labels.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from storage import StorageError, read_tensors, write_tensors

FORMAT = "magia-update-1"


def batch_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Per-image cross-entropy (B,) of logits (B, K), labels as class indices (B,) or as probabilities (B, K)."""
    return nn.functional.cross_entropy(logits, labels, reduction="none")


def averaged_gradient(
    model: nn.Module, images: Tensor, labels: Tensor, *, create_graph: bool = False
) -> tuple[Tensor, ...]:
    """Gradient of the mean cross-entropy over the batch, one tensor per trainable parameter of `model`, in their order.

    Args:
        images: (B, C, H, W).
        labels: class indices (B,) or class probabilities (B, K).
        create_graph: keep the graph, so that the gradient can itself be differentiated by images and labels.
    """
    loss = batch_loss(model(images), labels).mean()
    return torch.autograd.grad(loss, tuple(trainable(model).values()), create_graph=create_graph)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are not frozen, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def freeze(model: nn.Module, prefixes: Sequence[str]) -> None:
    """Freeze the parameters whose names start with one of the prefixes: no gradient of them is taken or shared.

    Raises:
        ValueError: a prefix fits no parameter, or nothing is left to train.
    """
    for prefix in prefixes:
        fitting = [parameter for name, parameter in model.named_parameters() if name.startswith(prefix)]
        if not fitting:
            names = ", ".join(name for name, _ in model.named_parameters())
            raise ValueError(f"no parameter's name starts with {prefix!r}: the model has {names}")
        for parameter in fitting:
            parameter.requires_grad_(False)
    if not trainable(model):
        raise ValueError(f"nothing is left to train with {','.join(prefixes)} frozen")


@dataclass(frozen=True)
class SharedUpdate:
    """One averaged update as the server receives it, with the model that it was computed on.

    Attributes:
        gradients: averaged gradient, by parameter name; frozen parameters have none.
        weights: state dict of the model that the server sent out; empty if the file did not bring it.
        model: name of the architecture in `models.MODELS`.
        batch_size: number of images averaged over.
        image_shape: (C, H, W) of one image.
        num_classes: K.
    """

    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    model: str
    batch_size: int
    image_shape: tuple[int, int, int]
    num_classes: int

    def save(self, path: str | Path) -> None:
        """Write the update to a `.safetensors` or `.npz` file.

        Raises:
            StorageError: the name's ending is neither, or the file cannot be written.
        """
        tensors = {f"gradient/{name}": tensor for name, tensor in self.gradients.items()}
        tensors |= {f"weight/{name}": tensor for name, tensor in self.weights.items()}
        facts = {
            "format": FORMAT,
            "model": self.model,
            "batch_size": self.batch_size,
            "image_shape": list(self.image_shape),
            "num_classes": self.num_classes,
        }
        write_tensors(path, tensors, {"update": json.dumps(facts)})

    @classmethod
    def load(cls, path: str | Path) -> "SharedUpdate":
        """Read an update that `save` wrote.

        Raises:
            StorageError: the file is missing, damaged, not an update, or holds numbers that are not finite.
        """
        tensors, text = read_tensors(path)
        try:
            facts = json.loads(text["update"])
            if facts["format"] != FORMAT:
                raise KeyError(facts["format"])
            update = cls(
                gradients=_section(tensors, "gradient/"),
                weights=_section(tensors, "weight/"),
                model=str(facts["model"]),
                batch_size=int(facts["batch_size"]),
                image_shape=tuple(int(side) for side in facts["image_shape"]),
                num_classes=int(facts["num_classes"]),
            )
        except (KeyError, TypeError, ValueError):
            raise StorageError(f"{path} is not a shared update ({FORMAT}) as --save_update writes it") from None
        if update.batch_size < 1 or len(update.image_shape) != 3 or not update.gradients:
            raise StorageError(f"{path}: the update's batch_size, image_shape or gradients make no sense")
        update.check_finite(str(path))
        return update

    def check_finite(self, source: str) -> None:
        """Raise a ValueError that names the first gradient holding NaN or infinity."""
        for name, gradient in self.gradients.items():
            if not gradient.isfinite().all():
                raise StorageError(f"{source}: the gradient of {name!r} is not finite")

    def noise(self) -> float:
        """Standard deviation of the noise in an entry of the gradients, such as a client adds or rounding leaves.

        Softmax errors sum to zero over the classes, so the columns of the head's gradient (K, d) do: what they sum to
        is the noise of K entries. Their mean is left out, since pruning errs to one side. 0 where the head's gradient
        is missing or a single column. Exact within a few percent for noise and rounding; pruning, whose errors are not
        independent, comes out as much as nine times too large.
        """
        head = self.gradients.get("head.weight")
        if head is None or head.shape[1] < 2:
            return 0.0
        return float(head.double().sum(0).std()) / self.num_classes**0.5

    def strength(self) -> float:
        """Root mean square over all entries of the gradients."""
        squares = sum(float(gradient.double().square().sum()) for gradient in self.gradients.values())
        return (squares / sum(gradient.numel() for gradient in self.gradients.values())) ** 0.5

    def targets(self, model: nn.Module) -> tuple[Tensor, ...]:
        """The gradients in the order, dtype and place of `model`'s trainable parameters.

        Raises:
            ValueError: names or shapes differ from the model's.
        """
        parameters = trainable(model)
        if parameters.keys() != self.gradients.keys():
            odd = sorted(parameters.keys() ^ self.gradients.keys())
            raise ValueError(f"update and model {self.model!r} disagree on parameters: {', '.join(odd)}")
        for name, parameter in parameters.items():
            if parameter.shape != self.gradients[name].shape:
                raise ValueError(
                    f"gradient {name!r} has shape {tuple(self.gradients[name].shape)}, "
                    f"the model's parameter {tuple(parameter.shape)}"
                )
        return tuple(self.gradients[name].to(parameter) for name, parameter in parameters.items())


def share_update(model: nn.Module, name: str, images: Tensor, labels: Tensor, num_classes: int) -> SharedUpdate:
    """What one client sends after one FedSGD step on images (B, C, H, W) with labels (B,).

    Raises:
        ValueError: the gradient is not finite.
    """
    gradients = averaged_gradient(model, images, labels)
    update = SharedUpdate(
        gradients={name: gradient.detach() for name, gradient in zip(trainable(model), gradients, strict=True)},
        weights={n: w.detach().clone() for n, w in model.state_dict().items()},
        model=name,
        batch_size=len(images),
        image_shape=tuple(images.shape[1:]),
        num_classes=num_classes,
    )
    update.check_finite("victim")
    return update


def _section(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
