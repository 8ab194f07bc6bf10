"""Validation while training: what held-out rows and rows of other tasks make of the model, every so many steps; the best, and when to stop.

What a validation finds is a line of validation.jsonl, and all that follows from it (the best step, the end) is computed from those lines alone. A
checkpoint says how many of them it knows, so that a resumed run has the same ones. Nothing that training computes depends on a validation: it
draws no number that training would draw, and leaves modes, copies of weights and compiled code as they were.
"""

import importlib.util
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from fastlora import checkpoint, metrics, processes, tracking, trainable, training_data, writing
from fastlora.checkpoint import Checkpoint, CheckpointError
from fastlora.config import TrainConfig
from fastlora.course import Diverged, digest, named_writing
from fastlora.data.examples import named_as
from fastlora.data.rows import Encoded, Row, batches, reference, row_length
from fastlora.data.tasks import read_rows
from fastlora.evaluation import labels, scores, total_loss
from fastlora.frozen import packed
from fastlora.generation import answer, leave_room
from fastlora.models import is_encoder_decoder, require_positions
from fastlora.peft import reporting

logger = logging.getLogger("fastlora")

SAMPLES = 5  # answers that are kept, where all rows are answered


@dataclass(frozen=True)
class Verdict:
    """What a series of validations comes to."""

    best_step: int | None = None
    best: float | None = None
    stale: int = 0  # how many, up to the last, were not better than the best before them by more than the threshold


def judge(values: Sequence[tuple[int, float]], greater: bool = False, threshold: float = 0.0) -> Verdict:
    """What (step, value) come to, in order: as transformers' Trainer and its EarlyStoppingCallback have it.

    Args:
        greater: whether a greater value is better.
        threshold: by how much a value must be better for those before it to be no longer waited on. It is the best without that, too.
    """
    best_step, best, stale = None, None, 0
    for step, value in values:
        better = best is None or (value > best if greater else value < best)
        stale = 0 if best is None or (better and abs(value - best) > threshold) else stale + 1
        if better:
            best_step, best = step, value
    return Verdict(best_step, best, stale)


class Validation:
    """A run's rows to measure on, and what was found on them so far. Without such rows it does nothing.

    Args:
        data: the rows that are trained on: held-out rows that are among them are told in a warning.

    Raises:
        OSError, DataError, ValueError: as `read_rows` and `encode`; accuracy is to be the best, and the completions are no labels.
        ModuleNotFoundError: ROUGE is to be the best, and the package rouge-score is missing.
    """

    def __init__(self, config: TrainConfig, data: Sequence[Row], tokenizer: Any) -> None:
        self.config, self.tokenizer, self.output = config, tokenizer, Path(config.output)
        self.held_out, self.retained = self._read("eval_data"), self._read("retain_data")
        self.records: list[dict[str, Any]] = []
        self.samples: list[dict[str, Any]] = []
        self.steps = 0
        rows = self.held_out.rows if self.held_out else []
        kept = (SAMPLES if config.eval_generate else 0) if config.eval_samples is None else config.eval_samples
        kept = min(kept, len(rows))
        self.sampled = [i * len(rows) // kept for i in range(kept)]
        known = {tuple(map(tuple, row.sides)) for row in data}
        for option, one in (("eval_data", self.held_out), ("retain_data", self.retained)):
            measured = one.rows if one else []
            if leaked := sum(tuple(map(tuple, row.sides)) in known for row in measured):
                text = "%s: %d of its %d rows are also trained on: what is measured on those is memory"
                logger.warning(text, option, leaked, len(measured))
        self.references: list[str] = []
        self.prompts: list[list[int]] = []  # where they are answered, once there is a model
        if self.held_out and (config.eval_generate or kept):
            if any(example.prompt == "" for example in self.held_out.examples):
                raise ValueError(
                    "eval_data: rows of plain text have no prompt to answer: expected no eval_generate, no eval_samples"
                )
            pairs = zip(self.held_out.examples, self.held_out.rows, strict=True)
            self.references = [reference(example, row, tokenizer) for example, row in pairs]
        self._require_metric()

    def _read(self, option: str) -> Encoded | None:
        given = self.config
        data = getattr(given, option)
        if data is None:
            return None
        with named_as(option):
            examples = read_rows(
                data,
                columns=given.columns if option == "eval_data" else None,
                length=row_length(self.tokenizer, is_encoder_decoder(str(given.model))),
                max_tokens=given.max_length,
            )
        return training_data.encoded(given, examples, self.tokenizer)

    def _require_metric(self) -> None:
        if not self.config.eval_generate:
            return
        metric = self.config.best_metric
        if metric == "eval_accuracy" and not labels(self.references):
            raise ValueError(
                "metric_for_best_model=eval_accuracy: eval_data's completions are no labels: expected 2 to 20 different"
                " ones, each of two rows or more"
            )
        if importlib.util.find_spec("rouge_score") is None:
            missing = "the package rouge-score is missing (pip install rouge-score)"
            if "rouge" in metric:
                raise ModuleNotFoundError(f"metric_for_best_model={metric}: {missing}")
            logger.warning("eval_generate: ROUGE is not measured: %s", missing)

    @property
    def digest(self) -> str:
        """SHA-256 of all rows that are measured on."""
        parts = ["none" if one is None else digest(one.rows) for one in (self.held_out, self.retained)]
        return sha256(" ".join(parts).encode()).hexdigest()

    def told(self) -> dict[str, str]:
        """What the banner says of it."""
        parts = [f"{len(one.rows):,} rows of {name}" + (f" ({len(one.dropped):,} dropped)" if one.dropped else "")
                 for name, one in (("eval_data", self.held_out), ("retain_data", self.retained)) if one]  # fmt: skip
        steps = self.config.eval_steps
        every = ", at the end" if steps is None else ", every step" if steps == 1 else f", every {steps:,} steps"
        return {"measured": " and ".join(parts) + every} if parts else {}

    def resume(self, saved: Checkpoint) -> None:
        """Take up the validations that a checkpoint knows.

        Raises:
            ValueError: it was measured on other rows; validation.jsonl or samples.jsonl has not what was written there: the message has FILE:LINE.
            CheckpointError: the checkpoint of the best one is not there.
        """
        if saved.training.held_out != self.digest:
            name = "eval_data" if self.held_out else "retain_data"
            raise ValueError(
                f"{name}={getattr(self.config, name)}: the token rows to measure on are not those of {saved.folder}"
            )
        count, path = saved.training.validations, self.output / metrics.VALIDATION
        records = metrics.read_validations(self.output, count)
        for number, record in enumerate(records, 1):
            wanted = {name for name, one in (("eval_loss", self.held_out), ("retain_loss", self.retained)) if one}
            for name in sorted((wanted | {self.config.best_metric}) - record.keys()):
                raise ValueError(f"{path}:{number}: no {name}")
            if record["step"] > saved.training.step:
                raise ValueError(f"{path}:{number}: step={record['step']}: expected one of {saved.folder} or before it")
        self.records, self.samples = records, metrics.read_samples(self.output, count * len(self.sampled))
        best = self.verdict().best_step
        if self.config.load_best_model_at_end and best and not checkpoint.folder(self.output, best).is_dir():
            raise CheckpointError(f"{path}: step {best} was the best, and there is no checkpoint of it")

    def attach(self, model: Any, accelerator: Accelerator, steps: int, autocast: AbstractContextManager[Any]) -> None:
        """Have a model to measure.

        steps: of the whole run: the last is measured, whatever eval_steps says.
        autocast: what it is called under.

        Raises:
            ValueError: a row is longer than the model has positions for, or an answer has no room.
        """
        self.model, self.accelerator, self.steps, self.autocast = model, accelerator, steps, autocast
        for one in (self.held_out, self.retained):
            if one:
                require_positions(model, one.rows)
        if self.held_out and (self.config.eval_generate or self.sampled):
            ids = [row.input_ids[: row.prompt_length] for row in self.held_out.rows]
            examples = self.held_out.examples
            self.prompts = leave_room(model, self.tokenizer, ids, examples, self.config.eval_max_new_tokens)

    def claim_output(self) -> None:
        """Leave in validation.jsonl and samples.jsonl what this run goes on from, and nothing else."""
        for name, content in ((metrics.VALIDATION, self.records), (metrics.SAMPLES, self.samples)):
            if content:
                metrics.write(self.output, content, name)
            else:
                (self.output / name).unlink(missing_ok=True)

    def after(self, step: int) -> bool:
        """Measure after a step (0: before the first) where that is due and was not done; whether a checkpoint is to keep what is the best so far.

        Raises:
            TrainingError: it cannot be written; Diverged: what was measured is not finite.
        """
        if not self.is_due(step):
            return False
        with self._beside_training():
            record, samples = self._measure(step)
        for name, value in record.items():
            if not math.isfinite(value):
                raise Diverged(step, f"step {step}: {name} is {value}; a lower lr may help")
        self.records.append(record)
        self.samples += samples
        for name, lines in ((metrics.SAMPLES, samples), (metrics.VALIDATION, [record])):
            with processes.as_one(self.accelerator), named_writing(name, self.output, step):
                if self.accelerator.is_main_process and lines:
                    for line in lines:
                        metrics.add(self.output, line, name)
                    writing.force(self.output / name)
        tracking.report(self.accelerator, record)
        return self.config.load_best_model_at_end and self.verdict().best_step == step

    def is_due(self, step: int) -> bool:
        """Whether a validation is due after a step (0: before the first), and was not done."""
        done = self.records[-1]["step"] if self.records else -1
        if done >= step or not (self.held_out or self.retained):
            return False
        if step == 0:
            return self.config.eval_on_start or self.retained is not None or bool(self.sampled)
        return step == self.steps or (self.config.eval_steps is not None and step % self.config.eval_steps == 0)

    @contextmanager
    def _beside_training(self) -> Iterator[None]:
        """Whatever is computed inside, training goes on as if it had not been, and `report` tells of training."""
        drawn = checkpoint.rng_state()
        with (
            packed.as_found(),
            reporting.unobserved(self.model),
            self.autocast,
            torch.compiler.set_stance("force_eager"),
        ):
            yield  # uncompiled: no code is made for other modes and widths
        if self.config.fsdp:
            processes.reshard(self.model)
        checkpoint.set_rng_state(drawn)

    def _measure(self, step: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The record of a step, and its samples."""
        record: dict[str, Any] = {"step": step}
        samples: list[dict[str, Any]] = []
        if self.held_out:
            record["eval_loss"], record["eval_tokens"] = self._loss(self.held_out.rows)
            examples, answers = self.held_out.examples, self._answers()
            if self.config.eval_generate:
                scored = scores([answers[i] for i in range(len(examples))], self.references)
                record |= {f"eval_{name}": value for name, value in scored.items()}
            for i in self.sampled:
                asked = {
                    "source": examples[i].source,
                    "prompt": examples[i].prompt,
                    "reference": self.references[i],
                }
                samples.append({"step": step, **asked, "answer": answers[i]})
        if self.retained:
            record["retain_loss"], record["retain_tokens"] = self._loss(self.retained.rows)
            first = self.records[0] if self.records else record
            record["forgetting"] = record["retain_loss"] - first["retain_loss"]
        return record, samples

    def _loss(self, rows: Sequence[Row]) -> tuple[float, int]:
        """The mean over the labelled tokens of all processes' shares, as `evaluation.mean_loss` has it; and how many those are."""
        share = self.accelerator.process_index, self.accelerator.num_processes
        total = total_loss(self.model, self.tokenizer, rows, self.config.eval_batch_size, *share)
        total = self.accelerator.reduce(total.to(self.accelerator.device), "sum")
        tokens = sum(row.labelled for row in rows)
        return total.item() / tokens, tokens

    def _answers(self) -> Mapping[int, str]:
        """Answers by the number of their row: to all of them, or to those that are kept; each process gives its share, where it can."""
        assert self.held_out is not None
        wanted = range(len(self.held_out.rows)) if self.config.eval_generate else self.sampled
        if not wanted:
            return {}
        size = self.config.eval_batch_size
        parts = list(batches(sorted(wanted, key=lambda i: len(self.prompts[i])), size))
        if not self.config.fsdp:  # whose processes call the model together, token by token: there each answers all
            parts = parts[self.accelerator.process_index :: self.accelerator.num_processes]
        own = list(chain.from_iterable(parts))
        prompts, ids = [self.held_out.examples[i].prompt for i in own], [self.prompts[i] for i in own]
        texts = answer(self.model, self.tokenizer, prompts, ids, self.config.eval_max_new_tokens, size)
        return dict(gather_object(list(zip(own, texts, strict=True))))

    def verdict(self, step: int | None = None) -> Verdict:
        """By the validations up to a step, or by all; the one before the first step has no checkpoint, and does not count."""
        last = math.inf if step is None else step
        name = self.config.best_metric
        values = [(one["step"], one[name]) for one in self.records if 0 < one["step"] <= last]
        return judge(values, self.config.greater_is_best, self.config.early_stopping_threshold)

    def best_of(self, step: int) -> list[int]:
        """The step whose checkpoint one of a given step is nothing without: its best."""
        best = self.verdict(step).best_step
        return [] if best is None else [best]

    def take_best(self, step: int, trained: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        """Where load_best_model_at_end asks for it, give what is trained the values of the best step, if that was not the last; the optimiser is
        done with, and its memory free for them.

        Raises:
            CheckpointError: as `trainable.take`.
        """
        best = self.verdict().best_step
        if self.config.load_best_model_at_end and best is not None and best != step:
            optimizer.state.clear()
            trainable.take(self.model, self.config, checkpoint.folder(self.output, best), trained)

    @property
    def stop_reason(self) -> str | None:
        """Why no more is to be trained; None: it is."""
        patience, verdict = self.config.early_stopping_patience, self.verdict()
        if patience is None or verdict.stale < patience:
            return None
        way = "higher" if self.config.greater_is_best else "lower"
        threshold = self.config.early_stopping_threshold
        margin = f" by more than {threshold:g}" if threshold else ""
        return (
            f"{self.config.best_metric} has not become {way}{margin} in {patience} validation{'s' * (patience != 1)}:"
            f" the best is {verdict.best:.6g}, of step {verdict.best_step}"
        )

    def shown(self) -> str:
        """For the bar: the last figure by which the best is chosen."""
        name = self.config.best_metric
        return f"{name} {self.records[-1][name]:.4f}" if self.records else ""

    def summary(self, step: int) -> dict[str, Any]:
        """What the summary says of it, after the last step that was done."""
        best = self.verdict().best_step
        reason = self.stop_reason if step < self.steps else None
        of_best = next((one for one in self.records if one["step"] == best), None)
        last = self.records[-1] if self.records else None
        left = of_best if self.config.load_best_model_at_end and of_best is not None else last
        return {
            "best_step": best,
            "best_eval_loss": None if of_best is None else of_best.get("eval_loss"),
            "validation": left,
            "last_validation": last if last is not left else None,
            "stopped_early": reason is not None,
            "stop_reason": reason,
        }
