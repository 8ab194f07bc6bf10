"""Options by name: from a file, into one, and as other programs call them.

A file of options is YAML, JSON or TOML by its suffix: an object whose keys are options of the command it is for, spelt with dashes or underscores.
`fastlora train` leaves one beside what it has trained, which repeats the run.
"""

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from fastlora import __version__, reading, writing
from fastlora.data.sources import HUB
from fastlora.typed import shown

NAME = "config.yaml"
"""In an output folder: the options of the run, as `fastlora train --config` takes them."""
ALIASES = {
    # transformers', PEFT's and TRL's
    "model_name_or_path": "model",
    "dataset_name": "data",
    "train_file": "data",
    "output_dir": "output",
    "overwrite_output_dir": "overwrite",
    "lora_r": "r",
    "lora_target_modules": "target_modules",
    "learning_rate": "lr",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "per_device_eval_batch_size": "eval_batch_size",
    "max_seq_length": "max_length",
    "torch_compile": "compile",
    # axolotl's
    "base_model": "model",
    "datasets": "data",
    "lora_model_dir": "init_adapter",
    "peft_use_rslora": "use_rslora",
    "peft_init_lora_weights": "init_lora_weights",
    "peft_layers_to_transform": "layers_to_transform",
    "num_epochs": "epochs",
    "micro_batch_size": "batch_size",
    "sequence_len": "max_length",
    "lr_scheduler": "lr_scheduler_type",
    "optimizer": "optim",
    # LLaMA-Factory's
    "dataset": "data",
    "adapter_name_or_path": "init_adapter",
    "lora_rank": "r",
    "lora_target": "target_modules",
    "cutoff_len": "max_length",
}
"""What transformers, PEFT, TRL, axolotl and LLaMA-Factory call an option: taken on the command line and in files of options, and nowhere else."""
INSTEAD = {
    **dict.fromkeys(("logging_steps", "logging_strategy"), "every step is in metrics.jsonl, and told to report_to"),
    **dict.fromkeys(("bf16", "fp16", "torch_dtype", "mixed_precision"), "dtype says it, as bfloat16"),
    **dict.fromkeys(("finetuning_type", "adapter", "use_dora", "use_peft"), "method: lora, dora, full, ..."),
    "resume_from_checkpoint": "resume goes on from the newest checkpoint, resume_from from that of a step",
    **dict.fromkeys(
        ("eval_strategy", "evaluation_strategy", "save_strategy"), "eval_steps and save_steps say how often"
    ),
    **dict.fromkeys(("val_size", "val_set_size", "test_size"), "eval_data, rows of a file of their own"),
    **dict.fromkeys(("train_on_inputs", "train_on_prompt"), "no_completion_only_loss counts the prompt, too"),
    **dict.fromkeys(("assistant_only_loss", "roles_to_train"), "train_on_turns: auto, last or all"),
    **dict.fromkeys(("chat_template", "template"), "the tokenizer's own chat template is what counts"),
    **dict.fromkeys(("use_wandb", "wandb_project"), "report_to: wandb"),
    **dict.fromkeys(("hub_model_id", "push_to_hub"), "the output folder is what `hf upload` takes"),
    **dict.fromkeys(
        ("flash_attn", "flash_attention", "sdp_attention"), "attn_implementation: flash_attention_2, sdpa, ..."
    ),
    "do_sample": "temperature above 0 draws",
    **dict.fromkeys(("max_eval_samples", "max_predict_samples"), "of eval and compare limit: the first so many rows"),
    "iters": "max_steps",
    "do_train": "`fastlora train` trains and `fastlora eval` measures",
}
"""What does here what an option of theirs does there, where that is no option of the same values."""
OF_ONE_CALL = ("resume", "resume_from", "overwrite")
"""Options that say how a run begins, and nothing of the run: not in the file that repeats it."""


@dataclass(frozen=True)
class Given:
    """What a file gives."""

    path: Path
    values: dict[str, Any]  # by our names
    lines: dict[str, int]  # where each stands, as far as that is known

    def where(self, name: str) -> str:
        """FILE:LINE of an option, for messages."""
        return f"{self.path}:{self.lines[name]}" if name in self.lines else f"{self.path}"


def own_name(name: str, known: Collection[str]) -> str:
    """The name of an option of ours, however it is spelt; any other as it is.

    known: the options that there are, with underscores.
    """
    plain = name.replace("-", "_")
    own = plain if plain in known else ALIASES.get(plain, plain)
    return own if own in known else name


def read(path: Path, known: Collection[str]) -> Given:
    """The options in a file; their values are unchecked.

    Args:
        path: .yaml, .yml, .json or .toml.
        known: the options that there are, with underscores.

    Raises:
        OSError: it cannot be read.
        ValueError: another suffix; it is no object; an option that there is not, or one by two names. The message has FILE:LINE where it is known.
    """
    content, lines = _content(path)
    values: dict[str, Any] = {}
    spelt: dict[str, str] = {}
    found: dict[str, int] = {}
    for key, value in content.items():
        name = own_name(key, known)
        where = f"{path}:{lines[key]}" if key in lines else f"{path}"
        if name not in known:
            raise ValueError(f"{where}: there is no option {shown(key)}{hint(key, known)}")
        if name in spelt:
            raise ValueError(
                f"{where}: {key} is the option {spelt[name]}, which is there already: expected one of them"
            )
        values[name], spelt[name] = value, key
        if key in lines:
            found[name] = lines[key]
    return Given(path, values, found)


def hint(name: str, known: Collection[str], spelt: Callable[[str], str] = str) -> str:
    """What may have been meant by the name of an option that there is not, as the end of a message. spelt: how an option's name is shown."""
    plain = name.lstrip("-").replace("-", "_")
    if plain in INSTEAD:
        return f": {INSTEAD[plain]}"
    aliases = [alias for alias, own in ALIASES.items() if own in known]
    near = difflib.get_close_matches(plain, [*known, *aliases], n=1)
    return f"; the nearest is {spelt(near[0])}" if near else ""


def _content(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """(the object in a file, the line of each of its keys)"""
    try:
        if path.suffix in (".yaml", ".yml"):
            content = reading.yaml_file(path)
        elif path.suffix == ".json":
            content = reading.json_file(path)
        elif path.suffix == ".toml":
            content = _toml(path)
        else:
            raise ValueError(f"config={path}: expected a file whose name ends in .yaml, .yml, .json or .toml")
    except FileNotFoundError:
        raise FileNotFoundError(f"config: there is no file {path}") from None
    except ValueError as error:
        raise ValueError(f"config={path}: {error}" if not str(error).startswith("config=") else str(error)) from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"config={path}: expected options by name, got {shown(content)}")
    text = path.read_text(encoding="utf-8").split("\n")
    places = {
        key: [
            number
            for number, line in enumerate(text, 1)
            if re.match(rf"[\s{{]*[\"']?{re.escape(key)}[\"']?\s*[:=]", line)
        ]
        for key in content
    }
    return content, {key: numbers[0] for key, numbers in places.items() if len(numbers) == 1}


def _toml(path: Path) -> dict[str, Any]:
    if path.stat().st_size > reading.LARGEST:
        raise ValueError(f"has {path.stat().st_size:,} bytes, expected at most {reading.LARGEST:,}")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"not TOML ({error})") from None


class _Dumper(yaml.SafeDumper):
    """Texts that our reader would take for numbers are in quotes."""


_Dumper.add_implicit_resolver(*reading.FLOAT)


def write(output: Path, config: Any) -> None:
    """Leave a run's options in OUTPUT/config.yaml.

    config: a dataclass of options; what it says is paths is written with its whole path, whatever folder the next run begins in.
    """
    values: Mapping[str, Any] = {
        field.name: _plain(getattr(config, field.name), field.metadata.get("typed") in (Path, list[str]))
        for field in fields(config)
        if field.name not in OF_ONE_CALL
    }
    head = (
        f"# What fastlora {__version__} trained here; `fastlora train --config {NAME} --output ANOTHER` repeats it.\n"
    )
    writing.whole(output / NAME, (head + yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False)).encode())


def _plain(value: Any, is_path: bool) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(one, is_path) for one in value]
    if isinstance(value, Path) or (is_path and isinstance(value, str)):
        return str(value) if str(value).startswith(HUB) else os.path.abspath(value)
    return value
