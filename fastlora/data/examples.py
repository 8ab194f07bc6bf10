"""JSON lines in, examples out.

A line is `{"prompt": "...", "completion": "..."}` or `{"messages": [{"role": "...", "content": "..."}, ...]}`; other
fields are ignored. The last message must be the assistant's. Bad lines are told all at once.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlora import reading

LISTED_PROBLEMS = 20
SHOWN_CHARACTERS = 40  # of a foreign text in an error
COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
}
OTHER_FILES = {b"\xff\xfe": "UTF-16 text", b"\xfe\xff": "UTF-16 text", b"PAR1": "Parquet"}
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

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


class BadLine(ValueError):
    """What is wrong with one line."""


@dataclass(frozen=True)
class Example:
    prompt: Prompt  # text, or the messages before the last assistant turn
    completion: str
    source: str = ""  # FILE:LINE


def read_examples(path: str | Path) -> list[Example]:
    """Read a JSONL file of prompts and completions, or of messages. Empty lines are skipped.

    Raises:
        OSError: there is no such file, it is a folder, or it cannot be read.
        DataError: some lines are no JSON, lack a field, have one of a wrong type, or an empty one.
        ValueError: the file is compressed, no UTF-8 text, or has no lines.
    """
    path = Path(path)
    examples, problems = [], []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if number == 1:
                    _require_text(line, path)
                    line = line.removeprefix(BYTE_ORDER_MARK)
                try:
                    if line.strip():
                        examples.append(parse_line(line, f"{path}:{number}"))
                except BadLine as error:
                    problems.append(f"{path}:{number}: {error}")
    except FileNotFoundError:
        raise FileNotFoundError(f"data: there is no file {path}") from None
    except IsADirectoryError:
        raise IsADirectoryError(f"data: {path} is a folder, expected a JSONL file") from None
    except OSError as error:
        raise type(error)(f"data: {path} cannot be read: {error.strerror}") from error
    if problems:
        raise DataError(problems)
    if not examples:
        raise ValueError(f"data: {path} has no rows")
    return examples


def _require_text(beginning: bytes, path: Path) -> None:
    for magic, kind in (COMPRESSED | OTHER_FILES).items():
        if beginning.startswith(magic):
            hint = ": unpack it first" if magic in COMPRESSED else ""
            raise ValueError(f"data: {path} is {kind}, expected JSON lines in UTF-8{hint}")


def parse_line(line: bytes, source: str = "") -> Example:
    """The example that one line of a JSONL file holds; it depends on nothing but the line.

    Raises:
        BadLine: the line cannot be used.
    """
    try:
        fields = reading.json_object(line, strict=False)
    except ValueError as error:
        raise BadLine(str(error)) from None
    return _example(fields, source)


def _example(fields: dict[str, Any], source: str) -> Example:
    if "messages" in fields:
        if "prompt" in fields or "completion" in fields:
            raise BadLine("has both messages and prompt or completion: expected one of the two forms")
        messages = _messages(fields["messages"])
        return Example(messages[:-1], messages[-1]["content"], source)
    missing = [name for name in ("prompt", "completion") if name not in fields]
    if missing:
        raise BadLine(f"no field {' and no field '.join(repr(name) for name in missing)}")
    return Example(_text(fields["prompt"], "prompt"), _text(fields["completion"], "completion"), source)


def _messages(messages: Any) -> list[Message]:
    if not isinstance(messages, list) or len(messages) < 2:
        raise BadLine("messages: expected a list of at least two messages")
    for position, message in enumerate(messages):
        name = f"messages[{position}]"
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise BadLine(f"{name}: expected an object with role and content, and nothing else")
        _text(message["role"], f"{name}.role")
        _text(message["content"], f"{name}.content")
    if messages[-1]["role"] != "assistant":
        raise BadLine(f"the last message is by {messages[-1]['role'][:SHOWN_CHARACTERS]!r}: expected 'assistant'")
    return messages


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadLine(f"{name}: expected a string, got {type(value).__name__}")
    if not value.strip():
        raise BadLine(f"{name} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadLine(f"{name} has half of a surrogate pair, which is no character") from None
    return value
