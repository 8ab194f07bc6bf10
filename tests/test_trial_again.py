"""What was the fastest in one class, and fails its check in another since, is measured again there without it."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from measurements import entry

from fastlora.choice import trial
from fastlora.choice.problems import Problem
from fastlora.choice.table import Measurement

FEW, MANY, OTHER = (
    Problem(op, torch.float32, rows, "small", False)
    for op, rows in (("lora_linear", 64), ("lora_linear", 512), ("rms_norm", 64))
)
FAILS = ("lora_linear", "float32", "cpu product")


def test_only_what_the_failed_way_had_won_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[Problem], float]] = []

    def here(todo: list[Problem], device: Any, seconds: float, refused: set[Any]) -> Iterator[list[Measurement]]:
        asked.append((list(todo), seconds))
        for problem in todo:
            way = "product" if FAILS not in refused else "plain"
            found = [entry(0.5, op, problem.rows)._replace(way=way) for op in (problem.op, f"{problem.op}_backward")]
            if problem == MANY:
                refused.add(FAILS)
                found = [one._replace(way="plain") for one in found]
            yield found

    monkeypatch.setattr(trial, "_here", here)
    first, second, third, again = trial._measured([FEW, MANY, OTHER], torch.device("cpu"), 0.25, set())
    assert asked == [([FEW, MANY, OTHER], 0.25), ([FEW], 0.25)]
    assert [(one.op, one.rows, one.way) for one in first] == [
        ("lora_linear", 64, "product"),
        ("lora_linear_backward", 64, "product"),
    ]
    # The failed one is told no more; its backward, which has not failed, is, until the class is measured again.
    many = [("lora_linear", 512, "plain"), ("lora_linear_backward", 512, "plain")]
    assert [(one.op, one.rows, one.way) for one in second] == [("lora_linear_backward", 64, "product"), *many]
    others = [("rms_norm", 64, "plain"), ("rms_norm_backward", 64, "plain")]
    assert [(one.op, one.rows, one.way) for one in third][3:] == others
    few = [("lora_linear", 64, "plain"), ("lora_linear_backward", 64, "plain")]
    assert [(one.op, one.rows, one.way) for one in again] == [*many, *others, *few]


def test_one_class_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    monkeypatch.setattr(trial, "_here", lambda *_: iter([[entry(0.5)]]))
    monkeypatch.setattr(trial.table, "keep", lambda *given: kept.append(given))
    trial._try_out(torch.device("cpu"), [FEW])
    assert kept == [("cpu", [entry(0.5)], "fastlora.accelerate")]
