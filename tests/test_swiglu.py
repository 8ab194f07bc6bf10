"""swiglu: y = silu(gate) up, every implementation by its name."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from bounds import gapped
from row_operators import (
    check_bound,
    check_choice,
    check_compiles,
    check_each_alone,
    check_on_meta,
    check_repeats,
    check_without_gradients,
)
from torch import Tensor

from fastlora.functional import swiglu

OPERATOR = "swiglu"
SHAPES = [(0, 8), (1, 1), (3, 5), (2, 3, 64), (37, 576), (7, 1000)]


def eager(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def draw(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    """Gates from where silu is 0 to where it is its argument."""
    return [(torch.randn(shape) * 4).to(device, dtype), torch.randn(shape).to(device, dtype)]


@pytest.mark.parametrize("layout", [lambda one: one, gapped], ids=["dense", "gaps"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bound(
    device: str, implementation: str, shape: tuple[int, ...], dtype: torch.dtype, layout: Callable[[Tensor], Tensor]
) -> None:
    check_bound(swiglu, eager, partial(draw, shape, dtype, device), [0, 1], layout)


def test_far_from_zero(device: str, implementation: str) -> None:
    """Where e^-gate is beyond float32, on either side, and what is no number."""
    gate = torch.tensor([-1e30, -200.0, -88.5, -87.0, 87.0, 88.5, 200.0, 1e30, torch.nan], device=device)
    y = swiglu(gate, torch.ones_like(gate))
    expected = F.silu(gate.double())
    assert torch.allclose(y.double(), expected, rtol=1e-6, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_the_ends_of_float32(dtype: torch.dtype, device: str, implementation: str) -> None:
    """What eager gives: -0 for the lowest gate, NaN for -inf; and gradients of those."""
    gate = torch.tensor([-torch.inf, -3e38, -1e30, -89.0, 3e38, torch.inf, torch.nan], device=device, dtype=dtype)
    gate, up = gate.requires_grad_(), torch.full_like(gate, 0.5).requires_grad_()
    y, expected = swiglu(gate, up), eager(gate, up)
    assert torch.equal(y.signbit() | y.isnan(), expected.signbit() | expected.isnan())
    assert torch.allclose(y, expected, rtol=0, atol=1e-37, equal_nan=True)
    for found, right in zip(*(torch.autograd.grad(one.sum(), (gate, up)) for one in (y, expected)), strict=True):
        assert torch.allclose(found[:4], right[:4], rtol=0, atol=1e-37, equal_nan=True)


def test_gradcheck(device: str) -> None:
    gate, up = draw((3, 6), torch.float64, device)
    assert torch.autograd.gradcheck(swiglu, [gate.requires_grad_(), up.requires_grad_()])


def test_nothing_depends_on_who_watches(device: str, implementation: str) -> None:
    values = partial(draw, (2, 3, 40), torch.bfloat16, device)
    check_repeats(swiglu, values, [0, 1])
    check_compiles(swiglu, values, [0, 1])
    check_on_meta(swiglu, values, [0, 1])


def test_each_alone(device: str, implementation: str) -> None:
    check_each_alone(swiglu, partial(draw, (2, 3, 40), torch.float32, device), [0, 1])


def test_without_gradients(device: str, implementation: str) -> None:
    check_without_gradients(swiglu, partial(draw, (2, 3, 40), torch.float32, device))


def test_rows_and_elements_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    check_choice("swiglu", swiglu, draw((2, 3, 40)), 6, 240, monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    gate, up = draw((5, 16), dtype)
    torch.library.opcheck(torch.ops.fastlora.swiglu.default, (gate, up))
    torch.library.opcheck(torch.ops.fastlora.swiglu_backward.default, (up, gate, up))


X = torch.ones(3, 8)


@pytest.mark.parametrize(
    ("name", "error", "arguments"),
    [
        ("gate", TypeError, ([1.0], X)),
        ("gate", ValueError, (X.int(), X)),
        ("gate", ValueError, (torch.tensor(1.0), torch.tensor(1.0))),
        ("up", TypeError, (X, 1.0)),
        ("up", ValueError, (X, torch.ones(3, 7))),
        ("up", ValueError, (X, X.half())),
        ("up", ValueError, (X, X.to("meta"))),
    ],
)
def test_wrong_arguments(name: str, error: type[Exception], arguments: tuple) -> None:
    with pytest.raises(error, match=rf"^{name}: .*expected"):
        swiglu(*arguments)
