"""The loop of a sweep: one forward and backward a step for all jobs, each job's own update, and what ends a job before its time.

The step's rows of all jobs are cut into batches of at most `max_tokens` tokens, so that small jobs fill the machine. In a batch each row runs under
its job's adapter (peft/mixed.py); the labelled tokens' losses are weighed by their jobs, so that one backward of their sum leaves each adapter the
gradient of its own mean. The last job that is left runs as `fastlora train` runs it.
"""

import json
import logging
import math
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from peft import get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor
from tqdm import tqdm

from fastlora import __version__, checkpoint, metrics, trainable, training_data, writing
from fastlora.choice import table
from fastlora.config import SEEDS
from fastlora.course import (
    Course,
    TrainingError,
    TrainingInterrupted,
    digest,
    going_on,
    named_writing,
    stop_signals,
)
from fastlora.data.examples import named_as
from fastlora.data.rows import Encoded, Row, collate, count_tokens, encode, pad_token_id, row_length
from fastlora.data.sources import local_files, named
from fastlora.data.tasks import read_rows
from fastlora.evaluation import mean_loss
from fastlora.language_model_loss import LanguageModelLoss, output_embedding
from fastlora.models import load_base, load_tokenizer, require_decoder, require_positions, resolve_dtype
from fastlora.optimisers import build, load_state, scheduler
from fastlora.peft import accelerate, mixed, obstacles
from fastlora.peft.layers import Fused
from fastlora.sweep import page
from fastlora.sweep.jobs import JOBS, Job, Sweep, jobs_of
from fastlora.sweep.outcome import Outcome, best
from fastlora.sweep.saved import NAME, STATE, Progress, Saved, Status, newest, require_same
from fastlora.typed import listed
from fastlora.validation import judge

logger = logging.getLogger("fastlora")

PAGE = "sweep.html"
READING = (
    *("data", "columns", "max_samples", "streaming"),
    *("max_length", "truncation", "train_on_turns", "completion_only_loss"),
)
"""What decides a job's rows."""
MAY_DIFFER_ON_RESUME = {*READING, "eval_data", "jobs", "output", "save_steps", "resume", "overwrite"} - {"max_length"}
"""Rows are compared by their tokens."""


def sweep(given: Sweep, *, progress: bool = True) -> list[Outcome]:
    """Train all jobs, and leave their adapters in jobs/NAME, sweep.json, sweep.html and checkpoints/ in the output; outcomes come in the jobs' order.

    A job whose loss is not finite stops alone and leaves no adapter. After a kill `resume` goes on from the last checkpoint, to the same bits.

    Args:
        progress: show a bar with the jobs' losses, tokens a second and the time left.

    Raises:
        DataError: bad lines in the data; raised before any model is loaded.
        BlockingIOError: another process writes into the output folder.
        FileExistsError: the output folder holds a sweep, and neither resume nor overwrite was asked for.
        CheckpointError: the checkpoint to go on from is damaged.
        ValueError: several processes; resume with other options or data than the checkpoint's; a job's layer cannot be fused, or is the model's head;
            as `train`.
        OSError: as `train`.
        TrainingError: every job has diverged, no gradient reaches a job's adapter, or the disk is full.
        TrainingInterrupted: Ctrl-C or SIGTERM, after the checkpoint.
    """
    output, jobs = Path(given.output), jobs_of(given)
    writing.require_apart(output, model=str(given.model))
    state = PartialState()
    if state.num_processes > 1:
        raise ValueError(f"a sweep runs on one process, got {state.num_processes}")
    require_decoder(str(given.model), "a sweep")
    with writing.locked(output):
        _require_free(given, jobs)
        saved = newest(output) if given.resume else None
        run = SweepRun(given, jobs, state.device, saved)
        if progress:
            run.announce()
        run.claim_output()
        with stop_signals() as stop:
            run.loop(stop, progress)
        return run.finish()


def _require_free(given: Sweep, jobs: Sequence[Job]) -> None:
    """Nothing in the output folder is replaced that this sweep does not go on from, unless that was asked for; no job's data are there."""
    output = Path(given.output)
    for path in {path for job in jobs for one in (job.config.files, job.eval_data) for path in local_files(one)}:
        if path.resolve().is_relative_to((output / JOBS).resolve()) or path.resolve() == (output / NAME).resolve():
            raise ValueError(f"data={path}: expected another place, a sweep replaces this file in its output folder")
    held = [name for name in (NAME, PAGE, JOBS, "checkpoints") if (output / name).exists()]
    if given.overwrite:
        for name in held:
            writing.remove(output / name)
        return
    steps = checkpoint.steps(output)
    if held and not given.resume:
        way_out = "resume=True goes on from there, " if steps else ""
        raise FileExistsError(f"output={output} holds {listed(held)}: {way_out}overwrite=True starts again")
    if (output / NAME).exists() and not steps:
        raise FileExistsError(f"output={output} has no checkpoint to resume from: overwrite=True starts again")


class _Training:
    """One job under way: its rows, its adapter's weights, and what updates them."""

    def __init__(self, job: Job, data: Encoded, adapter: str) -> None:
        self.job, self.data, self.adapter = job, data, adapter
        self.course = Course(job.config, data.rows, 1, data.order)
        self.progress = Progress()
        self.trained: dict[str, torch.nn.Parameter] = {}
        self.optimizer: Any = None
        self.scheduler: Any = None
        self.records: list[dict[str, float]] = []  # of the steps that were done before this run
        self.tokens = 0  # trained on

    @property
    def running(self) -> bool:
        return self.progress.status == "running"

    @property
    def evaluations(self) -> list[tuple[int, float]]:
        return self.progress.evaluations

    def give(self, model: Any) -> None:
        """Take the adapter's weights from the model that it was added to."""
        self.trained = {name: parameter for name, parameter in model.named_parameters() if f".{self.adapter}." in name}
        for parameter in self.trained.values():
            parameter.requires_grad_(True)
        config = self.job.config
        self.optimizer = build(config, model, self.trained.values())
        self.scheduler = scheduler(config, self.optimizer, self.course.steps)

    def end(self, status: Status, reason: str = "") -> None:
        self.progress.status, self.progress.reason = status, reason
        for parameter in self.trained.values():
            parameter.requires_grad_(False)
            parameter.grad = None
        self.optimizer = self.scheduler = None


class SweepRun:
    """A sweep under way: the model with all adapters, and all else that a checkpoint holds."""

    def __init__(self, given: Sweep, jobs: Sequence[Job], device: torch.device, saved: Saved | None) -> None:
        self.given, self.output, self.device = given, Path(given.output), device
        self.tokenizer = load_tokenizer(str(given.model))
        # Cut alike for all jobs, whatever rows they train on.
        self.held_out: dict[Path | tuple[str, ...], list[Row]] = {
            data: self._held_out(data, given) for data in dict.fromkeys(job.eval_data for job in jobs)
        }
        data: dict[Any, Encoded] = {}
        self.jobs: list[_Training] = []
        for number, job in enumerate(jobs):
            config = job.config
            deciding = (*READING, "seed") if training_data.is_mixed(config) else READING
            key = repr([getattr(config, name) for name in deciding])
            if key not in data:
                data[key] = training_data.read(config, self.tokenizer)
            self.jobs.append(_Training(job, data[key], f"job{number}"))
        self.steps = max(one.course.steps for one in self.jobs)
        for group in self._groups():
            counts = sorted({one.course.steps for one in group})
            if given.halving and len(counts) > 1:
                raise ValueError(
                    f"halving: expected jobs of as many steps each, some have {counts[0]} and some {counts[-1]}"
                )
        self.step, self.seconds = 0, 0.0
        self.dtype = resolve_dtype(given.dtype, device) or trainable.stored_dtype(str(given.model))
        self.setup = self._setup()
        if saved:
            require_same(saved, self.setup)
            for one in self.jobs:
                one.progress = saved.jobs[one.job.name]
                one.records = metrics.read(one.job.folder, one.progress.step)
                one.tokens = int(one.records[-1]["tokens"]) if one.records else 0
            table.load_state(saved.state["tuned"])
        self.model = self._build()
        self.loss = LanguageModelLoss(self.model)
        self.model.set_adapter(self.jobs[0].adapter)
        self.loss.choose(self.batch(self.jobs[0].data.rows[:1]))
        for one in self.jobs:
            one.give(self.model)
        set_seed(self.jobs[0].job.config.seed % SEEDS)
        if saved:
            self._load(saved)

    def _held_out(self, data: Path | tuple[str, ...], given: Sweep) -> list[Row]:
        length = row_length(self.tokenizer)
        with named_as("eval_data"):
            examples = read_rows(data, columns=given.columns, length=length, max_tokens=given.max_length)[: given.limit]
        return encode(
            examples,
            self.tokenizer,
            given.max_length,
            given.truncation,
            train_on_turns=given.train_on_turns,
            completion_only_loss=given.completion_only_loss,
        ).rows

    def _build(self) -> Any:
        base = load_base(str(self.given.model), self.dtype, self.device)
        configs = [
            trainable.peft_config(base, one.job.config) for one in self.jobs
        ]  # by the names of the base's own layers
        model: Any = None
        for one, config in zip(self.jobs, configs, strict=True):
            set_seed(one.job.config.seed)
            try:
                if model is None:
                    model = get_peft_model(base, config, adapter_name=one.adapter)
                else:
                    model.add_adapter(one.adapter, config)
            except ValueError as error:  # a module that is no layer, say
                raise ValueError(f"target_modules={one.job.config.target_modules!r}: {error}") from error
        accelerate(model, frozen=True, fuse=True, pack_budget=self.given.pack_budget)
        _require_fused(model)
        for rows in (*self.held_out.values(), *(one.data.rows for one in self.jobs)):
            require_positions(model, rows)
        return model.train()

    def _setup(self) -> dict[str, Any]:
        """What a resumed run must have in common with the run before."""
        options = {one.name: getattr(self.given, one.name) for one in fields(self.given)}
        rows = {id(one.data): digest(one.data.rows) for one in self.jobs}
        return {
            # Of the jobs below the model has its full path.
            **{name: _plain(value) for name, value in options.items() if name not in {*MAY_DIFFER_ON_RESUME, "model"}},
            "jobs": {one.job.name: self._setup_of(one) | {"rows": rows[id(one.data)]} for one in self.jobs},
            "threads": torch.get_num_threads(),
            "device": self.device.type,
        }

    def _setup_of(self, one: _Training) -> dict[str, Any]:
        config = {name: _plain(value) for name, value in asdict(one.job.config).items()}
        return {name: value for name, value in config.items() if name not in MAY_DIFFER_ON_RESUME} | {
            "patience": one.job.patience,
            "held_out": digest(self.held_out[one.job.eval_data]),
        }

    def _load(self, saved: Saved) -> None:
        self.step, self.seconds = saved.step, saved.seconds
        whole = [one for one in self.jobs if one.progress.status != "diverged"]
        checkpoint.load_weights(saved.folder, {name: p for one in whole for name, p in one.trained.items()})
        for one in self.jobs:
            if one.running:
                state = saved.state["jobs"][one.job.name]
                path, optim = saved.folder / STATE, one.job.config.optim
                load_state(path, state, self.step, one.trained, one.optimizer, one.scheduler, optim)
            else:
                one.end(one.progress.status, one.progress.reason)
        checkpoint.set_rng_state(saved.state["rng"][0])

    def claim_output(self) -> None:
        """Clear away what an earlier run left in the output folder and this one does not go on from."""
        checkpoint.clear(self.output, after=self.step)
        for one in self.jobs:
            writing.make(one.job.folder)
            checkpoint.clear(one.job.folder)  # an adapter that a kill left half-written
            with self._writing(metrics.NAME):
                metrics.write(one.job.folder, one.records)

    def announce(self) -> None:
        """Say on stderr what is about to run."""
        weights = sum(p.numel() for one in self.jobs for p in one.trained.values())
        threads = torch.get_num_threads()
        lines = {
            f"fastlora {__version__}": f"sweep, {self.given.model}",
            "jobs": listed([one.job.name for one in self.jobs]),
            "steps": f"{self.steps:,}{going_on(self.step, self.steps)}",
            "trained": f"{weights:,} parameters, all jobs together",
            "device": f"{self.device}, {table.name_of(self.dtype)}, {threads} thread{'s' * (threads != 1)}",
        }
        width = max(map(len, lines))
        print(*(f"{name:{width}}  {value}" for name, value in lines.items()), sep="\n", file=sys.stderr)

    def loop(self, stop: threading.Event, progress: bool) -> None:
        """Go on until no job runs; a stop that was asked for ends it after a step."""
        bar = tqdm(
            total=self.steps,
            initial=self.step,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.1 if sys.stderr.isatty() else 2.0,  # seconds; a log keeps every line
            disable=not progress,
        )
        first = self.step
        with bar:
            while any(one.running for one in self.jobs):
                losses, rate = self.train_step(check_gradients=self.step == first)
                self._end_jobs()
                if losses:
                    told = f"{len(losses)} jobs, loss {min(losses):.4f} to {max(losses):.4f}, {rate:.0f} tokens/s"
                    bar.set_postfix_str(told, refresh=False)
                bar.update()
                over = not any(one.running for one in self.jobs)
                if stop.is_set() or over or self.step % self.given.save_steps == 0:
                    self._save()
                if stop.is_set() and not over:
                    raise TrainingInterrupted(
                        f"stopped after step {self.step} of {self.steps}; the same with resume=True goes on"
                        f" from {checkpoint.folder(self.output, self.step)}"
                    )

    # ---- a step

    def train_step(self, check_gradients: bool = False) -> tuple[list[float], float]:
        """One update of each job that runs and has not diverged; returns their losses, and tokens a second of all."""
        began = time.perf_counter()
        running = [one for one in self.jobs if one.running]
        rows = {one.adapter: one.course.step_rows(self.step) for one in running}
        if len(running) == 1:
            self._activate(running[0])
            values = [self._backward_alone(running[0], rows[running[0].adapter])]
        else:
            values = self._backward(running, rows)
        norms = []
        for one, value in zip(running, values, strict=True):
            config = one.job.config
            limit = config.max_grad_norm or math.inf
            norms.append(torch.nn.utils.clip_grad_norm_(list(one.trained.values()), limit).item())
            if not (math.isfinite(value) and math.isfinite(norms[-1])):
                reason = f"step {self.step + 1}: the loss is {value} and the gradient's norm {norms[-1]}"
                one.end("diverged", reason)
                logger.warning("%s diverged, the other jobs go on: %s", one.job.name, reason)
        going = [(one, value, norm) for one, value, norm in zip(running, values, norms, strict=True) if one.running]
        learning_rates = [one.scheduler.get_last_lr()[0] for one, _, _ in going]
        for one, _, _ in going:
            if check_gradients:
                _check_gradients(one)
            one.optimizer.step()
            one.scheduler.step()
            one.optimizer.zero_grad()
        self.step += 1
        seconds = time.perf_counter() - began
        self.seconds += seconds
        rate = sum(map(count_tokens, rows.values())) / seconds
        for (one, value, norm), learning_rate in zip(going, learning_rates, strict=True):
            one.progress.step = self.step
            one.tokens += count_tokens(rows[one.adapter])
            record = {
                "step": self.step,
                "epoch": self.step / one.course.steps_per_epoch,
                "loss": value,
                "grad_norm": norm,  # before it is cut
                "learning_rate": learning_rate,
                "tokens": one.tokens,
                "tokens_per_second": rate,  # of all jobs
                "seconds": seconds,
            }
            with self._writing(metrics.NAME):
                metrics.add(one.job.folder, record)
        return [value for _, value, _ in going], rate

    def batch(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """What the model is called with, and labels."""
        batch = collate(rows, pad_token_id(self.tokenizer))
        return {name: value.to(self.device) for name, value in batch.items()}

    def _backward(self, running: Sequence[_Training], rows: Mapping[str, Sequence[Row]]) -> list[float]:
        """Gradients of each job's mean loss a labelled token, in one backward a batch; returns those losses."""
        number = {one.adapter: i for i, one in enumerate(running)}
        labelled = [sum(row.labelled for row in rows[one.adapter]) for one in running]
        totals = torch.zeros(len(running), device=self.device)
        weights = 1.0 / torch.tensor(labelled, dtype=torch.float32, device=self.device)
        for part in self._parts([(adapter, row) for adapter, its in rows.items() for row in its]):
            names = mixed.RowNames([adapter for adapter, _ in part], [len(row.input_ids) for _, row in part])
            counts = [0] * len(running)  # labelled tokens; a job's rows follow one another
            for adapter, row in part:
                counts[number[adapter]] += row.labelled
            sizes = torch.tensor(counts, device=self.device)
            with mixed.training(self.model.base_model, Fused, names):
                losses = self.loss.by_token(self.batch([row for _, row in part]))
                losses = losses * weights.repeat_interleave(sizes, output_size=sum(counts))
                losses.sum().backward()
            totals += torch.stack([one.sum() for one in losses.detach().split(counts)])
        return totals.tolist()

    def _parts(self, rows: Sequence[tuple[str, Row]]) -> Iterator[Sequence[tuple[str, Row]]]:
        """The step's rows as batches of no more than `max_tokens` tokens, or of one row that alone has more."""
        part: list[tuple[str, Row]] = []
        tokens = widest = 0
        for one in rows:
            length = len(one[1].input_ids)
            width = max(widest, length)
            full = tokens + length if self.loss.packs else width * (len(part) + 1)
            if part and full > self.given.max_tokens:
                yield part
                part, tokens, width = [], 0, length
            part.append(one)
            tokens, widest = tokens + length, width
        yield part

    def _backward_alone(self, one: _Training, rows: Sequence[Row]) -> float:
        """The same of the one job that is left, as `fastlora train` computes it."""
        labelled = sum(row.labelled for row in rows)
        total = torch.zeros((), device=self.device)
        for part in one.course.batches(rows, 0):
            loss = self.loss(self.batch(part)) / labelled
            loss.backward()
            total += loss.detach()
        return total.item()

    def _activate(self, job: _Training) -> None:
        """Have the model compute with a job's adapter where no names are given; PEFT would leave the others untrained."""
        if self.model.active_adapter == job.adapter:
            return
        self.model.set_adapter(job.adapter)
        for one in self.jobs:
            for parameter in one.trained.values():
                parameter.requires_grad_(one.running)

    # ---- what ends a job

    def _end_jobs(self) -> None:
        """Measure the jobs whose turn it is after this step, and end those that are done or not worth their while."""
        for group in self._groups():
            rungs = self._rungs(group).count(self.step)
            for one in [one for one in group if one.running]:
                every, done = self.given.eval_steps, self.step == one.course.steps
                if done or rungs or (every is not None and self.step % every == 0):
                    self._measure(one)
                if done and one.running:
                    one.end("done")
            for _ in range(rungs):
                self._halve(group)
        if all(one.progress.status == "diverged" for one in self.jobs):
            reason = self.jobs[-1].progress.reason
            raise TrainingError(f"step {self.step}: every job has diverged; {reason}; a lower lr may help")

    def _rungs(self, group: Sequence[_Training]) -> list[int]:
        """The steps after which half of a group ends (Jamieson and Talwalkar 2016; Li et al. 2018, Hyperband)."""
        steps = group[0].course.steps
        halvings = len(group).bit_length() if self.given.halving else 0
        return [rung for i in range(1, halvings) if (rung := math.ceil(steps / 2**i)) < steps]

    def _groups(self) -> list[list[_Training]]:
        """The jobs that are measured on the same rows."""
        groups: dict[Any, list[_Training]] = {}
        for one in self.jobs:
            groups.setdefault(one.job.eval_data, []).append(one)
        return list(groups.values())

    def _halve(self, group: Sequence[_Training]) -> None:
        running = sorted((one for one in group if one.running), key=lambda one: one.evaluations[-1][1])
        kept = math.ceil(len(running) / 2)
        for place, one in enumerate(running[kept:], kept + 1):
            loss = one.evaluations[-1][1]
            one.end("halved", f"step {self.step}: held-out loss {loss:.4f}, place {place} of {len(running)}")

    def _measure(self, one: _Training) -> None:
        self._activate(one)
        loss = mean_loss(self.model, self.tokenizer, self.held_out[one.job.eval_data], self.given.batch_size)
        if not math.isfinite(loss):
            one.end("diverged", f"step {self.step}: the held-out loss is {loss}")
            return
        one.evaluations.append((self.step, loss))
        patience = one.job.patience
        if patience is not None and self.step < one.course.steps and judge(one.evaluations).stale >= patience:
            one.end("no longer better", f"its lowest held-out loss was {patience} measurements ago or more")

    # ---- what is written

    def _save(self) -> None:
        for one in self.jobs:
            with self._writing(metrics.NAME):
                writing.force(one.job.folder / metrics.NAME)
        with self._writing("the checkpoint"):
            checkpoint.save(self.output, self.step, self._write_checkpoint)

    def _write_checkpoint(self, folder: Path) -> None:
        whole = [one for one in self.jobs if one.progress.status != "diverged"]
        checkpoint.save_weights(folder, {name: value for one in whole for name, value in one.trained.items()})
        state = {
            "jobs": {
                one.job.name: {"optimizer": one.optimizer.state_dict(), "scheduler": one.scheduler.state_dict()}
                for one in self.jobs
                if one.running
            },
            "rng": [checkpoint.rng_state()],
            "tuned": table.state(),  # a resumed run computes with the same implementations
        }
        with (folder / STATE).open("wb") as file:  # torch, given a path, forgets why it could not write
            torch.save(state, file)
        content = {
            "step": self.step,
            "seconds": self.seconds,
            "setup": self.setup,
            "jobs": {one.job.name: asdict(one.progress) for one in self.jobs},
        }
        (folder / NAME).write_text(json.dumps(content, indent=2) + "\n")

    def _writing(self, what: str) -> AbstractContextManager[None]:
        return named_writing(what, self.output, self.step)

    def _write_adapter(self, one: _Training, folder: Path) -> None:
        self.model.save_pretrained(str(folder), selected_adapters=[one.adapter], save_embedding_layers=False)
        inner = folder / one.adapter  # where PEFT puts an adapter that is not called default
        for path in inner.iterdir():
            path.rename(folder / path.name)
        inner.rmdir()

    def finish(self) -> list[Outcome]:
        """Write the adapters and what is told of them."""
        outcomes = []
        for one in self.jobs:
            if one.progress.status != "diverged":
                with self._writing(f"the adapter of {one.job.name}"):
                    writing.publish(one.job.folder, partial(self._write_adapter, one))
            outcomes.append(self._outcome(one))
        content = {
            "fastlora": __version__,
            "setup": self.setup,
            "seconds": self.seconds,
            "best": {data: one.name for data, one in best(outcomes).items()},
            "jobs": [asdict(one) for one in outcomes],
        }
        with self._writing(NAME):
            writing.whole(self.output / NAME, (json.dumps(content, indent=2) + "\n").encode())
        with self._writing(PAGE):
            records = {one.name: metrics.read(Path(one.output), one.steps) for one in outcomes}
            text = page.html(outcomes, best(outcomes), records, self.seconds)
            writing.whole(self.output / PAGE, text.encode())
        return outcomes

    def _outcome(self, one: _Training) -> Outcome:
        config, steps = one.job.config, one.progress.step
        losses = [record["loss"] for record in metrics.read(one.job.folder, steps)]
        evaluations = one.evaluations
        return Outcome(
            name=one.job.name,
            status=one.progress.status,
            reason=one.progress.reason,
            steps=steps,
            all_steps=one.course.steps,
            loss=evaluations[-1][1] if evaluations and one.progress.status != "diverged" else None,
            train_loss=sum(losses[-10:]) / len(losses[-10:]) if losses else None,
            evaluations=evaluations,
            tokens=one.tokens,
            trainable_parameters=sum(parameter.numel() for parameter in one.trained.values()),
            r=config.r,
            lr=config.lr or 0.0,
            config={name: _plain(value) for name, value in asdict(config).items()}
            | {"eval_data": named(one.job.eval_data)},
            output=str(one.job.folder),
        )


def _require_fused(model: Any) -> None:
    """
    Raises:
        ValueError: a layer's adapters cannot run in one batch.
    """
    head = output_embedding(model)
    for path, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        plan = (
            obstacles.lasting_plan(layer, list(layer.lora_A))
            if isinstance(layer, Fused)
            else obstacles.swap_obstacle(layer)
        )
        if not isinstance(layer, Fused) or isinstance(plan, str):
            raise ValueError(f"target_modules: {path}: a sweep needs layers that are fused, and {plan}")
        if layer is head:
            raise ValueError(f"target_modules: {path}: a sweep trains no adapter of the model's head, expected others")


def _check_gradients(one: _Training) -> None:
    if not any(p.grad is not None and bool(p.grad.count_nonzero()) for p in one.trained.values()):
        raise TrainingError(f"{one.job.name}: no gradient reached any of its {len(one.trained)} trained weights")


def _plain(value: Any) -> Any:
    """An option as JSON has it."""
    return str(value) if isinstance(value, Path) else value
