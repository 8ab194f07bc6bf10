"""The goals of a whole training step: `trainer.py`'s ways on a real model and real rows, or on random weights of SmolLM2-135M's shape.

`fastlora train`, over Trainer and PEFT     4 times the speed in bfloat16, 2 in float32; 0.45 of the memory
inside Trainer, after `accelerate`          3 times, 1.7 times; 0.45 of the memory
a step of LoRA over one of full training    0.60 of the time, at widths 576 and 2,048
"""

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .goals import Goal
from .session import Line, Session
from .trainer import WAYS, Setting, measure

INSIDE, COMMAND, PLAIN, COMPILED, FULL = "fuse", "train", "trainer", "compiled", "full"  # of WAYS
SPEEDS = {"bfloat16": {COMMAND: 4.0, INSIDE: 3.0}, "float32": {COMMAND: 2.0, INSIDE: 1.7}}  # at least, of PLAIN's
MEMORY, OVER_FULL = 0.45, 0.60  # at most
STEPS = 4  # a process, the first one not timed
ROUNDS = 1
SIZES: dict[str, dict[str, Any]] = {
    "SmolLM2-135M's shape": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152,
                             "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
    "4 layers of 2,048": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 4, "vocab_size": 8192,
                          "num_attention_heads": 32, "num_key_value_heads": 4},
}  # fmt: skip
NARROW, WIDE = SIZES
DIALOGUES = (1, 2, 3, 2, 1, 3, 2, 2)  # of each row


@dataclass(frozen=True)
class Material:
    """What is trained: a model, by its folder or hub id, on the first rows of a file. None: random weights, the demo's dialogues."""

    model: str | None = None
    data: Path | None = None
    rows: int = len(DIALOGUES)

    def batch(self) -> list[dict[str, Any]]:
        if self.data is not None:
            with self.data.open(encoding="utf-8") as lines:
                return [json.loads(line) for line, _ in zip(lines, range(self.rows), strict=False)]
        from fastlora.demo.tasks import generate

        drawn = iter(generate("summarization", sum(DIALOGUES), 0))
        rows = ([next(drawn) for _ in range(count)] for count in DIALOGUES)
        return [{"prompt": "\n\n".join(one.prompt for one in row), "completion": row[-1].completion} for row in rows]


def save_random(name: str, folder: Path, **more: Any) -> None:
    """A Llama of one of SIZES, but for what `more` says, with the shipped tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    from fastlora.demo import BASE_MODEL

    torch.manual_seed(0)
    tokenizer: Any = AutoTokenizer.from_pretrained(BASE_MODEL)
    tokens = {which: getattr(tokenizer, which) for which in ("bos_token_id", "eos_token_id", "pad_token_id")}
    AutoModelForCausalLM.from_config(LlamaConfig(**{**SIZES[name], **tokens, **more})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def step_lines(material: Material) -> dict[str, Line]:
    """The whole steps that have goals on a CPU, by their titles."""
    name = NARROW if material.model is None else Path(material.model).name
    lines: dict[str, Line] = {}
    for dtype in SPEEDS:
        ways = tuple(WAYS) if dtype == "bfloat16" else (PLAIN, INSIDE, COMMAND, FULL)
        lines[f"whole step, {name}, {dtype}"] = partial(_steps, name=name, material=material, dtype=dtype, ways=ways)
    wide = partial(_steps, name=WIDE, material=Material(data=material.data), dtype="bfloat16", ways=(INSIDE, FULL))
    return {**lines, f"whole step, {WIDE}, bfloat16": wide}


def _steps(session: Session, name: str, material: Material, dtype: Any, ways: Sequence[str]) -> Iterator[Goal]:
    with tempfile.TemporaryDirectory() as folder:
        model = material.model or folder
        if material.model is None:
            save_random(name, Path(folder))
        found = measure(Setting(model, material.batch(), STEPS, dtype), ROUNDS, ways)
    yield from goals_of(name, dtype, dict(zip(ways, found, strict=True)))


def goals_of(name: str, dtype: str, found: dict[str, dict[str, Any]]) -> Iterator[Goal]:
    """The rows of a model's steps: `found` has, of each way, what `trainer.measure` says of it."""
    seconds = {way: one["seconds"] for way, one in found.items()}
    of_case = partial(Goal, case=name, numbers=dtype)
    if PLAIN in found:
        rates = {way: one["tokens_per_second"] for way, one in found.items()}
        rivals = {title: rates[way] for way, title in ((COMPILED, "peft compiled"), (FULL, "full")) if way in rates}
        yield of_case(
            f"tokens a second in a training step, {dtype}", goal=None, ours=rates[COMMAND], peft=rates[PLAIN], unit="tokens/s",
            seconds=seconds, rivals=rivals,
        )  # fmt: skip
        for way, least in SPEEDS[dtype].items():
            what, speed = f"{_short(way)}: times Trainer + PEFT's speed, {dtype}", 1 / found[way]["ratio"]
            yield of_case(what, goal=least, ours=speed, peft=1.0, at_least=True)
            part = found[way]["memory_ratio"]
            if part is not None:
                what = f"{_short(way)}: part of Trainer + PEFT's peak memory, {dtype}"
                yield of_case(what, goal=MEMORY, ours=part, peft=1.0)
        for way in [way for way in found if way not in (PLAIN, COMPILED, FULL, *SPEEDS[dtype])]:
            what = f"{_short(way)}: part of Trainer + PEFT's time, {dtype}"
            yield of_case(what, goal=None, ours=found[way]["ratio"], peft=1.0)
    over = seconds[INSIDE] / seconds[FULL]
    peft = seconds[PLAIN] / seconds[FULL] if PLAIN in found else None
    yield of_case(f"a LoRA step over one of full fine-tuning, {dtype}", goal=OVER_FULL, ours=over, peft=peft)


def _short(way: str) -> str:
    return WAYS[way].replace("`", "").removeprefix("with fastlora.").removesuffix(" in their place")
