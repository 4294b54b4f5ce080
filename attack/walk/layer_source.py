"""What the update says of one layer, and of the BatchNorm right behind it, as a source of equations."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attack.solve.rounding import precision_of
from attack.walk.gauge import why_not_in_front
from attack.walk.per_image import ImageNormSource
from attack.walk.sources import GatedSource, LayerSource, Normalisation, NormalisedSource
from attack.walk.trajectory import MovingMap
from attack.walk.way import Way
from network.kinds import kind_of
from network.kinds.affine import LinearMap
from network.kinds.image_norm import ImageStatistics
from network.known_outputs import FLOOR, UndeterminedError
from network.stage import Stage
from update.loss import CROSS_ENTROPY, Loss


@dataclass(frozen=True)
class BatchGradients:
    """What the walk takes from the shared update.

    Attributes:
        gradients: by parameter name.
        batch_size: B.
        additive: standard deviation of noise that was added to them, beside rounding.
        loss: of each image.
        moments: mean and variance by which BatchNorm in training mode has normalised the batch, by its name, where the
            client shares them.
        errors: standard deviation (c_out,) of what other noise than `additive` there is in the entries of each row, by
            the name of a layer.
    """

    gradients: Mapping[str, Tensor]
    batch_size: int
    additive: float = 0.0
    loss: Loss = CROSS_ENTROPY
    moments: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    errors: Mapping[str, Tensor] = field(default_factory=dict)

    def precision(self, name: str) -> float:
        """Relative rounding error of a layer's gradient."""
        gradient = self.gradients.get(f"{name}.weight")
        return FLOOR if gradient is None else max(FLOOR, precision_of(gradient))

    def error(self, name: str, like: Tensor) -> Tensor:
        """(c_out,) or one: of each entry in the rows of a layer's summed gradient, beside its rounding."""
        return self.batch_size * self.errors.get(name, like.new_tensor(self.additive)).to(like)

    def of(self, name: str, like: Tensor) -> Tensor | None:
        """B G of a layer's weight, in the dtype and place of `like`; None where the update has none."""
        return self.summed(f"{name}.weight", like)

    def summed(self, parameter: str | None, like: Tensor) -> Tensor | None:
        """B times the gradient of a parameter, in the dtype and place of `like`; None where the update has none."""
        gradient = self.gradients.get(parameter)
        return None if gradient is None else self.batch_size * gradient.to(like)


def layer_source(
    stage: Stage, linear: LinearMap | MovingMap, bias: Tensor, way: Way, gradients: BatchGradients, mask_error: Tensor
) -> LayerSource:
    """A layer at the end of a way.

    Args:
        stage: the layer.
        linear: its linear part.
        bias: (c_out,), or (B, c_out) where it moves.
        way: down to its outputs, or to those of the BatchNorm in training mode or the gate behind it.
        gradients: of the update.
        mask_error: (B,) relative error of each image's delta by wrong masks.

    Raises:
        UndeterminedError: BatchNorm mixes the images, and the update does not hold what tells them apart.
    """
    outputs = way.outputs
    facts = {
        "name": stage.name,
        "map": linear,
        "bias": bias,
        "above": outputs,
        "gradient": gradients.of(stage.name, outputs.values),
        "precision": gradients.precision(stage.name),
        "additive": gradients.error(stage.name, outputs.values),
        "mask_error": mask_error.to(outputs.values),
    }
    if way.held:
        return GatedSource(**facts, behind=way.held)
    if way.norm is None:
        return LayerSource(**facts)
    shape = tuple(outputs.values.shape[1:])
    if kind_of(way.norm.module).normalises_images(way.norm.module, shape):
        if facts["gradient"] is None:
            raise UndeterminedError("the update holds no gradient of it, and its norm hides a factor of each image")
        return ImageNormSource(**facts, norm=ImageStatistics.of(way.norm.module, shape, outputs.values))
    if reason := why_not_in_front(stage.module):
        raise UndeterminedError(reason)
    if facts["gradient"] is None:
        raise UndeterminedError("the update holds no gradient of it, and BatchNorm mixes the images")
    return NormalisedSource(**facts, norm=_normalisation(way.norm, bias, gradients, outputs.values))


def _normalisation(norm: Stage, bias: Tensor, given: BatchGradients, like: Tensor) -> Normalisation:
    """BatchNorm in training mode behind a layer of that bias.

    Raises:
        UndeterminedError: the update lacks a gradient of it.
    """
    module = norm.module
    gradients = [given.summed(f"{norm.name}.{kind}", like) for kind in ("weight", "bias")]
    if not module.affine or None in (None if g is None else 0 for g in gradients):
        raise UndeterminedError(f"the update holds no gradients of {norm.name}")
    usual = (bias, torch.ones_like(bias))
    if module.running_mean is not None:
        usual = module.running_mean.to(like), (module.running_var.to(like) + module.eps).sqrt()
    mean = deviation = None
    if norm.name in given.moments:
        mean, variance = (moment.to(like) for moment in given.moments[norm.name])
        mean, deviation = mean - bias, (variance.clamp(min=0) + module.eps).sqrt()
    return Normalisation(
        module.weight.detach(), module.bias.detach(), module.eps, *gradients, usual[0] - bias, usual[1], mean,
        deviation,
    )  # fmt: skip
