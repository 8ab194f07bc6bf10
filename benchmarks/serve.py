"""`fastlora serve` on a CPU: tokens a second of 32 clients over 16 adapters, against one client at a time; of the engine, and over its socket.

A model of random weights of SmolLM2-135M's shape, or --model; adapters of r 8 and 16 on all its linear layers; prompts of random tokens, answers of
TOKENS tokens, greedy. Each client asks for the next answer when it has one. Clients of the socket are a process of their own, and read streams.
"""

import asyncio
import json
import queue
import random
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .goals import Goal
from .model_steps import NARROW, Material, save_random
from .session import Line, Session
from .step import own_process

ADAPTERS, CLIENTS, TIMES = 16, 32, 6.0
TOKENS, PROMPT = 48, (16, 96)  # of an answer; of a prompt, at least and at most
OF_ONE, OF_EACH = 6, 3  # answers that one client asks for, and that each of many does
RANKS = (8, 16)
SEED = 1


@dataclass(frozen=True)
class Asked:
    adapter: str
    tokens: list[int]


def _asked(count: int) -> list[Asked]:
    draw = random.Random(SEED)
    return [
        Asked(f"adapter-{i % ADAPTERS}", [draw.randrange(5, 8000) for _ in range(draw.randint(*PROMPT))])
        for i in range(count)
    ]


def _save(model: str | None, folder: Path) -> None:
    """The adapters of a model, and the model, if it has none to be."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    if model is None:
        save_random(NARROW, folder)
    base: Any = AutoModelForCausalLM.from_pretrained(model or folder, dtype=torch.float32)
    torch.manual_seed(SEED)
    for i in range(ADAPTERS):
        config = LoraConfig(r=RANKS[i % len(RANKS)], target_modules="all-linear", task_type="CAUSAL_LM")
        adapted: Any = get_peft_model(base, config)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.01)
        adapted.save_pretrained(folder / "adapters" / f"adapter-{i}")
        base = adapted.unload()


@contextmanager
def _engine(material: Material) -> Iterator[Any]:
    from fastlora.serving.server import start_engine

    with tempfile.TemporaryDirectory() as folder:
        model = material.model or folder
        with own_process() as process:  # this one's main thread is not to compute (fastlora/serving/server.py)
            process.submit(_save, material.model, Path(folder)).result()
        engine = start_engine(model, Path(folder) / "adapters", max_rows=CLIENTS, max_queue=CLIENTS, max_length=256)
    try:
        yield engine
    finally:
        engine.close(drain=False)


def answers(engine: Any, asked: Sequence[Asked], clients: int) -> tuple[float, list[str]]:
    """Tokens a second of so many clients, and all the answers; the engine's thread tells a client, which asks again, until nothing is left to ask."""
    from fastlora.serving.engine import EngineError, Piece, Request

    texts = [""] * len(asked)
    left, done = iter(range(len(asked))), queue.SimpleQueue[EngineError | None]()

    def ask() -> None:
        i = next(left, None)
        if i is not None:
            engine.submit(Request(asked[i].tokens, asked[i].adapter, TOKENS), partial(hear, i))

    def hear(i: int, news: Piece | EngineError) -> None:
        if isinstance(news, EngineError):
            done.put(news)
            return
        texts[i] += news.text
        if news.finish is not None:
            ask()
            done.put(None)

    begun = time.perf_counter()
    for _ in range(clients):
        ask()
    for _ in asked:
        if (error := done.get()) is not None:
            raise error
    return len(asked) * TOKENS / (time.perf_counter() - begun), texts


async def _read_stream(port: int, asked: Asked) -> None:
    body = {"model": asked.adapter, "prompt": asked.tokens, "max_tokens": TOKENS, "temperature": 0, "stream": True}
    data = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n"
    writer.write(f"{head}Connection: close\r\n\r\n".encode() + data)
    whole = await reader.read()
    writer.close()
    if b"data: [DONE]" not in whole:
        raise RuntimeError(f"the server answered {whole[:300]!r}")


def streams(port: int, asked: Sequence[Asked], clients: int) -> float:
    """Tokens a second of so many clients over the socket."""

    async def ask(left: Iterator[Asked]) -> None:
        for one in left:
            await _read_stream(port, one)

    async def all_of_them() -> None:
        left = iter(asked)
        await asyncio.gather(*(ask(left) for _ in range(clients)))

    begun = time.perf_counter()
    asyncio.run(all_of_them())
    return len(asked) * TOKENS / (time.perf_counter() - begun)


@contextmanager
def _listening(engine: Any) -> Iterator[int]:
    import uvicorn

    from fastlora.serving.app import App

    server = uvicorn.Server(uvicorn.Config(App(engine, frozenset()), log_level="error", lifespan="on"))
    with socket.create_server(("127.0.0.1", 0)) as bound:
        thread = threading.Thread(target=server.run, args=([bound],))
        thread.start()
        try:
            yield bound.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


def _goals(what: str, one: float, many: float) -> Iterator[Goal]:
    case = f"{CLIENTS} clients, {ADAPTERS} adapters of r {' and '.join(map(str, RANKS))}"
    yield Goal(f"serve, {what}: times one client's speed", case, "float32", TIMES, many / one, None, at_least=True)
    yield Goal(
        f"serve, {what}: tokens a second", case, "float32", None, many, None, unit="tokens/s", rivals={"one client": one}
    )  # fmt: skip


def _of_engine(session: Session, material: Material) -> Iterator[Goal]:
    with _engine(material) as engine:
        few, many = _asked(OF_ONE), _asked(CLIENTS * OF_EACH)
        answers(engine, many[:CLIENTS], CLIENTS)  # packs weights
        alone, expected = answers(engine, few, 1)
        together, found = answers(engine, many, CLIENTS)
        same = sum(map(str.__eq__, found, expected))
        session.notes.append(f"serve: {same} of {len(expected)} answers beside others are those alone")
        steps = engine.counts.steps
        session.notes.append(f"serve: {engine.counts.step_seconds / steps * 1e3:.0f} ms a step over {steps} steps")
    yield from _goals("the engine", alone, together)


def _of_socket(session: Session, material: Material) -> Iterator[Goal]:
    with _engine(material) as engine, _listening(engine) as port, own_process() as clients:
        few, many = _asked(OF_ONE), _asked(CLIENTS * OF_EACH)
        clients.submit(streams, port, many[:CLIENTS], CLIENTS).result()
        alone = clients.submit(streams, port, few, 1).result()
        together = clients.submit(streams, port, many, CLIENTS).result()
    yield from _goals("the socket", alone, together)


def serve_lines(material: Material) -> dict[str, Line]:
    return {
        "the engine": partial(_of_engine, material=material),
        "the socket": partial(_of_socket, material=material),
    }
