"""The process apart, from inside: what it measures, what it says of that line by line, and what it keeps to itself."""

import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from fastlora.choice import trial
from fastlora.choice.problems import Problem

NAMES = [["lora_linear", "float32", 64, "small", False], ["swiglu", "bfloat16", 8, "large", True]]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], None]:
    """Answers in this process, with a function in the place of `one_class`, which is told that cpu was refused for swiglu."""

    def answer(one_class: Callable[..., Any]) -> None:
        question = json.dumps([NAMES, "cpu", 0.25, [["swiglu", "bfloat16", "cpu"]]])
        monkeypatch.setattr(sys, "argv", ["-c", question])
        monkeypatch.setattr(trial, "one_class", one_class)
        output = os.dup(1)
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            try:
                trial.answer()
            finally:
                os.dup2(output, 1)
                os.close(output)

    return answer


def lines(capfd: Capture) -> list[Any]:
    return [json.loads(line) for line in capfd.readouterr().out.splitlines()]


def test_every_class_is_measured_and_told(ask: Callable[..., None], capfd: Capture) -> None:
    asked: list[Any] = []

    def one_class(problem: Problem, device: torch.device, seconds: float, refused: set[Any], trying: Any) -> list[Any]:
        asked.append((problem, device, seconds, set(refused)))
        refused.add(("lora_linear", "float32", "cpu"))
        return [[problem.op, 0.5]]

    ask(one_class)
    first, second = ("swiglu", "bfloat16", "cpu"), ("lora_linear", "float32", "cpu")
    device = torch.device("cpu")
    assert asked == [
        (Problem("lora_linear", torch.float32, 64, "small", False), device, 0.25, {first}),
        (Problem("swiglu", torch.bfloat16, 8, "large", True), device, 0.25, {first, second}),
    ]
    for line, op in zip(lines(capfd), ("lora_linear", "swiglu"), strict=True):
        kind, (found, refused) = line
        assert kind == "found" and found == [[op, 0.5]]
        assert sorted(refused) == sorted(map(list, (first, second)))


def test_what_is_about_to_run_is_told_before_it_does(ask: Callable[..., None], capfd: Capture) -> None:
    def one_class(problem: Problem, *rest: Any) -> list[Any]:
        rest[-1](problem.op, ["cpu"])
        assert lines(capfd)[-1] == ["trying", [problem.op, ["cpu"]]]
        return []

    ask(one_class)


def test_only_our_warnings_are_told_and_nothing_that_is_printed(ask: Callable[..., None], capfd: Capture) -> None:
    def one_class(problem: Problem, *_: Any) -> list[Any]:
        warnings.warn(f"fastlora: {problem.op} is off", stacklevel=1)
        warnings.warn("of somebody else", stacklevel=1)
        os.write(1, b"noise\n")
        return []

    ask(one_class)
    output, errors = capfd.readouterr()
    told = [json.loads(line) for line in output.splitlines()]
    assert [what for kind, what in told if kind == "warning"] == [
        "fastlora: lora_linear is off",
        "fastlora: swiglu is off",
    ]
    assert len(told) == 4 and errors == "noise\n" * 2


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (ValueError("no good\nat all"), [["ended", "ValueError: no good"]]),
        (torch.OutOfMemoryError("full"), [["trying", ["", []]], ["ended", "OutOfMemoryError: full"]]),
    ],
    ids=lambda one: type(one).__name__,
)
def test_a_fault_ends_it_with_its_first_line(
    fault: Exception, told: Sequence[Any], ask: Callable[..., None], capfd: Capture
) -> None:
    def one_class(*_: Any) -> list[Any]:
        raise fault

    with pytest.raises(SystemExit) as end:
        ask(one_class)
    assert end.value.code == 1 and lines(capfd) == told
