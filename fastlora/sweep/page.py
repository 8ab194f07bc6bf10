"""What came out of a sweep, as one HTML page that names no other file and no address: heat maps of rank and rate, curves, the recommended job."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields

from fastlora import __version__, drawing
from fastlora.config import TrainConfig
from fastlora.data.sources import each
from fastlora.drawing import BEST, safe
from fastlora.sweep.jobs import OF_JOBS
from fastlora.sweep.outcome import Outcome, rows

LOW, HIGH = (11, 61, 145), (232, 240, 254)  # of a heat map: the lowest loss, and the highest


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
        f"<h1>fastlora sweep: {len(outcomes)} adapters of one base</h1>",
        f"<p>Base: {safe(str(model))}. {steps:,} steps, {sum(one.tokens for one in outcomes):,} tokens of all jobs, {seconds:,.0f} s in steps."
        f" A job's steps, rows and updates are those of <code>fastlora train</code> alone; all jobs ran in one batch. fastlora {__version__}.</p>",
    ]
    for data in dict.fromkeys(one.config["eval_data"] for one in outcomes):
        group = [one for one in outcomes if one.config["eval_data"] == data]
        foremost = best[data].name if data in best else None
        parts += [
            f"<h2>By the held-out rows of {safe(data)}</h2>",
            *_recommended(best.get(data)),
            *_heat_map(group, best.get(data)),
        ]
        parts += [
            "<h3>Training loss</h3>",
            drawing.curves({one.name: _mean_loss(records[one.name]) for one in group}, foremost),
        ]
        measured = {one.name: [(float(step), loss) for step, loss in one.evaluations] for one in group}
        if any(len(points) > 1 for points in measured.values()):
            parts += ["<h3>Held-out loss</h3>", drawing.curves(measured, foremost)]
        parts += ["<h3>All jobs</h3>", _table(group, best.get(data))]
    return drawing.page("fastlora sweep", parts)


def _mean_loss(records: Sequence[Mapping[str, float]]) -> list[drawing.Point]:
    return drawing.running_mean([(record["step"], record["loss"]) for record in records])


def _recommended(best: Outcome | None) -> list[str]:
    if best is None:
        return ["<p>No job has a held-out loss.</p>"]
    return [
        f"<p>Recommended: <b>{safe(best.name)}</b>, with a held-out loss of <b>{best.loss:.4f}</b> nats a token after {best.steps:,} steps."
        f" Its adapter: <code>{safe(best.output)}</code>. The same alone:</p>",
        f"<pre>{safe(command(best))}</pre>",
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
    parts += [drawing.text(left + wide * (i + 0.5), 20, f"lr {rate:g}") for i, rate in enumerate(rates)]
    for row, r in enumerate(ranks):
        y = top + high * row
        parts.append(drawing.text(left - 8, y + high / 2 + 4, f"r {r}", "end"))
        for column, rate in enumerate(rates):
            one_or_none, x = cells.get((r, rate)), left + wide * column
            if one_or_none is None:
                continue
            one = one_or_none
            place = 1.0 if one.loss is None else order.index(one.loss) / max(1, len(order) - 1)
            colour = [round(a + (b - a) * place) for a, b in zip(LOW, HIGH, strict=True)]
            edge = (
                f'stroke="{BEST}" stroke-width="3"' if best is not None and one.name == best.name else 'stroke="none"'
            )
            fill = "#f1f3f4" if one.loss is None else "#" + "".join(f"{part:02x}" for part in colour)
            title = safe(f"{one.name}: {one.status} {one.reason}".strip())
            parts.append(
                f'<rect x="{x + 2}" y="{y + 2}" width="{wide - 4}" height="{high - 4}" fill="{fill}" {edge}><title>{title}</title></rect>'
            )
            ink = "#ffffff" if place < 0.5 else "#202124"
            parts.append(
                drawing.text(x + wide / 2, y + 20, one.status if one.loss is None else f"{one.loss:.4f}", ink=ink)
            )
            if one.loss is not None and one.steps < one.all_steps:
                parts.append(drawing.text(x + wide / 2, y + 35, f"step {one.steps} of {one.all_steps}", ink=ink))
    note = "Held-out loss, nats a token, by rank and learning rate; darker is lower. A job that ended early is told with its last one."
    return ["<h3>Rank and learning rate</h3>", f"<p>{note}</p>", *parts, "</svg>"]


def _table(group: Sequence[Outcome], best: Outcome | None) -> str:
    found = rows(group, {} if best is None else {"": best})
    head = "".join(f"<th>{safe(name)}</th>" for name in (*found[0], "why"))
    lines = []
    for one, row in zip(group, found, strict=True):
        kind = ' class="best"' if best is not None and one.name == best.name else ""
        cells = "".join(f"<td>{safe(text)}</td>" for text in row.values())
        lines.append(f'<tr{kind}>{cells}<td class="text">{safe(one.reason)}</td></tr>')
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"
