"""Answers of a model, and of each of its adapters: to the very prompt tokens that training saw."""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from torch.nn.utils.rnn import pad_sequence

from fastlora.data.examples import BadLine, Example, Message, Prompt
from fastlora.data.prompts import cut_prompt, encode_prompt
from fastlora.data.rows import batches, pad_token_id, require_count, turn_end
from fastlora.language_model_loss import evaluating
from fastlora.layers import BASE
from fastlora.models import positions
from fastlora.typed import check_fields

logger = logging.getLogger("fastlora")


@dataclass(frozen=True)
class Sampling:
    """How an answer's tokens are chosen, in transformers' terms; from one seed the same answers to the same prompts in the same batches.

    Raises:
        ValueError: a value is out of range, or of no use beside the others.
    """

    temperature: float = 0.0  # what logits are divided by before a token is drawn; 0: the likeliest is taken
    top_p: float = 1.0  # drawn from the likeliest tokens that have this probability together
    top_k: int = 0  # drawn from so many likeliest tokens; 0: from all
    num_beams: int = 1  # answers that are followed at once, the likeliest of which is taken
    repetition_penalty: float = 1.0  # what lowers the logits of tokens that have been; 1: nothing
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        ranges = {
            "temperature": (0 <= self.temperature < math.inf, "0 or more"),
            "top_p": (0 < self.top_p <= 1, "above 0, at most 1"),
            "top_k": (self.top_k >= 0, "0 or more"),
            "num_beams": (self.num_beams >= 1, "1 or more"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "above 0"),
            "seed": (0 <= self.seed < 1 << 64, "0 or more, below 2**64"),
        }
        for name, (holds, expected) in ranges.items():
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected {expected}")
        for name, is_set in (("top_p", self.top_p < 1), ("top_k", self.top_k > 0)):
            if is_set and not self.temperature:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: expected temperature as well, without it no token is drawn"
                )
        if self.num_beams > 1 and self.temperature:
            raise ValueError(f"num_beams={self.num_beams} and temperature={self.temperature} exclude each other")

    def options(self) -> dict[str, Any]:
        """As `generate` of transformers takes them."""
        drawn = self.temperature > 0
        return {
            "do_sample": drawn,
            "temperature": self.temperature if drawn else None,
            "top_p": self.top_p if drawn else None,
            "top_k": self.top_k if drawn else None,
            "num_beams": self.num_beams,
            "repetition_penalty": self.repetition_penalty,
        }


GREEDY = Sampling()


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    max_length: int | None = None,
    adapter_name: str | None = None,
    sampling: Sampling | None = None,
) -> list[str]:
    """Answers, one a prompt, in the prompts' order.

    A prompt that leaves no room for the answer loses its oldest tokens, as in training, with a warning.

    Args:
        prompts: texts, or lists of messages for the chat template.
        max_length: tokens that a prompt and its answer may have together, an encoder-decoder's each; None: as many as the model has positions for.
        adapter_name: who answers: a loaded adapter, "__base__" for none of them, None for the one that is active.
        sampling: how each token is chosen; None: the likeliest is taken.

    Raises:
        ValueError: a bad option, or one that leaves nothing to the prompt; a prompt that has no tokens, or that the chat
            template refuses; no adapter has that name.
    """
    if isinstance(prompts, str):
        raise ValueError("prompts is a string: expected a list of prompts")
    require_count("max_new_tokens", max_new_tokens)
    require_count("batch_size", batch_size)
    if max_length is not None:
        require_count("max_length", max_length)
    pairs = model.config.is_encoder_decoder
    ids = [_prompt_tokens(tokenizer, prompt, f"prompts[{i}]", pairs) for i, prompt in enumerate(prompts)]
    asked = [Example(prompt, "") for prompt in prompts]
    ids = leave_room(model, tokenizer, ids, asked, max_new_tokens, max_length)
    return answer(model, tokenizer, prompts, ids, max_new_tokens, batch_size, adapter_name, sampling)


def _prompt_tokens(tokenizer: Any, prompt: Prompt, name: str, encoder_decoder: bool) -> list[int]:
    if not isinstance(prompt, str) and not (isinstance(prompt, list) and prompt):
        raise ValueError(f"{name}: expected a text or a list of messages, got {type(prompt).__name__}")
    try:
        ids = encode_prompt(tokenizer, prompt, encoder_decoder)
    except (TemplateError, BadLine, UnicodeEncodeError) as error:
        raise ValueError(f"{name}: {error}") from error
    if not ids:
        raise ValueError(f"{name} has no tokens: expected a text that is not empty, the tokenizer opens none by itself")
    return ids


@torch.no_grad()
def answer(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    ids: Sequence[list[int]],
    max_new_tokens: int,
    batch_size: int,
    adapter_name: str | None = None,
    sampling: Sampling | None = None,
) -> list[str]:
    """Answers to `prompts`, whose tokens are `ids`."""
    sampling = sampling or GREEDY
    by_length = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # rows of like length share a batch: less padding
    answers, pad = [""] * len(ids), pad_token_id(tokenizer)
    options = _options(model, tokenizer, max_new_tokens, prompts) | sampling.options()
    pairs = model.config.is_encoder_decoder
    side = "right" if pairs else "left"
    devices = [model.device] if model.device.type == "cuda" else []
    with evaluating(model), _answering_as(model, adapter_name), torch.random.fork_rng(devices):
        torch.manual_seed(sampling.seed)
        for batch in batches(by_length, batch_size):
            rows = [torch.tensor(ids[i], device=model.device) for i in batch]
            inputs = pad_sequence(rows, batch_first=True, padding_value=pad, padding_side=side)
            mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
            out = model.generate(input_ids=inputs, attention_mask=mask, **options)
            out = out[:, 1:] if pairs else out[:, inputs.shape[1] :]  # a decoder's own begins with its start token
            for i, text in zip(batch, tokenizer.batch_decode(out, skip_special_tokens=True), strict=True):
                answers[i] = text
    return answers


def leave_room(
    model: Any,
    tokenizer: Any,
    ids: list[list[int]],
    examples: Sequence[Example],
    max_new_tokens: int,
    max_length: int | None = None,
) -> list[list[int]]:
    """The prompts' tokens without the oldest of those that leave no room for an answer; an encoder-decoder's answer takes none of a prompt's.

    Args:
        ids: each prompt's tokens, some of which training may have cut already.
        examples: what they are the prompts of.
    """
    limits = {"max_length": max_length, "the number of the model's positions": positions(model)}
    name, limit = min(limits.items(), key=lambda item: item[1] or math.inf)
    if limit is None:
        return ids
    pairs = model.config.is_encoder_decoder
    room = limit if pairs else limit - max_new_tokens
    if room < 2 or max_new_tokens >= limit:  # before an answer there is a token at least
        raise ValueError(f"max_new_tokens={max_new_tokens} leaves nothing to the prompt: {name} is {limit}")
    cut = [i for i, row in enumerate(ids) if len(row) > room]
    if cut:
        text = "cut the oldest tokens of %d of %d prompts (the first: prompts[%d]): %s is %d, max_new_tokens %d"
        logger.warning(text, len(cut), len(ids), cut[0], name, limit, max_new_tokens)
    left = [*ids]
    for i in cut:
        prompt, tools = examples[i].prompt, examples[i].tools
        left[i] = cut_prompt(tokenizer, encode_prompt(tokenizer, prompt, pairs, tools), room, prompt, tools)
    return left


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """What ends an answer, by the model's own configuration and its tokenizer."""
    ends = model.generation_config.eos_token_id
    return {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}


def turn_ends(tokenizer: Any, messages: list[Message]) -> set[int]:
    """What ends an assistant's turn behind these messages, as the chat template has it; nothing, where that is no token of its own."""
    end = turn_end(tokenizer, messages)
    return set() if end is None else {end}


def _options(model: Any, tokenizer: Any, max_new_tokens: int, prompts: Sequence[Prompt]) -> dict[str, Any]:
    ends = end_tokens(model, tokenizer)
    chat = next((prompt for prompt in prompts if not isinstance(prompt, str)), None)
    if chat:
        ends |= turn_ends(tokenizer, chat)  # training may have taught no other end
    return {
        "max_new_tokens": max_new_tokens,
        "pad_token_id": pad_token_id(tokenizer),
        "eos_token_id": sorted(ends) or None,
    }


@contextmanager
def _answering_as(model: Any, adapter_name: str | None) -> Iterator[None]:
    adapters = list(getattr(model, "peft_config", {}))
    if adapter_name is None or (adapter_name == BASE and not adapters):
        yield
        return
    if adapter_name not in (BASE, *adapters):
        raise ValueError(
            f"adapter_name={adapter_name!r}: expected {BASE} or one of {', '.join(adapters) or 'none loaded'}"
        )
    # PEFT freezes and unfreezes adapters as it switches them.
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    active = model.active_adapters
    try:
        with model.disable_adapter() if adapter_name == BASE else nullcontext():
            if adapter_name != BASE:
                _set_adapter(model, [adapter_name])
            yield
    finally:
        _set_adapter(model, active)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trainable)


def _set_adapter(model: Any, names: Sequence[str]) -> None:
    """Of a model with soft prompts, which has one at a time, PeftModel's own; else the layers' own, which takes several."""
    if getattr(model, "_is_prompt_learning", False):
        model.set_adapter(names[0])
    else:
        model.base_model.set_adapter(list(names))
