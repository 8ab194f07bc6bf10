"""Matrices of one column or one row: what their strides say of that side means nothing, and may be anything."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastlora import ops
from fastlora.bounds import nearly_equal
from fastlora.functional import frozen_linear, lora_linear, multi_lora


def apart(matrix: Tensor) -> Tensor:
    """Elements eight places apart, and so far each other stride: NaN lies between."""
    n, k = matrix.shape
    around = matrix.new_full((n, 8 * k), torch.nan)
    around[:, ::8] = matrix
    return around[:, ::8]


def by_column(matrix: Tensor) -> Tensor:
    """As a transposed one lies, with strides (1, n)."""
    return matrix.T.contiguous().as_strided(matrix.shape, (1, len(matrix)))


def cut(matrix: Tensor) -> Tensor:
    """The first columns of wider rows."""
    n, k = matrix.shape
    return torch.cat([matrix, matrix.new_full((n, 7), torch.nan)], 1)[:, :k]


LAYOUTS = (apart, by_column, cut)
OF_THREE = [*((one, one, one) for one in LAYOUTS), *(LAYOUTS[i:] + LAYOUTS[:i] for i in range(3))]
OPERATOR = "lora_linear"


@pytest.mark.parametrize(("K", "N"), [(1, 6), (3, 1), (1, 1)])
@pytest.mark.parametrize("rows", [5, 20])
def test_a_layer(rows: int, K: int, N: int, device: str, implementation: str) -> None:
    dense = [torch.randn(size, device=device) for size in ((rows, K), (N, K), (4, K))]
    lora_b, index = torch.randn(N, 4, device=device), torch.zeros(rows, dtype=torch.long, device=device)
    base = dense[0] @ dense[1].T
    right = base + dense[0] @ dense[2].T @ lora_b.T
    for layouts in OF_THREE:
        x, weight, lora_a = (layout(one) for layout, one in zip(layouts, dense, strict=True))
        assert nearly_equal(lora_linear(x, weight, None, lora_a, lora_b, 1.0), right)
        assert nearly_equal(multi_lora(x, weight, None, [lora_a], [lora_b], [1.0], index), right)
        assert nearly_equal(frozen_linear(x, weight, None), base)


@pytest.mark.skipif(ops.native("few_rows_lora_cpu") is None, reason="the native extension is not built")
@pytest.mark.parametrize("dtype", ops.KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("layout", [torch.clone, by_column, cut])
def test_a_few_rows(layout: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    """To the last bit as on copies without gaps, whichever of csrc's entries computes."""
    x, weight, lora_a, lora_b = (torch.randn(size).to(dtype) for size in ((5, 1), (6, 1), (4, 1), (6, 4)))
    lora, few = ops.native("few_rows_lora_cpu"), ops.native("few_rows_cpu")
    right, _ = lora(x, weight, None, lora_a, lora_b, 1.0)
    for one in (layout, apart):
        assert torch.equal(lora(one(x), layout(weight), None, one(lora_a), lora_b, 1.0)[0], right)
    assert torch.equal(few(apart(x), layout(weight), None), few(x, weight, None))
