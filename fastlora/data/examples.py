"""JSON lines in, token rows out: what the training loop reads.

A line is `{"prompt": "...", "completion": "..."}` or `{"messages": [{"role": "...", "content": "..."}, ...]}`; other
fields are ignored.

The loss counts the completion's tokens only, and the mask is built from tokens, never from characters: prompt and
completion are tokenised apart and joined, so that the prompt's tokens are a prefix of the row whatever merges the
tokenizer knows, and generation starts from exactly the tokens that training saw. A completion ends with the
end-of-sequence token.

Messages go through the tokenizer's chat template. If the template marks what the assistant wrote (`{% generation %}`),
every assistant turn counts; if not, only the last turn does. The last turn must be the assistant's.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

IGNORE = -100  # cross entropy's ignore_index: a label that does not count
LISTED_PROBLEMS = 20

Message = dict[str, str]
Prompt = str | list[Message]


class DataError(ValueError):
    """Lines that cannot be used: `problems` holds all of them, the message the first twenty, each with FILE:LINE."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        listed = problems[:LISTED_PROBLEMS]
        if len(problems) > len(listed):
            listed.append(f"... and {len(problems) - LISTED_PROBLEMS} more")
        count = f"{len(problems)} bad line" + ("s" if len(problems) > 1 else "")
        super().__init__("\n".join([f"{count} in the data:", *listed]))


class _BadLine(Exception):
    """What is wrong with one line."""


@dataclass(frozen=True)
class Example:
    prompt: Prompt  # text, or the messages before the last assistant turn
    completion: str
    source: str = ""  # FILE:LINE


@dataclass(frozen=True)
class Row:
    input_ids: list[int]
    labels: list[int]  # the token itself, or IGNORE

    @property
    def labelled(self) -> int:
        """How many tokens count in the loss (the first token is predicted from nothing, so it never does)."""
        return sum(label != IGNORE for label in self.labels[1:])


@dataclass(frozen=True)
class Encoded:
    rows: list[Row]
    dropped: list[Example]  # max_length left nothing of the completion
    cut: int  # rows that lost a part of theirs


def read_examples(path: str | Path) -> list[Example]:
    """Read a JSONL file of prompts and completions, or of messages. Empty lines are skipped.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: some lines are no JSON, lack a field, have one of a wrong type, or an empty one; or no line is left.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"data: there is no file {path}")
    examples, problems = [], []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            source = f"{path}:{number}"
            try:
                if line.strip():
                    examples.append(_example(_parse(line), source))
            except _BadLine as error:
                problems.append(f"{source}: {error}")
    if problems:
        raise DataError(problems)
    if not examples:
        raise DataError([f"{path}: the file has no rows"])
    return examples


def _parse(line: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise _BadLine("not UTF-8") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise _BadLine(f"not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise _BadLine(f"expected a JSON object, got {type(fields).__name__}")
    return fields


def _example(fields: dict[str, Any], source: str) -> Example:
    if "messages" in fields:
        if "prompt" in fields or "completion" in fields:
            raise _BadLine("has both messages and prompt or completion: expected one of the two forms")
        messages = _messages(fields["messages"])
        return Example(messages[:-1], messages[-1]["content"], source)
    missing = [name for name in ("prompt", "completion") if name not in fields]
    if missing:
        raise _BadLine(f"no field {' and no field '.join(repr(name) for name in missing)}")
    return Example(_text(fields["prompt"], "prompt"), _text(fields["completion"], "completion"), source)


def _messages(messages: Any) -> list[Message]:
    if not isinstance(messages, list) or len(messages) < 2:
        raise _BadLine("messages: expected a list of at least two messages")
    for position, message in enumerate(messages):
        name = f"messages[{position}]"
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise _BadLine(f"{name}: expected an object with role and content, and nothing else")
        _text(message["role"], f"{name}.role")
        _text(message["content"], f"{name}.content")
    if messages[-1]["role"] != "assistant":
        raise _BadLine(f"the last message is by {messages[-1]['role']!r}: expected 'assistant'")
    return messages


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise _BadLine(f"{name}: expected a string, got {type(value).__name__}")
    if not value.strip():
        raise _BadLine(f"{name} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise _BadLine(f"{name} has half of a surrogate pair, which is no character") from None
    return value


def encode(examples: Sequence[Example], tokenizer: Any, max_length: int) -> Encoded:
    """Token rows of at most `max_length` tokens, cut at the end; a row that loses its whole completion is dropped.

    Raises:
        DataError: the tokenizer's chat template refuses some messages, or every row was dropped.
        ValueError: the data has messages and the tokenizer no chat template.
    """
    rows, dropped, problems, cut = [], [], [], 0
    for example in examples:
        try:
            row = _encode(example, tokenizer)
        except (TemplateError, _BadLine) as error:
            problems.append(f"{example.source}: {error}")
            continue
        kept = Row(row.input_ids[:max_length], row.labels[:max_length])
        if not kept.labelled:
            dropped.append(example)
            continue
        cut += kept.labelled < row.labelled
        rows.append(kept)
    if problems:
        raise DataError(problems)
    if not rows:
        raise DataError(
            [f"max_length={max_length} cuts off the whole completion of every one of the {len(examples)} rows"]
        )
    return Encoded(rows, dropped, cut)


def _encode(example: Example, tokenizer: Any) -> Row:
    if isinstance(example.prompt, str):
        return _join(encode_prompt(tokenizer, example.prompt), _tokens(tokenizer, example.completion), tokenizer)
    messages = [*example.prompt, {"role": "assistant", "content": example.completion}]
    if re.search(r"\{%-?\s*generation\s*-?%\}", _template(tokenizer)):
        out = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, counted = out["input_ids"], out["assistant_masks"]
        return Row(ids, [token if count else IGNORE for token, count in zip(ids, counted, strict=True)])
    before, whole = _render(tokenizer, example.prompt, add_generation_prompt=True), _render(tokenizer, messages)
    if not whole.startswith(before):
        raise _BadLine("the chat template renders the prompt otherwise without the answer: it needs {% generation %}")
    return _join(_tokens(tokenizer, before), _tokens(tokenizer, whole[len(before) :]), tokenizer)


def _join(prompt: list[int], completion: list[int], tokenizer: Any) -> Row:
    # A chat template has usually ended the turn itself, with a line break behind the end token.
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in completion:
        completion = [*completion, tokenizer.eos_token_id]
    return Row(prompt + completion, [IGNORE] * len(prompt) + completion)


def encode_prompt(tokenizer: Any, prompt: Prompt) -> list[int]:
    """The tokens before the completion, in training as in generation.

    Text gets the tokenizer's own first tokens; messages go through the chat template, which opens the assistant's turn.
    """
    if not isinstance(prompt, str):
        return _tokens(tokenizer, _render(tokenizer, prompt, add_generation_prompt=True))
    ids = tokenizer(prompt, verbose=False)["input_ids"]
    # Some tokenizers close every text with the end token, and nothing follows an end.
    if ids and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(tokenizer.eos_token):
        ids = ids[:-1]
    return ids


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _render(tokenizer: Any, messages: list[Message], add_generation_prompt: bool = False) -> str:
    _template(tokenizer)
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)


def _template(tokenizer: Any) -> str:
    if not tokenizer.chat_template:
        raise ValueError(
            "messages need a chat template and the model's tokenizer has none: expected prompt and completion"
        )
    return tokenizer.get_chat_template()


def pad_token_id(tokenizer: Any) -> int:
    """The token that fills rows up. The attention mask hides it, so the end token serves where there is none for it."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    return 0


def collate(rows: Sequence[Row], pad: int) -> dict[str, Tensor]:
    """One batch padded on the right to its longest row: input_ids, attention_mask, labels, each int64 [rows, width]."""
    width = max(len(row.input_ids) for row in rows)
    filling = [width - len(row.input_ids) for row in rows]
    return {
        "input_ids": torch.tensor([row.input_ids + [pad] * n for row, n in zip(rows, filling, strict=True)]),
        "attention_mask": torch.tensor([[1] * (width - n) + [0] * n for n in filling]),
        "labels": torch.tensor([row.labels + [IGNORE] * n for row, n in zip(rows, filling, strict=True)]),
    }


def batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
