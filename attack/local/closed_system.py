"""The part of a network from a stage up, in training: a closed system on the inputs of that stage.

A client that goes through its images once uses each image at one step, with the weights of that step. The stages from
there up change by gradients that the stage's inputs and the labels give, however far the stages below drift. So whoever
knows these inputs knows the weights above at every step, and what this part of the network adds to the update:

    W_t = alpha_t W_0 - sum_{s<t} beta_t,s g_s(W_s; inputs and labels of step s)
"""

import copy
from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from network.chain import mixes_images, modules, parameters
from network.parametrised import is_made
from network.stage import Chain, run
from network.tracing import stages
from update.shared import SharedUpdate
from update.training import LocalTraining


def is_one_pass(training: LocalTraining) -> bool:
    """Whether each image was used at one of several steps, and weights are a known combination of their gradients."""
    optimiser = training.optimiser
    is_known = optimiser.is_linear and optimiser.clip is None and not training.hidden
    return training.passes == 1 and not training.is_one_step and is_known


class ClosedSystem:
    """A network from a stage up, at the weights of one step after the other.

    Args:
        update: of a client that made one pass.
        model: that the server sent out; it stays as it is.
        index: of the stage, in the model's chain.

    Attributes:
        chain: of the network, in float64, from the stage on at the present weights; below it at the server's.
        sizes: images in each step.
        counts: how much an image of each step counts in the update, where 1 is its share in a mean over all images.

    Raises:
        ValueError: the stages depend on more than the inputs of the first of them; the message says why.
    """

    def __init__(self, update: SharedUpdate, model: nn.Module, index: int) -> None:
        own = copy.deepcopy(model).double().requires_grad_(False)
        self.chain: Chain = stages(own)
        self.above = self.chain[index:]
        if mixes_images(modules(self.above)):
            raise ValueError("BatchNorm in training mode mixes the images of a step")
        self.training, count = update.training, update.batch_size
        self.sizes = self.training.sizes_of(count)
        self._table = self.training.coefficients()
        self.counts = self.training.counts(count)
        self._weights = _trained(own, self.chain, index, update.gradients)
        self._first = {name: weight.clone() for name, weight in self._weights.items()}
        self._learnt: list[dict[str, Tensor]] = []

    @property
    def step(self) -> int:
        """The step at whose weights the network is."""
        return len(self._learnt)

    def restart(self) -> None:
        """Back to the weights that the server sent out."""
        self._learnt = []
        self._move()

    def learn(self, inputs: Tensor, labels: Tensor) -> None:
        """Make the next step, on the stage's inputs (b, ...) with labels (b,)."""
        for weight in self._weights.values():
            weight.requires_grad_(True)
        with torch.enable_grad():
            loss = self.training.loss.in_mean(run(self.above, inputs), labels).mean()
            gradients = torch.autograd.grad(loss, list(self._weights.values()), materialize_grads=True)
        for weight in self._weights.values():
            weight.requires_grad_(False)
        self._learnt.append(dict(zip(self._weights, gradients, strict=True)))
        self._move()

    def parts(self, count: int) -> Iterator[slice]:
        """The images of each step, of so many in the order of the steps."""
        first = 0
        for size in self.sizes:
            if first < count:
                yield slice(first, min(count, first + size))
            first += size

    def at_the_head(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Features and softmax errors of images, from the stage's inputs (N, ...), in the order of their steps."""
        self.restart()
        features, errors = [], []
        for part in self.parts(len(inputs)):
            features.append(run(self.above[:-1], inputs[part]))
            errors.append(self.training.loss.errors(run(self.above[-1:], features[-1]), labels[part]))
            self.learn(inputs[part], labels[part])
        return torch.cat(features), torch.cat(errors)

    def deltas(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """The derivative of each image's own loss by the stage's inputs (N, ...), in the order of their steps."""
        self.restart()
        found = []
        for part in self.parts(len(inputs)):
            found.append(self.training.loss.delta(partial(run, self.above), inputs[part], labels[part]))
            self.learn(inputs[part], labels[part])
        return torch.cat(found)

    @property
    def update(self) -> dict[str, Tensor]:
        """What the steps made so far add to the update, by parameter name."""
        shares = self._table.shares.tolist()
        return {
            name: sum(share * own[name] for share, own in zip(shares, self._learnt, strict=False))
            for name in self._weights
        }

    def _move(self) -> None:
        """To the weights after the steps made so far."""
        for name, weight in self._weights.items():
            weight.copy_(self._table.weights(self.step, self._first[name], [own[name] for own in self._learnt]))


def _trained(model: nn.Module, chain: Chain, index: int, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters that are trained in the stages from `index` on, by name.

    Raises:
        ValueError: one of them is also used below, or is made of others.
    """
    held, below = set(parameters(chain[index:])), set(parameters(chain[:index]))
    if any(is_made(module) for module in modules(chain[index:]) if isinstance(module, nn.Module)):
        raise ValueError("weights above it are made of other parameters")
    if held & below:
        raise ValueError("weights above it are used below as well")
    return {name: p for name, p in model.named_parameters() if p in held and name in gradients}
