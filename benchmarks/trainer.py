"""python -m benchmarks.trainer MODEL DATA.jsonl: what a user of transformers' Trainer and PEFT gains, on a model and rows of their own.

Ways to train the same LoRA adapter on the same rows, each in a process of its own, in turn: Trainer and PEFT; the same after
`fastlora.accelerate(model)`, a part more at a time; and `fastlora train`. Beside them Trainer with the whole model in training, without PEFT. Every
step sees the same batch, so that the first losses must agree. A step's time is a median over all rounds but for each process's first step; memory is
the process's own peak; tokens are real ones, padding aside.

With `--packing` the ways are those that rows of mixed lengths may take: Trainer and PEFT, which pads them in batches of `--batch`; TRL's SFTTrainer,
which packs them; `fastlora train` without and with packing. What they have learnt in so many steps is told by their loss on `--held-out` rows.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from fastlora import memory, metrics

from . import plot
from .machine import results_folder, this_machine
from .step import compare, own_process, require_agreement

WAYS = {
    "trainer": "Trainer + PEFT",
    "compiled": "the same, each block through torch.compile",
    "accelerate": "with `fastlora.accelerate(model)`",
    "loss": "with `fastlora.accelerate(model, loss=True)`",
    "fuse": "with `fastlora.accelerate(model, frozen=True, loss=True, fuse=True)`",
    "train": "`fastlora train` in their place",
    "full": "Trainer, full fine-tuning",
}
PACKING = {
    "trainer": "Trainer + PEFT",
    "trl": "TRL's SFTTrainer, packing",
    "train": "`fastlora train`",
    "packed": "`fastlora train --packing`",
}
"""In their place where rows of mixed lengths are packed."""
NAMES = {**PACKING, **WAYS}
OPTIONS: dict[str, dict[str, bool]] = {
    "accelerate": {},
    "loss": {"loss": True},
    "fuse": {"frozen": True, "loss": True, "fuse": True},
}
"""Of `accelerate`, in the ways that call it."""
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ADAPTER: dict[str, Any] = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0}
LEARNING_RATE, MAX_LENGTH = 2e-4, 512
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}  # of the first loss, relative


class Run(NamedTuple):
    """One way's steps in one process."""

    seconds: list[float]
    losses: list[float]
    tokens: int  # of the rows of a step
    peak_bytes: int | None
    held_out: float | None = None  # loss after the last step


@dataclass(frozen=True)
class Setting:
    """What all ways have in common."""

    model: str
    rows: list[dict[str, Any]]  # of the data file, a step's
    steps: int
    dtype: Literal["float32", "bfloat16"]
    batch: int | None = None  # rows at once; None: all
    max_tokens: int | None = None  # at once, where `fastlora train` packs
    held_out: list[dict[str, Any]] = field(default_factory=list)

    @property
    def at_once(self) -> int:
        return self.batch or len(self.rows)


def _read(setting: Setting, data: Path) -> tuple[Any, list[Any]]:
    """The tokenizer, and the rows in tokens."""
    from transformers import AutoTokenizer

    from fastlora.data.examples import read_examples
    from fastlora.data.rows import encode

    tokenizer = AutoTokenizer.from_pretrained(setting.model)
    return tokenizer, encode(read_examples(data), tokenizer, MAX_LENGTH).rows


class Trained(NamedTuple):
    """What a way has left."""

    seconds: list[float]
    losses: list[float]
    model: Any  # the trained one, or the folder of its adapter


def _by_trainer(setting: Setting, way: str, folder: Path, data: Path) -> Trained:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    import fastlora
    from fastlora.data.rows import collate

    tokenizer, rows = _read(setting, data)
    model: Any = AutoModelForCausalLM.from_pretrained(setting.model, dtype=getattr(torch, setting.dtype))
    torch.manual_seed(0)
    if way != "full":
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **ADAPTER))
    if way == "compiled":
        for block in [module for module in model.modules() if type(module).__name__ in model._no_split_modules]:
            block.compile(dynamic=False)
    if way in OPTIONS:
        fastlora.accelerate(model, **OPTIONS[way])
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            times.append(-time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times[-1] += time.perf_counter()

    options: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": setting.steps,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    if way == "trl":
        trainer = _sft_trainer(model, rows, options, Clock())
    else:
        arguments = TrainingArguments(
            per_device_train_batch_size=setting.at_once,
            gradient_accumulation_steps=len(rows) // setting.at_once,
            remove_unused_columns=False,
            **options,
        )
        together = partial(collate, pad=tokenizer.pad_token_id)
        trainer = Trainer(model, arguments, data_collator=together, train_dataset=rows, callbacks=[Clock()])
    trainer.train()
    return Trained(times, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], model)


def _sft_trainer(model: Any, rows: Sequence[Any], options: dict[str, Any], clock: Any) -> Any:
    """TRL's, which packs the rows into lines of MAX_LENGTH tokens and runs one at a time: a step has them all."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer, pack_dataset

    data = Dataset.from_list([{"input_ids": row.input_ids, "labels": row.labels} for row in rows])
    lines = len(pack_dataset(data, MAX_LENGTH))
    arguments = SFTConfig(
        packing=True,
        max_length=MAX_LENGTH,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=lines,
        gradient_checkpointing=False,
        bf16=False,
        **options,
    )
    return SFTTrainer(model, arguments, train_dataset=data, callbacks=[clock])


def _by_command(setting: Setting, way: str, folder: Path, data: Path) -> Trained:
    from fastlora import train
    from fastlora.config import TrainConfig

    config = TrainConfig(
        model=setting.model,
        data=data,
        output=folder / "out",
        max_steps=setting.steps,
        batch_size=setting.at_once,
        gradient_accumulation_steps=len(setting.rows) // setting.at_once,
        packing=way == "packed",
        max_tokens=setting.max_tokens if way == "packed" else None,
        max_length=MAX_LENGTH,
        lr=LEARNING_RATE,
        lr_scheduler_type="constant",
        dtype=setting.dtype,
        **ADAPTER,
    )
    train.train(config)
    records = [json.loads(line) for line in (folder / "out" / metrics.NAME).read_text().splitlines()]
    return Trained([one["seconds"] for one in records], [one["loss"] for one in records], folder / "out")


def run(setting: Setting, way: str) -> Run:
    """Train in one of the WAYS, or of those with PACKING, in this process."""
    from fastlora.data.rows import count_tokens

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = _write(folder / "rows.jsonl", setting.rows)
        trained = (_by_command if way in ("train", "packed") else _by_trainer)(setting, way, folder, data)
        peak = memory.peak(DEVICE)  # before anything is asked of what was trained
        held_out = _held_out(setting, trained.model, folder) if setting.held_out else None
        return Run(trained.seconds, trained.losses, count_tokens(_read(setting, data)[1]), peak, held_out)


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _held_out(setting: Setting, model: Any, folder: Path) -> float:
    from fastlora.evaluation import mean_loss
    from fastlora.models import load_model

    if isinstance(model, Path):
        model, _ = load_model(setting.model, {"trained": model}, dtype=setting.dtype)
    tokenizer, rows = _read(setting, _write(folder / "held_out.jsonl", setting.held_out))
    return mean_loss(model, tokenizer, rows, batch_size=8)


def measure(setting: Setting, rounds: int, ways: Sequence[str] = tuple(WAYS)) -> list[dict[str, Any]]:
    """Of each way its name, seconds, memory and losses, and its ratios to the first one, Trainer and PEFT.

    Raises:
        StepError: the first losses do not agree.
    """
    runs: dict[str, list[Run]] = {way: [] for way in ways}
    for number in range(rounds):
        for way in ways:
            with own_process() as process:
                runs[way].append(process.submit(run, setting, way).result())
            print(f"round {number + 1} of {rounds}: {NAMES[way]}", file=sys.stderr, flush=True)
    first = {NAMES[way]: its[0].losses[0] for way, its in runs.items()}
    require_agreement(first, TOLERANCE[setting.dtype], setting.model)
    seconds = {way: [one for each in its for one in each.seconds[1:]] for way, its in runs.items()}
    peaks = {way: max((one.peak_bytes or 0) for one in its) for way, its in runs.items()}
    medians, ratios, memory_ratios = compare(seconds, peaks)
    return [
        {
            "name": NAMES[way].replace("`", ""),
            "seconds": medians[way],
            "ratio": ratios[way],
            "tokens_per_second": runs[way][0].tokens / medians[way],
            "peak_bytes": peaks[way],
            "memory_ratio": memory_ratios.get(way),
            "losses": runs[way][0].losses,
            "held_out": runs[way][0].held_out,
        }
        for way in ways
    ]


def table(found: Sequence[dict[str, Any]], ways: Sequence[str] = tuple(WAYS)) -> str:
    """Markdown, a row a way."""
    held_out = all(one.get("held_out") is not None for one in found)
    lines = [
        f"| | seconds a step | | tokens a second | peak memory | | loss, first and last |{' held out |' * held_out}",
        f"|---|---|---|---|---|---|---|{'---|' * held_out}",
    ]
    for way, one in zip(ways, found, strict=True):
        peak, part = one["peak_bytes"] / 1e9, one["memory_ratio"] or 1.0
        lines.append(
            f"| {NAMES[way]} | {one['seconds']:.1f} | {one['ratio']:.2f} × | {one['tokens_per_second']:,.0f} | {peak:.1f} GB | {part:.2f} × |"
            f" {one['losses'][0]:.3f}, {one['losses'][-1]:.3f} |" + (f" {one['held_out']:.4f} |" if held_out else "")
        )
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.trainer", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="a folder or a hub id")
    parser.add_argument("data", type=Path, help="JSONL of prompt and completion, or messages")
    parser.add_argument("--rows", type=int, default=8, help="of a step: the file's first ones (default: 8)")
    parser.add_argument("--batch", type=int, help="rows at once, a divisor of --rows (default: all)")
    parser.add_argument("--packing", action="store_true", help="the ways of rows of mixed lengths, TRL's among them")
    parser.add_argument("--max-tokens", type=int, help=f"at once, where fastlora packs (default: {MAX_LENGTH})")
    parser.add_argument("--held-out", type=int, default=0, help="rows behind those, of which the loss is told")
    parser.add_argument(
        "--steps", type=int, default=4, help="of each process, the first of them not timed (default: 4)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="processes of each way (default: 3)")
    parser.add_argument("--dtype", choices=list(TOLERANCE), default="bfloat16")
    parser.add_argument("--out", type=Path, default=results_folder(), help="for DATE-MACHINE-trainer.json")
    given = parser.parse_args(argv)
    with given.data.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(given.rows + given.held_out), strict=False)]
    rows, held_out = rows[: given.rows], rows[given.rows :]
    if given.batch is not None and (given.batch < 1 or len(rows) % given.batch):
        parser.error(f"--batch: got {given.batch}, expected a divisor of the {len(rows)} rows")
    machine, ways = this_machine(DEVICE), tuple(PACKING if given.packing else WAYS)
    setting = Setting(given.model, rows, given.steps, given.dtype, given.batch, given.max_tokens, held_out)
    found = measure(setting, given.rounds, ways)
    print(machine.line())
    what = "packing" if given.packing else "trainer"
    path = machine.write(given.out, what, ["python -m benchmarks.trainer", *argv], {"ways": found})
    print(f"{table(found, ways)}\nwritten: {path}, {plot.draw(path)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
