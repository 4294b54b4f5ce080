"""Models with one logit z, for two classes, as binary cross-entropy takes them: the same as two logits [0, z].

softmax([0, z]) = [1 - sigmoid(z), sigmoid(z)], so the loss and every gradient below the head are the same. The head's
second row is the one that there was; its first row is zero, and the gradient of that row is minus the other's, since
softmax errors sum to zero. So a model with one logit is attacked as a model of two classes.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from network.head import Head


@torch.no_grad()
def has_one_logit(model: nn.Module, image_shape: Sequence[int]) -> bool:
    """Whether the model puts out one logit, from a linear head, for each image of that shape."""
    try:
        if Head.of(model).layer.out_features != 1:
            return False
    except ValueError:
        return False
    like = next(model.parameters())
    return model(like.new_zeros(2, *image_shape)).shape == (2, 1)


def with_two_logits(model: nn.Module) -> nn.Module:
    """The model, its head of one output changed in place to the outputs [0, z]; the layer stays the same object."""
    layer = Head.of(model).layer
    layer.out_features = 2
    for name, old in list(layer.named_parameters(recurse=False)):
        whole = torch.cat([torch.zeros_like(old), old]).detach()
        setattr(layer, name, nn.Parameter(whole, requires_grad=old.requires_grad))
    return model


def of_two_logits(gradients: Mapping[str, Tensor], head: Head) -> dict[str, Tensor]:
    """Gradients of a model with one logit, as those of the model with two; `head` is that of either."""
    own = (head.weight, head.bias)
    return {name: torch.cat([-g, g]) if name in own else g for name, g in gradients.items()}
