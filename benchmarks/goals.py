"""The goals on a CPU, and how near fastlora comes to each, on whatever machine this is.

a layer, forward and backward     1.15 of the machine's limit: its FLOPs at the best product rate here, and one more read of x at the read rate
one row of 4096 to 4096           bfloat16 0.75 of the frozen layer's time, float32 0.95
any cell                          none is slower than the best of torch's products in the manner of Unsloth and of PEFT
a whole training step             model_steps.py's, which come first
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from fastlora.choice.clock import Timing

from .cases import GOAL_CELLS, GOAL_LAYERS, TRAINING, Case, LoRALinearCase, dtype_name
from .gate import require_right
from .machine import bandwidths, product_rate
from .rivals import FASTLORA, build, choice, rivals_of
from .session import Line, Session, seconds_of

SECONDS = 2.0  # of timing, a case
CELL_SECONDS = 0.5
OVER_LIMIT = 1.15
ONE_ROW = {torch.float32: 0.95, torch.bfloat16: 0.75}
NOISE = 1.02  # over the best rival: what is no more may be chance
LEFT_OUT = ("merged", "compiled")


@dataclass(frozen=True)
class Goal:
    what: str  # cases of one kind, a row of the table in benchmarks/README.md
    case: str
    numbers: str
    goal: float | None  # none: shown beside the cases that have one
    ours: float
    peft: float | None
    frozen: float | None = None  # the frozen layer's, where the goal is over something else
    at_least: bool = False  # the goal is a least, not a most
    seconds: dict[str, float] = field(default_factory=dict)  # of each rival that was timed for it, medians
    unit: str = ""  # of goal, ours and every rival's: a ratio unless told
    first_step: float | None = None  # what is wanted first
    rivals: dict[str, float] = field(default_factory=dict)  # others than fastlora and PEFT
    implementation: str = ""  # what fastlora ran, where one thing did

    @classmethod
    def of(
        cls, what: str, case: Case, training: bool, unit: str,
        values: Mapping[str, float],  # in that unit: fastlora's, PEFT's and others'
        seconds: Mapping[str, float],
        implementation: str = "",
        targets: tuple[float | None, float | None] = (None, None),  # the goal, and what is wanted first
        **more: Any,
    ) -> "Goal":  # fmt: skip
        """Of what was timed beside one another."""
        others = {name: value for name, value in values.items() if name not in ("peft", FASTLORA)}
        return cls(
            what, case.shape(training), case.number_format(), targets[0], values[FASTLORA], values.get("peft"), unit=unit,
            seconds=dict(seconds), first_step=targets[1], rivals=others, implementation=implementation, **more,
        )  # fmt: skip

    def is_met(self) -> bool | None:
        if self.goal is None:
            return None
        return self.ours >= self.goal if self.at_least else self.ours <= self.goal

    def of_goal(self) -> float | None:
        return self.ours / self.goal if self.goal else None


def layer_lines() -> dict[str, Line]:
    """Every layer that has a goal on a CPU, by its sizes, and the cells."""
    lines: dict[str, Line] = {case.title(TRAINING in case.passes): partial(_layer, case=case) for case in GOAL_LAYERS}
    lines |= {
        f"cells, {dtype_name(dtype)}": partial(_cells, cases=[case for case in GOAL_CELLS if case.dtype == dtype])
        for dtype in dict.fromkeys(case.dtype for case in GOAL_CELLS)
    }
    return lines


def _times(session: Session, case: Case, seconds: float) -> dict[str, Timing]:
    training = TRAINING in case.passes
    require_right(case, training, choice(case, training, session.device), session.device)
    contest = build(case, training, session.device, rivals_of(case, session.device, without=LEFT_OUT))
    return session.times(case.title(training), case, contest.runs(training), seconds)


def limit(case: LoRALinearCase, device: torch.device) -> float:
    """The least seconds of a layer's forward and backward here: its FLOPs at the best rate, and x read once more than the frozen layer does."""
    extra = case.M * case.K * case.dtype.itemsize / bandwidths(device)["read"]
    return case.work(True).flops / product_rate(device, case.dtype) + extra


def _layer(session: Session, case: Any) -> Iterator[Goal]:
    training = TRAINING in case.passes
    times = _times(session, case, SECONDS)
    numbers = dtype_name(case.dtype)
    goal: float | None
    if training:
        what, goal, unit = (
            f"a layer, forward and backward, over the limit, {numbers}",
            OVER_LIMIT,
            limit(case, session.device),
        )
    else:
        what, goal = (
            f"a few rows, forward, over the frozen layer, {numbers}",
            ONE_ROW[case.dtype] if case.M == 1 else None,
        )
        unit = times["frozen"].seconds
    over = {name: one.seconds / unit for name, one in times.items() if name not in ("frozen", "packed")}
    frozen = times["frozen"].seconds / unit if training else None
    yield Goal.of(what, case, training, "", over, seconds_of(times), targets=(goal, None), frozen=frozen)


def _cells(session: Session, cases: Sequence[Any]) -> Iterator[Goal]:
    """How many cells lose to the best of what one would write in torch, and of PEFT; and which."""
    lost, ratios = [], []
    for case in cases:
        times = _times(session, case, CELL_SECONDS)
        best = min(times[name].seconds for name in ("peft", "addmm") if name in times)
        ratios.append(times[FASTLORA].seconds / best)
        if ratios[-1] > NOISE:
            lost.append(f"{case.shape(TRAINING in case.passes)}: {ratios[-1]:.2f}")
    numbers = dtype_name(cases[0].dtype)
    session.notes.append(
        f"cells, {numbers}: fastlora over the best rival {min(ratios):.2f} to {max(ratios):.2f}; slower: {'; '.join(lost) or 'none'}"
    )
    yield Goal(
        f"cells of {len(cases)} that lose to the best rival, {numbers}",
        "all",
        numbers,
        0,
        len(lost),
        None,
        unit="cells",
    )
