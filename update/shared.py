"""The one object between client and server.

`SharedUpdate` holds what an honest-but-curious server has (the averaged gradient, the model that the server sent out,
the batch size, the image shape) and nothing of the images or labels.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import Tensor, nn

from network.parameters import trainable
from update.defences import Defences
from update.evidence import Evidence
from update.storage import StorageError, read_tensors, write_tensors
from update.training import FEDSGD, LocalTraining, before_averaging

FORMAT = "magia-update-1"
FACTS = "update"  # the name of the text that describes the tensors


@dataclass(frozen=True)
class SharedUpdate:
    """One averaged update as the server receives it, with the model behind the update.

    Attributes:
        gradients: averaged gradient, by parameter name; frozen parameters have none. After several local steps the
            gradient is the mean along the way, see `update.training`.
        weights: state dict of the model that the server sent out; empty if the file did not bring the weights.
        model: name of the architecture in `network.zoo.MODELS`, or of a model from outside.
        batch_size: number of images averaged over, of all clients where several were summed.
        image_shape: (C, H, W) of one image.
        num_classes: K.
        options: further settings of the architecture, as in `network.zoo.OPTIONS`, and its normalisation.
        defence: the defences that the clients applied, as in `update.defences`; defences are public.
        training: how the client trained.
        statistics: BatchNorm's running statistics after training, by buffer name, where the client shares them.
        evidence: what the update says of how it was made, see `update.evidence`; not saved.
        notes: what was assumed when the update and the model's weights were read, in sentences; a file has none.
    """

    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    model: str
    batch_size: int
    image_shape: tuple[int, int, int]
    num_classes: int
    options: dict[str, object] = field(default_factory=dict)
    defence: str = "none"
    training: LocalTraining = FEDSGD
    statistics: dict[str, Tensor] = field(default_factory=dict)
    evidence: tuple[Evidence, ...] = ()
    notes: tuple[str, ...] = ()

    def save(self, path: str | Path) -> None:
        """Write the update to a `.safetensors` or `.npz` file.

        Raises:
            StorageError: the name has another ending, or the file cannot be written.
        """
        tensors = {f"gradient/{name}": tensor for name, tensor in self.gradients.items()}
        tensors |= {f"weight/{name}": tensor for name, tensor in self.weights.items()}
        tensors |= {f"statistic/{name}": tensor for name, tensor in self.statistics.items()}
        facts = {
            "format": FORMAT,
            "model": self.model,
            "batch_size": self.batch_size,
            "image_shape": list(self.image_shape),
            "num_classes": self.num_classes,
            "options": self.options,
            "defence": self.defence,
            "training": asdict(self.training),
        }
        write_tensors(path, tensors, {FACTS: json.dumps(facts)})

    @classmethod
    def load(cls, path: str | Path) -> "SharedUpdate":
        """Read an update that `save` wrote.

        Raises:
            StorageError: the file is missing, damaged, not an update, or refused by `check`.
        """
        return cls.of(*read_tensors(path), str(path))

    @classmethod
    def of(cls, tensors: dict[str, Tensor], text: dict[str, str], source: str) -> "SharedUpdate":
        """The update in a file that `save` wrote, from the file's tensors and text.

        Raises:
            StorageError: as in `load`; the message calls the file `source`.
        """
        try:
            facts = json.loads(text[FACTS])
            if facts["format"] != FORMAT:
                raise KeyError(facts["format"])
            update = cls(
                gradients=_section(tensors, "gradient/"),
                weights=_section(tensors, "weight/"),
                model=str(facts["model"]),
                batch_size=int(facts["batch_size"]),
                image_shape=tuple(int(side) for side in facts["image_shape"]),
                num_classes=int(facts["num_classes"]),
                options=dict(facts.get("options", {})),
                defence=str(Defences.parse(facts.get("defence", "none"))),
                training=LocalTraining.of(facts.get("training", {})),
                statistics=_section(tensors, "statistic/"),
            )
        except (AttributeError, KeyError, TypeError, ValueError):
            raise StorageError(f"{source} is not a shared update ({FORMAT}) as --save_update writes it") from None
        sizes = {"batch_size": [update.batch_size], "image_shape": update.image_shape}
        for name, numbers in sizes.items():
            if not all(1 <= number <= 10**6 for number in numbers) or (name == "image_shape" and len(numbers) != 3):
                raise StorageError(f"{source}: {name} {facts[name]} makes no sense")
        if not update.gradients:
            raise StorageError(f"{source}: the update holds no gradients")
        update.training.check(update.batch_size)
        update.check(source)
        return update

    def check(self, source: str) -> None:
        """Refuse tensors that no client sends, whether they were computed or read from a file.

        Raises:
            StorageError: a tensor that holds no real numbers, or NaN or infinity, or gradients that are all zero.
        """
        tensors = [(f"gradient of {name!r}", tensor) for name, tensor in self.gradients.items()]
        for name, tensor in tensors:
            if not tensor.is_floating_point():
                raise StorageError(f"{source}: the {name} must hold floating-point numbers, not {tensor.dtype}")
        others = {"weight": self.weights, "statistic": self.statistics}
        tensors += [
            (f"{kind} {name!r}", tensor) for kind, section in others.items() for name, tensor in section.items()
        ]
        for name, tensor in tensors:
            if not tensor.isfinite().all():
                raise StorageError(f"{source}: the {name} is not finite")
        if not any(gradient.any() for gradient in self.gradients.values()):
            raise StorageError(f"{source}: all gradients are zero, nothing can be reconstructed from them")

    @property
    def overruled(self) -> set[str]:
        """The names of the flags that the evidence has taken the place of."""
        return {piece.overrules for piece in self.evidence}

    @property
    def is_rescaled(self) -> bool:
        """Whether the clients may have shortened the update below the length of an averaged gradient."""
        return Defences.parse(self.defence).rescale

    def strength(self) -> float:
        """Root mean square over all entries of the gradients."""
        squares = sum(float(gradient.double().square().sum()) for gradient in self.gradients.values())
        return (squares / sum(gradient.numel() for gradient in self.gradients.values())) ** 0.5

    def batch_statistics(self, model: nn.Module) -> tuple[Tensor, ...]:
        """The minibatches' BatchNorm statistics, as in `update.training.Trained`; empty where they are not shared.

        Raises:
            ValueError: the statistics are not of the model's layers.
        """
        return (
            before_averaging(model, self.statistics, self.training.steps) if self.training.batchnorm == "train" else ()
        )

    def targets(self, model: nn.Module) -> tuple[Tensor, ...]:
        """The gradients in the order, dtype and place of `model`'s trainable parameters.

        Raises:
            ValueError: names or shapes differ from the model's.
        """
        parameters = trainable(model)
        if parameters.keys() != self.gradients.keys():
            odd = sorted(parameters.keys() ^ self.gradients.keys())
            raise ValueError(f"update and model {self.model!r} disagree on parameters: {', '.join(odd)}")
        for name, parameter in parameters.items():
            if parameter.shape != self.gradients[name].shape:
                raise ValueError(
                    f"gradient {name!r} has shape {tuple(self.gradients[name].shape)}, "
                    f"the model's parameter {tuple(parameter.shape)}"
                )
        return tuple(self.gradients[name].to(parameter) for name, parameter in parameters.items())


def _section(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
