"""BatchNorm in training mode: the statistics of minibatches, and what running statistics tell of them.

A layer in training mode normalises by the minibatch's own mean and variance. A client that shares its buffers gives
these statistics away: after N steps a running statistic is

    (1 - m)^N old + m sum_t (1 - m)^(N-1-t) s_t        with m the layer's momentum and s_t the statistic at step t.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from network.normalise import Normalise
from network.watched import watched

BATCHNORMS = ("eval", "train", "train_private")  # modes of a client's BatchNorm layers


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
        frozen: the layers that stay so, as in `update.training.LocalTraining.frozen_norms`.

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
    """Mean and variance (C,) by which each BatchNorm layer has normalised a batch, from its statistics.

    Running variances are unbiased, and those that normalise are not.

    Args:
        model: has BatchNorm in training mode.
        statistics: of one step on one batch, as in `update.training.Trained`.
        images: any (B, C, H, W) of the batch's shape: what counts is how many values a channel has.
    """
    norms = in_training(model)
    with torch.no_grad(), watched(norms, lambda _, inputs: inputs.numel() // inputs.shape[1]) as counts:
        model(images)
    pairs = zip(norms, statistics[::2], statistics[1::2], strict=True)
    return {layer: (mean, variance * (counts[layer] - 1) / counts[layer]) for layer, mean, variance in pairs}


def statistic_names(model: nn.Module) -> list[str]:
    """The names of the running statistics of all layers of `batchnorms`, mean and variance by turns."""
    return _statistics_of(batchnorms(model).values())


def _statistics_of(norms: Iterable[str]) -> list[str]:
    return [f"{name}.{kind}" for name in norms for kind in ("running_mean", "running_var")]


def after_training(model: nn.Module, statistics: Sequence[Tensor], steps: int) -> dict[str, Tensor]:
    """Running statistics by name after `steps` steps, from the model's own and the minibatches'."""
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


def shares(layer: nn.Module, steps: int) -> list[float]:
    """The weight of each step's statistic in the running one, without the server's part; the weights sum to 1."""
    if layer.momentum is None:
        return [1 / steps] * steps
    momentum = layer.momentum
    weights = [momentum * (1 - momentum) ** (steps - 1 - step) for step in range(steps)]
    return [weight / sum(weights) for weight in weights]


def statistics_seen(model: nn.Module) -> AbstractContextManager[dict[nn.Module, tuple[Tensor, Tensor]]]:
    """Mean and variance (C,) of the inputs of every BatchNorm layer in training mode, while a model runs."""
    return watched(list(in_training(model)), _moments)


def _moments(_: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (C,) of a BatchNorm layer's inputs, as it keeps them: running variances are unbiased.

    Raises:
        ValueError: a channel has a single value.
    """
    if inputs.numel() == inputs.shape[1]:
        raise ValueError("--bn train: a BatchNorm layer sees one value a channel, which has no variance")
    variance, mean = torch.var_mean(inputs, [axis for axis in range(inputs.dim()) if axis != 1])
    return mean, variance
