"""The same cases under pytest-benchmark: `pytest benchmarks`, or some: `pytest benchmarks -k "lora_linear and decode"`.

Every case is checked before it is timed, as in `python -m benchmarks`; no test asserts a time.
"""

import itertools
from typing import Any

import pytest
import torch

from fastlora.choice.clock import wait_for

from .cases import OPERATORS, TRAINING, Case, StepCase, cases_of
from .gate import require_right
from .rivals import FASTLORA, build, implementations, rivals_of
from .step import VARIANTS, Worker

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROWS = [
    pytest.param(case, pass_, rival, id=f"{operator}-{case.name}-{case.number_format()}-{pass_}-{rival}")
    for operator in OPERATORS
    for case in cases_of(operator, DEVICE)
    for pass_ in case.passes
    for rival in rivals_of(case, DEVICE)
]


@pytest.mark.parametrize(("case", "pass_", "rival"), ROWS)
def test_operator(benchmark: Any, case: Case, pass_: str, rival: str) -> None:
    training = pass_ == TRAINING
    if rival == FASTLORA:
        chosen = implementations(case, training, DEVICE)[0]
        require_right(case, training, chosen, DEVICE)
    run, turns = build(case, training, DEVICE, [rival]).run(rival, training), itertools.count()

    def call() -> None:
        run(next(turns))
        wait_for(DEVICE)

    benchmark.group = f"{case.operator}: {case.title(training)}, {pass_}"
    for _ in range(3):
        call()
    benchmark(call)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", cases_of("step", DEVICE), ids=lambda case: f"{case.name}-{case.dtype}")
def test_step(benchmark: Any, case: StepCase, variant: str) -> None:
    benchmark.group = f"step: {case.name}, {case.shape()}, {case.dtype}"
    with Worker(case, variant, DEVICE) as worker:
        step = benchmark.pedantic(worker.step, rounds=case.rounds, warmup_rounds=1)
    assert 0 < step.loss < float("inf")
