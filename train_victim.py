"""Train a model to attack: leakage changes with training, and --weights attacks the trained model.

    python train_victim.py --model convnet --dataset cifar10 --num_classes 10 --epochs 2 --out convnet.safetensors
    python main_MAGIA_sel.py --model convnet --weights convnet.safetensors --num_classes 10 --labels dataset
    python train_victim.py --model torchvision:resnet50 --image_size 64 --epochs 0 --out resnet50.safetensors

Any model that main_MAGIA_sel.py takes can be trained, those from outside too. Before each checkpoint BatchNorm's
running statistics are made anew from the images, with the weights that the checkpoint holds. So --epochs 0 calibrates a
model that is not trained, whose activations the statistics of a new model (mean 0, variance 1) would blow up.

Edit the defaults below or override them with flags. The checkpoint is written after every epoch.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from cli.flags import build_parser, read_flags
from cli.model import model_options
from cli.output import lasting_output, refused
from cli.runtime import INTERRUPTED, choose_device, stream
from data import Batch, load_batch, open_source, sides
from network.outside import blamed
from network.zoo import build_model
from update.batchnorm import batchnorms
from update.storage import checked_name, write_tensors

# ----------------------------------------------------------------------------------------------------
# Defaults. Each flag of the same name overrides one, and its comment is the flag's help.

# data
DATASET = "sample"  # source of the images: sample (bundled), cifar10, cifar100, mnist, fashionmnist, svhn, folder, npz
DATA_PATH = None  # the folder or .npz to read, or where torchvision sets lie (None: ./data)
IMAGE_SIZE = None  # pixels to crop and resize to, 24 or 16x24 (height x width) (None: images keep their size)
HOLD_OUT = 0.1  # share of the images on which accuracy is measured; the model is not trained on them

# model
MODEL = "lenet"  # lenet (of DLG, arXiv 1906.08935), mlp, convnet, resnet18, resnet18_cifar, vgg11, lenet5, or from
# outside: torchvision:NAME, FILE.py:FACTORY (the file is run, and FACTORY in it is called to make the model)
ACTIVATION = None  # of mlp: relu, sigmoid, tanh, gelu (None: sigmoid)
DEPTH = None  # hidden layers of mlp (None: 2)
WIDTH = None  # units in a hidden layer of mlp (None: 256)
NUM_CLASSES = 10  # outputs of the head, K
MEAN = None  # mean of the pixels by which images are normalised for the model, e.g. 0.485,0.456,0.406 (None: 0)
STD = None  # standard deviation of the same pixels (None: 1)

# training
EPOCHS = 1  # passes over the images; 0 calibrates BatchNorm's statistics, and trains nothing
TRAIN_BATCH = 128  # images in a step of Adam
LR = 1e-3  # step size of Adam
FLIP = True  # mirror each image with a chance of one half
SEED = 0  # one seed for weights, order and flips
DEVICE = "auto"  # cpu, cuda, cuda:1, ...; auto: cuda where there is one
OUT = "victim.safetensors"  # where the checkpoint goes, .safetensors or .npz

# ----------------------------------------------------------------------------------------------------
# Training

FLAGS = read_flags(Path(__file__), globals())


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    settings: argparse.Namespace,
    epoch: int,
) -> float:
    """Train one epoch by Adam on images (N, C, H, W) in [0, 1] with labels (N,); return the mean loss.

    Layers are in training mode, and the model's own forward pass is that of eval mode, which is attacked: some models
    put out more than their logits in training mode.
    """
    generator = stream(settings.seed, f"epoch {epoch}")
    total = 0.0
    for layer in model.modules():
        if not any(layer.children()):
            layer.train()
    batches = _minibatches(torch.randperm(len(images), generator=generator), settings.train_batch)
    for batch in tqdm(batches, desc=f"epoch {epoch + 1}", unit="step", leave=False, dynamic_ncols=True):
        x = images[batch]
        if settings.flip:
            mirrored = torch.rand(len(x), generator=generator) < 0.5
            x = torch.where(mirrored.to(x.device)[:, None, None, None], x.flip(3), x)
        loss = nn.functional.cross_entropy(logits_of(model, x), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += float(loss.detach()) * len(batch)
    model.eval()
    return total / len(images)


@torch.no_grad()
def calibrate(model: nn.Module, images: Tensor, size: int) -> int:
    """Make the running statistics of BatchNorm those of images (N, C, H, W), in batches of about `size`.

    The statistics of a few steps of training would still be mostly those of a new model. Dropout is off.

    Returns:
        The number of BatchNorm layers.
    """
    norms = batchnorms(model)
    momenta = {layer: layer.momentum for layer in norms}
    for layer in norms:
        layer.reset_running_stats()
        layer.train()
        layer.momentum = None  # the mean of all batches
    if norms:
        for batch in _minibatches(torch.arange(len(images)), size):
            model(images[batch])
    for layer, momentum in momenta.items():
        layer.momentum = momentum
        layer.eval()
    return len(norms)


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """Logits (B, K) of images (B, C, H, W); a model of two classes may put out one logit z, which stands for [0, z]."""
    logits = model(images)
    return torch.cat([torch.zeros_like(logits), logits], 1) if logits.shape[1] == 1 else logits


def _minibatches(order: Tensor, size: int) -> list[Tensor]:
    """The order (N,) in parts of `size`; a single image at the end, which BatchNorm refuses, joins the part before."""
    parts = list(order.split(size))
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


def accuracy(model: nn.Module, images: Tensor, labels: Tensor, size: int) -> float:
    """The share of images (N, C, H, W) whose largest logit is that of their label (N,)."""
    with torch.no_grad():
        logits = torch.cat([logits_of(model, part) for part in images.split(size)])
    return float((logits.argmax(1) == labels).double().mean())


def train_and_write(model: nn.Module, batch: Batch, settings: argparse.Namespace) -> None:
    """Train the model epoch by epoch, and write a checkpoint of it after each one.

    Raises:
        ValueError: no images are left to learn, the model's own code raises something, or the loss is not finite.
        OSError: the checkpoint cannot be written.
    """
    device = next(model.parameters()).device
    images, labels = batch.images.to(device), batch.labels.to(device)
    order = torch.randperm(len(images), generator=stream(settings.seed, "held out"))
    held, learned = order[: round(settings.hold_out * len(order))], order[round(settings.hold_out * len(order)) :]
    if len(learned) < 2:
        raise ValueError(f"--hold_out {settings.hold_out}: {len(learned)} of {len(order)} images are left to learn")
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr)
    for epoch in range(max(1, settings.epochs)):
        loss, told = 0.0, []
        with blamed(f"{settings.model} cannot be trained:"):
            if settings.epochs:
                loss = train(model, optimizer, images[learned], labels[learned], settings, epoch)
                told.append(f"epoch {epoch + 1}: loss {loss:.3f}")
            norms = calibrate(model, images[learned], settings.train_batch)
            if not settings.epochs:
                told.append(f"not trained: {norms} BatchNorm layers have the statistics of {len(learned)} images")
            if len(held):
                right = accuracy(model, images[held], labels[held], settings.train_batch)
                told.append(f"{100 * right:.1f} % of {len(held)} held-out images right")
        if not math.isfinite(loss):
            raise ValueError(
                f"--lr {settings.lr:g}: the loss is not finite after epoch {epoch + 1}: set a smaller step"
            )
        write_tensors(settings.out, model.state_dict())
        print(", ".join(told))


@contextmanager
def seeded(model: nn.Module, seed: int) -> Iterator[None]:
    """Dropout draws from the global generators: within the block they are the seed's, and behind it as before."""
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(stream(seed, "dropout").initial_seed())
        yield


@lasting_output
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Exit status: 0 done, 2 wrong input."""
    try:
        given = vars(build_parser(FLAGS, __doc__, prog=Path(__file__).name).parse_args(argv))
        settings = argparse.Namespace(**({flag.name: flag.default for flag in FLAGS} | given))
        checked_name(settings.out)
        source = open_source(settings.dataset, settings.data_path, train=True)
        batch = load_batch(
            source,
            range(len(source)),
            labels="dataset",
            num_classes=settings.num_classes,
            generator=stream(settings.seed, "labels"),
            image_size=sides(settings.image_size) if settings.image_size else None,
        )
        for note in batch.notes:
            print(f"note: {note}")
        model = build_model(
            settings.model,
            image_shape=tuple(batch.images.shape[1:]),
            num_classes=settings.num_classes,
            generator=stream(settings.seed, "model"),
            **model_options(settings),
        ).to(choose_device(settings.device))
        with seeded(model, settings.seed):
            train_and_write(model, batch, settings)
    except (ValueError, OSError) as error:
        return refused(Path(__file__).name, error)
    print(f"checkpoint: {settings.out}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
