import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio

from judge.metrics import assign, evaluate, mean_psnr, psnr_matrix


def images(count=5, seed=0):
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def test_psnr_agrees_with_scikit_image():
    truth, guess = images(3), images(3, seed=1)
    matrix = psnr_matrix(truth, guess)
    for i in range(3):
        for j in range(3):
            expected = peak_signal_noise_ratio(truth[i].numpy(), guess[j].numpy(), data_range=1)
            assert matrix[i, j] == pytest.approx(expected, rel=1e-6)


@given(st.permutations(range(5)))
def test_a_shuffled_batch_is_matched_back(order):
    truth = images()
    noisy = (truth + 0.01 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(2))).clamp(0, 1)
    labels = torch.arange(5)
    figures = evaluate(truth, labels, noisy[order], labels[order])
    assert [order[j] for j in figures["assignment"]] == list(range(5))
    assert figures["label_accuracy"] == 1
    assert figures["recovered"] == 1
    assert figures["psnr_mean"] == pytest.approx(40, abs=0.7)
    assert figures["psnr_mean"] == pytest.approx(mean_psnr(truth, noisy))


def test_assignment_is_one_to_one_where_best_match_is_not():
    truth = torch.stack([torch.full((1, 16, 16), v) for v in (0.50, 0.52)])
    guess = torch.stack([torch.full((1, 16, 16), v) for v in (0.51, 0.90)])
    figures = evaluate(truth, torch.tensor([0, 1]), guess, torch.tensor([1, 1]))
    assert sorted(figures["assignment"]) == [0, 1]
    assert figures["psnr_mean_best_match"] > figures["psnr_mean"] + 10
    assert figures["label_accuracy"] == 0.5


def test_labels_are_compared_as_multisets_whichever_image_they_came_with():
    truth, labels = images(4), torch.tensor([3, 3, 7, 9])
    for predicted, share in (([9, 7, 3, 3], 1), ([3, 7, 7, 7], 0.5), ([3, 3, 3, 3], 0.5), ([1, 2, 4, 5], 0)):
        assert evaluate(truth, labels, truth, torch.tensor(predicted))["label_accuracy"] == share


def test_assignment_maximises_the_sum():
    psnr = np.array([[30.0, 29.0], [28.0, 10.0]])
    assert assign(psnr).tolist() == [1, 0]


def test_identical_images_are_capped_not_infinite():
    figures = evaluate(images(2), torch.tensor([0, 0]), images(2), torch.tensor([0, 0]))
    assert figures["psnr_mean"] == 100
    assert figures["ssim_mean"] == pytest.approx(1)
    assert figures["mse_mean"] == 0


def test_an_image_is_identified_where_its_picture_is_nearer_to_it_than_to_every_other():
    truth, labels = images(3), torch.zeros(3, dtype=torch.long)
    others = images(40, seed=1)
    noisy = (truth + 0.05 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(2))).clamp(0, 1)
    picture = torch.stack([noisy[0], others[7], torch.full_like(truth[2], 0.5)])
    figures = evaluate(truth, labels, picture, labels, (others[:25], others[25:]))
    assert figures["identified"][:2] == [True, False]
    distances = (others - 0.5).square().sum((1, 2, 3))
    nearest = min(float(distances.min()), float((truth[:2] - 0.5).square().sum((1, 2, 3)).min()))
    assert figures["identified"][2] == (float((truth[2] - 0.5).square().sum()) < nearest)
    assert figures["identified_among"] == 42
    assert figures["identification"] == pytest.approx(sum(figures["identified"]) / 3)


def test_copies_of_an_image_do_not_keep_it_from_being_identified_and_the_rest_of_its_batch_does():
    labels = torch.zeros(2, dtype=torch.long)
    twice = images(1).repeat(2, 1, 1, 1)
    assert evaluate(twice, labels, twice, labels, (twice,))["identified"] == [True, True]
    near = torch.stack([torch.full((1, 16, 16), v) for v in (0.4, 0.6)])
    guess = torch.stack([torch.full((1, 16, 16), v) for v in (0.41, 0.49)])
    figures = evaluate(near, labels, guess, labels)
    assert (figures["identified"], figures["identified_among"]) == ([True, False], 1)
    alone = evaluate(near[:1], labels[:1], guess[:1], labels[:1])
    assert (alone["identification"], alone["identified"], alone["identified_among"]) == (None, [None], 0)


@given(st.integers(0, 10**6))
def test_bits_are_equal_where_every_pixel_rounds_to_the_same_step(seed):
    drawn = torch.Generator().manual_seed(seed)
    truth = torch.randint(0, 256, (2, 3, 16, 16), generator=drawn) / 255
    off = truth + 0.49 / 255 * (2 * torch.rand(truth.shape, generator=drawn) - 1)
    off[1, 0, 3, 3] = truth[1, 0, 3, 3] + (0.51 / 255 if truth[1, 0, 3, 3] < 0.5 else -0.51 / 255)
    figures = evaluate(truth, torch.tensor([0, 0]), off, torch.tensor([0, 0]))
    assert (figures["equal_bits"], figures["bit_exact"]) == ([True, False], 0.5)
