"""What a training says of itself: the figures and origins in summary.json, which its model card and its report are made of."""

import datetime
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from hashlib import file_digest
from pathlib import Path
from typing import Any

import accelerate
import torch

from fastlora import __version__, reading
from fastlora.config import TrainConfig
from fastlora.data.examples import Example
from fastlora.data.rows import Encoded
from fastlora.data.sources import each
from fastlora.data.tasks import files_of


@dataclass(frozen=True)
class TrainResult:
    steps: int
    first_loss: float  # mean over the first ten steps, of fewer than twenty over the first half
    loss: float  # mean over the last ten steps, or the other half
    seconds: float  # spent in steps, all runs together
    tokens: int  # trained on, prompts included, padding not
    tokens_per_second: float
    rows: int
    tasks: dict[
        str, dict[str, float]
    ]  # a mixture's, by name: rows that were trained on, and the mean of the last ten losses
    chat_rows: int  # those of `rows` that went through the chat template
    dropped_rows: int  # too long for max_length
    prompt_cut_rows: int  # those of `rows` whose prompt lost its oldest tokens
    completion_cut_rows: int  # those whose completion lost its end
    trainable_parameters: int
    parameters: int
    adapter_bytes: int  # of the weights' file
    peak_memory: int | None  # bytes that this process held at most, on a GPU there; None where the system does not tell
    compute_dtype: str  # of what the base computes
    dtype: str  # of the saved weights: an adapter's are float32, a model's as its base's are stored unless told
    implementations: dict[str, int]  # LoRA and frozen layers, by what ran them; a guess where it says compiled
    loss_path: str | None  # LanguageModelLoss's; None where no step was left to do
    packing_efficiency: (
        float | None
    )  # tokens over those that ran, what fills lines up among them; None without packing, as of loss_path
    best_step: int | None  # of the validations after the first step
    best_eval_loss: float | None  # that step's
    validation: (
        dict[str, Any] | None
    )  # that of the weights that are left, as validation.jsonl has it: the last, or with load_best_model_at_end the best
    last_validation: dict[str, Any] | None  # the last, where that is another
    stopped_early: bool
    stop_reason: str | None  # why
    output: str


def result(records: Sequence[Mapping[str, Any]], data: Encoded, **more: Any) -> TrainResult:
    """What a training has come to, but for the size of its file.

    Args:
        records: metrics.jsonl's.
        data: what it was trained on.
        more: the fields that neither tells.
    """
    losses = [record["loss"] for record in records]
    ends = max(1, min(10, len(losses) // 2))  # steps
    seconds, tokens = sum(record["seconds"] for record in records), records[-1]["tokens"]
    return TrainResult(
        steps=len(records),
        first_loss=sum(losses[:ends]) / ends,
        loss=sum(losses[-ends:]) / ends,
        seconds=seconds,
        tokens=tokens,
        tokens_per_second=tokens / seconds,
        rows=len(data.rows),
        chat_rows=sum(not isinstance(one.prompt, str) for one in data.examples),
        dropped_rows=len(data.dropped),
        prompt_cut_rows=len(data.prompt_cut),
        completion_cut_rows=len(data.completion_cut),
        adapter_bytes=0,
        **more,
    )


TRAINED = ("data", "rehearse_data")
"""The options whose rows are trained on."""


def data_files(config: TrainConfig, examples: Iterable[Example]) -> list[dict[str, Any]]:
    """The files that a training reads rows from: option, file, bytes, sha256; and how many rows it trains on, once a file.

    An option that is called data, or ends in _data, names them, and so do the tasks among them and the examples' sources. What is no file has
    neither bytes nor SHA-256.
    """
    rows = Counter(one.source.rpartition(":")[0] for one in examples)
    named: list[tuple[str, str]] = []
    for field in fields(config):
        value = getattr(config, field.name)
        if value is not None and (field.name == "data" or field.name.endswith("_data")):
            named += [(field.name, str(file)) for file in files_of(value) or each(value)]
    trained = [file for option, file in named if option in TRAINED]
    named += [("data", file) for file in rows if file not in trained]
    found = []
    for option, file in dict.fromkeys(named):
        one: dict[str, Any] = {
            "option": option,
            "file": file,
            "rows": rows.pop(file, None) if option in TRAINED else None,
        }
        if Path(file).is_file():
            with Path(file).open("rb") as content:
                one |= {"bytes": Path(file).stat().st_size, "sha256": file_digest(content, "sha256").hexdigest()}
        found.append(one)
    return found


def origins() -> dict[str, Any]:
    """When, and by what."""
    import peft
    import transformers

    packages = (torch, transformers, peft, accelerate)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"fastlora": __version__, **{one.__name__: one.__version__ for one in packages}},
    }


def is_of_chat(folder: Path) -> bool:
    """Whether what lies in a folder was trained on conversations, by its summary; not where there is none that can be read."""
    try:
        found = reading.json_file(folder / "summary.json")
    except (OSError, ValueError):
        return False
    rows, of_chat = found.get("rows"), found.get("chat_rows")
    return isinstance(rows, int) and isinstance(of_chat, int) and 2 * of_chat > rows


def changed_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a summary's `config` that are not as they are unless told, and shape what is trained: not where it lies, nor how it goes on."""
    defaults = {one.name: None if one.default is MISSING else one.default for one in fields(TrainConfig)}
    resolved = dict.fromkeys(("lr", "lora_dropout"))  # what None stands for is the method's
    untold = TrainConfig(**{**config, **resolved})
    defaults |= {name: getattr(untold, name) for name in resolved}
    aside = {"model", "data", "output", "resume", "resume_from", "overwrite"}
    return {name: value for name, value in config.items() if name not in aside and value != defaults.get(name)}
