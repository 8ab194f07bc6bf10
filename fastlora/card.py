"""The model card beside a trained adapter or model: README.md, with the front matter that hubs read."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.utils import HFValidationError, validate_repo_id

from fastlora.config import WHOLE
from fastlora.data.sources import HUB
from fastlora.drawing import UNPRINTABLE

PIPELINES = {"CausalLM": "text-generation", "Seq2SeqLM": "text2text-generation"}


def text(summary: Mapping[str, Any], loader: str = "CausalLM") -> str:
    """
    Args:
        summary: what summary.json has.
        loader: what the model's class is called by transformers and PEFT behind AutoModelFor and AutoPeftModelFor.
    """
    config, method = summary["config"], summary["config"]["method"]
    whole = method in WHOLE
    name = Path(config["output"]).name
    parts = [
        _front_matter(summary, PIPELINES[loader]),
        f"# {_plain(name)}",
        f"{_what(method)} of {_code(config['model'])}, trained with fastlora: {_steps(summary)}, of {summary['rows']:,}.",
        "## How to load it",
        _how_to_load(config, whole, loader),
        "## What it was trained on",
        _table(
            [
                (_code(Path(one["file"]).name), one["option"], _count(one["rows"]), _code(one.get("sha256", "no file")))
                for one in summary["data"]
            ],
            ("file", "option", "rows to train on", "SHA-256"),
        ),
        "## How",
        f"{_steps(summary)}, {summary['tokens']:,} tokens, {summary['trainable_parameters']:,} of"
        f" {summary['parameters']:,} parameters, {summary['seconds']:,.0f} s in steps on {_plain(summary['device'])}."
        " Options that are not as they are unless told:",
        _table(
            [(_code(key), _code(value)) for key, value in summary["changed"].items()] or [("none", "")],
            ("option", "value"),
        ),
        "## Results",
        _table(results(summary), ("", "")),
        "## Made with",
        _table([(_plain(key), _plain(value)) for key, value in summary["versions"].items()], ("package", "version")),
    ]
    return "\n\n".join(parts) + "\n"


def results(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What came out, by name: training loss, and what was measured on held-out rows where there were any."""
    found = [
        ("training loss, first steps", f"{summary['first_loss']:.4f}"),
        ("training loss, last steps", f"{summary['loss']:.4f}"),
    ]
    for key in ("best_step", "best_eval_loss"):
        if summary.get(key) is not None:
            found.append((key, _number(summary[key])))
    validation = summary.get("validation") or {}
    return found + [(key, _number(value)) for key, value in validation.items() if value is not None]


def _what(method: str) -> str:
    if method == "full":
        return "A fine-tuned copy"
    return "A copy with trained biases" if method == "bitfit" else f"An adapter ({method})"


def _steps(summary: Mapping[str, Any]) -> str:
    config, steps = summary["config"], summary["steps"]
    rows = config["batch_size"] * config["gradient_accumulation_steps"] * summary["processes"]
    most = (
        "" if summary["tasks"] or summary["rows"] % rows == 0 else "at most "
    )  # an epoch's last step has what is left
    return f"{steps:,} step{'s' * (steps != 1)} of {most}{rows:,} row{'s' * (rows != 1)}"


def _front_matter(summary: Mapping[str, Any], pipeline: str) -> str:
    config = summary["config"]
    method = config["method"]
    content = {
        "library_name": "transformers" if method in WHOLE else "peft",
        "pipeline_tag": pipeline,
        "tags": ["fastlora", method],
        "language": "und",  # ISO 639's for undetermined: nobody has said
    }
    # The hub refuses a card that names a folder or file as a model's or data set's id.
    if _is_hub_id(config["model"]):
        content = {"base_model": config["model"], **content}
    named = [
        one["file"].removeprefix(HUB).partition(":")[0]
        for one in summary["data"]
        if one["option"] == "data" and one["file"].startswith(HUB)
    ]
    if named:
        content["datasets"] = list(dict.fromkeys(named))
    return f"---\n{yaml.safe_dump(content, sort_keys=False, allow_unicode=True)}---"


def _is_hub_id(model: str) -> bool:
    try:
        validate_repo_id(model)
    except HFValidationError:
        return False
    return True


def _how_to_load(config: Mapping[str, Any], whole: bool, loader: str) -> str:
    folder = json.dumps(config["output"])
    model = f"AutoModelFor{loader}" if whole else f"AutoPeftModelFor{loader}"
    imports = ["from transformers import AutoTokenizer"]
    if whole:
        imports = [f"from transformers import {model}, AutoTokenizer"]
    else:
        imports.insert(0, f"from peft import {model}")
    if config["method"] == "adapter":
        imports.insert(0, "import fastlora.bottleneck  # PEFT has no bottleneck adapters of its own")
    calls = [f"model = {model}.from_pretrained({folder})", f"tokenizer = AutoTokenizer.from_pretrained({folder})"]
    return "\n".join(["```python", *imports, *calls, "```"])


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}" if isinstance(value, float) else _plain(value)


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _plain(text: Any) -> str:
    """As text that Markdown makes nothing of, on one line."""
    return re.sub(r"([\\`*_\[\]<>()|~&])", r"\\\1", _line(text))


def _code(text: Any) -> str:
    """As code, on one line, also in a table's cell."""
    line = _line(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    space = " " * (line[:1] == "`" or line[-1:] == "`")
    return f"{fence}{space}{line}{space}{fence}".replace("|", "\\|") if line else ""


def _line(text: Any) -> str:
    return UNPRINTABLE.sub("\ufffd", " ".join(str(text).split()))


def _table(rows: Sequence[tuple[str, ...]], heads: tuple[str, ...]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, ("---",) * len(heads), *rows))
