"""What can be measured: each operator enters itself, with arguments in several classes of sizes. Frozen weights have packed copies here, as
`accelerate` lets them have.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora.choice import table
from fastlora.frozen import packed

Call = tuple[Any, ...]  # the arguments of an operator

SHAPES = {"small": (1024, 1024), "large": (2048, 2048)}  # K, N
LINEAR_ROWS = {"cpu": (1, 8, 64, 512), "cuda": table.ROWS}
FEWEST_ROWS_DROPPED = 64  # dropout only happens in training, so it is measured from here on
ADAPTERS, SIBLINGS, TOKENS = 4, 2, 64  # of a mixed batch; layers that share x; tokens of a row of a batch
# Bytes of weights that take turns where rows are few, as a model's layers do: a cached one would flatter.
FROM_MEMORY = 2**27
ROWS_FROM_MEMORY = 64


class Problem(NamedTuple):
    """An operator with its backward, in one class of sizes."""

    op: str  # a key of `operators`
    dtype: torch.dtype
    rows: int
    size: str
    dropout: bool


class Measured(NamedTuple):
    """How an operator is measured."""

    calls: Callable[..., dict[str, list[Call]]]
    """Of (M, K, N, dtype, device, dropout), and of the operator and its backward: arguments that differ in their weights alone."""

    classes: Callable[[str, torch.dtype, Sequence[str]], Iterable[tuple[int, str, bool]]]
    """Of (device type, dtype, sizes): the rows, size and dropout of each class."""

    comparable: Callable[[Any, Call], list[Tensor]]
    """Of (results, arguments): the tensors that implementations have in common."""

    plain: Mapping[str, Callable[..., Any]] = MappingProxyType({})
    """Of the operator and its backward, what one would write in PyTorch, or torch has, where that is faster than the reference."""

    offers: Callable[[str, str, torch.dtype, int], bool] = lambda op, way, dtype, rows: True
    """Of (operator or backward, way, dtype, rows): whether an implementation can run in this way there, among those that it has."""


def linear_classes(device_type: str, dtype: torch.dtype, sizes: Sequence[str]) -> Iterable[tuple[int, str, bool]]:
    """Those of a product with a weight."""
    # The plain product with a transposed weight takes seconds where no library has it: the nearest class stands for the largest.
    slow = device_type == "cpu" and (dtype is torch.float16 or not packed.has_library(dtype))
    rows = LINEAR_ROWS[device_type][: -1 if slow else None]
    every = product(rows, sizes, (False, True))
    return [one for one in every if not one[2] or one[0] >= FEWEST_ROWS_DROPPED]


def row_classes(device_type: str, dtype: torch.dtype, sizes: Sequence[str]) -> Iterable[tuple[int, str, bool]]:
    """Those of what is computed row by row: a few, in the caches, and in memory."""
    return (8, "small", False), (512, "small", False), (4096, "large", False)


def tensors_of(results: Any, call: Call) -> list[Tensor]:
    """All that an operator returns: one tensor, or several."""
    return [results] if isinstance(results, Tensor) else list(results)


operators: dict[str, Measured] = {}
"""By what a Measurement calls them. Products with frozen weights come first: the others multiply in the way that was faster."""


def listed(
    device_type: str, names: Sequence[str], dtypes: Sequence[torch.dtype], sizes: Sequence[str]
) -> list[Problem]:
    """Everything that can be measured for these operators, dtypes and sizes of weights."""
    return [
        Problem(name, dtype, *one)
        for name, dtype in product(names, dtypes)
        for one in operators[name].classes(device_type, dtype, sizes)
    ]


seed = 0
"""What `Draw` begins with: another gives other numbers, for those who check by several inputs."""


class Draw:
    """Random tensors that leave torch's own generators alone."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return (torch.randn(*shape, generator=self.generator, device=self.device) * scale).to(dtype or self.dtype)

    def integers(self, most: int, *shape: int) -> Tensor:
        return torch.randint(most, shape, generator=self.generator, device=self.device)

    def linear(self, M: int, K: int, N: int) -> tuple[Tensor, Tensor, Tensor]:  # x [M, K], weight [N, K], dy [M, N]
        return self.normal(M, K), self.normal(N, K, scale=K**-0.5), self.normal(M, N)


def weights_in_turn(weight: Tensor, rows: int, least: int = 1) -> list[Tensor]:
    """Copies of a weight, enough that none stays in a cache where rows are few; on a CPU oneDNN may pack them. A multiple of `least`."""
    many = rows <= ROWS_FROM_MEMORY and weight.numel() >= 2**20
    copies = least * math.ceil((math.ceil(FROM_MEMORY / weight.nbytes) if many else 1) / least)
    weights = [weight, *(weight.clone() for _ in range(copies - 1))]
    if weight.device.type == "cpu":
        budget = packed.Budget(8 * FROM_MEMORY)
        for one in weights:
            packed.register(one, budget)
    return weights


def mixed_rows(M: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """order and offsets of a batch of ADAPTERS: an adapter, or none, for every row where rows are few, else for every run of rows."""
    run = 1 if M <= ROWS_FROM_MEMORY else max(TOKENS, M // 8)
    code, order = torch.sort(torch.arange(M, device=device) // run % (ADAPTERS + 1), stable=True)  # 0: no adapter
    return order, torch.searchsorted(code, torch.arange(ADAPTERS + 3, device=device))
