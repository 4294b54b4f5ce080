"""What the graph of a forward pass joins, takes apart, and puts in another order.

The graph knows no shapes. How many channels a tensor has is told by the layers that it has passed.
"""

import operator
from collections.abc import Callable, Sequence

from torch import fx, nn

from network.kinds import CALLS, Kind, kind_of
from network.kinds.pool import AveragePool, MaxPool
from network.kinds.reshape import DROPOUTS, NOTHING

CHANNELS = 1  # the dimension of channels
JOINS = ("cat", "concat", "concatenate")
CUTS = ("chunk", "split")
VIEWS = ("view", "reshape")
SPREADS = ("expand", "expand_as")
ORDERS = ("permute", "transpose", *VIEWS, "flatten", "unflatten", "contiguous")
ARITHMETIC = (operator.floordiv, operator.mul, operator.truediv, operator.add, operator.sub)  # of sizes


def name_called(node: object) -> str:
    """The name of the function or method, without the underscore of one that works in place."""
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        return ""
    return getattr(node.target, "__name__", str(node.target)).removesuffix("_")


def joined(node: fx.Node) -> list[fx.Node] | None:
    """The tensors that a node joins by their channels, in their order; None where it does something else."""
    if name_called(node) not in JOINS or not node.args or not isinstance(node.args[0], Sequence):
        return None
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
    tensors = list(node.args[0])
    return tensors if dim == CHANNELS and all(isinstance(tensor, fx.Node) for tensor in tensors) else None


def nest_joins(graph: fx.Graph) -> None:
    """Let each join that begins with the tensors of an earlier one take that one's result in their place.

    A dense block joins x, then x and f(x), then x, f(x) and g(x, f(x)). Behind each of these joins the next one then
    has one way in.
    """
    earlier: dict[tuple[fx.Node, ...], fx.Node] = {}
    for node in graph.nodes:
        tensors = joined(node)
        if tensors is None:
            continue
        known = next((n for n in reversed(range(2, len(tensors))) if tuple(tensors[:n]) in earlier), None)
        earlier[tuple(tensors)] = node
        if known is not None:
            node.args = ([earlier[tuple(tensors[:known])], *tensors[known:]], CHANNELS)
            node.kwargs = {}


def channels_of(model: nn.Module, node: object) -> int:
    """How many channels the tensor of a node has.

    Raises:
        LookupError: the graph does not tell.
    """
    if not isinstance(node, fx.Node):
        raise LookupError("channels")
    if node.op == "call_module":
        return _channels_behind(model, node)
    if parts := joined(node):
        return sum(channels_of(model, part) for part in parts)
    if cut := cut_out(model, node):
        return cut[1]
    name = name_called(node)
    if name in VIEWS and len(node.args) > CHANNELS + 1:
        return _size(model, node.args[CHANNELS + 1])
    if name in ("add", "iadd", *JOINS, *DROPOUTS, *NOTHING, *CUTS) or _keeps_channels(CALLS.get(name)):
        return channels_of(model, node.args[0])
    raise LookupError(f"channels of {node}")


def cut_out(model: nn.Module, node: fx.Node) -> tuple[int, int] | None:
    """The first channel, and how many, that a node takes out of a tensor that is cut in parts; None of other nodes.

    Raises:
        LookupError: the graph does not tell.
    """
    if name_called(node) != "getitem" or not isinstance(node.args[1], int):
        return None
    cut = node.args[0]
    if name_called(cut) not in CUTS or _argument(cut, 2, "dim") != CHANNELS:
        return None
    total = channels_of(model, cut.args[0])
    size = _argument(cut, 1, "chunks" if name_called(cut) == "chunk" else "split_size_or_sections")
    size = _argument(cut, 1, "split_size") if size is None else size
    if not isinstance(size, int):
        raise LookupError(f"parts of {cut}")
    size = -(-total // size) if name_called(cut) == "chunk" else size
    starts = range(0, total, size)
    first = starts[node.args[1]]
    return first, min(size, total - first)


def factor(node: fx.Node) -> fx.Node:
    """The node that a factor of a product is made of: a product spreads it over the other's entries by itself."""
    return node.args[0] if name_called(node) in SPREADS else node


def size_told(model: nn.Module, size: object) -> object:
    """A size that a view is told, as a number where it is the channels of a tensor."""
    if isinstance(size, fx.Node) and _is_size_at(size, CHANNELS) is not None:
        return _size(model, size)
    return size


def only_order(node: fx.Node, is_carrying: Callable[[fx.Node], bool]) -> tuple[fx.Graph, fx.Node] | None:
    """The graph of the views and permutations that a node ends with, and the node in front of them; None of others.

    Views may be told sizes of that node, and must keep the dimension of the images.
    """
    way, base = [], node
    while name_called(base) in ORDERS and _keeps_images(base):
        way.append(base)
        base = base.args[0]
        if sum(map(is_carrying, base.users)) > 1:  # another way leads from it
            break
    if not way:
        return None
    graph, copies = fx.Graph(), {}
    copies[base] = graph.placeholder("x")
    for each in node.graph.nodes:
        if each in way or (each is not base and not is_carrying(each) and _is_size_of(each, copies)):
            copies[each] = graph.node_copy(each, lambda other: copies[other])
    graph.output(copies[node])
    return graph, base


def _is_size_of(node: fx.Node, known: dict) -> bool:
    """Whether a node is a size of nodes that are known, or made of such sizes alone."""
    is_told = bool(node.all_input_nodes) and all(other in known for other in node.all_input_nodes)
    is_size = name_called(node) in ("size", "getattr", "getitem") or node.target in ARITHMETIC
    return node.op in ("call_function", "call_method") and is_told and is_size


def _keeps_images(node: fx.Node) -> bool:
    """Whether a view or a permutation leaves the first dimension, that of the images, as it is."""
    name, others = name_called(node), list(node.args[1:])
    others = list(others[0]) if len(others) == 1 and isinstance(others[0], list | tuple) else others
    if name in VIEWS:
        return bool(others) and _is_size_at(others[0], 0) is not None
    if name == "permute":
        return bool(others) and others[0] == 0
    if name == "transpose":
        return len(others) == 2 and (min(others) > 0 or sorted(others) == [-2, -1])
    if name in ("flatten", "unflatten"):
        return bool(others) and isinstance(others[0], int) and others[0] > 0
    return name == "contiguous"


def _is_size_at(node: object, dim: int) -> fx.Node | None:
    """The node whose size in this dimension a node is; None of any other."""
    if name_called(node) == "size" and list(node.args[1:]) == [dim]:
        return node.args[0]
    if name_called(node) != "getitem" or node.args[1] != dim:
        return None
    sizes = node.args[0]
    is_all = name_called(sizes) == "size" and len(sizes.args) == 1
    is_shape = name_called(sizes) == "getattr" and sizes.args[1] == "shape"
    return sizes.args[0] if is_all or is_shape else None


def _size(model: nn.Module, size: object) -> int:
    """The number of channels that a view is told."""
    if isinstance(size, int) and size > 0:
        return size
    source = _is_size_at(size, CHANNELS)
    if source is None:
        raise LookupError("channels of a view")
    return channels_of(model, source)


def _channels_behind(model: nn.Module, node: fx.Node) -> int:
    module = model.get_submodule(node.target)
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.out_channels
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return module.num_features
    if isinstance(module, nn.Identity | nn.modules.dropout._DropoutNd) or _keeps_channels(kind_of(module)):
        return channels_of(model, node.args[0])
    raise LookupError(f"channels of {node.target}")


def _keeps_channels(kind: Kind | None) -> bool:
    return kind is not None and (kind.is_activation or kind.is_norm or isinstance(kind, AveragePool | MaxPool))


def _argument(node: fx.Node, place: int, name: str) -> object:
    """An argument of a call, wherever it stands."""
    return node.args[place] if len(node.args) > place else node.kwargs.get(name)
