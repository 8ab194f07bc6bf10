"""Timing that survives a shared machine: what is compared runs in turn, and the median of the ratios within a round is reported.

A round times every run once, each round beginning with another one, so that a slow minute, a hot cache or a falling clock frequency meets all of
them alike. Each call gets a fresh number, its turn, by which a run picks one of several copies of its weights.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch

Run = Callable[[int], object]  # takes the turn
Clock = Callable[[Run, int, int], float]  # (run, first turn, calls) -> seconds a call
Sample = TypeVar("Sample")

SHORTEST_SAMPLE = 2e-4  # seconds: far above the clock's own cost of about 1e-7
FEWEST_ROUNDS, MOST_ROUNDS = 5, 301
WARM_UP_CALLS = 3
SLOW = 0.05  # seconds: a call whose length is known well enough from its first warm-up


class Timing(NamedTuple):
    seconds: float  # median of one call
    fastest: float
    ratio: float  # median over the rounds of this call's time over the baseline's in the same round
    rounds: int


def wait_for(device: torch.device) -> None:
    """Return once the device has nothing left to do; the faults of what was launched are raised here."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class HostClock:
    """Wall-clock seconds a call of calls that follow one another, until the device has done the last of them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, run: Run, first: int, calls: int) -> float:
        wait_for(self._device)
        began = time.perf_counter()
        for turn in range(first, first + calls):
            run(turn)
        wait_for(self._device)
        return (time.perf_counter() - began) / calls


def rounds_in_turn(names: Sequence[str], sample: Callable[[str], Sample]) -> Iterator[dict[str, Sample]]:
    """Rounds without end: a sample of each name in every one, which begins with another name than the round before."""
    for number in itertools.count():
        begin = number % len(names)
        yield {name: sample(name) for name in [*names[begin:], *names[:begin]]}


def median_ratio(times: Sequence[float], baseline: Sequence[float]) -> float:
    """The median of the ratios within a round."""
    return statistics.median(one / other for one, other in zip(times, baseline, strict=True))


def time_in_turn(
    runs: Mapping[str, Run],
    clock: Clock,
    budget: float,
    warm_up: Sequence[int] = (WARM_UP_CALLS, WARM_UP_CALLS),
    fewest: int = FEWEST_ROUNDS,
) -> dict[str, Timing]:
    """Time the runs in turn until they took `budget` seconds in all; the first of them is the baseline of every ratio.

    warm_up: calls of each before it is timed, the last of which tell how many make a sample; one that is slow is spared all but the first.
    fewest: rounds, whatever they take.

    Raises:
        ValueError: there is nothing to time, or the budget is not positive.
    """
    if not runs:
        raise ValueError("runs: got none, expected at least one, the baseline first")
    if not budget > 0:
        raise ValueError(f"budget: got {budget}, expected a positive number of seconds")
    turn = 0
    calls: dict[str, int] = {}

    def sample(name: str, count: int) -> float:
        nonlocal turn
        seconds = clock(runs[name], turn, count)
        turn += count
        return seconds

    for name in runs:
        for count in warm_up:
            estimate = sample(name, count)
            if estimate >= SLOW:
                break
        calls[name] = max(1, math.ceil(SHORTEST_SAMPLE / max(estimate, 1e-9)))
    spent = 0.0
    rounds: list[dict[str, float]] = []
    for one in rounds_in_turn(list(runs), lambda name: sample(name, calls[name])):
        rounds.append(one)
        spent += sum(seconds * calls[name] for name, seconds in one.items())
        if len(rounds) >= MOST_ROUNDS or (len(rounds) >= fewest and spent >= budget):
            break
    samples = {name: [one[name] for one in rounds] for name in runs}
    baseline = next(iter(samples.values()))
    return {
        name: Timing(statistics.median(times), min(times), median_ratio(times, baseline), len(times))
        for name, times in samples.items()
    }
