"""The bound of every check of numbers: how far from the exact result an implementation may be.

    error of an implementation  <=  2 * error of eager PyTorch + tiny

Both errors are the largest absolute difference from the float64 result for the same, already rounded, inputs. tiny is one unit in the last
place of the largest value: eager can be exact by luck, and nobody can do better than round. Where a result has few elements, luck goes further
than that: there all three are taken over several inputs, the largest of each.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

TIMES_EAGER = 2


class Errors(NamedTuple):
    """Of one result: an implementation's error and eager PyTorch's, and tiny; in the unit of the result."""

    error: float
    eager: float
    tiny: float

    @property
    def bound(self) -> float:
        return TIMES_EAGER * self.eager + self.tiny

    @property
    def within(self) -> bool:
        """Never with a NaN on either side: nothing is at most NaN."""
        return self.error <= self.bound


def largest_error(value: Tensor, exact: Tensor) -> float:
    """The largest absolute difference, NaN if there is one anywhere, 0 for no elements.

    Raises:
        ValueError: the shapes differ.
    """
    if value.shape != exact.shape:
        raise ValueError(f"got shape {list(value.shape)}, expected {list(exact.shape)}")
    return (value.double() - exact.double()).abs().max().item() if exact.numel() else 0.0


def largest_value(exact: Tensor) -> float:
    return exact.double().abs().max().item() if exact.numel() else 0.0


def compare(value: Tensor, eager: Tensor, exact: Tensor) -> Errors:
    """How near `value` and `eager`, of one dtype, are to `exact`, of float64; what is no floating-point number must be the same.

    Raises:
        ValueError: the shapes differ.
    """
    unit = torch.finfo(value.dtype).eps if value.is_floating_point() else 0.0
    return Errors(largest_error(value, exact), largest_error(eager, exact), unit * largest_value(exact))


def over_inputs(found: Iterable[Errors]) -> Errors:
    """The same result's errors over several inputs as one: the largest of each, NaN if one is."""
    return Errors(*torch.tensor(list(found), dtype=torch.float64).max(0).values.tolist())


def nearly_equal(found: Tensor, expected: Tensor) -> bool:
    """Whether two ways to compute a model's values differ by rounding alone; NaN is never equal."""
    bound = max(4 * torch.finfo(expected.dtype).eps, 1e-3) * expected.abs().max()
    return found.shape == expected.shape and bool((found - expected).abs().max() <= bound)
