"""What a training reads: one file, or several tasks as a mixture."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastlora.config import TrainConfig
from fastlora.data import mixture
from fastlora.data.examples import Example, read_examples
from fastlora.data.mixture import Mixture
from fastlora.data.rows import Encoded, encode, row_length
from fastlora.data.sources import local_files
from fastlora.data.tasks import is_task
from fastlora.models import is_encoder_decoder

REFUSED = {
    "packing": "its two sides cannot lie in one line",
    "share_prefix": "its encoder sees a prompt as a whole, so that prompts share nothing",
    "train_on_turns": "it has no chat template, and so no turns",
    "completion_only_loss": "its prompt is the encoder's, which predicts nothing",
    "neftune_noise_alpha": "its stacks read embeddings of their own, which get no noise",
}
"""Options of a causal model that mean nothing to an encoder-decoder, and why."""


def is_mixed(config: TrainConfig) -> bool:
    """Whether rows are asked and come as a mixture says: by the seed."""
    tasks = any(map(is_task, config.files))
    return config.mixture is not None or len(config.files) > 1 or bool(config.rehearse) or tasks


def mixture_of(config: TrainConfig) -> Mixture | None:
    """The mixture that the options ask for; None for a file alone, which is gone through as it is.

    Raises:
        OSError: a file of it is not there.
        TypeError, ValueError: a task's or the mixture's file is none; the message is FILE: field: expected.
    """
    if config.mixture is not None:
        mixed = Mixture.read(config.mixture)
    elif is_mixed(config):
        options: dict[str, Any] = {name: getattr(config, name) for name in mixture.OPTIONS}
        read = {name: getattr(config, name) for name in ("columns", "max_samples", "streaming")}
        mixed = mixture.of_files(config.files, read, weights=config.interleave_probs or [], **options)
    else:
        return None
    if config.rehearse_data is not None:
        mixed = mixture.with_rehearsal(mixed, config.rehearse_data, config.rehearse, config.max_samples)
    return mixed


def _require_fitting(config: TrainConfig) -> None:
    """Raise ValueError for an option of a causal model that the encoder-decoder to train has no use for."""
    for name, reason in REFUSED.items():
        value, default = getattr(config, name), type(config).__dataclass_fields__[name].default
        if value != default:
            raise ValueError(f"{name}={value}: expected {default}: {config.model} is an encoder-decoder, {reason}")


def read(config: TrainConfig, tokenizer: Any) -> Encoded:
    """The training's rows, and of a mixture their order.

    Raises:
        ValueError: the model is an encoder-decoder, and an option is for causal models alone; told before anything is read.
        OSError, DataError, TypeError, ValueError: as `mixture_of`, `read_examples`, `Task.examples`, `encode` and `Mixture.order`.
    """
    pairs = is_encoder_decoder(str(config.model))
    if pairs:
        _require_fitting(config)
    mixed = mixture_of(config)
    if mixed is None:
        examples = read_examples(
            config.files, columns=config.columns, max_samples=config.max_samples, streaming=config.streaming
        )
    else:
        examples = mixed.examples(config.seed, row_length(tokenizer, pairs), config.max_length)
    data = encoded(config, examples, tokenizer)
    return replace(data, order=mixed.order([row.task for row in data.rows], config.seed)) if mixed else data


def encoded(config: TrainConfig, examples: Sequence[Example], tokenizer: Any) -> Encoded:
    """Examples to train or to measure on, as the options have their rows.

    Raises:
        DataError, ValueError: as `encode`.
    """
    return encode(
        examples,
        tokenizer,
        config.max_length,
        config.truncation,
        train_on_turns=config.train_on_turns,
        completion_only_loss=config.completion_only_loss,
        encoder_decoder=is_encoder_decoder(str(config.model)),
    )


def named(config: TrainConfig) -> list[tuple[str, Path]]:
    """The files that the options name, each with its option."""
    others = [(name, getattr(config, name)) for name in ("mixture", "rehearse_data")]
    found = [("data", path) for path in local_files(config.files)]
    return found + [(name, Path(file)) for name, file in others if file is not None]
