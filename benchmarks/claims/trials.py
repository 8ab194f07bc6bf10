"""Trainings on one set of rows, each a `fastlora compare` in a folder of its own: what is done is not done again."""

import gc
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

from fastlora import reading, writing
from fastlora.comparison import BASE, RESULT, RUNS, Comparison, Failure, Outcome, best, compare, failures, load
from fastlora.config import WHOLE, Method
from fastlora.data.examples import Example

from . import material
from .material import Material, Rows
from .verdicts import is_close, mean_and_spread

OTHERS = "others.json"
SEEDS = (1, 2)  # beside 0, where a difference is small
LORA = "lora, r 16"
ATTENTION = ".*[qkvo]_proj"
CHECKPOINTS = "checkpoints"
Pair = tuple[tuple["Found", str], tuple["Found", str]]  # a trial and a kind, twice: what decides a claim

# Of SmolLM2-135M in bfloat16 on two cores of an AMD EPYC (Zen 5), 2026-11-29: what a dry run reckons with.
SECONDS_OF_TOKEN = {"full": 3.6 / 2048}  # to train on
SECONDS_OF_TOKEN_ELSE = 1.55 / 2048  # of every other method
SECONDS_OF_ANSWER = 45 / 64  # to answer a test row with 64 tokens, its loss among it
SECONDS_OF_OTHER = 0.12  # a row of other tasks, whose answers are short
SECONDS_OF_VALIDATION = 0.06  # a row's loss
SECONDS_OF_START = 20  # a process, the model, the speed of answers


class NothingLeftError(RuntimeError):
    """Every rate of a kind has failed, so that an experiment has nothing to tell of it."""


@dataclass(frozen=True)
class Sizes:
    """How much is trained and measured."""

    examples: tuple[int, ...] = (50, 100, 200, 500, 1200)
    ranks: tuple[int, ...] = (1, 4, 16, 64, 256)
    prompts: tuple[int, ...] = (1, 10, 100)
    clusters: tuple[int, ...] = (1, 2, 4, 6)
    steps: int = 112
    least_steps: int = 40  # of few rows
    passes: int = 4  # through few rows, where they are more than least_steps
    batch_size: int = 8
    eval_batch_size: int = 16
    max_length: int = 384
    held: int = 64  # rows to choose by, and to tell of
    other: int = 16  # rows of each other task and cluster
    answer_tokens: int = 64
    other_tokens: int = 12
    rates: tuple[float, ...] = (
        1.0,
        3.0,
        8.0,
    )  # times each method's own default; at 20 the dialogues' loss was the highest

    def steps_of(self, rows: int) -> int:
        """Of so many rows: a few times through them, but neither too little to learn nor more than all have."""
        return min(self.steps, max(self.least_steps, self.passes * rows // self.batch_size))


QUICK = Sizes(
    *((4, 8), (1, 16), (1, 2), (1, 2)),
    steps=2,
    least_steps=1,
    batch_size=2,
    held=4,
    other=2,
    answer_tokens=4,
    other_tokens=3,
    rates=(3.0, 20.0),
)
"""Says nothing of a model: whether all runs through."""


@dataclass(frozen=True)
class Trial:
    """Methods on one set of rows."""

    name: str
    train: Sequence[Example]
    validation: Sequence[Example]
    test: Sequence[Example]
    steps: int
    methods: tuple[Method, ...]
    ranks: tuple[int, ...] = (16,)
    target_modules: str = "all-linear"
    num_virtual_tokens: int = 20
    others: bool = False  # other tasks and all clusters are measured as well
    by_tokens: int | None = None  # in place of steps


@dataclass(frozen=True)
class Bench:
    """A model, rows, and the folder that everything is kept in."""

    model: Path
    output: Path
    rows: Material
    sizes: Sizes
    dtype: str

    def trial(self, name: str, task: Rows, train: Sequence[Example] | None = None, **more: Any) -> Trial:
        """On that task's rows, or on those given and told on the task's."""
        given: dict[str, Any] = {"methods": ("lora", "full"), "steps": self.sizes.steps, **more}
        return Trial(name, task.train if train is None else train, task.validation, task.test, **given)

    def comparison(self, trial: Trial) -> Comparison:
        """Of all its methods and rates. Its rows are written."""
        folder, sizes = self.output / "data", self.sizes
        parts = {"train": trial.train, "validation": trial.validation[: sizes.held], "test": trial.test[: sizes.held]}
        files = {part: material.write(folder / f"{trial.name}-{part}.jsonl", rows) for part, rows in parts.items()}
        budget: dict[str, Any] = (
            {"max_steps": trial.steps} if trial.by_tokens is None else {"max_tokens": trial.by_tokens}
        )
        return Comparison(
            model=self.model,
            data=files["train"],
            eval_data=files["validation"],
            test_data=files["test"],
            output=self.output / "trials" / trial.name,
            methods=list(trial.methods),
            r=list(trial.ranks),
            lr_factors=list(sizes.rates),
            target_modules=trial.target_modules,
            num_virtual_tokens=trial.num_virtual_tokens,
            batch_size=sizes.batch_size,
            eval_batch_size=sizes.eval_batch_size,
            max_length=sizes.max_length,
            max_new_tokens=sizes.answer_tokens,
            dtype=self.dtype,
            **budget,
        )

    def run(self, trial: Trial) -> "Found":
        """Train and measure what is not yet."""
        given = self.comparison(trial)
        if trial.others:
            _ = self.other_rows  # or what is known would be of other rows
        outcomes = compare(given)
        others = {one.name: self._others(given, one) for one in outcomes} if trial.others else {}
        failed = failures(given)
        _forget_weights(given, [*outcomes, *failed])
        return Found(trial, outcomes, others, failed)

    def again(self, found: "Found", kind: str) -> None:
        """The best of that kind with two more seeds."""
        one = found.best(kind)
        for seed in SEEDS:
            changes: dict[str, Any] = {"methods": [one.method], "r": None if one.r is None else [one.r], "lr": [one.lr]}
            folder = self.output / "trials" / f"{found.trial.name}-seed{seed}"
            given = replace(self.comparison(found.trial), output=folder, seed=seed, lr_factors=None, **changes)
            _, *done = compare(given)
            for again in done:
                found.seeds.setdefault(kind, {})[seed] = again
            failed = [] if done else failures(given)
            for bad in failed:
                found.failed_seeds[kind, seed] = bad
            _forget_weights(given, [*done, *failed])

    def _others(self, given: Comparison, one: Outcome) -> dict[str, dict[str, Any]]:
        """Loss and accuracy on every other task and cluster, by name; kept beside the run."""
        path = Path(given.output) / RUNS / one.name / OTHERS
        if path.is_file():
            return reading.json_file(path)
        from fastlora.evaluation import evaluate

        model, tokenizer = load(given, one.name, one.method)
        found = {}
        for name, rows in self.other_rows.items():
            result = evaluate(
                *(model, tokenizer, rows),
                batch_size=self.sizes.eval_batch_size,
                max_length=self.sizes.max_length,
                max_new_tokens=self.sizes.other_tokens,
            )
            # Labels may be said with more behind them; other answers are right as a whole, or wrong.
            right = result.exact_match if result.accuracy is None else result.accuracy
            found[name] = {"rows": result.rows, "loss": result.loss, "accuracy": right}
        del model
        gc.collect()
        writing.whole(path, (json.dumps(found, indent=2) + "\n").encode())
        return found

    @cached_property
    def other_rows(self) -> dict[str, list[Example]]:
        """Of other tasks, by "other/NAME", and held-out rows of clusters, by "cluster/NAME".

        Raises:
            FileExistsError: they are not those of an earlier run.
        """
        count = self.sizes.other
        found = {f"other/{name}": rows[:count] for name, rows in self.rows.others.items()}
        found |= {f"cluster/{name}": rows.test[:count] for name, rows in self.rows.clusters.items()}
        for name, rows in found.items():
            material.write(self.output / "data" / f"{name.replace('/', '-')}.jsonl", rows)
        return found

    def left(self, trial: Trial, tokens_of: Any) -> Iterator[tuple[str, float]]:
        """What is still to be run, with its expected seconds; tokens_of: a row's tokens."""
        given = self.comparison(trial)
        tokens = mean(map(tokens_of, trial.train))
        measured = min(self.sizes.held, len(trial.test)) * SECONDS_OF_ANSWER * self.sizes.answer_tokens / 64
        measured += min(self.sizes.held, len(trial.validation)) * SECONDS_OF_VALIDATION + SECONDS_OF_START
        other = sum(map(len, self.other_rows.values())) * SECONDS_OF_OTHER if trial.others else 0.0
        trained = trial.by_tokens or trial.steps * self.sizes.batch_size * tokens
        runs = {BASE: 0.0} | {
            run.name: trained * SECONDS_OF_TOKEN.get(run.method, SECONDS_OF_TOKEN_ELSE) for run in given.runs()
        }
        failed = {one.name for one in failures(given)}
        for name, seconds in runs.items():
            folder = Path(given.output) / RUNS / name
            left = 0.0 if (folder / RESULT).is_file() else seconds + measured
            left += 0.0 if (folder / OTHERS).is_file() or name in failed else other
            if left:
                yield name, left


@dataclass
class Found:
    """What a trial has come to."""

    trial: Trial
    outcomes: list[Outcome]  # the base's first
    others: dict[str, dict[str, dict[str, Any]]]  # of each outcome, by name
    failed: Sequence[Failure] = ()  # runs that diverged

    def __post_init__(self) -> None:
        self.seeds: dict[str, dict[int, Outcome]] = {}
        self.failed_seeds: dict[tuple[str, int], Failure] = {}  # by kind and seed

    @property
    def base(self) -> Outcome:
        return self.outcomes[0]

    def of(self, kind: str) -> list[Outcome]:
        """Its runs by rising rate."""
        return sorted((one for one in self.outcomes if one.kind == kind), key=lambda one: one.lr or 0.0)

    def best(self, kind: str) -> Outcome:
        """
        Raises:
            NothingLeftError: all of its runs failed.
        """
        found = [one for one in best(self.outcomes) if one.kind == kind]
        if not found:
            said = "; ".join(f"at {one.lr:g} in step {one.step}" for one in self.failed if one.kind == kind)
            raise NothingLeftError(f"{kind} ({self.trial.name}) failed at every rate: {said}")
        return found[0]

    def is_at_edge(self, kind: str) -> bool:
        """Whether its best rate is the lowest or the highest that was tried: a better one may lie beyond, but not where that failed."""
        tried: list[Outcome | Failure] = [*self.outcomes, *self.failed]
        rates = sorted(one.lr or 0.0 for one in tried if one.kind == kind)
        return self.best(kind).lr in (rates[0], rates[-1])

    def values(self, kind: str, metric: str) -> list[float]:
        """Of its best, over the seeds that there are."""
        return [getattr(one, metric) for one in (self.best(kind), *self.seeds.get(kind, {}).values())]

    def mean(self, kind: str, metric: str) -> float:
        return mean_and_spread(self.values(kind, metric))[0]

    def rise(self, one: Outcome, groups: Sequence[str]) -> float:
        """By how much the loss on groups of other tasks is above the base's, each task counted alike."""
        before, after = self.others[BASE], self.others[one.name]
        return mean(after[name]["loss"] - before[name]["loss"] for name in _named(after, groups))

    def accuracy(self, one: Outcome, groups: Sequence[str]) -> float:
        """On groups of other tasks, each counted alike."""
        measured = self.others[one.name]
        return mean(measured[name]["accuracy"] for name in _named(measured, groups))

    def as_json(self) -> dict[str, Any]:
        outcomes = [
            asdict(one) | ({"others": self.others[one.name]} if one.name in self.others else {})
            for one in self.outcomes
        ]
        seeds = {kind: {seed: asdict(one) for seed, one in found.items()} for kind, found in self.seeds.items()}
        at_edge = [one.kind for one in best(self.outcomes)[1:] if self.is_at_edge(one.kind)]
        failed = [
            *map(asdict, self.failed),
            *(asdict(one) | {"seed": seed} for (_, seed), one in self.failed_seeds.items()),
        ]
        return {"name": self.trial.name, "rows": len(self.trial.train), "outcomes": outcomes, "seeds": seeds, "failed": failed,
                "best": [one.name for one in best(self.outcomes)], "best_rate_at_edge": at_edge}  # fmt: skip


def settle(bench: Bench, reference: tuple[Found, str], pairs: Sequence[Pair], metric: str
) -> list[str]:  # fmt: skip
    """More seeds where they are needed: the reference has three, whose spread stands for all; a pair of (trial, kind) that
    differs by less than `is_close` has three each. Where the reference's other seeds fail, its spread is unknown, and every pair has three.

    Returns:
        What was decided, as sentences.

    Raises:
        NothingLeftError: of the reference, or of one of a pair, all runs failed.
    """
    bench.again(*reference)
    values = reference[0].values(reference[1], metric)
    spread, many = mean_and_spread(values)[1], {2: "two", 3: "three"}.get(len(values))
    of_them = f"({reference[1]}, {reference[0].trial.name})"
    said = [f"{metric}: the standard deviation is unknown, all but one of the seeds failed {of_them}"]
    if spread is not None:
        said = [f"{metric}: the standard deviation over {many} seeds is {spread:.4f} {of_them}"]
    for pair in pairs:
        one, other = (getattr(found.best(kind), metric) for found, kind in pair)
        close = spread is None or is_close(one, other, spread)
        for found, kind in pair if close else ():
            if kind not in found.seeds:
                bench.again(found, kind)
        names = " and ".join(f"{kind} ({found.trial.name})" for found, kind in pair)
        seeds = "three seeds each, their means are told" if close else "one seed tells them apart"
        said.append(f"{names} differ by {abs(one - other):.4f}: {seeds}")
    return said


def _named(measured: dict[str, Any], groups: Sequence[str]) -> list[str]:
    """groups: "other", "cluster", or one of these by its whole name."""
    return [name for name in measured if {name.split("/", 1)[0], name} & set(groups)]


def _forget_weights(given: Comparison, runs: Sequence[Outcome | Failure]) -> None:
    """What was trained whole is half a gigabyte, and measured; a checkpoint, with its optimiser, three times that, and nothing goes on from it."""
    for one in runs:
        folder = Path(given.output) / RUNS / one.name
        writing.remove(folder / CHECKPOINTS)
        for path in folder.glob("*.safetensors") if one.method in WHOLE else ():
            path.unlink()
