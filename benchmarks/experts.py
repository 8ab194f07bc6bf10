"""python -m benchmarks.experts: a training step of a small mixture whose experts have LoRA adapters, by PEFT and by fastlora.

OLMoE and Mixtral with random weights, and the frozen model without adapters, whose backward is as long: what its embeddings give requires a gradient.
The losses must agree, then the steps are timed in turn (fastlora/choice/clock.py), of fastlora with all that `accelerate` can do, and with its
experts alone. `beyond` is the peak memory of a step with the experts alone less that of the frozen model's step, in a process of its own each: what
the adapters cost. `FACTOR` and `SHARE` are the goals.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

import fastlora
from fastlora.choice.clock import HostClock, Run, time_in_turn

from .device import peak_of_call
from .goals import Goal
from .machine import this_machine
from .session import Line, Session
from .small_llama import ACCELERATED, TOLERANCE
from .step import own_process, require_agreement

FACTOR, SHARE = 2.0, 0.5
"""How many times as fast as PEFT a step should be, and how much of the memory that PEFT's adapters cost ours may."""
ALONE = "fastlora, experts alone"
OPTIONS: dict[str, dict[str, bool]] = {"fastlora": ACCELERATED, ALONE: {}}
"""Of `accelerate`, in the ways that call it."""
TRAINED = ("peft", *OPTIONS)
WAYS = ("peft", "frozen", *OPTIONS)
SECONDS = 5.0  # of timing, a model in a dtype
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Setting:
    """The sizes of a mixture and of its batch."""

    hidden: int = 512
    inner: int = 1024
    layers: int = 2
    experts: int = 8
    chosen: int = 2  # experts of a token
    vocabulary: int = 1024
    batch: int = 8
    tokens: int = 128
    r: int = 16


DEFAULT = Setting()


class Row(NamedTuple):
    """Of one model in one dtype: seconds, and bytes where the system tells them."""

    name: str
    frozen: float
    peft: float
    fastlora: float
    factor: float  # PEFT's time over fastlora's, the median over the rounds
    alone: float  # the same, of the experts alone
    peft_beyond: int | None
    fastlora_beyond: int | None

    def share(self) -> float | None:
        """The part of the memory that PEFT's adapters cost; None where the system does not tell it."""
        theirs, ours = self.peft_beyond, self.fastlora_beyond
        return None if theirs is None or ours is None or theirs <= 0 else ours / theirs


def _olmoe(sizes: dict[str, Any], experts: int) -> Any:
    from transformers import OlmoeConfig, OlmoeForCausalLM

    return OlmoeForCausalLM(OlmoeConfig(**sizes, num_experts=experts))


def _mixtral(sizes: dict[str, Any], experts: int) -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=experts))


MODELS = {"olmoe": _olmoe, "mixtral": _mixtral}


def _model(name: str, setting: Setting, dtype: str) -> Any:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": setting.hidden,
        "intermediate_size": setting.inner,
        "num_hidden_layers": setting.layers,
        "num_experts_per_tok": setting.chosen,
        "vocab_size": setting.vocabulary,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0),
    }
    return MODELS[name](sizes, setting.experts).to(getattr(torch, dtype))


def _way(name: str, dtype: str, setting: Setting, way: str) -> Any:
    from peft import LoraConfig, get_peft_model

    model = _model(name, setting, dtype)
    if way == "frozen":
        model.requires_grad_(False).enable_input_require_grads()
        return model
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapter = LoraConfig(r=setting.r, target_modules=[], target_parameters=parameters, init_lora_weights=False)
    torch.manual_seed(1)
    peer = get_peft_model(model, adapter)
    return fastlora.accelerate(peer, **OPTIONS[way]) if way in OPTIONS else peer


def _step(model: Any, setting: Setting) -> float:
    ids = torch.randint(setting.vocabulary, (setting.batch, setting.tokens), generator=torch.Generator().manual_seed(2))
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return float(loss.detach())


def _bytes_of(name: str, dtype: str, setting: Setting, way: str) -> int | None:
    """At the peak of one warm step of this process, beyond what was there before it."""
    model = _way(name, dtype, setting, way)
    _step(model, setting)
    return peak_of_call(lambda _: _step(model, setting), CPU)


def measure(name: str, dtype: str, setting: Setting, seconds: float) -> Row:
    """One model's row.

    Raises:
        StepError: fastlora's loss is not PEFT's.
    """
    models = {way: _way(name, dtype, setting, way) for way in WAYS}
    losses = {way: _step(models[way], setting) for way in TRAINED}
    require_agreement(losses, TOLERANCE[dtype], f"{name}, {dtype}")
    runs: dict[str, Run] = {
        way: partial(lambda model, _: _step(model, setting), model) for way, model in models.items()
    }
    timed = time_in_turn(runs, HostClock(CPU), seconds)
    peaks: dict[str, int | None] = {}
    for way in ("peft", "frozen", ALONE):
        with own_process() as process:
            peaks[way] = process.submit(_bytes_of, name, dtype, setting, way).result()

    def beyond(way: str) -> int | None:
        peak, base = peaks[way], peaks["frozen"]
        return None if peak is None or base is None else peak - base

    frozen_time, peft_time, own_time = (timed[way].seconds for way in ("frozen", "peft", "fastlora"))
    factor, alone = (1 / timed[way].ratio for way in OPTIONS)
    return Row(f"{name}, {dtype}", frozen_time, peft_time, own_time, factor, alone, beyond("peft"), beyond(ALONE))


def expert_lines(setting: Setting = DEFAULT) -> dict[str, Line]:
    """A line a model and dtype, by its title."""

    def line(_: Session, name: str, dtype: str) -> Iterator[Goal]:
        row, case = (
            measure(name, dtype, setting, SECONDS),
            f"{name}, {setting.experts} experts, {setting.batch} x {setting.tokens} tokens",
        )
        seconds = {"frozen": row.frozen, "peft": row.peft, "fastlora": row.fastlora}
        yield Goal(
            f"experts, LoRA r {setting.r}: times PEFT's step's speed, {dtype}", case, dtype, FACTOR, row.factor, 1.0,
            at_least=True, seconds=seconds,
        )  # fmt: skip
        share = row.share()
        if share is not None:
            yield Goal(
                f"experts, LoRA r {setting.r}: part of what PEFT's adapters take, {dtype}",
                case,
                dtype,
                SHARE,
                share,
                1.0,
            )

    return {
        f"experts, {name}, {dtype}": partial(line, name=name, dtype=dtype) for dtype in TOLERANCE for name in MODELS
    }


def shown(rows: Sequence[Row]) -> str:
    """As a table for people."""
    head = (
        "a training step",
        "frozen",
        "PEFT",
        "fastlora",
        "times PEFT's speed",
        "experts alone",
        "beyond: PEFT",
        "fastlora",
        "share",
    )
    cells: list[tuple[str, ...]] = [head]
    for row in rows:
        times = [f"{1e3 * one:.1f} ms" for one in (row.frozen, row.peft, row.fastlora)]
        mebibytes = ["" if one is None else f"{one / 2**20:.1f} MiB" for one in (row.peft_beyond, row.fastlora_beyond)]
        share = row.share()
        cells.append(
            (
                row.name,
                *times,
                f"{row.factor:.2f}",
                f"{row.alone:.2f}",
                *mebibytes,
                "" if share is None else f"{share:.2f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)


def main(arguments: Sequence[str] | None = None, setting: Setting = DEFAULT) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experts", description=__doc__)
    parser.add_argument("--dtype", nargs="+", choices=list(TOLERANCE), default=list(TOLERANCE))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="to time each model in each dtype")
    given = parser.parse_args(arguments)
    rows = [measure(name, dtype, setting, given.seconds) for dtype in given.dtype for name in MODELS]
    print(this_machine(CPU).line())
    print(f"goals: {FACTOR} times PEFT's speed, a share of {SHARE} of the memory that its adapters cost")
    print(shown(rows))


if __name__ == "__main__":
    main()
