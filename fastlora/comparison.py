"""Methods side by side: each is trained on the same rows with the same budget, in a process of its own, and all are measured alike.

What is told of each: held-out loss and ROUGE (of rows that its rate was not chosen by, if there are such); what is trained, and the bytes that its
file takes; seconds a step and peak memory of training; tokens a second of answering with it; and forgetting, which is how much the loss on other
rows has risen. After PEFT's own comparison of methods (huggingface/peft, method_comparison), with forgetting beside learning as in Biderman et al.
2024 ("LoRA Learns Less and Forgets Less").
"""

import gc
import hashlib
import io
import json
import logging
import math
import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from statistics import median
from typing import Any, get_args

import torch

from fastlora import __version__, memory, reading, writing
from fastlora.config import DEFAULT_LR, DEFAULT_R, PROMPTS, RANKED, WHOLE, Method, TrainConfig, as_train, option
from fastlora.course import Diverged, UnsuitableError
from fastlora.data.rows import Truncation, Turns
from fastlora.data.tasks import files_of
from fastlora.typed import check_fields, fits, shown

logger = logging.getLogger("fastlora")

RUNS, RESULT, NAME, PLOT = "runs", "run.json", "compare.json", "compare.png"
SETUP, FILES = "setup.json", "files.json"
"""Beside the runs: what all have in common, and the SHA-256 of each file of rows."""
PROBE_STEPS = 4  # of a run that finds out how many steps fit into a number of seconds; the first is not counted
ANSWERED = 4  # prompts a batch, whose answers' speed is measured
ANSWER_TOKENS = 32
BASE = "base"
CUT = ("max_length", "truncation", "train_on_turns", "completion_only_loss")
"""What is trained on and measured of a row."""


@dataclass(frozen=True)
class Comparison:
    """What is compared, on what, and for how long. Every method has the same rows in the same order, and as many tokens or seconds.

    Raises:
        TypeError: an option is of another type than the one written here; the message names it.
        ValueError: an option is out of range, or more than one budget; the message names it.
    """

    model: str | Path = option("Base model: a folder or a hub id.", typed=str)
    data: str | Path | list[str] = as_train("data", MISSING)
    eval_data: str | Path | list[str] = option(
        "Held-out rows of the same task, from where data may be: the best rate is chosen by them.", typed=list[str]
    )
    output: str | Path = option("Folder for compare.json, compare.png and runs/.", typed=Path)
    methods: list[Method] = option(
        f"With commas, of {', '.join(name for name in get_args(Method) if name != 'peft')}.", typed=str
    )
    columns: dict[str, str] | None = option(
        "Of data, eval_data and test_data: which column is which field.", None, typed=str
    )
    test_data: str | Path | list[str] | None = option(
        "More held-out rows, which nothing is chosen by: all that is told is of them. [default: eval_data]",
        None,
        typed=list[str],
    )
    retain_data: str | Path | list[str] | None = option(
        "Other rows: how much their loss rises is what is forgotten.", None, typed=list[str]
    )
    r: list[int] | None = option("Ranks with commas, of lora and dora: each is a run. [default: 16]", None, typed=str)
    target_modules: str | list[str] = option(
        "Of lora and dora: all-linear, names with commas, or a regular expression.", "all-linear", typed=str
    )
    lr: list[float] | None = option(
        "Learning rates with commas: each method is trained with all of them, and told with its best on eval_data."
        " [default: each method's own]",
        None,
        typed=str,
    )
    lr_factors: list[float] | None = option(
        "Factors with commas, in place of lr: each method is trained with its own default rate times each.",
        None,
        typed=str,
    )
    max_steps: int | None = option("Optimiser steps of each run.", None)
    max_tokens: int | None = option("Tokens of each run, in place of steps.", None)
    max_seconds: float | None = option("Seconds of steps of each run, in place of steps.", None)
    epochs: float = option("Times through the data, without a budget.", 3)
    batch_size: int = option("Rows a step.", 8)
    eval_batch_size: int | None = option("Rows that are measured at once. [default: batch_size]", None)
    max_length: int = option("Tokens a row may have.", 512)
    truncation: Truncation = as_train("truncation")
    train_on_turns: Turns = as_train("train_on_turns")
    completion_only_loss: bool = as_train("completion_only_loss")
    num_virtual_tokens: int = option("Length of soft prompts, in tokens.", 20)
    token_indices: list[int] | None = option(
        "Tokens whose embeddings method tokens trains, with commas.", None, typed=str
    )
    seed: int = option("Of every run.", 0)
    dtype: str = option("The base's: auto, float32 or bfloat16.", "auto")
    generations: bool = option("Also let each answer the held-out prompts: exact match and ROUGE.", True)
    max_new_tokens: int = option("Length of an answer, at most.", 64)
    limit: int | None = option("Take only the first so many held-out rows, and other rows.", None)
    overwrite: bool = option("Begin anew where the folder holds another comparison.", False)

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("model", "data", "eval_data", "output", "methods"):
            if not getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)!r} is empty")
        budgets = [name for name in ("max_steps", "max_tokens", "max_seconds") if getattr(self, name) is not None]
        if len(budgets) > 1:
            raise ValueError(f"{' and '.join(budgets)} exclude each other: expected one budget")
        for name in budgets:
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={shown(getattr(self, name))}: expected more than 0")
        if self.lr and self.lr_factors:
            raise ValueError("lr and lr_factors exclude each other: expected one of them")
        for name in ("limit", "eval_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: expected at least 1")
        if "peft" in self.methods:
            raise ValueError("methods: peft has a configuration of its own, expected names of methods")
        for run in self.runs():
            self.config_of(run, Path("unused"))  # a bad value is told before anything runs
        names = [run.name for run in self.runs()]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"lr: two rates are so close that both runs are called {twice}: expected one of them")

    @property
    def told_data(self) -> str | Path | list[str]:
        """The held-out rows that the table and the plot are of."""
        return self.eval_data if self.test_data is None else self.test_data

    def runs(self) -> list["Run"]:
        """What is trained, in order."""
        rates: dict[Method, Sequence[float]] = {
            one: self.lr or [DEFAULT_LR[one] * factor for factor in self.lr_factors or (1,)] for one in self.methods
        }
        return [
            Run(method, r, lr)
            for method in dict.fromkeys(self.methods)
            for r in (dict.fromkeys(self.r or (DEFAULT_R,)) if method in RANKED else (None,))
            for lr in dict.fromkeys(rates[method])
        ]

    def config_of(self, run: "Run", output: Path, **more: Any) -> TrainConfig:
        given: dict[str, Any] = {"lr_scheduler_type": "cosine"}
        if run.method in RANKED:
            given |= {"r": run.r, "lora_alpha": 2 * (run.r or 0), "target_modules": self.target_modules}
        if run.method in PROMPTS:
            given["num_virtual_tokens"] = self.num_virtual_tokens
        if run.method == "tokens":
            given["token_indices"] = self.token_indices
        same = ("model", "data", "columns", "epochs", "batch_size", *CUT, "seed", "dtype", "max_steps")
        given |= {name: getattr(self, name) for name in same}
        given |= {"method": run.method, "lr": run.lr, "output": output, "save_steps": 10**6}
        return TrainConfig(**given | more)


@dataclass(frozen=True)
class Run:
    """One training."""

    method: Method
    r: int | None
    lr: float

    @property
    def name(self) -> str:
        rank = "" if self.r is None else f"-r{self.r}"
        return f"{self.method}{rank}-lr{self.lr:g}"

    @property
    def kind(self) -> str:
        """What is told in one row: of its rates the best."""
        return self.method if self.r is None else f"{self.method}, r {self.r}"


@dataclass(frozen=True)
class Outcome:
    """What was measured of the base, or of a run."""

    name: str
    kind: str
    method: str
    r: int | None
    lr: float | None
    eval_loss: float  # on eval_data, nats a token: its kind's best is chosen by it
    loss: float  # on told_data, as ROUGE and exact match
    rouge1: float | None
    rougeL: float | None
    exact_match: float | None
    retained_loss: float | None  # on the other rows
    forgetting: float | None  # by how much that is above the base's
    answer_tokens_per_second: float
    accuracy: float | None = None  # on told_data, where the answers are labels
    retained_accuracy: float | None = None  # on the other rows, where theirs are
    trainable_parameters: int = 0
    parameters: int = 0
    file_bytes: int = 0
    peak_bytes: int | None = None  # of the training process
    seconds_per_step: float | None = None
    steps: int = 0
    tokens: int = 0
    train_loss: float | None = None


@dataclass(frozen=True)
class Failure:
    """A run that came to nothing: it diverged, at too high a rate, say, or the model has nothing for its method, as biases for bitfit."""

    name: str
    kind: str
    method: str
    r: int | None
    lr: float | None
    step: int  # that made its loss, a gradient or a weight infinite or NaN; or the last, where that shows on held-out rows only; 0: it never began
    failed: str  # what was said of it


class RunEnded(RuntimeError):
    """A run's process is gone, and has said nothing."""


def compare(given: Comparison, begin: Callable[[], object] | None = None) -> list[Outcome]:
    """Train every run, measure all of them, and write OUTPUT/compare.json and compare.png; the base's row comes first.

    A run that is done is not done again: a comparison that was stopped goes on where it was. One that diverges has no outcome, and the others go
    on: `failures` tells of it.

    Args:
        begin: what each run's process begins with, a function of a module; it says what is printed there, as this process has it for itself.

    Raises:
        FileExistsError: the folder holds a comparison of other things, or of files that say something else now, and overwrite was not asked for.
        ValueError: the base has no finite loss on some rows.
        RunEnded: a run's process ended without an answer, out of memory, say.
        As `train` and `evaluate`: what they raise, but for Diverged.
    """
    output = Path(given.output)
    writing.require_apart(output, model=str(given.model))
    with writing.locked(output):
        _claim(output, given)
        base = _once(output / RUNS / BASE, None, given, None, begin)
        assert isinstance(base, Outcome)
        found = [base]
        for run in given.runs():
            print(f"{run.name}", flush=True)
            one = _once(output / RUNS / run.name, run, given, base.retained_loss, begin)
            if isinstance(one, Outcome):
                found.append(one)
            else:
                print(f"{run.name} came to nothing: {one.failed}", flush=True)
        _write(output, given, found)
    return found


def failures(given: Comparison) -> list[Failure]:
    """The runs of a comparison that came to nothing, in order; none of what is still to be run.

    Raises:
        ValueError: a run's file is of another version.
    """
    found = (_done(Path(given.output) / RUNS / run.name / RESULT) for run in given.runs())
    return [one for one in found if isinstance(one, Failure)]


def best(found: Iterable[Outcome]) -> list[Outcome]:
    """Of each kind the outcome with the lowest loss on eval_data, in the order of the kinds."""
    kinds: dict[str, Outcome] = {}
    for one in found:
        if one.kind not in kinds or one.eval_loss < kinds[one.kind].eval_loss:
            kinds[one.kind] = one
    return list(kinds.values())


def _setup(given: Comparison) -> dict[str, Any]:
    """What every run of a comparison has in common."""
    changes = {"methods", "r", "lr", "lr_factors", "output", "overwrite"}  # which add runs, and change none
    values = {one.name: getattr(given, one.name) for one in fields(given) if one.name not in changes}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def _files(given: Comparison) -> dict[str, str]:
    """The SHA-256 of every file of rows."""
    named = (given.data, given.eval_data, given.test_data, given.retain_data)
    paths = dict.fromkeys(path for data in named if data is not None for path in files_of(data))
    found = {}
    for path in paths:
        with path.open("rb") as file:
            found[str(path)] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _claim(output: Path, given: Comparison) -> None:
    path, setup, files = output / RUNS / SETUP, _setup(given), _files(given)
    if given.overwrite:
        writing.remove(output / RUNS)
    before = reading.json_file(path) if path.is_file() else None
    if before is not None and before.keys() != setup.keys():
        raise ValueError(f"{path}: no comparison of this version of fastlora: expected overwrite=True")
    if before is not None and before != setup:
        name = next(name for name in setup if before[name] != setup[name])
        raise FileExistsError(
            f"output={output} holds a comparison with {name}={shown(before[name])}: expected that, or overwrite=True"
        )
    known = reading.json_file(path.with_name(FILES)) if path.with_name(FILES).is_file() else files
    if known != files:
        file = next(name for name in {**known, **files} if known.get(name) != files.get(name))
        raise FileExistsError(
            f"output={output} holds a comparison in which {file} said something else: expected that, or overwrite=True"
        )
    writing.make(output / RUNS)
    for name, content in ((SETUP, setup), (FILES, files)):
        writing.whole(output / RUNS / name, (json.dumps(content, indent=2) + "\n").encode())


def _done(path: Path) -> Outcome | Failure | None:
    """What a run's file says, if there is one."""
    if not path.is_file():
        return None
    values = reading.json_file(path)
    if set(values) == {one.name for one in fields(Outcome)} and fits(values["loss"], float):
        return Outcome(**values)
    if set(values) == {one.name for one in fields(Failure)} and fits(values["step"], int):
        return Failure(**values)
    raise ValueError(f"{path}: no outcome of this version of fastlora: expected overwrite=True")


def _once(
    folder: Path, run: Run | None, given: Comparison, retained: float | None, begin: Callable[[], object] | None
) -> Outcome | Failure:
    """What a run's file says, or else what its process finds."""
    path = folder / RESULT
    if (done := _done(path)) is not None:
        return done
    spawn = multiprocessing.get_context("spawn")
    initargs = (list(warnings.filters), begin)
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=_begin, initargs=initargs) as process:
        try:
            found = process.submit(_find, run, given, folder).result()
        except BrokenProcessPool:
            who = run.name if run else BASE
            raise RunEnded(
                f"{who}: its process ended without an answer, as one does that the system kills for its memory"
            ) from None
    name, kind, method = (run.name, run.kind, run.method) if run else (BASE, BASE, BASE)
    own = (name, kind, method, run.r if run else None, run.lr if run else None)
    outcome: Outcome | Failure
    if "failed" in found:
        outcome = Failure(*own, **found)
    else:
        if retained is not None:
            found["forgetting"] = found["retained_loss"] - retained
        outcome = Outcome(*own, **found)
    writing.make(folder)
    writing.whole(path, (json.dumps(asdict(outcome), indent=2) + "\n").encode())
    return outcome


def _begin(filters: list[Any], begin: Callable[[], object] | None) -> None:
    """What the process that began this one does not want to be warned of is silent here, too."""
    if begin is not None:
        begin()
    warnings.filters[:] = filters  # type: ignore[index]


def _find(run: Run | None, given: Comparison, folder: Path) -> dict[str, Any]:
    """All that is told of a run, or of the base, in this process; of one that came to nothing, in which step, and what was said of it.

    Raises:
        ValueError: the base has no finite loss.
    """
    try:
        trained = _train(run, given, folder) if run else {}
    except Diverged as error:
        return {"step": error.step, "failed": str(error)}
    except UnsuitableError as error:
        return {"step": 0, "failed": str(error)}
    gc.collect()  # the model that was trained, which lies on the disk now
    measured = _measure(given, *((run.name, run.method) if run else (BASE, BASE)))
    losses = {name: measured[name] for name in ("eval_loss", "loss", "retained_loss") if measured[name] is not None}
    for name, loss in losses.items():
        if not math.isfinite(loss):
            if run is None:
                raise ValueError(f"model={given.model}: its {name} is {loss}, expected one that is finite")
            return {"step": trained["steps"], "failed": f"step {trained['steps']}: {name} is {loss}"}
    return {**trained, **measured}


def _train(run: Run, given: Comparison, folder: Path) -> dict[str, Any]:
    """One training."""
    from fastlora.train import train

    config = given.config_of(run, folder, overwrite=True)
    config = replace(config, max_steps=_steps(config, given, folder))
    result = train(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "trainable_parameters": result.trainable_parameters,
        "parameters": result.parameters,
        "file_bytes": result.adapter_bytes,
        "peak_bytes": memory.peak(device),
        "seconds_per_step": median(_seconds(folder)[1:] or _seconds(folder)),
        "steps": result.steps,
        "tokens": result.tokens,
        "train_loss": result.loss,
    }


def _seconds(folder: Path) -> list[float]:
    from fastlora import metrics

    return [record["seconds"] for record in metrics.read(folder)]


def _steps(config: TrainConfig, given: Comparison, folder: Path) -> int | None:
    """The optimiser steps that the budget is worth."""
    if given.max_tokens is not None:
        from fastlora.data.rows import count_tokens
        from fastlora.models import load_tokenizer
        from fastlora.training_data import read

        rows = read(config, load_tokenizer(str(config.model))).rows
        mean = count_tokens(rows) / len(rows) * min(config.batch_size, len(rows))
        return max(1, round(given.max_tokens / mean))
    if given.max_seconds is not None:
        from fastlora.train import train

        train(replace(config, max_steps=PROBE_STEPS), progress=False)
        return max(1, round(given.max_seconds / median(_seconds(folder)[1:])))
    return given.max_steps


def load(given: Comparison, name: str, method: str) -> tuple[Any, Any]:
    """The model and the tokenizer that an outcome is of, by its name and method: a trained run, or the base."""
    from fastlora.models import load_model

    folder = Path(given.output) / RUNS / name
    whole = method == BASE or method in WHOLE
    path = str(given.model) if method == BASE else str(folder) if whole else None
    # A rate too low to change anything is a result, too.
    return load_model(path, {} if whole else {"default": folder}, dtype=given.dtype, allow_noop=True)


def _measure(given: Comparison, name: str, method: str) -> dict[str, Any]:
    """What a trained run, or the base, can."""
    from fastlora.data.examples import named_as
    from fastlora.data.rows import row_length
    from fastlora.data.tasks import read_rows
    from fastlora.evaluation import are_labels, evaluate

    model, tokenizer = load(given, name, method)
    batch_size = given.eval_batch_size or given.batch_size
    same: dict[str, Any] = {name: getattr(given, name) for name in (*CUT, "limit")} | {"batch_size": batch_size}
    answered: dict[str, Any] = {"generations": given.generations, "max_new_tokens": given.max_new_tokens}
    with named_as("test_data" if given.test_data else "eval_data"):
        told = evaluate(model, tokenizer, given.told_data, columns=given.columns, **answered, **same)
    chosen_by, kept = told, None
    if given.test_data:
        with named_as("eval_data"):
            chosen_by = evaluate(model, tokenizer, given.eval_data, columns=given.columns, generations=False, **same)
    if given.retain_data:
        length = row_length(tokenizer, model.config.is_encoder_decoder)
        with named_as("retain_data"):
            other = read_rows(given.retain_data, length=length, max_tokens=given.max_length)
        answered["generations"] = given.generations and are_labels(other[: given.limit])
        kept = evaluate(model, tokenizer, other, **answered, **same)
    return {
        "eval_loss": chosen_by.loss,
        "loss": told.loss,
        "rouge1": told.rouge1,
        "rougeL": told.rougeL,
        "exact_match": told.exact_match,
        "accuracy": told.accuracy,
        "retained_loss": kept.loss if kept else None,
        "retained_accuracy": kept.accuracy if kept else None,
        "forgetting": None if kept is None else 0.0,
        "answer_tokens_per_second": _answer_rate(model, tokenizer, given),
    }


def _answer_rate(model: Any, tokenizer: Any, given: Comparison) -> float:
    """Tokens a second of greedy answers to a few held-out prompts, as long for everyone: none ends early."""
    from fastlora.data.rows import encode, pad_token_id, row_length
    from fastlora.data.tasks import read_rows
    from fastlora.models import positions

    room = int(max(2, min(given.max_length, (positions(model) or math.inf) - ANSWER_TOKENS)))
    pairs = model.config.is_encoder_decoder
    counting = row_length(tokenizer, pairs)
    examples = read_rows(given.told_data, columns=given.columns, length=counting, max_tokens=room)
    rows = encode(examples[:ANSWERED], tokenizer, room, "prompt", encoder_decoder=pairs).rows
    width = min(row.prompt_length for row in rows) or 1  # of plain text, the first token
    ends = [max(row.prompt_length, width) for row in rows]
    ids = torch.tensor(
        [row.input_ids[end - width : end] for row, end in zip(rows, ends, strict=True)], device=model.device
    )
    length = {"min_new_tokens": ANSWER_TOKENS, "max_new_tokens": ANSWER_TOKENS, "do_sample": False}
    times = []
    with torch.no_grad():
        for _ in range(4):  # the first warms up
            began = time.perf_counter()
            model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=pad_token_id(tokenizer), **length
            )
            times.append(time.perf_counter() - began)
    return ids.shape[0] * ANSWER_TOKENS / median(times[1:])


def _write(output: Path, given: Comparison, found: Sequence[Outcome]) -> None:
    content = {
        "fastlora": __version__,
        "setup": _setup(given),
        "threads": torch.get_num_threads(),
        "outcomes": [asdict(one) for one in found],
        "best": [one.name for one in best(found)],
        "failed": [asdict(one) for one in failures(given)],
    }
    writing.whole(output / NAME, (json.dumps(content, indent=2) + "\n").encode())
    try:
        drawing, image = figure(found), io.BytesIO()
    except ModuleNotFoundError:
        logger.warning("no %s: the package matplotlib is missing (pip install matplotlib)", PLOT)
        return
    drawing.savefig(image, dpi=120, format="png")
    writing.whole(output / PLOT, image.getvalue())


def rows(found: Iterable[Outcome], failed: Iterable[Failure] = ()) -> Iterator[Mapping[str, str]]:
    """A table's rows as text, by column: each kind's best, and what came to nothing."""

    def shown_as(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    blank: dict[str, str] = {}
    told = best(found)
    for one in told:
        row = {
            "method": one.kind,
            "lr": shown_as(one.lr, "g"),
            "held-out loss": f"{one.loss:.4f}",
            "ROUGE-1": shown_as(one.rouge1 and 100 * one.rouge1, ".1f"),
            **_where_any(told, one, "accuracy", "accuracy"),
            "forgetting": shown_as(one.forgetting, "+.4f"),
            **_where_any(told, one, "retained accuracy", "retained_accuracy"),
            "trained": f"{one.trainable_parameters:,}",
            "file MB": f"{one.file_bytes / 1e6:.3g}",
            "peak GB": shown_as(one.peak_bytes and one.peak_bytes / 1e9, ".2f"),
            "s a step": shown_as(one.seconds_per_step, ".3g"),
            "answer tokens/s": f"{one.answer_tokens_per_second:.1f}",
        }
        blank = dict.fromkeys(row, "-")
        yield row
    for bad in failed:
        said = f"failed in step {bad.step}" if bad.step else "not for this model"
        yield blank | {"method": bad.kind, "lr": shown_as(bad.lr, "g"), "held-out loss": said}


def _where_any(found: Sequence[Outcome], one: Outcome, heading: str, name: str) -> dict[str, str]:
    """A column of per cents, where some outcome has one."""
    if all(getattr(other, name) is None for other in found):
        return {}
    value = getattr(one, name)
    return {heading: "-" if value is None else f"{100 * value:.1f}"}


def figure(found: Sequence[Outcome]) -> Any:
    """Learning against forgetting, as matplotlib's Figure: a run is a point, a kind a colour; without other rows, against what is trained.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    from matplotlib.figure import Figure

    base, *trained = found
    forgets = base.retained_loss is not None
    drawing = Figure(figsize=(7, 5), layout="constrained")
    axes = drawing.subplots()
    chosen = {one.name for one in best(trained)}
    for kind in dict.fromkeys(one.kind for one in trained):
        of_kind = [one for one in trained if one.kind == kind]
        across = [(one.forgetting or 0.0) if forgets else float(one.trainable_parameters) for one in of_kind]
        drawn = axes.scatter(across, [base.loss - one.loss for one in of_kind], label=kind, alpha=0.4)
        for x, one in zip(across, of_kind, strict=True):
            if one.name in chosen:
                axes.scatter([x], [base.loss - one.loss], color=drawn.get_facecolor(), alpha=1.0, edgecolors="black")
    axes.axhline(0, color="gray", linewidth=0.5)
    axes.axvline(0, color="gray", linewidth=0.5)
    if not forgets:
        axes.set_xscale("log")
    axes.set(
        xlabel="forgetting: rise of the loss on other rows, nats a token" if forgets else "trained parameters",
        ylabel="learning: fall of the held-out loss, nats a token",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return drawing
