"""A tiny base with adapters, an engine of it, and a server on a port of its own: what the tests of `fastlora serve` talk to."""

import http.client
import json
import queue
import random
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
