"""The tables of docs/results.md and the README: their files in results/data, their columns, the words above them."""

from collections.abc import Mapping
from dataclasses import dataclass

Parts = str | tuple[str, ...]  # templates of a row's columns; a template that names an empty column is left out


@dataclass(frozen=True)
class Table:
    """One table of the page: results/data/NAME.csv, under the question that the table answers."""

    name: str
    title: str
    says: str  # a paragraph, filled anew
    lines: Mapping[str, Parts]  # head -> the name of a line
    cells: Mapping[str, Parts]  # head -> a figure; with `across` the one cell, its head said beneath the table
    across: str = ""  # template: each of its texts has a column of its own
    pictures: str = ""  # markdown behind the table, as it is


AHEAD = """
# How sharp are the images, against what, and which part earns it?

`make docs` makes this page from `results/data/*.csv`. To change the page, change those files, or measure rows again:
`python -m bench.remeasure -h` says how. Each row has the command that repeats the row, the commit of the program that
measured the row (of rows older than the files: the commit that brought the figure in), the device and the seconds.
Beneath each table stand its newest commit and its commonest device. A row of another origin has a letter, which is
explained there. An empty cell was not measured, or could not be. [labbook.md](labbook.md) says why the figures are as
they are, and the [glossary](architecture.md#glossary) explains the words.

**PSNR and SSIM** are means over a batch, after the best one-to-one assignment of reconstructions to true images,
since the order of a batch cannot be known. PSNR is in dB and cut off at 100. PSNR varies by about 2 dB from batch to
batch, so compare figures of the same batch and the same number of evaluations: a longer attack on the same network
reaches more dB. **LPIPS** ([what it is](benchmark.md#lpips)) is 0 for equal pictures and larger for unlike ones.

**Data.** Commands name `cifar10_test.npz`, the first 256 images of the CIFAR-10 test set
([reproducibility.md](reproducibility.md#set-up) makes the file). Unless a command says otherwise, the update is one
averaged float32 gradient of the first B of these images with seed 0, the network is the untrained LeNet with 100
classes, and labels are random. Trained networks were trained with Adam, batches of 128 and horizontal flips;
`train_victim.py` makes networks of this sort. The brackets behind a network have its accuracy on 2,000 test images.

**Seconds** are wall time on the device and include the search for signals. Two programs at a time ran on two cores,
up to four on the H100, and eight on the H200. All rows were measured with torch 2.13.0, those of the H200 with 2.11.0.
"""

RIVAL = ("{psnr}", " ± {psnr_spread}", ", {ssim}", ", {seconds} s", " (diverged: {diverged} of {runs})")
RIVALS = {"method": "`{method}`", "labels": "{labels}"}
FIGURES = "PSNR ± standard deviation over runs, SSIM, seconds"
SHARE = "share of the labels that are right"
SHARES = "{identification}, {certified}, {bit_exact}"
BY_SIZE = "B = {batch_size}"

TABLES = (
    Table(
        "networks",
        "How sharp are the images of ordinary and trained networks?",
        """The whole attack, to its end, on true labels of ten classes unless the network's name says otherwise. The MLP
        of six layers is SPEAR's setting (arXiv 2403.03945): exact images up to B ≈ 25. "Calibrated": BatchNorm's
        statistics are those of images, all else is untrained ([checkpoints](reproducibility.md#set-up)).""",
        {"network": "{network}", "B": "{batch_size}"},
        {
            "told apart": "{told_apart}",
            "labels right": "{labels_right}",
            "PSNR (dB)": "{psnr}",
            "SSIM": "{ssim}",
            "seconds": "{seconds}",
        },
        pictures="""
![Sixteen images from the gradient of a trained ResNet-18](../results/figures/comparison_resnet18_cifar_B16.png)

*`resnet18_cifar`, trained, sixteen images, one averaged gradient, on an H100.*

![Four photographs from the gradient of a ResNet-18 of 1,000 classes](../results/figures/comparison_photos_224.png)

*Upper row: the photographs `astronaut`, `chelsea`, `coffee` and `rocket` of scikit-image, in a folder `photos`. Lower
row: their reconstructions from one averaged gradient of `torchvision:resnet18`.*""",
    ),
    Table(
        "training",
        "Does a network give away less when it is trained?",
        "The same attack on the same four images and three stages of one ConvNet. Training makes the images no safer.",
        {"ConvNet": "{weights}", "B": "{batch_size}"},
        {"told apart": "{told_apart}", "labels right": "{labels_right}", "PSNR (dB)": "{psnr}"},
    ),
    Table(
        "readings",
        "How surely are all images of a batch told apart?",
        """Readings of disjoint batches of trained networks; complete: every image told apart, every label right.""",
        {"network": "{network}", "B": "{batch_size}"},
        {"readings": "{readings}", "complete": "{complete}"},
    ),
    Table(
        "head",
        "What does the head give away?",
        """The number of images whose inputs of the head are read off the head's gradient. With K classes, all images
        are read up to B = K - 2. Seconds are those of the search for images and of the walk down the layers.""",
        {"network": "{network}", "classes": "{num_classes}", "labels": "{labels}", "seed": "{seed}"},
        {"images read, seconds": ("{read}", ", {seconds} s")},
        BY_SIZE,
        pictures="![Images whose features are read, against the batch size](../results/figures/signals.png)",
    ),
    Table(
        "rivals_lenet",
        "How do published attacks do on an untrained LeNet?",
        """LeNet, 100 classes, random labels, 2,500 gradient evaluations for every method, by the rules of [What is
        fair](benchmark.md#what-is-fair); [Presets](benchmark.md#presets) says what each method is. Labels are read
        from the gradient, optimised beside the images, or granted. Where a spread stands, the runs are three batches,
        or three batches with three seeds each (the file has their number); elsewhere there is one run. A run that
        diverged counts as the mean image in a mean.""",
        RIVALS,
        {FIGURES: RIVAL},
        BY_SIZE,
        pictures="""
![Eight images of an untrained LeNet by every method](../results/figures/wall_lenet_B8.png)

*LeNet, B = 8, 2,500 evaluations; the first row is the truth.*

![PSNR against seconds](../results/figures/psnr_vs_seconds_lenet.png)

*The first batch, seed 0; a run that diverged stands at the mean image.*""",
    ),
    Table(
        "labels_lenet",
        "Which labels do the attacks find on the untrained LeNet?",
        "The first batch of the table above. At every size `magia` tells all images apart, and no other method any.",
        {"method": "`{method}`"},
        {SHARE: "{label_accuracy}"},
        BY_SIZE,
    ),
    Table(
        "rivals_convnet",
        "How do published attacks do on a trained ConvNet?",
        """ConvNet, trained (58 %), ten classes, true labels, 1,000 gradient evaluations for every method.
        `gradinversion` takes at most ten images here and `cpa` at most nine. A method with a flag behind its name has
        the best setting that was found for this network ([the search](benchmark.md#tuned-rows)).""",
        RIVALS,
        {FIGURES: RIVAL},
        BY_SIZE,
        pictures="""
![Eight images of a trained ConvNet by every method](../results/figures/wall_convnet_B8.png)

*B = 8, one run of each method; the first row is the truth.*""",
    ),
    Table(
        "labels_convnet",
        "Which labels do the attacks find on the trained ConvNet?",
        "The first batch of the table above. `magia` tells all images apart; no other method tells any apart.",
        {"method": "`{method}`"},
        {SHARE: "{label_accuracy}"},
        BY_SIZE,
    ),
    Table(
        "rivals_resnet18_cifar",
        "How do published attacks do on a trained ResNet-18 for small images?",
        """`resnet18_cifar`, trained (61 %), ten classes, true labels, one batch. Every method had 500 gradient
        evaluations up to B = 8, 250 for B = 16 and 100 for B = 32, unless a letter says otherwise.""",
        RIVALS,
        {FIGURES: RIVAL},
        BY_SIZE,
        pictures="""
![Four images of a trained ResNet-18 for small images by every method](../results/figures/wall_resnet18_cifar_B4.png)

*`resnet18_cifar`, B = 4, 100 evaluations each; the first row is the truth.*""",
    ),
    Table(
        "rivals_resnet18_bn",
        "How do published attacks do where BatchNorm is in training mode?",
        """`resnet18`, trained (62 %), ten classes, true labels, one batch, one seed, `--bn train`. The budget is small:
        200 gradient evaluations for every method. Two hundred are not enough for this program either, so one row has
        its whole course of 1,245 evaluations, of which most are of known activations and cheaper than a gradient. The
        attacks of breaching get the statistics of the batch as buffers, as its own clients send them.""",
        RIVALS,
        {FIGURES: RIVAL},
        BY_SIZE,
        pictures="""
![Four images of a trained ResNet-18 in training mode by every method](../results/figures/wall_resnet18_bn_B4.png)

*`resnet18`, `--bn train`, B = 4, 200 evaluations each but for the second row; the first row is the truth.*""",
    ),
    Table(
        "settings",
        "How do attacks do on clients as they are?",
        """Clients that train as clients do, beside the one step of textbooks; every attack on one client has the same
        updates and as many evaluations. Training is written as steps x batch x optimiser; all that is not said is
        plain. Every attack knows the network and its weights, the batch size, and the client's rules of training.
        breaching simulates local steps: it gets the labels of each step, the buffers of the batch where BatchNorm is
        in training mode, the client's label smoothing, and plain SGD at the rate that goes as far as momentum does;
        activations in bfloat16 it does not know. Its budget, in evaluations, is cut to that of the others: with
        2,500 it leaves 14.5 dB of the plain client's images on LeNet. `prior_alone` is this
        program's attack on an update of noise as long as the client's: it is what the attack paints by itself, and a
        guess of the labels. Where a spread stands, the row is nine runs, three batches with three seeds each;
        elsewhere it is an example of one run. ResNet-8 is [this file](../examples/small_resnet.py).""",
        {"network": "{network}, {stage}", "training": "{training}", "BatchNorm": "{norms}", "budget": "{evaluations}"},
        {
            "PSNR ± standard deviation in dB (SSIM, LPIPS), share of the labels right, identified, certified, bit for "
            "bit": ("{psnr}", " ± {psnr_spread}", " ({ssim}", ", {lpips}", "), ", "{label_accuracy}, ", SHARES)
        },
        "`{attack}`: {knows}",
        pictures="""
One complication alone leaves the MLP's images bit for bit, but for coarse arithmetic, which hides the last bits. All at
once hide some of the images. On the ResNet in training mode the reading tells every image apart, but its course begins
with soft kinks and has not got anywhere after so few evaluations: the loop alone is ahead. LPIPS agrees with PSNR where
images come out. Where none is identified it says little: on LeNet `prior_alone` has less than the mean image
([why](labbook.md#2026-11-29-what-does-lpips-say-of-images-of-32-pixels)).""",
    ),
    Table(
        "loop_batchnorm",
        "What do running statistics as a prior do for the loop?",
        """`resnet18`, trained (62 %), the first four images, true labels, 200 evaluations without signals. With `--bn
        train` the client shares the statistics of its batch, and the loop matches them. With `--bn train_private` it
        keeps them, and the loop holds the images' common scale alone (`--scale_weight`). `--bn_weight` is the published
        prior on the server's running statistics (Yin et al. 2021), 0.1 that of `gradinversion`. It does harm in both
        modes, and so does a start from noise. After so few evaluations all pictures are far from the images, and lose
        less where their contrast fades: without the scale 14.1 dB. Pictures of smaller networks turn black without it
        ([labbook.md](labbook.md)).""",
        {"change": "`{change}`"},
        {"PSNR (dB), SSIM, labels right": ("{psnr}", ", {ssim}", ", {labels_right} of {batch_size}")},
        "`--bn {bn}`",
    ),
    Table(
        "speed",
        "What does one evaluation cost?",
        """An evaluation computes an objective and its gradient. Compared are the published script's closure, this
        program's loop without signals, and the distance from known activations (`forward`), which also matches
        gradients where the activations are too few. The ratio is the median over turns in one process; above 1 is
        faster than published. The last figure is the evaluation's share of its arithmetic limit: the operations of its
        matrix products and convolutions a second, over those of one large matrix product on the same device.""",
        {"network": "{network}", "matched by `forward`": "{matched}", "on": "{chip}", "B": "{batch_size}"},
        {"milliseconds (times the published speed), share of the limit": ("{milliseconds}", " ({ratio})", ", {share}")},
        "{variant}",
    ),
    Table(
        "courses",
        "How soon are the images sharp?",
        """Whole attacks on LeNet, 16 images, 2,500 evaluations unless said: evaluations and seconds to 20, 25 and 30
        dB. Seconds include the search for signals. An attack with an empty cell never got there, or was not measured.
        The last column has the seconds to within 0.1 dB of the best.""",
        {"attack": "{attack}"},
        {
            "to 20 dB": ("{evaluations_to_20} evaluations, ", "{seconds_to_20} s"),
            "to 25 dB": ("{evaluations_to_25} evaluations, ", "{seconds_to_25} s"),
            "to 30 dB": ("{evaluations_to_30} evaluations, ", "{seconds_to_30} s"),
            "best (dB)": "{best}",
            "seconds": "{seconds}",
        },
    ),
    Table(
        "kinks",
        "What is softening kinks worth without signals?",
        """ConvNet, trained (58 %), ten classes, true labels, labels optimised, 2,000 evaluations. ReLUs and max-pools
        stay hard, or are soft at first (`--soften auto`, the default). The distance is relative to the size of
        each tensor, or has one scale for the whole gradient.""",
        {"B": "{batch_size}", "seed": "{seed}"},
        {
            "PSNR (dB), SSIM, labels right, seconds": (
                "{psnr}",
                ", {ssim}",
                ", {labels_right} of {batch_size}",
                ", {seconds} s",
            )
        },
        "{variant}",
    ),
    Table(
        "parts",
        "What is each part worth?",
        "LeNet, 16 images, without signals, 2,500 evaluations; each row is one change to the defaults.",
        {"change": "{change}", "what it is": "{meaning}"},
        {"PSNR (dB)": "{psnr}", "labels right": "{labels_right}"},
    ),
    Table(
        "schedules",
        "What is the subset term worth?",
        """LeNet, the first eight images, without signals, each schedule for all of its 300 steps (some 7,200
        evaluations). Alpha 0.999 has the subset term. Alpha 1 has none, and a schedule then acts through the weight of
        the matching loss alone.""",
        {"`--sel_mode`": "{sel_mode}"},
        {"PSNR (dB)": "{psnr}"},
        "`--alpha {alpha}`",
    ),
    Table(
        "loop_labels",
        "Which labels are hard without signals?",
        "LeNet, 100 classes, 2,500 evaluations: images that share a label are hard for the loop alone.",
        {"`--labels`": "`{labels}`", "B": "{batch_size}", "`--signals`": "`{signals}`"},
        {"PSNR (dB)": "{psnr}", "labels right": "{labels_right}"},
    ),
)

# Tables of other pages. Those pages have the words around the tables.
LEFT = ("{psnr}", " ({ssim})", ", {told_apart} of {images}", ", {label_accuracy}")
DEFENCES = tuple(
    Table(
        name,
        "What is left?",
        "",
        {"update": "{update}"},
        {"PSNR in dB (SSIM), images told apart (only where signals are read), share of the labels right": LEFT},
        "`{attack}`",
    )
    for name in ("defences_lenet", "defences_convnet", "defences_resnet18_cifar")
)
IDENTIFIED = Table(
    "identification",
    "Which images are identified?",
    "",
    {"update": "`{update}`", "network": "{network}"},
    {
        "identification rate (PSNR in dB), images told apart, share of the labels right": (
            "{identification}",
            " ({psnr}), ",
            "{told_apart} of {batch_size}",
            ", {label_accuracy}",
        )
    },
    "`{attack}`",
)
AT_EPSILON = Table(
    "epsilon",
    "What does an update of so much privacy give away?",
    "",
    {"level": "{level}", "ε of one release": "{epsilon}", "defence": "`{defence}`"},
    {
        "identification rate, share of the labels right, PSNR ± standard deviation in dB": (
            "{identification}",
            ", {label_accuracy}",
            ", {psnr}",
            " ± {psnr_spread}",
        )
    },
    "{network}, `{attack}`",
)
FAMILIES = Table(
    "networks_families",
    "What does one update of an untrained network of each family give away?",
    "",
    {"family": "{family}", "network": "`{network}`", "pixels": "{pixels}", "B": "{batch_size}"},
    {
        "told apart (labels right)": ("{told_apart}", " ({labels_right})"),
        "promised down to the inputs of": "`{deepest}`",
        "read down to those of": "`{reached}`",
        "better than a guess": ("{better}", ", {exact_psnr} dB"),
        "only run, and why": "{only_run}",
    },
)
# Of bench.local_training, with the column that names its clients.
LOCAL = {
    "local_first_layer": "client",
    "local_one_pass": "client",
    "local_several_passes": "client",
    "local_products": "steps times rate",
    "local_adam": "client",
}
LOCAL_TRAINING = tuple(
    Table(
        name,
        "What does an update still give away after several local steps?",
        "",
        {head: "{client}", "B": "{batch_size}"},
        {
            "told apart": "{told_apart}",
            "labels right": "{labels_right}",
            "exact": "{exact}",
            "certain": "{certain}",
            "largest error": "{error}",
            "PSNR (dB), mean (least)": ("{psnr}", " ({psnr_least})"),
            "replay leaves": "{unexplained}",
            "seconds": "{seconds}",
        },
    )
    for name, head in LOCAL.items()
)
SCALE = Table(
    "scale",
    "",
    "",
    {"updates": "{updates}", "workers": "{workers}", "one killed after": "{killed_after}"},
    {
        "seconds (with nothing new)": "{audit_seconds} ({again_seconds})",
        "MiB of `benchmark.py`, a worker, all runs": "{program_mib}, {worker_mib}, {runs_mib}",
    },
)

OTHER_TABLES = (*DEFENCES, IDENTIFIED, AT_EPSILON, *LOCAL_TRAINING, FAMILIES, SCALE)

# The README's table: networks of several attacks (name, file, batch sizes), and networks of this program alone.
COMPARED = (
    ("LeNet, 100 classes, untrained", "rivals_lenet", (1, 4, 16)),
    ("ConvNet, trained to 58 %", "rivals_convnet", (1, 4, 8)),
    ("ResNet-18 for small images, trained to 61 %", "rivals_resnet18_cifar", (1, 4)),
    ("ResNet-18, BatchNorm in training mode", "rivals_resnet18_bn", (4,)),
)
ALONE = (  # a row's name in the README, its table, its name there, and its batch sizes
    ("ConvNet, trained to 58 %, to its end", "networks", "`convnet`, trained (58 %)", (1, 4, 8)),
    ("ResNet-18, trained to 62 %", "networks", "`resnet18`, trained (62 %)", (16, 24)),
    (
        "ResNet-18 for small images, BatchNorm in training mode",
        "networks",
        "`resnet18_cifar`, trained (61 %), BatchNorm in training mode",
        (4, 8),
    ),
    (
        "ResNet-18, BatchNorm in training mode",
        "networks",
        "`resnet18`, trained (62 %), BatchNorm in training mode",
        (4, 8, 16),
    ),
    ("MLP, six layers, ReLU, untrained", "networks", "`mlp`, ReLU, six layers of width 200, untrained", (30,)),
    (
        "MLP, two layers, ReLU, width 1,000, untrained",
        "networks",
        "`mlp`, ReLU, two layers, width 1,000, untrained",
        (128,),
    ),
    (
        "MLP, 20 shuffled passes of four minibatches",
        "local_first_layer",
        "ReLU, 3 layers of 200, minibatches of 4, rate 0.01, passes: 20",
        (16,),
    ),
    (
        "MLP, 5 shuffled passes of four minibatches, momentum 0.9",
        "local_first_layer",
        "ReLU, 3 layers of 400, minibatches of 8, 5 passes, momentum 0.9, decay 5e-4",
        (32,),
    ),
    (
        "ConvNet, trained to 58 %, one pass of two minibatches, momentum 0.9",
        "local_one_pass",
        "ConvNet, trained, 2 minibatches at rate 0.01, momentum 0.9",
        (4,),
    ),
    ("Small ViT, trained", "networks", "small ViT, mean over tokens, after 30 epochs on 192 images", (2,)),
    (
        "`torchvision:vit_b_16`, 1,000 classes, 224 pixels, untrained",
        "networks",
        "`torchvision:vit_b_16`, 1,000 classes, 224 pixels, untrained",
        (1,),
    ),
    (
        "`torchvision:resnet18`, 1,000 classes, 224 pixels, untrained",
        "networks",
        "`torchvision:resnet18`, untrained, 1,000 classes, photographs of 224 pixels",
        (4,),
    ),
)
OTHERS_EXCEPT = ("magia", "paper", "mean_image", "grey_image")  # beginnings of names that are no other attack's
