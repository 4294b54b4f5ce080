"""The threat model of a run in words: what the attacker was assumed to know, and what the client did."""

from collections.abc import Callable, Mapping
from pathlib import Path

from update.declared import declared

OPTIMISED = "optimise"


def assumptions(config: Mapping) -> list[dict[str, str]]:
    """Each `topic` and its state `here`, from a run's settings; facts missing in a received update are unknown."""
    return [{"topic": topic, "here": here(config)} for topic, here in ROWS.items()]


def _attacker(config: Mapping) -> str:
    return "An honest-but-curious server. It follows the protocol, and looks at the one averaged update that it gets."


def _model(config: Mapping) -> str:
    return f"{config['model']} with {config['num_classes']} classes, known in full: the server sent it out."


def _weights(config: Mapping) -> str:
    if config["weights"]:
        return f"Known: those in {Path(config['weights']).name}."
    if config["update"]:
        return "Known: as they came with the update, or with the model."
    return f"Known: random ones, from seed {config['seed']}. A trained network may give away more, or less."


def _batch(config: Mapping) -> str:
    images = "1 image" if config["batch_size"] == 1 else f"{config['batch_size']} images"
    return f"{images}. The server is taken to know how many, where the ranks of its gradients do not say it."


def _images(config: Mapping) -> str:
    size = str(config.get("image_size") or "")
    side = f", {size} pixels{' (height x width)' if 'x' in size else ' a side'}" if size else ""
    scaled = " They are normalised as the flags say." if config["mean"] or config["std"] else ""
    return f"Their shape is known{side}; their pixels are known to lie between 0 and 1.{scaled}"


def _labels(config: Mapping) -> str:
    of_client = {
        "random": " The client's are drawn at random, not the images' own.",
        "unique": " The client's are drawn at random without repetition, not the images' own.",
    }.get(config["labels"], "")
    if config["label_strategy"] == OPTIMISED:
        return f"Not known: they are read from the update or found with the images.{of_client}"
    if config["label_strategy"] == "known":
        return f"Granted to the attack, without their order.{of_client}"
    return f"Not known: read from the update as published ({config['label_strategy']}).{of_client}"


def _loss(config: Mapping) -> str:
    smoothing = config.get("label_smoothing")
    smoothed = f", with label smoothing {smoothing:g}" if smoothing else ""
    weights = config.get("class_weights")
    averaged = f"averaged over the batch with class weights {', '.join(f'{w:.3g}' for w in weights)}" if weights else ""
    return f"{LOSSES[config.get('loss') or 'cross_entropy']}{smoothed}, {averaged or 'averaged over the batch'}."


def _training(config: Mapping) -> str:
    """How the client trained; settings that the client does not have, or the update does not say, are left out."""
    training = declared(config)
    order = " Which images are in which step is not known." if training.shuffle and training.passes > 1 else ""
    said = str(training)
    return f"{said[0].upper()}{said[1:]}; these settings are known.{order}"


LOSSES = {
    "cross_entropy": "Cross-entropy with one label for each image",
    "bce": "Binary cross-entropy of each class by itself, averaged over the classes",
    "mse": "Squared errors of the logits, averaged over the classes",
}
BATCH_NORM = {
    "eval": "In eval mode, where the model has any: with running statistics, which the server knows.",
    "train": "In training mode, where the model has any: with the batch's statistics; the running ones are shared too.",
    "train_private": "In training mode, where the model has any: with the batch's statistics, which are not shared.",
}


def _batch_norm(config: Mapping) -> str:
    frozen = config.get("bn_frozen")
    return BATCH_NORM[config.get("bn") or "eval"] + (f" In eval mode: {frozen}." if frozen else "")


def _defence(config: Mapping) -> str:
    hidden = config.get("hidden")
    return _applied(config) + (f" Encrypted, so that the server does not see it: {hidden}." if hidden else "")


def _applied(config: Mapping) -> str:
    if config["update"]:
        applied = f" On top of it, {config['defence']} was applied here." if config["defence"] else ""
        declared = config.get("defended")
        known = f"The client is said to have applied {declared}." if declared else ""
        return f"{known or 'What the client did to the update is not known.'}{applied}"
    if config["defence"] == "none":
        return "None. The update is seen alone, without secure aggregation."
    return f"{config['defence']}, applied by the client before it shares the update."


def _budget(config: Mapping) -> str:
    limits = [f"{config['n_iter']:,} steps"]
    limits += [f"{config['max_evals']:,} evaluations"] if config["max_evals"] else []
    limits += [f"{config['max_seconds']:g} seconds"] if config["max_seconds"] else []
    return f"At most {', '.join(limits)}, on {config['device']}. A real attacker may spend more."


ROWS: dict[str, Callable[[Mapping], str]] = {
    "The attacker": _attacker,
    "Model": _model,
    "Weights": _weights,
    "Batch": _batch,
    "Images": _images,
    "Labels": _labels,
    "Loss": _loss,
    "Local training": _training,
    "BatchNorm": _batch_norm,
    "Defence": _defence,
    "Effort": _budget,
}
