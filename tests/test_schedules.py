"""Schedules take transformers' arguments, and those that they cannot do with are refused by name."""

import json
import math

import pytest
import torch
from transformers import get_scheduler

from fastlora.config import TrainConfig
from fastlora.optimisers import scheduler
from fastlora.schedules import SCHEDULES, multiplier, parsed, warmup_steps

TOLD = {
    "cosine": {"num_cycles": 1.5},
    "cosine_with_restarts": {"num_cycles": 3},
    "polynomial": {"lr_end": 1e-5, "power": 2.0},
    "inverse_sqrt": {"timescale": 40},
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-4, "num_cycles": 0.5},
    "warmup_stable_decay": {"num_decay_steps": 5, "decay_type": "1-sqrt", "min_lr_ratio": 0.2},
}


def make(**options) -> TrainConfig:
    return TrainConfig(**{"model": "some/model", "data": "rows.jsonl", "output": "out", "lr": 1e-3, **options})


def rates(config: TrainConfig, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.lr)
    rate = scheduler(config, optimizer, steps).lr_lambdas[0]
    return [config.lr * rate(step) for step in range(steps)]


@pytest.mark.parametrize("name", TOLD)
def test_what_a_schedule_is_told_reaches_transformers_own(name):
    steps, warmup = 20, 4
    found = rates(make(lr_scheduler_type=name, lr_scheduler_kwargs=TOLD[name], warmup_steps=warmup), steps)
    assert found[:warmup] == [1e-3 * (step + 1) / warmup for step in range(warmup)]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    theirs = get_scheduler(name, optimizer, warmup, steps, scheduler_specific_kwargs=TOLD[name]).lr_lambdas[0]
    assert found[warmup:] == [1e-3 * theirs(step) for step in range(warmup, steps)]
    plain = rates(make(lr_scheduler_type="constant", warmup_steps=warmup), steps)
    assert found[warmup:] != plain[warmup:] and all(0 <= rate <= 1e-3 for rate in found)


def test_every_schedule_that_takes_something_is_told_something_above():
    assert {name for name, taken in SCHEDULES.items() if taken} == set(TOLD)


def test_stable_steps_are_counted_and_no_warning_is_left(recwarn):
    told = {"num_decay_steps": 5, "num_stable_steps": 7}
    rate = multiplier("warmup_stable_decay", told, 1.0, steps=20, warmup=2)
    assert [rate(step) for step in range(2, 9)] == [1.0] * 7 and rate(9) == 1.0 and rate(13) < 0.5 and rate(14) == 0.0
    assert not [one for one in recwarn if "num_stable_steps" in str(one.message)]
    with pytest.raises(ValueError, match="^lr_scheduler_kwargs: 12 steps of decay and stable: expected at most 11"):
        multiplier("warmup_stable_decay", told, 1.0, steps=13, warmup=2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("min_lr_rate=0.1", {"min_lr_rate": 0.1}),
        ("num_decay_steps=5, decay_type=1-sqrt,min_lr_ratio=1e-2", {"num_decay_steps": 5, "decay_type": "1-sqrt", "min_lr_ratio": 0.01}),
        ('{"num_cycles": 2}', {"num_cycles": 2}),
    ],
)  # fmt: skip
def test_arguments_are_typed_as_pairs_or_json(text, expected):
    assert parsed(text) == expected


@pytest.mark.parametrize(
    "text", ["", "min_lr", "=1", "a=1,a=2", "a=1,,b=2", '{"a": 1', '{"a": NaN}', '{"a": 1, "a": 2}']
)
def test_what_is_neither_is_named(text):
    with pytest.raises(ValueError, match="^lr_scheduler_kwargs="):
        make(lr_scheduler_kwargs=text)


def test_a_configuration_keeps_what_was_typed_as_values():
    config = make(lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs="min_lr_rate=0.1")
    assert config.lr_scheduler_kwargs == {"min_lr_rate": 0.1}
    assert json.loads(json.dumps(config.lr_scheduler_kwargs)) == config.lr_scheduler_kwargs


REFUSED = [
    ("linear", {"num_cycles": 1}, "'num_cycles': lr_scheduler_type=linear takes nothing"),
    ("cosine", {"power": 1}, "'power': lr_scheduler_type=cosine takes num_cycles"),
    ("cosine", {"num_cycles": 0}, "num_cycles=0: expected a number above 0"),
    ("cosine", {"num_cycles": math.inf}, "num_cycles=inf: expected a number above 0"),
    ("cosine", {"num_cycles": "many"}, "num_cycles='many': expected a number above 0"),
    ("polynomial", {"lr_end": -1}, "lr_end=-1: expected a rate, 0 or more"),
    ("inverse_sqrt", {"timescale": 0}, "timescale=0: expected a number of steps"),
    ("cosine_with_min_lr", {}, "lr_scheduler_type=cosine_with_min_lr needs min_lr or min_lr_rate"),
    ("cosine_with_min_lr", {"min_lr": 0, "min_lr_rate": 0}, "needs min_lr or min_lr_rate"),
    ("cosine_with_min_lr", {"min_lr": 1}, "min_lr=1: expected at most lr, 0.001"),
    ("cosine_with_min_lr", {"min_lr_rate": 1.5}, "min_lr_rate=1.5: expected a part, 0 to 1"),
    ("warmup_stable_decay", {}, "needs num_decay_steps"),
    (
        "warmup_stable_decay",
        {"num_decay_steps": 3, "decay_type": "steep"},
        "decay_type='steep': expected one of linear",
    ),
    ("warmup_stable_decay", {"num_decay_steps": 2.5}, "num_decay_steps=2.5: expected a number of steps"),
]


@pytest.mark.parametrize(("name", "kwargs", "message"), REFUSED)
def test_arguments_that_a_schedule_cannot_do_with_are_refused_by_name(name, kwargs, message):
    with pytest.raises(ValueError, match=f"^lr_scheduler_kwargs: .*{message}"):
        make(lr_scheduler_type=name, lr_scheduler_kwargs=kwargs)


def test_a_polynomial_ends_below_where_it_begins():
    with pytest.raises(ValueError, match=r"^lr=0.001: polynomial ends at 0.01, expected more"):
        make(lr_scheduler_type="polynomial", lr_scheduler_kwargs={"lr_end": 0.01})


def test_the_warm_up_is_counted_or_a_part_and_leaves_a_step():
    assert (warmup_steps(None, 0.03, 100), warmup_steps(None, 0.031, 100), warmup_steps(7, 0.5, 100)) == (3, 4, 7)
    assert warmup_steps(500, 0.0, 10) == 9 and warmup_steps(0, 0.5, 10) == 0 and warmup_steps(3, 0.0, 1) == 0
    for value in (-1, 2**31):
        with pytest.raises(ValueError, match=f"^warmup_steps={value}: expected 0 to"):
            make(warmup_steps=value)
