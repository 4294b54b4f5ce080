"""The defences that a client may apply to its update before it shares the update."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from network.parameters import named_by, trainable
from update.defences import EIGHT_BITS, PRIVATE, SUM, Defences
from update.shared import SharedUpdate

Gradients = dict[str, Tensor]  # by parameter name

RARE = -20.0  # logarithm of a chance below which waiting for it is no longer counted in whole rounds


def defend(
    clients: Sequence[SharedUpdate], defences: Defences, *, generator: torch.Generator | None = None
) -> SharedUpdate:
    """The update that the server sees: the clients' updates, defended one by one, in order, until they are summed.

    clip:NORM           the whole update scaled to L2 norm NORM where it is longer
    noise:STD           Gaussian noise of this standard deviation added to every entry
    topk:SHARE          all but this share of the entries, the largest of the whole update, set to zero
    feedback:SHARE:ROUNDS  the same with error feedback: what was not sent is added to the next round's update (Stich et
                        al. 2018, arXiv 1809.07599); the last of ROUNDS rounds that have all this very gradient
    percentile:PERCENT  magnitudes below this percentile of the whole update set to zero (NVFlare's PercentilePrivacy;
                        Shokri and Shmatikov 2015)
    truncate:GAMMA      entries of the weight difference over the steps clamped to [-GAMMA, GAMMA] (the same filter)
    svt:FRACTION:EPSILON:NOISE_VAR:GAMMA:TAU  sparse vector technique, see `sparse_vector` (NVFlare's SVTPrivacy)
    localdp:CLIP:SENSITIVITY:EPSILON:DELTA  the weight difference clipped to L2 norm CLIP, then Gaussian noise of the
                        standard deviation SENSITIVITY sqrt(2 ln(1.25 / DELTA)) / EPSILON (Flower's LocalDpMod)
    quantise:BITS       each tensor's magnitudes rounded up or down, at random and right on average, to 2^BITS - 1 equal
                        steps of its largest one, signs apart (QSGD, Alistarh et al. 2017, arXiv 1610.02132, with the
                        largest magnitude for scale; 1 bit is TernGrad, Wen et al. 2017, arXiv 1705.07878)
    int8                each tensor rounded to the nearest of the 255 whole multiples of its largest magnitude / 127
    sign                each tensor's signs times its mean magnitude (signSGD, Bernstein et al. 2018, arXiv 1802.04434,
                        with the scale of Karimireddy et al. 2019, arXiv 1901.09847); zeros stay zero
    float16, bfloat16   rounded to half precision
    secure_sum:CLIENTS  the sum over the clients, divided by their number; later defences are applied once, to the sum
    dpsgd:CLIP:SIGMA    nothing more: DP-SGD is in the clients' gradients, see `client.privacy`

    Args:
        clients: undefended updates of one batch size, as many as the defences have clients.
        defences: in their order.
        generator: the source of noise and rounding, on the CPU.

    Raises:
        ValueError: a defence makes numbers too large for floats, or leaves only zeros.
    """
    if len(clients) != defences.clients:
        raise ValueError(f"--defence {defences} is of {defences.clients} clients, not {len(clients)}")
    updates = list(clients)
    for defence in defences.of_gradient(clients[0].training):
        if defence.name == SUM:
            updates = [_summed(updates)]
        elif defence.name != PRIVATE:
            act = ACTS[defence.name]
            updates = [
                dataclasses.replace(update, gradients=act(update.gradients, *defence.amounts, generator=generator))
                for update in updates
            ]
    defended = dataclasses.replace(updates[0], defence=str(defences))
    defended.check(f"--defence {defences}")  # float16 ends at 65,504
    return defended


def defend_received(update: SharedUpdate, defence: str, *, generator: torch.Generator | None = None) -> SharedUpdate:
    """A received update with a further defence on top, as the client could have applied it.

    Raises:
        ValueError: as in `defend`, or a defence that needs the clients' images.
    """
    defences = Defences.parse(defence)
    if not list(defences):
        return update
    if defences.private or defences.clients > 1:
        raise ValueError(f"--defence {defence}: {PRIVATE} and {SUM} take the clients' images, not an update of theirs")
    both = defence if update.defence == "none" else f"{update.defence},{defence}"
    return dataclasses.replace(defend([update], defences, generator=generator), defence=both)


def encrypted(update: SharedUpdate, model: nn.Module, prefixes: Sequence[str]) -> SharedUpdate:
    """The update of which a server does not see the parameters whose names start with one of the prefixes.

    In one step such a parameter is to the server what a frozen one is, and the model's is frozen: its weights are
    known, and how far they went is not. In several steps it has moved all others, so the training names it.

    Raises:
        ValueError: a prefix fits no parameter, or nothing is left to see.
    """
    names = set(named_by(model, prefixes))
    seen = {name: gradient for name, gradient in update.gradients.items() if name not in names}
    if not seen:
        raise ValueError(f"--hidden {','.join(prefixes)}: nothing is left to see")
    for name in names & trainable(model).keys():
        model.get_parameter(name).requires_grad_(False)
    moved = [name for name in update.gradients if name in names]
    return dataclasses.replace(update, gradients=seen, training=update.training.hiding(moved))


def _summed(updates: Sequence[SharedUpdate]) -> SharedUpdate:
    """The mean of the clients' updates: all batches have one size, so the mean is the average over all images."""
    gradients = {
        name: torch.stack([update.gradients[name] for update in updates]).mean(0) for name in updates[0].gradients
    }
    return dataclasses.replace(updates[0], gradients=gradients, batch_size=sum(update.batch_size for update in updates))


def clipped(gradients: Gradients, norm: float, *, generator: torch.Generator | None = None) -> Gradients:
    """All tensors scaled by one factor, so that their L2 norm as one long vector is at most `norm`."""
    length = float(torch.stack([gradient.double().norm() for gradient in gradients.values()]).norm())
    return {name: gradient * min(1.0, norm / length) for name, gradient in gradients.items()} if length else gradients


def noisy(gradients: Gradients, std: float, *, generator: torch.Generator | None = None) -> Gradients:
    """The gradients plus Gaussian noise of this standard deviation in every entry."""
    return {name: gradient + std * noise_like(gradient, generator) for name, gradient in gradients.items()}


def noise_like(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal noise, drawn on the CPU."""
    return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)


def largest(gradients: Gradients, share: float, *, generator: torch.Generator | None = None) -> Gradients:
    """All but this share of the entries, the largest of all tensors together, set to zero."""
    sizes = torch.cat([gradient.abs().flatten() for gradient in gradients.values()])
    least = sizes.topk(max(1, round(share * len(sizes)))).values[-1]
    return {name: torch.where(gradient.abs() >= least, gradient, 0) for name, gradient in gradients.items()}


def fed_back(
    gradients: Gradients, share: float, rounds: float, *, generator: torch.Generator | None = None
) -> Gradients:
    """What the last of these rounds sends, each with the same gradients, if each keeps what it did not send."""
    due = sent = {name: torch.zeros_like(gradient) for name, gradient in gradients.items()}
    for _ in range(int(rounds)):
        due = {name: due[name] - sent[name] + gradient for name, gradient in gradients.items()}
        sent = largest(due, share)
    return sent


def above_percentile(gradients: Gradients, percent: float, *, generator: torch.Generator | None = None) -> Gradients:
    """Magnitudes below this percentile of those of all tensors together set to zero."""
    sizes = np.concatenate([gradient.abs().double().cpu().numpy().ravel() for gradient in gradients.values()])
    cutoff = float(np.percentile(sizes, percent))
    return {name: torch.where(gradient.double().abs() >= cutoff, gradient, 0) for name, gradient in gradients.items()}


def truncated(gradients: Gradients, gamma: float, *, generator: torch.Generator | None = None) -> Gradients:
    """Every entry clamped to [-gamma, gamma]."""
    return {name: gradient.clamp(-gamma, gamma) for name, gradient in gradients.items()}


def sparse_vector(
    gradients: Gradients,
    fraction: float,
    epsilon: float,
    noise_var: float,
    gamma: float,
    tau: float,
    *,
    generator: torch.Generator | None = None,
) -> Gradients:
    """Noisy values of some entries whose magnitudes, clamped to gamma, exceed a noisy threshold; the others are zero.

    n is this fraction of the entries. The threshold is tau + Lap(2 gamma / epsilon). Round after round, every entry
    that was not accepted yet is compared with it under fresh noise Lap(4 gamma n / (epsilon (2 n)^(2/3))), until n are
    accepted. n of these are drawn with replacement, so some twice, and sent with noise Lap(2 gamma / noise_var),
    clamped to [-gamma, gamma].
    """
    flat = torch.cat([gradient.double().cpu().flatten() for gradient in gradients.values()])
    count = math.ceil(fraction * len(flat))
    threshold = tau + 2 * gamma / epsilon * laplace_noise(1, generator)
    spread = 4 * gamma * count / (epsilon * (2 * count) ** (2 / 3))
    rounds = _rounds_to_pass((flat.abs().clamp(max=gamma) - threshold) / spread, generator)
    accepted = (rounds <= rounds.kthvalue(count).values).nonzero()[:, 0]
    chosen = accepted[torch.randint(len(accepted), (count,), generator=generator)].unique()
    noise, sent = 2 * gamma / noise_var * laplace_noise(len(chosen), generator), torch.zeros_like(flat)
    sent[chosen] = (flat[chosen] + noise).clamp(-gamma, gamma)
    parts = sent.split([gradient.numel() for gradient in gradients.values()])
    return {name: part.view_as(own).to(own) for (name, own), part in zip(gradients.items(), parts, strict=True)}


def _rounds_to_pass(margins: Tensor, generator: torch.Generator | None) -> Tensor:
    """The logarithm of the round in which each margin (N,) first is positive under fresh noise Lap(1) in every round.

    Drawn at once, as a rounded exponential variable: where margins are far below zero, rounds would never end.
    """
    log_chance = torch.where(margins >= 0, torch.log1p(-torch.exp(-margins.abs()) / 2), margins - math.log(2))
    log_rate = torch.where(log_chance < RARE, log_chance, torch.log(-torch.log1p(-log_chance.exp())))
    waited = torch.empty_like(margins).exponential_(generator=generator).log() - log_rate
    return torch.where(waited < -RARE, waited.exp().ceil().clamp(min=1).log(), waited)


def laplace_noise(count: int, generator: torch.Generator | None) -> Tensor:
    """Laplace noise (count,) of scale 1 in float64, drawn on the CPU."""
    drawn = torch.empty(2, count, dtype=torch.float64).exponential_(generator=generator)
    return drawn[0] - drawn[1]


def locally_private(
    gradients: Gradients,
    clip: float,
    sensitivity: float,
    epsilon: float,
    delta: float,
    *,
    generator: torch.Generator | None = None,
) -> Gradients:
    """Clipped to this norm, with the noise of the Gaussian mechanism for (epsilon, delta) at this sensitivity."""
    return noisy(clipped(gradients, clip), gaussian_std(sensitivity, epsilon, delta), generator=generator)


def gaussian_std(sensitivity: float, epsilon: float, delta: float) -> float:
    """The noise of Flower's LocalDpMod for (epsilon, delta): the classical bound, proved for epsilon below 1."""
    return sensitivity * math.sqrt(2 * math.log(1.25 / delta)) / epsilon


def in_eight_bits(gradients: Gradients, *, generator: torch.Generator | None = None) -> Gradients:
    """Whole multiples of each tensor's largest magnitude / EIGHT_BITS, the nearest ones; halves to even ones."""

    def rounded(gradient: Tensor) -> Tensor:
        step = gradient.abs().max() / EIGHT_BITS
        return (gradient / step).round() * step if step else gradient

    return {name: rounded(gradient) for name, gradient in gradients.items()}


def quantised(gradients: Gradients, bits: int, *, generator: torch.Generator | None = None) -> Gradients:
    """Magnitudes at 2^bits - 1 equal steps of each tensor's largest, by stochastic rounding; signs are kept."""
    steps = 2**bits - 1

    def rounded(gradient: Tensor) -> Tensor:
        step = gradient.abs().max() / steps
        if not step:
            return gradient
        draw = torch.rand(gradient.shape, generator=generator, dtype=gradient.dtype).to(gradient.device)
        return step * (gradient.abs() / step + draw).floor().clamp(max=steps) * gradient.sign()

    return {name: rounded(gradient) for name, gradient in gradients.items()}


def signs(gradients: Gradients, *, generator: torch.Generator | None = None) -> Gradients:
    """Signs, times the mean magnitude of each tensor."""
    return {name: gradient.sign() * gradient.abs().mean() for name, gradient in gradients.items()}


def _rounded_to(dtype: torch.dtype) -> Callable[..., Gradients]:
    def rounded(gradients: Gradients, *, generator: torch.Generator | None = None) -> Gradients:
        return {name: gradient.to(dtype).to(gradient) for name, gradient in gradients.items()}

    return rounded


ACTS: Mapping[str, Callable[..., Gradients]] = {
    "clip": clipped,
    "noise": noisy,
    "topk": largest,
    "feedback": fed_back,
    "percentile": above_percentile,
    "truncate": truncated,
    "svt": sparse_vector,
    "localdp": locally_private,
    "int8": in_eight_bits,
    "quantise": quantised,
    "sign": signs,
    "float16": _rounded_to(torch.float16),
    "bfloat16": _rounded_to(torch.bfloat16),
}
