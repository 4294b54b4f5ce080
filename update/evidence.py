"""What an update says of how it was made, by its numbers alone: evidence that is compared with what was declared.

The errors e_i of cross-entropy by the logits sum to zero over the classes, whatever the labels. So do the rows of the
head's gradient, G = (1/B) sum_i e_i h_i^T, and its bias's gradient gamma = (1/B) sum_i e_i. A client with weight decay
lambda adds lambda W, so then

    sum_k G_k = lambda sum_k W_k,

which is one unknown in d equations; an L1 penalty adds lambda sign(W). Errors of other losses (squared errors, binary
cross-entropy) do not sum to zero. Noise does not either, but noise fills all singular values of G, while a loss of
few images leaves most of them empty. No softmax error is longer than 2 in the sum of its magnitudes, so sum_k
|gamma_k| > 2 shows a gradient that is no mean.

Entries show what was done to them after training: many zeros, one magnitude a tensor, a pile-up at the largest. What an
update says of BatchNorm stands in `norm_modes`.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from network.head import Head
from network.parameters import trainable

UNBALANCED = 3e-3  # share of G beyond which its sum over the classes is no rounding: squared errors leave 0.02
SURE = 8.0  # standard deviations by which a weight decay must differ from zero
LEFT = 0.5  # share of the sum that a weight decay may leave unexplained
SIGNS = 0.1  # an L1 penalty leaves but rounding: so much less than a weight decay, to which its signs are similar
DECAY, L1 = "weight decay", "an L1 penalty"
PULLS: Mapping[str, Callable[[Tensor], Tensor]] = {  # penalties, by what they pull each weight with
    DECAY: lambda weight: weight,
    L1: torch.sign,
}
FILLED = 3.0  # noise leaves G's smallest singular value no smaller than this part of what its columns sum to
ROUNDINGS = 4.0  # standard deviations of what rounding makes of the sums over the classes
SOFTMAX = 1e-6  # what the rounding of softmax errors leaves of their sum in float32: 1e-7 and less
STATISTICS = "statistics"  # the topic of running statistics that are not those of the images that were read
SCALE = "scale"  # the topic of a factor of the whole update
PIXELS = "pixels"  # the topic of pixels that no image has
FIT = "fit"  # the topic of a client that no supposition fits
REPLAY = "replay"  # the topic of a training that does not give the update when it is replayed
POLISH = "polish"  # the topic of what the last steps of an attack have brought
HIDDEN = "hidden steps"  # the topic of steps that were not declared, and that noise may hide
ERRORS = "errors"  # the topic of errors that are tiny
LOSS = "loss"  # the topic of a loss that was not declared
MANY = 1000  # entries without which nothing is said of a tensor's entries
PRUNED = 0.5  # share of zeros in rows and columns that are not all zero: ReLUs leave whole rows
PILED = 0.01  # share of entries that have the largest magnitude, exactly
LEVELS = 512  # magnitudes in a tensor, at most, that show a quantised update
ALIKE = 0.9  # share of entries that differ from the rate by no more than WITHIN of it: Adam's first step, or signs
WITHIN = 1e-2


@dataclass(frozen=True)
class Evidence:
    """One thing that an update says of how it was made.

    Attributes:
        topic: of which assumption: `batchnorm`, `steps`, `decay`, `scale`, `loss`, `batch size`, `entries`, ...
        said: a sentence with the figure, for a person.
        figure: that it rests on; None where there is none.
        contradicts: whether it contradicts what was declared, and nothing was done about it. Then nothing that is read
            from the update under these assumptions is certain.
        overrules: the name of the flag that it takes the place of, or nothing.
    """

    topic: str
    said: str
    figure: float | None = None
    contradicts: bool = False
    overrules: str = ""


def contradictions(evidence: Iterable[Evidence]) -> list[Evidence]:
    """Those pieces that contradict what was declared."""
    return [piece for piece in evidence if piece.contradicts]


# ----------------------------------------------------------------------------------------------------
# The head's sums over the classes


@dataclass(frozen=True)
class ClassSums:
    """What the head's gradient sums to over the classes.

    Attributes:
        share: |sum_k G_k| as a share of sum_k |G_k|.
        decay: the factor lambda of the penalty that explains it, 0 where none does.
        pull: the penalty, one of `PULLS`.
        error: standard deviation of `decay`.
        is_other_loss: whether neither penalty nor noise explains it: the loss is no cross-entropy.
        reaches: sum_k |gamma_k|, at most 2 of a mean of softmax errors; None without a bias.
    """

    share: float
    decay: float
    pull: str
    error: float
    is_other_loss: bool
    reaches: float | None


def class_sums(
    gradients: Mapping[str, Tensor], model: nn.Module, rounding: Mapping[str, Tensor] | None = None
) -> ClassSums | None:
    """The sums over the classes of the model's head; None where the head is not linear or has no gradient.

    `rounding` is as in `of_gradients`.
    """
    try:
        head = Head.of(model)
    except ValueError:
        return None
    weight, bias = head.among(gradients)
    if weight is None or weight.dim() != 2 or len(weight) < 2:
        return None
    whole, server = (t.detach().double().cpu() for t in (weight, head.layer.weight))  # (K, d)
    size = float(whole.abs().sum(0).norm())
    if not size:
        return None
    sums = whole.sum(0)
    (pull, decay, error, left), *others = (_fitted(sums, server, pull) for pull in PULLS)
    for fit in others:
        if float(fit.left.norm()) < SIGNS * float(left.norm()):
            pull, decay, error, left = fit
    explains = decay > SURE * error and float(left.norm()) < LEFT * float(sums.norm())
    unexplained = left if explains else sums
    least = float(torch.linalg.svdvals(whole)[-1])
    is_noise = float(unexplained.norm()) / math.sqrt(len(whole)) < FILLED * least
    rounded = float(rounding[head.weight].double().norm()) if rounding else 0.0
    is_noise |= bias is not None and not rounding and abs(float(bias.double().sum())) < SOFTMAX
    return ClassSums(
        share=float(sums.norm()) / size,
        decay=decay if explains else 0.0,
        pull=pull,
        error=error,
        is_other_loss=float(unexplained.norm()) > max(UNBALANCED * size, ROUNDINGS * rounded) and not is_noise,
        reaches=None if bias is None else float(bias.detach().double().abs().sum()),
    )


class _Fit(NamedTuple):
    """A penalty's factor with its standard deviation, and what it leaves of the sums (d,)."""

    pull: str
    decay: float
    error: float
    left: Tensor


def _fitted(sums: Tensor, server: Tensor, pull: str) -> _Fit:
    """The penalty that explains most of the sums (d,), by the server's weights (K, d) of the head."""
    pulled = PULLS[pull](server).sum(0)
    length = float(pulled.square().sum())
    decay = float(sums @ pulled) / length if length else 0.0
    left = sums - decay * pulled
    error = float(left.norm()) / math.sqrt(max(1, len(sums) - 1) * length) if length else math.inf
    return _Fit(pull, decay, error, left)


def decayed_parameters(gradients: Mapping[str, Tensor], model: nn.Module, sums: ClassSums) -> list[str]:
    """The names of the parameters that a penalty acts on: all, or all but those of one dimension.

    Many clients leave biases and normalisations alone. The head's bias tells: its gradient sums to zero, or to lambda
    times its own sum.
    """
    parameters = trainable(model)
    head = Head.of(model)
    _, bias = head.among(gradients)
    if bias is not None and sums.decay:
        pulled = PULLS[sums.pull](head.layer.bias.detach().double())
        found, expected = float(bias.double().sum()), sums.decay * float(pulled.sum())
        if abs(found) < abs(found - expected):
            return [name for name, parameter in parameters.items() if parameter.dim() > 1]
    return list(parameters)


def without_decay(
    gradients: Mapping[str, Tensor], model: nn.Module, sums: ClassSums, names: Sequence[str]
) -> dict[str, Tensor]:
    """The gradients less the penalty on these parameters, in each gradient's own type."""
    parameters = trainable(model)

    def reduced(name: str, gradient: Tensor) -> Tensor:
        pull = sums.decay * PULLS[sums.pull](parameters[name].detach().double()).to(gradient.device)
        return (gradient.double() - pull).to(gradient.dtype)

    return {name: reduced(name, g) if name in names else g for name, g in gradients.items()}


# ----------------------------------------------------------------------------------------------------
# Entries


def of_entries(
    gradients: Mapping[str, Tensor],
    rate: float | None,
    declared: bool,
    rounding: Mapping[str, Tensor] | None = None,
) -> list[Evidence]:
    """What the entries say was done to them after training.

    Args:
        gradients: by parameter name.
        rate: by which a difference of weights was divided; None for gradients.
        declared: whether a defence was declared that does such things.
        rounding: standard deviation of each entry by the rounding of new weights, by parameter name; or None.
    """
    many = {name: g.detach().double().cpu() for name, g in gradients.items() if g.numel() >= MANY}
    tensors = list(many.values())
    if not tensors:
        return []
    found = [] if rate is None else _alike(tensors, rate)
    steps = min(_steps(g, (rounding or {}).get(name)) for name, g in many.items())
    for look, least in LOOKS:  # the first explains the others
        found = found or (look(tensors, declared) if steps > least else [])
    return found


def _steps(tensor: Tensor, rounding: Tensor | None) -> float:
    """How many units of its rounding the median entry has that is not zero."""
    moved = tensor != 0
    if rounding is None or not moved.any():
        return math.inf
    return float((tensor[moved].abs() / (rounding.to(tensor)[moved] * math.sqrt(12))).median())


def _pruned(tensors: Sequence[Tensor], declared: bool) -> list[Evidence]:
    zeros, places = 0, 0
    for tensor in tensors:
        matrix = tensor.flatten(1) if tensor.dim() > 1 else tensor[:, None]
        live = matrix[matrix.any(1)][:, matrix.any(0)]
        zeros, places = zeros + int((live == 0).sum()), places + live.numel()
    share = zeros / max(1, places)
    if share < PRUNED:
        return []
    said = f"{share:.1%} of the entries are exactly zero, scattered: the update was pruned to its largest entries"
    return [Evidence("entries", said, share, not declared)]


def _signed(tensors: Sequence[Tensor], declared: bool) -> list[Evidence]:
    magnitudes = [int(tensor.abs()[tensor != 0].unique().numel()) for tensor in tensors]
    if max(magnitudes) > 2:
        return []
    said = "all entries of a tensor have one or two magnitudes: only their signs were sent"
    return [Evidence("entries", said, float(max(magnitudes)), not declared)]


def _quantised(tensors: Sequence[Tensor], declared: bool) -> list[Evidence]:
    levels = [(int(tensor.abs().unique().numel()), tensor.numel()) for tensor in tensors]
    if not all(count <= min(LEVELS, size / 4) for count, size in levels):
        return []
    most = max(count for count, _ in levels)
    said = f"no tensor has more than {most} magnitudes: the update was quantised"
    return [Evidence("entries", said, float(most), not declared)]


def _truncated(tensors: Sequence[Tensor], declared: bool) -> list[Evidence]:
    bounds = [float(tensor.abs().max()) for tensor in tensors]
    piled = sum(int((tensor.abs() == bound).sum()) for tensor, bound in zip(tensors, bounds, strict=True))
    share = piled / sum(tensor.numel() for tensor in tensors)
    if share < PILED:
        return []
    said = f"{share:.1%} of the entries have their tensor's largest magnitude exactly: the update was truncated"
    return [Evidence("entries", said, share, not declared)]


def _alike(tensors: Sequence[Tensor], rate: float) -> list[Evidence]:
    """A step of Adam moves every weight by the rate, whatever its gradient: |difference| / rate is 1."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    flat = flat[flat != 0].abs()
    if not len(flat):
        return []
    step = float(flat.median())
    share = float(((flat / step - 1).abs() < WITHIN).double().mean())
    if share < ALIKE:
        return []
    said = (
        f"{share:.0%} of the weights moved by one and the same distance, {step * rate:.3g}: "
        "a step of Adam or of a sign, not of plain SGD"
    )
    return [Evidence("optimiser", said, share, True)]


# What entries are looked at for, and how many units of their rounding they must have: fewer leave as few magnitudes,
# and as many zeros, without any other reason.
LOOKS = ((_pruned, 10), (_signed, 10), (_truncated, 100), (_quantised, 2 * LEVELS))
