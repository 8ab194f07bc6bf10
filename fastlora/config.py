"""What to train, on what, and how: every option is checked when a TrainConfig is made, before anything is read or written."""

import re
from dataclasses import dataclass
from pathlib import Path

from fastlora.adapters import LARGEST_RANK, is_number
from fastlora.data.rows import TRUNCATIONS
from fastlora.typed import check_fields, is_finite, shown

DEFAULT_LR = {"lora": 2e-4, "full": 2e-5}
SCHEDULES = (
    *("linear", "cosine", "cosine_with_restarts", "polynomial"),
    *("constant", "constant_with_warmup", "inverse_sqrt"),
)
"""transformers' schedules that need neither arguments of their own nor a metric."""
MOST = 2**31 - 1  # of everything that is counted, bytes aside
SEEDS = 2**32  # numpy takes no larger one
POLYNOMIAL_END = 1e-7  # the learning rate that transformers' polynomial schedule ends at


@dataclass
class TrainConfig:
    """What to train, on what, and how; the names are PEFT's and transformers'.

    Raises:
        TypeError: an option is of another type than the one written here; the message names it.
        ValueError: an option is out of range; the message names it.
    """

    model: str | Path  # folder or hub id
    data: str | Path  # JSONL
    output: str | Path
    method: str = "lora"  # lora | full
    r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.05
    use_rslora: bool = False
    target_modules: str | list[str] = "all-linear"  # as PEFT: a str is all-linear or a regular expression
    seed: int = 0
    epochs: int = 3
    max_steps: int | None = None  # optimiser steps, in place of epochs
    batch_size: int = 8  # rows a process takes at once
    gradient_accumulation_steps: int = 1
    max_length: int = 512  # tokens a row may have
    truncation: str = "prompt"  # what a longer row loses: the prompt's oldest, the completion's end, or all (drop)
    lr: float | None = None  # None: 2e-4 for lora, 2e-5 for full
    lr_scheduler_type: str = "linear"  # one of SCHEDULES
    warmup_ratio: float = 0.03  # of the steps, rounded up, but for the last
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0  # 0: no clipping
    dtype: str = "auto"  # auto | float32 | bfloat16: "full" computes in it under autocast, and saves in it
    gradient_checkpointing: bool = False
    save_steps: int = 50
    resume: bool = False  # from the newest checkpoint; where there is none, from the start
    resume_from: int | None = None  # the step of an older checkpoint, which later ones make room for; implies resume
    overwrite: bool = False
    accelerate: bool = True  # run LoRA and frozen layers by fastlora; False leaves them to PEFT and torch
    pack_budget: int | None = None  # bytes for packed copies of frozen weights on a CPU; None: 1/16 of its memory
    compile: bool = False  # each of the model's layers through torch.compile

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("model", "data", "output", "target_modules"):
            if not getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)!r} is empty")
        if self.method not in DEFAULT_LR:
            raise ValueError(f"method={shown(self.method)}: expected lora or full")
        if self.method == "full" and self.target_modules != "all-linear":
            raise ValueError(
                f"target_modules={shown(self.target_modules)}: method=full trains the whole model, expected none"
            )
        if self.lr is None:
            self.lr = DEFAULT_LR[self.method]
        self._check_numbers()
        if self.truncation not in TRUNCATIONS:
            raise ValueError(f"truncation={shown(self.truncation)}: expected one of {', '.join(TRUNCATIONS)}")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"dtype={shown(self.dtype)}: expected auto, float32 or bfloat16")
        if self.lr_scheduler_type not in SCHEDULES:
            raise ValueError(
                f"lr_scheduler_type={shown(self.lr_scheduler_type)}: expected one of {', '.join(SCHEDULES)}; others need a"
                " metric, or arguments that there are no options for"
            )
        if self.lr_scheduler_type == "polynomial" and self.lr <= POLYNOMIAL_END:
            raise ValueError(f"lr={self.lr}: polynomial ends at {POLYNOMIAL_END}, expected more")
        if isinstance(self.target_modules, str):
            try:
                re.compile(self.target_modules)
            except re.error as error:
                raise ValueError(f"target_modules={self.target_modules!r}: no regular expression: {error}") from None
        if self.resume_from is not None:
            self.resume = True
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite exclude each other: expected one of them")
        self.model = str(self.model)
        if Path(self.model).is_dir():
            self.model = str(Path(self.model).resolve())  # the adapter's files name it

    def _check_numbers(self) -> None:
        counts = ("r", "epochs", "max_steps", "batch_size", "gradient_accumulation_steps", "save_steps", "resume_from")
        for name in (*counts, "max_length"):
            value, least = getattr(self, name), 2 if name == "max_length" else 1
            most = LARGEST_RANK if name == "r" else MOST
            if value is not None and not least <= value <= most:
                what = ", a token of the prompt and one of the completion" if name == "max_length" else ""
                wanted = f"at least {least}{what}" if value < least else f"at most {most}"
                raise ValueError(f"{name}={shown(value)}: expected {wanted}")
        for name in ("lora_dropout", "warmup_ratio"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={shown(getattr(self, name))}: expected a number from 0 to below 1")
        for name in ("lr", "lora_alpha", "weight_decay", "max_grad_norm"):
            if not (is_finite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name}={shown(getattr(self, name))}: expected a finite number, 0 or more")
        if not is_number(self.lora_alpha):
            raise ValueError(f"lora_alpha={shown(self.lora_alpha)}: expected a number that float32 holds")
        if not 0 <= self.seed < SEEDS:
            raise ValueError(f"seed={shown(self.seed)}: expected 0 to {SEEDS - 1}")
        if self.pack_budget is not None and not 0 <= self.pack_budget < 2**63:
            raise ValueError(
                f"pack_budget={shown(self.pack_budget)}: expected a number of bytes, 0 for no packed copies"
            )
