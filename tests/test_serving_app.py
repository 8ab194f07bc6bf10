"""serving/app.py over a real socket, by the openai client and by hand: answers, streams, each thing that can be wrong, and who goes away."""

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import served
import torch

from fastlora.serving.batch import Batch
from fastlora.serving.engine import Engine

PROMPT = "The cat sleeps. What does the cat do?"
BODY = {"model": "red", "prompt": PROMPT, "max_tokens": 4, "temperature": 0}
NAMES = [served.BASE, "blue", "green", "red"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("served")
    served.save(found)
    return found


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return served.load(folder, max_rows=4, max_length=200, max_queue=40)


@pytest.fixture(scope="module")
def port(engine: Engine) -> Iterator[int]:
    with served.listening(engine, largest_body=4000) as found:
        yield found


@pytest.fixture
def client(port: int) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60) as found:
        yield found


def wait_until(is_so: Any) -> None:
    for _ in range(600):
        if is_so():
            return
        time.sleep(0.05)
    pytest.fail("it never came")


def test_each_model_is_listed_and_answers_as_itself(client: openai.OpenAI) -> None:
    assert [one.id for one in client.models.list().data] == NAMES
    assert client.models.retrieve("red").model_dump()["parent"] == served.BASE
    texts = set()
    for name in NAMES:
        found = client.completions.create(model=name, prompt=PROMPT, max_tokens=12, temperature=0)
        assert found.model == name and found.choices[0].finish_reason == "length" and found.usage is not None
        assert found.usage.completion_tokens == 12 and found.usage.total_tokens == found.usage.prompt_tokens + 12
        texts.add(found.choices[0].text)
    assert len(texts) == 4


def test_a_stream_is_the_same_answer_in_pieces(client: openai.OpenAI) -> None:
    options: Any = {"model": "green", "max_tokens": 30, "temperature": 0.7, "top_p": 0.9, "seed": 5}
    whole = client.completions.create(prompt=PROMPT, **options)
    parts = list(client.completions.create(prompt=PROMPT, stream=True, **options))
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text and len(parts) > 5
    assert [part.choices[0].finish_reason for part in parts] == [None] * (len(parts) - 1) + ["length"]
    messages: Any = [{"role": "user", "content": [{"type": "text", "text": "The owl sings."}]}]
    chat = client.chat.completions.create(messages=messages, **options)
    events = list(
        client.chat.completions.create(
            messages=messages, stream=True, stream_options={"include_usage": True}, **options
        )
    )
    *events, last = events
    assert last.choices == [] and last.usage == chat.usage
    assert events[0].choices[0].delta.role == "assistant"
    assert "".join(event.choices[0].delta.content or "" for event in events) == chat.choices[0].message.content
    assert chat.choices[0].finish_reason == events[-1].choices[0].finish_reason == "length"


def test_tokens_stop_strings_and_the_room_there_is(client: openai.OpenAI, engine: Engine) -> None:
    options: Any = {"model": "red", "temperature": 0}
    ids = engine.tokenizer(PROMPT)["input_ids"]
    whole = client.completions.create(prompt=ids, max_tokens=20, **options)
    assert whole == client.completions.create(prompt=PROMPT, max_tokens=20, **options).model_copy(
        update={"id": whole.id, "created": whole.created}
    )
    text = whole.choices[0].text
    stopped = client.completions.create(prompt=ids, max_tokens=20, stop=["never", text[5:8]], **options).choices[0]
    assert (stopped.text, stopped.finish_reason) == (text[: text.index(text[5:8])], "stop")
    usage = client.completions.create(prompt=ids, **options).usage
    assert usage is not None and usage.completion_tokens == 16
    chat = client.chat.completions.create(messages=[{"role": "user", "content": "Hi."}], **options)
    assert chat.usage is not None
    assert chat.usage.total_tokens == 200 or chat.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"prompt": None}, "prompt: is missing"),
        ({"model": None}, "model: is missing"),
        ({"prompt": ""}, "prompt: got '', expected a text or a list of tokens, not empty"),
        ({"prompt": [["The"]]}, "prompt: got [['The']], expected a text"),
        ({"prompt": [5, 9999]}, "prompt: got token 9999, expected 0 to"),
        ({"prompt": "\ud800"}, "prompt: "),
        ({"max_tokens": 0}, "max_tokens: got 0, expected an integer, at least 1"),
        ({"max_tokens": True}, "max_tokens: got True"),
        ({"temperature": 2.5}, "temperature: got 2.5, expected a number from 0 to 2"),
        ({"top_p": 0}, "top_p: got 0, expected a number above 0, at most 1"),
        ({"seed": 1 << 64}, "seed: got 18446744073709551616, expected an integer of 64 bits"),
        ({"stop": ["a", ""]}, "stop: got ['a', ''], expected"),
        ({"stop": list("abcde")}, "stop: got ['a', 'b', 'c', 'd', 'e'], expected"),
        ({"stream": 1}, "stream: got 1, expected true or false"),
        ({"stream_options": {"include_usage": True}}, "stream_options: expected only with stream true"),
        ({"logprobs": 3}, "logprobs: got 3, which this server does not offer: leave it out"),
        ({"n": 2}, "n: got 2, which this server does not offer"),
        ({"echo": True}, "echo: got True, which"),
        ({"top_k": 5}, "top_k: there is no such field here"),
        ({"messages": []}, "messages: there is no such field here"),
        ({"\ud800": 1}, "\ud800: there is no such field here"),
    ],
)
def test_a_wrong_body_is_422_and_names_the_field(port: int, change: dict[str, Any], problem: str) -> None:
    status, _, found = served.call(port, "/v1/completions", {**BODY, **change})
    assert status == 422 and found["error"]["message"].startswith(problem), found
    assert found["error"]["param"] == next(iter(change)) and found["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "messages: got [], expected a list of objects"),
        ([{"role": "user"}], "messages[0]: got {'role': 'user'}, expected a role and a content of text"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages[0]: got"),
        ([{"role": "user", "content": "a", "tool_calls": []}], "messages[0]: got"),
    ],
)
def test_wrong_messages_are_422(port: int, messages: Any, problem: str) -> None:
    status, _, found = served.call(port, "/v1/chat/completions", {"model": "red", "messages": messages})
    assert status == 422 and found["error"]["message"].startswith(problem), found


@pytest.mark.parametrize(
    ("body", "status", "problem"),
    [
        (b"{", 422, "the body: not JSON"),
        (b"[]", 422, "the body: expected a JSON object, got list"),
        (b"\xff", 422, "the body: not UTF-8"),
        (b'{"n": NaN}', 422, "the body: not JSON (NaN is no JSON)"),
        (b"[" * 3000, 422, "the body: not JSON"),
        (b" " * 5000, 413, "the body: expected at most 4,000 bytes"),
    ],
)
def test_what_is_no_body_is_told(port: int, body: bytes, status: int, problem: str) -> None:
    found = served.call(port, "/v1/completions", body)
    assert found[0] == status and found[2]["error"]["message"].startswith(problem), found


def test_other_refusals(port: int) -> None:
    for name in ("yellow", "../adapters/red", "adapter-0", "__base__", "/etc/passwd", "red\n"):
        status, _, found = served.call(port, "/v1/completions", {**BODY, "model": name})
        assert status == 404 and found["error"]["type"] == "not_found_error"
        assert found["error"]["message"] == f"model: there is no {name!r}, there are base, blue, green, red"
    status, _, found = served.call(port, "/v1/completions", {**BODY, "max_tokens": 199})
    assert status == 413 and "199 of the answer are more than the 200" in found["error"]["message"]
    status, _, found = served.call(port, "/v1/completions", {**BODY, "prompt": "cat " * 300})
    assert status == 413
    assert served.call(port, "/v1/completions", BODY, content_type="text/plain")[0] == 415
    assert served.call(port, "/v1/completions", BODY, host="attacker.example")[0] == 400
    assert served.call(port, "/v1/completions")[0] == 405
    assert served.call(port, "/v1/models/%2e%2e%2fred")[0] == 404
    status, _, found = served.call(port, "/v1/embeddings", {})
    assert status == 404 and found["error"]["message"] == "Not Found"


def test_the_client_sees_each_as_its_own_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="there are base, blue, green, red"):
        client.completions.create(model="yellow", prompt=PROMPT)
    with pytest.raises(openai.UnprocessableEntityError, match="logprobs: got True"):
        client.chat.completions.create(model="red", messages=[{"role": "user", "content": "a"}], logprobs=True)


def test_a_full_queue_is_429_and_says_when(folder: Path) -> None:
    engine = served.load(folder, max_rows=1, max_length=200, max_queue=1)
    with served.listening(engine) as port:
        open_ = [served.begin(port, {**BODY, "max_tokens": 150, "stream": True})]
        wait_until(lambda: engine.load == (1, 0))
        open_.append(served.begin(port, {**BODY, "max_tokens": 150, "stream": True}))
        wait_until(lambda: engine.load == (1, 1))
        status, headers, found = served.call(port, "/v1/completions", BODY)
        assert status == 429 and found["error"]["type"] == "rate_limit_error"
        assert 1 <= int(headers["retry-after"]) <= 60
        for one in open_:
            one.close()
        wait_until(lambda: engine.load == (0, 0))
        assert served.call(port, "/v1/completions", BODY)[0] == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_row(port: int, engine: Engine, stream: bool) -> None:
    before = engine.counts.answers["blue", "cancelled"]
    gone = [served.begin(port, {**BODY, "model": "blue", "max_tokens": 180, "stream": stream}) for _ in range(3)]
    wait_until(lambda: engine.load[0] == 3)
    for one in gone:
        one.close()
    wait_until(lambda: engine.load == (0, 0))
    assert engine.counts.answers["blue", "cancelled"] == before + 3
    half = socket.create_connection(("127.0.0.1", port))  # nor does one that goes away within its body do harm
    half.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
    )
    half.close()
    assert served.call(port, "/v1/completions", BODY)[0] == 200


def test_what_the_model_cannot_do_is_500_and_the_next_is_answered(
    port: int, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Batch.step

    def failing(self: Batch, first: int, tokens: Any, starts: Any, names: Any) -> torch.Tensor:
        if "green" in names:
            raise RuntimeError("/secret/path")
        return step(self, first, tokens, starts, names)

    monkeypatch.setattr(Batch, "step", failing)
    with pytest.raises(openai.InternalServerError, match="the model has failed: RuntimeError") as error:
        client.completions.create(model="green", prompt=PROMPT)
    assert "secret" not in str(error.value)
    with pytest.raises(openai.APIError, match="the model has failed"):
        list(client.completions.create(model="green", prompt=PROMPT, stream=True))
    assert served.call(port, "/v1/completions", BODY)[0] == 200


def test_health_and_metrics(port: int, engine: Engine) -> None:
    assert served.call(port, "/health")[::2] == (200, {"status": "ok"})
    served.call(port, "/v1/completions", BODY)
    status, headers, text = served.call(port, "/metrics")
    assert status == 200 and headers["content-type"].startswith("text/plain; version=0.0.4")
    values = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            assert name.startswith("fastlora_")
            values[name] = float(value)
    assert values['fastlora_answers_total{model="red",finish="length"}'] >= 1
    assert values['fastlora_responses_total{status="200"}'] >= 2
    assert values["fastlora_answer_tokens_total"] == engine.counts.answer_tokens > 0
    assert values["fastlora_rows"] == values["fastlora_waiting"] == 0
    assert not any("adapters" in name for name in values), "there is no bank"


def test_metrics_of_a_bank(folder: Path) -> None:
    with served.listening(served.load(folder, max_adapter_bytes=1 << 30, max_rows=2, max_length=200)) as port:
        for _ in range(2):
            assert served.call(port, "/v1/completions", BODY)[0] == 200
        text = served.call(port, "/metrics")[2]
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("fastlora_adapter"))
    assert values["fastlora_adapters_registered"] == str(len(served.RANKS))
    assert values["fastlora_adapters_resident"] == values["fastlora_adapter_loads_total"] == "1"
    assert int(values["fastlora_adapter_bytes"]) > 0 and int(values["fastlora_adapter_hits_total"]) > 0
    for what in ("swaps", "evictions", "failures"):
        assert values[f"fastlora_adapter_{what}_total"] == "0"


def test_the_end_answers_first_who_is_there(folder: Path) -> None:
    engine = served.load(folder, max_rows=1, max_length=200, max_queue=4)
    found: list[int] = []
    with served.listening(engine) as port:
        body = {**BODY, "max_tokens": 60}
        threads = [
            threading.Thread(target=lambda: found.append(served.call(port, "/v1/completions", body)[0]))
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        wait_until(lambda: sum(engine.load) == 3)
    for thread in threads:
        thread.join(60)
    assert found == [200] * 3 and not engine.is_alive


def test_a_mixture_of_everything_at_once(port: int, engine: Engine) -> None:
    """Seconds of it, of a dozen clients: streams and wholes, greedy and drawn, good, bad and abandoned. Each answer is what it is alone."""
    assert served.mixture(port, NAMES, seconds=4) == []
    wait_until(lambda: engine.load == (0, 0))
