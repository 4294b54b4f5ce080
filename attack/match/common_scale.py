"""The common scale of a batch: what BatchNorm in training mode hides of the images where its statistics are not shared.

BatchNorm behind the first layer takes off every factor of all images together, and with it the rest of the network sees
none: x -> a x leaves the update as it is. Where the model normalises its images, a acts about the mean that it takes
off. A prior shrinks a, and pictures turn grey, or black. So the first layer's variance is held near the one that the
server's model has seen, lightly; of a model that has seen no images, the pixels are held near the usual colours. The
scale is read in the end: images had 8 bits, so the a is sought at which 255 a x is closest to whole numbers.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

import torch
from torch import Tensor, nn

from attack.local.levels import LEVELS
from attack.prepare import colour_statistics
from network.chain import Moments, mixes_images
from network.kinds import kind_of
from network.normalise import Normalise
from network.stage import Chain, run
from network.tracing import stages_if_walked
from network.zoo import place_of
from update.evidence import Evidence
from update.shared import SharedUpdate

HELD = 0.01  # weight of the scale's term beside the activations': 0.01 of a squared relative error in sigma^2
TRIED = 0.8  # factor that must leave a model's logits as they are, where a scale is hidden
SAME = 0.01  # relative difference of logits up to which they are: BatchNorm's eps tells a little of the factor
SCALES = torch.arange(0.6, 1.6, 1e-4, dtype=torch.float64)  # tried
PIXELS = 20_000  # that are looked at, at most
CHUNK = 100  # scales at a time
# Root mean square distance from whole numbers: 0.289 where the scale is wrong, within 0.006 for a thousand pixels.
WHOLE = 0.27


@dataclass(frozen=True)
class CommonScale:
    """The scale of images (B, C, H, W) that a chain begins with.

    Attributes:
        centre: (C, 1, 1), what images are scaled about.
        below: the stages in front of the first BatchNorm, which mixes the images.
        usual: its running variance, or that of the batch, (c,); None where it has seen no images, or is not known.
    """

    centre: Tensor
    below: Chain = ()
    usual: Tensor | None = None

    @classmethod
    def of(cls, chain: Chain, moments: Moments = MappingProxyType({})) -> "CommonScale | None":
        """Of a chain whose first layer BatchNorm in training mode follows; None where the scale is not hidden.

        The usual variance is that of the batch where the client shares its moments.
        """
        layers = [index for index, stage in enumerate(chain) if not _is_in_front(stage.module)]
        if len(layers) < 2 or not kind_of(chain[layers[0]].module).is_affine or layers[1] != layers[0] + 1:
            return None
        norm = chain[layers[1]].module
        if not mixes_images([norm]) or norm.running_var is None:
            return None
        centre = _centre([stage.module for stage in chain[: layers[0]]], norm.running_var)
        own = None if _is_fresh(norm) else norm.running_var.detach()
        return cls(centre, chain[: layers[1]], moments[norm][1] if norm in moments else own)

    @classmethod
    def beside_gradients(cls, update: SharedUpdate, model: nn.Module) -> "CommonScale | None":
        """Of images whose gradients are matched; None where the client shares its statistics, or no scale is hidden.

        Any model may be asked, whatever stands in front of its first BatchNorm: a factor is tried.
        """
        if update.training.batchnorm != "train_private":
            return None
        draw = torch.Generator().manual_seed(0)
        images = torch.rand(update.batch_size, *update.image_shape, generator=draw).to(**place_of(model))
        centre = _centre(model.modules(), images)
        with torch.no_grad():
            logits, scaled = model(images), model(centre + TRIED * (images - centre))
        if not (scaled - logits).norm() <= SAME * logits.norm():
            return None
        chain = stages_if_walked(model)
        return (cls.of(chain) if chain else None) or cls(centre)

    def __call__(self, images: Tensor) -> Tensor:
        """Squared mean logarithm of the variance in front of BatchNorm over the usual one, or of the pixels' power."""
        if self.usual is None:
            mean, std = _usual_colours(images.shape[1], dtype=images.dtype, device=images.device)
            power = (images - self.centre).square().mean((0, 2, 3))
            return (power / ((mean - self.centre).square() + std.square()).flatten()).log().mean().square()
        z = run(self.below, images)
        variance = z.var((0, *range(2, z.dim())), unbiased=False)
        alive = (self.usual > 0) & (variance > 0)
        ratios = torch.where(alive, variance, 1.0) / torch.where(alive, self.usual, 1.0)
        return (ratios.log().sum() / alive.sum()).square()

    def read(self, images: Tensor) -> tuple[Tensor, Evidence]:
        """The images at the scale at which they have 8 bits, and what is said of it."""
        values = (images - self.centre).double()
        factor, distance = _on_grid(values, self.centre.double())
        if distance > WHOLE:
            said = "BatchNorm hides one scale common to all images, and their pixels are too rough to tell it by 8 bits"
            return images, Evidence("scale", f"{said}: it is open", distance)
        said = f"BatchNorm hides one scale common to all images: by 8 bits it is {factor:.4f} times what was found"
        return (self.centre + factor * values).to(images), Evidence("scale", said, factor)


@cache  # the loop asks at every evaluation, and numbers that go to a GPU would have to be waited for
def _usual_colours(channels: int, *, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    mean, std = colour_statistics(channels)
    return mean.to(device, dtype), std.to(device, dtype)


def _centre(modules: Iterable[nn.Module], like: Tensor) -> Tensor:
    """What images are scaled about, (C, 1, 1): the mean that one of the modules takes off the pixels, or zero."""
    means = [module.running_mean for module in modules if isinstance(module, Normalise)]
    return means[0].view(-1, 1, 1) if means else like.new_zeros(1, 1, 1)


def _is_fresh(norm: nn.Module) -> bool:
    """Whether running statistics are those that torch begins with."""
    return bool((norm.running_mean == 0).all() and (norm.running_var == 1).all())


def _is_in_front(module: object) -> bool:
    """Whether a stage is the normalisation of pixels, or gives them another shape."""
    return isinstance(module, Normalise) or kind_of(module).is_reshape


def _on_grid(values: Tensor, centre: Tensor) -> tuple[float, float]:
    """The scale about the centre at which pixels are closest to whole numbers of 1/255, and their distance, rms."""
    pixels, origin = values.flatten(), centre.expand(values.shape).flatten()
    some = torch.linspace(0, len(pixels) - 1, min(PIXELS, len(pixels)), device=pixels.device).long()
    pixels, origin = LEVELS * pixels[some], LEVELS * origin[some]
    distances = []
    for scales in SCALES.to(pixels).split(CHUNK):
        at = origin + scales[:, None] * pixels
        distances.append((at - at.round()).square().mean(1))
    distances = torch.cat(distances).sqrt()
    best = int(distances.argmin())
    return float(SCALES[best]), float(distances[best])
