"""The pixels that fit known activations best where nothing keeps them between 0 and 1.

The attack keeps pixels in [0, 1], so it cannot show that the client's lie elsewhere, because it normalised its images:
it only ends in poor pictures. A short course without bounds can. After 80 evaluations from grey, 0 to 3 % of the pixels
lie outside [0, 1] on ConvNet, VGG-11 and ResNet-18, and 29 to 69 % where the client normalised by one half, or by
ImageNet's mean and deviation. They also do where layers below are not the client's: its kernels were turned, say.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from attack.match.activations import GRADIENTS, ForwardLoss
from attack.match.phases import UNITS
from attack.optimise.lbfgs import LBFGS

EVALUATIONS = 80
HISTORY = 50  # curvature pairs that L-BFGS keeps


def unbounded_pixels(loss: ForwardLoss, tick: Callable[[], object]) -> tuple[Tensor, float]:
    """Pixels (B, C, H, W), and the share of the activations' error at grey images that they leave.

    Args:
        loss: of known activations of all images.
        tick: called at each evaluation; what it raises ends the course.
    """
    pixels = loss.grey.clone().requires_grad_()
    most = {"max_iter": EVALUATIONS, "max_eval": EVALUATIONS}
    optimiser = LBFGS([pixels], lr=1.0, history=HISTORY, line_search="strong_wolfe", **most)

    def closure() -> Tensor:
        tick()
        activations, gradients = loss(pixels)
        total = UNITS * (activations + GRADIENTS * gradients)
        (pixels.grad,) = torch.autograd.grad(total, pixels)
        return total

    optimiser.step(closure)
    left, _ = loss(pixels.detach())
    return pixels.detach(), float(left.detach())
