import math
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from attack.read.candidates import ImageEquations, along_ones
from attack.read.head.by_trial import label_sets, unmix_head
from attack.read.peel import Above, starts, unlike, unmix, without
from attack.read.rays import extreme_rays, linked_programme, pinned, single_programme
from attack.read.signals import Signals
from attack.read.span import span_of
from attack.solve import programmes as solver
from attack.solve.budget import WorkBudget, unlimited
from data import load_batch, open_source
from network.head import features_of
from network.kinds.affine import Geometry
from network.zoo import build_model
from update.loss import Loss

F64 = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(count, first=0):
    """Real images (count, 3, 16, 16) and their own labels, of 10 classes."""
    found = load_batch(
        open_source("sample", None),
        range(first, first + count),
        labels="dataset",
        num_classes=10,
        generator=generator(),
        image_size=16,
    )
    return found.images, found.labels


class Case:
    """The gradients of a float32 net's layers, and in float64 what an attacker has and what it looks for.

    The net is a list of modules; before each but the first, and after the first, stands the activation.
    """

    def __init__(self, layers, activation, images, labels, noise=0.0):
        self.layers, self.activation, self.labels = layers, activation, labels
        logits, self.gradients = self._run([images]), None
        parameters = [p for layer in layers for p in layer.parameters()]
        grads = iter(torch.autograd.grad(nn.functional.cross_entropy(logits, labels), parameters))
        self.gradients = [[next(grads) for _ in layer.parameters()] for layer in layers]
        if noise:
            source = generator(9)
            self.gradients = [
                [g + noise * g.square().mean().sqrt() * torch.randn(g.shape, generator=source) for g in pair]
                for pair in self.gradients
            ]
        self.exact = [layer.double().requires_grad_(False) for layer in layers]
        self.inputs = []
        self._run([images.double()], self.inputs)

    def _run(self, values, record=None):
        (values,) = values
        for k, layer in enumerate(self.layers):
            values = values.flatten(1) if isinstance(layer, nn.Linear) else values
            if record is not None:
                record.append(values.detach())
            values = layer(values)
            values = values if k == len(self.layers) - 1 else self.activation(values)
        return values

    def stage(self, index):
        def tail(inputs, outputs):
            for layer in self.exact[index + 1 :]:
                outputs = self.activation(outputs)
                outputs = layer(outputs.flatten(1) if isinstance(layer, nn.Linear) else outputs)
            return outputs

        geometry = Geometry.of(self.exact[index], self.inputs[index].shape[1:])
        saturating = self.activation in (torch.sigmoid, torch.tanh) and index < len(self.layers) - 1
        span = span_of(
            self.gradients[index][0], geometry, len(self.labels), self.gradients[index][1], saturating=saturating
        )
        return Above(span, self.exact[index], tail)

    def unmix(self, index, kind, above=(), work=math.inf, seconds=math.inf, seed=0):
        stage = self.stage(index)
        return unmix(
            stage.span,
            stage.layer,
            stage.tail,
            is_sparse=kind == "relu",
            generator=generator(seed),
            budget=WorkBudget(work, deadline=time.perf_counter() + seconds),
            above=[self.stage(k) for k in above],
        )

    def errors(self, found, index):
        """For each image found the relative error to the nearest true one, and which that is."""
        truth = self.inputs[index].flatten(1)
        distance = torch.cdist(found.values.flatten(1), truth) / truth.norm(dim=1)
        return distance.min(1)


def mlp(widths, activation, count, *, seed=1, num_classes=10, scale=1.0, **settings):
    images, labels = batch(count)
    torch_state = generator(seed)
    layers = [nn.Linear(a, b) for a, b in zip([768, *widths], [*widths, num_classes], strict=True)]
    for layer in layers:
        for parameter in layer.parameters():
            parameter.data.uniform_(-1, 1, generator=torch_state).mul_(layer.in_features**-0.5)
    layers[0].weight.data.mul_(scale)
    return Case(layers, activation, images, labels, **settings)


def assert_all_found(case, found, index, error=1e-4):
    distance, which = case.errors(found, index)
    assert found.complete
    assert sorted(which.tolist()) == list(range(len(case.labels)))  # each once
    assert torch.equal(found.labels, case.labels[which])
    assert distance.max() < error
    assert (found.certificates - 1).abs().max() < 1e-3
    assert found.residuals.max() < 1e-4


@pytest.mark.parametrize(
    ("activation", "kind"), [(torch.sigmoid, "sigmoid"), (torch.tanh, "tanh"), (nn.functional.gelu, "gelu")]
)
def test_pixels_of_smooth_nets_follow_from_the_first_layer(activation, kind):
    """12 images of 10 classes: more than any head could tell apart, and labels repeat."""
    case = mlp([96, 96], activation, 12)
    assert len(case.labels.unique()) < 12
    found = case.unmix(0, kind)
    assert_all_found(case, found, 0)


def test_inputs_after_relu_are_extreme_rays():
    case = mlp([120, 120, 120], torch.relu, 12)
    assert_all_found(case, case.unmix(1, "relu"), 1)


def right_rays(programme, span, truth):
    """How many of eight programmes end in a true input."""
    rays, _ = extreme_rays(span, programme, 8, generator(), unlimited())
    cosine = nn.functional.cosine_similarity((rays @ span.basis)[:, None], truth[None], dim=2)
    return int((cosine > 1 - 1e-8).any(1).sum())


def test_layers_above_make_rays_of_inputs_that_one_layer_leaves_hidden():
    case = mlp([60, 60, 60, 60], torch.relu, 11)
    stages = [case.stage(k) for k in (1, 2, 3)]
    layers = [ImageEquations(s.span, s.layer, s.tail) for s in stages]
    linked = linked_programme(layers, [0.0, 0.0], is_sparse=True)
    span, truth = stages[0].span, case.inputs[1]
    assert right_rays(single_programme(span), span, truth) < right_rays(linked, span, truth)


def test_layers_above_help_to_tell_images_apart():
    """Alone the layer gives six of the eleven."""
    case = mlp([60, 60, 60, 60], torch.relu, 11)
    found = case.unmix(1, "relu", above=(2, 3))
    distance, which = case.errors(found, 1)
    assert len(found) == len(which.unique()) >= 9
    assert distance.max() < 1e-2
    assert torch.equal(found.labels, case.labels[which])


def convolutions(count):
    images, labels = batch(count)
    layers = [nn.Conv2d(3, 16, 5, 4, 2), nn.Conv2d(16, 80, 3, 1, 1), nn.Linear(80 * 16, 10)]
    for k, layer in enumerate(layers):
        for parameter in layer.parameters():
            parameter.data.uniform_(-1, 1, generator=generator(k)).mul_(layer.weight[0].numel() ** -0.5)
    return Case(layers, torch.relu, images, labels)


@pytest.mark.parametrize("count", [1, 3])
def test_a_convolutions_inputs_are_told_apart(count):
    case = convolutions(count)
    found = case.unmix(1, "relu")
    assert_all_found(case, found, 1, error=1e-3)
    assert found.values.shape == (count, 16, 4, 4)
    assert found.deltas.shape == (count, 80, 4, 4)


def test_an_image_that_is_not_believed_is_asked_once():
    """A ReLU far above that rounding has switched moves an image's delta by some thousandths: no polish mends that."""
    case, asked = convolutions(2), []
    stage, second = case.stage(1), case.inputs[1][1].flatten()

    def tail(inputs, outputs):
        is_second = nn.functional.cosine_similarity(inputs.flatten(1), second[None]) > 0.99
        asked.append(int(is_second.sum()))
        switched = 2e-4 * is_second * outputs[:, 0, 0, 0]
        return stage.tail(inputs, outputs) + torch.stack([switched, *[0 * switched] * 9], 1)

    found = unmix(stage.span, stage.layer, tail, is_sparse=True, generator=generator(), budget=unlimited())
    assert found.labels.tolist() == case.labels[:1].tolist()
    assert 0 < sum(asked) < 150  # 60; 630 where every round and every pass asks once more


def test_deltas_and_values_make_up_the_gradient():
    case = mlp([96, 96], torch.sigmoid, 6)
    found = case.unmix(0, "sigmoid")
    gradient = found.deltas.T @ found.values / 6
    assert torch.allclose(gradient, case.gradients[0][0].double(), atol=1e-4 * float(gradient.abs().max()))


def test_saturated_units_do_not_hide_the_images():
    """Where a sigmoid is at 1 - 1e-6, float32 leaves one digit of its slope: such rows are not exact, however small."""
    case = mlp([96, 96], torch.sigmoid, 5, scale=6.0)
    assert_all_found(case, case.unmix(0, "sigmoid"), 0, error=1e-3)


def test_starts_have_the_scale_of_an_image_and_lie_evenly_around_the_shortest_of_them():
    span = mlp([96, 96], nn.functional.gelu, 12).stage(0).span
    along = along_ones(span)[:, 0]
    shortest = along / along.square().sum()
    drawn = starts(span, 200, generator())
    assert torch.allclose(drawn @ along, torch.ones(200).double())
    away = (drawn - shortest) / shortest.norm()
    assert away.norm(dim=1)[:50].mean() < 0.4 < 0.6 < away.norm(dim=1)[-50:].mean() < 1
    assert away.mean(0).norm() < 0.1


def test_one_image_needs_no_search():
    for activation, kind in ((torch.sigmoid, "sigmoid"), (torch.relu, "relu")):
        case = mlp([40], activation, 1)
        for index in (0, 1):
            assert_all_found(case, case.unmix(index, kind), index)


def test_scale_is_found_without_a_bias():
    case = mlp([120, 120, 120], torch.relu, 4)
    stage = case.stage(1)
    span = span_of(case.gradients[1][0], stage.span.geometry, 4)
    assert span.ones is None
    found = unmix(span, stage.layer, stage.tail, is_sparse=True, generator=generator(), budget=unlimited())
    assert_all_found(case, found, 1, error=1e-3)


def assert_right(case, found, index):
    distance, which = case.errors(found, index)
    assert (distance < 0.1).all()
    assert (distance < 5 * found.uncertainty + 1e-3).all()
    assert torch.equal(found.labels, case.labels[which])


RELU, SIGMOID = (torch.relu, "relu", 1), (torch.sigmoid, "sigmoid", 0)


@pytest.mark.parametrize("noise", [1e-4, 1e-3, 5e-3])
@pytest.mark.parametrize(("activation", "kind", "index"), [RELU, SIGMOID])
def test_noise_is_not_fatal_where_it_is_low(activation, kind, index, noise):
    case = mlp([100, 100], activation, 6, noise=noise)
    found = case.unmix(index, kind)
    assert found.complete
    assert len(found) == 6
    assert_right(case, found, index)


def test_what_is_claimed_under_noise_is_right():
    """Some images are lost, and what is found of the others is not made worse by it."""
    activation, kind, index = SIGMOID
    case = mlp([100, 100], activation, 6, noise=1e-2)
    found = case.unmix(index, kind)
    assert 1 <= len(found) < 6
    assert not found.complete
    assert_right(case, found, index)


@pytest.mark.parametrize(("activation", "kind", "index"), [RELU, SIGMOID])
def test_of_what_noise_drowns_nothing_is_claimed(activation, kind, index):
    found = mlp([100, 100], activation, 6, noise=1e-1).unmix(index, kind)
    assert len(found) == 0
    assert not found.complete


def test_a_generator_decides_what_is_drawn():
    runs = [mlp([96, 96], torch.sigmoid, 5).unmix(0, "sigmoid", seed=s) for s in (3, 3)]
    assert torch.equal(runs[0].values, runs[1].values)


def test_a_deadline_in_the_past_finds_nothing():
    case = mlp([96, 96], torch.sigmoid, 5)
    found = case.unmix(0, "sigmoid", seconds=-1)
    assert len(found) == 0
    assert not found.complete
    assert found.values.shape == (0, 768)


def test_a_programme_without_solution_ends_no_search(monkeypatch):
    class Failed:
        status, x, nit = 2, None, 0

    monkeypatch.setattr(solver, "linprog", lambda *_, **__: Failed)
    case = mlp([60, 60], torch.relu, 5)
    assert len(case.unmix(1, "relu")) == 0


def test_a_layer_that_is_not_determined_is_refused():
    case = mlp([4, 4], torch.relu, 6)
    with pytest.raises(ValueError, match="does not determine its inputs: rank"):
        case.unmix(1, "relu")


def test_what_is_taken_out_is_gone_and_the_rest_is_not():
    case = mlp([100, 100], torch.relu, 6)
    stage, truth = case.stage(1), case.inputs[1]
    equations = ImageEquations(stage.span, stage.layer, stage.tail)
    deltas = equations.deltas(truth @ stage.span.basis.T, case.labels)
    rest = without(stage.span, truth[:4], deltas[:4])
    inside = (truth @ rest.basis.T).norm(dim=1) / truth.norm(dim=1)
    assert (rest.rank, rest.dimension) == (2, 2)
    assert (inside[4:] - 1).abs().max() < 1e-6
    again = truth[4:] @ rest.basis.T @ rest.basis
    assert (again - truth[4:]).norm() < 1e-4 * truth[4:].norm()


def test_true_inputs_satisfy_the_equations_and_mixtures_do_not():
    case = mlp([100, 100], torch.sigmoid, 5)
    stage = case.stage(0)
    equations = ImageEquations(stage.span, stage.layer, stage.tail)
    c = case.inputs[0] @ stage.span.basis.T
    free = torch.zeros(1, 1, dtype=torch.bool)
    assert equations.residual(c, free, equations.deltas(c, case.labels)).norm(dim=1).max() < 1e-4
    mixed = (c + c.roll(1, 0)) / 2
    assert equations.residual(mixed, free, equations.deltas(mixed, case.labels)).norm(dim=1).min() > 1e-2
    assert torch.equal(equations.mismatch(c).argmin(1), case.labels)


@pytest.mark.parametrize("loss", [Loss(smoothing=0.1), Loss("bce"), Loss("mse")], ids=str)
@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("activation", [torch.sigmoid, torch.relu])
def test_the_equations_change_as_their_derivatives_say(activation, paired, loss):
    case = mlp([40, 40], activation, 4)
    stage, source = case.stage(0), generator()
    equations = ImageEquations(stage.span, stage.layer, stage.tail, loss, paired=paired)
    truth = case.inputs[0]
    c = (truth + 0.3 * truth.roll(1, 0)) @ stage.span.basis.T
    zeros = torch.rand(truth.shape, generator=source) < 0.05
    f, slopes = equations.linearised(c, zeros, case.labels)
    direction = torch.randn(c.shape, generator=source, dtype=F64)

    def at(step):
        moved = c + step * direction
        return equations.residual(moved, zeros, equations.deltas(moved, case.labels))

    assert (f - at(0.0)).norm() < 1e-12 * f.norm()
    expected = (at(1e-6) - at(-1e-6)) / 2e-6
    assert ((direction[:, None] @ slopes)[:, 0] - expected).norm() < 1e-6 * expected.norm()


def test_rays_are_the_inputs_and_their_zeros_true_zeros():
    case = mlp([120, 120], torch.relu, 5)
    span, truth = case.stage(1).span, case.inputs[1]
    rays, zeros = extreme_rays(span, single_programme(span), 12, generator(), unlimited())
    values = rays @ span.basis
    cosine = torch.nn.functional.cosine_similarity(values[:, None], truth[None], dim=2)
    right = cosine.max(1).values > 1 - 1e-8
    assert right.sum() >= 3
    for i in right.nonzero()[:, 0].tolist():
        assert np.array_equal(truth[cosine[i].argmax()][zeros[i]], np.zeros(int(zeros[i].sum())))


def test_in_a_span_of_one_dimension_no_zeros_are_taken_for_granted():
    """Small entries follow on each other without a gap. Were some taken for zeros, the only input would be none."""
    span = SimpleNamespace(basis=torch.rand(1, 5000, generator=generator(), dtype=F64).square())
    c = torch.full((1, 1), 3.0, dtype=F64)
    rays, zeros = pinned(span, None, c)
    assert torch.allclose(rays, c)
    assert not zeros.any()


def head_case(count, num_classes=10, trained=False):
    images, labels = batch(count)
    model = build_model("lenet", image_shape=(3, 16, 16), num_classes=num_classes, generator=generator(1))
    if trained:  # a few steps make its softmax unlike that of random images
        optimiser = torch.optim.Adam(model.parameters(), 3e-3)
        more, classes = batch(100, first=20)
        for _ in range(30):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(more), classes).backward()
            optimiser.step()
    features = features_of(model, images).detach()
    gradient, bias_gradient = torch.autograd.grad(
        nn.functional.cross_entropy(model.head(features), labels), (model.head.weight, model.head.bias)
    )
    span = span_of(gradient, Geometry.of(model.head, features.shape[1:]), count, bias_gradient)
    return model, gradient, bias_gradient, span, features.double(), labels


@pytest.mark.parametrize("trained", [False, True])
def test_a_smooth_head_of_few_classes_gives_all_images_at_once(trained):
    model, gradient, bias_gradient, span, features, labels = head_case(6, trained=trained)
    head = model.head
    found = unmix_head(
        span,
        head.weight,
        head.bias,
        gradient,
        bias_gradient,
        non_negative=True,
        generator=generator(),
        budget=unlimited(),
    )
    distance, which = (torch.cdist(found.values, features) / features.norm(dim=1)).min(1)
    assert found.complete
    assert sorted(which.tolist()) == list(range(6))
    assert distance.max() < 1e-3
    assert torch.equal(found.labels, labels[which])


def test_the_true_labels_are_among_those_tried():
    for count in (2, 4, 7):
        _, gradient, bias_gradient, span, _, labels = head_case(count, trained=True)
        sets = label_sets(span, gradient.double(), bias_gradient, non_negative=True)
        assert any(torch.equal(tried, labels.sort().values) for tried in sets)
        assert all(len(tried) == count for tried in sets)
        assert len({tuple(tried.tolist()) for tried in sets}) == len(sets)


def test_more_label_sets_than_can_be_listed_are_proposed():
    _, gradient, _, span, _, _ = head_case(8, num_classes=60)
    sets = label_sets(span, gradient.double(), None, non_negative=False)
    assert 1 < len(sets) <= 400
    assert all(len(tried) == 8 for tried in sets)


def test_a_head_that_is_not_determined_is_refused():
    model, gradient, bias_gradient, span, _, _ = head_case(10)
    with pytest.raises(ValueError, match="does not determine 10 images"):
        unmix_head(
            span,
            model.head.weight,
            model.head.bias,
            gradient,
            bias_gradient,
            non_negative=True,
            generator=generator(),
            budget=unlimited(),
        )


def head_with_likeness(likeness, seed, count=8, width=512, classes=10):
    """A head on sparse non-negative features whose first two images, of one class, have nearly parallel errors."""
    source = generator(seed)
    features = torch.randn(count, width, generator=source).clamp(min=0)
    labels = torch.randint(classes, (count,), generator=source)
    labels[1] = labels[0]
    logits = 2 * torch.randn(count, classes, generator=source)
    logits[1] = logits[0] + likeness * torch.randn(classes, generator=source)
    head = nn.Linear(width, classes)
    head.weight.data = torch.linalg.lstsq(features, logits).solution.T.contiguous()
    head.bias.data.zero_()
    return Case([head], torch.relu, features, labels)


@pytest.mark.parametrize("seed", range(8))
def test_images_whose_errors_are_nearly_parallel_are_believed(seed):
    """What rounding does to the pairing of inputs with errors grows with their likeness; a tolerance must, too."""
    case = head_with_likeness(3e-2, seed)
    stage, truth = case.stage(0), case.inputs[0]
    equations = ImageEquations(stage.span, stage.layer, stage.tail)
    c = truth @ stage.span.basis.T
    assert len(equations.believed(c, truth == 0, case.labels, math.inf)) == 8
    mixed = c + 0.05 * c.roll(1, 0)
    assert not len(equations.believed(mixed, torch.zeros_like(truth, dtype=torch.bool), case.labels, math.inf))


def trained_head(seed, noise, count=8, width=1024, classes=10):
    """A head on sparse features with something in common; of some images it is almost sure, and their errors small."""
    source = generator(seed)
    common = torch.randn(width, generator=source)
    features = (0.5 * common + torch.randn(count, width, generator=source)).clamp(min=0)
    labels = torch.randint(classes, (count,), generator=source)
    logits = torch.randn(count, classes, generator=source)
    logits[torch.arange(count), labels] += torch.linspace(0, 5, count)
    head = nn.Linear(width, classes)
    head.weight.data = torch.linalg.lstsq(features, logits).solution.T.contiguous()
    head.bias.data.zero_()
    case = Case([head], torch.relu, features, labels)
    case.gradients = [[g + noise * torch.randn(g.shape, generator=source) for g in pair] for pair in case.gradients]
    return case


@pytest.mark.parametrize("seed", range(4))
def test_a_full_head_of_few_classes_is_read_under_noise(seed):
    """Ten rows of rank eight cannot tell each row's own noise, and what is left after seven images is mostly noise."""
    case = trained_head(seed, noise=3e-6)
    found = case.unmix(0, "relu")
    distance, which = case.errors(found, 0)
    assert found.complete
    assert torch.equal(found.labels, case.labels[which])
    assert distance.max() < 5e-2


@pytest.mark.parametrize("noise", [1e-7, 1e-6, 3e-6])
def test_expected_errors_behind_a_relu_are_the_errors(noise):
    cases = [trained_head(seed, noise) for seed in range(4)]
    ratios = []
    for case in cases:
        found = case.unmix(0, "relu")
        ratios.append(case.errors(found, 0)[0] / found.uncertainty)
    ratios = torch.cat(ratios)
    assert len(ratios) > 24
    assert 0.8 < ratios.square().mean().sqrt() < 1.25
    assert ratios.max() < 2


@pytest.mark.parametrize("seed", range(4))
def test_zeros_that_two_images_share_speak_for_neither(seed):
    case = trained_head(seed, noise=3e-6)
    stage, truth = case.stage(0), case.inputs[0]
    equations = ImageEquations(stage.span, stage.layer, stage.tail)
    c = truth @ stage.span.basis.T
    assert len(equations.believed(c, truth == 0, case.labels, math.inf)) > 5
    mixed = truth + 0.5 * truth.roll(1, 0)
    assert not len(equations.believed(mixed @ stage.span.basis.T, mixed == 0, case.labels, math.inf))


def test_what_one_search_leaves_over_another_finds():
    """Where images resemble each other, one order of taking them out fails now and then; tried again, most succeed."""
    complete = [head_with_likeness(3e-2, seed) for seed in range(6)]
    assert sum(len(case.unmix(0, "relu", seed=seed)) == 8 for seed, case in enumerate(complete)) >= 4


def told(values, labels, uncertainty):
    """Signals (N, 2) as an unmixing returns them, with the errors that are expected of them."""
    count = len(values)
    return Signals(
        values=torch.tensor(values, dtype=F64),
        labels=torch.tensor(labels),
        deltas=torch.zeros(count, 1, dtype=F64),
        residuals=torch.zeros(count, dtype=F64),
        certificates=torch.ones(count, dtype=F64),
        uncertainty=torch.tensor(uncertainty, dtype=F64),
        freedom=torch.ones(count, dtype=F64),
        batch_size=4,
    )


def test_images_that_their_errors_could_explain_are_one_image():
    """Two that were less sharp once came on top of the four that were all: six of four."""
    sharp = told([[1.0, 0.0], [0.0, 1.0]], [3, 3], [1e-6, 1e-6])
    blurred = told([[1.0, 0.02], [0.7, 0.7], [1.0, 0.02]], [3, 3, 5], [5e-3, 5e-3, 5e-3])
    new = unlike(blurred, sharp)
    assert new.values.tolist() == [[0.7, 0.7], [1.0, 0.02]]  # the second is neither, the third has another label
    assert len(unlike(told([[1.0, 0.02]], [3], [1e-6]), sharp)) == 1
