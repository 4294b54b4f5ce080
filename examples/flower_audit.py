"""A Flower simulation with two clients, one round, and what the server learns of one client's images.

    pip install -r requirements-examples.txt
    python examples/flower_audit.py        # the update lands in results/flower, the audit's pictures below it

Flags of main_MAGIA_sel.py may follow.

The network and the training are those of Flower's PyTorch quickstart: two small convolutions, two max-pools and three
linear layers; a shuffling DataLoader, SGD with momentum, one epoch. Each client has 32 images, in minibatches of 8.

The server keeps what a client sends, its new weights, as `np.savez` writes them: arrays without names. That is all
that the audit gets, beside the model, the weights that the server itself sent out, and the rules that every client of
the round was told to train by. In which minibatch an image was is not among them.
"""

import subprocess
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).parent.parent
OUT = Path("results") / "flower"
IMAGES, BATCH = 32, 8  # of a client, and of a step
RATE, MOMENTUM = 0.01, 0.9


def net() -> nn.Module:
    """The model that the server starts from."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * 5 * 5, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, 10),
    )


def train(model: nn.Module, partition: int) -> None:
    """One epoch of a client on its part of the bundled images, reshuffled."""
    first = IMAGES * partition
    with np.load(ROOT / "samples" / "cifar10_sample128.npz") as sample:
        images = torch.from_numpy(sample["images"][first : first + IMAGES]).permute(0, 3, 1, 2) / 255
        labels = torch.from_numpy(sample["labels"][first : first + IMAGES]).long()
    optimiser = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
    for some, own in DataLoader(TensorDataset(images, labels), batch_size=BATCH, shuffle=True):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(some), own).backward()
        optimiser.step()


def keep(arrays: Iterable[np.ndarray]) -> None:
    """Write down what a client has sent, and what the server knew before."""
    OUT.mkdir(parents=True, exist_ok=True)
    torch.save(net().state_dict(), OUT / "server.pt")
    np.savez(OUT / "update.npz", *arrays)


def simulate() -> None:
    """One round of Flower's FedAvg, whose server keeps the update that comes first."""
    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    client, server = ClientApp(), ServerApp()

    @client.train()
    def fit(message: Message, context: Context) -> Message:
        model = net()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        train(model, int(context.node_config["partition-id"]))
        content = {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord({"num-examples": IMAGES})}
        return Message(content=RecordDict(content), reply_to=message)

    class Keeping(FedAvg):
        """FedAvg, as any server could run it."""

        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple:
            replies = list(replies)
            keep(replies[0].content["arrays"].to_numpy_ndarrays())
            return super().aggregate_train(server_round, replies)

    @server.main()
    def serve(grid: Grid, context: Context) -> None:
        Keeping(fraction_evaluate=0.0).start(grid=grid, initial_arrays=ArrayRecord(net().state_dict()), num_rounds=1)

    run_simulation(server, client, num_supernodes=2, backend_config={"client_resources": {"num_cpus": 1}})


def audit(*flags: str) -> int:
    """Attack the update that was kept. Returns the exit status."""
    steps = IMAGES // BATCH
    rules = f"--local_steps {steps} --local_batches {steps} --local_lr {RATE} --local_momentum {MOMENTUM}"
    sent = ["--update", OUT / "update.npz", "--update_kind", "weights", "--batch_size", str(IMAGES), *rules.split()]
    known = ["--model", f"{__file__}:net", "--weights", OUT / "server.pt", "--num_classes", "10", "--image_size", "32"]
    program = [sys.executable, ROOT / "main_MAGIA_sel.py"]
    return subprocess.run([*program, *sent, *known, "--save_dir", OUT, *flags]).returncode


def main() -> int:
    """The simulation, then the audit of the update that was kept. Returns the exit status."""
    if find_spec("flwr") is None:
        sys.exit("flower_audit.py needs Flower: pip install -r requirements-examples.txt")
    simulate()
    return audit(*sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
