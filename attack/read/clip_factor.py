"""The factor that a client has scaled its update by, as clipping does: what the head or single images say of it.

Clipping hides nothing but one number. Two ways to it:

The head, all images at once. With G' = c G the equations of `recovery`, (1/B) sum_i e(q_i) [q_i^T, 1] = s [G', gamma'],
have one more unknown, s = 1/c. At the true s the residual f(s) = min_q |.| is noise, so <f(s), [G', gamma']> = 0, which
is the derivative of |f(s)|^2 / 2 by -s: the secant rule finds it, each solution starting from the last. A first s comes
from the bias: a class that no image has leaves gamma'_k = c mean_i softmax_k, and random images have nearly that mean
where the network is untrained; noise that the equations do not bear leaves this one.

Single images. Direction alone tells an input, its label and its error (see `peel`, 1 and 2, the pairing left out); the
pairing then says how much of delta patch^T / B is in the gradient, c where the client has scaled it.
"""

import copy
import dataclasses

import torch
from torch import Tensor, nn

from attack.read.head.by_random_images import ITERATIONS, choose_labels, first_features
from attack.read.head.equations import solve
from attack.read.head.error_bars import EXPLAINED
from attack.read.head.gradient import HeadGradient
from attack.read.label_counts import LabelCounts
from attack.read.layer_choice import candidate_layers, order
from attack.read.peel import first_images
from attack.read.random_images import SAMPLE, random_features, varies
from attack.read.signals import Signals
from attack.solve.budget import WorkBudget, unlimited
from network.parametrised import with_weights
from network.tracing import stages
from update.defences import Defences
from update.shared import SharedUpdate

SINGLES_WORK = 1e9  # of programmes by which single images are sought, half a minute about (`attack.solve.programmes`)
LEAST = 0.9  # factor that is believed: clients make an update shorter, not longer
SECANTS = 12  # steps of the secant rule, at most; four to six are usual
NUDGE = 1e-3  # of s, for the second point of the secant
STRIDE = 0.1  # largest change of s in one step, relative
CONVERGED = 1e-9  # relative change of s that ends it
ROUGH = 0.1  # share of [G', gamma'] that a solution may leave and still tell about how large s is


def unscaled(update: SharedUpdate, model: nn.Module, *, generator: torch.Generator) -> tuple[SharedUpdate, float]:
    """The update as long as it was before the client scaled it, and the factor that undoes it.

    Where the factor is as exact as the update, the defence goes with it. Otherwise, and where each image or client has
    a factor of its own, the defence stays: single images would be read from such an update as what they are not.

    Args:
        update: the client's.
        model: that it was computed on.
        generator: what random images and starts are drawn from (on the CPU).

    Raises:
        ValueError: neither the head nor any single image tells the factor.
    """
    read = dataclasses.replace(update, gradients=with_weights(update.gradients, model))
    factor, is_exact = by_head(read, model, generator)
    if not is_exact and (told := single_images(read, model, generator)):
        factor, is_exact = common_factor(told), True
    if factor is None or factor < LEAST:
        raise ValueError("neither the head nor any single image tells by how much the update was scaled")
    training = update.training
    optimiser = dataclasses.replace(training.optimiser, clip=None)  # the restored gradient is as long as it was
    restored = dataclasses.replace(times(update, factor), training=dataclasses.replace(training, optimiser=optimiser))
    is_exact &= not Defences.parse(update.defence).uneven
    return dataclasses.replace(restored, defence="none") if is_exact else restored, factor


def weighed(
    update: SharedUpdate, model: nn.Module, *, generator: torch.Generator, work: float = SINGLES_WORK
) -> SharedUpdate:
    """The update with class weights relative to the batch's mean weight, which its labels would tell.

    That mean is a factor of all images, so single images tell it. Without any the weights stay as they are: whoever
    finds all labels at once knows it then.
    """
    if not update.training.loss.is_open:
        return update
    read = dataclasses.replace(update, gradients=with_weights(update.gradients, model))
    found = single_images(read, model, generator, work)
    factor = 0.0 if found is None else common_factor(found)
    if factor <= 0:  # nothing tells it, or the update has the wrong sign
        return update
    loss = update.training.loss.divided(factor)
    return dataclasses.replace(update, training=dataclasses.replace(update.training, loss=loss))


def times(update: SharedUpdate, factor: float) -> SharedUpdate:
    """The update with all gradients multiplied."""
    return dataclasses.replace(update, gradients={name: factor * g for name, g in update.gradients.items()})


def by_head(update: SharedUpdate, model: nn.Module, generator: torch.Generator) -> tuple[float | None, bool]:
    """s from all images' equations, or, where they do not hold, from an untrained head's bias; whether it is exact."""
    try:
        head = HeadGradient.of(update, model)
    except ValueError:
        return None, False
    sample = random_features(model, update.image_shape, SAMPLE, generator).to(head.weight)
    guess, is_likely = _first_guess(head, sample)
    if not guess:
        return None, False
    head = HeadGradient.of(times(update, guess), model)
    if not len(head.span.sigma):
        return (guess if is_likely else None), False
    start = first_features(head, model, update.image_shape, sample.mean(0), generator)
    q, labels = choose_labels(head, LabelCounts.of(head, sample), start, unlimited())
    equations = head.equations(labels)
    target = equations.target
    size = float(target.square().sum())
    s, before = 1.0, None
    for _ in range(SECANTS):
        equations.target = s * target
        q = solve(equations, q, ITERATIONS, unlimited())
        at = equations.at(q)
        slope = float((at.f * target).sum()) / size
        step = NUDGE if before is None else -slope * (s - before[0]) / ((slope - before[1]) or 1.0)
        before = (s, slope)
        if abs(step) < CONVERGED * s:
            break
        s += max(-STRIDE * s, min(STRIDE * s, step))
    freedom = max(1, at.f.numel() - at.q.numel())
    noise = (EXPLAINED * head.noise) ** 2 * freedom + head.arithmetic**2
    if not at.cost < ROUGH**2 * size:
        return (guess if is_likely else None), False
    return guess * s, equations.unexplained(at) < noise


def _first_guess(head: HeadGradient, sample: Tensor) -> tuple[float, bool]:
    """s = mean softmax / gamma' of the median class without image, 0 without any; and whether to rely on it.

    It is if fewer than half of the classes can have an image, and random images (N, d) all look alike to the head.
    Classes count by their softmax: what is small is lost in noise.
    """
    p = (sample @ head.weight.T + head.bias).softmax(1)
    if head.bias_gradient is None or not (absent := head.bias_gradient > 0).any():
        return 0.0, False
    weight = p.mean(0)[absent]
    ratio, order = (head.bias_gradient[absent] / weight).sort()
    middle = int((weight[order].cumsum(0) < weight.sum() / 2).sum())
    return 1 / float(ratio[middle]), not varies(p) and 2 * head.batch_size < len(head.bias)


def common_factor(found: Signals) -> float:
    """s, of either sign, from the certificates of single images; the surer count more."""
    sureness = found.uncertainty.clamp(min=torch.finfo(found.uncertainty.dtype).eps) ** -2
    return float((found.certificates * sureness).sum() / sureness.sum())


def single_images(
    update: SharedUpdate, model: nn.Module, generator: torch.Generator, work: float = SINGLES_WORK, enough: int = 1
) -> Signals | None:
    """Images from the first layer that tells any apart without their scale, `enough` of them; None if no layer does."""
    try:
        chain = stages(copy.deepcopy(model).double().requires_grad_(False))
    except ValueError:
        return None
    like = chain[-1].module.weight.new_zeros(1)
    budget = WorkBudget(work)
    for layer in order(candidate_layers(chain, update.image_shape, update.gradients), update.batch_size, like):
        if layer.bias_gradient is None or f"{layer.name}.weight" not in update.gradients:
            continue
        span = layer.span(update.gradients, update.batch_size, like)
        if span.determined and not budget.is_spent:
            how = {"is_sparse": layer.inputs.is_sparse, "generator": generator, "budget": budget}
            found = first_images(span, layer.layer, layer.tail, loss=update.training.loss, enough=enough, **how)
            if len(found):
                return found
    return None
