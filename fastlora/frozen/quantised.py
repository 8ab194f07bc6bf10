"""Frozen weights in 4 bits or 8, as tensors that the operators take in a weight's place, and the products with them on a CPU.

    y = x Wᵀ + b   dx = dy W   W = reference.py::dequantise

W is never whole in memory, if it is large: a panel of it is dequantised at a time, in the dtype that the product is computed in, and multiplied by in
the way that was measured for frozen weights of that size (products.py). A few rows in the forward are dot products with what is dequantised in
registers (csrc/cpu/quantised.h).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fastlora import gradients, ops, reference

PANEL = 2**21  # elements of W at a time: as many bytes again as they have stay in the third-level cache
PANEL_UNIT = 64  # rows or columns of a panel are a multiple of this

_dequantise = ops.native("dequantise_cpu")
_few_rows = ops.native("few_rows_quantised_cpu")


class Stored(NamedTuple):
    """A weight [rows, columns] as it lies in memory, in the order of reference.py::dequantise."""

    packed: Tensor
    code: Tensor | None
    factor: Tensor
    factor_codes: Tensor | None
    factor_code: Tensor | None
    factor_offset: float
    block: int
    factor_block: int
    rows: int
    columns: int


class QuantisedWeight(Tensor):
    """W [N, K] of x's dtype, without memory of its own. Operations that know nothing of it get W as a whole.

    stored: what it is made of. title: what people call it. compute: the dtype that the product is computed in; its result is rounded to x's.
    own_product: what computes y from (x, bias) in the place of the dequantised product, in the forward alone, or None.
    """

    stored: Stored
    title: str
    compute: torch.dtype
    own_product: Callable[[Tensor, Tensor | None], Tensor] | None

    @staticmethod
    def __new__(
        cls,
        stored: Stored,
        title: str,
        dtype: torch.dtype,
        compute: torch.dtype,
        own_product: Callable[[Tensor, Tensor | None], Tensor] | None = None,
    ) -> "QuantisedWeight":
        size = stored.rows, stored.columns
        make: Any = Tensor._make_wrapper_subclass
        self = make(cls, size, dtype=dtype, device=stored.packed.device)
        self.stored, self.title, self.compute, self.own_product = stored, title, compute, own_product
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = tree_map(_dense, (args, kwargs or {}))
        return func(*args, **kwargs)

    def panel(self, row: int, rows: int, column: int, columns: int) -> Tensor:
        """Some rows and columns of W, in the dtype that the product is computed in."""
        if _dequantise is None or self.compute not in ops.KERNEL_DTYPES or self.stored.packed.device.type != "cpu":
            whole = reference.dequantise(*self.stored, dtype=self.compute)
            return whole[row : row + rows, column : column + columns].contiguous()
        to = torch.empty(rows, columns, dtype=self.compute)
        _dequantise(to, *self.stored, row, column)
        return to

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"QuantisedWeight({self.title}, {list(self.shape)}, {self.dtype})"


gradients.PLAIN_TYPES.add(QuantisedWeight)


def _dense(value: Any) -> Any:
    if type(value) is not QuantisedWeight:
        return value
    return value.panel(0, value.stored.rows, 0, value.stored.columns).to(value.dtype)


def panels(weight: QuantisedWeight, along: int) -> list[tuple[int, int]]:
    """(first, count) of the rows (along 0) or columns (along 1) of each panel."""
    size, across = weight.shape[along], weight.shape[1 - along]
    most = max(PANEL // max(across, 1) // PANEL_UNIT, 1) * PANEL_UNIT
    return [(first, min(most, size - first)) for first in range(0, size, most)]


def few_rows(x: Tensor, weight: QuantisedWeight, bias: Tensor | None) -> Tensor:
    """y = x Wᵀ + b for a few rows of the dtype that the product is computed in."""
    return _few_rows(x, *weight.stored, bias)


def takes_few_rows(weight: QuantisedWeight) -> bool:
    return _few_rows is not None and weight.compute in ops.KERNEL_DTYPES and weight.stored.columns > 0


def is_native() -> bool:
    """Whether the native extension is there."""
    return _dequantise is not None
