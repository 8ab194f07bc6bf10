"""The next token of each row from its logits: the likeliest, or drawn."""

from collections.abc import Sequence

import torch
from torch import Tensor

FIRST_LOOK = 64  # of the likeliest tokens, before more are sorted


class Picker:
    """How a row's tokens are picked.

    Args:
        temperature: what logits are divided by; 0: the likeliest token is taken.
        top_p: the likeliest tokens that have this much of the probability together are drawn from (Holtzman et al. 2020).
        seed: of the row's own generator: the same numbers, whoever else is in the batch; None: others each time.
    """

    def __init__(self, temperature: float, top_p: float, seed: int | None) -> None:
        self.temperature, self.top_p = temperature, top_p
        self.generator = torch.Generator()
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)

    def draw(self, logits: Tensor) -> int:
        """A token by its logits [V]. By one random number: where it falls among the probabilities laid end to end."""
        chances = torch.softmax(logits / self.temperature, -1)
        number = torch.rand((), generator=self.generator, dtype=torch.float64).item()
        if self.top_p == 1:
            return _at(number, chances)
        count = FIRST_LOOK
        while True:
            count = min(count, len(chances))
            likeliest, tokens = chances.topk(count)
            before = likeliest.double().cumsum(0) - likeliest  # the first is always among those drawn from
            if before[-1] >= self.top_p or count == len(chances):
                break
            count *= 8
        return int(tokens[_at(number, likeliest * (before < self.top_p))])


def _at(number: float, weights: Tensor) -> int:
    """Which of the weights [n] a number from 0 to 1, without 1, falls on, as they lie end to end."""
    ends = weights.double().cumsum(0)
    found = int(torch.searchsorted(ends, number * ends[-1], right=True))
    if found < len(weights) and weights[found] > 0:
        return found
    return int(weights.nonzero()[-1])  # the product was rounded up


def pick(logits: Tensor, pickers: Sequence[Picker]) -> list[int | None]:
    """A token for each row of logits [rows, V], float32; None where a row's are not finite."""
    highest, likeliest = logits.max(-1)  # NaN is higher than all
    tokens: list[int | None] = likeliest.tolist()
    for row, (value, picker) in enumerate(zip(highest.tolist(), pickers, strict=True)):
        if not -float("inf") < value < float("inf"):
            tokens[row] = None
        elif picker.temperature > 0:
            tokens[row] = picker.draw(logits[row])
    return tokens
