"""The opaque stage: the part of a model below the stages that can be walked. It is run as a whole, and only run."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from network.derivatives import twice_differentiable


@dataclass(frozen=True, eq=False)
class Unwalked:
    """What a model computes of its images (B, C, H, W), up to the lowest stage that can be walked.

    Attributes:
        model: whose part it is.
        reason: why the part is not walked, in words.
        graph: of the part, where the model's forward pass has been traced; None where it cannot be.
        head: the name of the linear layer whose input the part ends with, where there is no graph.
    """

    model: nn.Module
    reason: str
    graph: fx.Graph | None = None
    head: str = ""

    def __call__(self, images: Tensor) -> Tensor:
        """The input of the lowest stage that can be walked, (B, ...). Differentiable, twice too."""
        with twice_differentiable():
            if self.graph is None:
                return self._head_input(images)
            return fx.Interpreter(self.model, graph=self.graph).run(images)

    def layers(self) -> Iterator[nn.Module]:
        """The modules that may be in the part: those of the model, where no graph tells which."""
        if self.graph is None:
            yield from self.model.modules()
            return
        for node in self.graph.nodes:
            if node.op == "call_module":
                yield self.model.get_submodule(node.target)

    def _head_input(self, images: Tensor) -> Tensor:
        """By running the whole model, without what was put in front of its forward pass."""
        seen: list[Tensor] = []
        layer = self.model.get_submodule(self.head)
        hook = layer.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
        try:
            self.model.forward(images)
        finally:
            hook.remove()
        return seen[-1]


def part_of(graph: fx.Graph, last: fx.Node) -> fx.Graph:
    """The part of a graph that computes one of its nodes."""
    part, copies = fx.Graph(), {}
    needed = _behind(last)
    for node in graph.nodes:
        if node in needed:
            copies[node] = part.node_copy(node, lambda other: copies[other])
    part.output(copies[last])
    return part


def _behind(last: fx.Node) -> set[fx.Node]:
    """The nodes that a node is computed from, and the node."""
    found, waiting = set(), [last]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found


@torch.no_grad()
def last_linear(model: nn.Module, images: Tensor) -> str | None:
    """The linear layer whose outputs are the model's logits of these images, called once; None if there is none."""
    calls: list[tuple[str, Tensor]] = []
    hooks = [
        layer.register_forward_hook(lambda layer, inputs, output, name=name: calls.append((name, output)))
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    try:
        logits = model(images)
    finally:
        for hook in hooks:
            hook.remove()
    names = [name for name, _ in calls]
    ends = (name for name, out in calls if out.shape == logits.shape and is_close(out, logits))
    return next((name for name in ends if names.count(name) == 1), None)


CLOSE = 1e-4  # relative difference of logits up to which two computations are the same, in float32


def is_close(logits: Tensor, others: Tensor) -> bool:
    """Whether both logits (B, K) are the same to cross-entropy, which a log-softmax behind them does not change."""
    if logits.shape != others.shape:
        return False
    seen, meant = logits.log_softmax(-1), others.log_softmax(-1)
    return bool((seen - meant).norm() <= CLOSE * meant.norm())
