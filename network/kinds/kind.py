"""The questions that a kind of layer answers, and the answers of a layer that nothing is known of."""

import math
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from network.known_outputs import KnownOutputs

Shape = Sequence[int]  # of one image's activations


class Kind:
    """One kind of layer. Subclasses state where it differs from a layer of which nothing is known.

    Attributes:
        modules: torch modules of this kind; their subclasses too.
        calls: by name of a function or method, what makes the modules that do the same, from its arguments.
        output_range: least and largest value of its outputs; None: those of its inputs.
        is_activation: whether it is applied to each entry by itself.
        is_affine: whether it has a weight W with outputs W patch + b, and so inputs that its gradient tells of.
        is_norm: whether it normalises by a mean and a variance that it keeps, or takes of the batch.
        is_reshape: whether its outputs are its inputs in another shape.
        is_smooth: of an activation: whether equations can be followed through it anywhere.
        is_sparse: of an activation: whether outputs are never negative and often exactly zero.
        is_rectifier: of an activation: whether inputs that it lets through are its outputs, and it stops all others.
        is_saturating: of an activation: whether its slope vanishes at both ends.
        is_max_pool: whether outputs are the largest of several inputs.
        has_kink: whether its slope jumps.
        keeps_sign: whether outputs of inputs that are never negative are never negative.
        known_share: share of its inputs that is known where all outputs are, about.
        needs_all: why no input is known unless all outputs are, in words; empty where that is not so.
    """

    modules: tuple[type, ...] = ()
    calls: Mapping[str, Callable[..., list[nn.Module]]] = {}
    output_range: tuple[float, float] | None = (-math.inf, math.inf)
    is_activation = False
    is_affine = False
    is_norm = False
    is_reshape = False
    is_smooth = False
    is_sparse = False
    is_rectifier = False
    is_saturating = False
    is_max_pool = False
    has_kink = False
    keeps_sign = False
    known_share = 1.0
    needs_all = ""

    def keeps_zeros(self, module: nn.Module, inputs: Shape, outputs: Shape) -> bool:
        """Whether outputs are as sparse as inputs of that shape."""
        return False

    def mixes_images(self, module: nn.Module) -> bool:
        """Whether the output of an image depends on the other images of the batch."""
        return False

    def normalises_images(self, module: nn.Module, shape: Shape) -> bool:
        """Whether it takes off mean and scale of each image's groups of channels, given one image's shape."""
        return False

    def why_not(self, module: nn.Module, inputs: Shape, outputs: Shape) -> str:
        """Why known outputs do not tell the inputs, given the shapes of one image's; empty where they do."""
        return f"{type(module).__name__} cannot be inverted"

    def pulled(self, module: nn.Module, outputs: KnownOutputs, shape: Shape) -> KnownOutputs:
        """What is known of inputs of that shape, from what is known of the outputs; `why_not` must be empty."""
        raise NotImplementedError

    def inverted(self, module: nn.Module, outputs: Tensor, shape: Shape) -> Tensor | None:
        """Inputs (B, *shape) of exact outputs; None where they are not told everywhere."""
        return None

    def before(self, module: nn.Module, outputs: Tensor) -> tuple[Tensor, Tensor] | None:
        """Of an activation: inputs of these outputs, finite, and the slope there; None where they are not told."""
        return None

    def slope_below_zero(self, module: nn.Module) -> float | None:
        """s of an activation that is z above zero and s z below; None of any other."""
        return None

    def softened(self, module: nn.Module, beta: float) -> nn.Module:
        """The layer with its kink rounded off at the scale 1 / beta; the layer itself where it has none."""
        return module

    def gives_weight_gradients(self, module: nn.Module) -> bool:
        """Whether `weight_gradients` knows those of this layer."""
        return False

    def weight_gradients(self, module: nn.Module, inputs: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of weight and bias from inputs and deltas (B, ...), summed over images."""
        raise NotImplementedError


class Moved(Kind):
    """A layer that puts entries into other places and changes none: its known outputs tell inputs."""

    output_range = None
    keeps_sign = True

    def keeps_zeros(self, module: nn.Module, inputs: Shape, outputs: Shape) -> bool:
        """They do."""
        return True

    def why_not(self, module: nn.Module, inputs: Shape, outputs: Shape) -> str:
        """Never."""
        return ""
