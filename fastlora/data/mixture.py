"""Several tasks in one training: how often each is asked, and which row comes when.

A task's rate is a function of its rows (`mixing`):

    proportional   min(rows, mixing_maximum): each row as often as another, large tasks capped (FLAN: 3,000; Raffel et al. 2020, section 3.5.2)
    temperature    min(rows, mixing_maximum) ^ (1 / mixing_temperature): from proportional, at 1, towards equal (mT5: 10/3)
    fixed          its weight

Draws are numbered from 0. A task of rate p has its draws at the times (j + 1/2) / p, j = 0, 1, ..., and the draws of all tasks come in the order of
their times. So after any number of draws each task has had its share but for about one row, and the n-th draw is found without those before it:
which rows a step takes follows from the seed and the step's number alone. A task's own draws go through its rows in an order that is drawn anew for
each time through.

Rehearsal is one task more, which gets its share of all draws; the others share what is left.
"""

import heapq
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Any, Literal

from fastlora import reading
from fastlora.data.examples import Example, named_as
from fastlora.data.sources import HUB
from fastlora.data.tasks import Task, is_task, made
from fastlora.typed import check_fields, is_finite, listed, shown

Mixing = Literal["proportional", "temperature", "fixed"]
REHEARSAL = "rehearsal"
"""The name of what is rehearsed among the tasks."""
OPTIONS = ("mixing", "mixing_maximum", "mixing_temperature")
"""Fields of a Mixture, of its file and of TrainConfig."""
PRECISION = 2**40
"""Rates are integers, in these parts of their sum: every machine gives the same order."""


def check_mixing(mixing: str, mixing_maximum: int | None, mixing_temperature: float | None) -> None:
    """
    Raises:
        ValueError: one of them is out of range, or of no use beside another; the message names it.
    """
    if mixing_maximum is not None and mixing_maximum < 1:
        raise ValueError(f"mixing_maximum={shown(mixing_maximum)}: expected 1 or more rows")
    if mixing_maximum is not None and mixing == "fixed":
        raise ValueError(f"mixing_maximum={mixing_maximum}: expected none, mixing=fixed has weights")
    if (mixing_temperature is not None) != (mixing == "temperature"):
        told = (
            f"mixing_temperature={mixing_temperature}: " if mixing_temperature is not None else "mixing_temperature: "
        )
        raise ValueError(f"{told}expected one with mixing=temperature, and with no other, got mixing={mixing}")
    if mixing_temperature is not None and not (is_finite(mixing_temperature) and mixing_temperature > 0):
        raise ValueError(f"mixing_temperature={shown(mixing_temperature)}: expected a finite number above 0")


@dataclass(frozen=True)
class Mixture:
    """Tasks, and how they are mixed.

    Raises:
        TypeError, ValueError: a field is of another type, or out of range; two tasks have one name; the message names the field.
    """

    tasks: list[Task]
    mixing: Mixing = "proportional"
    mixing_maximum: int | None = None
    mixing_temperature: float | None = None
    weights: list[float] = field(default_factory=list)  # the tasks', for mixing=fixed
    rehearse: float = 0.0  # share of all draws
    rehearsal: Task | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.tasks:
            raise ValueError("tasks: expected at least one")
        check_mixing(self.mixing, self.mixing_maximum, self.mixing_temperature)
        if self.mixing == "fixed" and len(self.weights) != len(self.tasks):
            raise ValueError(f"weights={shown(self.weights)}: expected {len(self.tasks)} for mixing=fixed, one a task")
        if self.mixing != "fixed" and self.weights:
            raise ValueError(f"weights={shown(self.weights)}: expected none, mixing={self.mixing} follows the rows")
        if not all(is_finite(one) and one > 0 for one in self.weights):
            raise ValueError(f"weights={shown(self.weights)}: expected finite numbers above 0")
        if not 0 <= self.rehearse < 1:
            raise ValueError(f"rehearse={shown(self.rehearse)}: expected 0 to below 1")
        if bool(self.rehearse) != (self.rehearsal is not None):
            raise ValueError(f"rehearse={self.rehearse}: expected above 0 with something to rehearse, and 0 without")
        names = [one.name for one in self.every]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"tasks: expected each name once, got {name!r} twice")

    @property
    def every(self) -> list[Task]:
        """The tasks, and what is rehearsed."""
        return [*self.tasks, *([self.rehearsal] if self.rehearsal else [])]

    @classmethod
    def read(cls, path: str | Path) -> "Mixture":
        """The mixture that a YAML file describes: `tasks`, and fields of the same name. A task is a task's file, a file of rows, or its fields; for
        `mixing: fixed` it is {task: FILE, weight: 2}, or has weight among its fields.

        Raises:
            OSError: a file is not there.
            TypeError, ValueError: it is none; the message is FILE: field: expected.
        """
        path = Path(path)
        if not os.path.isfile(path):  # where a name is none, pathlib raises
            raise FileNotFoundError(f"mixture: there is no file {path}")
        try:
            content = reading.yaml_file(path, words=True)
            if not isinstance(content, dict) or not isinstance(content.get("tasks"), list):
                raise ValueError(f"tasks: expected a list of them, beside {', '.join(OPTIONS)}")
            for key in content:
                if key not in ("tasks", *OPTIONS):
                    raise ValueError(f"{shown(key)}: expected one of tasks, {', '.join(OPTIONS)}")
            tasks, weights = [], []
            for number, one in enumerate(content["tasks"]):
                try:
                    task, weight = _entry(one, path.parent)
                except (TypeError, ValueError) as error:
                    raise type(error)(f"tasks[{number}]: {error}") from None
                tasks.append(task)
                weights.append(weight)
            options: dict[str, Any] = {key: content[key] for key in OPTIONS if key in content}
            weighed = [one for one in weights if one is not None]
            return cls(tasks, weights=weighed, **options)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{path}: {error}") from None

    def examples(
        self, seed: int = 0, length: Callable[[Example], int] | None = None, max_tokens: int | None = None
    ) -> list[Example]:
        """All rows of all tasks, task after task, each with its task's name.

        Args, Raises: as `Task.examples`.
        """
        found: list[Example] = []
        for task in self.every:
            with named_as("rehearse_data" if task is self.rehearsal else "data"):
                found += task.examples(seed, length, max_tokens)
        return found

    def rates(self, counts: Mapping[str, int]) -> dict[str, float]:
        """Each task's share of the draws, by its name.

        Args:
            counts: rows, by the task's name.
        """
        plain = self.weights if self.mixing == "fixed" else [self._counted(counts[one.name]) for one in self.tasks]
        # Over the largest, so that no power of it is beyond what a float holds.
        powers = [(one / max(plain)) ** (1 / (self.mixing_temperature or 1)) for one in plain]
        found = {
            task.name: (1 - self.rehearse) * one / sum(powers) for task, one in zip(self.tasks, powers, strict=True)
        }
        if self.rehearsal:
            found[self.rehearsal.name] = self.rehearse
        return found

    def _counted(self, rows: int) -> int:
        return rows if self.mixing_maximum is None else min(rows, self.mixing_maximum)

    def order(self, names: Sequence[str], seed: int) -> "Order":
        """Which row comes when.

        Args:
            names: each row's task's.
            seed: for the order of each task's rows.

        Raises:
            ValueError: a task has no rows.
        """
        places: dict[str, list[int]] = {task.name: [] for task in self.every}
        for row, name in enumerate(names):
            places[name].append(row)
        for name, rows in places.items():
            if not rows:
                raise ValueError(f"tasks: {name} has no rows left, max_length drops them all")
        counts = {name: len(rows) for name, rows in places.items()}
        once = sum(self._counted(counts[task.name]) for task in self.tasks)
        return Order(places, self.rates(counts), seed, math.ceil(once / (1 - self.rehearse)))


class Order:
    """Draw after draw, which row it is: a function of the seed and the draw's number.

    Args:
        places: each task's rows, by their numbers.
        rates: of the tasks.
        epoch: the draws of an epoch: in a proportional mixture without rehearsal each row once, large tasks capped.
    """

    def __init__(self, places: Mapping[str, list[int]], rates: Mapping[str, float], seed: int, epoch: int) -> None:
        self.places, self.seed, self.epoch = places, seed, epoch
        total = sum(rates.values())
        self.weights = {name: max(1, round(PRECISION * rates[name] / total)) for name in places}
        self._shuffled: dict[str, tuple[int, list[int]]] = {}

    def fingerprint(self) -> bytes:
        """What another mixture of the same rows, or of the same tasks otherwise, has not."""
        return json.dumps([self.places, self.weights, self.epoch]).encode()

    def describe(self) -> str:
        """Each task's rows and share, for people."""
        total = sum(self.weights.values())
        return listed(
            [
                f"{name} {len(rows):,} rows {100 * self.weights[name] / total:.3g} %"
                for name, rows in self.places.items()
            ]
        )

    def draws(self, start: int, stop: int) -> list[int]:
        """The rows of the draws from `start` to before `stop`."""
        return [self._row(name, draw) for name, draw in self.tasks(start, stop)]

    def tasks(self, start: int, stop: int) -> list[tuple[str, int]]:
        """The draws' tasks, and how many draws of its task came before each."""
        total, several = sum(self.weights.values()), len(self.weights)
        # By the time x = a / b of at most `start` draws, and of nearly as many: each task has had x times its rate, but for half a draw.
        a, b = max(0, 2 * start - several), 2 * total
        waiting = []
        skipped = start
        for place, (name, weight) in enumerate(self.weights.items()):
            had = max(0, -((b - 2 * weight * a) // (2 * b)))  # of (2 j + 1) / (2 weight) < a / b
            skipped -= had
            waiting.append((Fraction(2 * had + 1, weight), place, name, had))
        heapq.heapify(waiting)
        found = []
        for number in range(skipped + stop - start):
            _, place, name, had = waiting[0]
            heapq.heapreplace(waiting, (Fraction(2 * had + 3, self.weights[name]), place, name, had + 1))
            if number >= skipped:
                found.append((name, had))
        return found

    def _row(self, name: str, draw: int) -> int:
        rows = self.places[name]
        again, position = divmod(draw, len(rows))
        if self._shuffled.get(name, (-1, []))[0] != again:
            order = list(rows)
            Random(f"fastlora {self.seed} {name} {again}").shuffle(order)
            self._shuffled[name] = again, order
        return self._shuffled[name][1][position]


def of_files(files: Sequence[str], read: Mapping[str, Any], **options: Any) -> Mixture:
    """A mixture of sources, each a task by its name; where two have one, by the whole of it.

    Args:
        read: columns, max_samples and streaming, of those that are no task's file.
        options: Mixture's.

    Raises:
        ValueError: a source is given twice; or as Mixture.
    """
    whole = [file if file.startswith(HUB) else os.path.abspath(file) for file in files]
    twice = next((file for file, path in zip(files, whole, strict=True) if whole.count(path) > 1), None)
    if twice is not None:
        raise ValueError(f"data={twice}: is given twice, expected each once; mixing says how often its rows come")
    return Mixture([_of_file(file, name, **read) for file, name in zip(files, _names(whole), strict=True)], **options)


def _names(paths: Sequence[str]) -> list[str]:
    """What tells each from the others, which is the same from whatever folder they are named: the stem, or as many last parts as it takes."""
    stems = [Path(path).stem for path in paths]
    if len({*stems}) == len(stems):
        return stems
    found = []
    for stem, path in zip(stems, paths, strict=True):
        ends = ["/".join(Path(path).parts[-count:]) for count in range(1, len(Path(path).parts) + 1)]
        others = [other for other in paths if other != path]
        own = (end for end in ends if not any(f"/{other}".endswith(f"/{end}") for other in others))
        found.append(stem if stems.count(stem) == 1 else next(own, path))
    return found


def _of_file(source: str, name: str | None = None, **read: Any) -> Task:
    """A task's file, or rows of a format of their own; max_samples holds for both."""
    path = Path(source)
    if not is_task(path):
        return Task(name or path.stem, source, **read)
    task, most = Task.read(path), read.get("max_samples")
    return task if most is None else replace(task, max_samples=min(most, task.max_samples or most))


def _beside(folder: Path, source: str) -> str:
    """A file's name in a file of that folder."""
    return source if not source or source.startswith(HUB) else str(folder / source)


def with_rehearsal(mixture: Mixture, file: str | Path, share: float, max_samples: int | None = None) -> Mixture:
    """The mixture in which a share of the draws is a file's; of its first so many rows."""
    task = replace(_of_file(str(file), max_samples=max_samples), name=REHEARSAL)
    return replace(mixture, rehearsal=task, rehearse=share)


def _entry(content: Any, folder: Path) -> tuple[Task, float | None]:
    """A task of a mixture's file, and its weight."""
    if isinstance(content, str):
        return _of_file(_beside(folder, content)), None
    if not isinstance(content, dict):
        raise TypeError(f"expected a file, or a task's fields, got {type(content).__name__}")
    own = {key: value for key, value in content.items() if key != "weight"}
    weight = content.get("weight")
    if weight is not None and (not isinstance(weight, (int, float)) or isinstance(weight, bool)):
        raise TypeError(f"weight={shown(weight)}: expected a number")
    if "task" not in own:
        if "name" not in own and isinstance(own.get("data"), str):
            own["name"] = Path(own["data"]).stem
        return made(own, folder), weight
    if set(own) != {"task"} or not isinstance(own["task"], str):
        raise ValueError(f"task: expected a file, and beside it weight only, got {listed(list(own))}")
    return _of_file(_beside(folder, own["task"])), weight
