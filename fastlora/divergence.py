"""Why a step's loss is not finite: which of its rows have none that is, each run alone without gradients, and whether the base has one for them.
And whether losses that are all finite end where nothing is learned.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastlora.data.rows import Encoded, Row
from fastlora.language_model_loss import evaluating
from fastlora.typed import listed


@dataclass(frozen=True)
class Blame:
    """Of a step's rows."""

    rows: int
    guilty: list[str]  # FILE:LINE of those whose loss alone is not finite
    by_base: list[str] | None  # those of them to which the base alone gives none either; None where no base is left

    @property
    def spares_the_weights(self) -> bool:
        """Whether the model as it is still has a loss for some rows."""
        return len(self.guilty) < self.rows

    def __str__(self) -> str:
        if not self.guilty:
            return f"each of its {self.rows} rows alone has a finite loss: it is the gradient, or dropout, that is to blame"
        told = f"{len(self.guilty)} of its {self.rows} rows alone have no finite loss: {listed(self.guilty)}"
        if self.by_base is None:
            return told
        if not self.by_base:
            return f"{told}; the base alone has one for each of them"
        every = len(self.by_base) == len(self.guilty)
        return f"{told}; the base alone has none either for {'each of them' if every else listed(self.by_base)}"


@torch.no_grad()
def blame(model: Any, loss_of: Callable[[Sequence[Row]], Tensor], rows: Sequence[Row], data: Encoded) -> Blame:
    """Run each row of a step alone, in eval mode.

    Args:
        model: the one that is trained; PEFT's can leave its adapter out.
        loss_of: the summed loss of some rows under it.
        data: where the rows are from.
    """
    sources = {id(row): example.source for row, example in zip(data.rows, data.examples, strict=True)}

    def bad(some: Iterable[Row]) -> list[Row]:
        return [row for row in some if not math.isfinite(loss_of([row]).item())]

    def named(some: Iterable[Row]) -> list[str]:
        return [sources.get(id(row), f"a row of {row.tokens} tokens") for row in some]

    alone: Callable[[], Any] | None = getattr(model, "disable_adapter", None)
    with evaluating(model):
        guilty = bad(rows)
        if alone is None:
            return Blame(len(rows), named(guilty), None)
        with alone() if guilty else nullcontext():
            return Blame(len(rows), named(guilty), named(bad(guilty)))


def are_finite(weights: Mapping[str, Tensor]) -> bool:
    """Whether every number of the weights is."""
    return all(bool(weight.detach().isfinite().all()) for weight in weights.values())


RISE = 1.5, 0.5  # of the first step's loss; and more than it, nats


def has_risen(losses: Sequence[float]) -> bool:
    """Whether a training's losses, a step each, end far above the first, which is the untrained model's: the rate is far too high."""
    ends = max(1, min(10, len(losses) // 2))
    last = sum(losses[-ends:]) / ends
    return last > max(losses[0] * RISE[0], losses[0] + RISE[1])
