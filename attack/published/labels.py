"""Labels read off the head's gradient, as published attacks do. MAGIA does not need these labels, its baselines do.

Softmax errors are negative for an image's own class alone, so the rows of G = (1/B) sum_i e_i h_i^T and the entries of
gamma = (1/B) sum_i e_i that belong to labels in the batch are pulled below zero.
"""

import torch
from torch import Tensor, nn

from attack.read.label_counts import spelled_out, whole_counts
from network.head import Head
from update.shared import SharedUpdate

STRATEGIES = ("optimise", "known", "idlg", "yin", "ilrg")


def infer_labels(strategy: str, update: SharedUpdate, model: nn.Module, granted: Tensor | None) -> Tensor | None:
    """Class indices (B,) in ascending order, or None where labels are to be optimised beside the images.

    optimise  none (DLG, MAGIA)
    known     the true labels, granted to the attacker without their order (Geiping et al. 2020)
    idlg      classes by their entry of gamma, most negative first (Zhao et al. 2020, for one image)
    yin       the B classes whose row of G reaches lowest, each once (Yin et al. 2021, eq. 7)
    ilrg      counts from a linear system: the class-wise mean features G_k / gamma_k give class-wise softmax
              probabilities P_k, and sum_k n_k (P_k - onehot(k)) = B gamma (Ma et al. 2023)

    Raises:
        ValueError: `known` where nothing was granted, or an update without the head's gradients.
    """
    if strategy == "optimise":
        return None
    if strategy == "known":
        if granted is None:
            raise ValueError("--label_strategy known: the true labels of a saved update are not at hand")
        return granted.sort().values
    head, size = Head.of(model), update.batch_size
    weight, bias = head.among(update.gradients)
    if weight is None or bias is None:
        raise ValueError(f"--label_strategy {strategy}: the update holds no gradient of the head's weight and bias")
    weight, bias = weight.double(), bias.double()
    if strategy == "idlg":
        order = bias.argsort()
        present = order[: max(1, min(size, int((bias < 0).sum())))]
        return present.repeat(-(-size // len(present)))[:size].sort().values
    if strategy == "yin":
        if size > len(bias):
            raise ValueError(f"--label_strategy yin finds {len(bias)} different labels at most, not {size}")
        return weight.min(1).values.argsort()[:size].sort().values
    return spelled_out(_ilrg_counts(weight, bias, head.layer, size))


def _ilrg_counts(weight: Tensor, bias: Tensor, head: nn.Linear, size: int) -> Tensor:
    mean_features = weight / bias[:, None].where(bias[:, None] != 0, 1.0)
    logits = mean_features @ head.weight.detach().double().T + head.bias.detach().double()
    system = logits.softmax(1).T - torch.eye(len(bias)).to(weight)
    system = torch.cat([system, torch.ones_like(bias)[None]])
    counts = torch.linalg.lstsq(system.cpu(), torch.cat([size * bias, bias.new_tensor([size])])[:, None].cpu()).solution
    return whole_counts(counts[:, 0].to(weight), size)
