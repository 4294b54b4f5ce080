"""The settings that `benchmark.py tune` tries for each attack: values of one setting at a time, around its preset.

A preset does not take these settings from its source, or its source would have chosen them for the data at hand:
weights of priors, the start of the images, and the step size of Adam. Sources whose images are normalised have steps in
units of a standard deviation, a quarter of the range of pixels.
"""

import argparse

STARTS = {"init": ("randn", "standardised", "normal", "grey")}
STEPS = {"lr": (0.025, 0.05, 0.1)}
DAMPED = {"lr": (1e-3, 1e-2, 1e-1), "line_search": ("none", "strong_wolfe")}  # for plain L-BFGS, which leaves the box

SEARCHES: dict[str, dict[str, tuple[object, ...]]] = {
    "magia": {
        "tv_weight": (1.3e-3, 4e-3, 1.2e-2),
        "tv_final": (1e-4, 1e-3, 1e-2),
        "chroma_weight": (1.0, 3.0, 10.0),
        "curvature_weight": (0.3, 1.0, 3.0),
        "third_weight": (0.3, 1.0, 3.0),
        "prior_power": (0.6, 0.8, 1.0),
    },
    "paper": STARTS | DAMPED,
    "dlg": STARTS | DAMPED,
    "idlg": STARTS | DAMPED,
    "invertinggradients": {"tv_weight": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0), **STEPS, **STARTS},
    "gradinversion": {"tv_weight": (0.3, 1.0, 3.0, 10.0, 30.0), "restarts": (1, 2, 8), **STEPS, **STARTS},
    "cpa": {
        "tv_weight": (3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0),
        "feature_weight": (0.1, 1.0, 10.0),
        **STEPS,
        **STARTS,
    },
}


def variants(preset: str, settings: argparse.Namespace) -> list[str]:
    """The preset itself, and the preset with each other value of each searched setting, as `--presets` takes them.

    `settings` are the preset's own.
    """
    tried = SEARCHES[preset.split()[0]].items()
    others = [(name, value) for name, values in tried for value in values if value != getattr(settings, name)]
    return [preset, *(f"{preset} --{name} {value}" for name, value in others)]
