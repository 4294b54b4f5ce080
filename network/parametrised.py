"""Weights that are made of other parameters, as weight normalisation makes W_k = g_k v_k / |v_k|.

An update has gradients of g and v, the walk asks for that of W. Both give it, row by row, with u_k = v_k / |v_k|:

    dL/dg_k = <dL/dW_k, u_k>        dL/dv_k = (g_k / |v_k|) (dL/dW_k - <dL/dW_k, u_k> u_k)
    dL/dW_k = dL/dg_k u_k + (|v_k| / g_k) dL/dv_k

Spectral and orthogonal parametrisations leave a part of dL/dW out of their parameters' gradients, and have no such
formula: such layers are run, and their outputs give equations, but their gradients are not read.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

INSIDE = ".parametrizations."  # in the name of a parameter that a weight is made of


def with_weights(gradients: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Gradients by parameter name, and beside them those of weights that are made of g and v."""
    found = dict(gradients)
    for name, layer in model.named_modules():
        for g, v, dim in _normalised(layer):
            stem = f"{name}." if name else ""
            dg, dv = (gradients.get(stem + parameter) for parameter in (g, v))
            if dg is not None and dv is not None:
                own = dict(layer.named_parameters())
                found[f"{stem}weight"] = _of_weight(own[g].detach(), own[v].detach(), dg, dv, dim)
    return found


def is_made(layer: nn.Module) -> bool:
    """Whether a layer's weight is made of other parameters."""
    return "weight" not in layer._parameters and isinstance(getattr(layer, "weight", None), Tensor)


def why_no_gradient(layer: nn.Module) -> str:
    """Why an update does not tell the gradient of a layer's weight, whose parameters it has; empty where it does."""
    if not is_made(layer) or _normalised(layer):
        return ""
    how = "another way than weight normalisation"
    if parametrize.is_parametrized(layer, "weight"):
        how = " and ".join(type(step).__name__.lstrip("_") for step in layer.parametrizations.weight)
    return f"its weight is made of other parameters ({how}), whose gradients leave out a part of the weight's"


def make_copyable(model: nn.Module) -> None:
    """Let layers whose weight a hook makes at each call keep it without its graph, which copies cannot be made of."""

    def let_go(layer: nn.Module, inputs: object, output: object) -> None:
        for name, value in vars(layer).items():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                vars(layer)[name] = value.detach()

    for layer in model.modules():
        if is_made(layer) and not parametrize.is_parametrized(layer):
            layer.register_forward_hook(let_go)


def _normalised(layer: nn.Module) -> list[tuple[str, str, int | None]]:
    """The names of g and v in a layer, and the dimension of the rows, for each weight normalisation of its weight."""
    made_of = "parametrizations.weight.original"
    if parametrize.is_parametrized(layer, "weight"):
        steps = layer.parametrizations.weight
        is_weight_norm = len(steps) == 1 and type(steps[0]).__name__ == "_WeightNorm"
        return [(f"{made_of}0", f"{made_of}1", steps[0].dim)] if is_weight_norm else []
    older = (hook for hook in layer._forward_pre_hooks.values() if type(hook).__name__ == "WeightNorm")
    return [("weight_g", "weight_v", hook.dim) for hook in older if hook.name == "weight"]


def _of_weight(g: Tensor, v: Tensor, dg: Tensor, dv: Tensor, dim: int | None) -> Tensor:
    """dL/dW of W's shape, in the dtype of the gradients; a row of g = 0 keeps the part that g tells."""
    axes = [axis for axis in range(v.dim()) if dim in (None, -1) or axis != dim]
    g, v, tangent = g.double(), v.double(), dv.to(v.device).double()
    length = v.square().sum(axes, keepdim=True).sqrt().clamp(min=torch.finfo(dv.dtype).tiny)
    along = dg.to(v.device).double().view_as(g) * v / length
    return (along + torch.where(g != 0, length / g, 0.0) * tangent).to(dv)
