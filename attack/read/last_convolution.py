"""How often each label is in the batch, where a model ends in a convolution of K channels and a pool (SqueezeNet).

Logit k depends on channel k of the convolution alone, so the gradient of bias k is

    gamma_k = (1/B) sum_i s_ik (p_ik - [y_i = k]),        s_ik = d logit_ik / d bias_k >= 0:

softmax errors, each with the share of positions that a ReLU behind the convolution lets through. Random images tell the
means of s and of s p, and so the counts; a class whose gamma is below zero is in the batch for certain. A channel that
is closed everywhere tells nothing of its class: what is left of the batch is of that class, if it is the only one.
"""

import torch
from torch import Tensor, nn

from attack.local.local_labels import LocalLabels
from attack.read.label_counts import spelled_out, whole_counts
from attack.read.random_images import random_images
from update.shared import SharedUpdate

IMAGES = 64  # random images, which tell the means within a few percent
CLOSED = 1e-3  # share of positions below which a channel tells nothing of its class

SURE = 0.3  # a count is told if it comes so near to a whole number


def labels_of_last_convolution(
    update: SharedUpdate, model: nn.Module, generator: torch.Generator
) -> LocalLabels | None:
    """Labels (B,) in ascending order, and the share of the bias's gradient that they leave; 0 where its signs tell all.

    None where labels are not told, the model ends in no such convolution, or the client adds noise or smooths labels.
    """
    found, loss = _last_convolution(model, update.num_classes), update.training.loss
    is_plain = loss.is_cross_entropy and not loss.smoothing and not loss.weights and update.defence == "none"
    if found is None or f"{found[0]}.bias" not in update.gradients or not is_plain:
        return None
    name, layer = found
    seen = _shares(model, layer, random_images(update.image_shape, IMAGES, generator))
    if seen is None:
        return None
    softmax, shares = seen
    gamma = update.batch_size * update.gradients[f"{name}.bias"].double()
    least = (gamma < 0).double()
    if int(least.sum()) == update.batch_size:  # every image shows its class
        return LocalLabels(spelled_out(least), 0.0)
    share, expected = shares.mean(0), update.batch_size * (shares * softmax).mean(0)
    is_open, closed = share > CLOSED, (share <= CLOSED).nonzero().flatten()
    likely = torch.where(is_open, (expected - gamma) / share.clamp(min=CLOSED), least)
    told = [_counts(likely, least, is_open, total) for total in range(update.batch_size, -1, -1)]
    left = [(gamma - expected + share * counts).square().sum() / gamma.square().sum() for counts in told]
    hidden = min(range(len(told)), key=lambda number: left[number])
    counts = told[hidden]
    if ((counts - likely).abs() > SURE).any() or (hidden and len(closed) != 1):
        return None
    counts[closed] += hidden
    return LocalLabels(spelled_out(counts), float(left[hidden]))


def _counts(likely: Tensor, least: Tensor, is_open: Tensor, total: int) -> Tensor:
    """The whole counts (K,) nearest to the likely ones that sum to a total, of classes whose channels are open."""
    counts = least * is_open
    if is_open.any():
        counts[is_open] += whole_counts((likely - counts)[is_open], max(0, total - int(counts.sum())))
    return counts


def _last_convolution(model: nn.Module, classes: int) -> tuple[str, nn.Conv2d] | None:
    """The convolution that was registered last, where no other layer with weights was and it has a channel a class."""
    layers = [(name, layer) for name, layer in model.named_modules() if [*layer.parameters(recurse=False)]]
    name, layer = layers[-1]
    return (name, layer) if isinstance(layer, nn.Conv2d) and layer.out_channels == classes else None


def _shares(model: nn.Module, layer: nn.Conv2d, images: Tensor) -> tuple[Tensor, Tensor] | None:
    """Softmax and s (N, K) of images; None where a logit depends on other channels than its own."""
    images = images.to(layer.weight)
    shift = images.new_zeros(len(images), layer.out_channels, 1, 1, requires_grad=True)
    hook = layer.register_forward_hook(lambda layer, inputs, outputs: outputs + shift)
    try:
        with torch.enable_grad():
            logits = model(images)
    finally:
        hook.remove()
    (shares,) = torch.autograd.grad(logits.sum(), shift, retain_graph=True)
    marks = torch.arange(1.0, logits.shape[1] + 1).to(logits)
    (marked,) = torch.autograd.grad((logits * marks).sum(), shift)
    if not torch.allclose(marked.flatten(1), shares.flatten(1) * marks, rtol=1e-3, atol=1e-5) or (shares < 0).any():
        return None
    return logits.detach().softmax(1).double(), shares.flatten(1).double()
