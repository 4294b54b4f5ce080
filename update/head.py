"""The head: the linear layer that a model ends in. The one place that knows where it is and what its gradients say."""

from dataclasses import dataclass

from torch import Tensor, nn

from update.shared import SharedUpdate


@dataclass(frozen=True)
class Head:
    """The last layer of a model, z = W h + b with W (K, d) and b (K,), and its parameters' names."""

    layer: nn.Linear
    weight: str
    bias: str

    @classmethod
    def of(cls, model: nn.Module) -> "Head":
        """The head of a model: of the layers without layers of their own, the one that was registered last.

        Raises:
            ValueError: that layer is not linear.
        """
        name, layer = [(name, layer) for name, layer in model.named_modules() if not [*layer.children()]][-1]
        if not isinstance(layer, nn.Linear):
            raise ValueError("the model's last layer is not linear")
        return cls(layer, f"{name}.weight", f"{name}.bias")

    def gradients(self, update: SharedUpdate) -> tuple[Tensor | None, Tensor | None]:
        """The averaged gradients of weight (K, d) and bias (K,) in the update; None for what it does not hold."""
        return update.gradients.get(self.weight), update.gradients.get(self.bias)


def measured_noise(update: SharedUpdate, model: nn.Module) -> float:
    """Standard deviation of the noise in an entry of the gradients, such as a client adds or rounding leaves.

    Softmax errors sum to zero over the classes, so the columns of the head's gradient (K, d) do: what they sum to is
    the noise of K entries. Their mean is left out, since pruning errs to one side. 0 where the head is not linear, or
    its gradient is missing or a single column. Exact within a few percent for noise and rounding; pruning, whose errors
    are not independent, comes out as much as nine times too large.
    """
    try:
        gradient, _ = Head.of(model).gradients(update)
    except ValueError:
        return 0.0
    if gradient is None or gradient.shape[1] < 2:
        return 0.0
    return float(gradient.double().sum(0).std()) / len(gradient) ** 0.5
