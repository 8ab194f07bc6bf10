"""The training loop: prompts and completions in, a LoRA adapter in PEFT's format (or a fully fine-tuned model) out.

One optimiser step takes `batch_size * gradient_accumulation_steps` rows on each process; its loss is the mean over all
labelled tokens of those rows, however they are cut into batches. Which rows a step takes follows from the seed and the
step's number alone, and every generator's state is in the checkpoint: a resumed run computes the same bits as one that
was never stopped.
"""

import datetime
import json
import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import accelerate
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch import Tensor
from tqdm import tqdm

from fastlora import (
    __version__,
    checkpoint,
    metrics,
    options,
    processes,
    resuming,
    sharing,
    tracking,
    trainable,
    warm_start,
    writing,
)
from fastlora.checkpoint import Checkpoint, CheckpointError
from fastlora.choice import table
from fastlora.config import RANKED, SEEDS, WHOLE, TrainConfig
from fastlora.course import (
    Course,
    TrainingError,
    TrainingInterrupted,
    count_tokens,
    load_state,
    named_writing,
    read_rows,
    scheduler,
    stop_signals,
)
from fastlora.data.rows import Encoded, Row, collate, pad_token_id
from fastlora.data.sources import local_files
from fastlora.language_model_loss import LanguageModelLoss
from fastlora.models import load_base, load_tokenizer, require_bitsandbytes, require_positions, resolve_dtype
from fastlora.typed import lined_up, listed

logger = logging.getLogger("fastlora")

# Data and how it is cut are compared by the rows' tokens.
MAY_DIFFER_ON_RESUME = {
    *("data", "columns", "max_samples", "streaming", "truncation", "train_on_turns", "completion_only_loss"),
    *("output", "save_steps", "resume", "resume_from", "overwrite", "report_to", "run_name"),
    *resuming.LENGTH,
}


@dataclass(frozen=True)
class TrainResult:
    steps: int
    first_loss: float  # mean over the first ten steps, of fewer than twenty over the first half
    loss: float  # mean over the last ten steps, or the other half
    seconds: float  # spent in steps, all runs together
    tokens: int  # trained on, prompts included, padding not
    tokens_per_second: float
    rows: int
    dropped_rows: int  # too long for max_length
    prompt_cut_rows: int  # those of `rows` whose prompt lost its oldest tokens
    completion_cut_rows: int  # those whose completion lost its end
    trainable_parameters: int
    parameters: int
    adapter_bytes: int  # of the weights' file
    dtype: str  # of the saved weights: an adapter's are float32, a model's as its base's are stored unless told
    implementations: dict[str, int]  # LoRA and frozen layers, by what ran them; a guess where it says compiled
    loss_path: str | None  # LanguageModelLoss's; None where no step was left to do
    output: str


def train(config: TrainConfig, *, progress: bool = True) -> TrainResult:
    """Train, and leave the adapter (or model), metrics.jsonl, loss.png, summary.json and checkpoints/ in the output.

    Runs on one process, or on several under `accelerate launch` or `torchrun`.

    Args:
        progress: show a bar with loss, tokens a second and the time left.

    Raises:
        DataError: bad lines in the data; raised before any model is loaded, like max_length leaving no row (ValueError).
        BlockingIOError: another training, or a merge, writes into the output folder.
        FileExistsError: the output folder holds an adapter, a model or a training, and neither resume nor overwrite was asked for.
        CheckpointError: the checkpoint to go on from is damaged; the message says which older one is not.
        ValueError: the output is the base model's folder; resume was asked for with other options or data than the
            checkpoint's; a name in target_modules matches nothing; compile, and there is no C++ compiler; the model's files are damaged; what
            started the processes asks for what cannot be done (processes.py).
        ImportError: load_in_4bit or load_in_8bit, and there is no bitsandbytes; a package of report_to's is missing.
        OSError: the data or the model is not there, or the output folder cannot be written into.
        TrainingError: the loss or the gradient is not finite, no gradient reaches any trained weight, or the disk is full;
            or another process has ended.
        TrainingInterrupted: Ctrl-C or SIGTERM, after the checkpoint.
    """
    require_possible(config)
    accelerator, config = processes.begin(config)
    with processes.holding(accelerator, Path(config.output), partial(require_free, config)):
        run = begin(config, accelerator, load_base)
        if progress and accelerator.is_main_process:
            print(*lined_up(run.told()), sep="\n", file=sys.stderr)
        run.claim_output()
        with tracking.reporting(accelerator, run.config), stop_signals() as stop:
            run.loop(stop, progress)
        return run.finish()


def require_possible(config: TrainConfig) -> None:
    """Raise what `train` raises before it reads anything."""
    if config.compile:
        trainable.require_compiler()
    if config.bits is not None:
        require_bitsandbytes(config.bits)
    writing.require_apart(Path(config.output), model=str(config.model))


def begin(config: TrainConfig, accelerator: Accelerator, load: Callable[..., Any]) -> "_Run":
    """A run before its first step, or before the next one. load: as `load_base`."""
    with processes.as_one(accelerator):
        saved = resuming.newest(config) if config.resume else None
        config = warm_start.resolved(config, saved.folder if saved else None)
        tokenizer = load_tokenizer(str(config.model))
        data = read_rows(config, tokenizer)
    return _Run(config, data, tokenizer, accelerator, saved, load)


def require_free(config: TrainConfig) -> None:
    """Nothing in the output folder is replaced that this run does not go on from, unless that was asked for."""
    output = Path(config.output)
    writing.require_files(output)
    if (output / "checkpoints").is_file():
        raise NotADirectoryError(f"output={output}: checkpoints is a file there, expected a folder or nothing")
    held, steps = writing.results(output), checkpoint.steps(output)
    for data in local_files(config.data):
        if any(path.parent.resolve() == output.resolve() and path.name in held for path in (data, data.resolve())):
            raise ValueError(
                f"data={data}: expected another place or name, training replaces this file in its output folder"
            )
    if config.overwrite or (config.resume and steps):
        return
    # All that is left by a run that ended before its first checkpoint; an empty one by a run that ended in its first step.
    if metrics.NAME in held and (config.resume or not (output / metrics.NAME).stat().st_size):
        held = [name for name in held if name not in (metrics.NAME, options.NAME)]
    problem = ""
    if steps:
        problem = (
            f"has checkpoints up to step {steps[-1]}:"
            " resume=True goes on from there, overwrite=True removes them and starts again"
        )
    elif held and config.resume:
        problem = f"has no checkpoint to resume from, and holds {listed(held)}: overwrite=True replaces them"
    elif held:
        problem = f"holds {listed(held)}: expected a folder of its own, or overwrite=True to replace them"
    if problem:
        raise FileExistsError(f"output={output} {problem}")


class _Run:
    """One run: the model, and all else that a checkpoint holds."""

    def __init__(
        self,
        config: TrainConfig,
        data: Encoded,
        tokenizer: Any,
        accelerator: Accelerator,
        saved: Checkpoint | None,
        load: Callable[..., Any],
    ) -> None:
        self.config, self.data, self.tokenizer = config, data, tokenizer
        self.output = Path(config.output)
        self.accelerator = accelerator
        self.course = Course(config, data.rows, self.accelerator.num_processes)
        self.stored_dtype = trainable.stored_dtype(str(config.model))
        self.dtype = resolve_dtype(config.dtype, self.accelerator.device) or self.stored_dtype
        self.step = 0
        self.setup = self._setup()
        self.records: list[dict[str, float]] = []  # of the steps that were done before this run
        self.steps_before = self.course.steps  # as many as the run was to have that this one goes on with
        if saved:
            self.steps_before = _require_same(saved, self.setup, self.course)
            self.records = metrics.read(self.output, saved.training.step)
            table.load_state(saved.state["tuned"])
        set_seed(config.seed)
        self.model = trainable.build(config, self.dtype, accelerator.device, saved.folder if saved else None, load)
        require_positions(self.model, data.rows)
        self.model.train()
        # The adapter's first values are the same on all processes; dropout is each one's own.
        set_seed((config.seed + self.accelerator.process_index) % SEEDS)
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        lr = config.lr or 0.0
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=lr, weight_decay=config.weight_decay)
        self.scheduler = scheduler(config, self.optimizer, self.course.steps)
        self.wrapped = processes.around(self.accelerator, self.model, self.trained.values(), config.fsdp)
        self.loss = LanguageModelLoss(self.wrapped)
        if saved:
            self._load_state(saved)

    def _load_state(self, saved: Checkpoint) -> None:
        self.step = saved.training.step
        if self.config.method not in (*RANKED, *WHOLE):
            checkpoint.load_weights(saved.folder, self.trained)
        path = saved.folder / "state.pt"
        extended = self.steps_before != self.course.steps
        then = scheduler(self.config, self.optimizer, self.steps_before) if extended else self.scheduler
        load_state(path, saved.state, self.step, self.trained, self.optimizer, then)
        if extended:
            resuming.go_on(self.optimizer, self.scheduler, self.step)
        checkpoint.set_rng_state(saved.state["rng"][self.accelerator.process_index])

    def _setup(self) -> dict[str, Any]:
        """What a resumed run must have in common with the run before."""
        content = sha256()
        for row in self.data.rows:
            content.update(json.dumps([row.input_ids, row.labels]).encode())
        options = asdict(self.config).items()
        return {
            "config": {name: str(value) if isinstance(value, Path) else value for name, value in options},
            "data": content.hexdigest(),
            "processes": self.accelerator.num_processes,
            "threads": torch.get_num_threads(),
            "device": self.accelerator.device.type,
        }

    def claim_output(self) -> None:
        """Clear away what an earlier run left in the output folder and this one does not go on from."""
        with processes.as_one(self.accelerator), self._writing(metrics.NAME):
            if self.accelerator.is_main_process:
                checkpoint.clear(self.output, after=self.step)
                metrics.write(self.output, self.records)
                options.write(self.output, self.config)

    def told(self) -> dict[str, str]:
        """What is about to run, for people."""
        config, rows, course = self.config, self.data, self.course
        trained, parameters = _count(self.trained.values()), _count(self.model.parameters())
        lines = {
            f"fastlora {__version__}": f"{config.method}, {config.model}, {parameters:,} parameters",
            "rows": f"{len(rows.rows):,}" + (f", and {len(rows.dropped):,} dropped" if rows.dropped else ""),
            "steps": f"{course.steps:,} of {course.rows_per_step} rows"
            + (f", from step {self.step + 1:,} on" if self.step else ""),
            "trained": f"{trained:,} parameters, {100 * trained / parameters:.3g} %",
            "device": f"{self.accelerator.device}, {table.name_of(self.dtype)}, {self.setup['threads']} thread{'s' * (self.setup['threads'] > 1)}"
            + (f", {self.setup['processes']} processes" if self.setup["processes"] > 1 else ""),
        }
        if self.steps_before != course.steps:
            lines["extended"] = (
                f"from {self.steps_before:,} steps: from step {self.step + 1:,} on {config.lr_scheduler_type} is that of {course.steps:,}"
            )
        runs = trainable.implementations(self.model, config)
        lines["runs"] = ", ".join(f"{count} {name}" for name, count in runs.items()) or "plain PyTorch"
        return lines

    def loop(self, stop: threading.Event, progress: bool) -> None:
        """Go on to the last step, with metrics and checkpoints; a stop that was asked for ends it after a step."""
        bar = tqdm(
            total=self.course.steps,
            initial=self.step,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.1 if sys.stderr.isatty() else 2.0,  # seconds; a log keeps every line
            disable=not (progress and self.accelerator.is_main_process),
        )
        first = self.step
        with bar:
            while self.step < self.course.steps:
                record, stopped = self._train_step(stop, check_gradients=self.step == first)
                with processes.as_one(self.accelerator), self._writing(metrics.NAME):
                    if self.accelerator.is_main_process:
                        metrics.add(self.output, record)
                tracking.report(self.accelerator, record)
                bar.set_postfix_str(
                    f"loss {record['loss']:.4f}, {record['tokens_per_second']:.0f} tokens/s", refresh=False
                )
                bar.update()
                if stopped or self.step % self.config.save_steps == 0 or self.step == self.course.steps:
                    self._save_checkpoint()
                if stopped and self.step < self.course.steps:
                    raise TrainingInterrupted(
                        f"stopped after step {self.step} of {self.course.steps}; the same with resume=True goes on"
                        f" from {checkpoint.folder(self.output, self.step)}"
                    )

    def _train_step(self, stop: threading.Event, check_gradients: bool) -> tuple[dict[str, float], bool]:
        began = time.perf_counter()
        rows = self.course.step_rows(self.step)
        learning_rate = self.scheduler.get_last_lr()[0]
        loss = self._backward(rows)
        # One exchange tells all processes the loss and whether one of them was asked to stop.
        shared = torch.stack([loss, torch.tensor(float(stop.is_set()), device=loss.device)])
        value, asked = self.accelerator.reduce(shared, "sum").tolist()
        norm = torch.nn.utils.clip_grad_norm_(list(self.trained.values()), self.config.max_grad_norm or math.inf).item()
        self.step += 1
        if not (math.isfinite(value) and math.isfinite(norm)):
            first = "nothing was trained yet: look at the base's weights, lora_alpha and dtype"
            reason = first if self.step == 1 else "a lower lr may help"
            raise TrainingError(f"step {self.step}: the loss is {value} and the gradient's norm {norm}; {reason}")
        if check_gradients:
            self._check_gradients()
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        seconds = time.perf_counter() - began
        record = {
            "step": self.step,
            "epoch": self.step / self.course.steps_per_epoch,
            "loss": value,
            "grad_norm": norm,  # before it is cut
            "learning_rate": learning_rate,
            "tokens_per_second": count_tokens(rows) / seconds,
            "seconds": seconds,
        }
        return record, asked > 0

    def _backward(self, rows: Sequence[Row]) -> Tensor:
        """Gradients of a step's mean loss a labelled token; returns this process's share of that loss, a scalar."""
        labelled = sum(row.labelled for row in rows)
        total = torch.zeros((), device=self.accelerator.device)
        parts = self.course.batches(rows, self.accelerator.process_index)
        casts = self.config.method in WHOLE and self.dtype != torch.float32
        autocast = torch.autocast(total.device.type, self.dtype) if casts else nullcontext()
        for i, part in enumerate(parts):
            last = i == len(parts) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                batch = collate(part, pad_token_id(self.tokenizer))
                batch = {name: value.to(total.device) for name, value in batch.items()}
                with autocast:
                    loss = self.loss(batch) / labelled
                self.accelerator.backward(loss * self.course.processes)  # DDP takes the mean over processes
            total += loss.detach()
        if self.config.fsdp:
            processes.share_gradients(self.trained.values())
        return total

    def _check_gradients(self) -> None:
        reached = [name for name, p in self.trained.items() if p.grad is not None and bool(p.grad.count_nonzero())]
        if not reached:
            raise TrainingError(f"step {self.step}: no gradient reached any of the {len(self.trained)} trained weights")
        # B starts at zero, so that no gradient reaches A in the very first step.
        idle = [name for name, p in self.trained.items() if p.grad is None]
        if idle:
            logger.warning(
                "no gradient reached %d of %d trained weights (the first: %s)", len(idle), len(self.trained), idle[0]
            )

    def _save_checkpoint(self) -> None:
        rng = gather_object([checkpoint.rng_state()])
        with processes.as_one(self.accelerator):
            if self.accelerator.is_main_process:
                with self._writing(metrics.NAME):
                    writing.force(self.output / metrics.NAME)
                with self._writing("the checkpoint"):
                    checkpoint.save(self.output, self.step, lambda folder: self._write_checkpoint(folder, rng))

    def _writing(self, what: str) -> AbstractContextManager[None]:
        return named_writing(what, self.output, self.step)

    def _write_checkpoint(self, folder: Path, rng: list[dict[str, Any]]) -> None:
        self._write_model(folder)
        if self.config.method not in (*RANKED, *WHOLE):
            checkpoint.save_weights(
                folder, self.trained
            )  # PEFT's file has what a prompt's encoder gives, not the encoder
        state = {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "rng": rng,
            "tuned": table.state(),  # a resumed run computes with the same implementations
        }
        with (folder / "state.pt").open("wb") as file:  # torch, given a path, forgets why it could not write
            torch.save(state, file)
        (folder / "training.json").write_text(json.dumps({"step": self.step, **self.setup}, indent=2) + "\n")

    def _write_model(self, folder: Path) -> None:
        if self.config.method in WHOLE:
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
        else:
            self.model.save_pretrained(str(folder), save_embedding_layers=False)

    def finish(self) -> TrainResult:
        """Write the final files; the summary is returned, too."""
        dtype = self._cast_to_stored() if self.config.method in WHOLE else torch.float32
        what = "the model" if self.config.method in WHOLE else "the adapter"
        with processes.as_one(self.accelerator), self._writing(what):
            if self.accelerator.is_main_process:
                writing.publish(self.output, self._write_model)
        if self.config.share_prefix:
            way, reason = sharing.last_call(self.model)
            if way == sharing.APART:
                logger.warning("share_prefix: the last batch's rows ran each for itself: %s", reason)
        records = metrics.read(self.output, self.step)
        result = self._result(records, dtype)
        with processes.as_one(self.accelerator), self._writing("the summary"):
            if self.accelerator.is_main_process:
                text = json.dumps({**asdict(result), **self._provenance()}, indent=2) + "\n"
                writing.whole(self.output / "summary.json", text.encode())
                try:
                    metrics.plot(records, self.output / "loss.png")
                except ModuleNotFoundError:
                    logger.warning("no loss.png: the package matplotlib is missing (pip install matplotlib)")
        return result

    def _cast_to_stored(self) -> torch.dtype:
        """Round the trained weights to the dtype that was asked for, or else to the one that the base is stored in."""
        dtype = self.stored_dtype if self.config.dtype == "auto" else self.dtype
        largest = max(p.detach().abs().max().item() for p in self.model.parameters() if p.numel())
        if dtype == torch.float16 and largest > torch.finfo(dtype).max:
            logger.warning(
                "saved in float32, not in the base's float16, which ends below the largest weight, %g", largest
            )
            return torch.float32
        self.model.to(dtype)
        return dtype

    def _provenance(self) -> dict[str, Any]:
        """What the summary says of where its figures come from."""
        import peft
        import transformers

        packages = (torch, transformers, peft, accelerate)
        return {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "base_dtype": table.name_of(self.stored_dtype),
            "versions": {"fastlora": __version__, **{one.__name__: one.__version__ for one in packages}},
            **{name: self.setup[name] for name in ("config", "processes", "threads", "device")},
        }

    def _result(self, records: Sequence[Mapping[str, float]], dtype: torch.dtype) -> TrainResult:
        losses = [record["loss"] for record in records]
        ends = max(1, min(10, len(losses) // 2))  # steps
        seconds = sum(record["seconds"] for record in records)
        tokens = sum(count_tokens(self.course.step_rows(step)) for step in range(self.step))
        weights = "model.safetensors" if self.config.method in WHOLE else "adapter_model.safetensors"
        return TrainResult(
            steps=self.step,
            first_loss=sum(losses[:ends]) / ends,
            loss=sum(losses[-ends:]) / ends,
            seconds=seconds,
            tokens=tokens,
            tokens_per_second=tokens / seconds,
            rows=len(self.data.rows),
            dropped_rows=len(self.data.dropped),
            prompt_cut_rows=len(self.data.prompt_cut),
            completion_cut_rows=len(self.data.completion_cut),
            trainable_parameters=_count(self.trained.values()),
            parameters=_count(self.model.parameters()),
            adapter_bytes=(self.output / weights).stat().st_size if (self.output / weights).is_file() else 0,
            dtype=table.name_of(dtype),
            implementations=trainable.implementations(self.model, self.config),
            loss_path=self.loss.path,
            output=str(self.output),
        )


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _require_same(saved: Checkpoint, now: dict[str, Any], course: Course) -> int:
    """The steps that the run was to have that a checkpoint is of.

    Raises:
        ValueError: it belongs to no run like this one, or to a longer one.
    """
    then, path = saved.training, saved.folder / "training.json"
    names = {field.name for field in fields(TrainConfig)}
    for name in sorted(then.config.keys() ^ names):
        what = "lacks" if name in names else "has the unknown option"
        raise CheckpointError(f"{path}: config {what} {name}: it is of another version of fastlora")
    try:
        TrainConfig(**then.config)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: config: {error}") from None
    for name in sorted(names - MAY_DIFFER_ON_RESUME):
        before, value = then.config[name], now["config"][name]
        if before != value:
            raise ValueError(
                f"{name}={value!r}: expected {before!r} as in {saved.folder}, or overwrite=True to start again"
            )
    if then.data != now["data"]:
        raise ValueError(
            f"data={now['config']['data']}: its token rows are not those that {saved.folder} was trained on"
        )
    for name in ("processes", "device"):
        if getattr(then, name) != now[name]:
            raise ValueError(
                f"{saved.folder} was written with {name} {getattr(then, name)}, expected the same, got {now[name]}"
            )
    steps = resuming.steps_before(then.config, saved.folder, course)
    if then.step > steps:
        raise CheckpointError(f"{path}: step={then.step}: expected at most {steps}, the steps of the whole run")
    if then.threads != now["threads"]:
        text = "%s was written with %d threads, this run has %d: the last bits may differ from an uninterrupted run's"
        logger.warning(text, saved.folder, then.threads, now["threads"])
    return steps
