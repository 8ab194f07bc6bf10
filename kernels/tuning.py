"""Which tiles the Triton kernels use for which sizes. Right at any size; the figures are heuristics until they are measured.

A 128-row tile takes eight warps: with four, its accumulators do not fit the registers of sm_80 and sm_90 (checked by tests/test_cross_compile.py).
"""

import functools
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from fastlora.ops import ImplementationError

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
GROUP_M = 8  # rows of tiles that share the L2 cache
MOST_PARTS = 64  # partial results of one sum


@dataclass(frozen=True)
class Config:
    """One kernel's tile: rows of x, columns of the result, steps of the sum, ranks at a time; 0 for what a kernel does not have."""

    rows: int
    columns: int
    inner: int
    rank: int
    num_warps: int
    num_stages: int

    @property
    def launch(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def require_float(op: str, x: Tensor) -> None:
    """Raise ImplementationError where x's dtype has no kernels."""
    if x.dtype not in FLOATS:
        raise ImplementationError(
            f"{op}: the Triton kernels take float32, bfloat16 and float16, got {str(x.dtype).removeprefix('torch.')}"
        )


@functools.cache
def _processors(device: torch.device) -> int:
    # Triton's interpreter stands for a small card.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _up_to(size: int, most: int) -> int:
    """The power of two that covers `size`, from 16 (the least that a tensor core takes) to `most`."""
    return min(max(triton.next_power_of_2(size), 16), most)


def linear(x: Tensor, rows: int, columns: int, rank: int) -> Config:
    """For result [rows, columns] = x times a frozen matrix, and a rank step."""
    if x.dtype == torch.float32:
        return Config(_up_to(rows, 64), _up_to(columns, 32), 32, _up_to(rank, 32), 4, 2)
    if rows <= 32:
        return Config(_up_to(rows, 32), _up_to(columns, 64), 128, _up_to(rank, 32), 4, 3)
    if rows <= 64 or columns <= 64:
        return Config(64, _up_to(columns, 64), 64, _up_to(rank, 32), 8, 3)
    return Config(128, 128, 64, _up_to(rank, 32), 8, 3)


def shrink(x: Tensor, rows: int, rank: int) -> Config:
    """For xa [rows, rank], a sum over the columns of x."""
    if x.dtype == torch.float32:
        return Config(_up_to(rows, 64), 0, 32, _up_to(rank, 64), 4, 2)
    return Config(_up_to(rows, 64), 0, 64, _up_to(rank, 128), 8, 3)


def shrink_back(dy: Tensor, rows: int, columns: int, rank: int) -> Config:
    """For dxa [rows, rank] and dB [columns, rank] from one read of dy."""
    if dy.dtype == torch.float32:
        return Config(32, _up_to(columns, 64), 0, _up_to(rank, 32), 4, 2)
    return Config(_up_to(rows, 64), _up_to(columns, 128), 0, _up_to(rank, 64), 8, 2)


def adapter_grad(x: Tensor, rows: int, columns: int, rank: int) -> Config:
    """For dA [rank, columns], a sum over the rows of x."""
    if x.dtype == torch.float32:
        return Config(32, _up_to(columns, 64), 0, _up_to(rank, 32), 8, 2)
    return Config(_up_to(rows, 64), _up_to(columns, 128), 0, _up_to(rank, 64), 8, 3)


def parts(x: Tensor, programs: int, steps: int) -> int:
    """Into how many parts a sum of that many steps is cut, so that `programs` times the parts fill the card: a function of sizes and card alone."""
    wanted = triton.cdiv(2 * _processors(x.device), max(programs, 1))
    return max(1, min(wanted, steps // 4, MOST_PARTS))
