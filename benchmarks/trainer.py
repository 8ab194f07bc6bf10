"""python -m benchmarks.trainer MODEL DATA.jsonl: what a user of transformers' Trainer and PEFT gains, on a model and rows of their own.

Ways to train the same LoRA adapter on the same rows, each in a process of its own, in turn: Trainer and PEFT; the same after
`fastlora.accelerate(model)`, a part more at a time; and `fastlora train`. Beside them Trainer with the whole model in training, without PEFT. Every
step sees the same batch, so that the first losses must agree. A step's time is a median over all rounds but for each process's first step; memory is
the process's own peak; tokens are real ones, padding aside.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
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
    tokens: int  # of the batch
    peak_bytes: int | None


@dataclass(frozen=True)
class Setting:
    """What all ways have in common."""

    model: str
    rows: list[dict[str, Any]]  # of the data file, one batch
    steps: int
    dtype: Literal["float32", "bfloat16"]


def _read(setting: Setting, data: Path) -> tuple[Any, list[Any]]:
    """The tokenizer, and the rows in tokens."""
    from transformers import AutoTokenizer

    from fastlora.data.examples import read_examples
    from fastlora.data.rows import encode

    tokenizer = AutoTokenizer.from_pretrained(setting.model)
    return tokenizer, encode(read_examples(data), tokenizer, MAX_LENGTH).rows


def _by_trainer(setting: Setting, way: str, folder: Path, data: Path) -> tuple[list[float], list[float]]:
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

    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=setting.steps,
        per_device_train_batch_size=len(rows),
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    together = partial(collate, pad=tokenizer.pad_token_id)
    trainer = Trainer(model, arguments, data_collator=together, train_dataset=rows, callbacks=[Clock()])
    trainer.train()
    return times, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def _by_command(setting: Setting, _: str, folder: Path, data: Path) -> tuple[list[float], list[float]]:
    from fastlora import train
    from fastlora.config import TrainConfig

    config = TrainConfig(
        model=setting.model,
        data=data,
        output=folder / "out",
        max_steps=setting.steps,
        batch_size=len(setting.rows),
        max_length=MAX_LENGTH,
        lr=LEARNING_RATE,
        lr_scheduler_type="constant",
        dtype=setting.dtype,
        **ADAPTER,
    )
    train.train(config)
    records = [json.loads(line) for line in (folder / "out" / metrics.NAME).read_text().splitlines()]
    return [one["seconds"] for one in records], [one["loss"] for one in records]


def run(setting: Setting, way: str) -> Run:
    """Train in one of the WAYS, in this process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in setting.rows))
        found = (_by_command if way == "train" else _by_trainer)(setting, way, folder, data)
        tokens = sum(len(row.input_ids) for row in _read(setting, data)[1])
    return Run(*found, tokens, memory.peak(DEVICE))


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
            print(f"round {number + 1} of {rounds}: {WAYS[way]}", file=sys.stderr, flush=True)
    first = {WAYS[way]: its[0].losses[0] for way, its in runs.items()}
    require_agreement(first, TOLERANCE[setting.dtype], setting.model)
    seconds = {way: [one for each in its for one in each.seconds[1:]] for way, its in runs.items()}
    peaks = {way: max((one.peak_bytes or 0) for one in its) for way, its in runs.items()}
    medians, ratios, memory_ratios = compare(seconds, peaks)
    return [
        {
            "name": WAYS[way].replace("`", ""),
            "seconds": medians[way],
            "ratio": ratios[way],
            "tokens_per_second": runs[way][0].tokens / medians[way],
            "peak_bytes": peaks[way],
            "memory_ratio": memory_ratios.get(way),
            "losses": runs[way][0].losses,
        }
        for way in ways
    ]


def table(found: Sequence[dict[str, Any]]) -> str:
    """Markdown, a row a way."""
    lines = [
        "| | seconds a step | | tokens a second | peak memory | | loss, first and last |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, one in zip(WAYS.values(), found, strict=True):
        peak, part = one["peak_bytes"] / 1e9, one["memory_ratio"] or 1.0
        lines.append(
            f"| {name} | {one['seconds']:.1f} | {one['ratio']:.2f} × | {one['tokens_per_second']:,.0f} | {peak:.1f} GB | {part:.2f} × |"
            f" {one['losses'][0]:.3f}, {one['losses'][-1]:.3f} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.trainer", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="a folder or a hub id")
    parser.add_argument("data", type=Path, help="JSONL of prompt and completion, or messages")
    parser.add_argument("--rows", type=int, default=8, help="of the batch: the file's first ones (default: 8)")
    parser.add_argument(
        "--steps", type=int, default=4, help="of each process, the first of them not timed (default: 4)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="processes of each way (default: 3)")
    parser.add_argument("--dtype", choices=list(TOLERANCE), default="bfloat16")
    parser.add_argument("--out", type=Path, default=results_folder(), help="for DATE-MACHINE-trainer.json")
    given = parser.parse_args(argv)
    with given.data.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(given.rows), strict=False)]
    machine = this_machine(DEVICE)
    found = measure(Setting(given.model, rows, given.steps, given.dtype), given.rounds)
    print(machine.line())
    path = machine.write(given.out, "trainer", ["python -m benchmarks.trainer", *argv], {"ways": found})
    print(f"{table(found)}\nwritten: {path}, {plot.draw(path)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
