"""The demo's report: one self-contained HTML file with plots as inline SVG, and its tables on the terminal."""

import io
import sys
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import metadata
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from fastlora import __version__, comparison
from fastlora.comparison import BASE, Outcome
from fastlora.environment import all_findings

STEPPERS = {"fastlora": "fastlora", "peft": "PEFT + transformers"}
PACKAGES = ("torch", "transformers", "peft", "tokenizers", "rouge-score")
SIZE = (9, 3.2)  # inches

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #202124; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #dadce0; text-align: right; vertical-align: top; }
th:first-child, td:first-child, .text td { text-align: left; }
pre { background: #f1f3f4; padding: .8rem; white-space: pre-wrap; }
svg { max-width: 100%; height: auto; }
"""


def machine() -> dict[str, str]:
    """Processor, Python and the packages' versions, one line each."""
    found = {finding.name: finding.detail for finding in all_findings() if finding.part == "machine"}
    return {**found, **{package: metadata.version(package) for package in PACKAGES}, "fastlora": __version__}


def html(results: dict[str, Any]) -> str:
    """The whole report as one HTML document; it names no other file and no address."""
    settings, base, steps = results["settings"], results["base"], results["step_time"]
    dialogues, exact = settings["dialogues"], results["exact_match"]
    methods, rates, kept, times = (_table(rows) for rows in _tables(results).values())
    parts = [
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>fastlora demo</title>'
        f"<style>{STYLE}</style></head><body>",
        "<h1>fastlora demo: a small model learns to summarise dialogues</h1>",
        f"<p>The base is a Llama of {base['parameters']:,} parameters, trained from scratch on {len(base['tasks'])}"
        f" generated tasks ({', '.join(base['tasks'])}) and never on dialogues. Here each method trains on"
        f" {dialogues['train']} generated dialogues in {settings['epochs']} epochs of steps of {settings['rows']}, at"
        f" several learning rates. Of these the best was chosen on {dialogues['validation']} other dialogues, and the"
        f" figures are of {dialogues['test']} more, which nothing was chosen by. No summary is in two of the three.</p>",
        "<h2>Methods side by side</h2>",
        methods,
        "<p>Losses are in nats a token. Forgetting is the rise of the loss on"
        f" {settings['retained']} held-out examples of each of the tasks that the base was trained on."
        " <code>fastlora compare</code> makes the same table and plot of your model and rows.</p>",
        _svg(comparison.figure([Outcome(**one) for one in results["outcomes"]])),
        "<h2>Every rate that was tried</h2>",
        rates,
        _lines(results["losses"], "optimiser step", yscale="log"),
        "<h2>What the model could do before, and still can</h2>",
        f"<p>Exact match on the same {settings['retained']} examples of each of the base's tasks. A fall is forgetting.</p>",
        kept,
        _bars(base["tasks"], exact, "exact match, %"),
        "<h2>Time of a training step</h2>",
        f"<p>Forward, backward and AdamW of LoRA on the same batches of {steps['rows']} dialogues"
        f" ({steps['tokens_per_step']:.0f} tokens), one after the other, {steps['steps']} times; the median step of"
        f" fastlora takes <b>{steps['ratio']:.2f}</b> of PEFT's time. Each draws its own dropout masks, hence the small"
        " difference of the losses.</p>",
        times,
        _lines({name: steps["losses"][key] for key, name in STEPPERS.items()}, "step, the first of them not timed"),
        "<h2>Some of the dialogues</h2>",
    ]
    for sample in results["samples"]:
        answers = [("reference", sample["reference"])]
        answers += [(name, text or "(nothing)") for name, text in sample["answers"].items()]
        parts += [f"<pre>{escape(sample['prompt'])}</pre>", _table(answers, "text")]
    origin = {"date": results["date"], "command": results["command"], "whole demo, s": f"{results['seconds']:.0f}"}
    origin |= {**results["machine"], "base made by": base["command"]}
    parts += ["<h2>Where and when</h2>", _table(origin.items(), "text"), "</body></html>\n"]
    return "\n".join(parts)


def show(results: dict[str, Any]) -> None:
    """Print the report's tables to the terminal."""
    # Where nobody looks rich would cut lines at 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 200)
    for title, (headings, *rows) in _tables(results).items():
        table = Table(title=title, title_justify="left")
        for column, heading in enumerate(headings):
            table.add_column(heading, justify="right" if column else "left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print(f"fastlora's step takes {results['step_time']['ratio']:.2f} of PEFT's time")


def _tables(results: dict[str, Any]) -> dict[str, list[list[str]]]:
    """All figures, by title: a row of headings, then rows that begin with what they tell."""
    settings, exact, steps = results["settings"], results["exact_match"], results["step_time"]
    outcomes = [Outcome(**one) for one in results["outcomes"]]
    compared = list(comparison.rows(outcomes))
    tasks = results["base"]["tasks"]
    means = [sum(shares.values()) / len(shares) for shares in exact.values()]
    return {
        f"each method at its best rate, on {settings['dialogues']['test']} held-out dialogues": [
            list(compared[0]),
            *(list(row.values()) for row in compared),
        ],
        "every rate": [
            ["method", "lr", "training loss", "validation loss", "held-out loss", "ROUGE-1", "forgetting", ""],
            *(_rate(one, one.name in results["best"]) for one in outcomes if one.method != BASE),
        ],
        f"{settings['retained']} held-out examples of each of the base's tasks": [
            ["exact match, %", *exact],
            *(_percent(task, [shares[task] for shares in exact.values()]) for task in tasks),
            _percent("mean", means),
        ],
        "training step of LoRA": [
            ["", "median step, ms", "first loss", "loss, last ten steps"],
            *(_step_row(name, steps["seconds"][key], steps["losses"][key]) for key, name in STEPPERS.items()),
        ],
    }


def _rate(one: Outcome, chosen: bool) -> list[str]:
    losses = [f"{loss:.4f}" for loss in (one.train_loss or 0.0, one.eval_loss, one.loss)]
    rouge = f"{100 * (one.rouge1 or 0.0):.1f}"
    return [one.kind, f"{one.lr:g}", *losses, rouge, f"{one.forgetting or 0.0:+.4f}", "chosen" if chosen else ""]


def _percent(label: str, shares: Iterable[float]) -> list[str]:
    return [label, *(f"{100 * share:.0f}" for share in shares)]


def _step_row(name: str, seconds: float, losses: Sequence[float]) -> list[str]:
    last = losses[-10:]
    return [name, f"{1000 * seconds:.1f}", f"{losses[0]:.4f}", f"{sum(last) / len(last):.4f}"]


def _table(rows: Iterable[Sequence[str]], kind: str = "figures") -> str:
    """kind: "figures", whose first row is the headings, or "text", which has none."""
    body = ""
    for number, row in enumerate(rows):
        cell = "th" if kind == "figures" and number == 0 else "td"
        body += f"<tr>{''.join(f'<{cell}>{escape(text)}</{cell}>' for text in row)}</tr>"
    return f'<table class="{kind}">{body}</table>'


def _bars(labels: Sequence[str], shares: Mapping[str, Mapping[str, float]], axis: str) -> str:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes, width = figure.subplots(), 0.8 / len(shares)
    for index, (name, values) in enumerate(shares.items()):
        places = [place + (index - (len(shares) - 1) / 2) * width for place in range(len(labels))]
        axes.bar(places, [100 * values[label] for label in labels], width, color=_colour(index, name), label=name)
    axes.set_xticks(range(len(labels)), labels)
    axes.set(ylabel=axis, ylim=(0, 105))
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return _svg(figure)


def _colour(index: int, name: str) -> str:
    """The base's is grey, and each method's the one that it has in compare's plot."""
    return "tab:gray" if name == BASE else f"C{index - 1}"


def _lines(losses: Mapping[str, Sequence[float]], axis: str, yscale: str = "linear") -> str:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    for name, of_steps in losses.items():
        axes.plot(range(1, len(of_steps) + 1), of_steps, label=name, linewidth=1, alpha=0.8)
    axes.set(xlabel=axis, ylabel="training loss, nats a token", yscale=yscale)
    axes.legend(frameon=False)
    return _svg(figure)


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    # A fixed salt and no date: the same figures give the same file.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastlora"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]
