"""serving/bodies.py: whatever a body holds, it is what it says or a BodyError."""

import json
import random
from typing import Any

import pytest

from fastlora.serving import bodies
from fastlora.serving.bodies import BodyError, Wanted

HOSTILE: list[Any] = [
    None, True, False, 0, 1, -1, 2, 0.5, 1e308, -1e-308, 10**400, "", "a", "\ud800", "\0", "a" * 5000, [], [[]], [1], [-1], [True], ["a"],
    ["a"] * 9, [{}], {}, {"a": 1}, {"role": "user"}, [{"role": "user", "content": "a"}], [{"role": 1, "content": "a"}],
    [{"role": "user", "content": [{"type": "text", "text": 1}]}], [{"role": "user", "content": []}], {"include_usage": True},
    {"include_usage": 1}, {"type": "text"}, 1 << 63, -(1 << 63) - 1, (1 << 63) - 1,
]  # fmt: skip
NAMES = [*bodies._FIELDS, *bodies._OF_COMPLETIONS, *bodies._OF_CHATS, *bodies.NOT_OFFERED, *bodies.IGNORED, "other", ""]
GOOD: list[dict[str, Any]] = [
    {"model": "red", "prompt": "The cat", "max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "seed": 1, "stop": ["x"]},
    {"model": "red", "messages": [{"role": "user", "content": "The cat"}], "stream": True},
]


def outcome(body: bytes, chat: bool) -> Wanted | None:
    try:
        found = bodies.read(body, chat)
    except BodyError as error:
        assert str(error) and (error.field is None or str(error).startswith(error.field))
        return None
    assert isinstance(found.model, str) and found.prompt and 0 <= found.temperature <= 2 and 0 < found.top_p <= 1
    assert found.max_tokens is None or found.max_tokens >= 1
    assert len(found.stop) <= bodies.MOST_STOPS and all(found.stop)
    return found


def test_hostile_values_and_bytes() -> None:
    draw = random.Random(3)
    taken = 0
    for _ in range(10_000):
        chat = draw.random() < 0.5
        body = dict(GOOD[chat])
        for _ in range(draw.randint(0, 3)):
            body[draw.choice(NAMES)] = draw.choice(HOSTILE)
        text = json.dumps(body).encode()
        if draw.random() < 0.3:
            place = draw.randrange(len(text))
            text = text[:place] + draw.randbytes(draw.randint(0, 3)) + text[place + draw.randint(0, 9) :]
        taken += outcome(text, chat) is not None
    assert 1000 < taken < 9000


def test_what_is_asked_for() -> None:
    wanted = outcome(json.dumps(GOOD[0]).encode(), False)
    assert wanted == Wanted("red", "The cat", 5, 0.5, 0.9, 1, ("x",), False, False)
    wanted = outcome(
        json.dumps({"model": "red", "prompt": [5], "stop": "ab", "n": 1, "user": "me", "seed": None}).encode(), False
    )
    assert wanted == Wanted("red", [5], bodies.DEFAULT_TOKENS, 1.0, 1.0, None, ("ab",), False, False)
    body = {**GOOD[1], "max_tokens": 3, "max_completion_tokens": 4, "stream_options": {"include_usage": True}}
    parts = [{"type": "text", "text": "The "}, {"type": "text", "text": "cat"}]
    body["messages"] = [{"role": "user", "name": "me", "content": parts}]
    wanted = outcome(json.dumps(body).encode(), True)
    assert wanted == Wanted("red", [{"role": "user", "content": "The cat"}], 4, 1.0, 1.0, None, (), True, True)
    chat = outcome(json.dumps(GOOD[1]).encode(), True)
    assert chat is not None and chat.max_tokens is None


def test_an_unknown_field_is_named() -> None:
    with pytest.raises(BodyError, match="top_k: there is no such field here") as error:
        bodies.read(json.dumps({**GOOD[0], "top_k": 3}).encode(), False)
    assert error.value.field == "top_k"
