"""Clients of several steps in plain PyTorch, which know nothing of this project, and what an attack is told of them."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

RATE = 0.05
Optimiser = Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]
Schedule = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]
Features = Callable[[nn.Module, Tensor], Tensor]
sgd = partial(torch.optim.SGD, lr=RATE)


@dataclass(frozen=True)
class Trainer:
    """One way to train for several steps.

    Attributes:
        name: in words.
        flags: what the attack is told; the number of images and the kind of file are added.
        optimiser: of the model's parameters.
        sizes: images of each minibatch of a pass.
        passes: through the images.
        schedule: of the rates; None: constant.
        prox: FedProx's mu.
        clip: norm to which the gradient of each step is clipped; None: none.
        is_coarse: whether it computes under autocast.
        more: images that the attack is told beyond those that there are.
    """

    name: str
    flags: str
    optimiser: Optimiser = sgd
    sizes: Sequence[int] = (2, 2)
    passes: int = 1
    schedule: Schedule | None = None
    prox: float = 0.0
    clip: float | None = None
    is_coarse: bool = False
    more: int = 0

    @property
    def normalises(self) -> tuple[float, float]:
        """Mean and standard deviation by which it normalises images: not at all."""
        return 0.0, 1.0

    def sent(self, model: nn.Module, images: Tensor, labels: Tensor, features: Features) -> tuple[dict, str, Tensor]:
        """The new weights by name, the flags, and the features (U, d) of each use of an image, at its own weights."""
        start = [weight.detach().clone() for weight in model.parameters()]
        optimiser, seen = self.optimiser(model.parameters()), []
        schedule = self.schedule(optimiser) if self.schedule else None
        for part in list(torch.arange(sum(self.sizes)).split(list(self.sizes))) * self.passes:
            optimiser.zero_grad()
            with torch.no_grad():
                seen.append(features(model, images[part]))
            with torch.autocast("cpu", torch.bfloat16, enabled=self.is_coarse):
                logits = model(images[part])
            nn.functional.cross_entropy(logits.float(), labels[part]).backward()
            for weight, old in zip(model.parameters(), start, strict=True):
                weight.grad += self.prox * (weight.detach() - old)
            if self.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), self.clip)
            optimiser.step()
            if schedule:
                schedule.step()
        new = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        words = f"--update_kind=weights {self.flags} --batch_size={sum(self.sizes) + self.more}"
        return new, words, torch.cat(seen)


def _cosine(optimiser: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 0.5 * (1 + math.cos(math.pi * step / 2)))


def _told(steps: int, batches: int | str = 2, rate: float = RATE, more: str = "") -> str:
    said = f"--local_steps={steps} --local_lr={rate:g} {more}"
    return said if batches == 1 else f"{said} --local_batches={batches}"


MOMENTUM = "--local_momentum=0.9"
TRAINERS = (
    Trainer("two minibatches, as declared", _told(2)),
    Trainer(
        "Nesterov's momentum, as declared",
        _told(2, more=f"{MOMENTUM} --local_nesterov"),
        partial(sgd, momentum=0.9, nesterov=True),
    ),
    Trainer("FedProx, as declared", _told(2, more="--local_prox=0.1"), prox=0.1),
    Trainer("cosine schedule, as declared", _told(2, more="--local_schedule=cosine"), schedule=_cosine),
    Trainer("each step clipped, as declared", _told(2, more="--local_clip=0.5"), clip=0.5),
    Trainer(
        "AdamW, as declared", _told(2, rate=1e-3, more="--local_optimizer=adamw"), partial(torch.optim.AdamW, lr=1e-3)
    ),
    Trainer("minibatches of three and one, as declared", _told(2, "3,1"), sizes=(3, 1)),
    Trainer("autocast in bfloat16, as declared", _told(2, more="--local_precision=bfloat16"), is_coarse=True),
    Trainer("rate 0.05, declared as 0.1", _told(2, rate=0.1)),
    Trainer("two steps, declared as one", _told(1, 1)),
    Trainer("two steps at rate 1e-4, declared as one", _told(1, 1, 2e-4), partial(sgd, lr=1e-4)),
    Trainer("one step, declared as two minibatches", _told(2), sizes=(4,)),
    Trainer("two passes, declared as one", _told(2), passes=2),
    Trainer("momentum 0.9, declared without", _told(2), partial(sgd, momentum=0.9)),
    Trainer("momentum 0.9, declared of 0.5", _told(2, more="--local_momentum=0.5"), partial(sgd, momentum=0.9)),
    Trainer("Adam, declared as SGD", _told(2), partial(torch.optim.Adam, lr=1e-3)),
    Trainer("four images, declared as six", _told(2), more=2),
)
BRIEF = {  # of them, on the networks on which not all are measured
    "MLP, ReLU": ("two minibatches, as declared", "Nesterov's momentum, as declared", "two steps, declared as one"),
    "LeNet": (),
    "GroupNorm": ("two minibatches, as declared", "two steps, declared as one"),
}


def trainers(network: str) -> tuple[Trainer, ...]:
    """Those that are measured on a network of this name."""
    return tuple(each for each in TRAINERS if network not in BRIEF or each.name in BRIEF[network])


def group_norm() -> nn.Module:
    """A network with GroupNorm, as clients of federated learning use it in BatchNorm's place."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.GroupNorm(4, 32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, stride=2, padding=1),
        nn.GroupNorm(4, 32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2048, 10),
    )
