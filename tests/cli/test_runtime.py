"""How many threads a run takes: as many as its batches keep busy."""

import pytest
import torch

from cli.runtime import enough_threads
from network.zoo import build_model


def threads_within(name: str, batch_size: int, before: int) -> int:
    generator = torch.Generator().manual_seed(0)
    model = build_model(name, image_shape=(3, 32, 32), num_classes=10, generator=generator)
    torch.set_num_threads(before)
    with enough_threads(model, batch_size, (3, 32, 32)):
        return torch.get_num_threads()


@pytest.mark.parametrize(
    ("name", "batch_size", "threads"), [("lenet", 16, 1), ("resnet18", 4, 1), ("resnet18_cifar", 4, 2)]
)
def test_small_nets_take_one_thread_and_large_ones_what_there_is(name, batch_size, threads):
    assert threads_within(name, batch_size, before=2) == threads
    assert torch.get_num_threads() == 2


def test_nobody_gets_more_threads_than_were_set():
    assert threads_within("resnet18_cifar", 64, before=1) == 1


def test_an_attack_that_fails_leaves_the_threads_as_they_were():
    generator = torch.Generator().manual_seed(0)
    model = build_model("lenet", image_shape=(3, 32, 32), num_classes=10, generator=generator)
    torch.set_num_threads(2)
    with pytest.raises(RuntimeError), enough_threads(model, 1, (3, 32, 32)):
        raise RuntimeError
    assert torch.get_num_threads() == 2


def test_a_run_takes_its_own_number_and_gives_it_back(cli, monkeypatch):
    seen = []
    monkeypatch.setattr("main_MAGIA_sel.attack", lambda *_: seen.append(torch.get_num_threads()) or "n_iter")
    torch.set_num_threads(2)
    cli(expect=1)
    assert seen == [1]
    assert torch.get_num_threads() == 2
