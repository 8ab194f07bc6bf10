"""A LoRA step over a base in 4 bits or 8, by PEFT and bitsandbytes and by fastlora: its time, and its peak memory in a process of its own each."""

import logging
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastlora.memory import resident

from .device import reset_peak
from .goals import Goal
from .session import Line, Session, seconds_of
from .small_llama import ACCELERATED, ROWS, SMALL_HEAD, TOKENS, TOLERANCE, base_model, make_batch, step, step_times
from .step import own_process, require_agreement

R = 16
FASTER, MEMORY = 2.0, 1.0
KINDS = ("NF4", "int8")
WAYS = ("peft", "fastlora")


def _model(folder: Path, kind: str, dtype: str, way: str) -> Any:
    import peft
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    import fastlora

    # A line a layer and call, of each cast to float16, which would be timed as well.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    compute = getattr(torch, dtype)
    if kind == "NF4":  # as QLoRA has it
        four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": compute}
        quantised = BitsAndBytesConfig(load_in_4bit=True, **four)
    else:
        quantised = BitsAndBytesConfig(load_in_8bit=True)
    base: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=compute, quantization_config=quantised)
    torch.manual_seed(1)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=R, target_modules="all-linear", init_lora_weights=False)
    model: Any = peft.get_peft_model(base, config).train()
    return model if way == "peft" else fastlora.accelerate(model, **ACCELERATED)


def _batch() -> dict[str, torch.Tensor]:
    return make_batch(SMALL_HEAD["vocab_size"], TOKENS, TOKENS // 2)


def _bytes_of(folder: Path, kind: str, dtype: str, way: str) -> int | None:
    """What this process holds at the peak of a step beyond its imports: the model, too, and what fastlora keeps of it; not what loading took."""
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    try:
        imported = resident("VmRSS")
    except OSError:
        return None
    model, batch = _model(folder, kind, dtype, way), _batch()
    step(model, batch)
    try:
        reset_peak()
    except (AttributeError, OSError):
        return None
    step(model, batch)
    return resident("VmHWM") - imported


def _steps(session: Session, kind: str, dtype: str) -> Iterator[Goal]:
    case, batch = f"{ROWS} x {TOKENS} tokens, LoRA r {R}", _batch()
    found: dict[str, int | None] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base_model(SMALL_HEAD, dtype).save_pretrained(folder)
        models = {way: _model(folder, kind, dtype, way) for way in WAYS}
        losses = {way: step(model, batch) for way, model in models.items()}
        require_agreement(losses, TOLERANCE[dtype], kind)
        times = step_times(session, models, batch)
        yield Goal(
            f"{kind} base: times PEFT's and bitsandbytes' speed, {dtype}", case, dtype, FASTER, 1 / times["fastlora"].ratio, 1.0,
            at_least=True, seconds=seconds_of(times),
        )  # fmt: skip
        for way in WAYS:
            with own_process() as process:
                found[way] = process.submit(_bytes_of, folder, kind, dtype, way).result()
    ours, theirs = found["fastlora"], found["peft"]
    if ours and theirs:
        yield Goal(f"{kind} base: part of their peak memory, {dtype}", case, dtype, MEMORY, ours / theirs, 1.0)


def quantised_lines() -> dict[str, Line]:
    """A line a kind of weight and dtype, by its title."""
    return {f"{kind} base, {dtype}": partial(_steps, kind=kind, dtype=dtype) for kind in KINDS for dtype in TOLERANCE}
