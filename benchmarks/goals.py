"""The goals on a CPU, and how near fastlora comes to each: times of accelerated PEFT layers over those of the plain frozen layers.

a layer, forward and backward     float32 0.75, bfloat16 0.97, each times 1 + 1.5 R (1/K + 1/N): the FLOPs that LoRA must add
one row of 4096 to 4096           float32 0.8, bfloat16 0.7
a layer in float16                0.35 of torch's float16 layer
the layers of a block together    float32 0.75, bfloat16 1.0
one training step, over PEFT's    0.5 of the time, 0.6 of the memory, 70 % of the machine's own product rate
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from .cases import GOAL_BLOCKS, GOAL_LAYERS, TRAINING, BlockCase, Case, dtype_name
from .gate import require_right
from .rivals import FASTLORA, build, choice, rivals_of
from .session import Line, Session, seconds_of

SECONDS = 2.0  # of timing, a case
OVER_FROZEN = {torch.float32: 0.75, torch.bfloat16: 0.97, torch.float16: 0.35}
ONE_ROW = {torch.float32: 0.8, torch.bfloat16: 0.7}
BLOCK = {torch.float32: 0.75, torch.bfloat16: 1.0}
STEP_GOALS = {  # by StepResult's figures
    "ratios": ("time over PEFT's", 0.5, False),
    "memory_ratios": ("peak memory over PEFT's", 0.6, False),
    "of_product_rate": ("part of the machine's product rate", 0.7, True),
}
STEPS = "0.1B"  # what the names of the training steps that have goals begin with
LEFT_OUT = ("merged", "addmm", "compiled")


@dataclass(frozen=True)
class Goal:
    what: str  # cases of one kind, a row of the table in benchmarks/README.md
    case: str
    numbers: str
    goal: float | None  # none: shown beside the cases that have one
    ours: float
    peft: float | None
    floor: float | None = None  # what oneDNN allows here: packed products, and the FLOPs that LoRA adds
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
        return None if self.goal is None else self.ours / self.goal


def cpu_lines(steps: Sequence[Goal] = ()) -> dict[str, Line]:
    """Every layer and block that has a goal on a CPU, by its sizes; and the goals of the training steps, which were measured before."""
    lines: dict[str, Line] = {
        case.title(TRAINING in case.passes): partial(_over_frozen, case=case) for case in (*GOAL_LAYERS, *GOAL_BLOCKS)
    }
    return lines | ({"training steps": lambda _: iter(steps)} if steps else {})


def _over_frozen(session: Session, case: Any) -> Iterator[Goal]:
    training, device = TRAINING in case.passes, session.device
    # A block's layers run what `choose` says of each.
    implementation = None if isinstance(case, BlockCase) else choice(case, training, device)
    require_right(case, training, implementation, device)
    contest = build(case, training, device, rivals_of(case, device, without=LEFT_OUT))
    times = session.times(case.title(training), case, contest.runs(training), SECONDS)
    goal: float | None
    floor = None
    if isinstance(case, BlockCase):
        what, goal = "the linear layers of a block, forward and backward", BLOCK[case.dtype]
    elif training:
        lora_flops = 1 + 1.5 * case.R * (1 / case.K + 1 / case.N)
        # float16's goal is far from the FLOPs: float32 is the way to it.
        of_flops = 1.0 if case.dtype == torch.float16 else lora_flops
        what, goal = "a layer, forward and backward", OVER_FROZEN[case.dtype] * of_flops
        floor = times["packed"].ratio * lora_flops if "packed" in times else None
    else:
        what, goal = "a few rows, forward", ONE_ROW[case.dtype] if case.M == 1 else None
    ratios = {name: times[name].ratio for name in (FASTLORA, "peft")}
    what = f"{what}, {dtype_name(case.dtype)}"
    yield Goal.of(what, case, training, "", ratios, seconds_of(times), targets=(goal, None), floor=floor)


def step_goals(rows: Iterable[Mapping[str, Any]]) -> Iterator[Goal]:
    """The goals of the training steps in `rows`, each {"case": StepCase, "result": StepResult}."""
    for case, result in (row.values() for row in rows if row["case"].name.startswith(STEPS)):
        numbers = dtype_name(case.dtype)
        for variant, packing in (("fastlora", ""), ("unpacked", ", without packed copies")):
            for name, (what, goal, at_least) in STEP_GOALS.items():
                found = getattr(result, name)
                if found:  # empty where the system does not tell
                    what_now, shape = f"one training step, {numbers}: {what}", case.shape() + packing
                    yield Goal(what_now, shape, numbers, goal, found[variant], found["peft"], at_least=at_least)
