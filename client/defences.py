"""The defences that a client may apply to its update before it shares the update."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from update.defences import PRIVATE, SUM, Defences
from update.shared import SharedUpdate

Gradients = dict[str, Tensor]  # by parameter name


def defend(
    clients: Sequence[SharedUpdate], defences: Defences, *, generator: torch.Generator | None = None
) -> SharedUpdate:
    """The update that the server sees: the clients' updates, defended one by one, in order, until they are summed.

    clip:NORM           the whole update scaled to L2 norm NORM where it is longer
    noise:STD           Gaussian noise of this standard deviation added to every entry
    topk:SHARE          all but this share of the entries, the largest of the whole update, set to zero
    quantise:BITS       each tensor's magnitudes rounded up or down, at random and right on average, to 2^BITS - 1 equal
                        steps of its largest one, signs apart (QSGD, Alistarh et al. 2017, arXiv 1610.02132, with the
                        largest magnitude for scale; 1 bit is TernGrad, Wen et al. 2017, arXiv 1705.07878)
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
    for defence in defences:
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
    "quantise": quantised,
    "sign": signs,
    "float16": _rounded_to(torch.float16),
    "bfloat16": _rounded_to(torch.bfloat16),
}
