"""LPIPS: how unlike two images look to a network that was trained on photographs (Zhang et al. 2018).

This is the form that the field reports: AlexNet, version 0.1 (arXiv 1801.03924; the package `lpips`). Its weights are
10 MB and come from elsewhere: `python -m bench.lpips_weights` makes their file.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from update.storage import StorageError, read_tensors

LEAST_SIDE = 31  # pixels: AlexNet's second pool has no output below
EPSILON = 1e-10  # added to the length of features, as in the package
# Mean and standard deviation of ImageNet's colours, for images in [-1, 1].
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class Lpips(nn.Module):
    """The distance of images in [0, 1]: 0 for equal images, about 0.7 for images that have nothing in common.

    At each of AlexNet's five layers the features of each pixel are made one long. The distance is the sum over layers
    of the pixels' mean squared differences, each channel with a weight of its own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(  # torchvision's AlexNet, down to its last convolution, by the names there
            nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
            nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
            nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
            nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
        )  # fmt: skip
        widths = [layer.out_channels for layer in self.features if isinstance(layer, nn.Conv2d)]
        self.channels = nn.ParameterList(torch.zeros(1, width, 1, 1) for width in widths)
        self.requires_grad_(False)

    @classmethod
    def load(cls, path: str | Path) -> "Lpips":
        """The distance with the weights of a file.

        Raises:
            StorageError: the file is missing or damaged, or holds other tensors.
        """
        distance = cls()
        tensors, _ = read_tensors(path)
        try:
            distance.load_state_dict(tensors)
        except RuntimeError:
            raise StorageError(f"{path} holds no weights of LPIPS: python -m bench.lpips_weights makes them") from None
        return distance

    def forward(self, truth: Tensor, pictures: Tensor) -> Tensor:
        """The distances (B,) of images (B, C, H, W) in [0, 1]; grey images are taken for grey photographs.

        Raises:
            ValueError: a side is shorter than LEAST_SIDE.
        """
        if min(truth.shape[2:]) < LEAST_SIDE:
            raise ValueError(f"LPIPS is of images of {LEAST_SIDE} pixels a side and more, not {tuple(truth.shape[2:])}")
        total = truth.new_zeros(len(truth))
        pairs = zip(self.seen(truth), self.seen(pictures), self.channels, strict=True)
        for a, b, channels in pairs:
            total += ((a - b).square() * channels).sum(1).mean((1, 2))
        return total

    def seen(self, images: Tensor) -> list[Tensor]:
        """The features (B, D, h, w) of images at each layer, one long at each pixel."""
        shift, scale = (images.new_tensor(each)[:, None, None] for each in (SHIFT, SCALE))
        signals, layers = (2 * images.expand(-1, 3, -1, -1) - 1 - shift) / scale, []
        for layer in self.features:
            signals = layer(signals)
            if isinstance(layer, nn.ReLU):
                layers.append(signals / (signals.square().sum(1, keepdim=True).sqrt() + EPSILON))
        return layers
