"""The judge: match reconstructions to truths one to one, and measure how close they are."""

import math
from collections import Counter
from collections.abc import Iterable

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from skimage.metrics import structural_similarity
from torch import Tensor

# A mean squared error below this is float32 rounding, not information: PSNR is capped at 100 dB.
LEAST_MSE = 1e-10
MOST_PSNR = -10 * math.log10(LEAST_MSE)

WINDOW = 11  # pixels a side of the window of structural similarity: 3.5 sigmas to each side of the middle

# An image counts as recovered from this structural similarity on: its content is then recognisable at a glance.
RECOVERED_SSIM = 0.6


def psnr_matrix(truth: Tensor, reconstruction: Tensor) -> np.ndarray:
    """PSNR in dB of every truth (row) against every reconstruction (column), images in [0, 1]; at most 100 dB."""
    a, b = (images.detach().double().cpu().flatten(1).numpy() for images in (truth, reconstruction))
    mse = cdist(a, b, "sqeuclidean") / a.shape[1]
    return -10 * np.log10(np.maximum(mse, LEAST_MSE))


def assign(psnr: np.ndarray) -> np.ndarray:
    """For each truth the index of its reconstruction, one to one, such that the sum of PSNR is greatest."""
    return linear_sum_assignment(psnr, maximize=True)[1]


def mean_psnr(truth: Tensor, reconstruction: Tensor) -> float:
    """Mean PSNR in dB over the optimal one-to-one assignment."""
    psnr = psnr_matrix(truth, reconstruction)
    return float(psnr[np.arange(len(psnr)), assign(psnr)].mean())


def ssim(truth: Tensor, reconstruction: Tensor) -> float:
    """Structural similarity of two images (C, H, W) in [0, 1], Gaussian window of sigma 1.5 (Wang et al. 2004).

    Images with a side shorter than the window are mirrored at their edges until the window fits.
    """
    a, b = (image.detach().double().cpu().numpy() for image in (truth, reconstruction))
    missing = [max(0, WINDOW - side) for side in a.shape[1:]]
    if any(missing):
        edges = [(0, 0), *((many // 2, many - many // 2) for many in missing)]
        a, b = (np.pad(image, edges, mode="symmetric") for image in (a, b))
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return float(structural_similarity(a, b, data_range=1.0, channel_axis=0, **settings))


def label_accuracy(labels: Tensor, predicted: Tensor) -> float:
    """The share of the labels (B,) that are among the predicted labels (B,), each as often as it occurs there.

    Multisets are compared, not images: pixels decide which reconstruction belongs to which image, and where pixels are
    poor, the answer would be chance.
    """
    return (Counter(labels.tolist()) & Counter(predicted.tolist())).total() / len(labels)


def guessed_label_accuracy(labels: Tensor, num_classes: int) -> float:
    """The mean `label_accuracy` of a guess that names all classes equally often and the remaining labels at random."""
    each, over = divmod(len(labels), num_classes)
    counts = Counter(labels.tolist()).values()
    return sum(min(count, each) + (count > each) * over / num_classes for count in counts) / len(labels)


def guess_psnr(truth: Tensor) -> list[float]:
    """PSNR in dB of a guess of each of the images (B, C, H, W), made without any update: the better of two guesses.

    The first guess is a flat picture in the image's own mean colour, which no guess of one colour can beat. The second
    is the mean of the batch's other images, without copies of this image.
    """
    between, best = psnr_matrix(truth, truth), []
    for image, likeness in zip(truth, between, strict=True):
        guesses = [image.mean((1, 2), keepdim=True).expand_as(image)]
        others = truth[torch.from_numpy(likeness < MOST_PSNR)]
        if len(others):
            guesses.append(others.mean(0))
        best.append(float(psnr_matrix(image[None], torch.stack(guesses)).max()))
    return best


def identified(truth: Tensor, matched: Tensor, others: Iterable[Tensor] = ()) -> tuple[list[bool], int]:
    """Whether each matched picture is nearer to its truth than to every other image, and the number of other images.

    Near is a small squared distance of the pixels. The other images are the rest of the batch and `others`, without
    copies of the truth.

    Args:
        truth, matched: (B, C, H, W) in [0, 1], picture i matched to truth i.
        others: portions (N, C, H, W) of images that are not of the batch.
    """
    a, b = (images.detach().double().cpu().flatten(1) for images in (matched, truth))
    own, nearest, count = (a - b).square().sum(1), torch.full((len(a),), math.inf, dtype=torch.float64), len(b) - 1
    for portion in (truth, *others):
        images = portion.detach().double().cpu().flatten(1)
        is_copy = torch.cdist(b, images).square() < LEAST_MSE * b.shape[1]
        nearest = torch.minimum(nearest, torch.cdist(a, images).square().masked_fill(is_copy, math.inf).amin(1))
        count += len(images) if portion is not truth else 0
    return (own < nearest).tolist(), count


def equal_bits(truth: Tensor, matched: Tensor) -> list[bool]:
    """Whether each matched picture (B, C, H, W), rounded to 8 bits, is the truth in 8 bits, every pixel the same."""
    a, b = ((images.detach().double().cpu().flatten(1) * 255).round() for images in (matched, truth))
    return (a == b).all(1).tolist()


def evaluate(
    truth: Tensor, labels: Tensor, reconstruction: Tensor, predicted: Tensor, others: Iterable[Tensor] = ()
) -> dict:
    """All figures of a reconstruction, keys as in metrics.json.

    Args:
        truth, reconstruction: (B, C, H, W) in [0, 1].
        labels, predicted: class indices (B,).
        others: images that are not of the batch, see `identified`.

    Returns:
        `assignment[i]` is the reconstruction matched to truth i; `psnr`, `ssim`, `identified` and `equal_bits` are
        lists by truth, over this assignment. `psnr_mean_best_match` lets several truths share a reconstruction.
        `identification` is None where there is no other image.
    """
    psnr = psnr_matrix(truth, reconstruction)
    assignment = assign(psnr)
    matched = psnr[np.arange(len(psnr)), assignment]
    similarity = [ssim(truth[i], reconstruction[j]) for i, j in enumerate(assignment)]
    order = assignment.tolist()
    who, compared = identified(truth, reconstruction[order], others)
    same = equal_bits(truth, reconstruction[order])
    return {
        "psnr_mean": float(matched.mean()),
        "psnr": matched.tolist(),
        "psnr_mean_best_match": float(psnr.max(1).mean()),
        "ssim_mean": float(np.mean(similarity)),
        "ssim": similarity,
        "mse_mean": float((truth - reconstruction[order]).square().mean()),
        "label_accuracy": label_accuracy(labels, predicted),
        "recovered": float(np.mean(np.array(similarity) >= RECOVERED_SSIM)),
        "identification": float(np.mean(who)) if compared else None,
        "identified_among": compared,
        "identified": who if compared else [None] * len(who),
        "bit_exact": float(np.mean(same)),
        "equal_bits": same,
        "assignment": order,
    }
