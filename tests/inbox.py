"""A folder of updates as a platform's clients send them."""

from pathlib import Path

import torch
from conftest import generator

from client.victim import share_update
from network.zoo import build_model

QUICKLY = ["--n_iter", "2", "--inner_iter", "2", "--threads", "1"]  # flags of an audit of these


def inbox(folder: Path, count: int) -> Path:
    """Fill the folder with the updates client0.npz ... of so many clients, with a batch of one or two images each."""
    model = build_model("lenet", image_shape=(3, 16, 16), num_classes=10, generator=generator())
    folder.mkdir(parents=True)
    for number in range(count):
        images = torch.rand(1 + number % 2, 3, 16, 16, generator=generator(number))
        labels = torch.arange(len(images)) + number % 9
        share_update(model, "lenet", images, labels, 10).save(folder / f"client{number}.npz")
    return folder
