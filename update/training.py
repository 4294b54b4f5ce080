"""Local training: the steps of a client before it shares its update. The client trains so, and the server imitates it.

A client of FedSGD shares the gradient of its batch. A client of FedAvg (McMahan et al. 2017, arXiv 1602.05629) first
makes N steps, each on the next of M minibatches, and shares how far the weights went. With SGD, whatever its momentum,
its weight decay, its schedule of rates and FedProx's pull, weights are a linear combination of the server's weights and
of the gradients g_s at the weights before each step s:

    w_t = alpha_t w_0 - sum_{s<t} beta_t,s g_s

Running the optimiser on unit vectors gives alpha and beta (`LocalTraining.coefficients`). What is shared is

    (alpha_N w_0 - w_N) / sum_s beta_N,s = sum_s beta_N,s g_s / sum_s beta_N,s,

a weighted mean of the gradients along the way: with plain SGD their mean, and for N = 1 the gradient itself. This mean
is differentiable by images and labels, through all steps. Of Adam g_s is not the gradient but Adam's quotient of
moments, and the mean of these is no combination of gradients.
"""

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor, nn
from torch.func import functional_call

from network.parameters import trainable
from update import checked
from update.batchnorm import BATCHNORMS, in_training, shares, statistics_seen
from update.loss import CROSS_ENTROPY, Loss
from update.optimiser import LocalOptimiser

PRECISIONS = ("float32", "bfloat16")  # of a client's activations: as the weights are, or torch.autocast's
PLAIN_SGD = LocalOptimiser()
Order = tuple[tuple[int, ...], ...]  # the images of each step


@dataclass(frozen=True)
class LocalTraining:
    """How a client trained before it shared its update; the default is one step of FedSGD.

    Attributes:
        steps: N.
        batches: minibatches that the steps go through in turn, M: all of one size, but for the last, which may be
            smaller.
        rate: the learning rate; None for a single step of SGD, on which the rate has no influence.
        batchnorm: eval (running statistics), train (the minibatch's statistics; the running statistics are shared), or
            train_private (the minibatch's statistics; the running statistics are not shared).
        loss: of each image; a minibatch's is their mean, or with class weights their weighted mean.
        optimiser: the rule of each step.
        sizes: of the M minibatches, where these are not of one size; a loader that drops its last, smaller minibatch
            leaves images out of each pass.
        shuffle: whether each pass goes through the images in another order, which the server does not know.
        order: the images of each step, where they are known or supposed; None: minibatches in turn.
        precision: of the client's activations, one of `PRECISIONS`.
        frozen_norms: BatchNorm layers that stay in eval mode while the others train, by their names or by those of
            modules that hold them.
        hidden: parameters of the model that several steps moved and whose movement is not shared, by name. The model's
            are frozen, as those are that no step moved: both have no gradient in the update.

    Raises:
        ValueError: a number below 1, steps that are not whole passes, several steps without a rate above 0, frozen
            layers where none trains, or rules that do not go together.
    """

    steps: int = 1
    batches: int = 1
    rate: float | None = None
    batchnorm: str = "eval"
    loss: Loss = CROSS_ENTROPY
    optimiser: LocalOptimiser = PLAIN_SGD
    sizes: tuple[int, ...] | None = None
    shuffle: bool = False
    order: Order | None = None
    precision: str = "float32"
    frozen_norms: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()

    @classmethod
    def stated(cls, facts: object) -> "LocalTraining":
        """The training that the facts of an update's file state; what they leave out has its default.

        Raises:
            ValueError: a fact is unknown, of another kind, or refused as in a `LocalTraining`.
        """
        facts = checked.mapping(facts, "training")
        unknown = [name for name in facts if name not in _FACTS]
        if unknown:
            raise checked.DamagedError(f"training has {unknown[0]!r}, which is none of its facts")
        return cls(**{name: _FACTS[name](value, f"training.{name}") for name, value in facts.items()})

    def __post_init__(self) -> None:
        for name in ("steps", "batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"--local_{name} {getattr(self, name)}: at least 1")
        if self.rate is not None and not 0 < self.rate < float("inf"):
            raise ValueError(f"--local_lr {self.rate}: a finite number above 0")
        if self.steps % self.batches:
            raise ValueError(f"--local_steps {self.steps}: not whole passes through {self.batches} minibatches")
        if self.rate is None and not self.is_gradient:
            kind = f"--local_steps {self.steps}" if self.steps > 1 else f"--local_optimizer {self.optimiser.name}"
            raise ValueError(f"{kind} needs --local_lr, the client's learning rate")
        if self.batchnorm not in BATCHNORMS:
            raise ValueError(f"unknown bn {self.batchnorm!r}: choose one of {', '.join(BATCHNORMS)}")
        if self.frozen_norms and not self.uses_batch_statistics:
            raise ValueError("--bn_frozen goes with --bn train or train_private: in eval mode all layers are frozen")
        if self.precision not in PRECISIONS:
            raise ValueError(f"--local_precision {self.precision!r}: choose one of {', '.join(PRECISIONS)}")
        if self.sizes is not None and (len(self.sizes) != self.batches or min(self.sizes) < 1):
            raise ValueError(f"--local_batches {self.sizes}: the sizes of {self.batches} minibatches, each at least 1")
        if self.order is not None and len(self.order) != self.steps:
            raise ValueError(f"an order of {len(self.order)} minibatches for {self.steps} steps")
        if (self.rate or 0) * (self.optimiser.decay + self.optimiser.prox) >= 1:
            raise ValueError(
                "--local_lr times --local_weight_decay and --local_prox must be below 1: weights would turn"
            )
        self.optimiser.check(self.steps, self.passes)

    @property
    def is_one_step(self) -> bool:
        """Whether all images are seen at the server's weights."""
        return self.steps == 1

    @property
    def is_gradient(self) -> bool:
        """Whether the client shares the gradient itself, or it shortened: one step of SGD."""
        return self.is_one_step and self.optimiser.is_linear

    @property
    def is_quotient(self) -> bool:
        """Whether each entry is g / (|g| + eps), g being what Adam divides: one step of Adam, whatever its betas."""
        return self.is_one_step and self.optimiser.name != "sgd"

    @property
    def undivided(self) -> "LocalTraining":
        """The same step of SGD: of a quotient it gives g, but for Adam's own weight decay."""
        return replace(self, optimiser=LocalOptimiser(clip=self.optimiser.clip))

    @property
    def is_plain(self) -> bool:
        """Whether the update is the mean of the images' own gradients, none of which depends on another image."""
        return self.is_gradient and not self.uses_batch_statistics and self.optimiser.clip is None

    def __str__(self) -> str:
        """The steps in words, but for loss and BatchNorm, which are said apart."""
        done = "one step" if self.is_one_step else f"{self.steps} steps"
        rate = f" at rate {self.rate:g}" if self.rate else ""
        named = f"minibatches of {', '.join(map(str, self.sizes))}" if self.sizes else f"{self.batches} minibatches"
        through = " on the whole batch" if self.batches == 1 else f", through {named} in turn"
        through += ", in another order each pass" if self.shuffle else ""
        coarse = f", activations in {self.precision}" if self.precision != "float32" else ""
        return f"{done} of {self.optimiser}{rate}{through}{coarse}"

    @property
    def uses_batch_statistics(self) -> bool:
        """Whether BatchNorm is in training mode."""
        return self.batchnorm != "eval"

    @property
    def passes(self) -> int:
        """Times that the client goes through its images."""
        return self.steps // self.batches

    @property
    def reach(self) -> float:
        """sum_s beta_N,s, the divisor of the weights' difference: of plain SGD steps times rate; 0 of a gradient."""
        return 0.0 if self.is_gradient else self.combination().total

    def combination(self) -> "Combination":
        """The trained weights as a combination of the server's and of the steps' gradients."""
        last = self._combinations[-1]
        return Combination(float(last[0]), -last[1:], self.rate or 1.0)

    def coefficients(self) -> "Coefficients":
        """The same of the weights before each step t < N, and of the trained weights, t = N."""
        table = self._combinations
        return Coefficients(table[:, 0], -(self.rate or 1.0) * table[:, 1:])

    @cached_property
    def _combinations(self) -> Tensor:
        """The optimiser's own steps on unit vectors: (1 + N, 1 + N) of w_0 and of rate times each g_s, float64.

        The loop asks at every evaluation, and the table never changes.
        """
        unit = torch.zeros(1 + self.steps, dtype=torch.float64)
        found = [unit.index_fill(0, torch.tensor(0), 1)]
        walk = self.optimiser.in_units_of(self.rate or 1.0).begun(found)
        for step, factor in enumerate(self.optimiser.factors(self.steps, self.passes), 1):
            walk.move([unit.index_fill(0, torch.tensor(step), 1)], factor)
            found += walk.weights
        return torch.stack(found)

    def counts(self, batch_size: int) -> list[float]:
        """How much an image of each step of one pass counts in the update, (N,): 1 in a mean over so many images."""
        shares, sizes = self.coefficients().shares, torch.tensor(self.sizes_of(batch_size))
        return (shares * batch_size / sizes).tolist()

    def hiding(self, names: Iterable[str]) -> "LocalTraining":
        """The training whose movement of these parameters is not shared either; of one step it tells no more."""
        unseen = dict.fromkeys([*self.hidden, *names])
        return self if self.is_one_step else replace(self, hidden=tuple(unseen))

    def size(self, batch_size: int) -> int:
        """Images in a minibatch of so many images in all; the last holds the rest, as data loaders leave it."""
        return -(-batch_size // self.batches)

    def sizes_of(self, batch_size: int) -> list[int]:
        """Images in each of the M minibatches, of so many images in all."""
        if self.sizes is not None:
            return list(self.sizes)
        size = self.size(batch_size)
        return [min(size, batch_size - first) for first in range(0, batch_size, size)]

    def schedule(self, batch_size: int, device: torch.device | str = "cpu") -> list[Tensor]:
        """The images of each step, as indices (b,): those of `order`, or the minibatches in turn."""
        return list(_schedule(self, batch_size, torch.device(device)))

    def shuffled(self, batch_size: int, generator: torch.Generator) -> "LocalTraining":
        """The training with an order drawn anew for each pass (on the CPU); itself where none is needed."""
        if not self.shuffle or self.order is not None:
            return self
        sizes, order = self.sizes_of(batch_size), []
        for _ in range(self.passes):
            drawn = torch.randperm(batch_size, generator=generator)[: sum(sizes)]
            order += [tuple(part.tolist()) for part in drawn.split(sizes)]
        return replace(self, order=tuple(order))

    def check(self, batch_size: int) -> None:
        """Refuse a batch that does not fall into these minibatches.

        Raises:
            ValueError: minibatches of one size, but for the last, would be fewer; they hold more images than the batch,
                or leave some out of every pass; or the order names an image that is none.
        """
        if self.sizes is None:
            size = self.size(batch_size)
            if -(-batch_size // size) != self.batches:
                raise ValueError(
                    f"--local_batches {self.batches} does not divide the batch of {batch_size} images: "
                    f"minibatches of {size} are {-(-batch_size // size)}"
                )
        held, named = sum(self.sizes_of(batch_size)), f"--local_batches {','.join(map(str, self.sizes or ()))}"
        if held > batch_size:
            raise ValueError(f"{named}: minibatches of {held} images in all, of a batch of {batch_size}")
        if held < batch_size and not (self.shuffle and self.passes > 1):
            raise ValueError(f"{named}: {batch_size - held} of {batch_size} images are in no step: --batch_size {held}")
        if self.order is not None and not all(0 <= image < batch_size for part in self.order for image in part):
            raise ValueError(f"the order of the minibatches names an image that is none of {batch_size}")


FEDSGD = LocalTraining()  # one step on the whole batch


@lru_cache(maxsize=16)  # the loop asks at every evaluation, and numbers that go to a GPU would have to be waited for
def _schedule(training: LocalTraining, batch_size: int, device: torch.device) -> tuple[Tensor, ...]:
    if training.order is not None:
        return tuple(torch.tensor(images, device=device) for images in training.order)
    sizes = training.sizes_of(batch_size)
    return torch.arange(sum(sizes), device=device).split(sizes) * training.passes


def _whole_numbers(value: object, name: str, least: int) -> tuple[int, ...]:
    return tuple(checked.whole(each, name, least) for each in checked.sequence(value, name))


def _words(value: object, name: str) -> tuple[str, ...]:
    return tuple(checked.word(each, name) for each in checked.sequence(value, name))


# How each fact of an update's file is read.
_FACTS = {
    "steps": lambda value, name: checked.whole(value, name, 1),
    "batches": lambda value, name: checked.whole(value, name, 1),
    "rate": lambda value, name: None if value is None else checked.real(value, name, 0),
    "batchnorm": checked.word,
    "loss": lambda value, _: Loss.stated(value),
    "optimiser": lambda value, _: LocalOptimiser.stated(value),
    "sizes": lambda value, name: None if value is None else _whole_numbers(value, name, 1),
    "shuffle": checked.switch,
    "order": lambda value, name: (
        None if value is None else tuple(_whole_numbers(each, name, 0) for each in checked.sequence(value, name))
    ),
    "precision": checked.word,
    "frozen_norms": _words,
    "hidden": _words,
}


@dataclass(frozen=True)
class Coefficients:
    """The weights before step t as a combination: w_t = alpha[t] w_0 - sum_{s<t} beta[t, s] g_s.

    Attributes:
        alpha: (N + 1,), float64.
        beta: (N + 1, N), float64, zero from s = t on; without a rate, of a single step, in units of the rate.
    """

    alpha: Tensor
    beta: Tensor

    @property
    def shares(self) -> Tensor:
        """The weight (N,) of each step's gradient in the mean that is shared."""
        return self.beta[-1] / self.beta[-1].sum()

    def weights(self, step: int, first: Tensor, gradients: Sequence[Tensor]) -> Tensor:
        """One parameter before a step, from the server's and from the gradients of the steps before."""
        factors = self.beta[step].tolist()
        moved = sum(factor * gradient for factor, gradient in zip(factors, gradients, strict=False))
        return float(self.alpha[step]) * first - moved


@dataclass(frozen=True)
class Combination:
    """The trained weights as a combination: w_N = alpha w_0 - rate sum_s share_s g_s.

    Attributes:
        alpha: 1 without weight decay.
        shares: (N,), float64; all 1 of plain SGD.
        rate: the learning rate.
    """

    alpha: float
    shares: Tensor
    rate: float

    @property
    def total(self) -> float:
        """What a gradient that never changes is multiplied by."""
        return self.rate * float(self.shares.sum())

    def difference(self, old: Tensor, new: Tensor) -> Tensor:
        """The weighted mean gradient along the way, from the weights before and after the training."""
        return ((old if self.alpha == 1 else self.alpha * old) - new) / self.total

    def of_move(self, old: Tensor, moved: Tensor) -> Tensor:
        """The same from the weights before, and how far they have moved."""
        return (moved if self.alpha == 1 else moved + (1 - self.alpha) * old) / -self.total

    def mean(self, gradients: Sequence[Tensor]) -> Tensor:
        """The same from one parameter's gradients at each step."""
        parts = zip(gradients, self.shares.tolist(), strict=True)
        return sum(gradient if share == 1 else share * gradient for gradient, share in parts) / float(self.shares.sum())


@dataclass(frozen=True)
class Trained:
    """The result of local training.

    Attributes:
        average: weighted mean of the gradients along the way, one tensor per trainable parameter of the model, in their
            order; of Adam's quotients, where Adam made the steps.
        weights: the trained parameters, in the same order.
        statistics: mean and variance (C,) of the inputs of each layer of `batchnorms` in training mode, one after the
            other, averaged over the steps as running statistics are; empty where there are none.
    """

    average: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    statistics: tuple[Tensor, ...]


def train_locally(
    model: nn.Module, images: Tensor, labels: Tensor, training: LocalTraining, *, create_graph: bool = False
) -> Trained:
    """Train a copy of the model's weights on the batch; the model itself stays as it is.

    Args:
        model: has BatchNorm in the mode of this training, see `update.batchnorm.use_batch_statistics`.
        images: (B, C, H, W); `training.schedule(B)` says which of them are in which step.
        labels: class indices (B,) or class probabilities (B, K).
        create_graph: keep the graph of all steps, so that the result can be differentiated by images and labels.
    """
    shared, unseen = trainable(model), {name: model.get_parameter(name).detach() for name in training.hidden}
    names = [*shared, *unseen]
    weights = [*shared.values(), *(weight.requires_grad_() for weight in unseen.values())]
    walk, brought, statistics = training.optimiser.begun(weights), [], []
    factors = training.optimiser.factors(training.steps, training.passes)
    for part, factor in zip(training.schedule(len(images), images.device), factors, strict=True):
        named = dict(zip(names, walk.weights, strict=True))
        with statistics_seen(model) as seen, _arithmetic(training, images):
            logits = functional_call(model, named, (images[part],))
        mean = training.loss.in_mean(logits.to(images.dtype), labels[part]).mean()
        gradients = torch.autograd.grad(mean, tuple(walk.weights), create_graph=create_graph)
        both = [statistic for layer in in_training(model) for statistic in seen[layer]]
        statistics.append([statistic if create_graph else statistic.detach() for statistic in both])
        with torch.set_grad_enabled(create_graph):
            brought.append(walk.direction(gradients))
            if not training.is_gradient:
                walk.move(brought[-1], training.rate * factor)
        if not create_graph and not training.is_gradient:
            walk.weights = [weight.detach().requires_grad_() for weight in walk.weights]
    combination = training.combination()
    parts = [share for layer in in_training(model) for share in [shares(layer, training.steps)] * 2]
    return Trained(
        average=tuple(combination.mean(each) for each in list(zip(*brought, strict=True))[: len(shared)]),
        weights=tuple(walk.weights[: len(shared)]),
        statistics=tuple(
            sum(share * statistic for share, statistic in zip(own, each, strict=True))
            for own, each in zip(parts, zip(*statistics, strict=True), strict=True)
        ),
    )


def _arithmetic(training: LocalTraining, images: Tensor) -> contextlib.AbstractContextManager:
    """The client's arithmetic in the forward pass; autocast leaves float64 as it is."""
    if training.precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(images.device.type, torch.bfloat16, cache_enabled=False)
