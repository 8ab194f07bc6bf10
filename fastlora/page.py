"""report.html: a training on one page that names no other file and no address: curves, answers before and after, what ran in each layer."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from fastlora import drawing, reading, writing
from fastlora.drawing import Point, curves, running_mean, safe, table, thinned
from fastlora.metrics import SAMPLES, VALIDATION
from fastlora.typed import fits, gigabytes, is_finite, listed

NAME = "report.html"
SHOWN = 20  # samples
NUMBER = re.compile(r"\.\d+(?=\.|$)")
CHARACTERS = 2000  # of a sample's text
FIGURES = {
    "loss, first steps": "{first_loss:.4f}",
    "loss, last steps": "{loss:.4f}",
    "steps": "{steps:,}",
    "tokens": "{tokens:,}",
    "tokens a second": "{tokens_per_second:,.0f}",
    "seconds in steps": "{seconds:,.1f}",
    "rows": "{rows:,}",
    "trained parameters": "{trainable_parameters:,} of {parameters:,}",
    "bytes of the weights": "{adapter_bytes:,}",
}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; none where there is none.

    Raises:
        ValueError: a line is no object; the message has FILE:LINE.
    """
    found = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.is_file() else (), 1):
        try:
            found.append(reading.json_object(line, strict=False))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
    return found


def write(
    output: Path,
    summary: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    layers: Iterable[Sequence[str]],
) -> None:
    """`html` into OUTPUT, with what there is of validation.jsonl and samples.jsonl.

    Raises:
        OSError: it cannot be written.
        ValueError: one of those has a line that is no object.
    """
    validations, samples = read_lines(output / VALIDATION), read_lines(output / SAMPLES)
    content = html(summary, records, validations, samples, layers)
    writing.whole(output / NAME, content.encode("utf-8"))


def html(
    summary: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    validations: Sequence[Mapping[str, Any]],
    samples: Sequence[Mapping[str, Any]],
    layers: Iterable[Sequence[str]],
) -> str:
    """
    Args:
        summary: what summary.json has.
        records, validations, samples: of metrics.jsonl, validation.jsonl and samples.jsonl.
        layers: name, implementation and reason of each, as `fastlora.report` tells.
    """
    config = summary["config"]
    parts = [
        f"<h1>fastlora: {safe(config['method'])} of {safe(Path(config['model']).name)}</h1>",
        f'<p class="note">{safe(summary["date"])}, {safe(config["model"])}, {safe(summary["device"])},'
        f" {safe(summary['compute_dtype'])}, fastlora {safe(summary['versions']['fastlora'])}</p>",
        table(_figures(summary), kind="text"),
        "<h2>Training loss</h2>",
        '<p class="note">Nats a labelled token: each step&#x27;s, and their running mean.</p>',
        _losses(records),
        *_tasks(records),
        *_validation(validations),
        *_samples(samples, (summary.get("validation") or {}).get("step")),
        "<h2>What ran in each layer</h2>",
        *_layers(layers),
        "<h2>Data</h2>",
        table(
            [
                (one["file"], one["option"], one["rows"], one.get("bytes", ""), one.get("sha256", "no file"))
                for one in summary["data"]
            ],
            ("file", "option", "rows trained on", "bytes", "SHA-256"),
        ),
        "<h2>Options that are not as they are unless told</h2>",
        table([(key, _shown(value)) for key, value in summary["changed"].items()] or [("none", "")], kind="text"),
        "<details><summary>All of them</summary>",
        table([(key, _shown(value)) for key, value in config.items()], kind="text"),
        "</details>",
        "<h2>Made with</h2>",
        table(list(summary["versions"].items()), kind="text"),
    ]
    return drawing.page(f"fastlora: {Path(config['output']).name}", parts)


def _figures(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = [(name, form.format(**summary)) for name, form in FIGURES.items()]
    if summary["peak_memory"] is not None:
        found.append(("memory at its peak", gigabytes(summary["peak_memory"])))
    for name in ("best_step", "best_eval_loss"):
        if summary.get(name) is not None:
            found.append((name, _shown(summary[name])))
    return found


def _points(records: Sequence[Mapping[str, Any]], name: str) -> list[Point]:
    """What is a number of what is called so, by step."""
    pairs = [(record.get("step"), record.get(name)) for record in records]
    return [(step, value) for step, value in pairs if _is_number(step) and _is_number(value)]


def _is_number(value: Any) -> TypeGuard[float]:
    return fits(value, float) and is_finite(value)


def _losses(records: Sequence[Mapping[str, Any]]) -> str:
    points = _points(records, "loss")
    return curves({"step": thinned(points), "running mean": running_mean(points)}, "running mean")


def _tasks(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The running mean of each task's loss, over the steps that had rows of it."""
    found: dict[str, list[Point]] = {}
    rows: dict[str, int] = {}
    for record in records:
        step, tasks = record.get("step"), record.get("tasks")
        if not _is_number(step):
            continue
        for name, one in tasks.items() if isinstance(tasks, dict) else ():
            if fits(one, dict[str, Any]) and _is_number(one.get("loss")):
                found.setdefault(name, []).append((step, one["loss"]))
                rows[name] = rows.get(name, 0) + (one["rows"] if fits(one.get("rows"), int) else 0)
    if not found:
        return []
    lines = [
        (name, rows[name], f"{points[0][1]:.4f}", f"{running_mean(points)[-1][1]:.4f}")
        for name, points in found.items()
    ]
    return [
        "<h2>Training loss by task</h2>",
        curves({name: running_mean(points) for name, points in found.items()}),
        table(lines, ("task", "rows", "first loss", "running mean at the end")),
    ]


def _validation(validations: Sequence[Mapping[str, Any]]) -> list[str]:
    losses = {
        "held-out rows": _points(validations, "eval_loss"),
        "retained rows": _points(validations, "retain_loss"),
    }
    if not any(losses.values()):
        return []
    parts = ["<h2>Held-out loss</h2>"]
    if losses["retained rows"]:
        parts.append('<p class="note">A rise on the retained rows is forgetting.</p>')
    parts.append(curves(losses, "held-out rows"))
    names = [name for name in dict.fromkeys(key for one in validations for key in one) if name.startswith("eval_")]
    scores = {
        name.removeprefix("eval_"): points
        for name in names
        if name not in ("eval_loss", "eval_tokens") and (points := _points(validations, name))
    }
    if scores:
        parts += ["<h3>Answers to held-out rows</h3>", curves(scores, logarithmic=False)]
    heads = list(dict.fromkeys(key for one in validations for key in one))
    return [*parts, table([[_shown(one.get(name, "")) for name in heads] for one in validations], heads)]


def _samples(samples: Sequence[Mapping[str, Any]], step: Any) -> list[str]:
    """Each sample's first answer, and that of the weights that are left, which are of that step; else its last."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for one in samples:
        found.setdefault((_shown(one.get("source")), _shown(one.get("prompt"))), []).append(one)
    if not found:
        return []
    parts = ["<h2>Answers before and after</h2>"]
    for (source, prompt), answers in list(found.items())[:SHOWN]:
        first, last = answers[0], next((one for one in answers if one.get("step") == step), answers[-1])
        lines = [("prompt", prompt), ("expected", _shown(last.get("reference", "")))]
        lines.append((f"step {_shown(first.get('step'))}", _shown(first.get("answer", ""))))
        if last is not first:
            lines.append((f"step {_shown(last.get('step'))}", _shown(last.get("answer", ""))))
        cells = "".join(f"<tr><th>{safe(name)}</th><td><pre>{safe(words)}</pre></td></tr>" for name, words in lines)
        parts.append(f"<h3>{safe(source)}</h3><table>{cells}</table>")
    if len(found) > SHOWN:
        parts.append(f'<p class="note">And {len(found) - SHOWN} more in {SAMPLES}.</p>')
    return parts


def _layers(layers: Iterable[Sequence[str]]) -> list[str]:
    """Those that ran alike on one line, the most first; a number between dots is one among many blocks, and left out."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, implementation, reason in layers:
        groups.setdefault((implementation, reason), []).append(NUMBER.sub(".*", name))
    lines = sorted(groups.items(), key=lambda one: -len(one[1]))
    if not lines:
        return ["<p>Plain PyTorch in all of them.</p>"]
    cells = [
        (len(names), implementation, reason, listed(list(dict.fromkeys(names))))
        for (implementation, reason), names in lines
    ]
    return [table(cells, ("layers", "by", "why", "which"), "text")]


def _shown(value: Any) -> str:
    """As text of bounded length."""
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= CHARACTERS else text[:CHARACTERS] + " ..."
