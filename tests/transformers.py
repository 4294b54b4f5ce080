"""Small vision transformers of images of 16 pixels and ten classes, as users write them."""

import torch
from torch import nn

PATCH, PATCHES, CLASSES = 4, 16, 10


class Encoded(nn.Module):
    """torch's own encoder behind a convolution; with a class token, or the mean over the tokens."""

    def __init__(self, width=32, has_class_token=True, places=None):
        super().__init__()
        self.project = nn.Conv2d(3, width, PATCH, PATCH)
        self.token = nn.Parameter(torch.randn(1, 1, width)) if has_class_token else None
        self.places = nn.Parameter(0.1 * torch.randn(1, places or PATCHES + has_class_token, width))
        layer = nn.TransformerEncoderLayer(width, 2, 2 * width, 0.1, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x):
        x = self.project(x).flatten(2).transpose(1, 2)
        if self.token is not None:
            x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        x = self.encoder(x + self.places[:, : x.shape[1]])
        return self.head(x[:, 0] if self.token is not None else x.mean(1))


class Cut(nn.Module):
    """Patches cut by hand, a linear layer on them, positions from a table, and `nn.MultiheadAttention`."""

    def __init__(self, width=32):
        super().__init__()
        self.project, self.places = nn.Linear(3 * PATCH**2, width), nn.Embedding(PATCHES, width)
        self.first, self.attention = nn.LayerNorm(width), nn.MultiheadAttention(width, 2, batch_first=True)
        self.second, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x):
        side = x.shape[-1] // PATCH
        x = (
            ((x - 0.45) / 0.25)
            .reshape(-1, 3, side, PATCH, side, PATCH)
            .permute(0, 2, 4, 3, 5, 1)
            .flatten(3)
            .flatten(1, 2)
        )
        x = self.project(x) + self.places(torch.arange(PATCHES, device=x.device))
        y = self.first(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head(self.second(x).mean(1))


class Gridded(nn.Module):
    """Positions in the shape of a convolution's outputs, and attention by hand."""

    def __init__(self, width=32):
        super().__init__()
        self.project = nn.Conv2d(3, width, PATCH, PATCH)
        self.places = nn.Parameter(0.1 * torch.randn(width, 16 // PATCH, 16 // PATCH))
        self.qkv, self.head = nn.Linear(width, 3 * width), nn.Linear(width, CLASSES)

    def forward(self, x):
        x = (self.project(x) + self.places).flatten(2).mT
        q, k, v = self.qkv(x).chunk(3, -1)
        x = nn.functional.gelu(4 * x + nn.functional.scaled_dot_product_attention(q, k, v))
        return self.head(x.mean(1))


class Unplaced(nn.Module):
    """Positions that nothing trains."""

    def __init__(self, width=32):
        super().__init__()
        self.project, self.head = nn.Conv2d(3, width, PATCH, PATCH), nn.Linear(width, CLASSES)
        self.register_buffer("places", torch.randn(PATCHES, width))

    def forward(self, x):
        return self.head((self.project(x).flatten(2).mT + self.places).tanh().mean(1))


def with_class_token():
    """Has a class token."""
    return Encoded()


def with_mean():
    """Has the mean over its tokens."""
    return Encoded(has_class_token=False)


def wide():
    """Has more channels than the tokens of two images, and positions that nothing trains."""
    model = Encoded(width=48, has_class_token=False)
    places = model.places.detach()
    del model.places
    model.register_buffer("places", places)
    return model


def roomy():
    """Has more channels than the tokens of two images, and positions that are learned."""
    return Encoded(width=64, has_class_token=False)


def with_spare_places():
    """Uses a part of its positions."""
    return Encoded(places=PATCHES + 4)


def narrow():
    """Has as many patches as channels."""
    return Encoded(width=PATCHES)


def cut():
    """Cuts patches by hand."""
    return Cut()


def gridded():
    """Adds positions to a grid."""
    return Gridded()


def unplaced():
    """Trains no positions."""
    return Unplaced()
