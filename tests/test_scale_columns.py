"""scale_columns: y = c u + b, every implementation by its name."""

from functools import partial

import pytest
import torch
from bounds import gapped
from row_operators import (
    check_bound,
    check_compiles,
    check_each_alone,
    check_on_meta,
    check_repeats,
    check_without_gradients,
)
from torch import Tensor

from fastlora import ops
from fastlora.functional import scale_columns
from fastlora.operators import scale_columns as operator

OPERATOR = "scale_columns"
SHAPES = [(0, 8), (3, 0), (1, 1), (3, 5), (2, 3, 64), (37, 576), (33, 17), (700, 70)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def eager(u: Tensor, factor: Tensor, bias: Tensor | None = None) -> Tensor:
    wide = u.to(torch.promote_types(u.dtype, torch.float32)) * factor
    return (wide if bias is None else wide + bias).to(u.dtype)


def draw(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cpu", bias: bool = True
) -> list[Tensor]:
    u, factor, b = torch.randn(shape), torch.randn(shape[-1]), torch.randn(shape[-1])
    wide = torch.promote_types(dtype, torch.float32)
    return [u.to(device, dtype), factor.to(device, wide), *([b.to(device, dtype)] if bias else [])]


@pytest.mark.parametrize("layout", [lambda one: one, gapped], ids=["dense", "gaps"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_bound(device, implementation, shape, dtype, layout, bias):
    check_bound(scale_columns, eager, partial(draw, shape, dtype, device, bias), [0, 1], layout)


def test_columns_that_lie_together(device, implementation):
    check_bound(
        scale_columns,
        eager,
        partial(draw, (40, 30), torch.float32, device),
        [0, 1],
        lambda one: one.T.contiguous().T if one.dim() == 2 else one,
    )


def test_many_rows_are_summed_by_parts(device, implementation):
    """What a chain of 5000 additions would round away."""
    check_bound(scale_columns, eager, partial(draw, (5000, 6), torch.float32, device), [0, 1])


def test_gradcheck(device):
    inputs = draw((3, 6), torch.float64, device)
    assert torch.autograd.gradcheck(
        lambda u, factor: scale_columns(u, factor, inputs[2]), [one.requires_grad_() for one in inputs[:2]]
    )


def test_nothing_depends_on_who_watches(device, implementation):
    values = partial(draw, (2, 3, 40), torch.bfloat16, device)
    check_repeats(scale_columns, values, [0, 1])
    check_each_alone(scale_columns, values, [0, 1])
    check_compiles(scale_columns, values, [0, 1])
    check_on_meta(scale_columns, values, [0, 1])
    check_without_gradients(scale_columns, values)


def test_as_many_threads_as_there_are_give_the_same_bits(device, implementation):
    u, factor = (one.requires_grad_() for one in draw((3000, 70), device=device, bias=False))
    dy, found = torch.randn(3000, 70, device=device), []
    threads = torch.get_num_threads()
    for number in (1, 2):
        torch.set_num_threads(number)
        found.append(torch.autograd.grad(scale_columns(u, factor), [u, factor], dy))
    torch.set_num_threads(threads)
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    u, factor, bias = draw((5, 16), dtype)
    for given in (bias, None):
        torch.library.opcheck(torch.ops.fastlora.scale_columns.default, (u, factor, given))
    torch.library.opcheck(torch.ops.fastlora.scale_columns_backward.default, (u, u, factor))


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_whoever_has_none_leaves_it_to_torch(monkeypatch, name):
    monkeypatch.setattr(ops, "forced", name)
    for backward in (False, True):
        assert operator.choose(torch.ones(2, 3), backward) == ops.Choice("reference", "FASTLORA_IMPL")


U, FACTOR, BIAS = torch.ones(3, 8), torch.ones(8), torch.ones(8)


@pytest.mark.parametrize(
    ("name", "error", "arguments"),
    [
        ("u", TypeError, ([1.0], FACTOR, BIAS)),
        ("u", ValueError, (U.int(), FACTOR, BIAS)),
        ("u", ValueError, (torch.tensor(1.0), FACTOR, BIAS)),
        ("factor", TypeError, (U, [1.0] * 8, BIAS)),
        ("factor", ValueError, (U, torch.ones(7), BIAS)),
        ("factor", ValueError, (U, FACTOR.half(), BIAS)),
        ("factor", ValueError, (U.half(), FACTOR.half(), BIAS.half())),
        ("factor", ValueError, (U, FACTOR.to("meta"), BIAS)),
        ("bias", TypeError, (U, FACTOR, 1.0)),
        ("bias", ValueError, (U, FACTOR, torch.ones(7))),
        ("bias", ValueError, (U, FACTOR, BIAS.half())),
        ("bias", ValueError, (U, FACTOR, BIAS.to("meta"))),
        ("bias", ValueError, (U, FACTOR, torch.ones(8, requires_grad=True))),
    ],
)
def test_wrong_arguments(name, error, arguments):
    with pytest.raises(error, match=rf"^{name}: .*(expected|got)"):
        scale_columns(*arguments)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("u", (U[0], FACTOR, None)),
        ("factor", (U, FACTOR[1:], None)),
        ("factor", (U, FACTOR.double(), None)),
        ("bias", (U, FACTOR, BIAS[1:])),
        ("bias", (U, FACTOR, BIAS.half())),
    ],
)
def test_native_code_checks_as_well(name, arguments):
    if not ops.has(OPERATOR, "cpu"):
        pytest.skip("the extension is not built")
    with pytest.raises((RuntimeError, ValueError), match=name):
        ops.implementation(OPERATOR, "cpu")(*arguments)
