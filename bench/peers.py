"""Attacks of other packages, run on this project's updates through their public interfaces.

breaching (Geiping et al., MIT licence, `requirements-benchmark.txt`) gets the model, the averaged gradient and, where
the attack's paper grants them, the labels: just what a server has. Two of its settings are not its own: the number of
iterations, by which its step sizes decay, and a stop once the budget of gradient evaluations is spent. Its attacks
expect a model of normalised images, and their starts, steps and priors have that scale. So the attacks get such a
model. Of a client with BatchNorm in training mode they get the buffers that breaching's own clients send, and of a
client of several steps the labels of each step. breaching knows steps of plain SGD: of a client with momentum it gets
steps at the rate that takes plain SGD as far. Coarse arithmetic it does not know.
"""

import contextlib
import io
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from attack.prepare import colour_statistics
from cli.runtime import interruptible
from network.vision import torchvision
from network.zoo import place_of
from update.shared import SharedUpdate
from update.training import PLAIN_SGD

# The attacks of breaching that are compared, and whether their papers grant the attacker the labels.
BREACHING = {
    "invertinggradients": True,  # Geiping et al. 2020 (arXiv 2003.14053)
    "modern": True,  # the same with the package's later improvements
    "seethroughgradients": False,  # Yin et al. 2021 (arXiv 2104.07586): reads labels from the head's gradient
    "deepleakage": False,  # Zhu et al. 2019 (arXiv 1906.08935): optimises labels beside the images
}
PEERS = {"breaching": BREACHING}


@dataclass(frozen=True)
class Result:
    """Images (B, C, H, W) in [0, 1], labels (B,), gradient evaluations, and the seconds that the attack took."""

    images: Tensor
    labels: Tensor
    evaluations: int
    seconds: float


class NormalisedInput(nn.Module):
    """A model of images in [0, 1], wrapped to take normalised images (x - mean) / std; it shares all parameters."""

    def __init__(self, model: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", mean)  # (C, 1, 1), as is std
        self.register_buffer("std", std)

    def forward(self, normalised: Tensor) -> Tensor:
        """Class logits (B, K)."""
        return self.model(self.images(normalised))

    def images(self, normalised: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1]."""
        return self.mean + self.std * normalised


class _CountedLoss(nn.CrossEntropyLoss):
    """Cross-entropy that counts its calls, one for each gradient evaluation, and ends an attack at its budget.

    Ctrl-C ends the attack in the same way. breaching then keeps the best images so far.
    """

    def __init__(self, budget: int, interrupted: Callable[[], bool], smoothing: float) -> None:
        super().__init__(label_smoothing=smoothing)
        self.calls, self.budget, self.interrupted = 0, budget, interrupted

    def __deepcopy__(self, memo: dict) -> "_CountedLoss":
        return self  # the attack copies its loss; all copies share one counter

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.calls == self.budget or (self.budget > 0 and self.interrupted()):
            self.budget = -1  # the attack then scores its images, which is not counted
            raise KeyboardInterrupt
        self.calls += self.budget > 0
        return super().forward(logits, labels)


def breaching_attack(
    name: str, update: SharedUpdate, model: nn.Module, granted: Tensor, *, max_evals: int, seed: int
) -> Result:
    """The result of attack `name` of breaching on an update; the clock starts after import and configuration.

    Args:
        granted: true labels (B,), passed on only where `BREACHING` says that the paper grants labels; sorted, since
            their order is not known, but for the step that used them (`update.training.order` where it is another).

    Raises:
        ImportError: breaching is not installed.
        ValueError: parameters are frozen, or the client's training is none that breaching supports.
        KeyboardInterrupt: the attack was interrupted.
    """
    torchvision()  # lets breaching import torchvision where its compiled operators are missing
    import breaching
    from omegaconf import OmegaConf

    gradients, training = update.targets(model), update.training
    if len(gradients) < len(list(model.parameters())):
        raise ValueError("breaching cannot attack updates with frozen parameters")
    if not training.loss.is_cross_entropy or training.loss.weights:
        raise ValueError("breaching's attacks are on the plain cross-entropy, smoothed or not")
    local = None if training.is_one_step else _local_steps(update, granted, BREACHING[name])
    place = place_of(model)
    mean, std = (values.to(**place) for values in colour_statistics(update.image_shape[0]))
    model = NormalisedInput(model, mean, std)
    about = {"shape": list(update.image_shape), "classes": update.num_classes, "modality": "vision"}
    about |= {"task": "classification", "mean": mean.flatten().tolist(), "std": std.flatten().tolist()}
    public, own = _buffers(update, model)
    payload = {"parameters": list(model.parameters()), "buffers": public}
    labels = granted.sort().values.to(place["device"]) if BREACHING[name] else None
    shared = {
        "gradients": [-training.reach * each for each in gradients] if local else list(gradients),
        "buffers": own,
        "metadata": {"num_data_points": update.batch_size, "labels": labels, "local_hyperparams": local},
    }
    with interruptible() as interrupted, _quietly(seed):
        config = breaching.get_attack_config(name, [f"optim.max_iterations={max_evals}"])
        loss = _CountedLoss(max_evals * training.steps, interrupted, training.loss.smoothing)
        started = time.perf_counter()
        attacker = breaching.attacks.prepare_attack(model, loss, config, place)
        result, _ = attacker.reconstruct([payload | {"metadata": OmegaConf.create(about)}], [shared], {})
        images = model.images(result["data"].detach()).clamp(0, 1).cpu()  # waits for the GPU
        seconds = time.perf_counter() - started
        if interrupted():
            raise KeyboardInterrupt
    return Result(images, result["labels"].cpu(), loss.calls // training.steps, seconds)


def _local_steps(update: SharedUpdate, labels: Tensor, is_granted: bool) -> dict[str, object]:
    """The client's steps as breaching's own clients tell them, with the labels (B,) of each step, sorted.

    Raises:
        ValueError: steps that breaching does not make, or an attack that gets no labels.
    """
    training, size = update.training, update.training.size(update.batch_size)
    is_sgd = replace(training.optimiser, momentum=0.0, nesterov=False) == PLAIN_SGD
    if not is_sgd or set(training.sizes_of(update.batch_size)) != {size} or training.frozen_norms:
        raise ValueError("breaching knows steps of plain SGD, on minibatches of one size, and no others")
    if training.shuffle and training.passes > 1:
        raise ValueError("breaching knows clients that go through their images in one order")
    if not is_granted:
        raise ValueError("breaching's attacks on several steps need the labels of each")
    parts = [labels[part].sort().values for part in training.schedule(update.batch_size)]
    rate = training.reach / training.steps
    return {"lr": rate, "steps": training.steps, "data_per_step": size, "labels": parts}


def _buffers(update: SharedUpdate, model: NormalisedInput) -> tuple[list[Tensor] | None, list[Tensor] | None]:
    """The buffers that breaching takes from its server, and from a client: it evaluates the model with either.

    Its client in training mode sends the statistics of its batch alone, or none. Without any it has the model train.
    """
    if update.training.batchnorm == "train_private":
        return None, None
    public = dict(model.named_buffers())
    if not update.training.uses_batch_statistics:
        return list(public.values()), None
    of_batch = zip(update.statistics, update.batch_statistics(model.model), strict=True)
    return None, list((public | {f"model.{name}": statistic for name, statistic in of_batch}).values())


@contextlib.contextmanager
def _quietly(seed: int) -> Iterator[None]:
    """Suppress a package's output and warnings, and undo its draws from the global generators, which `seed` sets."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        yield
