"""Local training by the names of the flags that declare it, and back."""

from collections.abc import Mapping

from update.loss import Loss
from update.optimiser import LocalOptimiser
from update.training import LocalTraining

# Of the optimiser: attribute, by flag.
RULES = {
    "local_optimizer": "name",
    "local_momentum": "momentum",
    "local_nesterov": "nesterov",
    "local_weight_decay": "weight_decay",
    "local_prox": "prox",
    "local_schedule": "schedule",
    "local_clip": "clip",
    "local_betas": "betas",
    "local_eps": "eps",
}
FLAGS = ("local_steps", "local_batches", "local_lr", *RULES, "local_shuffle", "local_precision")


def declared(settings: Mapping) -> LocalTraining:
    """The training that settings declare, by the names of their flags; those that are missing have their defaults.

    Raises:
        ValueError: settings that do not go together.
    """
    held = {name: value for name, value in settings.items() if value is not None}
    batches, plain = held.get("local_batches", 1), LocalTraining()
    sizes = tuple(map(int, batches.split(","))) if isinstance(batches, str) else None
    rules = {attribute: held[flag] for flag, attribute in RULES.items() if flag in held}
    if "betas" in rules:
        rules["betas"] = tuple(map(float, rules["betas"].split(",")))
    return LocalTraining(
        held.get("local_steps", 1),
        batches if sizes is None else len(sizes),
        held.get("local_lr"),
        held.get("bn", plain.batchnorm),
        _loss(held),
        LocalOptimiser(**rules),
        sizes,
        held.get("local_shuffle", plain.shuffle),
        precision=held.get("local_precision", plain.precision),
        frozen_norms=tuple(held["bn_frozen"].split(",")) if "bn_frozen" in held else (),
    )


def _loss(held: Mapping) -> Loss:
    """Raises ValueError: settings that do not go together, or class weights that are not those of all classes."""
    plain = Loss()
    weights = tuple(held.get("class_weights", ()))
    loss = Loss(held.get("loss", plain.name), held.get("label_smoothing", plain.smoothing), weights)
    if "num_classes" in held:
        loss.check(held["num_classes"])
    return loss


def flags_of(training: LocalTraining) -> dict[str, object]:
    """The settings that declare a training; an order that is known of it has no flag."""
    batches = training.batches if training.sizes is None else ",".join(map(str, training.sizes))
    rules = {flag: getattr(training.optimiser, attribute) for flag, attribute in RULES.items()}
    return {
        "local_steps": training.steps,
        "local_batches": batches,
        "local_lr": training.rate,
        **rules,
        "local_betas": ",".join(map(str, training.optimiser.betas)),
        "local_shuffle": training.shuffle,
        "local_precision": training.precision,
        "loss": training.loss.name,
        "label_smoothing": training.loss.smoothing,
        "class_weights": list(training.loss.weights) or None,
        "bn": training.batchnorm,
        "bn_frozen": ",".join(training.frozen_norms) or None,
    }
