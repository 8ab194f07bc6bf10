"""bounds.py, by which every numeric test judges: luck passes, what is wrong fails, and at once where no luck explains it."""

import itertools

import pytest
import torch
from bounds import INPUTS, LUCK, ROUNDS, Compared, assert_within_bound_over_inputs
from torch import Tensor

ONE = torch.ones(3)


def off_by(error: float) -> Tensor:
    return ONE + error


def taken(errors: list[tuple[float, float]]) -> int:
    """Of how many inputs the bound holds, whose errors (ours, eager's) come in turn and again."""
    count = itertools.count()
    given = itertools.cycle({"y": (off_by(ours), off_by(eager), ONE.double())} for ours, eager in errors)

    def compute() -> dict[str, Compared]:
        next(count)
        return next(given)

    assert_within_bound_over_inputs(compute)
    return next(count)


def test_equal_errors_are_within_the_bound_at_first() -> None:
    assert taken([(1e-4, 1e-4)]) == INPUTS


def test_luck_is_undone_by_more_inputs() -> None:
    """An error as large as one of eager's, which eager makes in the ninth input only."""
    assert taken([(3e-4, 1e-4), *[(1e-4, 1e-4)] * 7, (1e-4, 3e-4)]) == ROUNDS[1] * INPUTS


def test_three_times_eagers_error_fails_however_many_inputs() -> None:
    with pytest.raises(AssertionError, match="y: error 0.0003, bound 0.0002"):
        taken([(3e-4, 1e-4)])


def test_one_large_error_among_many_stays() -> None:
    """Of the first inputs, or of a later one: those that are right do not make it good."""
    for place in (0, 7):
        with pytest.raises(AssertionError, match="y: error 0.0003"):
            taken([(3e-4 if i == place else 1e-4, 1e-4) for i in range(ROUNDS[-1] * INPUTS)])


def test_what_no_luck_explains_fails_at_once() -> None:
    count = itertools.count()

    def compute() -> dict[str, Compared]:
        next(count)
        return {"y": (off_by(1e-4 * 2 * LUCK * 1.1), off_by(1e-4), ONE.double())}

    with pytest.raises(AssertionError, match="y: error"):
        assert_within_bound_over_inputs(compute)
    assert next(count) == INPUTS


@pytest.mark.parametrize("value", [off_by(float("nan")), off_by(float("inf"))], ids=["NaN", "infinite"])
def test_what_is_no_number_fails_at_once(value: Tensor) -> None:
    count = itertools.count()

    def compute() -> dict[str, Compared]:
        next(count)
        return {"y": (value, ONE, ONE.double())}

    with pytest.raises(AssertionError, match="y: error"):
        assert_within_bound_over_inputs(compute)
    assert next(count) == INPUTS


def test_inputs_differ_though_torch_is_left_seeded() -> None:
    """As drawing dropout's seeds leaves it."""
    seen = set()

    def compute() -> dict[str, Compared]:
        seen.add(torch.randn(()).item())
        torch.manual_seed(1)
        return {"y": (ONE, ONE, ONE.double())}

    assert_within_bound_over_inputs(compute)
    assert len(seen) == INPUTS
