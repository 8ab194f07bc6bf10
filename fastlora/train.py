"""The training loop: prompts and completions in, a LoRA adapter in PEFT's format (or a fully fine-tuned model) out.

One optimiser step takes `batch_size * gradient_accumulation_steps` rows on each process; its loss is the mean over all
labelled tokens of those rows, however they are cut into batches. Which rows a step takes follows from the seed and the
step's number alone, and every generator's state is in the checkpoint: a resumed run computes the same bits as one that
was never stopped.
"""

import json
import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch import Tensor

from fastlora import (
    __version__,
    card,
    checkpoint,
    divergence,
    memory,
    metrics,
    neftune,
    optimisers,
    options,
    page,
    processes,
    resuming,
    sharing,
    summary,
    tracking,
    trainable,
    training_data,
    warm_start,
    writing,
)
from fastlora.batching import Batching
from fastlora.checkpoint import Checkpoint
from fastlora.choice import table
from fastlora.config import RANKED, SEEDS, WHOLE, TrainConfig
from fastlora.course import Course, Diverged, TrainingError, TrainingInterrupted, digest, named_writing, stop_signals
from fastlora.data.rows import Encoded, Row, count_tokens, pad_token_id
from fastlora.language_model_loss import LanguageModelLoss
from fastlora.models import load_base, load_tokenizer, require_bitsandbytes, require_positions, resolve_dtype
from fastlora.peft import reporting
from fastlora.progress import Bar, Limit
from fastlora.summary import TrainResult
from fastlora.task_losses import TaskLosses, summed_up
from fastlora.typed import lined_up
from fastlora.validation import Validation

logger = logging.getLogger("fastlora")


def train(config: TrainConfig, *, progress: bool = True) -> TrainResult:
    """Train, and leave the adapter (or model) with its tokenizer and card, metrics.jsonl, summary.json, report.html, loss.png and checkpoints/.

    With eval_data or retain_data also validation.jsonl and samples.jsonl; that training stops early is no error.
    Runs on one process, or on several under `accelerate launch` or `torchrun`.

    Args:
        progress: show a bar with loss, speed, memory and the time left.

    Raises:
        DataError: bad lines in the data; raised before any model is loaded, like max_length leaving no row (ValueError).
        BlockingIOError: another training, or a merge, writes into the output folder.
        FileExistsError: the output folder holds an adapter, a model or a training, and neither resume nor overwrite was asked for.
        CheckpointError: the checkpoint to go on from is damaged; the message says which older one is not.
        ValueError: the output is the base model's folder; resume was asked for with other options or data than the
            checkpoint's; a name in target_modules matches nothing; compile, and there is no C++ compiler; the model's files are damaged; what
            started the processes asks for what cannot be done (processes.py).
        ImportError: load_in_4bit or load_in_8bit, and there is no bitsandbytes; a package of report_to's or attn_implementation's is missing.
        OSError: the data or the model is not there, or the output folder cannot be written into.
        TrainingError: no gradient reaches any trained weight, the disk is full, or another process has ended; Diverged, which is one: the loss,
            the gradient or what a validation measured is not finite.
        TrainingInterrupted: Ctrl-C or SIGTERM, after the checkpoint.
    """
    require_possible(config)
    memory.bound_product_caches()
    accelerator, config = processes.begin(config)
    with processes.holding(accelerator, Path(config.output), partial(resuming.require_free, config)):
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
        data = training_data.read(config, tokenizer)
    load = partial(load, attn_implementation=config.attn_implementation)
    return _Run(config, data, tokenizer, accelerator, saved, load)


class _Run:
    """One run: the model, and all else that a checkpoint holds."""

    def __init__(
        self,
        config: TrainConfig,
        data: Encoded,
        tokenizer: Any,
        accelerator: Accelerator,
        saved: Checkpoint | None,
        load: Callable[..., Any] = load_base,
    ) -> None:
        self.config, self.data, self.tokenizer = config, data, tokenizer
        self.output = Path(config.output)
        self.accelerator = accelerator
        self.course = Course(config, data.rows, self.accelerator.num_processes, data.order)
        self.tasks = TaskLosses([row.task for row in data.rows], self.accelerator.device)
        self.stored_dtype = trainable.stored_dtype(str(config.model))
        self.dtype = resolve_dtype(config.dtype, self.accelerator.device) or self.stored_dtype
        self.step, self.tokens = 0, 0  # that are done
        self.validation = Validation(config, data.rows, tokenizer)
        self.setup = self._setup()
        self.files = summary.data_files(config, data.examples)
        self.records: list[dict[str, Any]] = []  # of the steps that were done before this run
        self.steps_before = self.course.steps  # as many as the run was to have that this one goes on with
        if saved:
            self.steps_before = resuming.require_same(saved, self.setup, self.course)
            self.records = metrics.read(self.output, saved.training.step)
            self.validation.resume(saved)
            resuming.require_unstopped(config, self.steps_before, self.course.steps, self.validation.stop_reason)
            table.load_state(saved.state["tuned"])
        set_seed(config.seed)
        self.model = trainable.build(config, self.dtype, accelerator.device, saved.folder if saved else None, load)
        require_positions(self.model, data.rows)
        self.model.train()
        # The adapter's first values are the same on all processes; dropout is each one's own.
        set_seed((config.seed + self.accelerator.process_index) % SEEDS)
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if config.neftune_noise_alpha is not None:
            neftune.attach(self.model, config.neftune_noise_alpha)
        self.optimizer = optimisers.build(config, self.model, self.trained.values())
        self.scheduler = optimisers.scheduler(config, self.optimizer, self.course.steps)
        self.scaler = optimisers.scaler(self.accelerator.device, self.dtype, self.trained)
        self.wrapped = processes.around(self.accelerator, self.model, self.trained.values(), config.fsdp)
        self.loss = LanguageModelLoss(self.wrapped)
        self.batching = Batching(config, self.model, self.loss, pad_token_id(tokenizer), self.accelerator.device)
        casts = config.method in WHOLE and self.dtype != torch.float32
        self.autocast = torch.autocast(self.accelerator.device.type, self.dtype) if casts else nullcontext()
        self.validation.attach(self.model, self.accelerator, self.course.steps, self.autocast)
        if saved:
            self._load_state(saved)

    def _load_state(self, saved: Checkpoint) -> None:
        self.step = saved.training.step
        if self.config.method not in (*RANKED, *WHOLE):
            checkpoint.load_weights(saved.folder, self.trained)
        path = saved.folder / "state.pt"
        extended = self.steps_before != self.course.steps
        rate = optimisers.scheduler(self.config, self.optimizer, self.steps_before) if extended else self.scheduler
        state, optim = saved.state, self.optimizer
        optimisers.load_state(path, state, self.step, self.trained, optim, rate, self.config.optim)
        if extended:
            resuming.go_on(self.optimizer, self.scheduler, self.step)
        optimisers.load_scaler(path, state["scaler"], self.scaler)
        self.tokens = int(self.records[-1]["tokens"])
        checkpoint.set_rng_state(saved.state["rng"][self.accelerator.process_index])

    def _setup(self) -> dict[str, Any]:
        """What a resumed run must have in common with the run before."""
        options = asdict(self.config).items()
        return {
            "config": {name: str(value) if isinstance(value, Path) else value for name, value in options},
            "data": digest(self.data.rows, self.data.order.fingerprint() if self.data.order else b""),
            "held_out": self.validation.digest,
            "peft_config": trainable.peft_config_digest(self.config),
            "processes": self.accelerator.num_processes,
            "threads": torch.get_num_threads(),
            "device": self.accelerator.device.type,
        }

    def claim_output(self) -> None:
        """Clear away what an earlier run left in the output folder and this one does not go on from."""
        with processes.as_one(self.accelerator):
            if self.accelerator.is_main_process:
                with self._writing(metrics.NAME):
                    checkpoint.clear(self.output, after=self.step)
                    metrics.write(self.output, self.records)
                    self.validation.claim_output()
                with self._writing(options.NAME):
                    options.write(self.output, self.config)

    def told(self) -> dict[str, str]:
        """What is about to run, for people."""
        config, rows, course = self.config, self.data, self.course
        trained, parameters = _count(self.trained.values()), _count(self.model.parameters())
        lines = {
            f"fastlora {__version__}": f"{config.method}, {config.model}, {parameters:,} parameters",
            "rows": f"{len(rows.rows):,}" + (f", and {len(rows.dropped):,} dropped" if rows.dropped else ""),
            **({"tasks": rows.order.describe()} if rows.order else {}),
            "steps": course.describe(self.step),
            "trained": f"{trained:,} parameters, {100 * trained / parameters:.3g} %",
            "device": f"{self.accelerator.device}, {table.name_of(self.dtype)}, {self.setup['threads']} thread{'s' * (self.setup['threads'] > 1)}"
            + (f", {self.setup['processes']} processes" if self.setup["processes"] > 1 else ""),
        }
        lines |= warm_start.told(config)
        if self.steps_before != course.steps:
            lines["extended"] = resuming.extended(config, self.steps_before, course.steps, self.step)
        if config.packing:
            lines["packed"] = self.batching.plan(course)
        lines |= self.validation.told()
        lines["runs"] = trainable.shown(trainable.implementations(self.model, config))
        return lines

    def loop(self, stop: threading.Event, progress: bool) -> None:
        """Go on to the last step, with metrics and checkpoints; a stop that was asked for ends it after a step."""
        shown, device = progress and self.accelerator.is_main_process, self.accelerator.device
        limit = Limit.of(self.model, self.config, device, self.dtype) if shown else None
        first = self.step
        with Bar(self.course.steps, first, shown, device, self.course.processes) as bar:
            with bar.aside("measuring" * self.validation.is_due(self.step)):
                if self.validation.after(self.step):  # before the first step, or where a stop left it undone
                    self._save_checkpoint()
            while self.step < self.course.steps and self.validation.stop_reason is None:
                rows = self.course.step_rows(self.step)
                record, stopped = self._train_step(rows, stop, check_gradients=self.step == first)
                with processes.as_one(self.accelerator), self._writing(metrics.NAME):
                    if self.accelerator.is_main_process:
                        metrics.add(self.output, record)
                tracking.report(self.accelerator, record)
                last = self.step == self.course.steps
                best = (last or not stopped) and self.validation.after(self.step)
                last = last or self.validation.stop_reason is not None
                bar.tell(record, rows, limit, self.validation.shown())
                if stopped or best or last or self.step % self.config.save_steps == 0:
                    self._save_checkpoint()
                if stopped and not last:
                    raise TrainingInterrupted(
                        f"stopped after step {self.step} of {self.course.steps}; the same with resume=True goes on"
                        f" from {checkpoint.folder(self.output, self.step)}"
                    )

    def _train_step(
        self, rows: Sequence[Row], stop: threading.Event, check_gradients: bool
    ) -> tuple[dict[str, Any], bool]:
        began, before = time.perf_counter(), (checkpoint.rng_state(), self.scaler.state_dict())
        rates = optimisers.rates(self.optimizer)
        value, norm, asked = self._gradients(rows, stop)
        if not (math.isfinite(value) and math.isfinite(norm)):
            checkpoint.set_rng_state(before[0])
            self.scaler.load_state_dict(before[1])
            raise Diverged(self.step + 1, self._blame(rows, value, norm))
        self.step += 1
        if check_gradients:
            self._check_gradients()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        self.optimizer.zero_grad()
        seconds, tokens = time.perf_counter() - began, count_tokens(rows)
        self.tokens += tokens
        record = {
            "step": self.step,
            "epoch": self.step / self.course.steps_per_epoch,
            "loss": value,
            "grad_norm": norm,  # before it is cut
            "learning_rate": rates[0],
            **({"learning_rates": rates} if len(rates) > 1 else {}),  # LoRA+
            "tokens": self.tokens,
            "tokens_per_second": tokens / seconds,
            "seconds": seconds,
            **self.tasks.record(rows),
        }
        return record, asked

    def _gradients(self, rows: Sequence[Row], stop: threading.Event) -> tuple[float, float, bool]:
        """Leave a step's gradients, cut to their norm; returns the loss, the norm before, and whether a process was asked to stop."""
        while True:
            loss = self._backward(rows)
            # One exchange tells all processes the loss and whether one of them was asked to stop.
            told = torch.stack([loss, torch.tensor(float(stop.is_set()), device=loss.device)])
            shared = self.accelerator.reduce(torch.cat([told, self.tasks.sums]), "sum").tolist()
            value, asked, *self.tasks.shared = shared
            self.scaler.unscale_(self.optimizer)
            limit = self.config.max_grad_norm or math.inf
            norm = torch.nn.utils.clip_grad_norm_(list(self.trained.values()), limit).item()
            again = math.isfinite(value) and not math.isfinite(norm)
            if not (again and optimisers.overflowed(self.scaler, self.optimizer)):
                return value, norm, asked > 0

    def _blame(self, rows: Sequence[Row], value: float, norm: float) -> str:
        """What is said of a step whose loss or gradient is not finite; a checkpoint of the step before is left where its weights are good."""
        self.optimizer.zero_grad()
        first = "nothing was trained yet: look at the base's weights, lora_alpha and dtype"
        reason = "a lower lr may help" if self.step else first
        found = divergence.blame(self.model, self._loss_of, rows, self.data)
        good = found.spares_the_weights and divergence.are_finite(self.trained)
        if self.step and self.step % self.config.save_steps and good:
            self._save_checkpoint()
        text = f"step {self.step + 1}: the loss is {value} and the gradient's norm {norm}; {reason}; {found}"
        return text + self._kept()

    def _kept(self) -> str:
        """For a message: the newest checkpoint."""
        steps = checkpoint.steps(self.output)
        return f"; kept is {checkpoint.folder(self.output, steps[-1])}" if steps else ""

    def _loss_of(self, rows: Sequence[Row]) -> Tensor:
        """The summed loss of some rows."""
        losses = self.tasks.room(rows)
        with self.autocast:
            loss = self.loss(self.batching(rows), losses)
        self.tasks.add(losses, rows)
        return loss

    def _backward(self, rows: Sequence[Row]) -> Tensor:
        """Gradients of a step's mean loss a labelled token; returns this process's share of that loss, a scalar."""
        labelled = sum(row.labelled for row in rows)
        total = torch.zeros((), device=self.accelerator.device)
        self.tasks.begin()
        parts = self.course.batches(rows, self.accelerator.process_index)
        for i, part in enumerate(parts):
            last = i == len(parts) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                loss = self._loss_of(part) / labelled
                # DDP takes the mean over processes
                self.accelerator.backward(self.scaler.scale(loss * self.course.processes))
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
        if not divergence.are_finite(self.trained):
            told = f"step {self.step}: its update made trained weights infinite or NaN; a lower lr may help"
            raise Diverged(self.step, told + self._kept())
        rng = gather_object([checkpoint.rng_state()])
        with processes.as_one(self.accelerator):
            if self.accelerator.is_main_process:
                with self._writing(metrics.NAME):
                    writing.force(self.output / metrics.NAME)
                with self._writing("the checkpoint"):
                    fill = partial(self._write_checkpoint, rng=rng)
                    checkpoint.save(self.output, self.step, fill, self.config.save_total_limit, self.validation.best_of)

    def _writing(self, what: str) -> AbstractContextManager[None]:
        return named_writing(what, self.output, self.step)

    def _write_checkpoint(self, folder: Path, rng: list[dict[str, Any]]) -> None:
        self._write_model(folder)
        if self.config.method not in (*RANKED, *WHOLE):
            # PEFT's file has what a prompt's encoder gives, not the encoder.
            checkpoint.save_weights(folder, self.trained)
        state = {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": rng,
            "tuned": table.state(),  # a resumed run computes with the same implementations
        }
        with (folder / "state.pt").open("wb") as file:  # torch, given a path, forgets why it could not write
            torch.save(state, file)
        training = {"step": self.step, "validations": len(self.validation.records), **self.setup}
        (folder / "training.json").write_text(json.dumps(training, indent=2) + "\n")

    def _write_model(self, folder: Path) -> None:
        if self.config.method in WHOLE:
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
        else:
            self.model.save_pretrained(str(folder), save_embedding_layers=False)

    def finish(self) -> TrainResult:
        """Write the final files; the summary is returned, too."""
        self.validation.take_best(self.step, self.trained, self.optimizer)
        dtype = self._cast_to_stored() if self.config.method in WHOLE else torch.float32
        records = metrics.read(self.output, self.step)
        result = summary.result(
            records,
            self.data,
            tasks=summed_up(records),
            trainable_parameters=_count(self.trained.values()),
            parameters=_count(self.model.parameters()),
            peak_memory=memory.peak(self.accelerator.device),
            compute_dtype=table.name_of(self.dtype),
            dtype=table.name_of(dtype),
            implementations=trainable.implementations(self.model, self.config),
            loss_path=self.loss.path,
            packing_efficiency=self.batching.efficiency(self.course, self.step),
            **self.validation.summary(self.step),
            output=str(self.output),
        )
        content = {**asdict(result), **summary.origins(), "base_dtype": table.name_of(self.stored_dtype)}
        content |= {name: self.setup[name] for name in ("config", "processes", "threads", "device")}
        content |= {"data": self.files, "changed": summary.changed_options(self.setup["config"])}
        what = "the model" if self.config.method in WHOLE else "the adapter"
        with processes.as_one(self.accelerator), self._writing(what):
            if self.accelerator.is_main_process:
                writing.publish(self.output, lambda folder: self._write_result(folder, content))
        if divergence.has_risen([record["loss"] for record in records]):
            text = (
                "the loss has risen, from %.3g in the first step to %.3g in the last ones: a lower lr than %g may help"
            )
            logger.warning(text, records[0]["loss"], result.loss, self.config.lr)
        if self.config.share_prefix:
            way, reason = sharing.last_call(self.model)
            if way == sharing.APART:
                logger.warning("share_prefix: the last batch's rows ran each for itself: %s", reason)
        file = self.output / f"{'model' if self.config.method in WHOLE else 'adapter_model'}.safetensors"
        content["adapter_bytes"] = file.stat().st_size if file.is_file() else 0
        with processes.as_one(self.accelerator), self._writing("the summary"):
            if self.accelerator.is_main_process:
                writing.whole(self.output / "summary.json", (json.dumps(content, indent=2) + "\n").encode())
                page.write(self.output, content, records, reporting.report(self.model))
                try:
                    metrics.plot(records, self.output / "loss.png", self.validation.records)
                except ModuleNotFoundError:
                    logger.warning("no loss.png: the package matplotlib is missing (pip install matplotlib)")
        return replace(result, adapter_bytes=content["adapter_bytes"])

    def _write_result(self, folder: Path, content: Mapping[str, Any]) -> None:
        """The adapter or model, and what those need who meet it alone: its tokenizer and a card."""
        self._write_model(folder)
        if self.config.method not in WHOLE:
            self.tokenizer.save_pretrained(folder)
        loader = "Seq2SeqLM" if self.model.config.is_encoder_decoder else "CausalLM"
        (folder / "README.md").write_text(card.text(content, loader), encoding="utf-8")

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


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)
