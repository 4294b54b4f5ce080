"""Federated averaging in plain PyTorch: two clients, one round, and what the server learns of the first one's images.

    python examples/fedavg_audit.py        # the update lands in results/fedavg, the audit's pictures below it

Flags of main_MAGIA_sel.py may follow.
"""

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

ROOT = Path(__file__).parent.parent
OUT = Path("results") / "fedavg"
RATE = 0.1


def net() -> nn.Module:
    """The model that the server starts from."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16 * 16, 10))


def client(server: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """One local step of SGD: new weights minus old."""
    model = copy.deepcopy(server)
    nn.functional.cross_entropy(model(images), labels).backward()
    torch.optim.SGD(model.parameters(), lr=RATE).step()
    return {
        name: new - old
        for (name, new), old in zip(model.state_dict().items(), server.state_dict().values(), strict=True)
    }


def main() -> int:
    """One round, then the audit of the first client's update. Returns the exit status."""
    with np.load(ROOT / "samples" / "cifar10_sample128.npz") as sample:
        images = torch.from_numpy(sample["images"]).permute(0, 3, 1, 2) / 255
        labels = torch.from_numpy(sample["labels"]).long()
    server = net()
    updates = [client(server, images[first : first + 4], labels[first : first + 4]) for first in (0, 4)]
    OUT.mkdir(parents=True, exist_ok=True)
    torch.save(server.state_dict(), OUT / "server.pt")
    torch.save(updates[0], OUT / "update.pt")
    server.load_state_dict({name: old + sum(u[name] for u in updates) / 2 for name, old in server.state_dict().items()})
    sent = ["--update", OUT / "update.pt", "--update_kind", "difference", "--local_lr", str(RATE)]
    known = ["--model", f"{__file__}:net", "--weights", OUT / "server.pt", "--num_classes", "10", "--image_size", "32"]
    audit = [sys.executable, ROOT / "main_MAGIA_sel.py", *sent, *known, "--save_dir", OUT, *sys.argv[1:]]
    return subprocess.run(audit).returncode


if __name__ == "__main__":
    sys.exit(main())
