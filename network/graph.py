"""The way through the graph of a forward pass (`torch.fx`), from the logits down to the images, stage by stage."""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence

from torch import fx, nn

from network.chain import parametrised
from network.joins import (
    CUTS,
    VIEWS,
    channels_of,
    cut_out,
    factor,
    joined,
    name_called,
    nest_joins,
    only_order,
    size_told,
)
from network.kinds import called, kind_of
from network.kinds.joining import Among, Part
from network.kinds.rearranged import Rearranged
from network.kinds.scaling import OPERATIONS, SAME, Scaling, normalise, scaling
from network.reasons import WHY_NOT, why_not
from network.stage import Chain, Gate, Product, Residual, Stage
from network.unwalked import Unwalked, part_of

WEIGHT_USED_TWICE = "a weight is used twice: its gradient is the sum of both uses"
SOFTMAX_TWICE = (
    "the model ends in a softmax, and the loss takes the softmax of its outputs: the softmax is taken twice, so the "
    "head's gradient is not that of one softmax"
)


class Tracer(fx.Tracer):
    """Takes torchvision's normalisation of pixels for one layer: its forward pass asks for a real tensor."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module is one node of the graph."""
        return is_pixel_normalisation(m) or super().is_leaf_module(m, module_qualified_name)


def is_pixel_normalisation(module: nn.Module) -> bool:
    """Whether a module is torchvision's Normalize, of either version of its transforms."""
    return type(module).__name__ == "Normalize" and type(module).__module__.startswith("torchvision.transforms")


class GraphReader:
    """The stages of a graph, from its output back to the images.

    Args:
        model: whose graph it is.
        graph: its nodes, in the order in which they are computed.
        scopes: by node's name, path and class of the module that it is in.
    """

    def __init__(self, model: nn.Module, graph: fx.Graph, scopes: dict[str, tuple]) -> None:
        self.model, self.graph, self.scopes = model, graph, scopes
        nest_joins(graph)
        self.images, self.output = next(iter(graph.nodes)), next(iter(reversed(graph.nodes)))
        self._carrying = {self.images}  # the nodes whose values depend on the images' pixels
        self._uses = Counter(id(p) for node in graph.nodes for p in self._parameters(node))
        self._gates: dict[fx.Node, fx.Node | None] = {}  # the last node that all ways from the images lead through
        for node in graph.nodes:
            sources = self._sources(node)
            if sources and not _is_size(node):
                self._carrying.add(node)
            self._gates[node] = self._meeting(sources)

    def chain(self) -> list[Stage]:
        """From the images to the logits; what cannot be walked, and all below it, is the first stage, run as a whole.

        A log-softmax in the end is left out: cross-entropy of log-softmax is cross-entropy.

        Raises:
            ValueError: there is no stage above what cannot be walked.
        """
        node, backwards = self._logits(), []
        while node is not self.images:
            try:
                found, below = self._step(node)
            except ValueError as error:
                if not backwards:
                    raise ValueError(f"the model does not end in a linear layer: {error}") from None
                part = Unwalked(self.model, str(error), part_of(self.graph, node))
                backwards.append(Stage(f"all below {self._lowest_module(backwards)}", part))
                break
            backwards += reversed(found)
            node = below
        return backwards[::-1]

    def _lowest_module(self, backwards: Sequence[Stage]) -> str:
        """The name of the lowest stage that is a module of the model, or of the lowest where none is one."""
        modules = dict(self.model.named_modules())
        return next((stage.name for stage in reversed(backwards) if stage.name in modules), backwards[-1].name)

    def _logits(self) -> fx.Node:
        """The node of what cross-entropy takes, whether its log-softmax is put out or itself."""
        node = self.output.args[0]
        if not isinstance(node, fx.Node):
            raise ValueError(f"{type(self.model).__name__} puts out a {type(node).__name__}, not a tensor")
        while self._over_classes(node, "log_softmax", nn.LogSoftmax) or self._is_identity(node):
            node = self._gates[node]
        if name_called(node) == "log" and self._over_classes(node.args[0], "softmax", nn.Softmax):
            return self._gates[node.args[0]]
        if self._over_classes(node, "softmax", nn.Softmax):
            raise ValueError(SOFTMAX_TWICE)
        return node

    def _over_classes(self, node: fx.Node, name: str, module: type[nn.Module]) -> bool:
        """Whether a node is this function, or module, over the second of two dimensions."""
        if node.op == "call_module":
            layer = self.model.get_submodule(node.target)
            return isinstance(layer, module) and layer.dim in (1, -1, None)
        if name_called(node) != name:
            return False
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        return dim in (1, -1, None)

    def _is_identity(self, node: fx.Node) -> bool:
        try:
            return node is not self.images and not self._is_sum(node) and not self._stages(node)
        except ValueError:
            return False

    def _between(self, first: fx.Node, last: fx.Node) -> list[Stage]:
        """The stages behind `first`, up to `last`."""
        backwards: list[Stage] = []
        while last is not first:
            found, last = self._step(last)
            backwards += reversed(found)
        return backwards[::-1]

    def _step(self, node: fx.Node) -> tuple[list[Stage], fx.Node]:
        """The stages that a node stands for, and the node in front of them.

        Raises:
            ValueError: it stands for none.
        """
        if self._is_sum(node):
            return self._sum(node), self._gates[node]
        if self._is_product(node):
            return self._product(node), self._gates[node]
        if self._joined(node):
            return self._join(node), self._gates[node]
        try:
            return self._stages(node), self._gates[node]
        except ValueError:
            ordered = only_order(node, self._carrying.__contains__)
            if ordered is None:
                raise
        graph, below = ordered
        return [Stage(self._name(node), Rearranged(graph))], below

    def _sum(self, node: fx.Node) -> list[Stage]:
        """A residual stage, named by its block; the branch with more layers is its body."""
        branches = [self._between(self._gate(node), branch) for branch in node.args]
        branches.sort(key=lambda branch: -len(list(parametrised(branch))))
        return [Stage(self._scope(node) or self._name(node), Residual(*branches))]

    def _product(self, node: fx.Node) -> list[Stage]:
        """What multiplies two tensors that come from one: a gate where one of them is that one itself."""
        branches = [self._between(self._gate(node), factor(branch)) for branch in node.args]
        branches.sort(key=lambda branch: (-len(list(parametrised(branch))), -len(branch)))
        body, shortcut = branches
        if not shortcut and len(body) == 1 and isinstance(body[0].module, nn.Sigmoid):
            return [Stage(self._name(node), nn.SiLU())]
        is_gate = not shortcut and _is_never_negative(body)
        product = Gate(body) if is_gate else Product(body, shortcut)
        return [Stage(self._scope(node) or self._name(node), product)]

    def _join(self, node: fx.Node) -> list[Stage]:
        """A residual stage whose branches put out different channels; those with most layers come first."""
        gate, parts = self._gate(node), self._joined(node)
        if len(parts) == 1:
            return []
        try:
            counts = [channels_of(self.model, part) for part in parts]
        except LookupError:
            raise ValueError(f"{self._where(node)}: {self._why_not(node)}") from None
        starts, name = itertools.accumulate([0, *counts]), self._name(node)
        places = [Among(first, count, sum(counts)) for first, count in zip(starts, counts, strict=False)]
        branches = [
            [*self._between(gate, part), Stage(f"{name}, part {index}", place)]
            for index, (part, place) in enumerate(zip(parts, places, strict=True), 1)
        ]
        branches.sort(key=lambda branch: -len(list(parametrised(branch))))
        *others, last = branches
        for branch in reversed(others):
            last = [Stage(name, Residual(branch, last))]
        return last

    def _joined(self, node: fx.Node) -> list[fx.Node] | None:
        """The tensors that a node joins by their channels, all of which come from the images; None of other nodes."""
        parts = joined(node)
        return parts if parts and all(part in self._carrying for part in parts) else None

    def _stages(self, node: fx.Node) -> list[Stage]:
        """What a node of one tensor stands for; identities do nothing and are left out."""
        self._gate(node)
        if any(self._uses[id(p)] > 1 for p in self._parameters(node)):
            raise ValueError(f"{self._where(node)}: {WEIGHT_USED_TWICE}")
        if node.op == "call_module":
            return self._module(node)
        try:
            if name_called(node) in CUTS:
                return []  # what is taken out of it says which part it is
            if cut := cut_out(self.model, node):
                return [Stage(self._name(node), Part(*cut))]
            modules = [self._scaling(node)] if self._is_scaling(node) else self._call(node)
        except (LookupError, TypeError, ValueError):
            raise ValueError(f"{self._where(node)}: {self._why_not(node)}") from None
        return [Stage(self._name(node), module) for module in modules]

    def _module(self, node: fx.Node) -> list[Stage]:
        module = self.model.get_submodule(node.target)
        if len(node.args) != 1 or node.kwargs:
            raise ValueError(f"{self._where(node)}: it takes more than one tensor")
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise ValueError(f"{node.target} has no running statistics: it mixes the images of a batch")
        if isinstance(module, nn.Flatten) and module.start_dim == 0:
            raise ValueError(f"{self._where(node)}: {WHY_NOT['flatten']}")
        if isinstance(module, nn.Hardsigmoid):
            return [Stage(node.target, stage) for stage in called("hardsigmoid", (), {})]
        if is_pixel_normalisation(module):
            return [Stage(node.target, stage) for stage in normalise(module.mean, module.std)]
        return [] if isinstance(module, nn.Identity) else [Stage(node.target, module)]

    def _call(self, node: fx.Node) -> list[nn.Module]:
        """The modules that a function or method stands for; only a view may be told sizes of tensors."""
        name, others = name_called(node), node.args[1:]
        if name in VIEWS:
            others = [others[0] if others else None, *(size_told(self.model, size) for size in others[1:])]
        elif any(n is not node.args[0] for n in node.all_input_nodes):
            raise LookupError(name)
        return called(name, others, _how(node))

    def _is_scaling(self, node: fx.Node) -> bool:
        """Whether a node adds a constant or multiplies by one."""
        name = name_called(node)
        is_arithmetic = SAME.get(name, name) in (*OPERATIONS, "rsub") and len(node.args) == 2 and not node.kwargs
        return is_arithmetic and any(arg not in self._carrying for arg in node.args)

    def _scaling(self, node: fx.Node) -> object:
        is_first = node.args[0] not in self._carrying
        constant = node.args[0 if is_first else 1]
        if isinstance(constant, fx.Node):
            if not _is_constant(constant):
                raise LookupError(node.name)
            return scaling(name_called(node), part_of(self.graph, constant), is_first=is_first, model=self.model)
        if not isinstance(constant, int | float):
            raise LookupError(node.name)
        return scaling(name_called(node), float(constant), is_first=is_first)

    def _gate(self, node: fx.Node) -> fx.Node:
        """Where the tensors that a node takes come from.

        Raises:
            ValueError: not from the images, or there are more of them than such a node takes.
        """
        is_pair = self._is_sum(node) or self._is_product(node)
        gate, most = self._gates[node], 2 if is_pair else len(self._joined(node) or [node])
        if gate is None or len(self._sources(node)) > most:
            raise ValueError(f"{self._where(node)}: {self._why_not(node)}")
        return gate

    def _sources(self, node: fx.Node) -> list[fx.Node]:
        """The nodes that a node takes and that depend on the images' pixels."""
        return [source for source in node.all_input_nodes if source in self._carrying]

    def _is_sum(self, node: fx.Node) -> bool:
        return self._is_of_two(node, "add")

    def _is_product(self, node: fx.Node) -> bool:
        return self._is_of_two(node, "mul")

    def _is_of_two(self, node: fx.Node, operation: str) -> bool:
        """Whether a node does that to two tensors that come from the images."""
        name = name_called(node)
        plain = SAME.get(name, name) == operation and not node.kwargs and len(node.args) == 2
        return plain and all(branch in self._carrying for branch in node.args)

    def _meeting(self, sources: Sequence[fx.Node]) -> fx.Node | None:
        """The last node that the ways to all of these have in common."""
        if not sources:
            return None
        first, *others = ([*self._way(source)] for source in sources)
        shared = [set(way) for way in others]
        return next((node for node in first if all(node in way for way in shared)), None)

    def _way(self, node: fx.Node | None) -> Iterator[fx.Node]:
        while node is not None:
            yield node
            node = self._gates[node]

    def _parameters(self, node: fx.Node) -> list[nn.Parameter]:
        """The parameters that a node uses itself, those of parametrised weights among them."""
        if node.op == "call_module":
            return list(self.model.get_submodule(node.target).parameters())
        if node.op != "get_attr":
            return []
        owner, _, name = node.target.rpartition(".")
        found = getattr(self.model.get_submodule(owner), name, None)
        return [found] if isinstance(found, nn.Parameter) else []

    def _name(self, node: fx.Node) -> str:
        """The name of a stage that is no module: the module that it is in, what it does, and which of these it is."""
        scope, name = self._scope(node), name_called(node)
        same = [other for other in self.graph.nodes if self._scope(other) == scope and name_called(other) == name]
        which = f"{name} {same.index(node) + 1}" if len(same) > 1 else name
        return f"{scope}.{which}" if scope else which

    def _why_not(self, node: fx.Node) -> str:
        return why_not(self.model, node, self._scope(node))

    def _scope(self, node: fx.Node) -> str:
        """The path of the module that a node is in; empty of the model's own forward pass."""
        return self.scopes.get(node.name, ("", None))[0]

    def _where(self, node: fx.Node) -> str:
        """The place of a node, in words."""
        if node.op == "call_module":
            return f"layer {node.target}, {type(self.model.get_submodule(node.target)).__name__}"
        scope = self._scope(node)
        return f"in {scope}" if scope else f"in the forward pass of {type(self.model).__name__}"


def _is_never_negative(chain: Chain) -> bool:
    """Whether all that comes out of a chain is zero or more."""
    for stage in reversed(chain):
        kind = kind_of(stage.module)
        if kind.output_range is not None and not (isinstance(stage.module, Scaling) and stage.module.is_positive):
            return kind.output_range[0] >= 0
    return False


def _is_constant(node: fx.Node) -> bool:
    """Whether a node depends on nothing but the model's own tensors."""
    return node.op != "placeholder" and all(map(_is_constant, node.all_input_nodes))


def _is_size(node: fx.Node) -> bool:
    name = name_called(node)
    if name == "getitem":
        return isinstance(node.args[0], fx.Node) and _is_size(node.args[0])
    return name in ("size", "len", "dim") or (
        name == "getattr" and node.args[1] in ("shape", "ndim", "device", "dtype")
    )


def _how(node: fx.Node) -> dict[str, object]:
    """What a call is told by keyword; whether it works in place does not matter."""
    return {name: value for name, value in node.kwargs.items() if name != "inplace"}
