"""What a row may hold: its fields' names say which format it has, and an Example is made of it.

| format | fields | as in |
|---|---|---|
| prompt and completion | `prompt`, `completion`: two texts, or two lists of messages with `system`, `tools` | TRL |
| messages | `messages`; `system`, `tools` | TRL, OpenAI |
| ShareGPT | `conversations`: turns of `from` and `value`, or of `role` and `content`; `system`, `tools` | axolotl, LLaMA-Factory |
| alpaca | `instruction`, `output`; `input`, `system`, `history`, `tools` | axolotl, LLaMA-Factory |
| text | `text`, of which every token counts | TRL, axolotl |

Other fields are ignored; a row that has fields of two formats is a bad one, unless `columns` says which to read. The last turn of
a conversation must be the assistant's. An alpaca row is a conversation: its instruction and input are what the user says, with an
empty line between them. `system` is the first message of a conversation that begins with none by system.

A message has a role and content, and may have what chat templates read besides: `name`, `tool_calls`, `tool_call_id`,
`reasoning_content`, `reasoning`, `thinking`. Arguments of a tool call may be JSON as text, as OpenAI has them; templates are given
the object. `weight: 0` says of a turn of the assistant's that it does not count, as OpenAI and axolotl have it. Fields of a message
that are null are as if they were not there.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastlora import reading
from fastlora.typed import listed, shown

SHOWN_CHARACTERS = 40  # of a foreign text in an error
SHOWN_NAMES = 120  # characters of a row's names

Message = dict[str, Any]
Prompt = str | list[Message]

REQUIRED: dict[str, tuple[str, ...]] = {
    "prompt and completion": ("prompt", "completion"),
    "messages": ("messages",),
    "ShareGPT": ("conversations",),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
"""What each format has, and no other."""
ALLOWED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("prompt and completion", "messages", "ShareGPT"), ("system", "tools")),
    "alpaca": ("input", "system", "history", "tools"),
    "text": (),
}
"""What each may have besides."""
OPTIONAL = ("input", "system", "history", "tools")
"""What some of them may have besides."""
FIELDS = (*(name for names in REQUIRED.values() for name in names), *OPTIONAL)
TOLD = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning", "thinking")
"""What chat templates read of a message."""
ROLES = {
    **{"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"},
    **{"function_call": "assistant", "observation": "tool", "tool": "tool"},
}
"""ShareGPT's names, and what templates call them."""


class BadLine(ValueError):
    """What is wrong with one line."""


@dataclass(frozen=True)
class Example:
    prompt: Prompt  # text, "" where all of the row is the completion, or the messages before the last assistant turn
    completion: str  # text; of messages the last turn's content, "" where that only calls tools
    source: str = ""  # FILE:LINE, or FILE:ROW where a file has no lines
    turn: Message | None = None  # the last turn, where it says more than its content
    tools: list[dict[str, Any]] | None = None  # for the chat template
    turns: tuple[int, ...] | None = (
        None  # the turns that count, by their place among the messages; None: the row does not say
    )
    task: str = ""  # whose row it is, where there are several
    template: str = ""  # the wording that it has, and how many examples stand before it

    @property
    def messages(self) -> list[Message]:
        """The whole conversation; of a text's row nothing."""
        if isinstance(self.prompt, str):
            return []
        return [*self.prompt, self.turn or {"role": "assistant", "content": self.completion}]


def check_columns(columns: Mapping[str, str] | None) -> None:
    """
    Raises:
        ValueError: a name is no field of any format, or none of the format that the others are of; or some columns have names and some numbers.
    """
    if columns is None:
        return
    for name, column in columns.items():
        if name not in FIELDS or not column:
            raise ValueError(
                f"columns={shown(columns)}: expected a column for one of {', '.join(FIELDS)}, got {shown(name)}"
            )
    formats = [name for name, required in REQUIRED.items() if any(field in columns for field in required)]
    useless = [
        name for name in columns if len(formats) == 1 and name not in (*REQUIRED[formats[0]], *ALLOWED[formats[0]])
    ]
    if useless:
        raise ValueError(f"columns={shown(columns)}: {formats[0]} has no {useless[0]}, expected none")
    numbered = [column for column in columns.values() if is_numbered(column)]
    if not columns or 0 < len(numbered) < len(columns):
        raise ValueError(f"columns={shown(columns)}: expected names of columns, or numbers (#1) of all of them")


def is_numbered(column: str) -> bool:
    """Whether a column is named by its place: #1 is the first."""
    return column.startswith("#") and column[1:].isdecimal() and column[1:].isascii() and column[1] != "0"


def example(fields: Mapping[str, Any], source: str = "", columns: Mapping[str, str] | None = None) -> Example:
    """The example that a row's fields make.

    Args:
        columns: which column of the row is which field; no other is read then. a.b is b of the object a.

    Raises:
        BadLine: the row has no format's fields, or those of two; or one of them is not as it must be.
    """
    if columns is not None:
        fields = _renamed(fields, columns)
    return PARSERS[_format(fields)](fields, source)


def _renamed(fields: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    return {name: column_of(fields, column) for name, column in columns.items()
            if name not in OPTIONAL or has_column(fields, column)}  # fmt: skip


def has_column(fields: Mapping[str, Any], column: str) -> bool:
    """Whether a row has it."""
    try:
        column_of(fields, column)
    except BadLine:
        return False
    return True


def column_of(fields: Mapping[str, Any], column: str) -> Any:
    """What a row has by that name, or else, where it is a.b, b of the object a.

    Raises:
        BadLine: there is none.
    """
    if column in fields:
        return fields[column]
    value: Any = fields
    for part in column.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise BadLine(f"no column {column[:SHOWN_CHARACTERS]!r}: there are {_names(fields)}")
        value = value[part]
    return value


def _format(fields: Mapping[str, Any]) -> str:
    found = [name for name, required in REQUIRED.items() if any(field in fields for field in required)]
    if len(found) > 1:
        first, second = (next(field for field in REQUIRED[name] if field in fields) for name in found[:2])
        raise BadLine(f"has both {first} and {second}, of two formats: expected one, or columns that say which to read")
    if not found:
        wanted = "; ".join(" and ".join(required) for required in REQUIRED.values())
        raise BadLine(
            f"fits no format: has the fields {_names(fields)}, expected {wanted}; or columns that say which is which"
        )
    missing = [name for name in REQUIRED[found[0]] if name not in fields]
    if missing:
        raise BadLine(f"no field {missing[0]!r}: there are {_names(fields)}")
    return found[0]


def _names(fields: Mapping[str, Any]) -> str:
    text = listed([repr(name[:SHOWN_CHARACTERS]) for name in fields]) or "none"
    return text if len(text) <= SHOWN_NAMES else text[:SHOWN_NAMES] + " ..."


def _prompt_and_completion(fields: Mapping[str, Any], source: str) -> Example:
    prompt, completion = fields["prompt"], fields["completion"]
    if not isinstance(prompt, list) and not isinstance(completion, list):
        example = Example(_text(prompt, "prompt"), _text(completion, "completion"), source)
        left_out = next((name for name in ("system", "tools") if fields.get(name) not in (None, "", [], "[]")), None)
        if left_out:
            raise BadLine(f"{left_out}: prompt and completion are texts, which have no place for it: expected messages")
        return example
    if not isinstance(prompt, list) or not isinstance(completion, list):
        kinds = type(prompt).__name__, type(completion).__name__
        raise BadLine(f"prompt and completion: expected two texts or two lists of messages, got {' and '.join(kinds)}")
    before, weights = _messages(prompt, "prompt")
    answer, more = _messages(completion, "completion")
    counted = [*([0.0] * len(weights)), *more]
    return _conversation([*before, *answer], counted, source, fields, all_of_them=True)


def _messages_row(fields: Mapping[str, Any], source: str) -> Example:
    messages, weights = _messages(fields["messages"], "messages")
    if len(messages) < 2:
        raise BadLine("messages: expected a list of at least two messages")
    return _conversation(messages, weights, source, fields)


def _sharegpt(fields: Mapping[str, Any], source: str) -> Example:
    turns = fields["conversations"]
    if not isinstance(turns, list) or len(turns) < 2:
        raise BadLine("conversations: expected a list of at least two turns")
    read = [_turn(turn, f"conversations[{position}]") for position, turn in enumerate(turns)]
    messages, weights = _messages(read, "conversations")
    return _conversation(messages, weights, source, fields)


def _turn(turn: Any, name: str) -> Any:
    """A turn of ShareGPT's as a message, not yet checked."""
    if not isinstance(turn, dict) or "from" not in turn:
        return turn
    if "role" in turn or "content" in turn or "value" not in turn:
        raise BadLine(f"{name}: expected from and value, or role and content")
    role, value = turn["from"], turn["value"]
    if not isinstance(role, str) or role not in ROLES:
        raise BadLine(f"{name}.from={shown(role)}: expected one of {', '.join(ROLES)}")
    more = {key: one for key, one in turn.items() if key not in ("from", "value")}
    if role == "function_call":
        calls = _json(_text(value, f"{name}.value"), f"{name}.value")
        return {"role": "assistant", "tool_calls": calls if isinstance(calls, list) else [calls], **more}
    return {"role": ROLES[role], "content": value, **more}


def _alpaca(fields: Mapping[str, Any], source: str) -> Example:
    messages = _system(fields)
    history = fields.get("history")
    for position, pair in enumerate([] if history in (None, "", []) else _list(history, "history")):
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadLine(f"history[{position}]: expected an instruction and its answer")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            messages.append({"role": role, "content": _text(text, f"history[{position}]")})
    parts = [_text(fields["instruction"], "instruction")]
    if fields.get("input") not in (None, ""):
        parts.append(_text(fields["input"], "input"))
    messages.append({"role": "user", "content": "\n\n".join(parts)})
    return Example(messages, _text(fields["output"], "output"), source, tools=_tools(fields))


def _text_row(fields: Mapping[str, Any], source: str) -> Example:
    return Example("", _text(fields["text"], "text"), source)


PARSERS = {
    "prompt and completion": _prompt_and_completion,
    "messages": _messages_row,
    "ShareGPT": _sharegpt,
    "alpaca": _alpaca,
    "text": _text_row,
}


def _conversation(
    messages: list[Message],
    weights: list[float],
    source: str,
    fields: Mapping[str, Any],
    all_of_them: bool = False,
) -> Example:
    """Of checked messages.

    Args:
        weights: 0 where a message does not count.
        fields: the row's, for its system and tools.
        all_of_them: several turns count also where the template marks none.
    """
    opening = _system(fields)
    if opening and messages[0]["role"] == "system":
        if opening[0]["content"] != messages[0]["content"]:
            raise BadLine("has a system, and another one as its first message: expected one of them")
        opening = []
    messages, weights = [*opening, *messages], [*(1.0 for _ in opening), *weights]
    *prompt, last = messages
    if last["role"] != "assistant":
        raise BadLine(f"the last message is by {last['role'][:SHOWN_CHARACTERS]!r}: expected 'assistant'")
    if not prompt:
        raise BadLine("nothing stands before the assistant's turn: expected at least two messages")
    assistant = [position for position, message in enumerate(messages) if message["role"] == "assistant"]
    counted = tuple(position for position in assistant if weights[position])
    if not counted:
        raise BadLine("no turn of the assistant's counts: expected one whose weight is not 0")
    turn = last if set(last) != {"role", "content"} else None
    said = len(counted) < len(assistant) or (all_of_them and len(counted) > 1)
    turns = counted if said else None
    return Example(prompt, last.get("content", ""), source, turn, _tools(fields), turns)


def _system(fields: Mapping[str, Any]) -> list[Message]:
    if fields.get("system") in (None, ""):
        return []
    return [{"role": "system", "content": _text(fields["system"], "system")}]


def _messages(value: Any, name: str) -> tuple[list[Message], list[float]]:
    """Messages as chat templates take them, and how much each counts."""
    found, weights = [], []
    for position, message in enumerate(_list(value, name)):
        one, weight = _message(message, f"{name}[{position}]")
        found.append(one)
        weights.append(weight)
    return found, weights


def _message(message: Any, name: str) -> tuple[Message, float]:
    if not isinstance(message, dict):
        raise BadLine(f"{name}: expected an object with role and content, got {type(message).__name__}")
    given = {key: value for key, value in message.items() if value is not None}
    role = _text(given.get("role"), f"{name}.role") if "role" in given else None
    calls = given.get("tool_calls") if role == "assistant" else None
    if role is None or ("content" not in given and not calls):
        raise BadLine(f"{name}: expected an object with role and content")
    weight = given.pop("weight", 1)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise BadLine(f"{name}.weight={shown(weight)}: expected 0 or 1")
    for key, value in given.items():
        if key not in TOLD:
            raise BadLine(f"{name} has the field {key[:SHOWN_CHARACTERS]!r}: expected {', '.join(TOLD)}")
        if key != "tool_calls":
            # A tool may answer with nothing, and who calls one says nothing.
            _text(value, f"{name}.{key}", empty=key == "content" and (role == "tool" or bool(calls)))
    if "tool_calls" in given:
        if role != "assistant":
            raise BadLine(f"{name}.tool_calls: expected none, a message by {role[:SHOWN_CHARACTERS]!r} calls nothing")
        if given["tool_calls"]:
            given["tool_calls"] = _calls(given["tool_calls"], f"{name}.tool_calls")
        else:
            del given["tool_calls"]
    return given, float(weight)


def _calls(calls: Any, name: str) -> list[dict[str, Any]]:
    found = []
    for position, call in enumerate(_list(calls, name)):
        where = f"{name}[{position}]"
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadLine(f"{where}: expected an object with a function's name and arguments")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _json(arguments, f"{where}.arguments")
        if not isinstance(arguments, dict):
            raise BadLine(f"{where}.arguments: expected a JSON object, got {type(arguments).__name__}")
        whole = {**function, "arguments": arguments}
        call = {**call, "function": whole} if function is not call else whole
        _require_plain(call, where)
        found.append(call)
    return found


def _tools(fields: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The schemas of the tools that may be called; as JSON where a table has no lists."""
    tools = fields.get("tools")
    if isinstance(tools, str) and tools.strip():
        tools = _json(tools, "tools")
    if tools is None or tools in ("", []):
        return None
    for position, tool in enumerate(_list(tools, "tools")):
        if not isinstance(tool, dict):
            raise BadLine(f"tools[{position}]: expected an object, got {type(tool).__name__}")
        _require_plain(tool, f"tools[{position}]")
    return tools


def _require_plain(value: Any, name: str) -> None:
    """JSON that a template may write out again: no deeper than others are read, without NaN and half characters."""
    level = [value]
    for _ in range(reading.DEEPEST):
        inner: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                inner += [*one, *one.values()]
            elif isinstance(one, list):
                inner += one
            elif isinstance(one, str):
                _text(one, name, empty=True)
            elif not (one is None or isinstance(one, bool | int) or (isinstance(one, float) and math.isfinite(one))):
                raise BadLine(f"{name}: {shown(one)} is no JSON")
        level = inner
    if level:
        raise BadLine(f"{name} is nested deeper than {reading.DEEPEST}")


def _json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadLine(f"{name}: not JSON ({error})") from None


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise BadLine(f"{name}: expected a list, got {type(value).__name__}")
    if not value:
        raise BadLine(f"{name} is empty")
    return value


def _text(value: Any, name: str, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise BadLine(f"{name}: expected a string, got {type(value).__name__}")
    if not empty and not value.strip():
        raise BadLine(f"{name} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadLine(f"{name} has half of a surrogate pair, which is no character") from None
    return value
