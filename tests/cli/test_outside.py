"""Models and updates from outside, from the command line."""

import pickle
import sys

import numpy as np
import pytest
import torch
from conftest import SIGNALS, config_of, generator, metrics_of
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import main_MAGIA_sel as magia
from data import load_batch, open_source
from network.parameters import trainable
from network.vision import torchvision
from network.zoo import build_model
from update.gradients import averaged_gradient
from update.received import KINDS, averaged_gradients, recognised
from update.storage import read_tensors
from update.training import LocalTraining

NET = """
import torch
from torch import nn
from torch.nn import functional

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.fc1 = nn.Linear(8 * 8 * 8, 40)
        self.fc2 = nn.Linear(40, 10)

    def forward(self, x):
        x = functional.relu(self.bn(self.conv(x)))
        x = x.view(-1, 8 * 8 * 8)
        return self.fc2(functional.relu(self.fc1(x)))

def paired():
    return Paired()

class Paired(Net):
    def forward(self, x):
        logits = super().forward(x)
        return torch.cat([logits[:, :5], logits[:, 5:]], 1)

def broken():
    raise RuntimeError("no weights\\nhere")

def leaving():
    raise SystemExit("bye")

def number():
    return 3

def narrow():
    return nn.Sequential(nn.Flatten(), nn.Linear(27, 10))

def pair():
    class Pair(Net):
        def forward(self, x):
            return super().forward(x), x
    return Pair()

class Hidden(Net):
    # changes a tensor in place that it uses again, which its graph does not show
    def forward(self, x):
        x = self.bn(self.conv(x))
        functional.relu_(x)
        return self.fc2(functional.relu(self.fc1(x.view(-1, 8 * 8 * 8))))

class Deciding(Net):
    # what neither torch.fx nor vmap can take
    def forward(self, x):
        return super().forward(x if x.mean() > 0 else -x)

def pooled():
    return nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(3 * 8 * 8, 40), nn.ReLU(), nn.Linear(40, 10))

def endless():
    net = Net()
    net.fc1.weight.data[0, 0] = float("inf")
    return net

def overwriting():
    class Overwriting(Net):
        def forward(self, x):
            y = functional.relu(super().forward(x))
            z = y.square()
            y += 1
            return z
    return Overwriting()

class Squeezing(Net):
    def forward(self, x):
        return super().forward(x).squeeze()

class Dividing(Net):
    def forward(self, x):
        return super().forward(x) / 0

class Sized(Net):
    def __init__(self, width, depth, *rest, bias=True):
        super().__init__()

class Drawing(Net):
    def forward(self, x):
        return super().forward(functional.dropout(x))

def narrow_norm():
    return nn.Sequential(nn.Flatten(), nn.Linear(768, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Linear(40, 10))
"""
FLAGS = ["--num_classes", 10, "--image_size", 16]


@pytest.fixture
def net_file(tmp_path):
    path = tmp_path / "net.py"
    path.write_text(NET)
    return path


def test_a_model_from_a_file_is_walked_down_to_its_pixels(cli, net_file):
    run = cli("--model", f"{net_file}:Net", "--mean", "0.5,0.4,0.3", "--std", 0.2, *SIGNALS, "--labels", "unique")
    assert (run / "layers.csv").read_text().count("images told apart") >= 1
    assert metrics_of(run)["signals_found"] == 3
    assert metrics_of(run)["label_accuracy"] == 1
    assert config_of(run)["mean"] == [0.5, 0.4, 0.3]


def test_normalised_pixels_are_known_exactly(cli):
    flags = ["--model", "mlp", "--activation", "relu", "--mean", "0.5,0.4,0.3", "--std", "0.2,0.3,0.4", *SIGNALS]
    run = cli(*flags, "--save_update", cli.folder / "u.npz")
    assert metrics_of(run)["psnr_mean"] > 80
    again = cli("--update", cli.folder / "u.npz", *SIGNALS, name="again")
    assert config_of(again)["std"] == [0.2, 0.3, 0.4]
    assert metrics_of(again)["signals_found"] == 3


def test_a_model_without_a_linear_head_gets_the_loop_and_says_why(cli, net_file):
    run = cli("--model", f"{net_file}:paired", *SIGNALS)
    (line,) = [line for line in cli.out.splitlines() if line.startswith("signals")]
    assert "in the forward pass of Paired: torch.cat joins several tensors" in line
    assert metrics_of(run)["steps"] == 4
    assert "torch.cat joins several tensors" in cli.error("--model", f"{net_file}:paired", "--signals", "on")


def test_what_a_graph_hides_is_not_walked_and_its_head_is_read(cli, net_file):
    cli("--model", f"{net_file}:Hidden", *SIGNALS, "--labels", "unique")
    assert "3 of 3 images told apart, down to the inputs of fc2" in cli.out
    cli("--model", f"{net_file}:Hidden", "--signals", "off", name="off")
    assert "its graph is not what it computes" in cli.out


def test_a_walk_that_ends_at_the_images_says_so(cli, net_file):
    run = cli("--model", f"{net_file}:pooled", *SIGNALS, "--labels", "unique")
    assert metrics_of(run)["signals_found"] == 3


def test_a_file_may_import_its_neighbours(cli, net_file):
    net_file.rename(net_file.parent / "neighbour_of_it.py")
    net_file.write_text("def make():\n    from neighbour_of_it import Net\n    return Net()\n")
    before = list(sys.path)
    cli("--model", f"{net_file}:make")
    assert sys.path == before


def test_one_value_for_each_channel_is_enough_for_batch_statistics(cli, net_file):
    cli("--model", f"{net_file}:narrow_norm", "--bn", "train")


def test_examples_have_gradients_of_their_own_in_any_model(cli, net_file):
    cli("--model", f"{net_file}:Deciding", "--defence", "dpsgd:1:0.1")


def test_a_torchvision_model_of_grouped_convolutions_is_explained(cli, capsys):
    flags = ["--model", "torchvision:mobilenet_v2", "--image_size", "64", "--batch_size", "1", "--num_classes", "1000"]
    assert magia.main(["--explain", *flags, "--save_dir", str(cli.folder)]) == 0
    out = capsys.readouterr().out
    assert "a pool puts out less than it takes in" in out
    assert "no effect here" not in out
    assert "the deepest inputs to be expected exactly: the inputs of classifier.1" in out


def test_explain_knows_the_mode_of_batchnorm(cli, capsys):
    said = {}
    for mode in ("eval", "train"):
        flags = ["--model", "resnet18_cifar", "--num_classes", "10", "--batch_size", "4", "--bn", mode]
        assert magia.main(["--explain", *flags, "--save_dir", str(cli.folder)]) == 0
        said[mode] = capsys.readouterr().out
    assert "BatchNorm in training mode" in said["train"]
    assert "the inputs of body.layer2.0.conv2" in said["train"]  # where a reading of true images ends
    assert (cli.folder / "explain_resnet18_cifar_B4_32_bn_train.csv").is_file()


def test_explain_says_which_flags_it_leaves_out(cli, capsys):
    flags = ["--num_classes", "10", "--frozen", "head", "--defence", "sign", "--save_dir", str(cli.folder)]
    assert magia.main(["--explain", *flags]) == 0
    assert "no effect here: --frozen, --defence (the forecast" in capsys.readouterr().out


def test_a_torchvision_model_is_explained(cli, capsys):
    flags = ["--model", "torchvision:resnet18", "--num_classes", "20", "--image_size", "64", "--batch_size", "2"]
    assert magia.main(["--explain", *flags, "--channels", "3", "--save_dir", str(cli.folder)]) == 0
    out = capsys.readouterr().out
    assert "torchvision:resnet18, B=2, 64x64, 20 classes" in out
    assert (cli.folder / "explain_torchvision_resnet18_B2_64.csv").is_file()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--model {}:broken", ["broken raises RuntimeError: no weights"]),
        ("--model {}:leaving", ["leaving raises SystemExit: bye"]),
        ("--model {}:number", ["number returns int, not a torch.nn.Module"]),
        ("--model {}:none", ["has no function 'none'"]),
        ("--model {}x.py:Net", ["no such file"]),
        ("--model {}:narrow", ["narrow does not take images of 3x16x16"]),
        ("--model {}:pair", ["puts out tuple"]),
        ("--model {}:endless", ["endless: weight 'fc1.weight' is not finite"]),
        ("--model {}:Squeezing --batch_size 1", ["takes 2 images of 3x16x16 and not 1", "a tensor of shape (10,)"]),
        ("--model {}:Dividing", ["Dividing puts out numbers that are not finite"]),
        ("--model {}:Sized", ["Sized needs width, depth, and is called without arguments"]),
        ("--model {}:Drawing", ["other logits for the same images"]),
        ("--model {}:overwriting", ["overwriting cannot be differentiated"]),
        ("--update=", ["--update is empty"]),
        ("--weights=", ["--weights is empty"]),
        ("--model {}:Net --num_classes 11", ["has 10 classes, not 11: set --num_classes 10"]),
        ("--model {}:Net --mean 1,2", ["--mean has 2 numbers: images have 3 channels"]),
        ("--model {}:Net --depth 3", ["--depth is no option"]),
        ("--model {}", ["net.py' is none of lenet", "FILE.py:FACTORY"]),
        ("--model torchvision:resnet19", ["no classifier 'resnet19'", "resnet18"]),
        ("--model torchvision:fasterrcnn_resnet50_fpn", ["no classifier"]),
        ("--std 0", ["--std", "above 0"]),
        ("--mean 1,x", ["--mean", "'x'"]),
        ("--update_kind weights", ["--update_kind", "goes with --update"]),
    ],
)
def test_wrong_models_are_one_line(cli, net_file, flags, words):
    message = cli.error(*flags.format(net_file).split())
    assert all(word in message for word in words), message


def test_a_file_that_cannot_be_parsed_is_one_line(cli, tmp_path):
    (tmp_path / "bad.py").write_text("def broken(:\n")
    assert "bad.py:broken raises SyntaxError" in cli.error("--model", f"{tmp_path / 'bad.py'}:broken")


def test_a_file_is_run_only_where_the_user_names_it(cli, net_file, tmp_path):
    marker = tmp_path / "was_run"
    update = tmp_path / "u.npz"
    run = cli("--model", f"{net_file}:Net", "--save_update", update)
    net_file.write_text(f"open({str(marker)!r}, 'w').close()\n" + NET)
    assert "run only if you name it" in cli.error("--update", update)
    assert "run only if you name it" in cli.error("--resume", run)
    assert not marker.exists()
    moved = net_file.rename(tmp_path / "moved.py")
    cli("--update", update, "--model", f"{moved}:Net", name="named")
    assert marker.exists()


def test_a_file_is_the_same_however_it_is_spelt(cli, net_file):
    run = cli("--model", f"{net_file}:Net")
    other = f"{net_file.parent / '..' / net_file.parent.name / net_file.name}:Net"
    cli("--resume", run, "--model", other, "--n_iter", 5)
    assert metrics_of(run)["steps"] == 5
    assert "began with" in cli.error("--resume", run, "--model", f"{net_file}:Tokens")


# ----------------------------------------------------------------------------------------------------
# Updates


class Client:
    """A batch, a model with BatchNorm, what one step of plain SGD makes of it, and the flags that name all this."""

    def __init__(self, folder, model="resnet18_cifar", rate=0.1, batch_size=3):
        self.folder, self.rate = folder, rate
        self.model = build_model(model, image_shape=(3, 16, 16), num_classes=10, generator=generator(1))
        data = open_source("sample", None)
        how = {"labels": "random", "num_classes": 10, "generator": generator(), "image_size": 16}
        batch = load_batch(data, range(batch_size), **how)
        gradients = averaged_gradient(self.model, batch.images, batch.labels)
        self.gradients = dict(zip(trainable(self.model), gradients, strict=True))
        self.state = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        save_file(self.state, folder / "server.safetensors")
        self.flags = ["--model", model, "--weights", folder / "server.safetensors", *FLAGS]

    def tensors(self, kind):
        """What the client sends: by the names of parameters, or for weights of the whole state."""
        if kind == "gradient":
            return dict(self.gradients)
        if kind == "difference":
            return {name: -self.rate * gradient for name, gradient in self.gradients.items()}
        new = {name: (self.state[name].double() - self.rate * g.double()).float() for name, g in self.gradients.items()}
        return self.state | new

    def write(self, tensors, form):
        """The file in one of the forms of `FORMS`."""
        path = self.folder / f"update_{form.replace('.', '_')}{form[form.index('.') :]}"
        if form == "named.safetensors":
            save_file(tensors, path)
        elif form == "named.npz":
            np.savez(path, **{name: tensor.numpy() for name, tensor in tensors.items()})
        elif form == "numbered.npz":
            np.savez(path, *(tensor.numpy() for tensor in tensors.values()))
        else:
            torch.save(list(tensors.values()) if form == "listed.pt" else tensors, path)
        return path

    def words(self, kind):
        """The flags for an update of this kind."""
        rate = [] if kind == "gradient" else ["--local_lr", self.rate]
        return [*self.flags, "--update_kind", kind, *rate]


FORMS = ("named.safetensors", "named.npz", "numbered.npz", "named.pt", "listed.pt")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_form_and_kind_is_the_same_gradient(tmp_path, form, kind):
    client = Client(tmp_path)
    path = client.write(client.tensors(kind), form)
    tensors, notes = recognised(read_tensors(path)[0], client.model, (3, 16, 16), str(path))
    assert notes == []
    found = averaged_gradients(tensors, client.model, kind, LocalTraining(rate=client.rate).combination(), str(path))
    assert list(found) == list(client.gradients)
    for name, gradient in client.gradients.items():
        if kind == "gradient":
            assert torch.equal(found[name], gradient)
        rounding = 2e-7 * gradient.abs()
        if kind == "weights":
            rounding = rounding + 6e-8 * client.state[name].abs() / client.rate
        assert ((found[name] - gradient).abs() <= rounding + 1e-12).all()


names = st.text("abcdefgh._/0123456789", min_size=1, max_size=12).filter(lambda n: not n.startswith("metadata/"))
kinds = st.sampled_from([torch.float32, torch.float64, torch.float16])


@given(
    st.dictionaries(names, st.tuples(kinds, st.lists(st.integers(0, 3), max_size=3), st.integers(0, 99)), min_size=1)
)
def test_every_form_brings_every_bit_back(tmp_path_factory, shapes):
    tensors = {
        name: torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(kind)
        for name, (kind, shape, seed) in shapes.items()
        if not name.startswith("arr_")
    }
    folder = tmp_path_factory.mktemp("bits")
    for form in FORMS:
        numbered = form in ("numbered.npz", "listed.pt")
        expected = {f"arr_{i}": t for i, t in enumerate(tensors.values())} if numbered else tensors
        if not expected:
            continue
        path = Client.write(type("At", (), {"folder": folder}), tensors, form)
        found, _ = read_tensors(path)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)


@pytest.mark.parametrize(("form", "kind"), zip(("named.safetensors", "numbered.npz", "listed.pt"), KINDS, strict=True))
def test_an_update_from_outside_is_attacked_like_one_from_inside(tmp_path, capsys, form, kind):
    client = Client(tmp_path, model="convnet")
    path = client.write(client.tensors(kind), form)
    words = ["--update", path, *client.words(kind), "--max_evals", 4, "--save_dir", tmp_path, "--run_name", "run"]
    assert magia.main(list(map(str, words))) == 0
    assert capsys.readouterr().out.startswith(f"{path}: 3 images 3x16x16\nconvnet, 10 classes")
    assert metrics_of(tmp_path / "run")["signals_found"] == 3


def test_a_frozen_parameter_is_named(cli, tmp_path):
    client = Client(tmp_path, model="lenet")
    tensors = client.tensors("gradient")
    del tensors["conv2.bias"]
    words = ["--update", client.write(tensors, "named.npz"), *client.flags]
    assert "'conv2.bias' is missing; name it with --frozen" in cli.error(*words)
    cli(*words, "--frozen", "conv2.bias")


def without(tensors, name):
    return {key: tensor for key, tensor in tensors.items() if key != name}


def with_nan(tensors):
    tensors["conv2.weight"][0, 0, 0, 0] = float("nan")
    return tensors


WRONG = {
    "a missing name": (lambda t: without(t, "conv2.weight"), ["'conv2.weight' is missing"]),
    "another model": (
        lambda t: {f"{name}.body": tensor for name, tensor in t.items()},
        ["none of the model's parameters", ".body'", "begins with 'conv1.", "the model with 'conv1.weight'"],
    ),
    "one name too many": (lambda t: t | {"extra": torch.ones(1)}, ["'extra' is not in the model"]),
    "transposed": (
        lambda t: t | {"head.weight": t["head.weight"].T.contiguous()},
        ["'head.weight' has shape (192, 10), the model needs (10, 192): it is transposed"],
    ),
    "NaN": (with_nan, ["gradient of 'conv2.weight' is not finite"]),
    "zeros": (lambda t: {name: 0 * tensor for name, tensor in t.items()}, ["all gradients are zero"]),
    "other classes": (
        lambda t: t | {"head.weight": torch.ones(7, 192), "head.bias": torch.ones(7)},
        ["'head.weight' has shape (7, 192), the model needs (10, 192)"],
    ),
    "whole numbers": (lambda t: t | {"conv1.bias": torch.ones(12).int()}, ["'conv1.bias' must hold floating-point"]),
    "no name": (lambda t: {}, ["none of the model's parameters", "holds nothing"]),
}


@pytest.mark.parametrize("form", ["named.npz", "named.safetensors", "named.pt"])
@pytest.mark.parametrize("case", WRONG)
def test_an_update_that_does_not_fit_is_one_line(cli, tmp_path, case, form):
    client = Client(tmp_path, model="lenet")
    change, words = WRONG[case]
    path = client.write(change(client.tensors("gradient")), form)
    message = cli.error("--update", path, *client.flags)
    assert all(word in message for word in [path.name, *words]), message
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize("form", ["named.npz", "named.safetensors", "named.pt"])
def test_weights_that_are_not_finite_are_named(cli, tmp_path, form):
    client = Client(tmp_path, model="lenet")
    weights = client.write(with_nan(client.state), form).rename(tmp_path / f"weights{form[form.index('.') :]}")
    words = ["--update", client.write(client.tensors("gradient"), form), *client.flags, "--weights", weights]
    assert "weight 'conv2.weight' is not finite" in cli.error(*words)


RENAMED = (("named.npz", ".pt"), ("named.pt", ".npz"), ("named.safetensors", ".bin"))


@pytest.mark.parametrize(("form", "ending"), RENAMED)
def test_a_file_of_another_kind_than_its_name_says_which_kind_it_is(cli, tmp_path, form, ending):
    client = Client(tmp_path, model="lenet")
    written = client.write(client.tensors("gradient"), form)
    update = written.rename(tmp_path / f"renamed{ending}")
    assert f"of a file that ends in {written.suffix}: rename it" in cli.error("--update", update, *client.flags)


def test_a_batch_size_that_the_ranks_contradict_is_refused(cli, tmp_path):
    client = Client(tmp_path, model="lenet")
    words = ["--update", client.write(client.tensors("gradient"), "named.npz"), *client.flags]
    too_few = [*words, "--batch_size", 2]
    assert "--batch_size 2: the update's ranks are those of 3 images" in cli.error(*too_few, "--signals", "auto")
    cli(*too_few, "--signals", "off")
    assert "contradiction: its ranks are those of 3 images, --batch_size says 2" in cli.out


def test_a_batch_that_rounding_may_hide_a_part_of_is_asked_for(cli, tmp_path, capsys):
    client = Client(tmp_path, model="lenet", rate=1e-5)
    words = ["--update", client.write(client.tensors("weights"), "named.npz"), *client.words("weights")]
    assert magia.main(list(map(str, words))) == 2
    assert "the update is of at least 3 images, and noise may hide others: set --batch_size" in capsys.readouterr().err
    assert "ranks are those of at least 3 images" in cli.error(*words, "--batch_size", 2, "--signals", "auto")
    cli(*words, "--batch_size", 5)
    assert "ranks" not in cli.out


def test_a_received_update_is_not_saved_again(cli, tmp_path):
    client = Client(tmp_path, model="lenet")
    words = ["--update", client.write(client.tensors("gradient"), "named.npz"), *client.flags]
    assert "--save_update" in cli.error(*words, "--save_update", tmp_path / "again.npz")


def test_sparse_tensors_are_refused_by_name(cli, tmp_path):
    client = Client(tmp_path, model="lenet")
    tensors = client.tensors("gradient")
    tensors["head.weight"] = tensors["head.weight"].to_sparse()
    message = cli.error("--update", client.write(tensors, "named.pt"), *client.flags)
    assert "'head.weight' is not a dense tensor" in message


def test_bytes_in_another_order_are_the_same_numbers(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.arange(5, dtype=">f4"))
    assert torch.equal(read_tensors(tmp_path / "a.npz")[0]["a"], torch.arange(5, dtype=torch.float32))


class Touch:
    """What would leave a trace if it were unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("ending", [".npz", ".safetensors", ".pt"])
def test_a_pickle_is_refused_and_not_executed(cli, tmp_path, ending):
    client, marker = Client(tmp_path, model="lenet"), tmp_path / "was_run"
    for name, write in {
        "plain": lambda path: path.write_bytes(pickle.dumps({"conv1.weight": Touch(marker)})),
        "torch": lambda path: path.open("wb").write(b"") or torch.save({"conv1.weight": Touch(marker)}, path),
        "object": lambda path: save_objects(path, marker),
    }.items():
        path = tmp_path / f"{name}{ending}"
        write(path)
        assert path.name in cli.error("--update", path, *client.flags)
    assert not marker.exists()


def save_objects(path, marker):
    with path.open("wb") as file:
        np.savez(file, **{"conv1.weight": np.array([Touch(marker)], dtype=object)})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_file_is_one_line(cli, tmp_path, form, share):
    client = Client(tmp_path, model="lenet")
    path = client.write(client.tensors("gradient"), form)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert f"{path.name} is damaged" in cli.error("--update", path, *client.flags)


@pytest.mark.parametrize(
    ("left_out", "words"),
    [
        (["--image_size"], ["--image_size", "--channels"]),
        (["--weights"], ["--weights"]),
        (["--local_lr"], ["needs --local_lr"]),
    ],
)
def test_what_the_file_does_not_say_is_asked_for(tmp_path, capsys, left_out, words):
    client = Client(tmp_path, model="lenet")
    given_words = list(
        map(str, ["--update", client.write(client.tensors("weights"), "named.npz"), *client.words("weights")])
    )
    for name in left_out:
        at = given_words.index(name)
        del given_words[at : at + 2]
    assert magia.main([*given_words, "--save_dir", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--local_lr 0.1", ["--local_lr", "--update_kind"]),
        ("--channels 1", ["'conv1.weight'", "(12, 1, 5, 5)"]),
        ("--model mlp", ["'hidden1.weight' is missing"]),
        ("--defence magic", ["'magic'"]),
        ("--frozen tail", ["tail"]),
    ],
)
def test_flags_that_do_not_fit_the_file_are_one_line(cli, tmp_path, flags, words):
    client = Client(tmp_path, model="lenet")
    path = client.write(client.tensors("gradient"), "named.npz")
    message = cli.error("--update", path, *client.flags, *flags.split())
    assert all(word in message for word in words), message


def test_numbers_with_a_gap_name_it(cli, tmp_path):
    client = Client(tmp_path, model="lenet")
    tensors = list(client.tensors("gradient").values())
    np.savez(tmp_path / "gap.npz", **{f"arr_{i + (i > 2)}": t.numpy() for i, t in enumerate(tensors)})
    assert "arr_3 is missing" in cli.error("--update", tmp_path / "gap.npz", *client.flags)
    np.savez(tmp_path / "few.npz", *(t.numpy() for t in tensors[:-1]))
    assert "7 arrays without names, the model needs 8" in cli.error("--update", tmp_path / "few.npz", *client.flags)


def test_a_last_layer_that_torchvision_starts_at_zero_is_drawn_with_a_note(cli, monkeypatch):
    models = torchvision().models
    sides = {"image_size": 16, "patch_size": 4, "num_layers": 1, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64}
    monkeypatch.setattr(
        models, "get_model", lambda *_, num_classes, **__: models.VisionTransformer(**sides, num_classes=num_classes)
    )
    flags = ["--model", "torchvision:vit_b_16", "--signals", "on", "--batch_size", 1]
    run = cli(*flags, "--save_update", cli.folder / "u.npz")
    assert "note: torchvision starts the last layer of this model at zero" in cli.out
    assert metrics_of(run)["psnr_mean"] > 60
    cli("--update", cli.folder / "u.npz", *flags, name="again")
    assert "starts the last layer" not in cli.out
