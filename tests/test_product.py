"""product_cpu: the product of many rows in float32 and in 16 bits, against float64, and the same whatever the number of threads."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from bounds import Compared, assert_within_bound_over_inputs, dense, double, gapped, print_accepted, transposed
from torch import Tensor

from fastlora import ops

# M, K, N: no rows, columns or products at all; one; ends of tiles, panels, blocks and of what a panel holds.
SHAPES = (
    (0, 5, 7),
    (5, 0, 7),
    (5, 7, 0),
    (1, 1, 1),
    (7, 65, 129),
    (65, 129, 7),
    (129, 1001, 65),
    (65, 7, 1001),
    (1001, 1, 65),
    (65, 1001, 1),
    (13, 2049, 64),
    (12, 4200, 70),
)

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)

pytestmark = pytest.mark.skipif(
    not ops.availability()[1].present,
    reason="the native extension is not built (make demo, or pip install -e . with g++)",
)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.fastlora.product_cpu(x, weight, bias)


Given = tuple[Tensor, Tensor, Tensor | None]  # x, weight and bias


def check(draw: Callable[[], Given], layout: Callable[..., Given] = lambda *given: given) -> None:
    """The errors over what is drawn, in one layout."""

    def compute() -> dict[str, Compared]:
        given = layout(*draw())
        y = product(*given)
        assert y.is_contiguous()
        return {"y": (y, F.linear(*map(dense, given)), F.linear(*map(double, given)))}

    assert_within_bound_over_inputs(compute)


def check_shapes() -> None:
    """In a process without this one's fixtures, which test_native.py starts for every instruction set."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # uninitialised memory is NaN
    for M, K, N in SHAPES:
        torch.manual_seed(M + K + N)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            check_layouts(partial(draw_of, M, K, N, dtype))


def draw_of(M: int, K: int, N: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(M, K).to(dtype), torch.randn(N, K).to(dtype), torch.randn(N).to(dtype)


def check_layouts(draw: Callable[[], tuple[Tensor, Tensor, Tensor]]) -> None:
    check(draw)
    check(draw, lambda x, weight, _: (x, transposed(weight), None))
    check(draw, lambda *given: tuple(map(gapped, given)))
    check(draw, lambda x, weight, bias: (transposed(x), gapped(weight.T).T, bias))
    x, weight, bias = draw()
    torch.testing.assert_close(product(x, transposed(weight), bias), product(x, weight, bias), rtol=0, atol=0)


@pytest.mark.parametrize("K", [1536, 2048])
def test_long_sums_are_as_near_as_torch(K: int) -> None:
    """A single chain of additions over all of K would not be."""

    def draw() -> Given:
        return torch.randn(256, K), torch.randn(192, K) / K**0.5, None

    check(draw)
    check(draw, lambda x, weight, bias: (x, transposed(weight), bias))


@DTYPES
def test_blocks_of_rows_change_nothing(dtype: torch.dtype) -> None:
    """Many rows of 16 bits are widened a block at a time: the row at each border is as it is alone."""
    x, weight, bias = torch.randn(1500, 4000).to(dtype), torch.randn(2000, 4000).to(dtype), torch.randn(2000).to(dtype)
    few = weight[:40], bias[:40]
    y = product(x, weight, bias)
    for row in (0, 697, 698, 1395, 1396, 1499):
        torch.testing.assert_close(y[row : row + 1, :40], product(x[row : row + 1], *few), rtol=0, atol=0)


@DTYPES
def test_threads_change_nothing(dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(100, 300).to(dtype), torch.randn(200, 300).to(dtype), torch.randn(200).to(dtype)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(product(x, weight, bias))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


def test_nan_and_infinity_stay_in_their_row_and_column() -> None:
    x, weight = torch.ones(20, 40), torch.ones(70, 40)
    x[3, 39], weight[69, 0] = torch.nan, torch.inf
    y = product(x, weight)
    assert y[3].isnan().all()
    y[3] = 0
    assert y[:3, 69].isinf().all() and y[4:, 69].isinf().all()
    assert (y[4:, :69] == 40).all()


def test_wrong_arguments_are_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    right = {"x": torch.randn(6, 40), "weight": torch.randn(70, 40), "bias": torch.randn(70)}
    wrong = {
        "three dimensions": ("x", {"x": torch.randn(1, 6, 40)}),
        "float64": ("x", {name: tensor.double() for name, tensor in right.items()}),
        "bfloat16 alone": ("weight", {"x": right["x"].bfloat16()}),
        "another K": ("weight", {"weight": torch.randn(70, 41)}),
        "another dtype": ("weight", {"weight": torch.randn(70, 40).double()}),
        "gaps both ways": ("weight", {"weight": torch.randn(140, 80)[::2, ::2]}),
        "another N": ("bias", {"bias": torch.randn(71)}),
    }
    print_accepted("product_cpu", right, wrong)
    y = torch.zeros(6, 70)
    wrong = {
        "bfloat16": ("x", {"y": y.bfloat16(), "x": right["x"].bfloat16(), "weight": right["weight"].bfloat16()}),
        "another shape": ("y", {"y": torch.zeros(6, 71)}),
    }
    print_accepted("add_product_cpu", {"y": y, "x": right["x"], "weight": right["weight"]}, wrong)
    assert capsys.readouterr().out == ""
