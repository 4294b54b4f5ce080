"""Attack updates whose clients are not the declared one, and write docs/foreign-updates.md: python -m bench.foreign.

Words behind the command restrict it to rows whose network or client has one of them: python -m bench.foreign ConvNet
"class weights". The page is written after each row, and keeps the others with the commit that measured them.

Each client is written in plain PyTorch and knows nothing of this project. Of a client of one step the attack is told
what a user would say who knows no better: plain SGD on the mean cross-entropy. Clients of several steps stand in
`foreign_steps`, some of them declared rightly, some wrongly.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.foreign_steps import Features, Trainer, trainers
from bench.remeasure import program
from bench.results_page import markdown_table
from data import load_batch, open_source
from judge.metrics import guess_psnr, mean_psnr
from judge.verdict import is_certain
from network.head import features_of
from network.zoo import build_model
from update.storage import write_tensors

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "foreign-updates.md"
SIDE, CLASSES, EVALUATIONS = 16, 10, 300
STEPWISE = 60  # evaluations where the client makes several steps: each takes as long as they all
WITHIN = 5.0  # times its expected error that an image which is called certain may be off
NETWORKS: Mapping[str, tuple[str, int, Mapping]] = {  # name, images, options
    "MLP, ReLU": ("mlp", 3, {"activation": "relu", "width": 64}),
    "LeNet": ("lenet", 4, {}),
    "ConvNet": ("convnet", 4, {}),
    "GroupNorm": (f"{Path(__file__).parent / 'foreign_steps.py'}:group_norm", 4, {}),
}
Loss = Callable[[Tensor, Tensor], Tensor]
Change = Callable[[dict[str, Tensor], dict[str, Tensor]], dict[str, Tensor]]  # of gradients, given the weights
cross_entropy = nn.functional.cross_entropy


@dataclass(frozen=True)
class Client:
    """One way to train: the loss, what is done to the gradient afterwards, and how images are normalised."""

    name: str
    loss: Loss = cross_entropy
    change: Change = lambda gradients, weights: gradients
    normalises: tuple[float, float] = (0.0, 1.0)

    def sent(self, model: nn.Module, images: Tensor, labels: Tensor, features: Features) -> tuple[dict, str, Tensor]:
        """The tensors that it sends by name, the flags that tell of them, and the features (B, d) of its images."""
        names, parameters = zip(*model.named_parameters(), strict=True)
        gradients = torch.autograd.grad(self.loss(model(images), labels), parameters)
        weights = {n: p.detach() for n, p in zip(names, parameters, strict=True)}
        words = f"--batch_size={len(images)}"
        return self.change(dict(zip(names, gradients, strict=True)), weights), words, features(model, images).detach()


def _whole(labels: Tensor) -> Tensor:
    return nn.functional.one_hot(labels, CLASSES).float()


def _times(factor: float) -> Change:
    return lambda gradients, weights: {name: factor * g for name, g in gradients.items()}


def _decayed(gradients: dict[str, Tensor], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: g + 5e-4 * weights[name] for name, g in gradients.items()}


def _each(change: Callable[[Tensor], Tensor]) -> Change:
    return lambda gradients, weights: {name: change(g) for name, g in gradients.items()}


def _pruned(gradients: dict[str, Tensor], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    sizes = torch.cat([g.abs().flatten() for g in gradients.values()])
    least = sizes.topk(len(sizes) // 10).values[-1]
    return {name: torch.where(g.abs() >= least, g, 0) for name, g in gradients.items()}


def _weighted_sum(logits: Tensor, labels: Tensor) -> Tensor:
    return (torch.linspace(0.5, 2, CLASSES)[labels] * cross_entropy(logits, labels, reduction="none")).mean()


def _focal(logits: Tensor, labels: Tensor) -> Tensor:
    own = logits.softmax(1).gather(1, labels[:, None])[:, 0]
    return ((1 - own) ** 2 * cross_entropy(logits, labels, reduction="none")).mean()


def _mixed(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits, 0.7 * _whole(labels) + 0.3 * _whole(labels.roll(1)))


CLIENTS = (
    Client("mean of cross-entropy, as declared"),
    Client("sum of cross-entropy", lambda z, y: cross_entropy(z, y, reduction="sum")),
    Client("half of cross-entropy", lambda z, y: 0.5 * cross_entropy(z, y)),
    Client("scaled by 65,536 for mixed precision", change=_times(65536.0)),
    Client("old minus new weights: the sign turned", change=_times(-1.0)),
    Client("weight decay 5e-4", change=_decayed),
    Client("label smoothing 0.1", lambda z, y: cross_entropy(z, y, label_smoothing=0.1)),
    Client("binary cross-entropy", lambda z, y: nn.functional.binary_cross_entropy_with_logits(z, _whole(y))),
    Client("squared errors", lambda z, y: nn.functional.mse_loss(z, _whole(y))),
    Client("class weights 0.5 to 2", lambda z, y: cross_entropy(z, y, weight=torch.linspace(0.5, 2, CLASSES))),
    Client("class weights 0.5 to 2, divided by B", _weighted_sum),
    Client("focal loss", _focal),
    Client("mixup", _mixed),
    Client("images normalised by 0.5 and 0.5", normalises=(0.5, 0.5)),
    Client("pruned to a tenth", change=_pruned),
    Client("signs alone", change=_each(lambda g: g.sign() * g.abs().mean())),
    Client("rounded to bfloat16", change=_each(lambda g: g.bfloat16().float())),
)


def measured(network: str, client: Client | Trainer) -> dict[str, str]:
    """One row of the table."""
    name, count, options = NETWORKS[network]
    count = sum(client.sizes) if isinstance(client, Trainer) else count
    model = build_model(name, image_shape=(3, SIDE, SIDE), num_classes=CLASSES, generator=_seeded(1), **options)
    draw = {"labels": "dataset", "num_classes": CLASSES, "generator": _seeded(0), "image_size": SIDE}
    batch = load_batch(open_source("sample", None), range(count), **draw)
    mean, std = client.normalises
    images = (batch.images - mean) / std
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_tensors(place / "weights.safetensors", model.state_dict())
        features = features_of(model, images).detach()
        tensors, told, in_steps = client.sent(model, images, batch.labels, features_of)
        write_tensors(place / "update.safetensors", tensors)
        words = [f"--{key}={value}" for key, value in options.items()] + told.split()
        words += [f"--update={place / 'update.safetensors'}", f"--weights={place / 'weights.safetensors'}", "--quiet"]
        words += [f"--model={name}", f"--num_classes={CLASSES}", f"--image_size={SIDE}"]
        words += [f"--max_evals={STEPWISE if isinstance(client, Trainer) else EVALUATIONS}"]
        words += [f"--save_dir={place}", "--run_name=run"]
        ended = subprocess.run([sys.executable, ROOT / "main_MAGIA_sel.py", *words], capture_output=True, text=True)
        if ended.returncode:
            said = ended.stderr.strip().splitlines()[-1]
            return {"network": network, "client": client.name, "read": said.replace(str(place), "")}
        facts = json.loads((place / "run" / "audit.json").read_text())
        kept = torch.load(place / "run" / "checkpoint.pt", weights_only=True)
        found = open_source("folder", str(place / "run" / "images"))
        pictures = load_batch(found, range(len(facts["images"])), **(draw | {"labels": "random"})).images
    certain, false = _certainty(facts, kept["signals"], in_steps if kept["in_steps"] else features)
    guess = sum(guess_psnr(batch.images)) / count
    return {
        "network": network,
        "client": client.name,
        "read": "; ".join(_said(facts["evidence"])) or "nothing",
        "told apart": f"{facts['figures']['signals_found']} of {count}",
        "certain": str(certain),
        "false": str(false),
        "PSNR": f"{mean_psnr(batch.images, pictures):.1f}" if len(pictures) == count else "",
        "guess": f"{guess:.1f}",
    }


def _said(evidence: list[Mapping]) -> Iterator[str]:
    """Topic and figure of each piece; contradictions are set in bold."""
    for piece in evidence:
        text = piece["topic"] + ("" if piece["figure"] is None else f" {piece['figure']:.4g}")
        yield f"**{text}**" if piece["contradicts"] else text


def _certainty(facts: Mapping, signals: Mapping | None, features: Tensor) -> tuple[int, int]:
    """How many images are called certain, and how many of these are off by more than WITHIN times their error."""
    certain = [is_certain(image["confidence"]) for image in facts["images"]]
    if signals is None or not any(certain):
        return 0, 0
    values = signals["values"].flatten(1)
    errors = torch.tensor([image["uncertainty"] for image in facts["images"][: len(values)]], dtype=torch.float64)
    distances = torch.cdist(values, features.to(values)).min(1).values / values.norm(dim=1)
    sure = torch.tensor(certain[: len(values)])
    return int(sure.sum()), int((sure & (distances > WITHIN * errors)).sum())


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


AHEAD = f"""# What does the program make of clients that are not the declared one?

`python -m bench.foreign` makes this page. Each client is plain PyTorch, and trains on the first images of the bundled
set, {SIDE} pixels, {CLASSES} classes, an untrained network of `network/zoo.py` or one with GroupNorm. Of a client of
one step the attack is told plain SGD on the mean cross-entropy, and has {EVALUATIONS} evaluations. Clients of several
steps go through four images in two minibatches at rate 0.05 unless said otherwise, and send their weights; the
attack is told what the name says, and has {STEPWISE} evaluations.

- **read**: what the update says of its client, with the figure; in bold what contradicts the declared client, so that
  nothing is called certain ([update-format.md](update-format.md#what-the-update-says-of-itself)).
- **certain**: images whose features are called certain; **false**: those of them that are off by more than {WITHIN:g}
  times their expected error.
- **PSNR** in dB, and that of a guess. **commit**: of the program that measured the row.
"""


HEADS = ("network", "client", "read", "told apart", "certain", "false", "PSNR", "guess", "commit")


def kept_rows(page: str) -> dict[tuple[str, str], dict[str, str]]:
    """The rows of the page's table by network and client, those that no client makes any more left out."""
    lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in page.splitlines() if line[:1] == "|"]
    if not lines:
        return {}
    rows = (dict(zip(lines[0], line, strict=False)) for line in lines[2:])
    found = {(row["network"], row["client"]): row for row in rows if "network" in row}
    return {key: found[key] for key in _every_row() if key in found}


def _every_row() -> list[tuple[str, str]]:
    return [(network, client.name) for network in NETWORKS for client in clients_of(network)]


def clients_of(network: str) -> tuple[Client | Trainer, ...]:
    """The clients that are measured on a network."""
    return (*CLIENTS, *trainers(network)) if network != "GroupNorm" else (CLIENTS[0], *trainers(network))


def written(rows: Mapping[tuple[str, str], Mapping[str, str]]) -> str:
    """The page with these rows, in the order of networks and clients."""
    cells = ([rows[key].get(head, "") for head in HEADS] for key in _every_row() if key in rows)
    return f"{AHEAD}\n{markdown_table([HEADS, *cells])}\n"


def main(words: Sequence[str] | None = None) -> int:
    """Measure the rows that the words name, or all, and write the page after each of them."""
    words, commit = sys.argv[1:] if words is None else words, program()["commit"]
    rows = kept_rows(PAGE.read_text(encoding="utf-8")) if PAGE.exists() else {}
    for network in NETWORKS:
        for client in clients_of(network):
            if not words or any(word in network or word in client.name for word in words):
                row = measured(network, client) | {"commit": commit}
                rows[network, client.name] = row
                print(row, flush=True)
                PAGE.write_text(written(rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
