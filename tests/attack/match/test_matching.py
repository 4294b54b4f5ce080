import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from attack.match.entries import squared_distance
from attack.match.gradients import SUBSET_LOSSES, MatchingLoss, cosine_distance, inclusion_probability, subset_distance
from attack.match.penalties import CLOSE_ENOUGH, BatchNormLoss, FeatureLoss, disagreement
from network.head import features_of
from network.zoo import build_model
from update.gradients import averaged_gradient
from update.shared import SharedUpdate

BATCH = 4


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def case(name="lenet"):
    """A model, dummy images and label logits, and the gradient of another batch as target."""
    model = build_model(name, image_shape=(1, 16, 16), num_classes=5, generator=generator()).double()
    truth, images = torch.rand(2, BATCH, 1, 16, 16, dtype=torch.float64, generator=generator(1))
    logits = torch.randn(BATCH, 5, dtype=torch.float64, generator=generator(2))
    target = averaged_gradient(model, truth, torch.tensor([0, 1, 2, 1]))
    return model, images, logits, target


@given(st.integers(1, 200).flatmap(lambda b: st.tuples(st.just(b), st.integers(1, b))))
def test_rho_is_the_share_of_subsets_that_hold_an_image(sizes):
    batch_size, size = sizes
    combinations = math.comb(batch_size - 1, size - 1) / math.comb(batch_size, size)
    assert inclusion_probability(batch_size, size) == pytest.approx(combinations)


@pytest.mark.parametrize("size", range(1, BATCH + 1))
def test_rho_is_what_the_partial_average_keeps_in_the_mean_over_all_subsets(size):
    values = torch.randn(BATCH, 6, dtype=torch.float64, generator=generator())
    subsets = list(itertools.combinations(range(BATCH), size))
    partial = sum(values[list(t)].sum(0) / BATCH for t in subsets) / len(subsets)
    assert torch.allclose(partial, inclusion_probability(BATCH, size) * values.mean(0))


def test_distances_of_a_hand_computed_case():
    g_subset = (torch.tensor([2.0, 4.0]), torch.tensor([6.0]))
    g = (torch.tensor([4.0, 0.0]), torch.tensor([8.0]))
    assert squared_distance(g_subset, g) == 4 + 16 + 4
    sizes = {"batch_size": 4, "subset_size": 2}
    # published: g_T/2 = (1, 2), (3); g/4 = (1, 0), (2): layer means of squares 2 and 1
    assert subset_distance("published", g_subset, g, **sizes) == 3
    assert subset_distance("mean", g_subset, g, **sizes) == 24
    assert subset_distance("partial", g_subset, g, **sizes) == 6


class Linear(torch.nn.Module):
    """One weight per class and no bias, on one-pixel images: gradients are softmax error times pixel."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(1, 2, bias=False).double()
        self.head.weight.data.zero_()

    def forward(self, images):
        return self.head(images.flatten(1))


def test_objective_of_a_hand_computed_case():
    # Weights are zero, so softmax is (1/2, 1/2); with label probabilities (p, 1-p) the error is (1/2-p, p-1/2).
    images = torch.tensor([1.0, 3.0], dtype=torch.float64).view(2, 1, 1, 1)
    logits = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]], dtype=torch.float64)  # p = 3/4 and 1/2
    target = (torch.zeros(2, 1, dtype=torch.float64),)
    # Gradients: image 0 gives (-1/4, 1/4) * 1, image 1 gives 0; the mean is (-1/8, 1/8).
    loss = MatchingLoss(Linear(), target, alpha=0.75, rescale="inclusion", subset_loss="mean")
    match = loss(images, logits, torch.tensor([0]))
    assert match.full.item() == pytest.approx(2 / 64)
    assert match.subset.item() == pytest.approx(2 / 16)
    assert match.total.item() == pytest.approx(0.5 * (0.75 * 2 / 64 + 0.25 * 2 / 16))
    unscaled = MatchingLoss(Linear(), target, alpha=0.75, rescale="none", subset_loss="mean")
    assert unscaled(images, logits, torch.tensor([0])).total.item() == pytest.approx(0.75 * 2 / 64 + 0.25 * 2 / 16)


@pytest.mark.parametrize("kind", SUBSET_LOSSES)
@pytest.mark.parametrize("subset", [[2], [3, 0], [0, 1, 2, 3]])
def test_terms_are_those_of_gradients_taken_separately(kind, subset):
    model, images, logits, target = case()
    subset = torch.tensor(subset)
    labels = logits.softmax(1)
    match = MatchingLoss(model, target, 0.9, "inclusion", kind)(images, logits, subset)
    full = squared_distance(averaged_gradient(model, images, labels), target)
    g_subset = averaged_gradient(model, images[subset], labels[subset])
    weak = subset_distance(kind, g_subset, target, batch_size=BATCH, subset_size=len(subset))
    assert match.full.item() == pytest.approx(full.item())
    assert match.subset.item() == pytest.approx(weak.item())
    assert match.total.item() == pytest.approx(len(subset) / BATCH * (0.9 * full + 0.1 * weak).item())


def test_the_loss_is_zero_at_the_truth():
    model, images, _, _ = case()
    labels = torch.tensor([3, 1, 0, 0])
    logits = 200.0 * torch.nn.functional.one_hot(labels, 5).double()
    loss = MatchingLoss(model, averaged_gradient(model, images, labels), 1.0)
    assert loss(images, logits, torch.tensor([0])).total.item() < 1e-25


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_gradient_agrees_with_finite_differences(alpha):
    model, images, logits, target = case()
    loss = MatchingLoss(model, target, alpha, "inclusion", "mean")
    subset = torch.tensor([1, 3])

    def total(x, y):
        return loss(x, y, subset).total

    inputs = (images.requires_grad_(), logits.requires_grad_())
    assert torch.autograd.gradcheck(total, inputs, fast_mode=True, atol=1e-7)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_mean_form_punishes_the_images_for_differing(size):
    """E_T |g_T - g|^2 = |g_all - g|^2 + (B-S) / (S (B-1)) Var_i(g_i)."""
    model, images, logits, target = case()
    loss = MatchingLoss(model, target, 0.5, "none", "mean")
    subsets = [torch.tensor(t) for t in itertools.combinations(range(BATCH), size)]
    matches = [loss(images, logits, subset) for subset in subsets]
    labels = logits.softmax(1)
    g_all = averaged_gradient(model, images, labels)
    alone = [averaged_gradient(model, images[i : i + 1], labels[i : i + 1]) for i in range(BATCH)]
    variance = sum(squared_distance(g, g_all) for g in alone) / BATCH
    expected = matches[0].full + (BATCH - size) / (size * (BATCH - 1)) * variance
    assert sum(m.subset for m in matches).item() / len(subsets) == pytest.approx(expected.item())


def test_errors_name_the_value():
    with pytest.raises(ValueError, match=r"1\.5"):
        MatchingLoss(Linear(), (), alpha=1.5)
    with pytest.raises(ValueError, match="magic"):
        MatchingLoss(Linear(), (), rescale="magic")
    with pytest.raises(ValueError, match="cosine"):
        MatchingLoss(Linear(), (), subset_loss="cosine")
    with pytest.raises(ValueError, match="l3"):
        MatchingLoss(Linear(), (), distance="l3")
    with pytest.raises(ValueError, match="5"):
        inclusion_probability(4, 5)


@pytest.mark.parametrize("kind", SUBSET_LOSSES)
def test_the_head_of_a_known_subset_is_compared_with_its_own_mean(kind):
    model, images, _, _ = case()
    labels = torch.tensor([3, 1, 0, 0])
    logits = 200.0 * torch.nn.functional.one_hot(labels, 5).double()
    features = features_of(model, images).detach()
    errors = model.head(features).detach().softmax(1) - torch.nn.functional.one_hot(labels, 5)
    target, subset = averaged_gradient(model, images, labels), torch.tensor([3, 1])
    known = MatchingLoss(model, target, 0.5, "none", kind, known=(errors, features))
    blind = MatchingLoss(model, target, 0.5, "none", kind)
    body = [i for i, (name, _) in enumerate(model.named_parameters()) if "head" not in name]
    g_subset = averaged_gradient(model, images[subset], labels[subset])
    rest = [tuple(g[i] for i in body) for g in (g_subset, target)]
    expected = subset_distance(kind, *rest, batch_size=BATCH, subset_size=2)
    assert known(images, logits, subset).subset.item() == pytest.approx(expected.item(), rel=1e-9)
    assert blind(images, logits, subset).subset > known(images, logits, subset).subset
    partly = MatchingLoss(model, target, 0.5, "none", kind, known=(errors[:3], features[:3]))
    assert partly(images, logits, subset).subset == blind(images, logits, subset).subset


def test_the_cosine_distance_is_that_of_the_angle_and_forgets_the_length():
    a, b = (torch.tensor([3.0, 0.0]), torch.tensor([4.0])), (torch.tensor([0.0, 5.0]), torch.tensor([0.0]))
    assert cosine_distance(a, b).item() == 1
    assert cosine_distance(a, tuple(2 * p for p in a)).item() == pytest.approx(0, abs=1e-6)
    assert cosine_distance(a, tuple(-p for p in a)).item() == pytest.approx(2)
    model, images, logits, target = case()
    match = MatchingLoss(model, target, 1.0, "none", distance="cosine")(images, logits, torch.tensor([0]))
    gradient = averaged_gradient(model, images, logits.softmax(1))
    flat = [torch.cat([p.flatten() for p in g]) for g in (gradient, target)]
    assert match.full.item() == pytest.approx(1 - torch.cosine_similarity(*flat, dim=0).item())


def test_the_relative_cosine_heeds_no_tensors_size():
    model, images, logits, target = case()
    gradient = averaged_gradient(model, images, logits.softmax(1))

    def distance(target):
        loss = MatchingLoss(model, target, 1.0, "none", distance="relative_cosine")
        return loss(images, logits, torch.tensor([0])).full.item()

    for other in (target, tuple(2.0**i * g for i, g in enumerate(target))):
        scaled = [
            torch.cat([(p / q.square().mean().sqrt()).flatten() for p, q in zip(g, other, strict=True)])
            for g in (gradient, other)
        ]
        assert distance(other) == pytest.approx(1 - torch.cosine_similarity(*scaled, dim=0).item())
    assert distance(gradient) == pytest.approx(0, abs=1e-9)


def test_noise_is_measured_as_the_distance_is():
    model, *_ = case()
    shapes = {name: p.shape for name, p in model.named_parameters()}
    drawn = {name: torch.randn(shape, generator=generator(3)).double() for name, shape in shapes.items()}
    even = {name: g / g.square().mean().sqrt() for name, g in drawn.items()}

    def noise_of(gradients, distance):
        update = SharedUpdate(gradients, {}, "lenet", BATCH, (1, 16, 16), 5)
        return MatchingLoss(model, tuple(gradients.values()), distance=distance).noise_of(update)

    count = sum(g.numel() for g in even.values())
    plain = noise_of(even, "l2")
    assert plain > 0
    assert noise_of(even, "relative") == pytest.approx(plain / count)  # |g|^2 is the count
    head = list(even)[-2]  # where noise is measured; of all else, a tenth as large, it is ten times as much
    smaller = {name: g if name == head else g / 10 for name, g in even.items()}
    share = even[head].numel() / count
    expected = (share + 10 * (1 - share)) * plain / count
    assert noise_of(smaller, "relative") == pytest.approx(expected)


def test_feature_distances_of_a_hand_computed_case():
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 3))
    images = torch.tensor([[3.0, 4.0], [0.0, 2.0], [9.0, 9.0]]).view(3, 1, 1, 2)
    known = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    assert float(FeatureLoss(model, known)(images)) == pytest.approx((16 + 1) / 3)
    assert float(FeatureLoss(model, known, "relative")(images)) == pytest.approx((16 / 9 + 1) / 3)
    assert float(FeatureLoss(model, known, "cosine")(images)) == pytest.approx((1 - 3 / 5) / 3)
    errors = torch.tensor([0.5, 2.0]) / CLOSE_ENOUGH  # a distance of 1.5 and of 2 is all that is known
    assert float(FeatureLoss(model, known, errors=errors)(images)) == pytest.approx((16 - 1.5**2 + 0) / 3)
    assert float(FeatureLoss(model, known, "relative", errors)(images)) == pytest.approx((16 / 9 - 0.5**2 + 0) / 3)


def test_batchnorm_loss_compares_with_the_running_statistics():
    model = build_model("resnet18", image_shape=(3, 32, 32), num_classes=5, generator=generator()).double()
    images = torch.rand(4, 3, 32, 32, dtype=torch.float64, generator=generator(1))
    loss = BatchNormLoss(model)
    assert float(loss(images)) > 1
    model.train()
    for layer in loss.layers:
        layer.momentum = None  # running statistics become those of this batch
        layer.reset_running_stats()
    model(images)
    model.eval()
    for layer in loss.layers[:1]:  # what goes into the first does not depend on running statistics
        inputs = model.body.conv1(images)
        assert torch.allclose(layer.running_mean, inputs.mean((0, 2, 3)))
    first = BatchNormLoss(torch.nn.Sequential(model.body.conv1, model.body.bn1))
    object.__setattr__(first.model, "features", first.model.forward)
    size = images[:, 0].numel() / 4  # running variances are unbiased, the loss's are not
    expected = (model.body.bn1.running_var / size).norm()
    assert float(first(images)) == pytest.approx(float(expected), rel=1e-6)
    assert torch.autograd.gradcheck(first, torch.rand(2, 3, 8, 8, dtype=torch.float64).requires_grad_())
    assert not BatchNormLoss(build_model("lenet", image_shape=(3, 16, 16), num_classes=5, generator=generator())).layers


def test_disagreement_of_a_hand_computed_case():
    copies = torch.tensor([[0.0, 1.0], [1.0, 1.0]]).view(2, 1, 1, 1, 2)
    assert float(disagreement(copies)) == pytest.approx(2 * 0.25 / 4)
