"""One training step of a small Llama: PEFT + transformers against fastlora as its training loop uses it, each in a fresh process.

fastlora is `accelerate(model, frozen=True)` and `LanguageModelLoss`; "unpacked" is the same without packed copies. The
processes take turns, so that all meet the same machine; each tells its own peak memory, counted from the end of its
imports. All start from the same weights and see the same batches, so that without dropout their losses agree.
"""

import multiprocessing
import statistics
import time
import traceback
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch

from fastlora import memory, steps
from fastlora.choice.clock import median_ratio, rounds_in_turn
from fastlora.data.rows import IGNORE

from .cases import StepCase
from .machine import measure_limits

VARIANTS = ("peft", "fastlora", "unpacked")
WARM_UP_STEPS = 1
LOSS_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


class StepError(RuntimeError):
    """A training process failed, or the two disagree about the loss."""


class Step(NamedTuple):
    seconds: float
    loss: float


class Closing(NamedTuple):
    """What a training process tells at its end."""

    peak_bytes: int | None  # beyond what its imports took; None where the system does not tell
    implementations: dict[str, int]  # layers by what computed them


@dataclass(frozen=True)
class StepResult:
    """The variants on the same steps; "fastlora" is with packed copies, "unpacked" without."""

    seconds: dict[str, float]  # median of a step
    ratio: float  # fastlora over peft, median over the rounds
    ratios: dict[str, float]  # each variant over peft
    losses: dict[str, list[float]]  # of every step, the first one before any update
    peak_bytes: dict[str, int | None]
    memory_ratios: dict[str, float]  # each variant's peak over peft's; empty where the system does not tell
    flops: int  # of the matrix products that a step must compute
    product_rate: float  # FLOPs a second in a large product, packed, of the case's dtype
    of_product_rate: dict[str, float]  # the part of that rate which the variant's median step reaches
    implementations: dict[str, int]  # layers by what computed them, fastlora's model
    rounds: int


def make_model(case: StepCase, variant: str, device: torch.device) -> Any:
    import peft
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=case.hidden,
        intermediate_size=case.intermediate,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads,
        vocab_size=case.vocabulary,
        max_position_embeddings=2 * case.tokens,
        use_cache=False,
    )
    with device:
        base: Any = AutoModelForCausalLM.from_config(config, dtype=case.dtype)
    # B starts random: from PEFT's zeros the first loss could not tell a wrong adapter from a right one.
    lora = peft.LoraConfig(
        r=case.R,
        lora_alpha=case.R,
        lora_dropout=case.dropout_p,
        target_modules="all-linear",
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    model: Any = peft.get_peft_model(base, lora).train()
    if variant != "peft":
        from fastlora.peft import accelerate

        accelerate(model, frozen=True, pack_budget=0 if variant == "unpacked" else None)
    return model


def make_batch(case: StepCase, number: int, device: torch.device) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(case.vocabulary, (case.batch, case.tokens), generator=generator).to(device)
    labels = ids.clone()
    labels[:, : case.prompt] = IGNORE
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _imported(device: torch.device) -> int | None:
    """The peak of this process once everything is imported."""
    import transformers.models.llama.modeling_llama  # noqa: F401

    import fastlora.language_model_loss
    import fastlora.peft  # noqa: F401

    return memory.peak(device)


def loss_function(model: Any, variant: str) -> Any:
    """What gives a batch's mean loss a labelled token, as each variant's user would compute it."""
    if variant == "peft":
        return lambda batch: model(**batch).loss
    return steps.mean_loss(model)


def _closing(model: Any, variant: str, device: torch.device, imported: int | None) -> Closing:
    peak = memory.peak(device)
    beyond = None if peak is None or imported is None else peak - imported
    if variant == "peft":
        return Closing(beyond, {})
    from fastlora.peft import report

    return Closing(beyond, dict(Counter(layer.implementation for layer in report(model))))


def _serve(pipe: Connection, case: StepCase, variant: str, device_name: str) -> None:
    """The life of a training process: a Step for every True that it is sent, at the first False its Closing."""
    try:
        device = torch.device(device_name)
        imported = _imported(device)
        model = make_model(case, variant, device)
        loss_of = loss_function(model, variant)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=1e-4)
        number = 0
        while pipe.recv():
            batch = make_batch(case, number, device)
            number += 1
            start = time.perf_counter()
            value = steps.take_step(optimizer, loss_of, batch)  # waits for the forward only
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            pipe.send(Step(time.perf_counter() - start, value))
        pipe.send(_closing(model, variant, device, imported))
    except Exception:
        pipe.send(StepError(f"{variant}, {case.name}:\n{traceback.format_exc()}"))


class Worker:
    """A training process; use it in a `with` block."""

    def __init__(self, case: StepCase, variant: str, device: torch.device) -> None:
        spawn = multiprocessing.get_context("spawn")  # a fork would inherit the parent's memory and its peak
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(theirs, case, variant, str(device)), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()

    def _ask(self, go_on: bool) -> Any:
        try:
            self._pipe.send(go_on)
            answer = self._pipe.recv()
        except (EOFError, BrokenPipeError):
            self._process.join()
            raise StepError(f"a training process ended with {self._process.exitcode} (out of memory?)") from None
        if isinstance(answer, StepError):
            raise answer
        return answer

    def step(self) -> Step:
        """One optimiser step; raises StepError, with its traceback, where the process failed."""
        answer: Step = self._ask(True)
        return answer

    def finish(self) -> Closing:
        """Peak memory and implementations, after the last step."""
        answer: Closing = self._ask(False)
        return answer


def require_agreement(case: StepCase, losses: dict[str, float]) -> None:
    """Raise StepError where the variants' first losses differ and dropout cannot be the reason."""
    peft = losses["peft"]
    for variant, ours in losses.items():
        if case.dropout_p == 0 and not abs(ours - peft) <= LOSS_TOLERANCE[case.dtype] * abs(peft):
            raise StepError(
                f"{case.name}: the first loss is {ours:.7g} with {variant}, {peft:.7g} with PEFT: not timed"
            )


def measure_step(case: StepCase, device: torch.device) -> StepResult:
    """Time `case.rounds` steps of each variant in turn, after a warm-up.

    Raises:
        StepError: a process failed, or without dropout the first losses differ.
    """
    rate = measure_limits(device, [case.dtype]).flops[case.dtype]
    with ExitStack() as processes:
        workers = {variant: processes.enter_context(Worker(case, variant, device)) for variant in VARIANTS}
        in_turn = rounds_in_turn(VARIANTS, lambda variant: workers[variant].step())
        rounds = [next(in_turn)]
        require_agreement(case, {variant: step.loss for variant, step in rounds[0].items()})
        rounds += islice(in_turn, WARM_UP_STEPS - 1 + case.rounds)
        closing = {variant: worker.finish() for variant, worker in workers.items()}
    seconds = {variant: [one[variant].seconds for one in rounds[WARM_UP_STEPS:]] for variant in VARIANTS}
    medians = {variant: statistics.median(times) for variant, times in seconds.items()}
    ratios = {variant: median_ratio(times, seconds["peft"]) for variant, times in seconds.items()}
    peaks = {variant: told.peak_bytes for variant, told in closing.items()}
    return StepResult(
        seconds=medians,
        ratio=ratios["fastlora"],
        ratios=ratios,
        losses={variant: [one[variant].loss for one in rounds] for variant in VARIANTS},
        peak_bytes=peaks,
        memory_ratios={variant: peak / peaks["peft"] for variant, peak in peaks.items() if peak and peaks["peft"]},
        flops=case.flops(),
        product_rate=rate,
        of_product_rate={variant: case.flops() / time / rate for variant, time in medians.items()},
        implementations=closing["fastlora"].implementations,
        rounds=case.rounds,
    )
