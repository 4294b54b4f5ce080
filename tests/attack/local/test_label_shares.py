import pytest
import torch
from conftest import generator

from attack.local.label_shares import Change, Quadratic, Trial

CLASSES = 6
IN_TURN = ((0, 1, 2, 3), (4, 5, 6, 7, 8))
RESHUFFLED = (*IN_TURN, (8, 1, 5, 3), (4, 0, 6, 7, 2))


def searched(truth, start, *, is_fixed=False, passes=(), seed=0):
    """The best trial where a training is linear in the targets, and some directions hardly show."""
    like = torch.zeros(1, dtype=torch.float64)
    goal = truth.targets(CLASSES, like)
    weights = torch.randn(40, goal.numel(), generator=generator(seed), dtype=torch.float64)
    weights = weights * torch.logspace(0, -2, goal.numel(), dtype=torch.float64)

    def left(targets):
        return weights @ (targets - goal).flatten()

    spent = []
    form = Quadratic(start, left, CLASSES, like, is_fixed=is_fixed, passes=passes, spend=spent.append)
    best = form.optima(generator())[0]
    assert all(work > 0 for work in spent)
    return best, float(left(best.targets(CLASSES, like)).square().sum())


@pytest.mark.parametrize("seed", range(2))
def test_labels_and_minibatches_are_found_without_a_training(seed):
    truth = Trial(torch.tensor([0, 1, 1, 5, 2, 2, 3, 4, 0]), IN_TURN)
    start = Trial(torch.randint(CLASSES, (9,), generator=generator(seed)), IN_TURN)
    best, left = searched(truth, start, seed=seed)
    assert left < 1e-12
    assert best.labels.tolist() == truth.in_one_order().labels.tolist()


def test_of_known_labels_the_minibatches_are_found():
    truth = Trial(torch.tensor([0, 1, 1, 5, 2, 2, 3, 4, 0]), IN_TURN)
    best, left = searched(truth, Trial(truth.labels.sort().values, IN_TURN), is_fixed=True)
    assert left < 1e-12
    assert sorted(best.labels.tolist()) == sorted(truth.labels.tolist())


def test_the_order_of_a_later_pass_is_found_with_the_labels():
    truth = Trial(torch.tensor([0, 1, 1, 5, 2, 2, 3, 4, 0]), RESHUFFLED)
    start = Trial(truth.labels, (*IN_TURN, *IN_TURN))
    best, left = searched(truth, start, passes=[range(2, 4)])
    assert left < 1e-12
    assert [len(images) for images in best.order] == [4, 5, 4, 5]
    assert sorted(sum(best.order[2:], ())) == list(range(9))


def test_a_swap_within_a_pass_leaves_labels_and_other_passes_as_they_are():
    trial = Trial(torch.arange(9), RESHUFFLED)
    swapped = Change((8, 4), (), (2, 3)).applied(trial)
    assert swapped.order == (*IN_TURN, (4, 1, 5, 3), (8, 0, 6, 7, 2))
    assert torch.equal(swapped.labels, trial.labels)
