"""What was read from an update, against what was assumed: pixels out of range, and features that dropout has zeroed."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from attack.local.levels import LEVELS
from attack.read.random_images import SAMPLE, random_features
from network.stage import run
from network.tracing import stages
from network.watched import watched
from update.evidence import PIXELS, STATISTICS, Evidence
from update.shared import SharedUpdate

BEYOND = 2.0 / LEVELS  # how far out of [0, 1] a pixel may lie for rounding's sake
ON_GRID = 0.05  # of a step: pixels of 8 bits lie so near to whole steps once their normalisation is undone
SHARE_ON_GRID = 0.95  # of the pixels that must
OUTSIDE = 0.05  # how far out of [0, 1] a pixel may lie that was only fitted
STRAYED = 0.1  # share of fitted pixels outside that is no failure of the fit: right ones leave 0.03, wrong ones 0.29
SORTED = 10**6  # fitted pixels that their range is told from, at most
MOST = 0.98  # share of fitted pixels whose range is told
STRAY = 1e-3  # density of fitted pixels outside the range of their normalisation, relative to that inside
USUAL = {  # normalisations that clients use, by what the values are: mean and standard deviation by channel
    "of one half": ((0.5,), (0.5,)),
    "of ImageNet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "of CIFAR-10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "of CIFAR-10, per image": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "of CIFAR-100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "of CIFAR-100, rounded": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "of MNIST": ((0.1307,), (0.3081,)),
    "of Fashion-MNIST": ((0.2860,), (0.3530,)),
    "of SVHN": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    "of pixels from 0 to 255": ((0.0,), (1 / LEVELS,)),
}
OTHER_BATCH = 0.01  # relative error of variances that are not the batch's: rounding leaves 1e-5
ZERO = 1e-4  # of the median feature: a smaller one is zero but for noise
DROPOUTS = (nn.modules.dropout._DropoutNd,)
SELDOM = 0.01  # of random images: a feature that is zero in fewer is used
HALF = 0.5  # of its rate, that dropout zeroes at least
DROPPED = 0.02  # share of exact zeros among used features that is no chance


def of_pixels(pixels: Tensor) -> list[Evidence]:
    """A word on pixels (N, C, H, W) that were read and lie outside [0, 1]: the client normalises its images."""
    least, most = float(pixels.min()), float(pixels.max())
    if least >= -BEYOND and most <= 1 + BEYOND:
        return []
    said = f"the pixels that were read lie between {least:.3g} and {most:.3g}, not between 0 and 1"
    fit = normalisation_of(pixels)
    said += (
        f": the client normalises its images, {fit}" if fit else ": the client normalises its images (--mean, --std)"
    )
    return [Evidence(PIXELS, said, most - least, contradicts=True)]


def of_moments(update: SharedUpdate, model: nn.Module, start: int, inputs: Tensor) -> list[Evidence]:
    """A word on shared BatchNorm statistics that are not those of the batch that was read.

    Args:
        update: the client's.
        model: that it was computed on, BatchNorm in training mode.
        start: the stage whose inputs are known.
        inputs: of that stage, (N, ...).
    """
    moments = update.batch_moments(model)
    if not moments or len(inputs) < update.batch_size:
        return []

    def compared(layer: nn.Module, seen: Tensor) -> Tensor:
        own = seen.var((0, *range(2, seen.dim())), unbiased=False) + layer.eps
        return (own / (moments[layer][1].clamp(min=0) + layer.eps) - 1).abs()

    with torch.no_grad(), watched(moments, compared) as off:
        run(stages(model)[start:], inputs.to(next(model.parameters())))
    figure = float(torch.cat([*off.values()]).median()) if off else 0.0
    if figure < OTHER_BATCH:
        return []
    said = f"BatchNorm's running statistics are off by {figure:.2g} from those of the images that were read: "
    return [
        Evidence(STATISTICS, said + "they are of another batch, or of another convention, and are not used", figure)
    ]


def of_fitted_pixels(pixels: Tensor, left: float) -> list[Evidence]:
    """A word on pixels (N, C, H, W) that fit known activations best where nothing bounds them.

    Args:
        pixels: as `attack.match.unbounded` finds them.
        left: share of the activations' error at grey images that they leave.
    """
    outside = float(((pixels < -OUTSIDE) | (pixels > 1 + OUTSIDE)).double().mean())
    if not outside > STRAYED:
        return []
    some = pixels.flatten()[:: 1 + pixels.numel() // SORTED]
    least, most = some.quantile(torch.tensor([1 - MOST, MOST]).to(pixels)).tolist()
    fit = normalisation_around(pixels)
    said = (
        f"{outside:.0%} of the pixels that explain the known activations best lie outside 0 to 1, most of them between "
        f"{least:.3g} and {most:.3g}, and leave {left:.2g} of what grey images leave: the client normalises its images "
        f"({f'perhaps {fit}' if fit else '--mean, --std'}), or the layers below are not those that it trained "
        "(their weights, or the layout of their kernels)"
    )
    return [Evidence(PIXELS, said, most - least, contradicts=True)]


def normalisation_of(pixels: Tensor) -> str:
    """The flags of the usual normalisation that brings pixels (N, C, H, W) to whole steps within [0, 1]; or nothing."""
    for name, raw in _undone(pixels):
        steps = LEVELS * raw
        inside = float(raw.min()) > -BEYOND and float(raw.max()) < 1 + BEYOND
        if inside and float(((steps - steps.round()).abs() < ON_GRID).double().mean()) > SHARE_ON_GRID:
            return _flags_of(name)
    return ""


def normalisation_around(pixels: Tensor) -> str:
    """The flags of the likeliest usual normalisation of pixels (N, C, H, W) that were only fitted; or nothing.

    Pixels are taken for uniform on [0, 1] before it, but for a share of STRAY that may lie anywhere: of a normalisation
    with a standard deviation s they have the density s inside, and STRAY s outside.
    """
    fitting = []
    for name, raw in _undone(pixels):
        outside = float(((raw < -BEYOND) | (raw > 1 + BEYOND)).double().mean())
        _, std = USUAL[name]
        density = sum(map(math.log, std)) / len(std) + outside * math.log(STRAY)
        fitting += [(density, name)] if outside < STRAYED else []
    return _flags_of(max(fitting)[1]) if fitting else ""


def _undone(pixels: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The pixels before each usual normalisation that has as many channels as they."""
    for name, (mean, std) in USUAL.items():
        if len(mean) in (1, pixels.shape[1]):
            m, s = (pixels.new_tensor(values).view(1, -1, 1, 1) for values in (mean, std))
            yield name, pixels * s + m


def _flags_of(name: str) -> str:
    mean, std = (",".join(f"{value:g}" for value in values) for values in USUAL[name])
    return f"--mean {mean} --std {std} ({name})"


def of_features(
    features: Tensor, model: nn.Module, image_shape: tuple[int, ...], generator: torch.Generator
) -> list[Evidence]:
    """A word on features (N, d) that dropout has zeroed: entries at zero that no image of the network puts there.

    Args:
        features: that were read, at the head.
        model: that the server sent out, in eval mode.
        image_shape: (C, H, W).
        generator: what random images are drawn from (on the CPU).
    """
    size = features.abs().median(1, keepdim=True).values
    zeros = features.abs() <= ZERO * size
    if not float(zeros.double().mean()) > DROPPED:
        return []
    used = (random_features(model, image_shape, SAMPLE, generator) == 0).double().mean(0).to(features.device) < SELDOM
    rates = [module.p for module in model.modules() if isinstance(module, DROPOUTS) and module.p]
    if not rates and not used.all():  # behind a ReLU real images may put out what random ones do not
        return []
    share = float(zeros[:, used].double().mean()) if used.any() else 0.0
    if not share > max(DROPPED, HALF * min(rates, default=0.0)):
        return []
    said = (
        f"{share:.0%} of the head's features are zero in units that are hardly ever off: dropout was active, and what "
        "is below it is not what the model in eval mode makes of it"
    )
    return [Evidence("dropout", said, share, contradicts=True)]
