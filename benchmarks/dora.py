"""What DoRA's factors add to a training step of LoRA, by fastlora and by PEFT: all four models timed in turn."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from .goals import Goal
from .session import Line, Session, seconds_of
from .small_llama import ACCELERATED, ROWS, SMALL_HEAD, TOKENS, TOLERANCE, base_model, make_batch, step, step_times
from .step import require_agreement

R = 16
OVER_LORA = 1.15
VARIANTS = ("LoRA", "DoRA")


def _model(variant: str, dtype: str, accelerated: bool) -> Any:
    import peft

    import fastlora

    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=R,
        target_modules="all-linear",
        use_dora=variant == "DoRA",
        init_lora_weights=False,  # from PEFT's zeros the loss could not tell a wrong adapter from a right one
    )
    model: Any = peft.get_peft_model(base_model(SMALL_HEAD, dtype), config)
    return fastlora.accelerate(model.train(), **ACCELERATED) if accelerated else model.train()


def _steps(session: Session, dtype: str) -> Iterator[Goal]:
    batch = make_batch(SMALL_HEAD["vocab_size"], TOKENS, TOKENS // 2)
    models: dict[str, Any] = {}
    for variant in VARIANTS:
        own = {f"{who} {variant}": _model(variant, dtype, who == "fastlora") for who in ("peft", "fastlora")}
        require_agreement({name: step(model, batch) for name, model in own.items()}, TOLERANCE[dtype], variant)
        models |= own
    times = step_times(session, models, batch)
    ours, theirs = (times[f"{who} DoRA"].ratio / times[f"{who} LoRA"].ratio for who in ("fastlora", "peft"))
    yield Goal(
        f"DoRA r {R}: a step over LoRA's, {dtype}", f"{ROWS} x {TOKENS} tokens", dtype, OVER_LORA, ours, theirs, seconds=seconds_of(times)
    )  # fmt: skip


def dora_lines() -> dict[str, Line]:
    """A line a dtype, by its title."""
    return {f"DoRA over LoRA, {dtype}": partial(_steps, dtype=dtype) for dtype in TOLERANCE}
