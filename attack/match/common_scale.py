"""The common scale of a batch: what BatchNorm in training mode hides of the images where its statistics are not shared.

BatchNorm behind the first layer takes off every factor of all images together, and with it the rest of the network sees
none: x -> a x leaves the update as it is. Where the model normalises its images, a acts about the mean that it takes
off. A prior shrinks a, and pictures turn grey. So the first layer's variance is held near the one that the server's
model has seen, lightly, and the scale is read in the end: images had 8 bits, so the a is sought at which 255 a x is
closest to whole numbers.
"""

from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from attack.local.levels import LEVELS
from network.chain import Moments, mixes_images
from network.kinds import kind_of
from network.normalise import Normalise
from network.stage import Chain, run
from update.evidence import Evidence

HELD = 0.01  # weight of the scale's term beside the activations': 0.01 of a squared relative error in sigma^2
SCALES = torch.arange(0.6, 1.6, 1e-4, dtype=torch.float64)  # tried
PIXELS = 20_000  # that are looked at, at most
CHUNK = 100  # scales at a time
# Root mean square distance from whole numbers: 0.289 where the scale is wrong, within 0.006 for a thousand pixels.
WHOLE = 0.27


@dataclass(frozen=True)
class CommonScale:
    """The scale of images (B, C, H, W) that a chain begins with.

    Attributes:
        below: the stages in front of the first BatchNorm, which mixes the images.
        usual: its running variance, or that of the batch, (c,).
        centre: (C, 1, 1), what images are scaled about.
    """

    below: Chain
    usual: Tensor
    centre: Tensor

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
        means = [stage.module.running_mean for stage in chain[: layers[0]] if isinstance(stage.module, Normalise)]
        centre = means[0].view(-1, 1, 1) if means else norm.running_var.new_zeros(1, 1, 1)
        usual = moments[norm][1] if norm in moments else norm.running_var.detach()
        return cls(chain[: layers[1]], usual, centre)

    def __call__(self, images: Tensor) -> Tensor:
        """Squared mean logarithm of the variance in front of BatchNorm over the usual one."""
        z = run(self.below, images)
        variance = z.var((0, *range(2, z.dim())), unbiased=False)
        alive = (self.usual > 0) & (variance > 0)
        return (variance[alive] / self.usual[alive]).log().mean().square()

    def read(self, images: Tensor) -> tuple[Tensor, Evidence]:
        """The images at the scale at which they have 8 bits, and what is said of it."""
        values = (images - self.centre).double()
        factor, distance = _on_grid(values, self.centre.double())
        if distance > WHOLE:
            said = "BatchNorm hides one scale common to all images, and their pixels are too rough to tell it by 8 bits"
            return images, Evidence("scale", f"{said}: it is open", distance)
        said = f"BatchNorm hides one scale common to all images: by 8 bits it is {factor:.4f} times what was found"
        return (self.centre + factor * values).to(images), Evidence("scale", said, factor)


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
