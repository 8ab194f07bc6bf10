"""Rows as text: one table an operator, worst first, losses printed like wins."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .cases import OPERATORS, dtype_name
from .goals import Goal
from .operators import Row
from .rivals import FASTLORA, MEANINGS

QUANTITY = re.compile(r"-|[\d.]+(e[+-]\d+)?( \S+)?")


def render(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned: text to the left, quantities to the right."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    right = [all(QUANTITY.fullmatch(row[column]) for row in rows) for column in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True))
        return "  ".join(padded).rstrip()

    return "\n".join((line(head), "  ".join("-" * width for width in widths), *(line(row) for row in rows)))


def seconds(value: float) -> str:
    """2.5e-05 -> "25.0 us"."""
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "us")):
        if value * factor >= 1:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e6:.2g} us"


def mebibytes(value: int | None) -> str:
    """Bytes in MiB, a dash where they are unknown."""
    if value is None:
        return "-"
    return f"{value / 2**20:.0f}" if value >= 100 * 2**20 else f"{value / 2**20:.3g}"


def _rate(row: Row) -> str:
    own = row.seconds[FASTLORA]
    return f"{row.flops / own / 1e9:.4g} GFLOP/s" if row.bound_by == "flops" else f"{row.bytes / own / 1e9:.3g} GB/s"


def operator_table(operator: str, rows: Sequence[Row], notes: Sequence[str]) -> str:
    """The table of one operator with what its columns mean, and how often fastlora loses."""
    entry = OPERATORS[operator]
    rivals = [name for name in entry.rivals[1:] if any(name in row.ratios for row in rows)]
    head = ["case", "shape", "numbers", "pass", "implementation", "frozen", *rivals]
    head += ["over peft", "rate", "of limit", "peak MiB", "peft's", "error", "eager's"]
    body = []
    for row in sorted(rows, key=lambda row: -row.ratios[FASTLORA] / row.ratios["peft"]):
        cells = [row.case, row.shape, row.numbers, row.pass_, row.implementation + ("*" if row.chosen else "")]
        cells += [seconds(row.seconds["frozen"])]
        cells += [f"{row.ratios[name]:.2f}" if name in row.ratios else "-" for name in rivals]
        cells += [f"{row.ratios[FASTLORA] / row.ratios['peft']:.2f}", _rate(row), f"{100 * row.limit:.0f} %"]
        cells += [mebibytes(row.peak_bytes[FASTLORA]), mebibytes(row.peak_bytes["peft"])]
        cells += [f"{row.error.error:.1e}", f"{row.error.eager:.1e}"]
        body.append(cells)
    chosen = [row for row in rows if row.chosen]
    lost = sum(row.loses() for row in chosen)
    rounds = sorted(row.rounds for row in rows)
    legend = [
        f"{operator}: time over that of {entry.baseline} (frozen = 1),"
        f" medians of {rounds[0]} to {rounds[-1]} rounds timed in turn",
        *(MEANINGS[name] for name in rivals),
        "of limit: the least time that this machine's own product and copy rates allow, over fastlora's;"
        " peak: memory of one call; error: against float64, relative to the largest value",
    ]
    verdict = f"fastlora* is slower than PEFT or PEFT compiled in {lost} of {len(chosen)} rows"
    return "\n".join([*legend, "", render(head, body), "", verdict, *notes])


def step_table(rows: Sequence[Mapping[str, Any]], notes: Sequence[str]) -> str:
    """The table of the training steps, each {"case": StepCase, "result": StepResult}."""
    head = ["case", "shape", "numbers", "peft", "fastlora", "over peft", "tokens/s", "peft's", "peak MiB", "peft's"]
    head += ["first loss", "peft's", "last loss", "peft's", "layers by implementation"]
    body = []
    for case, result in (row.values() for row in rows):
        ours, theirs = result.losses["fastlora"], result.losses["peft"]
        tokens = case.batch * case.tokens
        cells = [case.name, case.shape(), dtype_name(case.dtype)]
        cells += [seconds(result.seconds["peft"]), seconds(result.seconds["fastlora"]), f"{result.ratio:.2f}"]
        cells += [f"{tokens / result.seconds[variant]:.0f}" for variant in ("fastlora", "peft")]
        cells += [mebibytes(result.peak_bytes[variant]) for variant in ("fastlora", "peft")]
        cells += [f"{ours[0]:.6f}", f"{theirs[0]:.6f}", f"{ours[-1]:.6f}", f"{theirs[-1]:.6f}"]
        cells += [", ".join(f"{count} {name}" for name, count in sorted(result.implementations.items()))]
        body.append(cells)
    lost = sum(row["result"].ratio > 1 for row in rows)
    rounds = sorted(row["result"].rounds for row in rows)
    legend = (
        "step: one training step of an accelerated PEFT model, and of the same model under PEFT and transformers alone,"
        f" each in a process of its own,\nmedians of {rounds[0]} to {rounds[-1]} rounds timed in turn;"
        " peak: memory of the whole process; with dropout the masks, and so the losses, differ"
    )
    verdict = f"fastlora is slower in {lost} of {len(rows)} rows"
    return "\n".join([legend, "", render(head, body), "", verdict, *notes])


def _quantity(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    exact = {
        "%": f"{value:.1f} %",
        "us": f"{value:.1f} us",
        "tokens/s": f"{value:,.0f} tokens/s",
        "cells": f"{value:.0f}",
        "settings": f"{value:.0f}",
    }
    return exact.get(unit, f"{value:.2f}")


def goals_table(goals: Sequence[Goal], notes: Sequence[str]) -> str:
    """The table of the goals, and how many are met. A column without an entry is left out."""
    columns: dict[str, list[str]] = {
        "goal": [one.what for one in goals],
        "case": [one.case for one in goals],
        "numbers": [one.numbers for one in goals],
        "at most": [("at least " if one.at_least else "") + _quantity(one.goal, one.unit) for one in goals],
        "first step": [_quantity(one.first_step, one.unit) for one in goals],
        "fastlora": [_quantity(one.ours, one.unit) for one in goals],
        "runs": [one.implementation or "-" for one in goals],
        "of goal": [_quantity(one.of_goal(), "") for one in goals],
        "met": [{True: "yes", False: "no", None: "-"}[one.is_met()] for one in goals],
        "peft": [_quantity(one.peft, one.unit) for one in goals],
        "frozen": [_quantity(one.frozen, one.unit) for one in goals],
    }
    for name in dict.fromkeys(name for one in goals for name in one.rivals):
        columns[name] = [_quantity(one.rivals.get(name), one.unit) for one in goals]
    shown = {title: cells for title, cells in columns.items() if set(cells) != {"-"}}
    met = [one.is_met() for one in goals if one.goal is not None]
    text = render(list(shown), list(zip(*shown.values(), strict=True)))
    verdict = [f"{sum(map(bool, met))} of {len(met)} goals are met"] if met else []
    return "\n".join([*_legend(goals), "", text, "", *verdict, *notes])


def _legend(goals: Sequence[Goal]) -> list[str]:
    if any(one.unit == "us" for one in goals):
        return [
            "launch: small layers called in a row, wall-clock time a call; CUDA graph: the same calls replayed as one"
        ]
    if any(one.first_step is not None for one in goals):
        return [
            "goals on a card: percent over what the frozen layers take, forward and dx; medians timed in turn, weights from memory, not the cache;"
            " fastlora: PEFT layers as `accelerate` leaves them",
            "eager: launched by Python; CUDA graph: replayed. A name ending in 32: with float32 adapters under autocast, else they are bfloat16;"
            " reference, triton, cuda: fastlora forced to use that implementation",
            MEANINGS["addmm"],
        ]
    if all(one.frozen is None for one in goals):
        return [
            "goals: times PEFT's speed, a part of its memory, or time over that of what is named; medians timed in turn;"
            " fastlora: PEFT's model as `accelerate` leaves it"
        ]
    return [
        "goals: time over the machine's limit, over the plain frozen layer, or over PEFT's training step, medians timed in turn;"
        " fastlora: PEFT layers as `accelerate` leaves them",
        "limit: a layer's FLOPs at the best product rate of this machine, and one more read of x; addmm: "
        + MEANINGS["addmm"].partition(": ")[2],
    ]


def goals_markdown(goals: Sequence[Goal]) -> str:
    """The goals for benchmarks/README.md: a line a kind, the best and the worst of its cases; of what has no goal, the tokens a second."""

    def between(values: Iterable[float | None], unit: str) -> str:
        known = sorted(value for value in values if value is not None)
        ends = [_quantity(value, unit) for value in known[:1] + known[-1:]]
        return " to ".join(dict.fromkeys(ends))

    kinds: dict[str, list[Goal]] = {}
    for one in goals:
        if one.goal is not None or one.unit == "tokens/s":
            kinds.setdefault(one.what, []).append(one)
    lines = ["| | goal | fastlora | PEFT | met |", "|---|---|---|---|---|"]
    for what, found in kinds.items():
        sign, unit = "≥" if found[0].at_least else "≤", found[0].unit
        goal, ours, peft = (between((vars(one)[name] for one in found), unit) for name in ("goal", "ours", "peft"))
        met = f"{sum(bool(one.is_met()) for one in found)} of {len(found)}" if goal else ""
        lines.append(f"| {what} | {sign + ' ' + goal if goal else ''} | {ours} | {peft} | {met} |")
    return "\n".join(lines)
