"""A training step, of a small Llama: PEFT + transformers against fastlora as its training loop uses it, each in a fresh process.

fastlora is `accelerate(model, frozen=True)` and `LanguageModelLoss`; "unpacked" is the same without packed copies. The
processes take turns, so that all meet the same machine; each tells its own peak memory, counted from the end of its
imports. All start from the same weights and see the same batches, so that without dropout their losses agree.

Of a model that fills a card there is one process and one set of weights, as PEFT runs it and then accelerated: variants follow one another,
each is warmed up, then timed, and the median kept. Nothing is downloaded.
"""

import functools
import gc
import itertools
import multiprocessing
import statistics
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch

import fastlora
from fastlora import memory, steps
from fastlora.choice.clock import Run, median_ratio, rounds_in_turn, time_in_turn, wait_for
from fastlora.data.rows import IGNORE

from .cases import StepCase, dtype_name
from .device import captured, clock_of
from .machine import product_rate
from .session import EAGER, GRAPH, Line, Session, first_line

VARIANTS = ("peft", "fastlora", "unpacked")
COMPILED = "blocks compiled"
STEP_SECONDS = 0.5  # of timing there, a round: time_in_turn makes at least five rounds
WARM_UP_STEPS = 1
LOSS_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


class StepError(RuntimeError):
    """A training process failed, or the two disagree about the loss."""


class Step(NamedTuple):
    seconds: float
    loss: float
    peak_bytes: int | None  # of the process so far, beyond what its imports took; None where the system does not tell
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


def make_optimizer(model: Any, **options: Any) -> torch.optim.Optimizer:
    """Of what is trained."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trainable, lr=1e-4, **options)


def make_batch(case: StepCase, number: int, device: torch.device) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(case.vocabulary, (case.batch, case.tokens), generator=generator).to(device)
    labels = ids.clone()
    labels[:, : case.prompt] = IGNORE
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def loss_function(model: Any, variant: str) -> Any:
    """What gives a batch's mean loss a labelled token, as each variant's user would compute it."""
    if variant == "peft":
        return lambda batch: model(**batch).loss
    return steps.mean_loss(model)


@functools.cache
def train(case: StepCase, variant: str, device: torch.device) -> Iterator[Step]:
    """Steps without end, in the process that is the variant's own: the same ones go on wherever it asks."""
    import transformers.models.llama.modeling_llama  # noqa: F401

    from fastlora.peft import report

    imported = memory.peak(device)
    model = make_model(case, variant, device)
    loss_of, optimizer = loss_function(model, variant), make_optimizer(model)
    for number in itertools.count():
        batch = make_batch(case, number, device)
        start = time.perf_counter()
        loss = steps.take_step(optimizer, loss_of, batch)  # waits for the forward only
        wait_for(device)
        seconds, peak = time.perf_counter() - start, memory.peak(device)
        beyond = None if peak is None or imported is None else peak - imported
        layers = [] if variant == "peft" else report(model)
        yield Step(seconds, loss, beyond, dict(Counter(layer.implementation for layer in layers)))


def _next_step(*given: Any) -> Step:
    return next(train(*given))


def own_process() -> ProcessPoolExecutor:
    """A process for one way to train, in a `with` block; a fork would inherit this one's memory and its peak."""
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


class Worker(ExitStack):
    """A training process, which begins its first step at once; use it in a `with` block."""

    def __init__(self, case: StepCase, variant: str, device: torch.device) -> None:
        super().__init__()
        self._name, self._given = f"{variant}, {case.name}", (case, variant, device)
        self._process = self.enter_context(own_process())
        self._begun: Future[Step] | None = self._process.submit(_next_step, *self._given)

    def step(self) -> Step:
        """A step of the optimiser; raises StepError, with its traceback, where the process failed."""
        try:
            step, self._begun = self._begun or self._process.submit(_next_step, *self._given), None
            return step.result()
        except BrokenProcessPool as error:
            raise StepError(f"{self._name}: {error} (out of memory?)") from None
        except Exception as error:
            raise StepError(f"{self._name}: {error!r}\n{''.join(traceback.format_exception(error))}") from None


def require_agreement(losses: Mapping[str, float], tolerance: float, what: str) -> None:
    """Raise StepError where one's first loss is not that of the one that comes first. tolerance: relative."""
    (baseline, right), *others = losses.items()
    for name, loss in others:
        if not abs(loss - right) <= tolerance * abs(right):
            raise StepError(f"{what}: the first loss of {name} is {loss:.7g}, of {baseline} {right:.7g}: not timed")


def compare(seconds: Mapping[str, Sequence[float]], peaks: Mapping[str, int | None]) -> tuple[dict[str, float], ...]:
    """Of each step's seconds the medians, and those of the ratios to the first one's; the ratios of bytes, none where the system does not tell."""
    first, least = next(iter(seconds.values())), next(iter(peaks.values()))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratios = {name: median_ratio(times, first) for name, times in seconds.items()}
    return medians, ratios, {name: peak / least for name, peak in peaks.items() if peak and least}


def step_lines(cases: Sequence[StepCase]) -> dict[str, Line]:
    """The rows are {"case": StepCase, "result": StepResult}."""

    def line(session: Session, case: StepCase) -> Iterator[dict[str, Any]]:
        yield {"case": case, "result": measure_step(case, session.device)}

    return {f"{case.name}, {dtype_name(case.dtype)}": functools.partial(line, case=case) for case in cases}


def measure_step(case: StepCase, device: torch.device) -> StepResult:
    """Time `case.rounds` steps of each variant in turn, after a warm-up.

    Raises:
        StepError: a process failed, or without dropout the first losses differ.
    """
    rate = product_rate(device, case.dtype)
    with ExitStack() as processes:
        workers = {variant: processes.enter_context(Worker(case, variant, device)) for variant in VARIANTS}
        in_turn = rounds_in_turn(VARIANTS, lambda variant: workers[variant].step())
        rounds = [next(in_turn)]
        if case.dropout_p == 0:  # else the masks differ, and so do the losses
            first = {variant: step.loss for variant, step in rounds[0].items()}
            require_agreement(first, LOSS_TOLERANCE[case.dtype], case.name)
        rounds += itertools.islice(in_turn, WARM_UP_STEPS - 1 + case.rounds)
    seconds = {variant: [one[variant].seconds for one in rounds[WARM_UP_STEPS:]] for variant in VARIANTS}
    peaks = {variant: step.peak_bytes for variant, step in rounds[-1].items()}
    medians, ratios, memory_ratios = compare(seconds, peaks)
    return StepResult(
        seconds=medians,
        ratio=ratios["fastlora"],
        ratios=ratios,
        losses={variant: [one[variant].loss for one in rounds] for variant in VARIANTS},
        peak_bytes=peaks,
        memory_ratios=memory_ratios,
        flops=case.flops(),
        product_rate=rate,
        of_product_rate={variant: case.flops() / time / rate for variant, time in medians.items()},
        implementations=rounds[-1]["fastlora"].implementations,
        rounds=case.rounds,
    )


def measure_model(case: StepCase, device: torch.device, notes: list[str]) -> Iterator[tuple[str, float]]:
    """(variant, seconds a step): PEFT's own, accelerated, with each block through torch.compile, and as one CUDA graph.

    A variant that does not fit, compile or capture is left out with a note.
    """
    from transformers import masking_utils

    # That rows hold one text each transformers asks the card in each step; in a capture, where it cannot, it makes a mask for packed rows,
    # which keeps flash attention out. Here it takes it for known.
    unpacked = mock.patch.object(masking_utils, "find_packed_sequence_indices", lambda _: None)
    if device.type == "cuda":
        held = torch.cuda.get_device_properties(device).total_memory
        if held < 2 * case.weight_bytes():  # activations and their gradients take as much again
            notes.append(
                f"{case.name}: skipped: needs {2 * case.weight_bytes() / 2**30:.0f} GiB, this card has {held / 2**30:.0f}"
            )
            return
    model = make_model(case, "peft", device)
    batch = make_batch(case, 0, device)
    del batch["attention_mask"]  # all ones, which transformers would ask the card about in each step
    optimizer = make_optimizer(model, fused=True, capturable=device.type == "cuda")
    clock = clock_of(device)
    for variant in ("peft", EAGER, COMPILED, GRAPH):
        try:
            step = _prepare(variant, model, batch, optimizer)
            with unpacked:
                step(0)
                run = captured(step, device) if variant == GRAPH else step
                seconds = time_in_turn({variant: run}, clock, STEP_SECONDS * case.rounds)[variant].seconds
            yield variant, seconds
        except RuntimeError as error:
            what = "skipped" if isinstance(error, torch.OutOfMemoryError) else "fails"
            notes.append(f"{case.name}, {variant}: {what}: {first_line(error)}")
        optimizer.zero_grad(set_to_none=True)
        gc.collect()  # a cycle that holds a step's activations would leave no room for the next variant's
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _prepare(variant: str, model: Any, batch: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> Run:
    if variant == EAGER:
        fastlora.accelerate(model, frozen=True)
    for layer in model.get_base_model().model.layers:
        layer._compiled_call_impl = None
        if variant == COMPILED:
            layer.compile(dynamic=False)
    loss_of = loss_function(model, "peft" if variant in ("peft", GRAPH) else "fastlora")

    def step(_: int) -> None:
        loss_of(batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
