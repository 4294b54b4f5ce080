"""The stages below known activations, as a client trains them: each step's images are seen by that step's own weights.

With delta known at the end of these stages, the gradient of every weight in them is known from the images, step after
step, and with it the weights of the next step and the update itself. All of it is differentiable by the images.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from network.chain import parameters, run_with
from network.stage import Chain
from update.training import LocalTraining


@dataclass(frozen=True)
class TrainedBelow:
    """The stages below, in one pass of several steps.

    Attributes:
        training: the client's.
        deltas: (B, ...) of the known activations, in the order of the steps.
    """

    training: LocalTraining
    deltas: Tensor

    def run(
        self, chain: Chain, images: Tensor, delta: Tensor, weights: Sequence[nn.Parameter]
    ) -> tuple[Tensor, list[Tensor]]:
        """The chain's outputs (B, ...) at images (B, C, H, W), and the update of some of its weights.

        Args:
            chain: the stages, or a softened copy of them.
            images: in the order of the steps.
            delta: of the outputs, (B, ...).
            weights: whose update is asked for.
        """
        table = self.training.coefficients()
        trained = [parameter for parameter in parameters(chain) if parameter.requires_grad]
        now, learnt, outputs = list(trained), [], []
        for step, part in enumerate(self.training.schedule(len(images), images.device), 1):
            outputs.append(run_with(chain, images[part], dict(zip(trained, now, strict=True))))
            mean = (outputs[-1] * delta[part]).sum() / len(part)
            learnt.append(torch.autograd.grad(mean, now, create_graph=True, materialize_grads=True))
            now = [
                table.weights(step, weight, own) for weight, own in zip(trained, zip(*learnt, strict=True), strict=True)
            ]
        shares = table.shares.tolist()
        update = {p: sum(s * each[at] for s, each in zip(shares, learnt, strict=True)) for at, p in enumerate(trained)}
        return torch.cat(outputs), [update[weight] for weight in weights]
