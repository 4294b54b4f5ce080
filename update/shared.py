"""The one object between client and server.

`SharedUpdate` holds what an honest-but-curious server has (the averaged gradient, the model that the server sent out,
the batch size, the image shape) and nothing of the images or labels.
"""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from torch import Tensor, nn

from network.parameters import trainable
from update import checked
from update.batchnorm import batch_moments, before_averaging
from update.defences import Defences
from update.evidence import Evidence
from update.storage import StorageError, read_tensors, write_tensors
from update.training import FEDSGD, LocalTraining

FORMAT = "magia-update-1"
FACTS = "update"  # the name of the text that describes the tensors
SECTIONS = ("gradient", "weight", "statistic")  # the first part of a tensor's name in the file
MOST = 10**6  # no batch, side or number of classes in a file is larger


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
        tensors, text = read_tensors(path, wanted=is_of_update)
        return cls.of(tensors, text, str(path))

    @classmethod
    def of(cls, tensors: dict[str, Tensor], text: dict[str, str], source: str) -> "SharedUpdate":
        """The update in a file that `save` wrote, from the file's tensors and text.

        Raises:
            StorageError: as in `load`; the message calls the file `source`.
        """
        return cls.stated(text, source).holding(tensors, source)

    @classmethod
    def stated(cls, text: dict[str, str], source: str) -> "SharedUpdate":
        """The facts of the update in a file that `save` wrote, from the file's text; its tensors are still missing.

        Raises:
            StorageError: they are none; the message calls the file `source`.
        """
        try:
            facts = checked.mapping(checked.json_object(text.get(FACTS, "null")), "it", ("format", "model"))
            if facts["format"] != FORMAT:
                raise StorageError(f"its format is {str(facts['format'])[:40]!r}")
            training = LocalTraining.stated(facts.get("training", {}))
            num_classes = checked.whole(facts.get("num_classes"), "num_classes", 2, MOST)
            training.loss.check(num_classes)
            return cls(
                gradients={},
                weights={},
                model=checked.word(facts["model"], "model"),
                batch_size=checked.whole(facts.get("batch_size"), "batch_size", 1, MOST),
                image_shape=_shape(facts.get("image_shape")),
                num_classes=num_classes,
                options=dict(checked.mapping(facts.get("options", {}), "options")),
                defence=str(Defences.parse(checked.word(facts.get("defence", "none"), "defence"))),
                training=training,
            )
        except ValueError as error:
            reason = f"is not a shared update ({FORMAT}) as --save_update writes it: {error}"
            raise StorageError(f"{source} {reason}") from None

    def holding(self, tensors: dict[str, Tensor], source: str) -> "SharedUpdate":
        """The update with the tensors of its file.

        Raises:
            StorageError: there are no gradients, or `check` refuses a tensor; the message calls the file `source`.
        """
        sections = {f"{section}s": _section(tensors, f"{section}/") for section in SECTIONS}
        update = replace(self, **sections)
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
        is_clipped = self.training.is_gradient and self.training.optimiser.clip is not None
        return is_clipped or Defences.parse(self.defence).rescale

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

    def batch_moments(self, model: nn.Module) -> dict[nn.Module, tuple[Tensor, Tensor]]:
        """Mean and variance by which the client's batch was normalised, by layer; empty where nothing tells them.

        Of several steps they are not known: what is shared is a mean over these.

        Raises:
            ValueError: the statistics are not of the model's layers.
        """
        shared = self.batch_statistics(model) if self.training.is_one_step else ()
        like = next(model.parameters())
        return batch_moments(model, shared, like.new_zeros(self.batch_size, *self.image_shape)) if shared else {}

    def targets(self, model: nn.Module) -> tuple[Tensor, ...]:
        """The gradients in the order, dtype and place of `model`'s trainable parameters.

        Raises:
            ValueError: names or shapes differ from the model's.
        """
        parameters = trainable(model)
        if parameters.keys() != self.gradients.keys():
            odd = sorted(parameters.keys() ^ self.gradients.keys())
            raise ValueError(f"update and model {self.model!r} disagree on parameters: {', '.join(odd)}")
        if not set(self.training.hidden) <= dict(model.named_parameters()).keys() - parameters.keys():
            raise ValueError(f"hidden parameters of the update are none of model {self.model!r}'s, or are shared")
        for name, parameter in parameters.items():
            if parameter.shape != self.gradients[name].shape:
                raise ValueError(
                    f"gradient {name!r} has shape {tuple(self.gradients[name].shape)}, "
                    f"the model's parameter {tuple(parameter.shape)}"
                )
        return tuple(self.gradients[name].to(parameter) for name, parameter in parameters.items())


def is_of_update(name: str) -> bool:
    """Whether a file of `save` has a tensor of this name."""
    return name.partition("/")[0] in SECTIONS


def _shape(value: object) -> tuple[int, int, int]:
    """(C, H, W) of an image, from a file."""
    channels, height, width = checked.sequence(value, "image_shape", 3)
    return tuple(checked.whole(side, "image_shape", 1, MOST) for side in (channels, height, width))


def _section(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
