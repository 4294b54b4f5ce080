"""What a client may do to its update before it shares it, so that what it gives away can be measured."""

import dataclasses

import torch
from torch import Tensor

from gradients import SharedUpdate

DEFENCES = ("none", "noise:STD", "float16", "bfloat16", "topk:SHARE")


def defend(update: SharedUpdate, defence: str, *, generator: torch.Generator) -> SharedUpdate:
    """The update with its gradients defended.

    none        as they are
    noise:STD   Gaussian noise of this standard deviation added to every entry
    float16     rounded to half precision; also bfloat16
    topk:SHARE  all but this share of the entries, the largest of the whole update, set to zero

    Raises:
        ValueError: anything else, a standard deviation that is not above 0, a share that is not in (0, 1].
    """
    kind, _, text = defence.partition(":")
    amount = _amount(defence, text)
    gradients = update.gradients
    if defence == "none":
        return update
    if kind == "noise" and amount is not None and 0 < amount < float("inf"):

        def noisy(gradient: Tensor) -> Tensor:
            noise = torch.randn(gradient.shape, generator=generator, dtype=gradient.dtype)
            return gradient + amount * noise.to(gradient.device)

        return dataclasses.replace(update, gradients={name: noisy(g) for name, g in gradients.items()})
    if defence in ("float16", "bfloat16"):
        dtype = getattr(torch, defence)
        return dataclasses.replace(update, gradients={name: g.to(dtype).to(g) for name, g in gradients.items()})
    if kind == "topk" and amount is not None and 0 < amount <= 1:
        sizes = torch.cat([gradient.abs().flatten() for gradient in gradients.values()])
        kept = max(1, round(amount * len(sizes)))
        least = sizes.topk(kept).values[-1]
        return dataclasses.replace(
            update, gradients={name: torch.where(g.abs() >= least, g, 0) for name, g in gradients.items()}
        )
    raise ValueError(f"unknown defence {defence!r}: choose one of {', '.join(DEFENCES)}")


def _amount(defence: str, text: str) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        raise ValueError(f"{defence!r}: {text!r} is not a number") from None
