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

import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import NamedTuple

import torch

from fastlora.choice import clock
from fastlora.choice.clock import Run, Timing

from . import cases
from .cases import Case, LoRALinearCase, MultiLoRACase, StepCase
from .device import clock_of, main_kernel
from .gate import CaseError, errors_beside_peft, require_right
from .goals import Goal
from .machine import bandwidths
from .rivals import FASTLORA, build, build_for_card, choice
from .session import EAGER, GRAPH, Line, Session, seconds_of
from .step import measure_model

SECONDS = 2.0  # of timing, a line and mode
LAYER_GOALS = {(4096, 16): (5.0, 12.0), (8192, 16): (3.0, 6.0), (4096, 64): (8.0, 16.0)}  # (K, R): percent, first step
BLOCK_GOAL, KERNEL_GOAL, PREFILL_GOAL = (4.0, 8.0), (1.0, 5.0), (3.0, 8.0)
DECODE_GOAL = (80.0, 60.0)  # percent of the bound
BARE_LINES = ("kernel", "layer 4096 r 16", "decode")  # what is measured first where a card is there for minutes
MODEL_GOAL = (15_000.0, 12_500.0)  # tokens a second
KERNEL_ROUNDS, KERNEL_CALLS = 7, 5


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


def sound_implementations(session: Session, case: Case, training: bool) -> list[str]:
    """Those that are within their bounds on this very case; in a bare session the first one: Triton's compiler takes longer than all the rest.

    Raises:
        CaseError: the one that runs by default is not; in a bare session, none is.
    """
    sound, here = [], case.title(training)
    for name in session.may_be_tried(case):
        if session.attempt(here, name, require_right, case, training, name, session.device):
            sound.append(name)
            if session.bare:
                return sound
    if choice(case, training, session.device) not in sound:
        raise CaseError(f"{case.operator}, {here}: what runs by default is wrong: not timed")
    return sound


class Prepared(NamedTuple):
    """A case whose sound implementations can be timed."""

    case: Case
    training: bool
    copies: int
    runs: dict[str, Run]  # every rival, and each implementation; in a bare session the frozen layer and fastlora alone
    default: str  # what fastlora's figures are of


def prepare(session: Session, case: Case, training: bool) -> Prepared:
    """Check the case, then build it; raises CaseError as `sound_implementations`."""
    names, device = sound_implementations(session, case, training), session.device
    if session.bare:
        contest = build(case, training, device, ["frozen", FASTLORA])
        bare = {"frozen": contest.run("frozen", training), FASTLORA: contest.run(FASTLORA, training, names[0])}
        return Prepared(case, training, contest.copies, bare, names[0])
    if isinstance(case, LoRALinearCase) and training:
        wide = replace(case, adapter_dtype=torch.float32)
        require_right(wide, True, choice(wide, True, device), device)
    contest = build_for_card(case, device) if training else build(case, False, device)
    return Prepared(case, training, contest.copies, contest.runs(training, names), choice(case, training, device))


def _timed(
    session: Session, prepared: Prepared, what: str, value: Callable[[Timing], float], targets: tuple[float, float], at_least: bool = False
) -> Iterator[Goal]:  # fmt: skip
    """The goal in each mode; `value`: what a rival's time is in percent."""
    case, training, copies, runs, default = prepared
    clocks = {mode: clock_of(session.device) for mode in ((GRAPH,) if session.bare else (EAGER, GRAPH))}
    for mode, times in session.times_by_mode(what, case, runs, copies, clocks, SECONDS):
        values = {name: value(one) for name, one in times.items() if name != "frozen"}
        what_now, seconds = f"{what}, {mode}", seconds_of(times)
        yield Goal.of(what_now, case, training, "%", values, seconds, default, targets, at_least=at_least)


def over_frozen_line(
    session: Session, case: Case, training: bool, what: str, targets: tuple[float, float]
) -> Iterator[Goal]:
    """Percent over the frozen layers; in training, over their forward and dx."""
    what = f"{what} over frozen"
    return _timed(session, prepare(session, case, training), what, lambda one: 100 * (one.ratio - 1), targets)


def decode_line(session: Session, case: MultiLoRACase) -> Iterator[Goal]:
    """A mixed batch of a token each: the bytes that a call must move at least, over this card's bandwidth, in percent of its time."""
    prepared = prepare(session, case, False)
    found = bandwidths(session.device)
    least = case.work(False).bytes / max(found.values())
    rates = ", ".join(f"{name} {rate / 1e9:.0f} GB/s" for name, rate in found.items())
    beside = f"this device's bandwidth, measured beside it: {rates}"
    session.notes.append(f"decode: {prepared.copies} weights in turn; {beside}")
    what = f"decode, batch {case.B}, {len(case.ranks)} adapters mixed, of the bandwidth bound"
    return _timed(session, prepared, what, lambda one: 100 * least / one.seconds, DECODE_GOAL, at_least=True)


def kernel_line(session: Session, case: LoRALinearCase) -> Iterator[Goal]:
    """The longest kernel of fastlora's forward over the longest of the frozen layer's: what the rank step costs the product."""
    *_, runs, default = prepare(session, case, False)
    wanted = [name for name in runs if name in ("frozen", FASTLORA, *session.may_be_tried(case))]
    in_turn = clock.rounds_in_turn(wanted, lambda name: main_kernel(runs[name], session.device, KERNEL_CALLS))
    rounds = list(islice(in_turn, KERNEL_ROUNDS))
    session.notes += [f"main kernel of {name}: {rounds[0][name].name[:100]}" for name in wanted]
    found = {name: [one[name].seconds for one in rounds] for name in wanted}
    seconds = {name: statistics.median(times) for name, times in found.items()}
    frozen = found.pop("frozen")
    values = {name: 100 * (clock.median_ratio(times, frozen) - 1) for name, times in found.items()}
    what = "the forward's main kernel over cuBLAS's product"
    yield Goal.of(what, case, False, "%", values, seconds, default, KERNEL_GOAL)


def error_line(session: Session, case: LoRALinearCase) -> Iterator[Goal]:
    """The worst of y, dx, dA and dB, each error against float64 over that of PEFT's own layer."""
    names = session.may_be_tried(case)
    found = errors_beside_peft(case, names, session.device)
    own = found.pop("peft")
    worst = {name: max(error / own[result] for result, error in each.items()) for name, each in found.items()}
    listed = ", ".join(f"{result} {error:.2g}" for result, error in own.items())
    session.notes.append(f"PEFT's errors against float64, {case.number_format()}: {listed}")
    default = choice(case, True, session.device)
    values = {"peft": 1.0, FASTLORA: worst[default], **worst}
    what = f"error against float64 over PEFT's, {case.number_format()}"
    yield Goal.of(what, case, True, "", values, {}, default, (1.0, 1.0))


def model_line(session: Session, case: StepCase) -> Iterator[Goal]:
    """Whole training steps, in tokens a second."""
    seconds: dict[str, float] = {}
    for variant, one in measure_model(case, session.device, session.notes):
        seconds[variant] = one
        if variant != "peft":
            rates = {name: case.batch * case.tokens / seconds[name] for name in ("peft", variant) if name in seconds}
            rates[FASTLORA] = rates.pop(variant)
            what = f"{case.name}, training, {variant}"
            yield Goal.of(what, case, True, "tokens/s", rates, seconds, targets=MODEL_GOAL, at_least=True)
