"""python -m benchmarks.experts: a training step of a small mixture whose experts have LoRA adapters, by PEFT and by fastlora.

OLMoE and Mixtral with random weights, and the frozen model without adapters, whose backward is as long: what its embeddings give requires a gradient.
The losses must agree, then the steps are timed in turn (fastlora/choice/clock.py). `beyond` is a step's peak memory less that of the frozen
model's step: what the adapters cost. `FACTOR` and `SHARE` are the goals.
"""

import argparse
import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

import fastlora
from fastlora.choice.clock import HostClock, time_in_turn

from .device import peak_of_call
from .machine import this_machine

FACTOR, SHARE = 2.0, 0.5
"""How many times as fast as PEFT a step should be, and how much of the memory that PEFT's adapters cost ours may."""
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}  # of the loss, relative
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
    peft_beyond: int | None
    fastlora_beyond: int | None


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


def measure(name: str, dtype: str, setting: Setting, seconds: float) -> Row:
    """One model's row.

    Raises:
        RuntimeError: fastlora's loss is not PEFT's.
    """
    from peft import LoraConfig, get_peft_model

    frozen = _model(name, setting, dtype).requires_grad_(False)
    frozen.enable_input_require_grads()
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapter = LoraConfig(r=setting.r, target_modules=[], target_parameters=parameters, init_lora_weights=False)
    peer = get_peft_model(_model(name, setting, dtype), adapter)
    ours = fastlora.accelerate(copy.deepcopy(peer))
    ids = torch.randint(0, setting.vocabulary, (setting.batch, setting.tokens))

    def step(model: Any) -> Any:
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.item()

    expected, found = step(peer), step(ours)
    if not abs(found - expected) <= TOLERANCE[dtype] * abs(expected):
        raise RuntimeError(f"{name}, {dtype}: fastlora's loss is {found}, PEFT's {expected}: nothing is timed")
    models = {"peft": peer, "frozen": frozen, "fastlora": ours}
    runs = {way: partial(lambda model, _: step(model), model) for way, model in models.items()}
    timed = time_in_turn(runs, HostClock(CPU), seconds)
    peaks = {way: peak_of_call(run, CPU) for way, run in runs.items()}

    def beyond(way: str) -> int | None:
        peak, base = peaks[way], peaks["frozen"]
        return None if peak is None or base is None else peak - base

    frozen_time, peft_time, own_time = (timed[way].seconds for way in ("frozen", "peft", "fastlora"))
    factor = 1 / timed["fastlora"].ratio
    return Row(f"{name}, {dtype}", frozen_time, peft_time, own_time, factor, beyond("peft"), beyond("fastlora"))


def shown(rows: Sequence[Row]) -> str:
    """As a table for people."""
    head = ("a training step", "frozen", "PEFT", "fastlora", "times PEFT's speed", "beyond: PEFT", "fastlora", "share")
    cells: list[tuple[str, ...]] = [head]
    for row in rows:
        times = [f"{1e3 * one:.1f} ms" for one in (row.frozen, row.peft, row.fastlora)]
        theirs, ours = row.peft_beyond, row.fastlora_beyond
        mebibytes = ["" if one is None else f"{one / 2**20:.1f} MiB" for one in (theirs, ours)]
        share = "" if theirs is None or ours is None or theirs <= 0 else f"{ours / theirs:.2f}"
        cells.append((row.name, *times, f"{row.factor:.2f}", *mebibytes, share))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)


def main(arguments: Sequence[str] | None = None, setting: Setting = DEFAULT) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experts", description=__doc__)
    parser.add_argument("--dtype", nargs="+", choices=list(TOLERANCE), default=list(TOLERANCE))
    parser.add_argument("--seconds", type=float, default=5.0, help="to time each model in each dtype")
    given = parser.parse_args(arguments)
    rows = [measure(name, dtype, setting, given.seconds) for dtype in given.dtype for name in MODELS]
    print(this_machine(CPU).line())
    print(f"goals: {FACTOR} times PEFT's speed, a share of {SHARE} of the memory that its adapters cost")
    print(shown(rows))


if __name__ == "__main__":
    main()
