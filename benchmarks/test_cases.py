"""The same cases under pytest-benchmark: `pytest benchmarks`, or some: `pytest benchmarks -k "lora_linear and decode"`.

Every case is checked before it is timed, as in `python -m benchmarks`; no test asserts a time.
"""

import functools
import itertools
from typing import Any

import pytest
import torch

from .cases import OPERATORS, TRAINING, Case, StepCase, cases_of, steps_of
from .gate import errors, require_right
from .rivals import FASTLORA, RIVALS, Contest, build, implementations
from .step import VARIANTS, Worker

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@functools.lru_cache(maxsize=1)  # the rivals of a case follow one another
def _contest(case: Case, training: bool) -> Contest:
    return build(case, training, DEVICE)


def _rows() -> list[Any]:
    return [
        pytest.param(operator, case, pass_, rival, id=f"{operator}-{case.name}-{case.number_format()}-{pass_}-{rival}")
        for operator in OPERATORS
        for case in cases_of(operator, DEVICE)
        for pass_ in case.passes
        for rival in RIVALS[operator]
    ]


@pytest.mark.parametrize(("operator", "case", "pass_", "rival"), _rows())
def test_operator(benchmark: Any, operator: str, case: Case, pass_: str, rival: str) -> None:
    training = pass_ == TRAINING
    if rival == FASTLORA:
        chosen = implementations(case, training, DEVICE)[0]
        require_right(f"{operator} {chosen}", errors(case, training, chosen, DEVICE))
    contest = _contest(case, training)
    if rival not in contest.rivals:
        pytest.skip(f"{rival}: not on this device in {case.number_format()}")
    run, turns = contest.run(rival, training), itertools.count()

    def call() -> None:
        run(next(turns))
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(3):
        call()
    benchmark.group = f"{operator}: {case.name}, {case.shape(training)}, {case.number_format()}, {pass_}"
    benchmark(call)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", steps_of(DEVICE), ids=lambda case: f"{case.name}-{case.dtype}")
def test_step(benchmark: Any, case: StepCase, variant: str) -> None:
    benchmark.group = f"step: {case.name}, {case.shape()}, {case.dtype}"
    with Worker(case, variant, DEVICE) as worker:
        step = benchmark.pedantic(worker.step, rounds=case.rounds, warmup_rounds=1)
    assert 0 < step.loss < float("inf")
