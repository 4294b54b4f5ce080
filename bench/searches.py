"""What `benchmark.py tune` tries for each attack: values of one setting at a time, around its preset.

These are the settings that a preset does not take from its source, or that its source would have chosen for the data at
hand: weights of priors, and where the images start.
"""

STARTS = {"init": ("randn", "standardised", "normal", "grey")}

SEARCHES: dict[str, dict[str, tuple[object, ...]]] = {
    "magia": {
        "tv_weight": (3e-3, 1e-2, 3e-2),
        "tv_final": (1e-4, 1e-3, 1e-2),
        "chroma_weight": (1.0, 3.0, 10.0),
        "curvature_weight": (0.3, 1.0, 3.0),
    },
    "paper": STARTS,
    "dlg": STARTS,
    "idlg": STARTS,
    "invertinggradients": {"tv_weight": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1), **STARTS},
    "gradinversion": {"tv_weight": (0.3, 1.0, 3.0, 10.0), "restarts": (1, 2, 8), **STARTS},
    "cpa": {"tv_weight": (3e-3, 1e-2, 3e-2), "feature_weight": (0.1, 1.0, 10.0), **STARTS},
}


def variants(preset: str) -> list[str]:
    """The preset itself, and each setting of its search with one value, as `--presets` takes them."""
    tried = SEARCHES[preset.split()[0]].items()
    return [preset, *(f"{preset} --{name} {value}" for name, values in tried for value in values)]
