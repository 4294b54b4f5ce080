"""How much a network computes."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def multiplications(model: nn.Module, image_shape: Sequence[int]) -> float:
    """The multiplications that the weights of linear and convolutional layers take for one image (C, H, W).

    Args:
        model: takes a batch of images; it stays as it is.
    """
    counted = 0.0

    def count(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal counted
        counted += layer.weight.numel() * output.numel() / (len(output) * layer.weight.shape[0])

    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    hooks = [each.register_forward_hook(count) for each in model.modules() if isinstance(each, kinds)]
    try:
        with torch.no_grad():
            model(next(model.parameters()).new_zeros(2, *image_shape))
    finally:
        for hook in hooks:
            hook.remove()
    return counted
