"""DP-SGD: each example's gradient is clipped, their sum gets Gaussian noise; and the privacy that this gives.

Source: Abadi et al. 2016, Deep Learning with Differential Privacy (arXiv 1607.00133), algorithm 1; epsilon by Renyi
accounting (Mironov, Talwar, Zhang 2019, arXiv 1908.10530), as Opacus computes it. Epsilon of one release without
sampling: Balle and Wang 2018, Improving the Gaussian Mechanism for Differential Privacy: Analytical Calibration and
Optimal Denoising (arXiv 1805.06530), theorem 8.
"""

import math
import warnings
from dataclasses import dataclass
from itertools import pairwise

import torch
from scipy.optimize import brentq
from scipy.special import erfcx, ndtr
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from client.defences import gaussian_std, noise_like
from network.chain import mixes_images
from network.parameters import trainable
from update.defences import Defences
from update.loss import CROSS_ENTROPY, Loss

TOGETHER = 8  # examples whose gradients are held at a time
FARTHEST = -37.0  # standard deviations below which the normal distribution is below any delta that is worth a name
LEAST_DELTA = 1e-290
LEAST_RATIO, LARGEST_RATIO = 1e-9, 1e9  # of noise and sensitivity; below there is no mechanism to speak of


def private_gradient(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    clip: float,
    sigma: float,
    generator: torch.Generator | None,
    *,
    loss: Loss = CROSS_ENTROPY,
) -> tuple[Tensor, ...]:
    """(1/B) [sum_i g_i min(1, clip / |g_i|) + sigma clip N(0, 1)], one tensor per trainable parameter, in their order.

    g_i is the gradient of example i's loss, |g_i| its L2 norm over all trainable parameters.

    Args:
        model: in eval mode: batch statistics mix the examples, which then have no gradients of their own.
        images: (B, C, H, W).
        labels: class indices (B,).
        clip: the norm that an example's gradient has at most.
        sigma: the noise multiplier: the standard deviation of the sum's noise in units of `clip`.
        generator: the source of the noise, on the CPU.
        loss: of each example.

    Raises:
        ValueError: a BatchNorm layer in training mode.
    """
    if mixes_images(model.modules()):
        raise ValueError(
            "dpsgd: BatchNorm in training mode mixes the examples, which then have no gradients of their own"
        )
    weights = {name: weight.detach() for name, weight in trainable(model).items()}
    total, loss = {name: torch.zeros_like(weight) for name, weight in weights.items()}, loss.of_batch(labels)
    for some, own in zip(images.split(TOGETHER), labels.split(TOGETHER), strict=True):
        gradients = example_gradients(model, weights, some, own, loss)  # each (b, ...)
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients.values()]).norm(dim=0)  # (b,)
        share = (clip / norms).clamp(max=1)  # an example without gradient has an infinite ratio, and keeps its zeros
        for name, gradient in gradients.items():
            total[name] += torch.tensordot(share, gradient, dims=1)
    noisy = (gradient + sigma * clip * noise_like(gradient, generator) for gradient in total.values())
    return tuple(gradient / len(images) for gradient in noisy)


def example_gradients(
    model: nn.Module, weights: dict[str, Tensor], images: Tensor, labels: Tensor, loss: Loss = CROSS_ENTROPY
) -> dict[str, Tensor]:
    """The gradient of each example's loss, (B, ...) for each of the weights, by name."""

    def of_one(weights: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return loss.each(functional_call(model, weights, (image[None],)), label[None]).sum()

    try:
        return vmap(grad(of_one), in_dims=(None, 0, 0))(weights, images, labels)
    except RuntimeError:  # vmap cannot run every model from outside: one example after the other
        own = [grad(of_one)(weights, image, label) for image, label in zip(images, labels, strict=True)]
        return {name: torch.stack([gradients[name] for gradients in own]) for name in weights}


def epsilon(sigma: float, *, rate: float, rounds: int, delta: float) -> float:
    """The epsilon of (epsilon, delta)-differential privacy after so many rounds of DP-SGD, by Opacus's RDP accountant.

    An upper bound. Each round samples every example with probability `rate`, independently, and adds noise of `sigma`
    clipping norms.

    Raises:
        ModuleNotFoundError: Opacus is not installed.
    """
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = [(sigma, rate, rounds)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # on orders at the range's end: the bound still holds
        return float(accountant.get_epsilon(delta=delta))


@dataclass(frozen=True)
class Release:
    """One update that a Gaussian mechanism has made private, as one release without sampling.

    Attributes:
        level: what is hidden: `example`, one image of the client, or `client`, all of them.
        multiplier: the standard deviation of an entry's noise over the sensitivity, which is the most that leaving the
            example or the client out, so that its part is zero, moves the update (L2).
    """

    level: str
    multiplier: float

    @classmethod
    def of(cls, defences: Defences) -> "Release | None":
        """The mechanism in a client's defences; None where there is none, or the server sees a sum of several clients.

        `dpsgd` hides an example. `localdp`, and `noise` right behind `clip`, hide the client. What is done before or
        afterwards costs no privacy.
        """
        found = None if defences.clients > 1 else cls._of_one_client(defences)
        return found if found and found.multiplier >= LEAST_RATIO else None

    @classmethod
    def _of_one_client(cls, defences: Defences) -> "Release | None":
        if defences.private:
            return cls("example", defences.private[1])
        for step in defences:
            if step.name == "localdp":
                clip, *how = step.amounts
                return cls("client", gaussian_std(*how) / clip)
        for step, after in pairwise(defences):
            if (step.name, after.name) == ("clip", "noise"):
                return cls("client", after.amounts[0] / step.amounts[0])
        return None

    def epsilon(self, delta: float) -> float:
        """The epsilon at this delta."""
        return gaussian_epsilon(self.multiplier, delta)


def gaussian_epsilon(multiplier: float, delta: float) -> float:
    """The least epsilon at which noise of `multiplier` sensitivities is (epsilon, delta)-private: no bound is lower.

    With m the multiplier, epsilon solves Phi(a) - exp(epsilon) Phi(a - 1/m) = delta with a = 1/(2 m) - epsilon m. The
    equation is solved for a, and the second term is phi(a) times Mills' ratio at 1/m - a, which never overflows.
    """

    def excess(a: float) -> float:
        ratio = math.sqrt(math.pi / 2) * erfcx((1 / multiplier - a) / math.sqrt(2))
        return float(ndtr(a) - math.exp(-a * a / 2) / math.sqrt(2 * math.pi) * ratio) - max(delta, LEAST_DELTA)

    top = 1 / (2 * multiplier)  # epsilon = 0
    return 0.0 if excess(top) <= 0 else (top - brentq(excess, FARTHEST, top, xtol=1e-13)) / multiplier


def gaussian_multiplier(epsilon: float, delta: float) -> float:
    """The least noise, in sensitivities, that is (epsilon, delta)-private; epsilon above 0."""
    bounds = (math.log(LEAST_RATIO), math.log(LARGEST_RATIO))
    return math.exp(brentq(lambda log: gaussian_epsilon(math.exp(log), delta) - epsilon, *bounds))
