"""A Flower simulation with two clients, one round, and what the server learns of one client's images.

    pip install -r requirements-examples.txt
    python examples/flower_audit.py        # the update lands in results/flower, the audit's pictures below it

Flags of main_MAGIA_sel.py may follow.

The server keeps what a client sends, its new weights, as `np.savez` writes them: arrays without names. That is all
that the audit gets, beside the model and the weights that the server itself sent out.
"""

import subprocess
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import nn

ROOT = Path(__file__).parent.parent
OUT = Path("results") / "flower"
RATE, BATCH = 0.1, 4


def net() -> nn.Module:
    """The model that the server starts from."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16 * 16, 10))


def step(model: nn.Module, first: int) -> None:
    """One step of SGD on so many bundled images, from `first` on."""
    with np.load(ROOT / "samples" / "cifar10_sample128.npz") as sample:
        images = torch.from_numpy(sample["images"][first : first + BATCH]).permute(0, 3, 1, 2) / 255
        labels = torch.from_numpy(sample["labels"][first : first + BATCH]).long()
    nn.functional.cross_entropy(model(images), labels).backward()
    torch.optim.SGD(model.parameters(), lr=RATE).step()


def simulate() -> None:
    """One round of Flower's FedAvg, whose server keeps the update that comes first."""
    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    client, server = ClientApp(), ServerApp()

    @client.train()
    def train(message: Message, context: Context) -> Message:
        model = net()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        step(model, BATCH * int(context.node_config["partition-id"]))
        content = {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord({"num-examples": BATCH})}
        return Message(content=RecordDict(content), reply_to=message)

    class Keeping(FedAvg):
        """FedAvg, as any server could run it."""

        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple:
            replies = list(replies)
            np.savez(OUT / "update.npz", *replies[0].content["arrays"].to_numpy_ndarrays())
            return super().aggregate_train(server_round, replies)

    @server.main()
    def serve(grid: Grid, context: Context) -> None:
        Keeping(fraction_evaluate=0.0).start(grid=grid, initial_arrays=ArrayRecord(net().state_dict()), num_rounds=1)

    run_simulation(server, client, num_supernodes=2, backend_config={"client_resources": {"num_cpus": 1}})


def main() -> int:
    """The simulation, then the audit of the update that was kept. Returns the exit status."""
    if find_spec("flwr") is None:
        sys.exit("flower_audit.py needs Flower: pip install -r requirements-examples.txt")
    OUT.mkdir(parents=True, exist_ok=True)
    torch.save(net().state_dict(), OUT / "server.pt")
    simulate()
    sent = [
        "--update",
        OUT / "update.npz",
        "--update_kind",
        "weights",
        "--local_lr",
        str(RATE),
        "--batch_size",
        str(BATCH),
    ]
    known = ["--model", f"{__file__}:net", "--weights", OUT / "server.pt", "--num_classes", "10", "--image_size", "32"]
    audit = [sys.executable, ROOT / "main_MAGIA_sel.py", *sent, *known, "--save_dir", OUT, *sys.argv[1:]]
    return subprocess.run(audit).returncode


if __name__ == "__main__":
    sys.exit(main())
