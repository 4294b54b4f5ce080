"""What a client may do to its update before it shares it, so that what it gives away can be measured."""

import dataclasses

import torch
from torch import Tensor

from update.shared import SharedUpdate

DEFENCES = ("none", "noise:STD", "float16", "bfloat16", "topk:SHARE")


def defend(update: SharedUpdate, defence: str, *, generator: torch.Generator | None) -> SharedUpdate:
    """The update with its gradients defended.

    none        as they are
    noise:STD   Gaussian noise of this standard deviation, drawn from `generator`, added to every entry
    float16     rounded to half precision; also bfloat16
    topk:SHARE  all but this share of the entries, the largest of the whole update, set to zero

    Raises:
        ValueError: anything else, a standard deviation that is not above 0, a share that is not in (0, 1], or numbers
            that the defence takes beyond what floats can hold.
    """
    kind, _, text = defence.partition(":")
    amount = _amount(defence, text)
    if defence == "none":
        return update
    if kind == "noise" and amount is not None and 0 < amount < float("inf"):
        gradients = _noisy(update.gradients, amount, generator)
    elif defence in ("float16", "bfloat16"):
        gradients = {name: g.to(getattr(torch, defence)).to(g) for name, g in update.gradients.items()}
    elif kind == "topk" and amount is not None and 0 < amount <= 1:
        gradients = _largest(update.gradients, amount)
    else:
        raise ValueError(f"unknown defence {defence!r}: choose one of {', '.join(DEFENCES)}")
    defended = dataclasses.replace(update, gradients=gradients)
    defended.check(f"--defence {defence}")  # float16 ends at 65,504
    return defended


def _noisy(gradients: dict[str, Tensor], std: float, generator: torch.Generator | None) -> dict[str, Tensor]:
    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)

    return {name: gradient + std * noise(gradient) for name, gradient in gradients.items()}


def _largest(gradients: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    sizes = torch.cat([gradient.abs().flatten() for gradient in gradients.values()])
    least = sizes.topk(max(1, round(share * len(sizes)))).values[-1]
    return {name: torch.where(gradient.abs() >= least, gradient, 0) for name, gradient in gradients.items()}


def _amount(defence: str, text: str) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        raise ValueError(f"{defence!r}: {text!r} is not a number") from None
