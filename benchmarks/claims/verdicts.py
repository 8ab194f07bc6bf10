"""The arithmetic of what is concluded: plain numbers in, plain numbers out."""

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import mean, stdev

Point = tuple[float, float]

PUBLISHED = {"base": 0.2334, "full": 0.4216, "lora": 0.4081}
"""ROUGE-1 of FLAN-T5-base on DialogSum."""
SHARE_GOAL, TIME_GOAL = 0.928, 0.56
ENOUGH = 0.9  # of the gain


def share_of_gain(base: float, whole: float, part: float) -> float | None:
    """How much of what `whole` gains over `base` is also gained by `part`; None where it gains nothing."""
    return (part - base) / (whole - base) if whole > base else None


def size_at(points: Sequence[Point], base: float, share: float = ENOUGH) -> float | None:
    """From how many rows on that share of the best gain is there, by (rows, score) in rising order of rows.

    Between two sizes it is interpolated in the logarithm of the rows; the smallest size where that has it already; None where nothing is gained.
    """
    top = max(score for _, score in points)
    if top <= base:
        return None
    wanted = base + share * (top - base)
    if points[0][1] >= wanted:
        return points[0][0]
    for (few, low), (many, high) in pairwise(points):
        if high >= wanted:
            part = (wanted - low) / (high - low)
            return math.exp(math.log(few) + part * (math.log(many) - math.log(few)))
    raise AssertionError("the best point has all of the gain")


def forgotten_at(path: Sequence[Point], learnt: float) -> float | None:
    """What is forgotten where the path first reaches `learnt`, interpolated between its (learnt, forgotten); None where it never does.

    A path begins at the base, (its score, 0), and goes through the runs of a method by rising rate.
    """
    if path[0][0] >= learnt:
        return path[0][1]
    for (low, before), (high, after) in pairwise(path):
        if high >= learnt:
            return before + (learnt - low) / (high - low) * (after - before)
    return None


def common_score(paths: Sequence[Sequence[Point]]) -> float:
    """The highest that all paths reach."""
    return min(max(learnt for learnt, _ in path) for path in paths)


def is_close(one: float, other: float, spread: float) -> bool:
    """Whether their difference is within twice the standard deviation of a difference of two runs, each of which has that spread."""
    return abs(one - other) <= 2 * math.sqrt(2) * spread


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Over seeds; the standard deviation is unknown of one."""
    return mean(values), stdev(values) if len(values) > 1 else None
