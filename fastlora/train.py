"""The training loop: prompts and completions in, a LoRA adapter in PEFT's format (or a fully fine-tuned model) out.

One optimiser step takes `batch_size * gradient_accumulation_steps` rows on each process; its loss is the mean over all
labelled tokens of those rows, however they are cut into batches. Which rows a step takes follows from the seed and the
step's number alone, and every generator's state is in the checkpoint: a resumed run computes the same bits as one that
was never stopped.
"""

import json
import logging
import math
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch import Tensor
from tqdm import tqdm

from fastlora import adapters, checkpoint, metrics, tuned
from fastlora.data.examples import (
    IGNORE,
    TRUNCATIONS,
    Encoded,
    Row,
    batches,
    collate,
    encode,
    pad_token_id,
    read_examples,
)
from fastlora.inference import (
    EvalResult,
    evaluate,
    generate,
    load_base,
    load_model,
    load_tokenizer,
    require_positions,
    resolve_dtype,
)
from fastlora.losses import LanguageModelLoss
from fastlora.merge import MergeReport, merge

__all__ = [
    "EvalResult",
    "MergeReport",
    "TrainConfig",
    "TrainResult",
    "TrainingError",
    "TrainingInterrupted",
    "evaluate",
    "generate",
    "load_model",
    "merge",
    "train",
]

logger = logging.getLogger("fastlora")

DEFAULT_LR = {"lora": 2e-4, "full": 2e-5}
# Data and how it is cut are compared by the rows' tokens.
MAY_DIFFER_ON_RESUME = {"data", "truncation", "output", "save_steps", "resume", "overwrite"}


class TrainingError(RuntimeError):
    """Training went wrong and would only go on in vain."""


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM; a checkpoint was written first."""


@dataclass
class TrainConfig:
    """What to train, on what, and how; the names are PEFT's and transformers'.

    Raises:
        ValueError: an option is out of range; the message names it.
    """

    model: str  # folder or hub id
    data: str | Path  # JSONL
    output: str | Path
    method: str = "lora"  # lora | full
    r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.05
    use_rslora: bool = False
    target_modules: str | list[str] = "all-linear"
    seed: int = 0
    epochs: int = 3
    max_steps: int | None = None  # optimiser steps, in place of epochs
    batch_size: int = 8  # rows a process takes at once
    gradient_accumulation_steps: int = 1
    max_length: int = 512  # tokens a row may have
    truncation: str = (
        "prompt"  # what a longer row loses: prompt (its oldest tokens) | completion (its end) | drop (all)
    )
    lr: float | None = None  # None: 2e-4 for lora, 2e-5 for full
    lr_scheduler_type: str = "linear"
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0  # 0: no clipping
    dtype: str = "auto"  # auto | float32 | bfloat16; "full" keeps float32 weights and computes under autocast
    gradient_checkpointing: bool = False
    save_steps: int = 50
    resume: bool = False
    overwrite: bool = False
    accelerate: bool = True  # run LoRA and frozen layers by fastlora; False leaves them to PEFT and torch
    pack_budget: int | None = None  # bytes for packed copies of frozen weights on a CPU; None: 1/16 of its memory
    compile: bool = False  # each of the model's layers through torch.compile

    def __post_init__(self) -> None:
        if self.method not in DEFAULT_LR:
            raise ValueError(f"method={self.method!r}: expected lora or full")
        if self.lr is None:
            self.lr = DEFAULT_LR[self.method]
        for name in ("r", "epochs", "max_steps", "batch_size", "gradient_accumulation_steps", "save_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: expected at least 1")
        if self.max_length < 2:
            raise ValueError(
                f"max_length={self.max_length}: expected at least 2, a token of the prompt and one of the completion"
            )
        if self.truncation not in TRUNCATIONS:
            raise ValueError(f"truncation={self.truncation!r}: expected one of {', '.join(TRUNCATIONS)}")
        for name in ("lora_dropout", "warmup_ratio"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected a number from 0 to below 1")
        for name in ("lr", "lora_alpha", "weight_decay", "max_grad_norm"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name}={getattr(self, name)}: expected a finite number, 0 or more")
        if self.pack_budget is not None and self.pack_budget < 0:
            raise ValueError(f"pack_budget={self.pack_budget}: expected a number of bytes, 0 for no packed copies")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"dtype={self.dtype!r}: expected auto, float32 or bfloat16")
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite exclude each other: expected one of them")
        if Path(self.model).is_dir():
            self.model = str(Path(self.model).resolve())  # the adapter's files name it


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
    implementations: dict[str, int]  # LoRA layers, and frozen ones that fastlora runs, by what ran them
    loss_path: str | None  # LanguageModelLoss's; None where no step was left to do
    output: str


def train(config: TrainConfig, *, progress: bool = True) -> TrainResult:
    """Train, and leave the adapter (or model), metrics.jsonl, loss.png, summary.json and checkpoints/ in the output.

    Runs on one process, or on several under `accelerate launch` or `torchrun`.

    Args:
        progress: show a bar with loss, tokens a second and the time left.

    Raises:
        DataError: bad lines in the data; raised before any model is loaded, like max_length leaving no row (ValueError).
        FileExistsError: the output folder has checkpoints, and neither resume nor overwrite was asked for.
        ValueError: resume was asked for with other options or data than the checkpoint's; compile, and there is no C++ compiler.
        TrainingError: the loss or the gradient is not finite, or no gradient reaches any trained weight.
        TrainingInterrupted: Ctrl-C or SIGTERM, after the checkpoint.
    """
    output = Path(config.output)
    saved = checkpoint.steps(output)
    if saved and not (config.resume or config.overwrite):
        raise FileExistsError(
            f"output={output} has checkpoints up to step {saved[-1]}:"
            " --resume goes on from there, --overwrite removes them and starts again"
        )
    if config.compile:
        _require_compiler()
    tokenizer = load_tokenizer(config.model)
    data = encode(read_examples(config.data), tokenizer, config.max_length, config.truncation)
    run = _Run(config, data, tokenizer, checkpoint.folder(output, saved[-1]) if saved and config.resume else None)
    run.claim_output()
    with _stop_signals() as stop:
        run.loop(stop, progress)
    return run.finish()


class _Plan:
    """Which rows each optimiser step takes."""

    def __init__(self, config: TrainConfig, rows: Sequence[Row], processes: int) -> None:
        self.config, self.rows, self.processes = config, rows, processes
        self.rows_per_step = config.batch_size * config.gradient_accumulation_steps * processes
        self.steps_per_epoch = math.ceil(len(rows) / self.rows_per_step)
        self.steps = config.max_steps or config.epochs * self.steps_per_epoch
        self._order: tuple[int, list[int]] = (-1, [])

    def step_rows(self, step: int) -> list[Row]:
        """The rows of a step, counted from 0, over all processes."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            order = list(range(len(self.rows)))
            random.Random(f"fastlora {self.config.seed} {epoch}").shuffle(order)
            self._order = epoch, order
        chosen = self._order[1][position * self.rows_per_step : (position + 1) * self.rows_per_step]
        return [self.rows[i] for i in chosen]

    def batches(self, rows: Sequence[Row], process: int) -> list[Sequence[Row]]:
        """The rows of a step as the batches of one process; every process gets as many batches as the others."""
        shared = batches(rows, self.config.batch_size * self.processes)
        return [rows[process :: self.processes] or [_without_labels(rows[0])] for rows in shared]


def _without_labels(row: Row) -> Row:
    return Row(row.input_ids, [IGNORE] * len(row.labels))


class _Run:
    """One run: the model, and all else that a checkpoint holds."""

    def __init__(self, config: TrainConfig, data: Encoded, tokenizer: Any, resume_from: Path | None) -> None:
        self.config, self.data, self.tokenizer = config, data, tokenizer
        self.output = Path(config.output)
        self.accelerator = Accelerator(mixed_precision="no")
        self.plan = _Plan(config, data.rows, self.accelerator.num_processes)
        self.dtype = resolve_dtype(config.dtype, self.accelerator.device)
        self.step = 0
        self.setup = self._setup()
        saved = _read_saved(resume_from, self.setup) if resume_from else None
        if saved:
            tuned.load_state(saved["tuned"])
        set_seed(config.seed)
        self.model = self._build_model(resume_from)
        require_positions(self.model, data.rows)
        self.model.train()
        # The adapter's first values are the same on all processes; dropout is each one's own.
        set_seed(config.seed + self.accelerator.process_index)
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        lr = config.lr or 0.0
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=lr, weight_decay=config.weight_decay)
        self.scheduler = _scheduler(config, self.optimizer, self.plan.steps)
        self.wrapped = self.accelerator.prepare_model(self.model)
        self.loss = LanguageModelLoss(self.wrapped)
        if saved:
            self.step = saved["setup"]["step"]
            self.optimizer.load_state_dict(saved["optimizer"])
            self.scheduler.load_state_dict(saved["scheduler"])
            checkpoint.set_rng_state(saved["rng"][self.accelerator.process_index])

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
        if self.accelerator.is_main_process:
            self.output.mkdir(parents=True, exist_ok=True)
            if self.step == 0:
                checkpoint.clear(self.output)
            checkpoint.clear_leftovers(self.output)
            metrics.cut(self.output, self.step)
        self.accelerator.wait_for_everyone()

    def _build_model(self, resume_from: Path | None) -> Any:
        config, device = self.config, self.accelerator.device
        if config.method == "full":
            model = load_base(str(resume_from or config.model), torch.float32, device)
        else:
            model = _add_adapter(load_base(config.model, self.dtype, device), config, resume_from)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if config.compile:
            _compile_layers(model)
        return model

    def loop(self, stop: threading.Event, progress: bool) -> None:
        """Go on to the last step, with metrics and checkpoints; a stop that was asked for ends it after a step."""
        bar = tqdm(
            total=self.plan.steps,
            initial=self.step,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.1 if sys.stderr.isatty() else 2.0,  # seconds; a log keeps every line
            disable=not (progress and self.accelerator.is_main_process),
        )
        log = (self.output / metrics.NAME).open("a") if self.accelerator.is_main_process else nullcontext()
        first = self.step
        with bar, log as file:
            while self.step < self.plan.steps:
                record, stopped = self._train_step(stop, check_gradients=self.step == first)
                if file:
                    file.write(json.dumps(record) + "\n")
                    file.flush()
                shown = f"loss {record['loss']:.4f}, {record['tokens_per_second']:.0f} tokens/s"
                bar.set_postfix_str(shown, refresh=False)
                bar.update()
                if stopped or self.step % self.config.save_steps == 0 or self.step == self.plan.steps:
                    if file:
                        os.fsync(file.fileno())
                    self._save_checkpoint()
                if stopped and self.step < self.plan.steps:
                    raise TrainingInterrupted(
                        f"stopped after step {self.step} of {self.plan.steps}; the same command with --resume goes on"
                        f" from {checkpoint.folder(self.output, self.step)}"
                    )

    def _train_step(self, stop: threading.Event, check_gradients: bool) -> tuple[dict[str, float], bool]:
        began = time.perf_counter()
        rows = self.plan.step_rows(self.step)
        learning_rate = self.scheduler.get_last_lr()[0]
        loss = self._backward(rows)
        # One exchange tells all processes the loss and whether one of them was asked to stop.
        shared = torch.stack([loss, torch.tensor(float(stop.is_set()), device=loss.device)])
        value, asked = self.accelerator.reduce(shared, "sum").tolist()
        norm = torch.nn.utils.clip_grad_norm_(list(self.trained.values()), self.config.max_grad_norm or math.inf).item()
        self.step += 1
        if not (math.isfinite(value) and math.isfinite(norm)):
            raise TrainingError(
                f"step {self.step}: the loss is {value} and the gradient's norm {norm}; a lower lr may help"
            )
        if check_gradients:
            self._check_gradients()
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        seconds = time.perf_counter() - began
        record = {
            "step": self.step,
            "loss": value,
            "learning_rate": learning_rate,
            "tokens_per_second": _tokens(rows) / seconds,
            "seconds": seconds,
        }
        return record, asked > 0

    def _backward(self, rows: Sequence[Row]) -> Tensor:
        """Gradients of a step's mean loss a labelled token; returns this process's share of that loss, a scalar."""
        labelled = sum(row.labelled for row in rows)
        total = torch.zeros((), device=self.accelerator.device)
        parts = self.plan.batches(rows, self.accelerator.process_index)
        for i, part in enumerate(parts):
            last = i == len(parts) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                batch = collate(part, pad_token_id(self.tokenizer))
                batch = {name: value.to(total.device) for name, value in batch.items()}
                with self._autocast():
                    loss = self.loss(batch) / labelled
                self.accelerator.backward(loss * self.plan.processes)  # DDP takes the mean over processes
            total += loss.detach()
        return total

    def _autocast(self) -> Any:
        if self.config.method == "full" and self.dtype != torch.float32:
            return torch.autocast(self.accelerator.device.type, self.dtype)
        return nullcontext()

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
        if self.accelerator.is_main_process:
            checkpoint.save(self.output, self.step, lambda folder: self._write_checkpoint(folder, rng))
        self.accelerator.wait_for_everyone()

    def _write_checkpoint(self, folder: Path, rng: list[dict[str, Any]]) -> None:
        self._write_model(folder)
        state = {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "rng": rng,
            "tuned": tuned.state(),  # a resumed run computes with the same implementations
        }
        torch.save(state, folder / "state.pt")
        (folder / "training.json").write_text(json.dumps({"step": self.step, **self.setup}, indent=2) + "\n")

    def _write_model(self, folder: Path) -> None:
        if self.config.method == "full":
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
        else:
            self.model.save_pretrained(str(folder), save_embedding_layers=False)

    def finish(self) -> TrainResult:
        """Write the final files; the summary is returned, too."""
        if self.accelerator.is_main_process:
            checkpoint.publish(self.output, self._write_model)
        self.accelerator.wait_for_everyone()
        records = metrics.read(self.output)
        result = self._result(records)
        if self.accelerator.is_main_process:
            (self.output / "summary.json").write_text(json.dumps(asdict(result), indent=2) + "\n")
            try:
                metrics.plot(records, self.output / "loss.png")
            except ModuleNotFoundError:
                logger.warning("no loss.png: the package matplotlib is missing (pip install matplotlib)")
        return result

    def _result(self, records: Sequence[Mapping[str, float]]) -> TrainResult:
        losses = [record["loss"] for record in records]
        ends = max(1, min(10, len(losses) // 2))  # steps
        seconds = sum(record["seconds"] for record in records)
        tokens = sum(_tokens(self.plan.step_rows(step)) for step in range(self.step))
        weights = "model.safetensors" if self.config.method == "full" else "adapter_model.safetensors"
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
            trainable_parameters=sum(p.numel() for p in self.trained.values()),
            parameters=sum(p.numel() for p in self.model.parameters()),
            adapter_bytes=(self.output / weights).stat().st_size if (self.output / weights).is_file() else 0,
            implementations=_implementations(self.model, self.config),
            loss_path=self.loss.path,
            output=str(self.output),
        )


def _add_adapter(model: Any, config: TrainConfig, resume_from: Path | None) -> Any:
    from peft import LoraConfig, get_peft_model

    if resume_from:
        model = adapters.load(model, {"default": adapters.read(resume_from)}, is_trainable=True)
    else:
        names = ("r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules")
        model = get_peft_model(
            model, LoraConfig(task_type="CAUSAL_LM", **{name: getattr(config, name) for name in names})
        )
    if config.accelerate:
        from fastlora.peft import accelerate

        accelerate(model, frozen=True, pack_budget=config.pack_budget)
    return model


def _require_compiler() -> None:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise ValueError(
            f"compile: torch.compile needs a C++ compiler, and {compiler} is not on the PATH:"
            " install it, name another one in CXX, or train without --compile"
        )


def _compile_layers(model: Any) -> None:
    """Have torch compile each of the blocks that the model is a stack of; what stands around them stays eager."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = base._no_split_modules or ()
    layers = [module for module in base.modules() if type(module).__name__ in names]
    if not layers:
        raise ValueError(f"compile: transformers does not say what the layers of {type(base).__name__} are")
    for layer in layers:
        # Batches differ in width, and a resumed run meets them in another order: one code for all widths, from the first on.
        layer.compile(dynamic=True)


def _implementations(model: Any, config: TrainConfig) -> dict[str, int]:
    if config.method == "full":
        return {}
    if not config.accelerate:
        from peft.tuners.lora import LoraLayer

        return {"peft": sum(isinstance(module, LoraLayer) for module in model.modules())}
    from fastlora.peft import report

    return dict(Counter(layer.implementation for layer in report(model)))


def _scheduler(config: TrainConfig, optimizer: torch.optim.Optimizer, steps: int) -> Any:
    from transformers import get_scheduler

    return get_scheduler(
        config.lr_scheduler_type,
        optimizer,
        num_warmup_steps=math.ceil(config.warmup_ratio * steps),
        num_training_steps=steps,
    )


def _tokens(rows: Sequence[Row]) -> int:
    return sum(len(row.input_ids) for row in rows)


def _read_saved(folder: Path, now: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's state, once it is sure that it belongs to a run like this one."""
    then = json.loads((folder / "training.json").read_text())
    for field in fields(TrainConfig):
        before, value = then["config"].get(field.name), now["config"][field.name]
        if field.name not in MAY_DIFFER_ON_RESUME and before != value:
            raise ValueError(
                f"{field.name}={value!r}: expected {before!r} as in {folder}, or --overwrite to start again"
            )
    if then["data"] != now["data"]:
        raise ValueError(f"data={now['config']['data']}: its token rows are not those that {folder} was trained on")
    for name in ("processes", "device"):
        if then[name] != now[name]:
            raise ValueError(f"{folder} was written with {name}={then[name]}, expected the same, got {now[name]}")
    if then["threads"] != now["threads"]:
        text = "%s was written with %d threads, this run has %d: the last bits may differ from an uninterrupted run's"
        logger.warning(text, folder, then["threads"], now["threads"])
    state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    return {"setup": then, **state}


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set; a second Ctrl-C interrupts at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # Python lets only the main thread handle signals
        yield stop
        return

    def ask(number: int, frame: Any) -> None:
        stop.set()
        signal.signal(signal.SIGINT, before[signal.SIGINT])

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
