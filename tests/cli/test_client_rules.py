"""The client's rules from the command line: its optimiser, its minibatches, its order, its arithmetic."""

import pytest
import torch
from conftest import config_of, metrics_of, pictures_of
from torch import nn

from update.declared import declared, flags_of
from update.optimiser import LocalOptimiser
from update.shared import SharedUpdate
from update.training import LocalTraining

NET = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(768, 20), nn.Sigmoid(), nn.Linear(20, 10))
"""
RULES = [
    "--local_momentum 0.9 --local_nesterov --local_weight_decay 0.01 --local_schedule cosine",
    "--local_prox 0.1 --local_schedule step:2:0.5",
    "--local_clip 0.5 --local_precision bfloat16",
    "--local_optimizer adamw --local_schedule 1,0.5 --local_betas 0.8,0.95 --local_eps 1e-6",
    "--local_optimizer adam --local_schedule warmup:2:cosine --local_betas 0.9,0.999",
    "--local_optimizer adam --local_shuffle --local_weight_decay 0.1",
]
STEPS = ["--local_steps", 4, "--local_lr", 0.05, "--local_batches", "2,1"]


@pytest.mark.parametrize("rules", RULES)
def test_every_rule_travels_in_the_updates_file(cli, rules):
    flags = [*STEPS, *rules.split(), "--save_update", cli.folder / "u.npz"]
    first = cli(*flags, name="first")
    again = cli("--update", cli.folder / "u.npz", name="again")
    assert [p.tolist() for p in pictures_of(first)] == [p.tolist() for p in pictures_of(again)]
    training = declared(config_of(again))
    assert training == declared(config_of(first)) == SharedUpdate.load(cli.folder / "u.npz").training
    assert declared(flags_of(training)) == training
    assert training.sizes == (2, 1)
    assert str(training.optimiser) in cli.out
    assert "--local_lr 0.3: the update has 0.05" in cli.error("--update", cli.folder / "u.npz", "--local_lr", 0.3)


def sent_out(cli):
    """The model of net.py, as server.pt has it."""
    (cli.folder / "net.py").write_text(NET)
    made = {}
    exec(NET, made)
    model = made["net"]()
    torch.save(model.state_dict(), cli.folder / "server.pt")
    return model


def test_a_client_with_momentum_is_unrolled_from_its_weights_alone(cli):
    """The same update without the rules is matched far worse."""
    model = sent_out(cli)
    images, labels = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([1, 5, 3])
    optimiser = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.05)
    for _ in range(3):
        for part in (slice(0, 2), slice(2, 3)):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(images[part]), labels[part]).backward()
            optimiser.step()
    torch.save(model.state_dict(), cli.folder / "client.pt")
    sent = ["--update", cli.folder / "client.pt", "--update_kind", "weights", "--weights", cli.folder / "server.pt"]
    known = ["--model", f"{cli.folder / 'net.py'}:net", "--batch_size", 3, "--local_lr", 0.1, "--local_steps", 6]
    rules = ["--local_batches", "2,1", "--local_momentum", 0.9, "--local_weight_decay", 0.05]
    run = ["--n_iter", 5, "--inner_iter", 10]
    left = {}
    for name, words in (("true", rules), ("plain", ["--local_batches", "2,1"])):
        left[name] = metrics_of(cli(*sent, *known, *words, *run, name=name))["final_loss"]
    assert left["true"] < 0.1 * left["plain"]


def test_weight_decay_of_one_step_is_taken_off_a_difference(cli):
    model = sent_out(cli)
    optimiser = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.5)
    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    nn.functional.cross_entropy(model(images), torch.tensor([4])).backward()
    optimiser.step()
    torch.save(model.state_dict(), cli.folder / "client.pt")
    sent = ["--update", cli.folder / "client.pt", "--update_kind", "weights", "--weights", cli.folder / "server.pt"]
    known = ["--model", f"{cli.folder / 'net.py'}:net", "--batch_size", 1, "--local_lr", 0.1, "--signals", "auto"]
    figures = metrics_of(cli(*sent, *known, "--local_weight_decay", 0.5))
    assert figures["pixels_read"] == 1
    assert "decay" not in {piece["topic"] for piece in figures["evidence"]}


def test_explain_names_the_clients_rules(cli):
    cli("--explain", "--local_steps", 4, "--local_lr", 0.1, "--local_momentum", 0.9)
    assert "4 steps of SGD, momentum 0.9 at rate 0.1 on the whole batch" in cli.out


def test_rules_that_change_nothing_are_named(cli):
    cli("--local_momentum", 0.9, "--local_weight_decay", 0.1, "--local_shuffle")
    for flag in ("--local_momentum", "--local_weight_decay", "--local_shuffle"):
        assert f"no effect here: {flag}" in cli.out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--local_optimizer adam", "--local_optimizer adam needs --local_lr"),
        ("--local_optimizer sgdm", "'sgdm' is none of sgd, adam, adamw"),
        ("--local_momentum 1", "--local_momentum 1: at least 0 and below 1"),
        ("--local_momentum 0.9 --local_optimizer adam --local_lr 0.1", "not of adam"),
        ("--local_nesterov", "--local_nesterov needs --local_momentum"),
        ("--local_weight_decay -1", "--local_weight_decay"),
        ("--local_weight_decay 20 --local_steps 2 --local_lr 0.1", "must be below 1"),
        ("--local_prox nan", "--local_prox"),
        ("--local_clip 0", "--local_clip"),
        ("--local_schedule step", "--local_schedule 'step': choose one of constant"),
        ("--local_schedule warmup:0", "--local_schedule 'warmup:0': choose one of constant"),
        ("--local_betas 0.9 --local_optimizer adam --local_lr 0.1", "'0.9' is not two numbers"),
        ("--local_betas 0.9,1 --local_optimizer adam --local_lr 0.1", "'0.9,1' is not two numbers"),
        ("--local_betas 0.9,nan --local_optimizer adam --local_lr 0.1", "--local_betas"),
        ("--local_betas 0.5,0.9", "--local_betas, --local_eps: of --local_optimizer adam and adamw, not of sgd"),
        ("--local_eps 0 --local_optimizer adam --local_lr 0.1", "--local_eps"),
        ("--local_schedule 1,1,1 --local_steps 4 --local_lr 0.1", "3 factors, for 4 steps in 4 passes"),
        ("--local_batches 2,0", "--local_batches"),
        ("--local_batches 2,2 --local_steps 2 --local_lr 0.1", "minibatches of 4 images in all, of a batch of 3"),
        ("--local_batches 1,1 --local_steps 2 --local_lr 0.1", "1 of 3 images are in no step: --batch_size 2"),
        ("--local_precision half", "'half' is none of float32, bfloat16"),
        ("--local_precision bfloat16 --dtype float64", "autocast leaves float64 as it is"),
        ("--explain --local_batches 2,2 --local_steps 2 --local_lr 0.1", "minibatches of 4 images in all"),
    ],
)
def test_rules_that_cannot_be_are_one_line(cli, flags, words):
    assert words in cli.error(*flags.split())


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"optimiser": 3}, "training.optimiser 3 is not a mapping"),
        ({"optimiser": {"name": "lion"}}, "--local_optimizer 'lion'"),
        ({"optimiser": {"momentum": "high"}}, "training.optimiser.momentum 'high'"),
        ({"optimiser": {"lars": 1}}, "'lars', which is none of its facts"),
        ({"optimiser": {"clip": 0}}, "--local_clip 0"),
        ({"optimiser": {"name": "adam", "betas": 0.9}}, "training.optimiser.betas 0.9 is not a list of 2"),
        ({"optimiser": {"name": "adam", "betas": [0.9, "x"]}}, "training.optimiser.betas 'x'"),
        ({"optimiser": {"name": "adam", "betas": [0.9, 1]}}, "--local_betas 0.9,1"),
        ({"optimiser": {"name": "adam", "eps": 0}}, "--local_eps 0"),
        ({"shuffle": 1}, "training.shuffle 1 is not true or false"),
        ({"sizes": 3}, "training.sizes 3 is not a list"),
        ({"sizes": [2, 1]}, "the sizes of 1 minibatches"),
        ({"order": [[0, 1]], "steps": 2, "rate": 0.1}, "an order of 1 minibatches for 2 steps"),
        ({"precision": "float8"}, "--local_precision 'float8'"),
    ],
)
def test_facts_that_cannot_be_are_refused(facts, words):
    with pytest.raises(ValueError, match=words):
        LocalTraining.stated(facts)


def test_an_order_that_names_no_image_is_refused():
    with pytest.raises(ValueError, match="names an image that is none of 3"):
        LocalTraining(rate=0.1, order=((0, 1, 3),)).check(3)


def test_clipped_gradients_of_one_step_are_shared_clipped(cli):
    cli("--local_clip", 0.01, "--save_update", cli.folder / "u.npz")
    update = SharedUpdate.load(cli.folder / "u.npz")
    norm = sum(float(g.square().sum()) for g in update.gradients.values()) ** 0.5
    assert norm == pytest.approx(0.01, rel=1e-3)
    assert update.training.optimiser == LocalOptimiser(clip=0.01)


def test_the_gradient_of_one_clipped_step_is_read_as_that_of_a_clipping_defence(cli):
    flags = ["--labels", "unique", "--num_classes", 20, "--signals", "auto"]
    run = cli("--local_clip", 0.01, *flags)
    assert metrics_of(run)["signals_found"] == 3
    assert config_of(run)["scale"] > 1
    assert metrics_of(run)["unexplained"] < 1
