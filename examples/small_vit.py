"""A vision transformer for images of 32 pixels (Dosovitskiy et al. 2020, arXiv 2010.11929), as a model from outside.

python train_victim.py --model examples/small_vit.py:with_mean --hold_out 64 --train_batch 32 --epochs 30 \
  --out vit_with_mean.safetensors
python main_MAGIA_sel.py --model examples/small_vit.py:with_mean --weights vit_with_mean.safetensors \
  --num_classes 10 --labels dataset --batch_size 2
"""

import torch
from torch import Tensor, nn

SIZE, PATCH, WIDTH, DEPTH, HEADS, CLASSES = 32, 4, 192, 4, 3, 10
SPREAD = 0.02  # standard deviation of weights, positions and the class token at first


class Block(nn.Module):
    """Attention and two linear layers, each beside a shortcut and behind a LayerNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.behind = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.inner, self.outer = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, WIDTH) of as much."""
        q, k, v = self.qkv(self.before(x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.outer(nn.functional.gelu(self.inner(self.behind(x))))


class SmallViT(nn.Module):
    """Logits (B, CLASSES) of images (B, 3, SIZE, SIZE), from a class token or from the mean over all tokens."""

    def __init__(self, *, has_class_token: bool) -> None:
        super().__init__()
        self.project = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.token = nn.Parameter(SPREAD * torch.randn(1, 1, WIDTH)) if has_class_token else None
        self.positions = nn.Parameter(SPREAD * torch.randn(1, (SIZE // PATCH) ** 2 + has_class_token, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=SPREAD)
                nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor) -> Tensor:
        """(B, CLASSES)."""
        x = self.project(images).flatten(2).mT
        if self.token is not None:
            x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        x = self.norm(self.blocks(x + self.positions))
        return self.head(x.mean(1) if self.token is None else x[:, 0])


def with_class_token() -> nn.Module:
    """One whose head asks the class token."""
    return SmallViT(has_class_token=True)


def with_mean() -> nn.Module:
    """One whose head asks the mean over all tokens."""
    return SmallViT(has_class_token=False)
