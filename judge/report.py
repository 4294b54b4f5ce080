"""audit.json and report.html: the results of a run, the assumptions, and their meaning for the client.

The facts come from config.json and metrics.json. The page comes from the facts and the pictures in the run directory,
so the page can be written again when defences have been tried. The page is one file: it holds the pictures as data, and
needs no script and no network.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from judge import verdict
from judge.assumptions import assumptions
from judge.reading import read_json, read_regular
from judge.replacing import GENERATOR
from judge.run_directory import RunDirectory

SCHEMA = "magia-audit-1"
PLAIN = 96  # pixels a side up to which pictures are embedded as PNG: beyond, JPEG shows no less and is far smaller
QUALITY = 88  # of that JPEG
MOST = 1 << 26  # bytes of a picture that is embedded
FOLDERS = ("images", "truth")  # folders of single images
STRIP = 4  # pictures shown of a run under a defence

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
    auto_reload=False,  # a run ends with the templates of its own version
)


def brief(number: float | None) -> str:
    """An error for a person, to one digit; empty where the error is not known."""
    return "" if number is None else f"{number:.0e}".replace("e-0", "e-") if number < 0.001 else f"{number:.2g}"


TEMPLATES.filters |= {"brief": brief, "percent": verdict.percent}


def audit_facts(config: Mapping, figures: Mapping, name: str) -> dict:
    """The content of audit.json for the run `name`, see results/README.md.

    Args:
        config, figures: the contents of config.json and metrics.json.
    """
    images = _judged(figures) if "psnr" in figures else _believed(figures)
    counts = verdict.counts_of([image["level"] for image in images])
    granted = config["label_strategy"] == "known"
    return {
        "schema": SCHEMA,
        "run": name,
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "verdict": verdict.verdict(counts, figures, granted_labels=granted) | {"images": counts},
        "truth_known": "psnr" in figures,
        "subject": {
            "model": config["model"],
            "num_classes": config["num_classes"],
            "batch_size": config["batch_size"],
            "source": Path(config["update"] or config["data_path"] or config["dataset"]).name,
        },
        "figures": {key: value for key, value in figures.items() if not isinstance(value, list)},
        "images": images,
        "layers": figures["layers"],
        "evidence": figures["evidence"],
        "assumptions": assumptions(config),
        "notes": config.get("notes", []),
        "defence": config["defence"],
        "defences": None,
        "command": config["command"],
        "origin": {key: config[key] for key in ("git_commit", "git_dirty", "versions", "device", "seed")},
    }


def _judged(figures: Mapping) -> list[dict]:
    """The images in the order of the truth, each with its reconstruction."""
    columns = ("assignment", "psnr", "ssim", "psnr_guess", "true_labels", "identified", "equal_bits")
    images = []
    rows = zip(*(figures[column] for column in columns), strict=True)
    for truth, (index, psnr, ssim, guess, label, identified, equal_bits) in enumerate(rows):
        images.append(
            {
                "level": verdict.level_of(psnr, ssim, guess),
                "truth": f"truth/true_{truth:03d}.png",
                **_reconstruction(figures, index),
                "true_label": label,
                "psnr": psnr,
                "psnr_guess": guess,
                "ssim": ssim,
                "identified": identified,
                "equal_bits": equal_bits,
            }
        )
    return images


def _believed(figures: Mapping) -> list[dict]:
    """The images in the attack's own order."""
    images, sure = [], figures["pixels_read"] if verdict.are_certain(figures["layers"]) else 0
    for index in range(len(figures["labels"])):
        found = _reconstruction(figures, index)
        level = verdict.belief_of(found["confidence"], has_pixels=index < sure)
        images.append({"level": level, **found})
    return images


def _reconstruction(figures: Mapping, index: int) -> dict:
    """The attack's facts on its image `index`; leading images have a signal."""
    signals = figures["signals"]
    signal = signals[index] if index < len(signals) else {"confidence": None, "uncertainty": None}
    return {
        "reconstruction": f"images/rec_{index:03d}.png",
        "label": figures["labels"][index],
        "confidence": signal["confidence"],
        "uncertainty": signal["uncertainty"],
    }


def write_report(run: RunDirectory, facts: Mapping) -> None:
    """Write audit.json and report.html of these facts."""
    run.write_json("audit.json", facts)
    page = report_page(facts, run.path)
    # names of files may hold bytes that are no UTF-8: the page shows them escaped
    written = page.encode("utf-8", "backslashreplace")
    run.write("report.html", lambda temporary: temporary.write_bytes(written))


def read_facts(folder: Path, most: int | None = None) -> dict:
    """The facts in the audit.json of a run directory; `most` bytes of JSON, if given.

    Raises:
        ValueError, OSError: the file is missing, damaged, too large, no regular file, or of another schema.
    """
    facts = read_json(folder / "audit.json", most)
    if not isinstance(facts, dict) or facts.get("schema") != SCHEMA:
        raise ValueError(f"{folder / 'audit.json'} is not of this kind ({SCHEMA})")
    return facts


def report_page(facts: Mapping, folder: Path) -> str:
    """The page on these facts, with the pictures that lie in the run directory `folder`."""
    return TEMPLATES.get_template("report.html").render(
        facts=facts,
        scale={level: verdict.MEANINGS[level] for level in facts["verdict"]["images"]},
        names=verdict.NAMES | verdict.SIMILARITIES,
        lower_bound=verdict.LOWER_BOUND,
        certain=verdict.CERTAIN,
        shown=STRIP,
        picture=lambda name: embedded(folder / name),
        generator=GENERATOR,
    )


def embedded(path: Path) -> str | None:
    """The picture as a data URI; None where it cannot be read."""
    try:
        data = read_regular(path, MOST)
        with Image.open(io.BytesIO(data), formats=("PNG",)) as picture:
            if path.parent.name in FOLDERS and max(picture.size) > PLAIN:
                buffer = io.BytesIO()
                picture.convert("L" if picture.mode == "L" else "RGB").save(buffer, "JPEG", quality=QUALITY)
                return _data_uri("jpeg", buffer.getvalue())
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # PIL raises all of these on torn files
        return None
    return _data_uri("png", data)


def _data_uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def first_pictures(images: Sequence[Mapping], count: int = STRIP) -> list[str]:
    """The reconstructions of the first images, as names in their run directory."""
    return [image["reconstruction"] for image in images[:count]]
