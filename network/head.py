"""The head: the linear layer that a model ends in. The one place that knows where it is and what its gradients say."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from network.kinds import kind_of
from network.parametrised import INSIDE, is_made
from network.tracing import stages_if_walked
from network.watched import watched


@dataclass(frozen=True)
class Head:
    """The last layer of a model, z = W h + b with W (K, d) and b (K,), and its parameters' names."""

    layer: nn.Linear
    weight: str
    bias: str

    @classmethod
    def of(cls, model: nn.Module) -> "Head":
        """The head of a model: its chain's last stage, or, if it has no chain, the layer that was registered last.

        Raises:
            ValueError: that layer is not linear.
        """
        if chain := stages_if_walked(model):
            name = chain[-1].name
        else:
            name = [name for name, layer in model.named_modules() if _has_weights(name, layer)][-1]
        layer = model.get_submodule(name)
        if not isinstance(layer, nn.Linear):
            raise ValueError("the model's last layer is not linear")
        return cls(layer, f"{name}.weight", f"{name}.bias")

    def among(self, gradients: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """The head's weight (K, d) and bias (K,) among gradients by parameter name; None for one that is missing."""
        return gradients.get(self.weight), gradients.get(self.bias)


def _has_weights(name: str, layer: nn.Module) -> bool:
    """Whether a module is a layer with parameters, which its weight may be made of."""
    return bool([*layer.parameters(recurse=False)] or is_made(layer)) and INSIDE not in f".{name}."


def features_of(model: nn.Module, images: Tensor) -> Tensor:
    """Features (B, d) that the head of the model sees, of images (B, C, H, W). Differentiable.

    Raises:
        ValueError: the model ends in another layer.
    """
    layer = Head.of(model).layer
    with watched([layer], lambda _, features: features) as seen:
        model(images)
    return seen[layer]


def feature_range(model: nn.Module) -> tuple[float, float]:
    """Least and largest value that a feature can have, as far as the model's last activation tells."""
    below = reversed((stages_if_walked(model) or [])[:-1])
    ranges = (kind_of(stage.module).output_range for stage in below)
    return next((own for own in ranges if own is not None), (-math.inf, math.inf))


def measured_noise(gradients: Mapping[str, Tensor], model: nn.Module) -> float:
    """Standard deviation of the noise in an entry of the gradients, such as a client adds or rounding leaves.

    Softmax errors sum to zero over the classes, so the columns of the head's gradient (K, d) do: what they sum to is
    the noise of K entries. Their mean is left out, since pruning errs to one side. 0 where the model does not end in a
    linear head, or its gradient is missing or a single column. Exact within a few percent for noise and rounding;
    pruning, whose errors are not independent, comes out as much as nine times too large.
    """
    if stages_if_walked(model) is None:
        return 0.0
    gradient, _ = Head.of(model).among(gradients)
    if gradient is None or gradient.shape[1] < 2:
        return 0.0
    return float(gradient.double().sum(0).std()) / len(gradient) ** 0.5
