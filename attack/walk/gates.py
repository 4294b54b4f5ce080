"""Gates on the walk (squeeze-and-excitation): what a gate multiplies follows from its outputs, if its layers agree.

The means of a gate's inputs solve equations that may have several solutions (`network.kinds.product`). The gradients of
the gate's own layers are sums over the images of what each image's delta and inputs give there. At the right inputs
they are those of the update, and at others they are not.
"""

import torch
from torch import Tensor

from attack.walk.layer_source import BatchGradients
from network.chain import parametrised, run_with
from network.known_outputs import UndeterminedError
from network.stage import Stage

AGREED = 1e-2  # relative difference from the update's gradients up to which a gate's layers agree
SPREAD = 3.0  # standard deviations of the update's noise by which the difference may be larger


def contradicted(gate: Stage, inputs: Tensor, delta: Tensor, gradients: BatchGradients) -> None:
    """Compare the gradients of a gate's layers with those of the update; such as the update lacks are left out.

    Args:
        gate: the stage.
        inputs: of it, (B, ...).
        delta: of its outputs, (B, ...).
        gradients: of the update.

    Raises:
        UndeterminedError: they differ.
    """
    named = {
        f"{layer.name}.{name}": parameter
        for layer in parametrised([gate])
        for name, parameter in layer.module.named_parameters()
    }
    named = {name: parameter for name, parameter in named.items() if name in gradients.gradients}
    if not named:
        return
    with torch.enable_grad():
        leaves = {parameter: parameter.detach().requires_grad_() for parameter in named.values()}
        outputs = run_with([gate], inputs, leaves)
        made = torch.autograd.grad((outputs * delta).sum(), list(leaves.values()))
    for name, own in zip(named, made, strict=True):
        sent, layer = gradients.summed(name, own), name.rpartition(".")[0]
        noise = gradients.error(layer, own).max() * own.numel() ** 0.5
        off = float((own - sent).norm())
        if off > AGREED * float(sent.norm()) + SPREAD * float(noise):
            share = off / max(float(sent.norm()), 1e-300)
            raise UndeterminedError(f"the gradient of {name}, in its gate, contradicts its inputs by {share:.1e}")
