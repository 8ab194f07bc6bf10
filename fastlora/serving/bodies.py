"""Requests and answers as OpenAI's `/v1/completions` and `/v1/chat/completions` write them; what is not offered is refused by its name."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastlora import reading
from fastlora.data.examples import Prompt
from fastlora.serving.engine import Piece
from fastlora.typed import SHOWN, fits, shown

MOST_STOPS = 4
DEFAULT_TOKENS = 16  # of a completion whose request does not say; a chat's answer has all the room that there is

IGNORED = ("user", "metadata")
"""Fields that change no answer."""

NOT_OFFERED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "store": (False,),
}
"""Fields, and the values that ask for nothing; null does neither."""


class BodyError(ValueError):
    """What is wrong with a request's body, and in which field."""

    def __init__(self, field: str | None, problem: str) -> None:
        super().__init__(f"{field}: {problem}" if field else problem)
        self.field = field


@dataclass(frozen=True)
class Wanted:
    """A request's body, checked as far as it goes without a model."""

    model: str
    prompt: Prompt | list[int]
    max_tokens: int | None
    temperature: float
    top_p: float
    seed: int | None
    stop: tuple[str, ...]
    stream: bool
    usage: bool  # whether a stream ends with what it has used


@dataclass(frozen=True)
class _Field:
    hint: Any
    is_usable: Callable[[Any], bool]
    expected: str


_COUNT = _Field(int, lambda value: 1 <= value <= 1 << 30, "an integer, at least 1")
_FIELDS = {
    "model": _Field(str, lambda value: True, "a name that /v1/models lists"),
    "max_tokens": _COUNT,
    "max_completion_tokens": _COUNT,
    "temperature": _Field(float, lambda value: 0 <= value <= 2, "a number from 0 to 2"),
    "top_p": _Field(float, lambda value: 0 < value <= 1, "a number above 0, at most 1"),
    "seed": _Field(int, lambda value: -(1 << 63) <= value < 1 << 63, "an integer of 64 bits"),
    "stop": _Field(
        str | list[str],
        lambda value: all(value) and 0 < len(value) and (isinstance(value, str) or len(value) <= MOST_STOPS),
        f"a string that is not empty, or up to {MOST_STOPS} of them",
    ),
    "stream": _Field(bool, lambda value: True, "true or false"),
    "stream_options": _Field(dict[str, bool], lambda value: value.keys() <= {"include_usage"}, "include_usage alone"),
}
_OF_COMPLETIONS = {
    "prompt": _Field(str | list[int], bool, "a text or a list of tokens, not empty"),
}
_OF_CHATS = {
    "messages": _Field(list[dict[str, Any]], bool, "a list of objects with role and content, not empty"),
}


def read(body: bytes, chat: bool) -> Wanted:
    """
    Raises:
        BodyError: it is no JSON object, or a field is missing, wrong, unknown, or asks for what is not offered.
    """
    try:
        given = {name: value for name, value in reading.json_object(body).items() if value is not None}
    except ValueError as error:
        raise BodyError(None, f"the body: {error}") from error
    known = _FIELDS | (_OF_CHATS if chat else _OF_COMPLETIONS)
    for name, value in given.items():
        if name in NOT_OFFERED:
            if value not in NOT_OFFERED[name]:
                raise BodyError(name, f"got {shown(value)}, which this server does not offer: leave it out")
        elif name in known:
            field = known[name]
            if not fits(value, field.hint) or not field.is_usable(value):
                raise BodyError(name, f"got {shown(value)}, expected {field.expected}")
        elif name not in IGNORED:
            raise BodyError(name[:SHOWN], "there is no such field here")
    if "stream_options" in given and not given.get("stream"):
        raise BodyError("stream_options", "expected only with stream true")
    prompt = _messages(_required(given, "messages")) if chat else _required(given, "prompt")
    stop = given.get("stop", ())
    return Wanted(
        model=_required(given, "model"),
        prompt=prompt,
        max_tokens=given.get("max_completion_tokens", given.get("max_tokens", None if chat else DEFAULT_TOKENS)),
        temperature=given.get("temperature", 1.0),
        top_p=given.get("top_p", 1.0),
        seed=given.get("seed"),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        stream=given.get("stream", False),
        usage=given.get("stream_options", {}).get("include_usage", False),
    )


def _required(given: Mapping[str, Any], name: str) -> Any:
    if name not in given:
        raise BodyError(name, "is missing")
    return given[name]


def _messages(given: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Each with its role and its content as one text: OpenAI's clients may send that in parts."""
    messages = []
    for position, message in enumerate(given):
        role, content = message.get("role"), message.get("content")
        if isinstance(content, list) and all(fits(part, dict[str, str]) and _is_text(part) for part in content):
            content = "".join(part["text"] for part in content)
        if (
            not isinstance(role, str)
            or not isinstance(content, str)
            or not message.keys() <= {"role", "content", "name"}
        ):
            raise BodyError(f"messages[{position}]", f"got {shown(message)}, expected a role and a content of text")
        messages.append({"role": role, "content": content})
    return messages


def _is_text(part: dict[str, str]) -> bool:
    return part.keys() == {"type", "text"} and part["type"] == "text"


@dataclass(frozen=True)
class Answer:
    """Writes an answer's bodies: in one piece, or as a stream's chunks."""

    number: str  # its own, among all
    model: str
    chat: bool
    prompt_tokens: int
    created: int

    @classmethod
    def to(cls, wanted: Wanted, number: str, prompt_tokens: int, chat: bool) -> "Answer":
        return cls(f"{'chatcmpl' if chat else 'cmpl'}-{number}", wanted.model, chat, prompt_tokens, int(time.time()))

    def whole(self, text: str, last: Piece) -> dict[str, Any]:
        content = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        kind = "chat.completion" if self.chat else "text_completion"
        return self._body(kind, [self._choice(content, last.finish)]) | {"usage": self.usage(last)}

    def opening(self) -> dict[str, Any]:
        """A chat's first chunk, which says who speaks."""
        return self._chunk([self._choice({"delta": {"role": "assistant", "content": ""}}, None)])

    def chunk(self, piece: Piece) -> dict[str, Any]:
        content = {"delta": {"content": piece.text}} if self.chat else {"text": piece.text}
        return self._chunk([self._choice(content, piece.finish)])

    def ending(self, last: Piece) -> dict[str, Any]:
        """The chunk behind the last one, of what was used."""
        return self._chunk([]) | {"usage": self.usage(last)}

    def usage(self, last: Piece) -> dict[str, int]:
        total = self.prompt_tokens + last.tokens
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": last.tokens, "total_tokens": total}

    def _choice(self, content: dict[str, Any], finish: str | None) -> dict[str, Any]:
        return {"index": 0, **content, "logprobs": None, "finish_reason": finish}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._body("chat.completion.chunk" if self.chat else "text_completion", choices)

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.number, "object": kind, "created": self.created, "model": self.model, "choices": choices}


def models(names: list[str], created: int) -> dict[str, Any]:
    """What /v1/models says; the base first."""
    base = names[0]
    parents = {name: {} if name == base else {"parent": base} for name in names}
    data = [
        {"id": name, "object": "model", "created": created, "owned_by": "fastlora", **parent}
        for name, parent in parents.items()
    ]
    return {"object": "list", "data": data}


def error(message: str, kind: str, field: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": field, "code": None}}
