"""Which tiles the Triton kernels use for which sizes. Right at any size; the figures are heuristics until they are measured.

A 128-row tile takes eight warps: with four, its accumulators do not fit the registers of sm_80 and sm_90 (checked by tests/test_cross_compile.py).
"""

import functools
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from fastlora.choice import table
from fastlora.ops import KERNEL_DTYPES, ImplementationError

GROUP_M = 8  # rows of tiles that share the L2 cache
MOST_PARTS = 64  # partial results of one sum
PARTIAL_SUM_ROWS = 32  # up to here a launch costs more than adding partial sums wherever they are read


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
    if x.dtype not in KERNEL_DTYPES:
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


def linear(x: Tensor, rows: int, columns: int, rank: int, layers: int = 1) -> Config:
    """For result [rows, columns] = x times a frozen matrix, and a rank step; or the sum of that many layers'."""
    if x.dtype == torch.float32:
        return Config(_up_to(rows, 64), _up_to(columns, 32), 32, 16, 4, 2)
    if rows <= 32:
        # Bound by reading the matrix once: 4096 columns make 128 programs, about one for each processor of a large card.
        return Config(_up_to(rows, 32), _up_to(columns, 32), 128 if layers == 1 else 64, _up_to(rank, 32), 2, 4)
    if rows <= 64 or columns <= 64:
        return Config(64, _up_to(columns, 64), 64, _up_to(rank, 32), 8, 3)
    return Config(128, 128, 64, _up_to(rank, 32), 8, 3)


def shrink(x: Tensor, a: Tensor, rows: int, rank: int) -> Config:
    """For xa [rows, rank], a sum over the columns of x and of adapters like `a`."""
    if x.dtype == torch.float32:
        return Config(_up_to(rows, 32), 0, 32, _up_to(rank, 32), 4, 2)
    # Three stages of 128 float32 ranks are more than sm_86 and sm_89 have room for.
    stages = 2 if a.dtype == torch.float32 and rank > 64 else 3
    return Config(_up_to(rows, 64), 0, 64, _up_to(rank, 128), 8, stages)


def chunk(layers: int) -> int:
    """Columns of a dx of that many layers that have a second accumulator at a time: what takes the fewest registers, and spills none."""
    return 32 if layers == 1 and torch.version.hip is None else 64


def all_registers(tile: Config) -> dict[str, int]:
    """Launch options that let a thread of a 128-row tile have all 255: for sm_100 Triton 3.7.1 has ptxas keep to 128, and some would be spilled."""
    return {"maxnreg": 255} if tile.rows == 128 and torch.version.hip is None else {}


def adding(x: Tensor, rows: int, columns: int, rank: int) -> Config:
    """For a rank step added to a result [rows, columns] that is there: bound by reading and writing it."""
    if x.dtype == torch.float32:
        return Config(_up_to(rows, 16), _up_to(columns, 64), 16, 16, 4, 1)
    return Config(_up_to(rows, 32), _up_to(columns, 64), 16, _up_to(rank, 32), 4, 1)


def shrink_back(dy: Tensor, rows: int, columns: int, rank: int) -> Config:
    """For dxa [rows, rank] and dB [columns, rank] from one read of dy, or for dB alone where `reads_once` says no."""
    if dy.dtype == torch.float32:
        return Config(32, _up_to(columns, 64), 0, _up_to(rank, 32), 4, 2)
    if rank <= 32:
        return Config(_up_to(rows, 32), _up_to(columns, 256), 0, _up_to(rank, 32), 8, 2)
    return Config(_up_to(rows, 64), _up_to(columns, 128 if rank <= 64 else 64), 0, _up_to(rank, 128), 8, 2)


def reads_once(dy: Tensor, tile: Config, rank: int) -> bool:
    """Whether dxa [M, rank] is best made in the tiles of dB: partial sums of it, one for each column of tiles, cost less than reading dy again."""
    return rank <= tile.rank and 2 * 4 * rank < tile.columns * dy.element_size()


def adapter_grad(x: Tensor, rows: int, columns: int, rank: int) -> Config:
    """For dA [rank, columns], a sum over the rows of x."""
    if x.dtype == torch.float32:
        # 32 columns: on sm_100 Triton 3.6 takes a product of 64, one of whose operands was masked by bits that were loaded, for a tf32 one.
        return Config(32, _up_to(columns, 32), 0, _up_to(rank, 32), 4, 2)
    return Config(_up_to(rows, 64), _up_to(columns, 128), 0, _up_to(rank, 64), 8, 2)


def parts(x: Tensor, programs: int, steps: int) -> int:
    """Into how many parts a sum of that many steps is cut, so that `programs` times the parts fill the card: a function of sizes and card alone."""
    wanted = triton.cdiv(2 * _processors(x.device), max(programs, 1))
    return max(1, min(wanted, steps // 4, MOST_PARTS))


def by_library(op: str, x: Tensor, weight: Tensor, dropout: bool) -> bool:
    """Whether torch's library (cuBLAS) makes the product with the frozen weight, and a kernel adds the adapter: as measured (`fastlora tune`).

    Where nobody has measured, a guess. Many rows on Hopper and later, or in float32: a Triton product without the tensor memory accelerator, or
    without tensor cores, stays further behind cuBLAS than two passes over the result cost. Elsewhere, and for few rows, which the weight's one
    read bounds in either way: one launch.
    """
    way = table.way("triton", op, x.device.type, x.dtype, x.shape[0], weight.numel(), dropout)
    if way:
        return way == "library"
    behind = x.is_cuda and torch.version.hip is None and (x.dtype == torch.float32 or _capability(x.device) >= 9)
    return x.shape[0] > 64 and behind


@functools.cache
def _capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]
