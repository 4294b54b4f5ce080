"""Published attacks as settings of the one loop, where they differ from the defaults of main_MAGIA_sel.py."""

# Settings that published attacks share: whole batches, hard kinks, plain pixels, no signals, no annealing, no scale.
PLAIN = {
    "distance": "l2",
    "soften": "off",
    "alpha": 1.0,
    "rescale": "none",
    "signals": "off",
    "prior": "anisotropic",
    "tv_weight": 0.0,
    "tv_final": 1.0,
    "noise_weight": 0.0,
    "scale_weight": 0.0,
    "box": "none",
    "spectral_power": 0.0,
    "chroma_gain": 1.0,
    "label_gain": 1.0,
    "label_std": 1.0,
    "lr": 1.0,
}

# Each attack as settings of the one loop. All start as their sources do. The differences from the sources stand here in
# short and in docs/benchmark.md, "Presets", at length.
PRESETS = {
    "magia": {},
    # the published script of MAGIA (arXiv 2509.18170)
    "paper": PLAIN
    | {
        "init": "normal",
        "sel_mode": "constk",
        "sel_k": 2,
        "resample": "closure",
        "alpha": 0.999,
        "subset_loss": "published",
        "tv_weight": 5e-3,
        "optimizer": "lbfgs",
        "line_search": "none",
    },
    # Zhu, Liu, Han 2019 (arXiv 1906.08935): L2, L-BFGS with step 1, labels beside the images, no prior
    "dlg": PLAIN | {"init": "randn", "optimizer": "lbfgs", "line_search": "none"},
    # Zhao, Mopuri, Bilen 2020 (arXiv 2001.02610): DLG with labels read from the signs of the head's gradient. Differs:
    # the source reads one image's label, this preset one label for each negative entry
    "idlg": PLAIN | {"init": "randn", "optimizer": "lbfgs", "line_search": "none", "label_strategy": "idlg"},
    # Geiping et al. 2020 (arXiv 2003.14053): cosine distance, signed Adam with step decay, box, TV, labels granted.
    # Differs: one start, TV weight measured
    "invertinggradients": PLAIN
    | {
        "init": "standardised",
        "distance": "cosine",
        "optimizer": "adam",
        "lr": 0.1,
        "lr_schedule": "step",
        "signed": True,
        "n_iter": 4800,
        "box": "clamp",
        "tv_weight": 3e-2,
        "label_strategy": "known",
    },
    # Yin et al. 2021 (arXiv 2104.07586): L2, Adam with cosine decay, TV, L2 and BatchNorm priors, group of starts.
    # Differs: two starts of eight, not registered to each other, no Langevin noise, TV weight measured
    "gradinversion": PLAIN
    | {
        "init": "standardised",
        "optimizer": "adam",
        "lr": 0.1,
        "lr_schedule": "cosine",
        "n_iter": 20000,
        "box": "clamp",
        "tv_weight": 3.0,
        "l2_weight": 1e-6,
        "bn_weight": 0.1,
        "restarts": 2,
        "group_weight": 1e-2,
        "label_strategy": "yin",
    },
    # Kariyappa et al. 2023 (arXiv 2209.05578): ICA on the head's gradient, then features and gradients by cosine, TV.
    # Differs: the ICA, see `attack.published.ica`; weights measured
    "cpa": PLAIN
    | {
        "init": "standardised",
        "signals": "ica",
        "feature_weight": 0.1,
        "feature_distance": "cosine",
        "distance": "cosine",
        "optimizer": "adam",
        "lr": 0.1,
        "lr_schedule": "cosine",
        "n_iter": 25000,
        "box": "clamp",
        "tv_weight": 1e-2,
    },
}

# A second row for attacks that do better from another start, or from fewer: docs/benchmark.md, "Tuned rows".
TUNED = {"paper": {"init": "grey"}, "dlg": {"init": "grey"}, "idlg": {"init": "grey"}, "gradinversion": {"restarts": 1}}
PRESETS |= {f"{name}_tuned": PRESETS[name] | better for name, better in TUNED.items()}
