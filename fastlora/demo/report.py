"""The demo's report: one self-contained HTML file with plots as inline SVG, and its tables on the terminal."""

import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import metadata
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from fastlora import __version__
from fastlora.environment import all_findings

MODELS = {"base": "base, before", "lora": "LoRA", "full": "full fine-tuning"}
METHODS = {"lora": "LoRA", "full": "full fine-tuning"}
IN_MEMORY = {"lora": "LoRA, fastlora", "peft": "LoRA, PEFT", "full": "full fine-tuning"}
STEPPERS = {"fastlora": "fastlora", "peft": "PEFT + transformers"}
COLOURS = {"base": "#9aa0a6", "lora": "#1a73e8", "full": "#e8710a", "peft": "#188038", "fastlora": "#1a73e8"}
ROUGE_NAMES = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}
COSTS = {
    "trainable parameters": "{trainable_parameters:,}",
    "share of all parameters, %": "{share:.2f}",
    "file of the trained weights, bytes": "{adapter_bytes:,}",
    "optimiser steps": "{steps}",
    "training time, s": "{seconds:.1f}",
    "loss, last ten steps": "{loss:.4f}",
}
PACKAGES = ("torch", "transformers", "peft", "tokenizers", "rouge-score")

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #202124; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .25rem .8rem; border-bottom: 1px solid #dadce0; text-align: right; vertical-align: top; }
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
    settings, exact, memory, steps = (results[key] for key in ("settings", "exact_match", "peak_memory", "step_time"))
    quality, forgetting, cost, peaks, times = (_table(rows) for rows in _tables(results).values())
    base, lora, lr = results["base"], settings["lora"], settings["lr"]
    tasks = base["tasks"]
    rouge = {model: [results["rouge"][model][key] for key in ROUGE_NAMES] for model in MODELS}
    parts = [
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>fastlora demo</title>'
        f"<style>{STYLE}</style></head><body>",
        "<h1>fastlora demo: a small model learns to summarise dialogues</h1>",
        f"<p>The base is a Llama of {base['parameters']:,} parameters, trained from scratch on {len(tasks)}"
        f" generated tasks ({', '.join(tasks)}) and never on dialogues. Here it is adapted to"
        f" {settings['train_dialogues']} generated dialogues in {settings['epochs']} epochs of steps of"
        f" {settings['batch_size']}, once with LoRA (rank"
        f" {lora['r']}, alpha {lora['lora_alpha']}, dropout {lora['lora_dropout']}, {lora['target_modules']}, learning"
        f" rate {lr['lora']:g}; the base frozen) and once with all weights (learning rate {lr['full']:g})."
        " No held-out dialogue has the summary of a training dialogue.</p>",
        f"<h2>Summaries of {settings['test_dialogues']} held-out dialogues</h2>",
        quality,
        _bars(ROUGE_NAMES.values(), rouge, "F-measure, %"),
        "<h2>What the model could do before</h2>",
        f"<p>Exact match on {settings['test_examples_per_task']} held-out examples of each of the tasks the base was"
        " trained on. A fall is forgetting.</p>",
        forgetting,
        _bars(tasks, {model: [exact[model][task] for task in tasks] for model in MODELS}, "exact match, %"),
        "<h2>What it costs</h2>",
        cost,
        _lines({name: results["methods"][name]["losses"] for name in METHODS}, METHODS, "optimiser step", yscale="log"),
        f"<p>Peak memory: the highest resident memory of a process that only trains ({memory['steps']} steps of"
        f" {memory['rows']} dialogues), less what it had after its imports. The base's weights are in it.</p>",
        peaks,
        "<h2>Time of a training step</h2>",
        f"<p>Forward, backward and AdamW on the same batches of {steps['rows']} dialogues"
        f" ({steps['tokens_per_step']:.0f} tokens), one after the other, {steps['steps']} times; the median step of"
        f" fastlora takes <b>{steps['ratio']:.2f}</b> of PEFT's time. Each draws its own dropout masks, hence the small"
        " difference of the losses.</p>",
        times,
        _lines(steps["losses"], STEPPERS, "step, the first of them not timed"),
        "<h2>Some of the dialogues</h2>",
    ]
    for sample in results["samples"]:
        answers = [("reference", sample["reference"])]
        answers += [(name, sample[model] or "(nothing)") for model, name in MODELS.items()]
        parts += [f"<pre>{escape(sample['prompt'])}</pre>", _table(answers, "text")]
    origin = {"date": results["date"], "command": results["command"], "whole demo, s": f"{results['seconds']:.0f}"}
    origin |= {**results["machine"], "base made by": base["command"]}
    parts += ["<h2>Where and when</h2>", _table(origin.items(), "text"), "</body></html>\n"]
    return "\n".join(parts)


def show(results: dict[str, Any]) -> None:
    """Print the report's tables to the terminal."""
    console = Console()
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
    tasks = results["base"]["tasks"]
    means = [sum(exact[model][task] for task in tasks) / len(tasks) for model in MODELS]
    methods = [results["methods"][name] for name in METHODS]
    methods = [{**one, "share": 100 * one["trainable_parameters"] / one["parameters"]} for one in methods]
    peaks = [results["peak_memory"]["bytes"][name] / 2**20 for name in IN_MEMORY]
    return {
        f"summaries of {settings['test_dialogues']} held-out dialogues": [
            ["F-measure, %", *MODELS.values()],
            *(_percent(name, [results["rouge"][model][key] for model in MODELS]) for key, name in ROUGE_NAMES.items()),
            _percent("exact match, %", [exact[model]["summarization"] for model in MODELS]),
        ],
        f"{settings['test_examples_per_task']} held-out examples of each of the base's tasks": [
            ["exact match, %", *MODELS.values()],
            *(_percent(task, [exact[model][task] for model in MODELS], digits=0) for task in tasks),
            _percent("mean", means),
        ],
        "cost": [
            ["", *METHODS.values()],
            *([label, *(form.format_map(one) for one in methods)] for label, form in COSTS.items()),
        ],
        "memory": [["", *IN_MEMORY.values()], ["peak memory, MiB", *(f"{size:.0f}" for size in peaks)]],
        "training step": [
            ["", "median step, ms", "first loss", "loss, last ten steps"],
            *(_step_row(name, steps["seconds"][key], steps["losses"][key]) for key, name in STEPPERS.items()),
        ],
    }


def _percent(label: str, shares: Iterable[float], digits: int = 1) -> list[str]:
    return [label, *(f"{100 * share:.{digits}f}" for share in shares)]


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


def _bars(labels: Iterable[str], shares: Mapping[str, Iterable[float]], axis: str) -> str:
    labels, axes = list(labels), _axes()
    width = 0.8 / len(shares)
    for index, (model, values) in enumerate(shares.items()):
        places = [place + (index - (len(shares) - 1) / 2) * width for place in range(len(labels))]
        axes.bar(places, [100 * value for value in values], width, color=COLOURS[model], label=MODELS[model])
    axes.set_xticks(range(len(labels)), labels)
    axes.set(ylabel=axis, ylim=(0, 105))
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return _svg(axes)


def _lines(losses: Mapping[str, Sequence[float]], names: Mapping[str, str], axis: str, yscale: str = "linear") -> str:
    axes = _axes()
    for key, name in names.items():
        steps = range(1, len(losses[key]) + 1)
        axes.plot(steps, losses[key], color=COLOURS[key], label=name, linewidth=1, alpha=0.8)
    axes.set(xlabel=axis, ylabel="training loss, nats a token", yscale=yscale)
    axes.legend(frameon=False)
    return _svg(axes)


def _axes() -> Axes:
    return Figure(figsize=(9, 3.2), layout="constrained").subplots()


def _svg(axes: Axes) -> str:
    figure: Any = axes.get_figure()
    text = io.StringIO()
    # A fixed salt and no date: the same figures give the same file.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastlora"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]
