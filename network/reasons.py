"""Why a node of a forward pass is no stage that can be walked, in words for those who know the model, not its graph."""

from collections.abc import Iterator, Sequence

from torch import fx, nn

from network.joins import VIEWS, name_called
from network.kinds.image_norm import POSITIONS_NORM
from network.kinds.scaling import SAME

ATTENTION = "attention, which mixes an image's positions"
NOT_FROM_IMAGES = "it takes more than one tensor, or one that does not come from the images"
# What keeps a function from being walked, by its name.
WHY_NOT = {
    "cat": "torch.cat joins several tensors",
    "stack": "torch.stack joins several tensors",
    "mul": "two tensors are multiplied, as by a gate",
    "div": "a tensor is divided by another",
    "sub": "a tensor is subtracted from another",
    "add": "tensors are added that do not come from one place",
    "permute": "dimensions are put in another order (permute)",
    "transpose": "dimensions are put in another order (transpose)",
    "swapaxes": "dimensions are put in another order (swapaxes)",
    "roll": "positions are shifted in a circle (roll)",
    "pad": "positions are added around an image (pad)",
    "getitem": "only a part of a tensor is taken",
    "chunk": "a tensor is cut into parts (chunk)",
    "split": "a tensor is cut into parts (split)",
    "unbind": "a tensor is cut into parts (unbind)",
    "mean": "entries are averaged other than over height and width",
    "sum": "entries are summed up",
    "softmax": "a softmax mixes entries",
    "dropout": "dropout is switched on",
    "view": "a view makes another shape than one for each image",
    "reshape": "a reshape makes another shape than one for each image",
    "flatten": "a flatten joins images",
    "layer_norm": "LayerNorm takes off mean and scale of each image's entries",
    "group_norm": "mean and scale of each image's groups are taken off (group_norm)",
    "instance_norm": "mean and scale of each image's channels are taken off (instance_norm)",
} | dict.fromkeys(("matmul", "bmm", "einsum"), "two tensors are multiplied as matrices")
OTHER_NAMES = {"concat": "cat", "concatenate": "cat"} | SAME
WINDOWS = 4  # sizes of a view beyond which positions are cut into windows, and channels into heads


def why_not(model: nn.Module, node: fx.Node, scope: str) -> str:
    """What keeps a node from being a stage.

    Args:
        model: whose forward pass it is in.
        node: of its graph.
        scope: path of the module that the node is in.
    """
    if any("attention" in type(module).__name__.lower() for module in _around(model, node, scope)):
        return ATTENTION
    if node.op == "call_module":
        return NOT_FROM_IMAGES
    if node.op in ("get_attr", "placeholder"):
        return "a tensor is used that does not come from the images"
    name = name_called(node)
    if "attention" in name:
        return ATTENTION
    special = _of_arguments(name, node.args[1:])
    return special or WHY_NOT.get(OTHER_NAMES.get(name, name), f"the function {name} is no stage that can be walked")


def _of_arguments(name: str, others: Sequence[object]) -> str:
    """What the arguments of a function, behind its tensor, say more exactly than its name does; empty where nothing."""
    sizes = others[0] if len(others) == 1 and isinstance(others[0], Sequence) else others
    if name in VIEWS and len(sizes) > WINDOWS:
        return f"positions are cut into windows, or channels into heads ({name})"
    if name == "layer_norm" and isinstance(sizes, Sequence) and len(sizes) == 1:
        return POSITIONS_NORM
    if name == "getitem" and len(sizes) == 2 and sizes[0] == slice(None) and isinstance(sizes[1], int):
        return "one token is taken and all others are left out, as a class token is"
    return ""


def _around(model: nn.Module, node: fx.Node, scope: str) -> Iterator[nn.Module]:
    """The modules that a node is in, and the one that it calls, but for the model itself."""
    path = str(node.target) if node.op == "call_module" else scope
    while path:
        yield model.get_submodule(path)
        path = path.rpartition(".")[0]
