"""Features unmixed from the head's gradient by independent component analysis: the first half of Cocktail Party Attack.

The averaged gradient of the last layer, G = (1/B) sum_i e_i h_i^T, mixes the features h_i with the softmax errors e_i.
The features are like B sound tracks of d samples each: tracks can be unmixed if they are independent and not Gaussian.

Source: Kariyappa et al. 2023 (arXiv 2209.05578). Three things differ. The mean feature of random images is subtracted
first; otherwise the features of an untrained net are 0.99 correlated and nothing is unmixed. FastICA's fixed point
(Hyvarinen 1999) unmixes, where the source descends on the same contrast. The sign and scale of a track, which ICA
leaves open, come from the track's softmax error, whose one large entry is softmax - 1.
"""

import torch
from torch import Tensor, nn

from attack.read.random_images import SAMPLE, random_features
from attack.solve.ica import fast_ica
from network.head import Head
from update.shared import SharedUpdate


def unmixed_features(update: SharedUpdate, model: nn.Module, *, generator: torch.Generator) -> Tensor:
    """Features (B, d) in no particular order, float64: estimates without error bars.

    Raises:
        ValueError: the model's last layer is not linear, its gradient is not in the update, or there are more images
            than the gradient has dimensions.
    """
    head, size = Head.of(model), update.batch_size
    gradient, gamma = head.among(update.gradients)
    if gradient is None or gamma is None:
        raise ValueError("the update holds no gradient of the head's weight and bias")
    gradient, gamma = gradient.double(), gamma.double()
    if size > min(gradient.shape) - 1:
        raise ValueError(f"batch_size is {size}: the head's gradient holds at most {min(gradient.shape) - 1} tracks")
    sample = random_features(model, update.image_shape, SAMPLE, generator).double()
    mean = sample.mean(0)
    weight, bias = head.layer.weight.detach().double(), head.layer.bias.detach().double()
    softmax = nn.functional.linear(sample, weight, bias).softmax(1).mean(0)
    left, sigma, right = torch.linalg.svd(gradient - gamma[:, None] * mean, full_matrices=False)
    unmixing = fast_ica(right[:size], generator)
    tracks = unmixing @ right[:size]  # (B, d)
    errors = size * torch.linalg.solve(unmixing.T, (left[:, :size] * sigma[:size]).T)  # (B, K), each times its track
    own = errors.abs().argmax(1, keepdim=True)
    return mean + tracks * errors.gather(1, own) / (softmax[own] - 1)
