"""A tiny base with adapters, an engine of it, and a server on a port of its own: what the tests of `fastlora serve` talk to."""

import http.client
import json
import queue
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import tiny
import torch
import uvicorn
from peft import LoraConfig, get_peft_model

from fastlora.serving import server
from fastlora.serving.app import App
from fastlora.serving.engine import Engine, EngineError, Piece, Request

RANKS = {"red": 2, "green": 5, "blue": 8}
BASE = "base"


def save(folder: Path) -> tuple[Path, Path]:
    """A base in a folder of its name, and beside it a folder of adapters that change every layer, of unlike ranks."""
    base = tiny.save_model(folder / BASE)
    for seed, (name, r) in enumerate(RANKS.items()):
        torch.manual_seed(seed)
        model = tiny.llama(vocab_size=len(tiny.tokenizer()), tie_word_embeddings=False)
        config = LoraConfig(
            r=r, lora_alpha=2 * r, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
        )
        torch.manual_seed(100 + seed)
        get_peft_model(model, config).save_pretrained(folder / "adapters" / name)
    return base, folder / "adapters"


def load(folder: Path, **options: Any) -> Engine:
    with tiny.on_cpu():
        return server.load_engine(str(folder / BASE), folder / "adapters", **options)


@contextmanager
def running(engine: Engine) -> Iterator[Engine]:
    engine.start()
    try:
        yield engine
    finally:
        engine.close(drain=False)


def requests(count: int, drawn: int = 0, **more: Any) -> list[Request]:
    """Of unlike lengths, for all adapters and the base, in disorder."""
    draw = random.Random(drawn)
    size = len(tiny.tokenizer())
    return [
        Request(
            tokens=[draw.randrange(5, size) for _ in range(draw.choice((1, 3, 7, 30, 90)))],
            adapter=draw.choice((BASE, *RANKS)),
            max_tokens=draw.randrange(1, 40),
            **more,
        )
        for _ in range(count)
    ]


class Heard:
    """A listener that keeps what it is told."""

    def __init__(self) -> None:
        self.news: queue.SimpleQueue[Piece | EngineError] = queue.SimpleQueue()

    def __call__(self, news: Piece | EngineError) -> None:
        self.news.put(news)

    def answer(self, patience: float = 60) -> tuple[str, str]:
        """The whole text, and how it ended; raises the error, if there was one."""
        text = ""
        while True:
            news = self.news.get(timeout=patience)
            if isinstance(news, EngineError):
                raise news
            text += news.text
            if news.finish is not None:
                return text, news.finish


def answers(engine: Engine, asked: Sequence[Request]) -> list[tuple[str, str]]:
    """Of requests that are all there at once."""
    heard = [Heard() for _ in asked]
    for request, listener in zip(asked, heard, strict=True):
        engine.submit(request, listener)
    return [one.answer() for one in heard]


@contextmanager
def listening(engine: Engine, **options: Any) -> Iterator[int]:
    """A server of the engine, on any free port of the loopback, which ends with the context; gives the port."""
    engine.start()
    app = App(engine, frozenset(), **options)
    running = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on", timeout_graceful_shutdown=60))
    with socket.create_server(("127.0.0.1", 0)) as bound:
        thread = threading.Thread(target=running.run, args=([bound],))
        thread.start()
        try:
            yield bound.getsockname()[1]
        finally:
            running.should_exit = True
            thread.join(90)
            assert not thread.is_alive()


def call(
    port: int, path: str, body: Any = None, *, method: str | None = None, **headers: str
) -> tuple[int, dict[str, str], Any]:
    """Status, headers and body of a plain request; body: JSON, or bytes as they are."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    given = {"content-type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    connection.request(method or ("GET" if body is None else "POST"), path, data, given)
    response = connection.getresponse()
    text = response.read()
    connection.close()
    is_json = response.headers.get_content_type() == "application/json"
    found = {name.lower(): value for name, value in response.headers.items()}
    return response.status, found, json.loads(text) if is_json else text.decode()


def begin(port: int, body: dict[str, Any]) -> socket.socket:
    """A request whose answer nobody reads."""
    data = json.dumps(body).encode()
    one = socket.create_connection(("127.0.0.1", port))
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    one.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return one


def mixture(
    port: int,
    names: Sequence[str],
    seconds: float,
    versions: Sequence[Callable[[], object]] = (lambda: None,),
    then: Callable[[], object] = lambda: None,
    damaged: Sequence[str] = (),
) -> list[Any]:
    """What went wrong while a dozen clients asked for answers of these models that are known from before, gave up, and sent what is no request.

    versions: what makes the models be of each of their versions; an answer is right that is one of theirs. then: called when these are
    known, before the clients begin. damaged: names whose files are no good.
    """
    draw, wrong = random.Random(1), list[Any]()
    options: list[Any] = [
        {
            "model": draw.choice(names),
            "prompt": [draw.randrange(5, 300) for _ in range(draw.choice((1, 4, 20, 70)))],
            "max_tokens": draw.randrange(1, 40),
            "temperature": draw.choice((0, 0.8)),
            "seed": draw.randrange(9),
            "top_p": draw.choice((1, 0.7)),
        }
        for _ in range(30)
    ]

    refused: list[tuple[dict[str, Any], int]] = [
        *(({"n": 3}, 422), ({"prompt": ""}, 422), ({"model": "yellow"}, 404), ({"max_tokens": 10_000}, 413)),
        *(({"model": name}, 500) for name in damaged),
    ]

    def ask(client: openai.OpenAI, mine: random.Random, alone: Sequence[Sequence[str]]) -> None:
        i = mine.randrange(len(options))
        match mine.randrange(5):
            case 0:
                bad, expected = mine.choice(refused)
                status = call(port, "/v1/completions", {**options[i], **bad})[0]
                if status not in (expected, 429):  # a queue may be full
                    wrong.append((bad, status))
                return
            case 1:
                begin(port, {**options[i], "stream": mine.random() < 0.5}).close()
                return
            case 2:
                parts = client.completions.create(**options[i], stream=True)
                text = "".join(part.choices[0].text for part in parts)
            case _:
                text = client.completions.create(**options[i]).choices[0].text
        if text not in [version[i] for version in alone]:
            wrong.append((options[i], text, [version[i] for version in alone]))

    def keep_asking(client: openai.OpenAI, seed: int, alone: Sequence[Sequence[str]], until: float) -> None:
        mine = random.Random(seed)
        while time.monotonic() < until:
            try:
                ask(client, mine, alone)
            except openai.RateLimitError:
                time.sleep(0.05)
            except (openai.APIError, http.client.HTTPException, OSError) as error:
                wrong.append(error)

    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60) as client:
        alone = []
        for begin_version in versions:
            begin_version()
            alone.append([client.completions.create(**one).choices[0].text for one in options])
        then()
        until = time.monotonic() + seconds
        threads = [threading.Thread(target=keep_asking, args=(client, seed, alone, until)) for seed in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(seconds + 120)
    return wrong
