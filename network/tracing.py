"""A model's chain of stages, read off its own forward pass by `torch.fx`: the one place that knows what can be walked.

A stage is a module that the model calls with one tensor, a function or method that stands for such a module (`relu`,
`max_pool2d`, `flatten`, see `network.kinds`), or the sum of two branches. Whatever else
a forward pass does (concatenation, attention, weights used by hand) ends it: such a model is attacked as a whole.
"""

import inspect
from collections.abc import Iterator, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn

from network.chain import parametrised
from network.kinds import called
from network.normalise import NAME, normalisation
from network.stage import Residual, Stage, run

CLOSE = 1e-4  # relative difference of logits up to which chain and model compute the same, in float32

_read: "WeakKeyDictionary[nn.Module, list[Stage] | str]" = WeakKeyDictionary()  # by model: its chain, or why not


def stages(model: nn.Module) -> list[Stage]:
    """The chain of a model in eval mode, from images to logits; its last stage is the linear head.

    A model is read once: its layers may change their weights and their place, not their order.

    Raises:
        ValueError: it cannot be walked; the message names the node of its graph that was the reason.
    """
    if model not in _read:
        try:
            _read[model] = _chain_of(model)
        except ValueError as error:
            _read[model] = str(error)
    found = _read[model]
    if isinstance(found, str):
        raise ValueError(found)
    return list(found)


def stages_if_walked(model: nn.Module) -> list[Stage] | None:
    """The same, or None where the model cannot be walked."""
    try:
        return stages(model)
    except ValueError:
        return None


@torch.no_grad()
def verify(model: nn.Module, images: Tensor) -> None:
    """Never walk this model again if its chain and itself disagree on images (B, C, H, W).

    They do where it changes tensors in place that it uses again under another name, which its graph does not show.
    """
    try:
        walked, logits = run(stages(model), images), model(images)
    except (ValueError, RuntimeError) as error:
        _read[model] = str(error).partition("\n")[0]
        return
    if walked.shape != logits.shape or not (walked - logits).norm() <= CLOSE * logits.norm():
        _read[model] = "its graph is not what it computes"


def _chain_of(model: nn.Module) -> list[Stage]:
    tracer = fx.Tracer()
    try:
        graph = tracer.trace(model, concrete_args=_defaults(model))
    except Exception as error:  # the model's own code runs here, on stand-ins for tensors
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{type(model).__name__} cannot be traced: {reason}") from None
    chain = _GraphReader(model, graph, tracer.node_name_to_scope).chain()
    if not chain or not isinstance(chain[-1].module, nn.Linear):
        raise ValueError(
            "the last stage is not linear" if not chain else f"the last stage, {chain[-1].name}, is not linear"
        )
    weights = [id(stage.module.weight) for stage in parametrised(chain)]
    if len(set(weights)) < len(weights):
        raise ValueError("a weight is used twice: its gradient is the sum of both uses")
    front = normalisation(model)
    return chain if front is None else [Stage(NAME, front), *chain]


def _defaults(model: nn.Module) -> dict[str, object]:
    """What `forward` takes beside images, at its defaults."""
    taken = list(inspect.signature(model.forward).parameters.values())[1:]
    return {p.name: p.default for p in taken if p.default is not p.empty}


class _GraphReader:
    """The way through a graph, from its output back to the images.

    Args:
        model: whose graph it is.
        graph: its nodes, in the order in which they are computed.
        scopes: by node's name, path and class of the module that it is in.
    """

    def __init__(self, model: nn.Module, graph: fx.Graph, scopes: dict[str, tuple]) -> None:
        self.model, self.scopes = model, scopes
        self.images, self.output = next(iter(graph.nodes)), next(iter(reversed(graph.nodes)))
        self._gates: dict[
            fx.Node, fx.Node | None
        ] = {}  # the last node that all ways from the images to it lead through
        for node in graph.nodes:
            self._gates[node] = self._meeting(_sources(node))

    def chain(self) -> list[Stage]:
        """All of it."""
        logits = self.output.args[0]
        if not isinstance(logits, fx.Node):
            raise ValueError(f"{type(self.model).__name__} puts out a {type(logits).__name__}, not a tensor")
        return self._between(self.images, logits)

    def _between(self, first: fx.Node, last: fx.Node) -> list[Stage]:
        """The stages behind `first`, up to `last`."""
        backwards: list[Stage] = []
        while last is not first:
            stages_here = self._sum(last) if _is_sum(last) else self._stages(last)
            backwards += reversed(stages_here)
            last = self._gates[last]
        return backwards[::-1]

    def _sum(self, node: fx.Node) -> list[Stage]:
        """A residual stage, named by its block; the branch with more layers is its body."""
        branches = [self._between(self._gate(node), branch) for branch in node.args]
        branches.sort(key=lambda branch: -len(list(parametrised(branch))))
        return [Stage(self.scopes[node.name][0] or node.name, Residual(*branches))]

    def _stages(self, node: fx.Node) -> list[Stage]:
        """What a node of one tensor stands for; identities do nothing and are left out."""
        self._gate(node)
        if node.op == "call_module":
            named = [(node.target, self.model.get_submodule(node.target))]
        else:
            try:
                named = [(self._name(node), module) for module in called(_called(node), node.args[1:], _how(node))]
            except (LookupError, TypeError, ValueError):
                raise ValueError(f"{self._where(node)} cannot be walked") from None
        for name, module in named:
            if hasattr(module, "running_mean") and module.running_mean is None:
                raise ValueError(f"{name} has no running statistics: it mixes the images of a batch")
        return [Stage(name, module) for name, module in named if not isinstance(module, nn.Identity)]

    def _gate(self, node: fx.Node) -> fx.Node:
        """Where the tensors that a node takes come from.

        Raises:
            ValueError: not from the images, or there are more of them than such a node takes.
        """
        gate, most = self._gates[node], 2 if _is_sum(node) else 1
        if gate is None or len(set(_sources(node))) > most:
            raise ValueError(f"{self._where(node)} cannot be walked")
        return gate

    def _meeting(self, sources: Sequence[fx.Node]) -> fx.Node | None:
        """The last node that the ways to all of these have in common."""
        ways = [list(self._way(source)) for source in sources]
        return next((node for node in ways[0] if all(node in way for way in ways)), None) if ways else None

    def _way(self, node: fx.Node | None) -> Iterator[fx.Node]:
        while node is not None:
            yield node
            node = self._gates[node]

    def _name(self, node: fx.Node) -> str:
        scope = self.scopes[node.name][0]
        return f"{scope}.{node.name}" if scope else node.name

    def _where(self, node: fx.Node) -> str:
        kinds = {"call_module": f"layer {node.target}", "get_attr": f"attribute {node.target}"}
        return kinds.get(node.op, f"function {self._name(node)}")


def _sources(node: fx.Node) -> list[fx.Node]:
    """The tensors that a node takes, sizes of others left out."""
    return [source for source in node.all_input_nodes if not _is_size(source)]


def _is_size(node: fx.Node) -> bool:
    name = _called(node)
    if name == "getitem":
        return _is_size(node.args[0])
    return name in ("size", "len") or (name == "getattr" and node.args[1] == "shape")


def _is_sum(node: fx.Node) -> bool:
    plain = _called(node) in ("add", "iadd") and not node.kwargs and len(node.args) == 2
    return plain and all(isinstance(branch, fx.Node) for branch in node.args)


def _called(node: fx.Node) -> str:
    """The name of the function or method, without the underscore of one that works in place."""
    if node.op not in ("call_function", "call_method"):
        return ""
    return getattr(node.target, "__name__", str(node.target)).removesuffix("_")


def _how(node: fx.Node) -> dict[str, object]:
    """What a call is told by keyword; whether it works in place does not matter."""
    return {name: value for name, value in node.kwargs.items() if name != "inplace"}
