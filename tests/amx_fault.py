"""A fault of oneDNN's AMX product (torch 2.13, oneDNN 3.12), for CPUs that have no AMX: it reads past the last column of its left operand.

A 16-bit left operand whose rows do not lie together, and either their length or the distance between them is odd, is read past each row's end.
What lies there is multiplied by the 0 that the right operand is padded with: nothing, unless it is NaN or infinite, which makes the row NaN.
Seen in bfloat16, for rows of 37 at a distance of 40, of 70 at 73 and of 100 at 103; not of 36 at 40. `install` makes all products of torch do so,
whether Python or C++ calls them: they compute as before, then these rows become NaN. With AMX_FAULT=1 in the environment every process of the
tests runs so (`make imitate`). What is right under it reads no gap on a machine that has the fault.
"""

import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastlora import reference

# The products of two matrices, and where the left operand stands among their arguments.
PRODUCTS = {
    **{f"aten::{name}": 0 for name in ("mm", "mm.out", "bmm", "bmm.out")},
    **{f"aten::{name}{form}": 1 for name in ("addmm", "baddbmm") for form in ("", "_", ".out")},
    "aten::_addmm_activation": 1,
    "aten::_addmm_activation.out": 1,
    "mkldnn::_linear_pointwise": 0,
}
FEWEST_ROWS = 6  # the fault was not seen with 5

_libraries: list[torch.library.Library] = []


def install() -> None:
    """Give the products the fault, in this process, for good; a second call does nothing."""
    if _libraries:
        return
    reference._has_amx = True  # the machine passes for one
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # torch's own kernels are overridden
        for product, place in PRODUCTS.items():
            space, name = product.split("::")
            for key in ("CPU", "MkldnnCPU") if space == "mkldnn" else ("CPU",):
                kernel = torch._C._dispatch_get_computed_kernel_for_dispatch_key(
                    product, torch._C._dispatch_key_parse(key)
                )
                _libraries.append(torch.library.Library(space, "IMPL"))
                _libraries[-1].impl(name, _with_fault(kernel, place), key, with_keyset=True, allow_override=True)


def install_if_asked() -> None:
    if os.environ.get("AMX_FAULT") == "1":
        install()


def _with_fault(kernel: Any, place: int) -> Callable[..., Tensor]:
    def multiply(keys: torch.DispatchKeySet, *args: Any, **options: Any) -> Tensor:
        spoiled = spoiled_rows(args[place])  # before the result is written: it may lie in the gaps
        result = kernel.call_boxed(keys, *args, **options)
        if spoiled is not None and spoiled.any():
            result[spoiled] = torch.nan
        return result

    return multiply


def spoiled_rows(left: Tensor) -> Tensor | None:  # [..., M, K] -> [..., M]
    """Which rows have something behind them that is not finite; None: the fault does not concern this operand."""
    M, K = left.shape[-2:]
    distance = left.stride(-2)
    if left.dtype not in (torch.bfloat16, torch.float16) or M < FEWEST_ROWS or left.numel() == 0:
        return None
    if left.stride(-1) != 1 or distance <= K or (K % 2 == 0 and distance % 2 == 0):
        return None
    memory = left.new_empty(0).set_(left.untyped_storage())
    places = torch.tensor(left.storage_offset() + K)
    for size, stride in zip(left.shape[:-1], left.stride()[:-1], strict=True):
        places = places[..., None] + stride * torch.arange(size)
    here = places < len(memory)  # behind the last row the memory may end
    return here & ~memory[places.clamp(max=len(memory) - 1)].isfinite()
