"""Random weights in 4 bits and 8, as frozen/quantised.py takes them."""

import torch
from torch import Tensor

from fastlora import reference
from fastlora.frozen.quantised import QuantisedWeight, Stored

CODE = torch.tensor([-1, -0.7, -0.5, -0.4, -0.3, -0.2, -0.1, 0, 0.08, 0.16, 0.25, 0.33, 0.44, 0.56, 0.72, 1])
KINDS = ("four bits", "four bits, double", "int8")


def stored(kind: str, N: int, K: int, block: int = 64) -> Stored:
    """Random elements and factors. block: of elements with one factor; an int8 weight has one a row."""
    if kind == "int8":
        packed, factor = torch.randint(-127, 128, (N, K), dtype=torch.int8), torch.rand(N if K else 0) / 127
        return Stored(packed, None, factor, None, None, 0.0, max(K, 1), 1, N, K)
    packed, blocks = torch.randint(0, 256, (N * K // 2, 1), dtype=torch.uint8), -(-N * K // block)
    if kind == "four bits":
        return Stored(packed, CODE, torch.rand(blocks), None, None, 0.0, block, 1, N, K)
    codes, code = torch.randint(0, 256, (blocks,), dtype=torch.uint8), torch.randn(256) / 3
    shared = -(-blocks // 256)
    return Stored(packed, CODE, torch.rand(shared), codes, code, 0.7321, block, 256, N, K)


def weight(kind: str, N: int, K: int, dtype: torch.dtype, compute: torch.dtype | None = None) -> QuantisedWeight:
    return QuantisedWeight(stored(kind, N, K), kind, dtype, compute or dtype)


def dense(quantised: QuantisedWeight) -> Tensor:
    """W in the dtype that the product is computed in."""
    return reference.dequantise(*quantised.stored, dtype=quantised.compute)
