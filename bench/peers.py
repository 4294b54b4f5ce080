"""Attacks of other packages, run on this project's updates through their public interfaces.

breaching (Geiping et al., MIT licence, `requirements-benchmark.txt`) is handed the model, the averaged gradient and,
where the attack's paper grants them, the labels: just what a server has. Its settings are its own but for the number
of iterations, by which its step sizes decay, and a stop once the budget of gradient evaluations is spent.
"""

import contextlib
import io
import warnings

import torch
from torch import Tensor, nn

from update.shared import SharedUpdate
from update.vision import torchvision

# The attacks of breaching that are compared, and whether their papers grant the attacker the labels.
BREACHING = {
    "invertinggradients": True,  # Geiping et al. 2020 (arXiv 2003.14053)
    "modern": True,  # the same with the package's later improvements
    "seethroughgradients": False,  # Yin et al. 2021 (arXiv 2104.07586): reads them from the head's gradient
    "deepleakage": False,  # Zhu et al. 2019 (arXiv 1906.08935): optimises them beside the images
}
PEERS = {"breaching": BREACHING}


class _CountedLoss(nn.CrossEntropyLoss):
    """Cross-entropy that counts its calls, one for each gradient evaluation, and ends an attack that has spent them."""

    def __init__(self, budget: int) -> None:
        super().__init__()
        self.calls, self.budget = 0, budget

    def __deepcopy__(self, memo: dict) -> "_CountedLoss":
        return self  # the attack copies its loss; there is one counter all the same

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.calls == self.budget:
            self.budget = -1  # once: the attack then scores what it has, which is not counted
            raise KeyboardInterrupt  # what breaching ends an attack on, keeping its best images
        self.calls += self.budget > 0
        return super().forward(logits, labels)


def breaching_attack(
    name: str, update: SharedUpdate, model: nn.Module, granted: Tensor, *, max_evals: int, seed: int
) -> tuple[Tensor, Tensor, int]:
    """Images (B, C, H, W) in [0, 1], labels (B,), and the gradient evaluations that attack `name` of breaching took.

    Args:
        granted: true labels (B,), passed on only where `BREACHING` says that the paper grants them; sorted, since their
            order is not known.

    Raises:
        ImportError: breaching is not installed.
        ValueError: parameters are frozen, which it does not provide for.
    """
    torchvision()  # lets the package import it where its compiled operators are missing
    import breaching
    from omegaconf import OmegaConf

    gradients = update.targets(model)
    if len(gradients) < len(list(model.parameters())):
        raise ValueError("breaching cannot attack updates with frozen parameters")
    like = gradients[0]
    channels = update.image_shape[0]
    about = {"shape": list(update.image_shape), "classes": update.num_classes, "modality": "vision"}
    about |= {"task": "classification", "mean": [0.0] * channels, "std": [1.0] * channels}  # images are in [0, 1]
    payload = {"parameters": list(model.parameters()), "buffers": list(model.buffers())}
    labels = granted.sort().values.to(like.device) if BREACHING[name] else None
    shared = {
        "gradients": list(gradients),
        "buffers": None,
        "metadata": {"num_data_points": update.batch_size, "labels": labels, "local_hyperparams": None},
    }
    loss = _CountedLoss(max_evals)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)  # the package draws from the global generator
        config = breaching.get_attack_config(name, [f"optim.max_iterations={max_evals}"])
        setup = {"dtype": like.dtype, "device": like.device}
        attacker = breaching.attacks.prepare_attack(model, loss, config, setup)
        result, _ = attacker.reconstruct([payload | {"metadata": OmegaConf.create(about)}], [shared], {})
    return result["data"].detach().clamp(0, 1), result["labels"], loss.calls
