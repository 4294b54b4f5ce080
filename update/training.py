"""Local training: the steps of a client before it shares its update. The client trains so, and the server imitates it.

A client of FedSGD shares the gradient of its batch. A client of FedAvg (McMahan et al. 2017, arXiv 1602.05629) first
makes N steps of plain SGD, each on the next of M minibatches, and shares how far the weights went:

    w_t+1 = w_t - rate g(w_t; minibatch t mod M),        (w_0 - w_N) / (rate N) = (1/N) sum_t g(w_t; minibatch t mod M).

The right side is the mean gradient along the way, and for N = M = 1 the gradient itself. This mean is differentiable by
images and labels, through all steps. BatchNorm in training mode normalises by the minibatch's own mean and variance. A
client that shares its buffers gives these statistics away: after N steps a running statistic is

    (1 - m)^N old + m sum_t (1 - m)^(N-1-t) s_t        with m the layer's momentum and s_t the statistic at step t.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from network.normalise import Normalise
from network.parameters import trainable
from update import checked
from update.loss import CROSS_ENTROPY, Loss

BATCHNORMS = ("eval", "train", "train_private")  # modes of a client's BatchNorm layers


@dataclass(frozen=True)
class LocalTraining:
    """How a client trained before it shared its update; the default is one step of FedSGD.

    Attributes:
        steps: of plain SGD, N.
        batches: minibatches that the steps go through in turn, M: all of one size, but for the last, which may be
            smaller.
        rate: the learning rate; None for a single step, on which the rate has no influence.
        batchnorm: eval (running statistics), train (the minibatch's statistics; the running statistics are shared), or
            train_private (the minibatch's statistics; the running statistics are not shared).
        loss: of each image; a minibatch's is their mean.
        frozen_norms: BatchNorm layers that stay in eval mode while the others train, by their names or by those of
            modules that hold them.

    Raises:
        ValueError: a number below 1, steps that are not whole passes, several steps without a rate above 0, frozen
            layers where none trains.
    """

    steps: int = 1
    batches: int = 1
    rate: float | None = None
    batchnorm: str = "eval"
    loss: Loss = CROSS_ENTROPY
    frozen_norms: tuple[str, ...] = ()

    @classmethod
    def stated(cls, facts: object) -> "LocalTraining":
        """The training that the facts of an update's file state; what they leave out has its default.

        Raises:
            ValueError: a fact is unknown, of another kind, or refused as in a `LocalTraining`.
        """
        facts = dict(checked.mapping(facts, "training"))
        for name, value in facts.items():
            if name in ("steps", "batches"):
                checked.whole(value, f"training.{name}", 1)
            elif name == "rate" and value is not None:
                checked.real(value, "training.rate", 0)
            elif name == "batchnorm":
                checked.word(value, "training.batchnorm")
            elif name == "frozen_norms":
                names = checked.sequence(value, "training.frozen_norms")
                facts[name] = tuple(checked.word(each, "training.frozen_norms") for each in names)
            elif name == "loss":
                loss = checked.mapping(value, "training.loss", ("name", "smoothing"))
                checked.word(loss["name"], "training.loss.name")
                checked.real(loss["smoothing"], "training.loss.smoothing", 0)
            elif name != "rate":
                raise checked.DamagedError(f"training has {name!r}, which is none of its facts")
        loss = facts.get("loss")
        return cls(**{**facts, "loss": CROSS_ENTROPY if loss is None else Loss(loss["name"], loss["smoothing"])})

    def __post_init__(self) -> None:
        for name in ("steps", "batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"--local_{name} {getattr(self, name)}: at least 1")
        if self.rate is not None and not 0 < self.rate < float("inf"):
            raise ValueError(f"--local_lr {self.rate}: a finite number above 0")
        if self.steps % self.batches:
            raise ValueError(f"--local_steps {self.steps}: not whole passes through {self.batches} minibatches")
        if self.steps > 1 and self.rate is None:
            raise ValueError(f"--local_steps {self.steps} needs --local_lr, the client's learning rate")
        if self.batchnorm not in BATCHNORMS:
            raise ValueError(f"unknown bn {self.batchnorm!r}: choose one of {', '.join(BATCHNORMS)}")
        if self.frozen_norms and not self.uses_batch_statistics:
            raise ValueError("--bn_frozen goes with --bn train or train_private: in eval mode all layers are frozen")

    @property
    def is_one_step(self) -> bool:
        """Whether the client shares the gradient itself."""
        return self.steps == 1

    @property
    def is_plain(self) -> bool:
        """Whether the client makes one step with BatchNorm in eval mode: no image's gradient depends on another."""
        return self.is_one_step and not self.uses_batch_statistics

    @property
    def uses_batch_statistics(self) -> bool:
        """Whether BatchNorm is in training mode."""
        return self.batchnorm != "eval"

    @property
    def reach(self) -> float:
        """Steps times rate, the divisor of the weights' difference; 0 where gradients themselves are shared."""
        return 0.0 if self.is_one_step else self.steps * self.rate

    def size(self, batch_size: int) -> int:
        """Images in a minibatch of so many images in all; the last holds the rest, as data loaders leave it."""
        return -(-batch_size // self.batches)

    def check(self, batch_size: int) -> None:
        """Refuse a batch that does not fall into so many minibatches.

        Raises:
            ValueError: minibatches of one size, but for the last, would be fewer.
        """
        size = self.size(batch_size)
        if -(-batch_size // size) != self.batches:
            raise ValueError(
                f"--local_batches {self.batches} does not divide the batch of {batch_size} images: "
                f"minibatches of {size} are {-(-batch_size // size)}"
            )


FEDSGD = LocalTraining()  # one step on the whole batch


@dataclass(frozen=True)
class Trained:
    """The result of local training.

    Attributes:
        average: mean gradient along the way, one tensor per trainable parameter of the model, in their order.
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
        model: has BatchNorm in the mode of this training, see `use_batch_statistics`.
        images: (B, C, H, W); minibatch j holds the j-th `training.size(B)` of them.
        labels: class indices (B,) or class probabilities (B, K).
        create_graph: keep the graph of all steps, so that the result can be differentiated by images and labels.
    """
    weights, size = trainable(model), training.size(len(images))
    gradients, statistics = [], []
    for step in range(training.steps):
        first = step % training.batches * size
        part = slice(first, first + size)
        with _watched(model) as seen:
            mean = training.loss.each(functional_call(model, weights, (images[part],)), labels[part]).mean()
        gradients.append(torch.autograd.grad(mean, tuple(weights.values()), create_graph=create_graph))
        statistics.append([statistic if create_graph else statistic.detach() for statistic in seen])
        if not training.is_one_step:
            moved = zip(weights.items(), gradients[-1], strict=True)
            weights = {name: weight - training.rate * gradient for (name, weight), gradient in moved}
            if not create_graph:
                weights = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    shares = [share for layer in in_training(model) for share in [_shares(layer, training.steps)] * 2]
    return Trained(
        average=tuple(sum(each) / training.steps for each in zip(*gradients, strict=True)),
        weights=tuple(weights.values()),
        statistics=tuple(
            sum(share * statistic for share, statistic in zip(parts, each, strict=True))
            for parts, each in zip(shares, zip(*statistics, strict=True), strict=True)
        ),
    )


# ----------------------------------------------------------------------------------------------------
# BatchNorm in training mode


def batchnorms(model: nn.Module) -> dict[nn.Module, str]:
    """The BatchNorm layers that keep running statistics, with their names; normalisation of pixels is no such layer."""
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    return {
        layer: name
        for name, layer in model.named_modules()
        if isinstance(layer, kinds) and not isinstance(layer, Normalise) and layer.running_mean is not None
    }


def in_training(model: nn.Module) -> dict[nn.Module, str]:
    """Those of `batchnorms` that are in training mode."""
    return {layer: name for layer, name in batchnorms(model).items() if layer.training}


def frozen_among(norms: Iterable[str], frozen: Sequence[str]) -> list[str]:
    """The names of BatchNorm layers that are among `frozen`, or lie in a module whose name is."""
    return [norm for norm in norms if any(f"{norm}.".startswith(f"{name}.") for name in frozen)]


def use_batch_statistics(model: nn.Module, frozen: Sequence[str] = ()) -> None:
    """Put the model's BatchNorm layers into training mode; their running statistics stay as the server sent them.

    Args:
        model: whose BatchNorm layers are in eval mode.
        frozen: the layers that stay so, as in `LocalTraining.frozen_norms`.

    Raises:
        ValueError: the model has no such layers, a name fits none of them, or all of them are frozen.
    """
    norms = batchnorms(model)
    if not norms:
        raise ValueError("--bn train: the model has no BatchNorm layers with running statistics")
    for name in frozen:
        if not frozen_among(norms.values(), [name]):
            raise ValueError(f"--bn_frozen: no BatchNorm layer is named {name!r}: it has {', '.join(norms.values())}")
    still = frozen_among(norms.values(), frozen)
    if len(still) == len(norms):
        raise ValueError("--bn_frozen leaves no BatchNorm layer in training mode: that is --bn eval")
    for layer, name in norms.items():
        if name not in still:
            layer.train()
            layer.track_running_stats = False


def batch_moments(
    model: nn.Module, statistics: Sequence[Tensor], images: Tensor
) -> dict[nn.Module, tuple[Tensor, Tensor]]:
    """Mean and variance (C,) by which each BatchNorm layer has normalised a batch, from `Trained.statistics`.

    Running variances are unbiased, and those that normalise are not.

    Args:
        model: has BatchNorm in training mode.
        statistics: of one step on one batch.
        images: any (B, C, H, W) of the batch's shape: what counts is how many values a channel has.
    """
    counts: dict[nn.Module, int] = {}

    def count(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        counts[layer] = inputs[0].numel() // inputs[0].shape[1]

    norms = in_training(model)
    hooks = [layer.register_forward_pre_hook(count) for layer in norms]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    pairs = zip(norms, statistics[::2], statistics[1::2], strict=True)
    return {layer: (mean, variance * (counts[layer] - 1) / counts[layer]) for layer, mean, variance in pairs}


def statistic_names(model: nn.Module) -> list[str]:
    """The names of the running statistics of all layers of `batchnorms`, mean and variance by turns."""
    return _statistics_of(batchnorms(model).values())


def _statistics_of(norms: Iterable[str]) -> list[str]:
    return [f"{name}.{kind}" for name in norms for kind in ("running_mean", "running_var")]


def after_training(model: nn.Module, statistics: Sequence[Tensor], steps: int) -> dict[str, Tensor]:
    """Running statistics by name after `steps` steps, from the model's own and the minibatches' (`Trained`)."""
    old, kept = dict(model.named_buffers()), _kept(model, steps)
    named = zip(_statistics_of(in_training(model).values()), kept, statistics, strict=True)
    return {name: keep * old[name] + (1 - keep) * new for name, keep, new in named}


def before_averaging(model: nn.Module, buffers: Mapping[str, Tensor], steps: int) -> tuple[Tensor, ...]:
    """The minibatches' statistics from running statistics by name: the inverse of `after_training`.

    Raises:
        ValueError: a running statistic is missing, or has another shape.
    """
    old, kept, found = dict(model.named_buffers()), _kept(model, steps), []
    for name, keep in zip(_statistics_of(in_training(model).values()), kept, strict=True):
        if name not in buffers or buffers[name].shape != old[name].shape:
            raise ValueError(f"--bn train: the update holds no {name!r} of the model's shape; --bn train_private if so")
        found.append((buffers[name].to(old[name]) - keep * old[name]) / (1 - keep))
    return tuple(found)


def _kept(model: nn.Module, steps: int) -> list[float]:
    """For each shared statistic the share of the server's that is left after N steps.

    It is (1 - m)^N with a momentum m. Without one, running statistics are the mean over all n batches so far, and the
    share is n / (n + N).
    """
    return [kept for layer in in_training(model) for kept in [_kept_by(layer, steps)] * 2]


def _kept_by(layer: nn.Module, steps: int) -> float:
    if layer.momentum is not None:
        return (1 - layer.momentum) ** steps
    batches = int(layer.num_batches_tracked)
    return batches / (batches + steps)


def _shares(layer: nn.Module, steps: int) -> list[float]:
    """The weight of each step's statistic in the running one, without the server's part; the weights sum to 1."""
    if layer.momentum is None:
        return [1 / steps] * steps
    momentum = layer.momentum
    weights = [momentum * (1 - momentum) ** (steps - 1 - step) for step in range(steps)]
    return [weight / sum(weights) for weight in weights]


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect mean and variance of the inputs of every BatchNorm layer in training mode."""
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    collected: list[Tensor] = []

    def watch(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        axes = [axis for axis in range(inputs[0].dim()) if axis != 1]
        if inputs[0].numel() == inputs[0].shape[1]:
            raise ValueError("--bn train: a BatchNorm layer sees one value a channel, which has no variance")
        variance, mean = torch.var_mean(inputs[0], axes)  # running variances are unbiased
        seen[layer] = (mean, variance)

    layers = in_training(model)
    hooks = [layer.register_forward_pre_hook(watch) for layer in layers]
    try:
        yield collected
    finally:
        for hook in hooks:
            hook.remove()
    collected.extend(statistic for layer in layers for statistic in seen[layer])
