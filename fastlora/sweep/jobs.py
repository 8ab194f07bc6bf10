"""What a sweep trains: a grid of options, or the jobs that a file lists. A job is what `fastlora train` would be given for it alone."""

import itertools
import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlora import reading
from fastlora.config import DEFAULT_LR, DEFAULT_R, MOST, Dtype, TrainConfig, as_train, option
from fastlora.data.rows import Truncation, Turns
from fastlora.typed import check_fields, fits, listed, shown

JOBS = "jobs"
"""The folder in a sweep's output that has a folder for each job."""
GRID = ("r", "lr", "lora_alpha", "lora_dropout", "seed", "target_modules")
"""Of which each value makes jobs."""
COMMON = (
    *("data", "columns", "max_samples", "streaming", "use_rslora", "epochs", "max_steps", "batch_size"),
    *("max_length", "truncation", "train_on_turns", "completion_only_loss"),
    *("lr_scheduler_type", "warmup_ratio", "weight_decay", "max_grad_norm"),
)
"""Of all jobs, but for those that say otherwise in a file."""
OWN = ("eval_data", "patience")
"""What a job of a file may have besides an option of `fastlora train`."""
OF_JOBS = (
    *(*GRID, *COMMON, "gradient_accumulation_steps"),
    *("warmup_steps", "lr_scheduler_kwargs", "optim", "adam_beta1", "adam_beta2", "adam_epsilon"),
)
"""Of `fastlora train`, what a job of a file may have."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]{0,99}")


@dataclass(frozen=True)
class Sweep:
    """Which adapters are trained in one run over one frozen base, on what, and how long.

    Raises:
        TypeError: an option is of another type than the one written here; the message names it.
        ValueError: an option is out of range, or of no use beside another; the message names it.
        OSError: jobs is not there.
    """

    model: str | Path = option("Base model: a folder or a hub id.", typed=str)
    eval_data: str | Path | list[str] = option(
        "Held-out rows, from where data may be: the adapter with the lowest loss there is the best.", typed=list[str]
    )
    output: str | Path = option(
        "Folder for sweep.json, sweep.html, checkpoints/ and jobs/NAME, the adapters.", typed=Path
    )
    data: str | Path | list[str] | None = as_train("data", None)
    columns: dict[str, str] | None = option("Of data and eval_data: which column is which field.", None, typed=str)
    max_samples: int | None = as_train("max_samples")
    streaming: bool = as_train("streaming")
    jobs: str | Path | None = option(
        "YAML, a list of jobs in place of a grid: each has options of `fastlora train`, a name, eval_data and patience.",
        None,
        typed=Path,
    )
    r: list[int] | None = option("Ranks with commas. [default: 16]", None, typed=str)
    lr: list[float] | None = option("Highest learning rates with commas. [default: 2e-4]", None, typed=str)
    lora_alpha: list[float] | None = option(
        "With commas; the update is scaled by it / r. [default: 2 r]", None, typed=str
    )
    lora_dropout: list[float] | None = option("On the adapters' input, with commas. [default: 0]", None, typed=str)
    seed: list[int] | None = option(
        "With commas: for an adapter's first values and the order of its rows. [default: 0]", None, typed=str
    )
    target_modules: list[str | list[str]] | None = option(
        "Choices with semicolons, each as `fastlora train` takes it: all-linear;q_proj,v_proj. [default: all-linear]",
        None,
        typed=str,
    )
    use_rslora: bool = as_train("use_rslora")
    epochs: float = as_train("epochs")
    max_steps: int | None = as_train("max_steps")
    batch_size: int = option("Rows of a job that a step takes.", 8)
    max_length: int = as_train("max_length")
    truncation: Truncation = as_train("truncation")
    train_on_turns: Turns = as_train("train_on_turns")
    completion_only_loss: bool = as_train("completion_only_loss")
    lr_scheduler_type: str = as_train("lr_scheduler_type", "cosine")
    warmup_ratio: float = as_train("warmup_ratio")
    weight_decay: float = as_train("weight_decay")
    max_grad_norm: float = as_train("max_grad_norm")
    dtype: Dtype = option("The base's: auto, float32 or bfloat16.", "auto")
    max_tokens: int = option(
        "Tokens at once, of all jobs together: a step's rows are cut into batches of no more.", 4096
    )
    halving: bool = option(
        "Stop the half with the higher held-out loss again and again: at 1/2 of the steps, at 1/4, ...", False
    )
    eval_steps: int | None = option("Steps between held-out losses; the last step always has one.", None)
    patience: int | None = option(
        "Stop a job once so many held-out losses in a row were no lower than its lowest.", None
    )
    limit: int | None = option("Take only the first so many held-out rows.", None)
    save_steps: int = as_train("save_steps")
    resume: bool = as_train("resume")
    overwrite: bool = as_train("overwrite")
    pack_budget: int | None = as_train("pack_budget")

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("model", "eval_data", "output"):
            if not getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)!r} is empty")
        for name in ("max_tokens", "eval_steps", "patience", "limit"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= MOST:
                raise ValueError(f"{name}={shown(value)}: expected 1 to {MOST}")
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite exclude each other: expected one of them")
        given = [name for name in GRID if getattr(self, name) is not None]
        for name in given:
            values = getattr(self, name)
            if not values or len(set(map(_hashable, values))) < len(values):
                raise ValueError(f"{name}={shown(values)}: expected values, each once")
        if self.jobs is not None and given:
            raise ValueError(
                f"jobs and {listed(given)} exclude each other: expected a grid, or each job's own in the file"
            )
        jobs_of(self)  # what is wrong with a job is told before anything runs


@dataclass(frozen=True)
class Job:
    """One adapter."""

    name: str
    config: TrainConfig  # what `fastlora train` would be given for it alone
    eval_data: Path | tuple[str, ...]
    patience: int | None

    @property
    def folder(self) -> Path:
        return Path(self.config.output)


def jobs_of(given: Sweep) -> list[Job]:
    """A sweep's jobs, in order.

    Raises:
        TypeError, ValueError: a job's option is none, or out of range; two jobs have one name; a job has no data.
        OSError: the file of jobs is not there.
    """
    listing = _grid(given) if given.jobs is None else _read(Path(given.jobs))
    jobs: list[Job] = []
    for number, options in enumerate(listing, 1):
        where = "" if given.jobs is None else f"jobs={given.jobs}: job {number}: "
        try:
            job = _job(given, options)
            if any(one.name == job.name for one in jobs):
                raise ValueError(f"name={job.name!r}: expected another, an earlier job has it")
        except (TypeError, ValueError) as error:
            raise type(error)(f"{where}{error}") from None
        jobs.append(job)
    return jobs


def _grid(given: Sweep) -> list[dict[str, Any]]:
    values: dict[str, Sequence[Any]] = {
        "target_modules": given.target_modules or ["all-linear"],
        "seed": given.seed or [0],
        "lora_dropout": given.lora_dropout or [0.0],
        "lora_alpha": given.lora_alpha or [None],
        "r": given.r or [DEFAULT_R],
        "lr": given.lr or [DEFAULT_LR["lora"]],
    }
    found = []
    for one in itertools.product(*values.values()):
        options = dict(zip(values, one, strict=True))
        parts = [f"r{options['r']}", f"lr{options['lr']:g}"]
        for name, letter in (("lora_alpha", "a"), ("lora_dropout", "d"), ("seed", "s")):
            if len(values[name]) > 1:
                parts.append(f"{letter}{options[name]:g}")
        if len(values["target_modules"]) > 1:
            parts.append(f"t{1 + values['target_modules'].index(options['target_modules'])}")
        found.append({"name": "-".join(parts), **{name: value for name, value in options.items() if value is not None}})
    return found


def _job(given: Sweep, options: dict[str, Any]) -> Job:
    for key in options:
        if key not in (*OF_JOBS, *OWN, "name"):
            raise ValueError(f"{shown(key)}: expected one of {', '.join(('name', *OWN, *OF_JOBS))}")
    common = {name: getattr(given, name) for name in COMMON}
    r = options.get("r", DEFAULT_R)
    own = {name: value for name, value in options.items() if name in OF_JOBS}
    train = {"lora_dropout": 0.0, "lora_alpha": 2 * r if isinstance(r, int) else r, **common, **own}
    if train["data"] is None:
        raise ValueError("data: expected a file, none is given")
    name, patience = options.get("name"), options.get("patience", given.patience)
    eval_data = options.get("eval_data", given.eval_data)
    if name is None:
        name = f"r{train['r'] if 'r' in train else DEFAULT_R}-lr{train.get('lr', DEFAULT_LR['lora']):g}"
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(f"name={shown(name)}: expected letters, digits and . _ + = - after one of the first two")
    if patience is not None and (not isinstance(patience, int) or isinstance(patience, bool) or patience < 1):
        raise ValueError(f"patience={shown(patience)}: expected at least 1")
    if patience is not None and given.eval_steps is None:
        raise ValueError(f"patience={patience}: expected eval_steps as well, without them there is one held-out loss")
    if not fits(eval_data, str | Path | list[str]) or not eval_data:
        raise TypeError(f"eval_data={shown(eval_data)}: expected a file")
    everywhere: dict[str, Any] = {
        "dtype": given.dtype,
        "save_steps": given.save_steps,
        "pack_budget": given.pack_budget,
    }
    output = Path(given.output) / JOBS / name
    config = TrainConfig(model=given.model, output=output, method="lora", **everywhere, **train)
    return Job(name, config, tuple(eval_data) if isinstance(eval_data, list) else Path(eval_data), patience)


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        content = reading.yaml_file(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"jobs: there is no file {path}") from None
    except ValueError as error:
        raise ValueError(f"jobs={path}: no YAML list of jobs ({error})") from None
    if not isinstance(content, list) or not content or not all(isinstance(one, dict) for one in content):
        raise ValueError(f"jobs={path}: expected a list of jobs, each with options of `fastlora train`")
    return content


def _hashable(value: Any) -> Hashable:
    return tuple(value) if isinstance(value, list) else value
