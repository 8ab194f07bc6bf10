"""What came out of a sweep, as one HTML page that names no other file and no address: heat maps of rank and rate, curves, the recommended job."""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields
from html import escape

from fastlora import __version__
from fastlora.config import TrainConfig
from fastlora.data.sources import each
from fastlora.sweep.jobs import OF_JOBS
from fastlora.sweep.outcome import Outcome, rows

LOW, HIGH = (11, 61, 145), (232, 240, 254)  # of a heat map: the lowest loss, and the highest
BEST = "#d93025"
LINES = ("#1a73e8", "#e8710a", "#188038", "#9334e6", "#12808c", "#b80672", "#7a6000", "#5f6368")
WIDTH, HEIGHT = 860, 300  # of a plot, in pixels
LEFT, BELOW = 64, 40  # room for its axes
POINTS = 400  # of a curve, at most
SMOOTH = 0.1  # weight of a step in the running mean
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #202124; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 14px; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid #dadce0; text-align: right; vertical-align: top; }
th:first-child, td:first-child, td.text { text-align: left; }
tr.best td { font-weight: 600; }
pre { background: #f1f3f4; padding: .8rem; white-space: pre-wrap; }
svg { max-width: 100%; height: auto; font: 12px system-ui, sans-serif; }
"""
Point = tuple[float, float]


def html(
    outcomes: Sequence[Outcome],
    best: Mapping[str, Outcome],
    records: Mapping[str, Sequence[Mapping[str, float]]],
    seconds: float,
) -> str:
    """
    Args:
        best: by held-out data.
        records: each job's metrics.jsonl.
        seconds: of all steps.
    """
    steps, model = max(one.steps for one in outcomes), outcomes[0].config["model"]
    parts = [
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>fastlora sweep</title>'
        f"<style>{STYLE}</style></head><body>",
        f"<h1>fastlora sweep: {len(outcomes)} adapters of one base</h1>",
        f"<p>Base: {escape(str(model))}. {steps:,} steps, {sum(one.tokens for one in outcomes):,} tokens of all jobs, {seconds:,.0f} s in steps."
        f" A job's steps, rows and updates are those of <code>fastlora train</code> alone; all jobs ran in one batch. fastlora {__version__}.</p>",
    ]
    for data in dict.fromkeys(one.config["eval_data"] for one in outcomes):
        group = [one for one in outcomes if one.config["eval_data"] == data]
        parts += [
            f"<h2>By the held-out rows of {escape(data)}</h2>",
            *_recommended(best.get(data)),
            *_heat_map(group, best.get(data)),
        ]
        parts += [
            "<h3>Training loss</h3>",
            _curves({one.name: _running_mean(records[one.name]) for one in group}, best.get(data)),
        ]
        measured = {one.name: [(float(step), loss) for step, loss in one.evaluations] for one in group}
        if any(len(points) > 1 for points in measured.values()):
            parts += ["<h3>Held-out loss</h3>", _curves(measured, best.get(data))]
        parts += ["<h3>All jobs</h3>", _table(group, best.get(data))]
    return "\n".join([*parts, "</body></html>\n"])


def _recommended(best: Outcome | None) -> list[str]:
    if best is None:
        return ["<p>No job has a held-out loss.</p>"]
    return [
        f"<p>Recommended: <b>{escape(best.name)}</b>, with a held-out loss of <b>{best.loss:.4f}</b> nats a token after {best.steps:,} steps."
        f" Its adapter: <code>{escape(best.output)}</code>. The same alone:</p>",
        f"<pre>{escape(command(best))}</pre>",
    ]


def command(one: Outcome) -> str:
    """The command that trains a job's adapter alone; OUTPUT is left to fill in."""
    defaults = {field.name: field.default for field in fields(TrainConfig)}
    words = ["fastlora", "train", "--model", str(one.config["model"])]
    words += [word for source in each(one.config["data"]) for word in ("--data", source)]
    for name in (*OF_JOBS, "dtype"):
        value = one.config[name]
        if name == "data" or value == defaults[name] or value is None:
            continue
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(option if value else f"--no{option[1:]}")
        elif isinstance(value, dict):
            words += [option, ",".join(f"{key}={column}" for key, column in value.items())]
        else:
            words += [option, ",".join(value) if isinstance(value, list) else str(value)]
    return f"{shlex.join(words)} --output OUTPUT"


def _heat_map(group: Sequence[Outcome], best: Outcome | None) -> list[str]:
    """Rank by rate: the lowest loss of the jobs with both, the darker the lower; by place, or one bad job would leave all others alike."""
    ranks, rates = sorted({one.r for one in group}), sorted({one.lr for one in group})
    if len(ranks) * len(rates) < 2:
        return []
    cells: dict[tuple[int, float], Outcome] = {}
    for one in group:
        before = cells.get((one.r, one.lr))
        if before is None or (one.loss is not None and (before.loss is None or one.loss < before.loss)):
            cells[one.r, one.lr] = one
    order = sorted({one.loss for one in cells.values() if one.loss is not None})
    wide, high, left, top = 110, 44, 70, 30
    parts = [
        f'<svg viewBox="0 0 {left + wide * len(rates)} {top + high * len(ranks)}" width="{left + wide * len(rates)}" role="img">'
    ]
    parts += [_text(left + wide * (i + 0.5), 20, f"lr {rate:g}") for i, rate in enumerate(rates)]
    for row, r in enumerate(ranks):
        y = top + high * row
        parts.append(_text(left - 8, y + high / 2 + 4, f"r {r}", "end"))
        for column, rate in enumerate(rates):
            one_or_none, x = cells.get((r, rate)), left + wide * column
            if one_or_none is None:
                continue
            one = one_or_none
            place = 1.0 if one.loss is None else order.index(one.loss) / max(1, len(order) - 1)
            colour = [round(a + (b - a) * place) for a, b in zip(LOW, HIGH, strict=True)]
            edge = (
                f'stroke="{BEST}" stroke-width="3"' if best is not None and one.name == best.name else 'stroke="white"'
            )
            fill = "#f1f3f4" if one.loss is None else "#" + "".join(f"{part:02x}" for part in colour)
            title = escape(f"{one.name}: {one.status} {one.reason}".strip())
            parts.append(
                f'<rect x="{x + 2}" y="{y + 2}" width="{wide - 4}" height="{high - 4}" fill="{fill}" {edge}><title>{title}</title></rect>'
            )
            ink = "white" if place < 0.5 else "#202124"
            parts.append(_text(x + wide / 2, y + 20, one.status if one.loss is None else f"{one.loss:.4f}", ink=ink))
            if one.loss is not None and one.steps < one.all_steps:
                parts.append(_text(x + wide / 2, y + 35, f"step {one.steps} of {one.all_steps}", ink=ink))
    note = "Held-out loss, nats a token, by rank and learning rate; darker is lower. A job that ended early is told with its last one."
    return ["<h3>Rank and learning rate</h3>", f"<p>{note}</p>", *parts, "</svg>"]


def _running_mean(records: Sequence[Mapping[str, float]]) -> list[Point]:
    mean = 0.0
    points: list[Point] = []
    for record in records:
        mean = record["loss"] if not points else mean + SMOOTH * (record["loss"] - mean)
        points.append((record["step"], mean))
    every = max(1, math.ceil(len(points) / POINTS))
    return points[::every] + points[-1:] * ((len(points) - 1) % every > 0)


def _curves(series: Mapping[str, Sequence[Point]], best: Outcome | None) -> str:
    """Loss over steps, on a logarithmic scale; a point alone is a dot."""
    drawn = {name: points for name, points in series.items() if points}
    if not drawn:
        return "<p>None.</p>"
    every = [point for points in drawn.values() for point in points]
    steps = max(step for step, _ in every)
    low, high = (math.log(max(edge(loss for _, loss in every), 1e-9)) for edge in (min, max))
    low, high = (low - 0.05, high + 0.05) if high - low < 1e-3 else (low, high)

    def place(point: Point) -> Point:
        x = LEFT + (WIDTH - LEFT - 170) * point[0] / max(steps, 1)
        return x, 10 + (HEIGHT - BELOW - 10) * (high - math.log(max(point[1], 1e-9))) / (high - low)

    parts = [f'<svg viewBox="0 0 {WIDTH} {max(HEIGHT, 24 + 15 * len(drawn))}" width="{WIDTH}" role="img">']
    for i in range(5):
        loss = math.exp(low + (high - low) * i / 4)
        _, y = place((0, loss))
        parts.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - 170}" y2="{y:.1f}" stroke="#dadce0"/>')
        parts.append(_text(LEFT - 6, y + 4, f"{loss:.3g}", "end"))
        parts.append(_text(place((steps * i / 4, loss))[0], HEIGHT - 20, f"{steps * i / 4:.0f}"))
    parts.append(_text((LEFT + WIDTH - 170) / 2, HEIGHT - 4, "optimiser step"))
    # The best last: it lies over the others.
    names = sorted(drawn, key=lambda name: best is not None and name == best.name)
    for number, name in enumerate(drawn):
        colour = BEST if best is not None and name == best.name else LINES[number % len(LINES)]
        parts.append(_text(WIDTH - 160, 20 + 15 * number, name, "start", colour))
    for name in names:
        is_best = best is not None and name == best.name
        colour = BEST if is_best else LINES[list(drawn).index(name) % len(LINES)]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, drawn[name]))
        shape = (
            f'stroke="{colour}" stroke-width="{2.5 if is_best else 1}" fill="none" opacity="{1 if is_best else 0.7}"'
        )
        parts.append(f'<polyline points="{points}" {shape}><title>{escape(name)}</title></polyline>')
        x, y = place(drawn[name][-1])
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>')
    return "\n".join([*parts, "</svg>"])


def _text(x: float, y: float, text: str, anchor: str = "middle", ink: str = "#202124") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{ink}">{escape(text)}</text>'


def _table(group: Sequence[Outcome], best: Outcome | None) -> str:
    found = rows(group, {} if best is None else {"": best})
    head = "".join(f"<th>{escape(name)}</th>" for name in (*found[0], "why"))
    lines = []
    for one, row in zip(group, found, strict=True):
        kind = ' class="best"' if best is not None and one.name == best.name else ""
        cells = "".join(f"<td>{escape(text)}</td>" for text in row.values())
        lines.append(f'<tr{kind}>{cells}<td class="text">{escape(one.reason)}</td></tr>')
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"
