"""All that the gradients of one step say of their client, compared with what was declared, see `update.evidence`."""

from collections.abc import Mapping

from torch import Tensor, nn

from network.parameters import trainable
from update.evidence import (
    DECAY,
    ERRORS,
    LOSS,
    SCALE,
    ClassSums,
    Evidence,
    class_sums,
    decayed_parameters,
    of_entries,
    without_decay,
)
from update.loss import Loss

LEARNT = 1e-2  # sum of the magnitudes of the head's errors, where a network that knows nothing of the images has 1 to 2
MEAN = 2.0  # sum of the magnitudes of a mean of softmax errors, at most
ROUNDED = 1.02  # a mean of rounded errors may be so much longer
LIKE_WEIGHTS = 0.5  # cosine of a gradient with weights that are in it once, beyond which it is taken for weights


def of_gradients(
    gradients: Mapping[str, Tensor],
    model: nn.Module,
    *,
    loss: Loss,
    rate: float | None = None,
    rounding: Mapping[str, Tensor] | None = None,
    is_defended: bool = False,
) -> tuple[dict[str, Tensor], list[Evidence]]:
    """The gradients of one step without weight decay or an L1 penalty, and what they say of how they were made.

    Args:
        gradients: by parameter name.
        model: with the weights that the server sent out.
        loss: as declared.
        rate: by which a difference of weights was divided; None for gradients.
        rounding: standard deviation of each entry by the rounding of new weights, by parameter name; or None.
        is_defended: whether a defence was declared, which explains odd entries and sums.
    """
    found = _of_kind(gradients, model, rate) or of_entries(gradients, rate, is_defended, rounding)
    sums = class_sums(gradients, model, rounding) if loss.is_cross_entropy and not (found or is_defended) else None
    if sums is not None:
        if sums.decay:
            names = decayed_parameters(gradients, model, sums)
            gradients = without_decay(gradients, model, sums, names)
            found.append(_of_decay(sums, len(names) < len(trainable(model))))
        if sums.is_other_loss:
            found.append(_of_loss(sums, loss))
        elif _is_too_long(sums, loss):
            found.append(_of_length(sums))
        elif sums.reaches is not None and sums.reaches < LEARNT:
            found.append(_of_learnt(sums))
    return dict(gradients), found


def _of_kind(gradients: Mapping[str, Tensor], model: nn.Module, rate: float | None) -> list[Evidence]:
    """A word on a file that holds weights in a gradient's place, or a gradient in that of weights."""
    own = {name: p.detach().double().cpu() for name, p in trainable(model).items()}
    inner = sum(float((own[name] * g.double().cpu()).sum()) for name, g in gradients.items())
    sizes = [sum(float(t.double().square().sum()) for t in each.values()) ** 0.5 for each in (own, gradients)]
    alike = inner / max(1e-300, sizes[0] * sizes[1])
    share = inner / max(1e-300, sizes[0] ** 2) * (1.0 if rate is None else rate)  # of the weights that is in them
    if alike < LIKE_WEIGHTS or abs(share - 1) > LIKE_WEIGHTS:
        return []
    kind = "weights" if rate is None else "gradient or difference"
    said = f"its tensors point where the server's weights do (cosine {alike:.4f}): the file holds no such kind"
    return [Evidence("kind", f"{said} (--update_kind {kind}?)", alike, contradicts=True)]


def _of_decay(sums: ClassSums, spares_biases: bool) -> Evidence:
    whose = "its weights" if sums.pull == DECAY else "the signs of its weights"
    said = (
        f"the head's gradient sums over the classes to {sums.decay:.4e} times {whose}: {sums.pull} of so much, "
        f"which was subtracted{' from all weights but biases and scales' if spares_biases else ''}"
    )
    return Evidence("decay", said, sums.decay)


def _of_loss(sums: ClassSums, loss: Loss) -> Evidence:
    said = (
        f"the head's gradient sums over the classes to {sums.share:.2g} of its size, where {loss}'s sums to zero: "
        "the loss is another (--loss bce or mse?), or the head's weights are not those that the client began with"
    )
    return Evidence(LOSS, said, sums.share, contradicts=True)


def _of_learnt(sums: ClassSums) -> Evidence:
    said = (
        f"the magnitudes of the head's bias gradient sum to {sums.reaches:.1e}, where those of images that a network "
        "does not know sum to 1 or 2: the client's network has learnt these images already, and rounding hides what is "
        "left, or the update was scaled down"
    )
    return Evidence(ERRORS, said, sums.reaches)


def _is_too_long(sums: ClassSums, loss: Loss) -> bool:
    """Whether the errors are too long for a mean; class weights may have been summed and divided by the images."""
    return sums.reaches is not None and sums.reaches > MEAN * ROUNDED and not (sums.decay or loss.weights)


def _of_length(sums: ClassSums) -> Evidence:
    said = (
        f"the magnitudes of the head's bias gradient sum to {sums.reaches:.3g}, and those of a mean of softmax errors "
        "to 2 at most: a sum and no mean, or a loss that was scaled"
    )
    return Evidence(SCALE, said, sums.reaches, contradicts=True)
