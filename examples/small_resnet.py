"""A residual network that is small enough for a laptop, as a model from outside.

python main_MAGIA_sel.py --model examples/small_resnet.py:resnet8 --num_classes 10 --batch_size 4 --bn train
"""

from torch import Tensor, nn

WIDTHS = (16, 32, 64)  # channels of the three blocks; stem and blocks but the first halve the image
CLASSES = 10


class Block(nn.Module):
    """Two 3x3 convolutions with BatchNorm beside a shortcut, ReLU behind the sum (He et al. 2016, arXiv 1512.03385)."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Identity()
        if stride != 1 or channels != width:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, H / stride, W / stride) of (B, channels, H, W)."""
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


def resnet8() -> nn.Module:
    """Logits (B, CLASSES) of images (B, 3, H, W): a convolution, three blocks, the mean over positions, a head."""
    blocks = [
        Block(channels, width, 1 if channels == width else 2)
        for channels, width in zip((WIDTHS[0], *WIDTHS), WIDTHS, strict=False)
    ]
    stem = (nn.Conv2d(3, WIDTHS[0], 3, 2, padding=1, bias=False), nn.BatchNorm2d(WIDTHS[0]), nn.ReLU())
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTHS[-1], CLASSES))
