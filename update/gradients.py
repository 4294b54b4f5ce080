"""The averaged gradient of a batch, as the client computes it and the attacker imitates it."""

import torch
from torch import Tensor, nn

from network.kinds import kind_of
from network.parameters import trainable
from update.loss import CROSS_ENTROPY, Loss


def averaged_gradient(
    model: nn.Module, images: Tensor, labels: Tensor, *, loss: Loss = CROSS_ENTROPY, create_graph: bool = False
) -> tuple[Tensor, ...]:
    """Gradient of the mean loss over the batch, one tensor per trainable parameter of `model`, in their order.

    Args:
        images: (B, C, H, W).
        labels: class indices (B,) or class probabilities (B, K).
        loss: of each image.
        create_graph: keep the graph, so that the gradient can be differentiated by images and labels.
    """
    mean = loss.in_mean(model(images), labels).mean()
    return torch.autograd.grad(mean, tuple(trainable(model).values()), create_graph=create_graph)


def gradient_and_part(
    model: nn.Module, images: Tensor, labels: Tensor, subset: Tensor, loss: Loss = CROSS_ENTROPY
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The averaged gradient of the batch and that of a part of it, both differentiable by images and labels.

    Each image goes through the model once, forward and backward. The gradient of each layer's output is kept. Together
    with the layer's input it gives the part's gradient, layer by layer, for the part's images alone. A model takes a
    second pass instead if a layer's kind gives no gradients of its weights, or if the model changes outputs in place.

    Args:
        images: (B, C, H, W).
        labels: class indices (B,) or class probabilities (B, K).
        subset: indices (S,) of the part's images.
        loss: of each image.
    """
    parameters = trainable(model)
    layers = [layer for layer in model.modules() if any(p.requires_grad for p in layer.parameters(recurse=False))]
    if not all(kind_of(layer).gives_weight_gradients(layer) for layer in layers):
        return _in_two_passes(model, images, labels, subset, loss)
    calls: list[tuple[nn.Module, Tensor, Tensor, object]] = []

    def keep(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        calls.append((layer, inputs[0], output, output.grad_fn))

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    try:
        mean = loss.in_mean(model(images), labels).mean()
    finally:
        for hook in hooks:
            hook.remove()
    if any(_is_spoilt(output, made_by) for _, _, output, made_by in calls):
        return _in_two_passes(model, images, labels, subset, loss)
    outputs = [output for _, _, output, _ in calls]
    found = torch.autograd.grad(mean, [*parameters.values(), *outputs], create_graph=True)
    part: dict[nn.Parameter, Tensor] = {}
    for (layer, inputs, _, _), delta in zip(calls, found[len(parameters) :], strict=True):
        weight, bias = kind_of(layer).weight_gradients(layer, inputs[subset], delta[subset])
        part[layer.weight] = part.get(layer.weight, 0) + weight
        if layer.bias is not None:
            part[layer.bias] = part.get(layer.bias, 0) + bias
    share = len(images) / len(subset)  # deltas are of the mean over the whole batch
    return found[: len(parameters)], tuple(share * part[parameter] for parameter in parameters.values())


def _in_two_passes(
    model: nn.Module, images: Tensor, labels: Tensor, subset: Tensor, loss: Loss
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    each, parameters = loss.in_mean(model(images), labels), trainable(model)
    return tuple(_gradient(values.mean(), parameters) for values in (each, each[subset]))


def _is_spoilt(output: Tensor, made_by: object) -> bool:
    """Whether a layer's output was changed in place by more than a sum, whose derivative is one."""
    return output.grad_fn is not made_by and not type(output.grad_fn).__name__.startswith("Add")


def _gradient(loss: Tensor, parameters: dict[str, nn.Parameter]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, tuple(parameters.values()), create_graph=True)
