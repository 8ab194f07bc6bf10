"""The goals on a card, and how near fastlora comes to each, launched by Python (eager) and replayed as a CUDA graph.

one layer, forward and backward     8192 rows, bfloat16, dropout 0.1: percent over the frozen layer's own forward and dx
the forward's main kernel           percent over cuBLAS's bare product
decode, 8 adapters mixed            part of the bandwidth bound: the least bytes of a call over what this card copies or reads, measured in the run
prefill, 8 adapters mixed           percent over the frozen layer
errors                              against float64, over those of PEFT's own layer
Llama-3-8B, random weights          tokens a second of whole training steps (model.py)
the seven layers of one block       percent over the frozen layers; q, k and v share their x, gate and up theirs

A line of the table is measured at a time, so that one that fails, or breaks the process, takes no other with it.
"""

import gc
import math
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import torch

from fastlora import ops
from fastlora.choice import clock
from fastlora.choice.clock import Clock, Run, Timing

from . import cases
from .cases import BlockCase, Case, LoRALinearCase, MultiLoRACase, StepCase
from .device import captured, clock_of, graph_pool, main_kernel, require_no_wait
from .gate import CaseError, errors_beside_peft, require_right
from .goals import Goal
from .machine import measure_bandwidths
from .model import measure_model
from .rivals import FASTLORA, build, build_for_card, choice

EAGER, GRAPH = "eager", "CUDA graph"
SECONDS = 2.0  # of timing, a line and mode
LAYER_GOALS = {(4096, 16): (5.0, 12.0), (8192, 16): (3.0, 6.0), (4096, 64): (8.0, 16.0)}  # (K, R): percent, first step
BLOCK_GOAL, KERNEL_GOAL, PREFILL_GOAL = (4.0, 8.0), (1.0, 5.0), (3.0, 8.0)
DECODE_GOAL = (80.0, 60.0)  # percent of the bound
MODEL_GOAL = (15_000.0, 12_500.0)  # tokens a second
KERNEL_ROUNDS, KERNEL_CALLS = 7, 5
HUNG_CODE = 3  # of a process that is at its end: another one can go on from the record
OUT_OF_TIME = "not timed: out of time"
# PEFT's mixed batches index by Python lists, which are copied to the card in each call: no graph can hold that.
UNCAPTURABLE = {("multi_lora", "peft")}


Result = TypeVar("Result")


class BrokenProcessError(RuntimeError):
    """After an error the device computes nothing more in this process. `culprit`: what is to be left out from now on."""

    def __init__(self, culprit: str, error: Exception) -> None:
        super().__init__(f"{culprit}: {first_line(error)}")
        self.culprit = culprit


@dataclass
class Session:
    """Where lines are measured, and what they have to say beside figures."""

    device: torch.device
    notes: list[str]
    refused: frozenset[str] = frozenset()  # rivals and implementations, or those in a mode, that broke a process before
    bare: bool = False  # the frozen layer and fastlora's implementations alone, as CUDA graphs

    def may_run(self, name: str, mode: str) -> bool:
        return not self.refused & {name, f"{name}, {mode}"}

    def attempt(
        self, what: str, name: str, function: Callable[..., Result], *arguments: Any, mode: str = EAGER
    ) -> Result | None:
        """function(*arguments); where it fails, a note and None.

        Raises:
            BrokenProcessError: the device does not answer any more.
        """
        try:
            result = function(*arguments)
            clock.wait_for(self.device)
            return result
        except CaseError as error:
            self.notes.append(str(error))
        except Exception as error:  # whatever it is, the other rivals can do without this one
            if not answers(self.device):
                raise BrokenProcessError(name if mode == EAGER else f"{name}, {mode}", error) from error
            self.notes.append(f"{what}: {name} fails: {first_line(error)}")
        return None


def answers(device: torch.device) -> bool:
    """Whether the device still computes and draws: after a bad access, or a capture that failed, it may not."""
    try:
        return bool(torch.rand(1, device=device).item() >= 0)
    except RuntimeError:
        return False


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


Line = Callable[[Session], Iterator[Goal]]


@dataclass
class Record:
    """What was found so far: the result file holds it after every figure, and another process can go on from there."""

    rows: list[Goal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    begun: list[str] = field(default_factory=list)  # lines that were measured, or failed
    failed: list[str] = field(default_factory=list)  # those of them that have no figure
    refused: list[str] = field(default_factory=list)  # as Session's


def measure_card(
    lines: Mapping[str, Line], device: torch.device, record: Record, save: Callable[[], object], say: Callable[[str], None],
    deadline: float, bare: bool = False, line_seconds: float = math.inf,
) -> bool:  # fmt: skip
    """Measure what the record lacks, and save after every figure; False where this process can do no more and another one should go on.

    deadline: in seconds of time.perf_counter; no line is begun after it.
    line_seconds: a line that takes longer, as one whose kernel never ends, ends this process with HUNG_CODE, in which nothing else could.
    """
    for name in [name for name in lines if name not in record.begun]:
        if time.perf_counter() > deadline:
            record.notes.append(f"{name}: {OUT_OF_TIME}")
            continue
        say(f"goals: {name}")
        record.begun.append(name)
        before = len(record.rows)
        patience = _patience(name, record, save, line_seconds)
        try:
            for goal in lines[name](Session(device, record.notes, frozenset(record.refused), bare)):
                record.rows.append(goal)
                save()
        except BrokenProcessError as error:
            record.notes.append(f"{name}: {error}: the process was of no more use")
            record.refused.append(error.culprit)
            record.begun.remove(name)  # without the culprit it can be measured
            del record.rows[before:]
        except Exception as error:  # whatever it is, the other lines can do without this one
            record.notes.append(f"{name}: {first_line(error)}")
            record.failed.append(name)
        finally:
            patience.cancel()
        save()
        if not answers(device):
            return False
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    save()
    return True


def _patience(name: str, record: Record, save: Callable[[], object], seconds: float) -> threading.Timer:
    """Ends the process after so many seconds, unless cancelled."""

    def end() -> None:
        record.notes.append(f"{name}: ended after {seconds:.0f} s, with its process")
        record.failed.append(name)
        save()
        os._exit(HUNG_CODE)

    timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), end)
    timer.daemon = True
    timer.start()
    return timer


def card_lines() -> dict[str, Line]:
    """Every line of the table by its name, what matters most first."""
    prefill, block = cases.CARD_PREFILL, cases.CARD_BLOCK
    layers: dict[str, Line] = {
        f"layer {case.K} r {case.R}": partial(
            over_frozen_line, case=case, training=True, targets=LAYER_GOALS[case.K, case.R],
            what=f"a layer, forward and backward, {case.K} to {case.N}, r {case.R}",
        )
        for case in cases.CARD_LAYERS
    }  # fmt: skip
    return layers | {
        "kernel": partial(kernel_line, case=cases.CARD_KERNEL),
        "decode": partial(decode_line, case=cases.CARD_DECODE),
        "prefill": partial(
            over_frozen_line, case=prefill, training=False, targets=PREFILL_GOAL,
            what=f"prefill, {prefill.B * prefill.T} tokens, {len(prefill.ranks)} adapters mixed",
        ),
        **{f"errors, {case.number_format()}": partial(error_line, case=case) for case in cases.CARD_ERRORS},
        "model": partial(model_line, case=cases.CARD_MODEL),
        "block": partial(
            over_frozen_line, case=block, training=True, targets=BLOCK_GOAL,
            what=f"the seven linear layers of a {block.name}, forward and backward",
        ),
    }  # fmt: skip


BARE_LINES = ("kernel", "layer 4096 r 16", "decode")  # what is measured first where a card is there for minutes


def may_be_tried(session: Session, case: Case | BlockCase) -> list[str]:
    """Plain PyTorch and the kernels of this device that broke no process yet; in a bare session kernels alone, CUDA C++ first."""
    kernels = ops.candidates(case.operator, session.device, case.dtype)
    names = kernels[::-1] if session.bare else ["reference", *kernels]
    return [name for name in names if session.may_run(name, EAGER)]


def sound_implementations(session: Session, case: Case | BlockCase, training: bool) -> list[str]:
    """Those that are within their bounds on this very case; in a bare session the first one: Triton's compiler takes longer than all the rest.

    Raises:
        CaseError: the one that runs by default is not; in a bare session, none is.
    """
    sound, here = [], f"{case.name}, {case.shape(training)}"
    for name in may_be_tried(session, case):
        what = f"{case.operator} {name}, {here}"
        if session.attempt(what, name, require_right, case, training, name, session.device, what):
            sound.append(name)
            if session.bare:
                return sound
    if choice(case, training, session.device) not in sound:
        raise CaseError(f"{case.operator}, {here}: what runs by default is wrong: not timed")
    return sound


class Prepared(NamedTuple):
    """A case whose sound implementations can be timed."""

    case: Case | BlockCase
    training: bool
    copies: int
    runs: dict[str, Run]  # every rival, and each implementation; in a bare session the frozen layer and fastlora alone
    default: str  # what fastlora's figures are of


def prepare(session: Session, case: Case | BlockCase, training: bool) -> Prepared:
    """Check the case, then build it; raises CaseError as `sound_implementations`."""
    names, device = sound_implementations(session, case, training), session.device
    if session.bare:
        contest = build(case, training, device, ["frozen", FASTLORA])
        bare = {"frozen": contest.run("frozen", training), FASTLORA: contest.run(FASTLORA, training, names[0])}
        return Prepared(case, training, contest.copies, bare, names[0])
    if isinstance(case, LoRALinearCase) and training:
        wide = replace(case, adapter_dtype=torch.float32)
        what = f"{case.name}, {case.shape(training)}, float32 adapters"
        require_right(wide, True, choice(wide, True, device), device, what)
    if training and isinstance(case, LoRALinearCase | BlockCase):
        contest = build_for_card(case, device)
    else:
        contest = build(case, training, device)
    return Prepared(case, training, contest.copies, contest.runs(training, names), choice(case, training, device))


def times_by_mode(
    session: Session, what: str, operator: str, runs: Mapping[str, Run], copies: int, clocks: Mapping[str, Clock], seconds: float
) -> Iterator[tuple[str, dict[str, Timing]]]:  # fmt: skip
    """(mode, seconds and ratios of what can run in it) of every mode that has a clock, the first run the baseline; a timed call meets every copy.

    Raises:
        CaseError: the baseline or fastlora cannot run.
        BrokenProcessError: something ended the process's use of the device.
    """
    for mode, of_mode in clocks.items():
        ready: dict[str, Run] = {}
        pool = graph_pool(session.device)
        what_now = f"{what}, {mode}"
        for name, run in runs.items():
            if not session.may_run(name, mode) or (mode == GRAPH and (operator, name) in UNCAPTURABLE):
                continue
            prepared = session.attempt(what_now, name, _ready, run, copies, mode, session.device, pool, mode=mode)
            if prepared is not None:
                ready[name] = prepared
            else:
                pool = graph_pool(session.device)  # the one of a failed capture takes no other
        for name in (next(iter(runs)), FASTLORA):
            if name not in ready:
                raise CaseError(f"{what_now}: {name} does not run: not timed")
        times = clock.time_in_turn(ready, of_mode, seconds)
        yield mode, {name: one._replace(seconds=one.seconds / copies) for name, one in times.items()}


def _ready(run: Run, copies: int, mode: str, device: torch.device, pool: Any) -> Run:
    """A timed call is a run of every copy of the weights once, as the layers of a model follow one another."""

    def whole(turn: int) -> None:
        for number in range(turn * copies, (turn + 1) * copies):
            run(number)

    if mode == GRAPH:
        require_no_wait(whole, device)
        return captured(whole, device, pool)
    for turn in range(clock.WARM_UP_CALLS):
        whole(turn)
    return whole


def _goal(
    what: str, case: str, numbers: str, unit: str, targets: tuple[float, float],
    values: Mapping[str, float],  # in that unit: "fastlora", "peft" and others
    seconds: Mapping[str, float],
    runs: str,  # the implementation that fastlora's value is of
    at_least: bool = False,
) -> Goal:  # fmt: skip
    others = {name: value for name, value in values.items() if name not in ("frozen", "peft", FASTLORA)}
    return Goal(
        what, case, numbers, targets[0], values[FASTLORA], values.get("peft"),
        at_least=at_least, seconds=dict(seconds), unit=unit, first_step=targets[1], rivals=others, implementation=runs,
    )  # fmt: skip


def _timed(
    session: Session, prepared: Prepared, what: str, value: Callable[[Timing], float], targets: tuple[float, float], at_least: bool = False
) -> Iterator[Goal]:  # fmt: skip
    """The goal in each mode; `value`: what a rival's time is in percent."""
    case, training, copies, runs, default = prepared
    clocks = {mode: clock_of(session.device) for mode in ((GRAPH,) if session.bare else (EAGER, GRAPH))}
    for mode, times in times_by_mode(session, what, case.operator, runs, copies, clocks, SECONDS):
        values = {name: value(one) for name, one in times.items()}
        seconds = {name: one.seconds for name, one in times.items()}
        sizes = case.shape(training), case.number_format()
        yield _goal(f"{what}, {mode}", *sizes, "%", targets, values, seconds, default, at_least)


def over_frozen_line(
    session: Session, case: Case | BlockCase, training: bool, what: str, targets: tuple[float, float]
) -> Iterator[Goal]:
    """Percent over the frozen layers; in training, over their forward and dx."""
    what = f"{what} over frozen"
    return _timed(session, prepare(session, case, training), what, lambda one: 100 * (one.ratio - 1), targets)


def decode_line(session: Session, case: MultiLoRACase) -> Iterator[Goal]:
    """A mixed batch of a token each: the bytes that a call must move at least, over this card's bandwidth, in percent of its time."""
    prepared = prepare(session, case, False)
    bandwidths = measure_bandwidths(session.device)
    least = case.work(False).bytes / max(bandwidths.values())
    rates = ", ".join(f"{name} {rate / 1e9:.0f} GB/s" for name, rate in bandwidths.items())
    beside = f"this device's bandwidth, measured beside it: {rates}"
    session.notes.append(f"decode: {prepared.copies} weights in turn; {beside}")
    what = f"decode, batch {case.B}, {len(case.ranks)} adapters mixed, of the bandwidth bound"
    return _timed(session, prepared, what, lambda one: 100 * least / one.seconds, DECODE_GOAL, at_least=True)


def kernel_line(session: Session, case: LoRALinearCase) -> Iterator[Goal]:
    """The longest kernel of fastlora's forward over the longest of the frozen layer's: what the rank step costs the product."""
    *_, runs, default = prepare(session, case, False)
    wanted = [name for name in runs if name in ("frozen", FASTLORA, *may_be_tried(session, case))]
    in_turn = clock.rounds_in_turn(wanted, lambda name: main_kernel(runs[name], session.device, KERNEL_CALLS))
    rounds = list(islice(in_turn, KERNEL_ROUNDS))
    session.notes += [f"main kernel of {name}: {rounds[0][name].name[:100]}" for name in wanted]
    found = {name: [one[name].seconds for one in rounds] for name in wanted}
    yield _goal(
        "the forward's main kernel over cuBLAS's product", case.shape(False), case.number_format(), "%", KERNEL_GOAL,
        {name: 100 * (clock.median_ratio(times, found["frozen"]) - 1) for name, times in found.items()},
        {name: statistics.median(times) for name, times in found.items()}, default,
    )  # fmt: skip


def error_line(session: Session, case: LoRALinearCase) -> Iterator[Goal]:
    """The worst of y, dx, dA and dB, each error against float64 over that of PEFT's own layer."""
    names = may_be_tried(session, case)
    found = errors_beside_peft(case, names, session.device)
    own = found.pop("peft")
    worst = {name: max(error / own[result] for result, error in each.items()) for name, each in found.items()}
    listed = ", ".join(f"{result} {error:.2g}" for result, error in own.items())
    session.notes.append(f"PEFT's errors against float64, {case.number_format()}: {listed}")
    default = choice(case, True, session.device)
    values = {"peft": 1.0, FASTLORA: worst[default], **worst}
    what = f"error against float64 over PEFT's, {case.number_format()}"
    yield _goal(what, case.shape(True), case.number_format(), "", (1.0, 1.0), values, {}, default)


def model_line(session: Session, case: StepCase) -> Iterator[Goal]:
    """Whole training steps, in tokens a second."""
    tokens = case.batch * case.tokens
    timed = {}
    for variant, seconds in measure_model(case, session.device, session.notes):
        timed[variant] = seconds
        if variant != "peft":
            yield _goal(
                f"{case.name}, training, {variant}", case.shape(), "bfloat16, A and B float32", "tokens/s", MODEL_GOAL,
                {FASTLORA: tokens / seconds, **({"peft": tokens / timed["peft"]} if "peft" in timed else {})},
                dict(timed), "", at_least=True,
            )  # fmt: skip
