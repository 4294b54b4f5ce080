"""The meaning of a run's figures for the client, in words. Every threshold of a verdict stands here, with its reason.

With the truth at hand each image gets the first of these levels that it reaches:

exact         PSNR of at least EXACT_PSNR, and closer than a guess by at least MARGIN
recognisable  SSIM of at least RECOVERED_SSIM, and closer than a guess by at least MARGIN
traces        closer to the truth than a guess, by at least MARGIN
none          no closer than that: a guess is a flat picture in the image's own mean colour, or the mean of the batch's
              other images, whichever is better

Without the truth only the attack's own evidence decides:

read          the image's pixels were read from the update in closed form, to an expected error of WITHIN, and the image
              is `apart`
apart         the image's features were read from the update in closed form, with a confidence of at least CERTAIN
unknown       nothing vouches for the picture

A run gets the level of its most exposed image. But traces of no more than BY_CHANCE of the images are none, and a run
in which no step of the attack succeeded has `failed`: nothing follows from such a run.

MARGIN and BY_CHANCE come from matching the images of a batch, one to one, with pictures of other images: CIFAR-10's,
unchanged, blurred, or drawn towards their mean, 1 to 64 at a time. In the worst of these cases 5 % of the images gain
3 dB on a guess (20 % gain 1 dB), and of 2,600 images none becomes recognisable. SSIM alone would call some flat images
recognisable.
"""

import math
from collections.abc import Mapping, Sequence

from attack.read.error_bars import WITHIN
from judge.metrics import RECOVERED_SSIM

EXACT_PSNR = 20 * math.log10(255)  # 48.1 dB: the error's root mean square is one of the 255 steps of a pixel
MARGIN = 3.0  # dB: half the squared error of a guess
BY_CHANCE = 0.1  # share of images up to which traces are taken for chance: twice what was measured
CERTAIN = 0.999  # the confidence from which on a signal is called certain

FAILED = "failed"
JUDGED = ("exact", "recognisable", "traces", "none")  # with the truth, the worst for the client first
BELIEVED = ("read", "apart", "unknown")  # without it
NAMES = {
    "exact": "Exact",
    "recognisable": "Recognisable",
    "traces": "Traces",
    "none": "No better than a guess",
    "read": "Read in closed form",
    "apart": "Told apart",
    "unknown": "Not known",
    FAILED: "No verdict",
}
MEANINGS = {
    "exact": f"PSNR of at least {EXACT_PSNR:.1f} dB: the error is on average below one of the 255 steps of a pixel, "
    "and a guess is not as close",
    "recognisable": f"SSIM of at least {RECOVERED_SSIM}: a person sees what the image shows",
    "traces": f"closer to the truth than a guess by {MARGIN:g} dB or more, but not recognisable",
    "none": "no closer than a flat picture in the image's own mean colour, or the mean of the batch's other images",
    "read": f"the pixels follow from the update by linear algebra, to an expected error of {WITHIN:.0%} or less",
    "apart": f"the image's features follow from the update, {CERTAIN:.1%} sure to be within {WITHIN:.0%}",
    "unknown": "no truth to compare with, and nothing read that vouches for the picture",
}
LOWER_BOUND = (
    "A verdict is a lower bound. It says what this one attack got out of this update in this time. Where it fails, "
    "another attack, a better prior or more time may not: failure is not safety."
)


def level_of(psnr: float, ssim: float, guess: float) -> str:
    """The level of a reconstruction with the truth at hand, from its PSNR, its SSIM and the PSNR of a guess."""
    if psnr < guess + MARGIN:
        return "none"  # even at 100 dB: a blank picture is guessed without the update
    if psnr >= EXACT_PSNR:
        return "exact"
    return "recognisable" if ssim >= RECOVERED_SSIM else "traces"


def is_certain(confidence: float | None) -> bool:
    """Whether a signal of this confidence is called certain; None: no signal."""
    return confidence is not None and confidence >= CERTAIN


def belief_of(confidence: float | None, *, has_pixels: bool) -> str:
    """The level of a reconstruction without the truth, from the confidence of its signal (None: no signal)."""
    if not is_certain(confidence):
        return "unknown"
    return "read" if has_pixels else "apart"


def certified(figures: Mapping) -> float:
    """The share of the images whose pixels were read with certainty, and are exact where the truth is at hand.

    Args:
        figures: the content of metrics.json.
    """
    sure = figures["pixels_read"] if are_certain(figures["layers"]) else 0
    signals = figures["signals"][:sure]
    read = {j for j, own in enumerate(signals) if belief_of(own["confidence"], has_pixels=True) == "read"}
    if "psnr" in figures:
        matched = zip(figures["assignment"], figures["psnr"], strict=True)
        read &= {j for j, psnr in matched if psnr >= EXACT_PSNR}
    return len(read) / len(figures["labels"])


def are_certain(layers: Sequence[Mapping]) -> bool:
    """Whether the pixels, the inputs of the first layer, are known to WITHIN, by the rows of layers.csv."""
    return bool(layers) and layers[0]["uncertainty"] is not None and layers[0]["uncertainty"] <= WITHIN


def counts_of(levels: Sequence[str]) -> dict[str, int]:
    """How many images have each level, the worst for the client first."""
    scale = JUDGED if set(levels) <= set(JUDGED) else BELIEVED
    return {level: levels.count(level) for level in scale}


def verdict(counts: Mapping[str, int], figures: Mapping, *, granted_labels: bool = False) -> dict:
    """The verdict on a run: its level, a headline, and its meaning, sentence by sentence.

    Args:
        counts: images by level, see `counts_of`.
        figures: the content of metrics.json.
        granted_labels: whether the attack was told the labels.
    """
    total = sum(counts.values())
    if figures["final_loss"] is None and figures["ended_by"] != "exact":
        level, headline = FAILED, "The attack did not take a single step: no verdict"
        meaning = ["The pictures are those that it started from. Nothing follows for the update, in either direction."]
    else:
        level = next(level for level, count in counts.items() if count)
        if level == "traces" and counts[level] <= BY_CHANCE * total:
            level = "none"
        headline, sentence = _said(level, counts[level], total)
        meaning = [sentence, *_rest(level, counts)]
    meaning += _of_labels(figures, total, granted_labels) + _of_signals(figures, total) + _of_evidence(figures, total)
    if figures["ended_by"] in ("interrupt", "abort"):
        meaning.append("The attack was interrupted. Resumed, it may get further.")
    if figures["ended_by"] == "non-finite":
        meaning.append("The attack broke down on numbers that are not finite; what is shown is the best it had.")
    return {"level": level, "headline": headline, "meaning": meaning}


def _said(level: str, count: int, total: int) -> tuple[str, str]:
    """Headline and first sentence on `count` of `total` images of a level."""
    these = _images(count, total)
    is_are, its_their = ("is", "its") if count == 1 else ("are", "their")
    return {
        "exact": (
            f"{these} came out pixel for pixel",
            "Whoever receives this update holds these images. To send it is to send them.",
        ),
        "recognisable": (
            f"{these} {is_are} recognisable",
            "Whoever receives this update can see what these images show. Treat it as personal data where they are.",
        ),
        "traces": (
            f"Traces of {these[0].lower()}{these[1:]} came out, none recognisable",
            "What came out is closer to the truth than a guess: outlines or areas of colour. One image in twenty gets "
            "as far by chance; a stronger attack would start from here.",
        ),
        "none": (
            "No picture is better than a guess",
            "The reconstructions are no closer to the images than pictures that can be had without the update. That is "
            "what this attack reached with these settings, and no more than that.",
        ),
        "read": (
            f"{these} {is_are} read from the update, pixels and all",
            f"{its_their.capitalize()} pixels follow from the update by linear algebra that checks itself. Whoever "
            "receives it holds these images, though no truth was at hand to compare with.",
        ),
        "apart": (
            f"{these} {is_are} told apart with certainty",
            f"{its_their.capitalize()} features follow from the update, one by one, by equations that check "
            "themselves. How close the pictures are that fit them cannot be said without the truth: look at them.",
        ),
        "unknown": (
            "No image is told apart with certainty",
            "There was no truth to compare with. If a picture shows something, it leaked; if none does, nothing "
            "follows.",
        ),
    }[level]


def _rest(level: str, counts: Mapping[str, int]) -> list[str]:
    """A sentence that counts the images of other levels."""
    others = [f"{NAMES[name].lower()}: {count}" for name, count in counts.items() if count and name != level]
    return [f"The others are {'; '.join(others)}."] if others else []


def _of_labels(figures: Mapping, total: int, granted: bool) -> list[str]:
    if "label_accuracy" not in figures:
        return []
    if granted:
        return ["The attack was told the labels, so nothing is said of them."]
    right, guessed = (round(figures[name] * total, 1) for name in ("label_accuracy", "label_accuracy_guess"))
    return [f"{right:g} of {total} labels are right, of which the attack was told none; a guess has {guessed:g}."]


def _of_signals(figures: Mapping, total: int) -> list[str]:
    sure = sum(is_certain(signal["confidence"]) for signal in figures["signals"])
    if not figures["signals_found"]:
        return ["No single image's features could be read off the update; the pictures are what fits it best."]
    found = _images(figures["signals_found"], total)
    how = "all with certainty" if sure == figures["signals_found"] else f"{sure} of them with certainty"
    return [f"{found} {'was' if figures['signals_found'] == 1 else 'were'} told apart by features and label, {how}."]


def _of_evidence(figures: Mapping, total: int) -> list[str]:
    """What contradicts the assumptions, and how much of the update is left unexplained."""
    against = [piece["said"] for piece in figures["evidence"] if piece["contradicts"]]
    said = [f"The update contradicts what was assumed of it, so nothing is called certain: {each}." for each in against]
    left = figures["unexplained"]
    if left is not None:
        said.append(
            f"Trained on as was assumed, these pictures leave {percent(left)} of the update unexplained; "
            f"noise is {percent(figures['noise_share'])} of it."
        )
    if figures["replays"] is not None:
        is_explained = figures["explains_first_layer"] and not figures["replays"]
        in_part = figures["replays"] and 0 < figures["signals_found"] < total
        said.append(BY_FIRST_LAYER if is_explained else BY_THEMSELVES if in_part else CERTIFICATES[figures["replays"]])
    return said


BY_FIRST_LAYER = (
    "Which image was in which step is not known. The images make all of the first layer's movement in any order, and "
    "their pixels are whole steps of 1/255, which no mixture of images is: that is the certificate."
)
BY_THEMSELVES = (
    "The images that were told apart make their own parts of the update at the weights of their steps: that is their "
    "certificate, and says nothing of the others."
)
CERTIFICATES = {
    True: "The client's steps, made again on what was found, make the update: that is the certificate.",
    False: "The client's steps, made again on what was found, do not make the update, so nothing is called certain.",
}


def _images(count: int, total: int) -> str:
    if count == total:
        return "The one image" if total == 1 else f"All {total} images"
    return f"{count} of {total} images"


# ----------------------------------------------------------------------------------------------------
# Defences


def similarity_level(figures: Mapping, guesses: Sequence[float], told_apart: int) -> str | None:
    """The level of an attack on a defended update without the truth: `apart`, `same` or `other`.

    None where the undefended reconstructions are so flat or so alike that nothing in them could be seen again: the
    reconstructions of an attack that has hardly begun come out with any defence.

    Args:
        figures: lists `psnr` and `ssim` of each reconstruction from the undefended update and its match from the
            defended update.
        guesses: the PSNR of a guess of the undefended reconstructions, see `metrics.guess_psnr`.
        told_apart: images that the attack tells apart in the defended update.
    """
    if told_apart:
        return "apart"
    if min(guesses) > SHOWS:
        return None
    levels = map(level_of, figures["psnr"], figures["ssim"], guesses)
    return "same" if {"exact", "recognisable"} & set(levels) else "other"


SHOWS = 24.0  # PSNR of a guess up to which a picture shows something; a guess of 128 CIFAR-10 images has 9 to 23.5 dB
NOTHING_SHOWN = "not compared: the pictures that come out without a defence show nothing that could be seen again"
SIMILARITIES = {"same": "Same pictures", "other": "Other pictures"}
STOPPED = ("none", "other")  # levels at which a defence stopped this attack


def stops(rows: Sequence[Mapping], undefended: str) -> str:
    """A sentence on which of the defences stopped the attack, by the rows of the table.

    Args:
        rows: with `defence`, `level` and `change`, the relative distance that the defence moves the update.
        undefended: the level of the run without a defence.
    """
    if undefended in ("none", "unknown", FAILED):
        return "Without a defence the attack found nothing that is sure, so that there is nothing for one to stop."
    tried = [row for row in rows if row["level"] not in (None, FAILED)]
    stopping = [row for row in tried if row["level"] in STOPPED]
    if not tried:
        return "No defence was tried to the end."
    if not stopping:
        one, many = (
            "The one defence that was tried does not stop",
            f"None of the {len(tried)} defences that were tried stops",
        )
        return f"{one if len(tried) == 1 else many} this attack."
    mildest = min(stopping, key=lambda row: row["change"])
    return (
        f"The mildest defence that stops this attack is {mildest['defence']}: it moves the update by "
        f"{percent(mildest['change'])} of its length. What that costs in accuracy is not measured here, and an attack "
        "that takes longer, or another one, may not be stopped by it."
    )


def percent(share: float) -> str:
    """A share in percent, to two digits below ten."""
    return f"{100 * share:.2g}\u00a0%" if share < 0.1 else f"{100 * share:.0f}\u00a0%"
