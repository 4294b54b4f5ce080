import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attack.solve.budget import WorkBudget


@given(st.floats(1, 1e12), st.floats(0, 1), st.floats(0, 1.5))
def test_a_part_is_that_share_and_what_it_leaves_comes_back(work, share, spent):
    whole = WorkBudget(work)
    part = whole.part(share)
    assert part.left == pytest.approx(share * work)
    assert part.left + whole.left == pytest.approx(work)
    part.spend(spent * part.left)
    whole.returned(part)
    assert whole.left == pytest.approx(work * (1 - share * min(spent, 1.0)), abs=1e-6 * work)


def test_a_part_of_a_budget_without_bound_has_none_and_takes_nothing():
    whole = WorkBudget()
    part = whole.part(0.1)
    part.spend(1e30)
    whole.returned(part)
    assert part.left == whole.left == math.inf
    assert not part.is_spent
