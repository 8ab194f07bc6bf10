"""rms_norm: y = x w / sqrt(mean(x²) + eps), every implementation by its name."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from bounds import gapped
from row_operators import (
    check_bound,
    check_choice,
    check_compiles,
    check_on_meta,
    check_repeats,
    check_without_gradients,
)
from torch import Tensor

from fastlora.functional import rms_norm

OPERATOR = "rms_norm"
EPS = 1e-5
SHAPES = [(0, 8), (1, 1), (3, 5), (2, 3, 64), (37, 576), (5, 1000)]


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x, weight, EPS)


def eager(x: Tensor, weight: Tensor) -> Tensor:
    """As transformers' LlamaRMSNorm computes it."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def draw(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    scale = torch.logspace(-2, 1, max(shape[-2], 1))[: shape[-2], None]
    return [(torch.randn(shape) * scale).to(device, dtype), torch.randn(shape[-1]).to(device, dtype)]


@pytest.mark.parametrize("layout", [lambda one: one, gapped], ids=["dense", "gaps"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bound(
    device: str, implementation: str, shape: tuple[int, ...], dtype: torch.dtype, layout: Callable[[Tensor], Tensor]
) -> None:
    check_bound(norm, eager, partial(draw, shape, dtype, device), [0], layout)


def test_a_row_of_zeros(device: str, implementation: str) -> None:
    x = torch.zeros(2, 8, device=device, requires_grad=True)
    y = norm(x, torch.ones(8, device=device))
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, torch.zeros_like(y)) and torch.allclose(dx, torch.full_like(dx, EPS**-0.5))


def test_gradcheck(device: str) -> None:
    x, weight = draw((3, 6), torch.float64, device)
    assert torch.autograd.gradcheck(lambda x: norm(x, weight), [x.requires_grad_()])


def test_nothing_depends_on_who_watches(device: str, implementation: str) -> None:
    values = partial(draw, (2, 3, 40), torch.bfloat16, device)
    check_repeats(norm, values, [0])
    check_compiles(norm, values, [0])
    check_on_meta(norm, values, [0])


def test_without_gradients(device: str, implementation: str) -> None:
    check_without_gradients(norm, partial(draw, (2, 3, 40), torch.float32, device))


def test_rows_and_elements_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    check_choice("rms_norm", norm, draw((2, 3, 40)), 6, 240, monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    x, weight = draw((5, 16), dtype)
    torch.library.opcheck(torch.ops.fastlora.rms_norm.default, (x, weight, EPS))
    torch.library.opcheck(torch.ops.fastlora.rms_norm_backward.default, (x, x, weight, torch.rand(5)))


X, WEIGHT = torch.ones(3, 8), torch.ones(8)


@pytest.mark.parametrize(
    ("name", "error", "arguments"),
    [
        ("x", TypeError, ([1.0], WEIGHT, EPS)),
        ("x", ValueError, (X.int(), WEIGHT, EPS)),
        ("weight", TypeError, (X, [1.0] * 8, EPS)),
        ("weight", ValueError, (X, torch.ones(7), EPS)),
        ("weight", ValueError, (X, WEIGHT.half(), EPS)),
        ("weight", ValueError, (X, WEIGHT.to("meta"), EPS)),
        ("weight", ValueError, (X, torch.ones(8, requires_grad=True), EPS)),
        ("weight", ValueError, (torch.tensor(1.0), torch.ones(()), EPS)),
        ("eps", TypeError, (X, WEIGHT, None)),
        ("eps", ValueError, (X, WEIGHT, float("nan"))),
    ],
)
def test_wrong_arguments(name: str, error: type[Exception], arguments: tuple) -> None:
    with pytest.raises(error, match=rf"^{name}: .*expected"):
        rms_norm(*arguments)
