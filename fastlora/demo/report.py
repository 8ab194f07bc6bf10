"""The demo's report: one self-contained HTML file with plots as inline SVG, and a short table on the terminal."""

import io
from collections.abc import Sequence
from html import escape
from importlib import metadata
from typing import Any

from matplotlib import rc_context
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
PACKAGES = ("torch", "transformers", "peft", "tokenizers", "rouge-score")

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #202124; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .25rem .8rem; border-bottom: 1px solid #dadce0; text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; }
pre { background: #f1f3f4; padding: .8rem; white-space: pre-wrap; }
svg { max-width: 100%; height: auto; }
.note { color: #5f6368; }
"""


def machine() -> dict[str, str]:
    """Processor, Python and the packages' versions, one line each."""
    found = {finding.name: finding.detail for finding in all_findings() if finding.part == "machine"}
    return {**found, **{package: metadata.version(package) for package in PACKAGES}, "fastlora": __version__}


def html(results: dict[str, Any]) -> str:
    """The whole report as one HTML document; it names no other file and no address."""
    parts = [
        "<h1>fastlora demo: a small model learns to summarise dialogues</h1>",
        _introduction(results),
        f"<h2>Summaries of {results['settings']['test_dialogues']} held-out dialogues</h2>",
        _rouge_table(results),
        _rouge_plot(results["rouge"]),
        "<h2>What the model could do before</h2>",
        f"<p>Exact match on {results['settings']['test_examples_per_task']} held-out examples of each of the tasks the base was"
        " trained on. A fall is forgetting.</p>",
        _forgetting_table(results),
        _forgetting_plot(results["exact_match"]),
        "<h2>What it costs</h2>",
        _cost_table(results),
        _training_plot(results["methods"]),
        _memory_table(results["peak_memory"]),
        "<h2>Time of a training step</h2>",
        _step_table(results),
        _step_plot(results["step_time"]["losses"]),
        "<h2>Some of the dialogues</h2>",
        *[_sample(sample) for sample in results["samples"]],
        "<h2>Where and when</h2>",
        _provenance(results),
    ]
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>fastlora demo</title>'
        f"<style>{STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def show(results: dict[str, Any]) -> None:
    """Print the report's figures to the terminal."""
    console = Console()
    settings = results["settings"]
    counts = (
        f"ROUGE on {settings['test_dialogues']} dialogues, {settings['test_examples_per_task']} examples of each task"
    )
    quality = Table(title=f"after training on dialogue summaries: {counts}", title_justify="left")
    for heading in ("", *MODELS.values()):
        quality.add_column(heading, justify="left" if not heading else "right")
    for key, name in ROUGE_NAMES.items():
        quality.add_row(name, *[f"{100 * results['rouge'][model][key]:.1f}" for model in MODELS])
    for task in results["base"]["tasks"]:
        quality.add_row(f"{task}, exact %", *[f"{100 * results['exact_match'][model][task]:.0f}" for model in MODELS])
    mean = {model: _mean_of_tasks(results, model) for model in MODELS}
    quality.add_row("mean of these tasks, exact %", *[f"{100 * mean[model]:.1f}" for model in MODELS])
    console.print(quality)

    cost = Table(title="cost", title_justify="left")
    for heading in ("", *METHODS.values()):
        cost.add_column(heading, justify="left" if not heading else "right")
    for label, values in _cost_rows(results):
        cost.add_row(label, *values)
    console.print(cost)
    peaks = zip(IN_MEMORY.values(), _mebibytes(results["peak_memory"]), strict=True)
    console.print("peak memory: " + ", ".join(f"{name} {size} MiB" for name, size in peaks))
    steps = results["step_time"]
    ours, theirs = (1000 * steps["seconds"][name] for name in ("fastlora", "peft"))
    losses = {name: _tail(steps["losses"][name]) for name in steps["losses"]}
    console.print(
        f"step: fastlora {ours:.1f} ms (loss {losses['fastlora']:.4f}), PEFT + transformers {theirs:.1f} ms"
        f" (loss {losses['peft']:.4f}), ratio {steps['ratio']:.2f}"
    )


def _introduction(results: dict[str, Any]) -> str:
    base, settings = results["base"], results["settings"]
    lora, lr = settings["lora"], settings["lr"]
    return (
        f"<p>The base is a Llama of {base['parameters']:,} parameters, trained from scratch on {len(base['tasks'])}"
        f" generated tasks ({', '.join(base['tasks'])}) and never on dialogues. Here it is adapted to"
        f" {settings['train_dialogues']} generated dialogues in {settings['epochs']} epochs of steps of"
        f" {settings['batch_size']}, once with LoRA (rank"
        f" {lora['r']}, alpha {lora['lora_alpha']}, dropout {lora['lora_dropout']}, {lora['target_modules']}, learning"
        f" rate {lr['lora']:g}; the base frozen) and once with all weights (learning rate {lr['full']:g})."
        " No held-out dialogue has the summary of a training dialogue.</p>"
    )


def _rouge_table(results: dict[str, Any]) -> str:
    rows = [
        [name, *[f"{100 * results['rouge'][model][key]:.1f}" for model in MODELS]] for key, name in ROUGE_NAMES.items()
    ]
    exact = ["exact match, %", *[f"{100 * results['exact_match'][model]['summarization']:.1f}" for model in MODELS]]
    return _table(["F-measure, %", *MODELS.values()], [*rows, exact])


def _forgetting_table(results: dict[str, Any]) -> str:
    scores = results["exact_match"]
    rows = [[task, *[f"{100 * scores[model][task]:.0f}" for model in MODELS]] for task in results["base"]["tasks"]]
    mean = ["mean", *[f"{100 * _mean_of_tasks(results, model):.1f}" for model in MODELS]]
    return _table(["exact match, %", *MODELS.values()], [*rows, mean])


def _mean_of_tasks(results: dict[str, Any], model: str) -> float:
    tasks = results["base"]["tasks"]
    return sum(results["exact_match"][model][task] for task in tasks) / len(tasks)


def _cost_rows(results: dict[str, Any]) -> list[tuple[str, list[str]]]:
    methods = [results["methods"][name] for name in METHODS]
    return [
        ("trainable parameters", [f"{method['trainable_parameters']:,}" for method in methods]),
        ("share of all parameters, %", [f"{100 * m['trainable_parameters'] / m['parameters']:.2f}" for m in methods]),
        ("file of the trained weights, bytes", [f"{method['adapter_bytes']:,}" for method in methods]),
        ("optimiser steps", [str(method["steps"]) for method in methods]),
        ("training time, s", [f"{method['seconds']:.1f}" for method in methods]),
        ("loss, last ten steps", [f"{method['loss']:.4f}" for method in methods]),
    ]


def _cost_table(results: dict[str, Any]) -> str:
    return _table(["", *METHODS.values()], [[label, *values] for label, values in _cost_rows(results)])


def _memory_table(memory: dict[str, Any]) -> str:
    note = (
        f"<p>Peak memory: the highest resident memory of a process that only trains ({memory['steps']} steps of"
        f" {memory['rows']} dialogues), less what it had after its imports. The base's weights are in it.</p>"
    )
    return note + _table(["", *IN_MEMORY.values()], [["peak memory, MiB", *_mebibytes(memory)]])


def _mebibytes(memory: dict[str, Any]) -> list[str]:
    return [f"{memory['bytes'][name] / 2**20:.0f}" for name in IN_MEMORY]


def _step_table(results: dict[str, Any]) -> str:
    steps = results["step_time"]
    rows = []
    for key, name in STEPPERS.items():
        losses = steps["losses"][key]
        rows.append([name, f"{1000 * steps['seconds'][key]:.1f}", f"{losses[0]:.4f}", f"{_tail(losses):.4f}"])
    note = (
        f"<p>Forward, backward and AdamW on the same batches of {steps['rows']} dialogues"
        f" ({steps['tokens_per_step']:.0f} tokens), one after the other, {steps['steps']} times; the median step of"
        f" fastlora takes <b>{steps['ratio']:.2f}</b> of PEFT's time. Each draws its own dropout masks, hence the small"
        " difference of the losses.</p>"
    )
    return note + _table(["", "median step, ms", "first loss", "loss, last ten steps"], rows)


def _tail(losses: Sequence[float]) -> float:
    return sum(losses[-10:]) / len(losses[-10:])


def _sample(sample: dict[str, str]) -> str:
    answers = [["reference", sample["reference"]], *[[name, sample[model]] for model, name in MODELS.items()]]
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td style='text-align: left'>{escape(text) or '<i>nothing</i>'}</td></tr>"
        for name, text in answers
    )
    return f"<pre>{escape(sample['prompt'])}</pre><table>{rows}</table>"


def _provenance(results: dict[str, Any]) -> str:
    rows = [["date", results["date"]], ["command", results["command"]], ["whole demo, s", f"{results['seconds']:.0f}"]]
    rows += [[name, detail] for name, detail in results["machine"].items()]
    rows += [["base made by", results["base"]["command"]]]
    cells = "".join(f"<tr><td>{escape(k)}</td><td style='text-align: left'>{escape(v)}</td></tr>" for k, v in rows)
    return f"<table>{cells}</table>"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _rouge_plot(rouge: dict[str, dict[str, float]]) -> str:
    groups = {model: [100 * rouge[model][key] for key in ROUGE_NAMES] for model in MODELS}
    return _bars(list(ROUGE_NAMES.values()), groups, "F-measure, %")


def _forgetting_plot(exact_match: dict[str, dict[str, float]]) -> str:
    tasks = [task for task in exact_match["base"] if task != "summarization"]
    groups = {model: [100 * exact_match[model][task] for task in tasks] for model in MODELS}
    return _bars(tasks, groups, "exact match, %")


def _bars(labels: Sequence[str], groups: dict[str, list[float]], axis: str) -> str:
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(groups)
    for index, (model, values) in enumerate(groups.items()):
        places = [place + (index - (len(groups) - 1) / 2) * width for place in range(len(labels))]
        axes.bar(places, values, width, color=COLOURS[model], label=MODELS[model])
    axes.set_xticks(range(len(labels)), labels)
    axes.set(ylabel=axis, ylim=(0, 105))
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return _svg(figure)


def _training_plot(methods: dict[str, dict[str, Any]]) -> str:
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots()
    for name, label in METHODS.items():
        losses = methods[name]["losses"]
        axes.plot(range(1, len(losses) + 1), losses, color=COLOURS[name], label=label, linewidth=1, alpha=0.8)
    axes.set(xlabel="optimiser step", ylabel="training loss, nats a token", yscale="log")
    axes.legend(frameon=False)
    return _svg(figure)


def _step_plot(losses: dict[str, list[float]]) -> str:
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    axes = figure.subplots()
    for name, label in STEPPERS.items():
        axes.plot(range(1, len(losses[name]) + 1), losses[name], color=COLOURS[name], label=label)
    axes.set(xlabel="step, the first of them not timed", ylabel="loss, nats a token")
    axes.legend(frameon=False)
    return _svg(figure)


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    # A fixed salt and no date: the same figures give the same file.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastlora"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]
