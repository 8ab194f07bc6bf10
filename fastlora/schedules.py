"""Learning rates over a training's steps: transformers' schedules by their names and arguments, and a warm-up whose first step trains.

rate(step) = lr (step + 1) / w    in the w steps of the warm-up
             transformers' own    in those after
"""

import json
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from fastlora import reading
from fastlora.typed import fits, is_finite, shown

Kwargs = dict[str, int | float | str]

POLYNOMIAL_END = 1e-7  # the learning rate that transformers' polynomial schedule ends at, unless told
MINIMA = ("min_lr", "min_lr_rate")
SCHEDULES: dict[str, tuple[str, ...]] = {
    **{"linear": (), "cosine": ("num_cycles",), "cosine_with_restarts": ("num_cycles",)},
    **{"polynomial": ("lr_end", "power"), "constant": (), "constant_with_warmup": (), "inverse_sqrt": ("timescale",)},
    **dict.fromkeys(("cosine_with_min_lr", "cosine_warmup_with_min_lr"), ("num_cycles", *MINIMA)),
    "warmup_stable_decay": ("num_decay_steps", "num_stable_steps", "decay_type", "min_lr_ratio", "num_cycles"),
}
"""Those of transformers that need no metric, and what each may be told; how the rate rises is the warm-up's business."""
NEEDED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("cosine_with_min_lr", "cosine_warmup_with_min_lr"), MINIMA),
    "warmup_stable_decay": ("num_decay_steps",),
}
"""Of which a schedule must be told one, and no more."""


def _is_number(value: Any) -> bool:
    return fits(value, float) and is_finite(value)


_ABOVE_0: tuple[Callable[[Any], bool], str] = (lambda value: _is_number(value) and value > 0, "a number above 0")
_RATE: tuple[Callable[[Any], bool], str] = (lambda value: _is_number(value) and value >= 0, "a rate, 0 or more")
_PART: tuple[Callable[[Any], bool], str] = (lambda value: _is_number(value) and 0 <= value <= 1, "a part, 0 to 1")
_COUNT: tuple[Callable[[Any], bool], str] = (lambda value: fits(value, int) and value >= 1, "a number of steps")
_DECAYS = ("linear", "cosine", "1-sqrt")
ARGUMENTS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("num_cycles", "power"), _ABOVE_0),
    **dict.fromkeys(("lr_end", "min_lr"), _RATE),
    **dict.fromkeys(("min_lr_rate", "min_lr_ratio"), _PART),
    **dict.fromkeys(("timescale", "num_decay_steps", "num_stable_steps"), _COUNT),
    "decay_type": (lambda value: value in _DECAYS, f"one of {', '.join(_DECAYS)}"),
}
"""What each must be."""


def parsed(text: str) -> Kwargs:
    """Arguments as they are typed: a JSON object, or name=value with commas.

    Raises:
        ValueError: it is neither, or a name is there twice.
    """
    if text.lstrip().startswith("{"):
        try:
            return reading.json_object(text.encode())
        except ValueError as error:
            raise ValueError(f"lr_scheduler_kwargs={shown(text)}: {error}") from None
    found: Kwargs = {}
    for part in text.split(","):
        name, equals, value = (word.strip() for word in part.partition("="))
        if not (name and equals and value) or name in found:
            raise ValueError(f"lr_scheduler_kwargs={shown(text)}: expected name=value with commas, each name once")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def check(name: str, kwargs: Mapping[str, Any], lr: float) -> None:
    """
    Raises:
        ValueError: there is no such schedule, or it takes no such arguments; the message names the option.
    """
    if name not in SCHEDULES:
        raise ValueError(
            f"lr_scheduler_type={shown(name)}: expected one of {', '.join(SCHEDULES)}; others need a metric"
        )
    for key, value in kwargs.items():
        if key not in SCHEDULES[name]:
            taken = ", ".join(SCHEDULES[name]) or "nothing"
            raise ValueError(f"lr_scheduler_kwargs: {shown(key)}: lr_scheduler_type={name} takes {taken}")
        is_right, expected = ARGUMENTS[key]
        if not is_right(value):
            raise ValueError(f"lr_scheduler_kwargs: {key}={shown(value)}: expected {expected}")
    needed = NEEDED.get(name, ())
    if needed and sum(key in kwargs for key in needed) != 1:
        raise ValueError(f"lr_scheduler_kwargs: lr_scheduler_type={name} needs {' or '.join(needed)}")
    if name == "polynomial" and lr <= kwargs.get("lr_end", POLYNOMIAL_END):
        end = kwargs.get("lr_end", POLYNOMIAL_END)
        raise ValueError(f"lr={lr}: polynomial ends at {end}, expected more")
    if kwargs.get("min_lr", 0) > lr:
        raise ValueError(f"lr_scheduler_kwargs: min_lr={kwargs['min_lr']}: expected at most lr, {lr}")


def multiplier(name: str, kwargs: Mapping[str, Any], lr: float, steps: int, warmup: int) -> Callable[[int], float]:
    """What the learning rate of a step, counted from 0, is multiplied by.

    Args:
        name, kwargs, lr: as `check` takes them.
        warmup: steps in which the rate rises, fewer than `steps`.

    Raises:
        ValueError: the decay's steps, and the stable ones, are more than there are.
    """
    import torch
    from transformers import get_scheduler

    after, asked = steps - warmup, sum(kwargs.get(key, 0) for key in ("num_decay_steps", "num_stable_steps"))
    if asked > after:
        raise ValueError(f"lr_scheduler_kwargs: {asked} steps of decay and stable: expected at most {after}")
    # Their functions want an optimiser, of which they read the highest rate.
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Both num_training_steps and num_stable_steps")  # the latter counts
        theirs: Callable[[int], float] = get_scheduler(
            name, optimizer, num_warmup_steps=warmup, num_training_steps=steps, scheduler_specific_kwargs=dict(kwargs)
        ).lr_lambdas[0]
    rising = 0 if name == "constant" else warmup
    return lambda step: (step + 1) / rising if step < rising else theirs(step)


def warmup_steps(count: int | None, ratio: float, steps: int) -> int:
    """The steps of the warm-up: `count`, or a part of all steps; the last step is behind it, schedules divide by the number of those that are."""
    return min(math.ceil(ratio * steps) if count is None else count, steps - 1)
