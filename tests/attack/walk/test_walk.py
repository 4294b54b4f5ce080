import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from passes import sample_images
from torch import nn

from attack.read.forecast import explain
from attack.solve.budget import OutOfTimeError, WorkBudget, unlimited
from attack.solve.cgls import Product, cgls, refined
from attack.walk import methods
from attack.walk.equations import ForwardRows, GradientRows, KnownRows, Rows, Scaling, stack
from attack.walk.layer_solve import LayerSolver
from attack.walk.masks import flip_gain
from attack.walk.methods import Alone
from attack.walk.noise import noise_of, without_noise
from attack.walk.sources import LayerSource
from attack.walk.walk import BatchGradients, descend
from client.victim import share_update
from network.chain import index_of
from network.kinds.affine import Geometry, LinearMap
from network.known_outputs import KnownOutputs
from network.stage import run
from network.tracing import stages
from network.zoo import build_model


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def double(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


CONVOLUTIONS = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 5, "padding": 2, "stride": 2},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": 3, "padding": 2, "dilation": 2},
    {"kernel_size": 3, "padding": 1, "groups": 2},
    {"kernel_size": 3, "padding": 1, "stride": 2, "groups": 2},
]


def linear_maps():
    yield LinearMap.of(nn.Linear(5, 7, dtype=torch.float64), (5,)), (3, 5), (3, 7)
    for settings in CONVOLUTIONS:
        conv = nn.Conv2d(2, 4, dtype=torch.float64, **settings)
        x = double(3, 2, 8, 8)
        yield LinearMap.of(conv, (2, 8, 8)), x.shape, conv(x).shape


@pytest.mark.parametrize("case", range(1 + len(CONVOLUTIONS)))
def test_every_operator_has_its_adjoint(case):
    linear, inputs, outputs = list(linear_maps())[case]
    delta, known, part = double(*outputs), double(*outputs, seed=1) > 0, double(*inputs, seed=1) > 0
    operators = [GradientRows(linear, delta), ForwardRows(linear, known), KnownRows(part)]
    rows = []
    for operator, weight in zip(operators, (1.0, 0.3, 2.0), strict=True):
        target = operator.forward(double(*inputs))
        rows.append(Rows(operator, target, torch.full_like(target, weight)))
    scaling = Scaling.of(rows, torch.Size(inputs))
    for operator in [*operators, stack(rows)[0], scaling, Product(stack(rows)[0], scaling)]:
        x = double(*inputs, seed=3)
        image = operator.forward(x)
        y = double(*image.shape, seed=4)
        assert float((image * y).sum()) == pytest.approx(float((x * operator.adjoint(y)).sum()), rel=1e-9)


def test_gradient_rows_are_the_gradient():
    conv, u = nn.Conv2d(2, 4, 3, padding=1, stride=2, dtype=torch.float64), double(3, 2, 8, 8)
    delta = double(*conv(u).shape)
    (gradient,) = torch.autograd.grad((conv(u) * delta).sum(), conv.weight)
    rows = GradientRows(LinearMap.of(conv, (2, 8, 8)), delta)
    assert torch.allclose(rows.forward(u), gradient)
    shifted = rows.map.shifted(delta).flatten(0, 1)  # (c_out k^2, B H W)
    assert torch.allclose(
        shifted @ u.transpose(0, 1).flatten(1).T, gradient.transpose(1, 3).transpose(1, 2).flatten(0, 2)
    )


def test_scaled_gradient_rows_are_solved_at_once():
    conv, u = nn.Conv2d(2, 40, 3, padding=1, dtype=torch.float64), double(3, 2, 6, 6)
    operator = GradientRows(LinearMap.of(conv, (2, 6, 6)), double(3, 40, 6, 6))
    rows = [Rows(operator, operator.forward(u), torch.ones(40, 1, 1, 1, dtype=torch.float64))]
    stacked, target = stack(rows)
    scaling = Scaling.of(rows, u.shape)
    solution = cgls(Product(stacked, scaling), target, torch.zeros_like(u), iterations=10, budget=unlimited())
    assert solution.stopped == "converged"
    assert solution.iterations <= 3
    assert torch.allclose(scaling.forward(solution.x), u)


def test_equations_that_say_nothing_are_left_as_they_are_and_wrong_numbers_are_refused():
    conv = nn.Conv2d(2, 4, 3, padding=1, dtype=torch.float64)
    linear, delta, u = LinearMap.of(conv, (2, 6, 6)), double(3, 4, 6, 6), double(3, 2, 6, 6)
    for factor in (0.0, math.nan):
        operator = GradientRows(linear, factor * delta)
        rows = [Rows(operator, operator.forward(u), torch.ones(4, 1, 1, 1, dtype=torch.float64))]
        if factor == 0.0:
            assert torch.equal(Scaling.of(rows, u.shape).forward(u), u)
        else:
            with pytest.raises(ArithmeticError, match="not finite"):
                Scaling.of(rows, u.shape)


class Matrix:
    def __init__(self, matrix):
        self.forward, self.adjoint = matrix.__matmul__, matrix.T.__matmul__


def test_refinement_reaches_full_precision_in_float32_products():
    matrix = double(40, 10) @ torch.diag(torch.logspace(0, -2, 10, dtype=torch.float64))
    x, noise = double(10, seed=1), 1e-6 * double(40, seed=2)
    target, start = matrix @ x + noise, torch.zeros(10, dtype=torch.float64)
    solution = refined(Matrix(matrix), Matrix(matrix.float()), target, start, iterations=400, budget=unlimited())
    best = torch.linalg.lstsq(matrix, target[:, None]).solution[:, 0]
    assert (solution.x - best).norm() < 1e-8 * best.norm()  # float32 alone leaves 1e-6 and more
    assert solution.residual == pytest.approx(float((target - matrix @ best).norm() / target.norm()), rel=1e-6)
    assert solution.stopped != "iterations"


def test_refinement_keeps_its_limits():
    matrix, x = double(40, 10), double(10, seed=1)
    system = Matrix(matrix), Matrix(matrix.float()), matrix @ x, torch.zeros_like(x)
    assert refined(*system, iterations=3, budget=unlimited()).iterations == 3
    with pytest.raises(OutOfTimeError):
        refined(*system, iterations=50, budget=WorkBudget(deadline=0))


def test_the_solver_says_why_it_stopped():
    matrix, x = double(30, 10), double(10, seed=1)
    target = matrix @ x
    done = cgls(Matrix(matrix), target, torch.zeros(10, dtype=torch.float64), iterations=50, budget=unlimited())
    assert done.stopped == "converged"
    assert torch.allclose(done.x, x)
    assert done.residual < 1e-10
    short = cgls(Matrix(matrix), target, torch.zeros_like(x), iterations=2, budget=unlimited())
    assert short.stopped == "iterations"
    with pytest.raises(OutOfTimeError):
        cgls(Matrix(matrix), target, torch.zeros_like(x), iterations=2, budget=WorkBudget(deadline=0))


def test_a_grouped_layer_is_not_taken_for_one_matrix_of_patches():
    with pytest.raises(ValueError, match="groups"):
        Geometry.of(nn.Conv2d(4, 4, 3, groups=2), (4, 8, 8))


def test_noise_is_read_below_zero():
    clean = double(4, 50, 3, 3).relu()
    noise = torch.tensor([1e-5, 1e-4, 1e-3, 1e-5]).double().view(-1, 1, 1, 1)
    noisy = clean + noise * double(4, 50, 3, 3, seed=1)
    measured = noise_of(noisy, torch.zeros(4, 1, 1, 1).double(), is_after_relu=True)
    ratio = (measured / noise).flatten(1).median(1).values
    assert ((ratio > 0.7) & (ratio < 4)).all()


def with_a_wrong_mask(width, loudness):
    """A convolution on two images, of which the second is so loud and has one wrong mask.

    Returns its source, its true input, where the mask is wrong, and what delta should be there.
    """
    conv, truth = nn.Conv2d(3, width, 3, padding=1, dtype=torch.float64), double(2, 3, 4, 4)
    linear, delta = LinearMap.of(conv, (3, 4, 4)), double(2, width, 4, 4, seed=1)
    delta[1] *= loudness
    gradient = linear.weights(truth, delta)
    wrong, masked = (1, 5, 2, 2), torch.zeros_like(delta)
    masked[wrong], delta[wrong] = delta[wrong].item(), 0.0
    outputs = KnownOutputs.of(linear.outputs(truth), delta, torch.full_like(delta, 1e-9))
    above = replace(outputs, masked_delta=masked, margin=torch.ones_like(delta), is_gated=True)
    source = LayerSource("conv", linear, conv.bias.detach(), above, gradient, 1e-7, 0.0, mask_error=0 * double(2))
    return source, truth, wrong, masked[wrong]


def test_a_wrong_mask_is_suspected_although_the_solution_has_taken_up_most_of_it():
    source, truth, wrong, _ = with_a_wrong_mask(24, 1.0)
    operator, target = stack(source.rows()[:1])
    u = cgls(operator, target, torch.zeros_like(truth), iterations=200, budget=unlimited()).x
    assert (u - truth).norm() > 1e-2 * truth.norm()
    gain = flip_gain(source, u)
    assert np.unravel_index(int(gain.argmax()), gain.shape) == wrong
    mended = source.flipped(gain == gain.max())
    operator, target = stack(mended.rows()[:1])
    assert torch.allclose(cgls(operator, target, torch.zeros_like(truth), iterations=200, budget=unlimited()).x, truth)
    assert not flip_gain(mended, truth).any()


def test_a_faint_images_wrong_mask_is_mended_though_noise_might_have_left_as_much():
    source, truth, wrong, right = with_a_wrong_mask(48, 1e-5)
    solver = LayerSolver(unlimited(), too_weak=torch.zeros(2).bool(), needs_all=False)
    solved = solver.solve("conv", [source], Alone(truth.shape, generator(), unlimited()), is_after_relu=False)
    assert solved.sources[0].above.delta[wrong] == right
    assert (solved.u - truth)[0].norm() < 1e-9 * truth[0].norm()
    assert solved.record.flips == 1


def nearly_parallel(layer, shape, seed, error):
    """A layer of weights from 1 to 1e-3 and three images whose deltas nearly are one: what tells their inputs is weak.

    Its source, whose outputs and gradient are off by a relative error, and the true inputs.
    """
    g, shape = generator(seed), (3, *shape)

    def draw(*size):
        return torch.randn(*size, generator=g, dtype=torch.float64)

    with torch.no_grad():
        left, _, right = torch.linalg.svd(draw(*layer.weight.flatten(1).shape), full_matrices=False)
        sizes = torch.logspace(0, -3, len(right), dtype=torch.float64)
        layer.weight.copy_((left * sizes @ right).view_as(layer.weight))
        truth = draw(*shape)
        out = layer(truth)
    delta = draw(*out.shape)[:1] + 1e-4 * draw(*out.shape)
    linear, noise = LinearMap.of(layer, shape[1:]), error * out.square().mean().sqrt()
    known = KnownOutputs.of(out + noise * draw(*out.shape), delta, noise.expand(3, *[1] * (out.dim() - 1)))
    gradient = linear.weights(truth, delta)
    gradient = gradient * (1 + error * draw(*gradient.shape))
    source = LayerSource("layer", linear, layer.bias.detach(), known, gradient, error, 0.0, torch.zeros(3))
    return source, truth


@pytest.mark.parametrize(
    ("kind", "seed"),
    [
        *(("linear", seed) for seed in range(4)),
        ("convolution", 0),
        *(pytest.param("convolution", seed, marks=pytest.mark.long) for seed in (1, 2, 3)),
    ],
)
def test_claimed_errors_hold_where_equations_hardly_determine_the_input(kind, seed):
    how = {"dtype": torch.float64}
    layer = nn.Linear(12, 16, **how) if kind == "linear" else nn.Conv2d(4, 6, 3, padding=1, **how)
    source, truth = nearly_parallel(layer, (12,) if kind == "linear" else (4, 4, 4), seed, 1e-7)
    solver = LayerSolver(unlimited(), too_weak=torch.zeros(3).bool(), needs_all=False)
    solved = solver.solve("layer", [source], Alone(truth.shape, generator(), unlimited()), is_after_relu=False)
    if not solved.record.determined:
        assert "comes back" in solved.record.reason
        return
    error = (solved.u - truth).flatten(1).norm(dim=1) / truth.flatten(1).norm(dim=1)
    assert (error < 6 * solved.record.noise).all()  # 2.4 at most; the spread of single entries says 11 to 155
    assert (solved.record.noise < 1e-4).all()


# ----------------------------------------------------------------------------------------------------
# The walk


class Block(nn.Module):
    """A residual net of few channels and a wide layer on top, as a chain."""

    def __init__(self, activation=nn.ReLU):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=4, padding=1)
        self.a, self.b = nn.Conv2d(16, 24, 3, padding=1, bias=False), nn.Conv2d(24, 24, 3, padding=1, bias=False)
        self.na, self.nb, self.ns = nn.BatchNorm2d(24), nn.BatchNorm2d(24), nn.BatchNorm2d(24)
        self.short = nn.Conv2d(16, 24, 1, bias=False)
        self.last, self.head = nn.Conv2d(24, 32, 3, padding=1), nn.Linear(32 * 16, 10)
        self.activation = activation()

    def forward(self, images):
        x = self.activation(self.stem(images))
        body = self.nb(self.b(self.activation(self.na(self.a(x)))))
        x = self.activation(body + self.ns(self.short(x)))
        return self.head(self.activation(self.last(x)).flatten(1))


def small_net(activation):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Block(activation).eval()


def batch(count):
    return sample_images(range(count))


def walk(net, count, start, noise=1e-7):
    """The walk's result, and the true input of every top-level stage."""
    data = batch(count)
    update = share_update(net, "net", data.images, data.labels, 10)
    chain = stages(copy.deepcopy(net).double())
    with torch.no_grad():
        truth = [run(chain[:index], data.images.double()) for index in range(len(chain))]
    index = index_of(chain, start)
    inputs = truth[index] + noise * truth[index].square().mean().sqrt() * double(*truth[index].shape)
    return down(chain, update.gradients, index, inputs, data.labels), truth, chain


def down(chain, gradients, start, inputs, labels, budget=None):
    given = BatchGradients(gradients, len(labels))
    how = {"generator": generator(), "budget": budget or unlimited()}
    return descend(chain, (3, 16, 16), given, start, inputs, labels, **how)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Sigmoid, nn.Tanh])
def test_the_walk_goes_through_a_residual_block(activation):
    descent, truth, chain = walk(small_net(activation), 2, "last")
    block = index_of(chain, "add")
    assert block in descent.inputs
    assert (descent.inputs[block] - truth[block]).norm() < 1e-4 * truth[block].norm()
    assert [record.name for record in descent.records][:2] == ["b", "add"]
    assert all(record.determined and record.residual < 1e-5 for record in descent.records[:2])
    assert "b" in descent.inner


@pytest.mark.parametrize(("patient", "is_known"), [(2, False), (100, True)])
def test_an_input_on_its_way_gets_more_iterations(monkeypatch, patient, is_known):
    monkeypatch.setattr(methods, "LOOK", 2)
    monkeypatch.setattr(methods, "PATIENT", patient)
    descent, _, _ = walk(small_net(nn.Tanh), 2, "last")
    block = descent.records[1]
    assert (block.name, block.determined) == ("add", is_known)
    assert is_known == (block.iterations > 2)


def test_what_a_relu_set_to_zero_is_zero_without_the_noise_of_its_own_layer():
    descent, truth, chain = walk(small_net(nn.ReLU), 2, "last")
    for index, values in descent.inputs.items():
        clean = without_noise(values, descent.noise[chain[index].name])
        assert not torch.equal(values > 0, truth[index] > 0)
        assert torch.equal(clean > 0, truth[index] > 0)


def test_the_walk_stops_where_nothing_is_determined():
    descent, _, chain = walk(small_net(nn.ReLU), 2, "last")
    last = descent.records[-1]
    assert (last.name, last.determined) == ("stem", False)  # 16 channels of 16 positions for 768 pixels
    assert "equations for 1536 unknowns" in last.reason
    assert descent.deepest == index_of(chain, "add")


def test_false_gradients_are_not_believed():
    net = small_net(nn.Tanh)
    data = batch(2)
    update = share_update(net, "net", data.images, data.labels, 10)
    wrong = update.gradients | {"b.weight": update.gradients["b.weight"].flip(0)}
    chain = stages(copy.deepcopy(net).double())
    index = index_of(chain, "last")
    inputs = run(chain[:index], data.images.double()).detach()
    descent = down(chain, wrong, index, inputs, data.labels)
    assert descent.deepest == index
    assert not descent.records[-1].determined


def test_a_frozen_layer_ends_the_walk_with_a_word():
    net = small_net(nn.ReLU)
    data = batch(2)
    gradients = dict(share_update(net, "net", data.images, data.labels, 10).gradients)
    del gradients["b.weight"]
    chain = stages(copy.deepcopy(net).double())
    index = index_of(chain, "last")
    inputs = run(chain[:index], data.images.double()).detach()
    descent = down(chain, gradients, index, inputs, data.labels)
    assert descent.deepest == index
    assert "0 equations" in descent.records[-1].reason


def test_the_clock_ends_a_walk_and_the_last_record_says_so():
    net, data = small_net(nn.ReLU), batch(2)
    update = share_update(net, "net", data.images, data.labels, 10)
    chain = stages(copy.deepcopy(net).double())
    index = index_of(chain, "last")
    inputs = run(chain[:index], data.images.double()).detach()
    descent = down(chain, update.gradients, index, inputs, data.labels, WorkBudget(deadline=0))
    assert descent.deepest == index
    assert "the clock" in descent.records[-1].reason


def test_a_sigmoid_mlp_gives_its_pixels():
    net = build_model("mlp", image_shape=(3, 16, 16), num_classes=10, generator=generator(), width=64)
    descent, truth, _ = walk(net, 4, "hidden2", noise=1e-9)
    assert descent.deepest <= 1
    assert (descent.inputs[1] - truth[1]).norm() < 1e-2 * truth[1].norm()


def with_a_quiet_image(loudness):
    """A walk with ten images, of the first of which the network is so sure that its error is about so small.

    Returns what the walk found, and the relative errors (10,) and the name of the deepest inputs.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = nn.Linear(768, 96), nn.Sigmoid(), nn.Linear(96, 32), nn.Sigmoid(), nn.Linear(32, 10)
        net = nn.Sequential(nn.Flatten(), *sizes).eval()
    with torch.no_grad():
        net[-1].bias[0] -= math.log(loudness)
    data = replace(batch(10), labels=torch.arange(10))
    update = share_update(net, "net", data.images, data.labels, 10)
    chain = stages(copy.deepcopy(net).double())
    with torch.no_grad():
        truth = [run(chain[:index], data.images.double()) for index in range(len(chain))]
    start = len(chain) - 1
    descent = down(chain, update.gradients, start, truth[start], data.labels)
    at = descent.deepest
    error = (descent.inputs[at] - truth[at]).flatten(1).norm(dim=1) / truth[at].flatten(1).norm(dim=1)
    return descent, error, chain[at].name


def test_the_walk_goes_on_without_an_image_that_is_too_quiet():
    descent, error, name = with_a_quiet_image(1e-6)
    assert name == "3"
    assert [int(record.too_weak.sum()) for record in descent.records if record.determined] == [1]
    assert float(error[0]) > 1e-2 > 100 * float(error[1:].max())
    assert "pixels come of all images or of none" in descent.records[-1].reason


def test_no_image_is_too_weak_that_can_be_heard():
    descent, error, _ = with_a_quiet_image(1e-2)
    assert all(record.determined and not record.too_weak.any() for record in descent.records)
    assert descent.deepest <= 1
    assert float(error.max()) < 1e-2


# ----------------------------------------------------------------------------------------------------
# Blocks as a whole


class Plain(nn.Module):
    """A stem, a residual block that keeps its shape, a layer and a head."""

    def __init__(self, width=8):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=4, padding=1)
        self.a, self.na = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.b, self.nb = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.last, self.head = nn.Conv2d(width, 8, 3, padding=1), nn.Linear(8 * 16, 10)

    def forward(self, images):
        x = self.stem(images).relu()
        x = (self.nb(self.b(self.na(self.a(x)).relu())) + x).relu()
        return self.head(self.last(x).relu().flatten(1))


def plain():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Plain().eval()


@pytest.mark.long
def test_a_block_is_solved_whose_layers_have_too_few_equations():
    descent, truth, chain = walk(plain(), 8, "last")
    inner, block = descent.records[:2]
    assert (inner.name, block.name) == ("b", "add")
    assert 8 * 8 * 9 < inner.unknowns < inner.equations  # b's own gradient has too few rows
    assert inner.determined
    assert block.determined
    index = index_of(chain, "add")
    error = (descent.inputs[index] - truth[index]).flatten(1).norm(dim=1) / truth[index].flatten(1).norm(dim=1)
    assert float(error.max()) < 1e-5
    assert float(error.max()) / 5 < float(block.noise.max()) < 20 * float(error.max())


def test_a_block_is_not_believed_where_even_all_its_equations_do_not_lead_there():
    descent, _, chain = walk(plain(), 12, "last")  # 1.03 for each unknown
    assert descent.deepest == index_of(chain, "last")
    assert not descent.records[-1].determined


@pytest.mark.parametrize(("batch_size", "is_known"), [(2, True), (8, True), (40, False)])
def test_what_is_determined_together_is_explained(batch_size, is_known):
    rows = {row["layer"]: row for row in explain(stages(plain()), (3, 16, 16), batch_size)}
    assert rows["b"]["determined"] is is_known
    alone = 8 * 8 * 9
    together = alone + batch_size * 8 * 16 // 2
    assert rows["b"]["equations"] == (together if batch_size == 8 else alone)
