"""Pages for people: HTML that names no other file and no address, with curves as inline SVG, light or dark. What strangers wrote is escaped."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape

Point = tuple[float, float]

BEST = "#d93025"
LINES = ("#1a73e8", "#e8710a", "#188038", "#9334e6", "#12808c", "#b80672", "#8a6d00", "#80868b")
WIDTH, HEIGHT = 860, 300  # of a plot, in pixels
LEFT, BELOW, RIGHT = 64, 40, 170  # room for its axes, and for the names
POINTS = 400  # of a curve, at most
SMOOTH = 0.1  # weight of a step in the running mean
UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
STYLE = """
:root { color-scheme: light dark; --ink: #202124; --paper: #fff; --line: #dadce0; --quiet: #f1f3f4; --soft: #5f6368; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaed; --paper: #17181a; --line: #3c4043; --quiet: #26282b; --soft: #9aa0a6; }
}
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: var(--ink); background: var(--paper); }
table { border-collapse: collapse; margin: 1rem 0; font-size: 14px; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th:first-child, td:first-child, td.text, table.text :is(th, td) { text-align: left; }
td, pre { unicode-bidi: isolate; overflow-wrap: anywhere; min-width: 2.5rem; }
tr.best td, td.changed { font-weight: 600; }
pre { background: var(--quiet); padding: .8rem; white-space: pre-wrap; }
.note { color: var(--soft); }
details { margin: 1rem 0; }
svg { max-width: 100%; height: auto; font: 12px system-ui, sans-serif; fill: var(--ink); }
svg .grid { stroke: var(--line); }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def safe(text: object) -> str:
    """As HTML and SVG have it: escaped, and without the characters that neither may hold."""
    return UNPRINTABLE.sub("\ufffd", escape(str(text)))


def page(title: str, parts: Iterable[str]) -> str:
    """A whole document of what stands in its body; a browser loads and runs nothing for it."""
    head = (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{safe(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<style>{STYLE}</style></head><body>"
    )
    return "\n".join([head, *parts, "</body></html>\n"])


def text(x: float, y: float, words: str, anchor: str = "middle", ink: str | None = None) -> str:
    """Of an SVG. ink: a colour, None: the page's own."""
    colour = f' fill="{ink}"' if ink else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{colour}>{safe(words)}</text>'


def table(rows: Sequence[Sequence[object]], heads: Sequence[object] = (), kind: str = "") -> str:
    """A cell a value. kind: a class, text for cells that are read and not compared."""
    name = f' class="{kind}"' if kind else ""
    head = f"<tr>{''.join(f'<th>{safe(one)}</th>' for one in heads)}</tr>" if heads else ""
    lines = "".join(f"<tr>{''.join(f'<td>{safe(one)}</td>' for one in row)}</tr>" for row in rows)
    return f"<table{name}>{head}{lines}</table>"


def thinned(points: Sequence[Point]) -> list[Point]:
    """No more than POINTS and the last."""
    every = max(1, math.ceil(len(points) / POINTS))
    return [*points[::every], *(points[-1:] if (len(points) - 1) % every else ())]


def running_mean(points: Sequence[Point]) -> list[Point]:
    """Thinned."""
    mean = 0.0
    found: list[Point] = []
    for step, value in points:
        mean = value if not found else mean + SMOOTH * (value - mean)
        found.append((step, mean))
    return thinned(found)


def curves(series: Mapping[str, Sequence[Point]], foremost: str | None = None, *, logarithmic: bool = True) -> str:
    """Values over optimiser steps as an SVG; a point alone is a dot.

    Args:
        foremost: the name of the curve that lies over the others.
    """
    drawn = {name: points for name, points in series.items() if points}
    if not drawn:
        return "<p>None.</p>"
    every = [point for points in drawn.values() for point in points]
    steps = max(step for step, _ in every)

    def scaled(value: float) -> float:
        return math.log(max(value, 1e-9)) if logarithmic else value

    low, high = (scaled(edge(value for _, value in every)) for edge in (min, max))
    low, high = (low - 0.05, high + 0.05) if high - low < 1e-3 else (low, high)

    def place(point: Point) -> Point:
        x = LEFT + (WIDTH - LEFT - RIGHT) * point[0] / max(steps, 1)
        return x, 10 + (HEIGHT - BELOW - 10) * (high - scaled(point[1])) / (high - low)

    parts = [f'<svg viewBox="0 0 {WIDTH} {max(HEIGHT, 24 + 15 * len(drawn))}" width="{WIDTH}" role="img">']
    for i in range(5):
        at = low + (high - low) * i / 4
        value = math.exp(at) if logarithmic else at
        _, y = place((0, value))
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
        parts.append(text(LEFT - 6, y + 4, f"{value:.3g}", "end"))
        parts.append(text(place((steps * i / 4, value))[0], HEIGHT - 20, f"{steps * i / 4:.0f}"))
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, "optimiser step"))
    for number, name in enumerate(drawn):
        colour = BEST if name == foremost else LINES[number % len(LINES)]
        parts.append(text(WIDTH - RIGHT + 10, 20 + 15 * number, name, "start", colour))
    # The foremost last: it lies over the others.
    for name in sorted(drawn, key=lambda name: name == foremost):
        first = name == foremost
        colour = BEST if first else LINES[list(drawn).index(name) % len(LINES)]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, drawn[name]))
        shape = f'stroke="{colour}" stroke-width="{2.5 if first else 1}" fill="none" opacity="{1 if first else 0.7}"'
        parts.append(f'<polyline points="{points}" {shape}><title>{safe(name)}</title></polyline>')
        x, y = place(drawn[name][-1])
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>')
    return "\n".join([*parts, "</svg>"])
