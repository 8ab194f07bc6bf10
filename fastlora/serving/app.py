"""HTTP before an engine: OpenAI's paths, a status for each thing that can be wrong, streams, and clients that go away.

404  no adapter, or no page, of that name    413  a body or a request that is too long    415  a body that is not said to be JSON
422  a body that is wrong                    429  a full queue; Retry-After says when     500  the model failed     503  the server ends
"""

import asyncio
import json
import logging
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import anyio
from jinja2 import TemplateError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from fastlora.data.prompts import encode_prompt
from fastlora.generation import turn_ends
from fastlora.serving import bodies
from fastlora.serving.bodies import Answer, BodyError, Wanted
from fastlora.serving.engine import Closing, Engine, EngineError, Piece, QueueFull, Row, TooLong, UnknownName
from fastlora.serving.engine import Request as Asked
from fastlora.typed import fits, listed, shown

logger = logging.getLogger("fastlora")

HOSTS = ("127.0.0.1", "localhost")
"""What a request's Host may say: a page in a browser that has pointed a name of its own here says another."""

News = asyncio.Queue[Piece | EngineError]
"""Of one answer, from the engine's thread."""

INVALID, MISSING, FAILED = "invalid_request_error", "not_found_error", "server_error"


class App:
    """An ASGI application, whose end is the engine's.

    Args:
        engine: one that was started.
        ends: tokens that end an answer.
        largest_body: bytes.
    """

    def __init__(self, engine: Engine, ends: frozenset[int], *, largest_body: int = 1 << 20) -> None:
        self.engine, self.ends, self.largest_body = engine, ends, largest_body
        self.created = int(time.time())
        self.statuses: Counter[int] = Counter()
        self._encoding = anyio.CapacityLimiter(1)  # a tokenizer is one at a time's
        routes = [
            Route("/v1/completions", partial(self._answer, chat=False), methods=["POST"]),
            Route("/v1/chat/completions", partial(self._answer, chat=True), methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/health", self._health),
            Route("/metrics", self._metrics),
        ]
        self._app = Starlette(
            routes=routes,
            middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(HOSTS))],
            exception_handlers={HTTPException: self._http_error},
            lifespan=self._life,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def noted(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.statuses[message["status"]] += 1
            await send(message)

        await self._app(scope, receive, noted)

    @asynccontextmanager
    async def _life(self, _: Starlette) -> AsyncIterator[None]:
        yield
        await anyio.to_thread.run_sync(self.engine.close)

    async def _answer(self, request: Request, *, chat: bool) -> Response:
        try:
            wanted = bodies.read(await self._body(request), chat)
            answer, heard, row = await self._submit(wanted, chat)
        except BodyError as error:
            return _refusal(422, str(error), field=error.field)
        except UnknownName as error:
            names = listed(self.engine.adapters.names)
            return _refusal(404, f"model: there is no {shown(str(error))}, there are {names}", MISSING, "model")
        except TooLong as error:
            return _refusal(413, str(error))
        except QueueFull as error:
            return _refusal(429, str(error), "rate_limit_error", headers={"Retry-After": str(error.seconds)})
        except Closing as error:
            return _refusal(503, str(error), FAILED)
        except ClientDisconnect:
            return Response(status_code=400)  # nobody hears it
        cancel = partial(self.engine.cancel, row)
        if wanted.stream:
            return _Stream(_events(answer, heard, wanted.usage), cancel)
        return await _whole(request, answer, heard, cancel)

    async def _body(self, request: Request) -> bytes:
        kind = request.headers.get("content-type", "")
        if (
            kind.partition(";")[0].strip().lower() != "application/json"
        ):  # what a page elsewhere may send unasked is not
            raise HTTPException(415, f"content-type: got {shown(kind)}, expected application/json")
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > self.largest_body:
                raise HTTPException(413, f"the body: expected at most {self.largest_body:,} bytes")
        return bytes(body)

    async def _submit(self, wanted: Wanted, chat: bool) -> tuple[Answer, News, Row]:
        if self.engine.adapters.find(wanted.model) is None:
            raise UnknownName(wanted.model)
        tokens, ends = await anyio.to_thread.run_sync(self._encode, wanted, limiter=self._encoding)
        name = self.engine.adapters.find(wanted.model) or ""
        room = self.engine.max_length - self.engine.adapters.tokens_before(name) - len(tokens)
        asked = Asked(
            tokens=tokens,
            adapter=wanted.model,
            max_tokens=max(room, 1) if wanted.max_tokens is None else wanted.max_tokens,
            temperature=wanted.temperature,
            top_p=wanted.top_p,
            seed=wanted.seed,
            stop=wanted.stop,
            ends=ends,
        )
        loop, heard = asyncio.get_running_loop(), News()

        def listen(news: Piece | EngineError) -> None:
            loop.call_soon_threadsafe(heard.put_nowait, news)

        row = self.engine.submit(asked, listen)
        return Answer.to(wanted, uuid.uuid4().hex, len(tokens), chat), heard, row

    def _encode(self, wanted: Wanted) -> tuple[list[int], frozenset[int]]:
        """The prompt's tokens, and those that end its answer."""
        tokenizer, ends = self.engine.tokenizer, self.ends
        prompt: Any = wanted.prompt
        if fits(prompt, list[int]):
            size = self.engine.model.config.get_text_config().vocab_size
            if wrong := [token for token in prompt if not 0 <= token < size]:
                raise BodyError("prompt", f"got token {shown(wrong[0])}, expected 0 to {size - 1}")
            return prompt, ends
        name = "prompt" if isinstance(prompt, str) else "messages"
        try:
            tokens = encode_prompt(tokenizer, prompt)
        except (TemplateError, ValueError) as error:  # BadLine, UnicodeEncodeError, no template
            raise BodyError(name, str(error)) from error
        if not tokens:
            raise BodyError(name, "has no tokens")
        return tokens, ends if isinstance(prompt, str) else ends | turn_ends(tokenizer, prompt)

    async def _models(self, _: Request) -> Response:
        return _Json(bodies.models(self.engine.adapters.names, self.created))

    async def _model(self, request: Request) -> Response:
        name = request.path_params["name"]
        listing = bodies.models(self.engine.adapters.names, self.created)["data"]
        found = next((one for one in listing if one["id"] == name), None)
        if found is None:
            return _refusal(404, f"there is no {shown(name)}, there are {listed(self.engine.adapters.names)}", MISSING)
        return _Json(found)

    async def _health(self, _: Request) -> Response:
        is_alive = self.engine.is_alive
        return _Json({"status": "ok" if is_alive else "ending"}, 200 if is_alive else 503)

    async def _metrics(self, _: Request) -> Response:
        return PlainTextResponse(metrics(self.engine, self.statuses), media_type="text/plain; version=0.0.4")

    async def _http_error(self, _: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        kind = MISSING if error.status_code == 404 else INVALID
        return _Json(bodies.error(error.detail, kind), error.status_code, error.headers)


def _refusal(
    status: int, message: str, kind: str = INVALID, field: str | None = None, headers: dict[str, str] | None = None
) -> Response:
    return _Json(bodies.error(message, kind, field), status, headers)


async def _whole(request: Request, answer: Answer, heard: News, cancel: Callable[[], None]) -> Response:
    """The answer in one piece; a client that goes away meanwhile frees its row."""

    async def collect() -> Response:
        text = ""
        while True:
            news = await heard.get()
            if isinstance(news, EngineError):
                return _refusal(503 if isinstance(news, Closing) else 500, str(news), FAILED)
            text += news.text
            if news.finish is not None:
                return _Json(answer.whole(text, news))

    async def gone() -> Response:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        return Response(status_code=400)  # nobody hears it

    tasks = [asyncio.ensure_future(collect()), asyncio.ensure_future(gone())]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return done.pop().result()
    finally:
        cancel()
        for task in tasks:
            task.cancel()


async def _events(answer: Answer, heard: News, usage: bool) -> AsyncIterator[str]:
    """Server-sent events, as OpenAI's: a chunk each, and [DONE]."""
    if answer.chat:
        yield _event(answer.opening())
    while True:
        news = await heard.get()
        if isinstance(news, EngineError):
            yield _event(bodies.error(str(news), FAILED))
            return
        if news.text or news.finish is not None:
            yield _event(answer.chunk(news))
        if news.finish is not None:
            if usage:
                yield _event(answer.ending(news))
            yield "data: [DONE]\n\n"
            return


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"


class _Json(JSONResponse):
    """In ASCII: what a client has sent, and hears again, may hold half of a surrogate pair."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content).encode()


class _Stream(StreamingResponse):
    """Of events; when it ends, however it does, its row is told."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], cancel: Callable[[], None]) -> None:
        super().__init__(events, headers={"Cache-Control": "no-store"})
        self.cancel = cancel

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except ClientDisconnect:
            pass  # which is no error here
        finally:
            self.cancel()


def metrics(engine: Engine, statuses: Counter[int]) -> str:
    """In Prometheus' text format."""
    counts, (rows, waiting) = engine.counts, engine.load
    answers = {f'model="{_label(name)}",finish="{finish}"': n for (name, finish), n in list(counts.answers.items())}
    found: list[tuple[str, str, str, Mapping[str, float]]] = [
        ("responses_total", "counter", "HTTP responses", {f'status="{one}"': n for one, n in list(statuses.items())}),
        ("answers_total", "counter", "requests that the engine took, by how they ended", answers),
        ("prompt_tokens_total", "counter", "tokens of the prompts that were read", {"": counts.prompt_tokens}),
        ("answer_tokens_total", "counter", "tokens of the answers", {"": counts.answer_tokens}),
        ("steps_total", "counter", "steps of the model", {"": counts.steps}),
        ("step_seconds_total", "counter", "seconds in them", {"": counts.step_seconds}),
        ("first_tokens_total", "counter", "answers that have begun", {"": counts.first_tokens}),
        ("first_token_seconds_total", "counter", "seconds to their first tokens", {"": counts.first_token_seconds}),
        ("rows", "gauge", "requests under way", {"": rows}),
        ("waiting", "gauge", "requests in the queue", {"": waiting}),
    ]
    if (bank := engine.adapters.bank) is not None:
        stats = bank.stats
        found += [
            ("adapters_registered", "gauge", "adapters that may be asked for", {"": stats.registered}),
            ("adapters_resident", "gauge", "adapters in the model", {"": stats.resident}),
            ("adapter_bytes", "gauge", "what those take", {"": stats.bytes}),
            ("adapter_hits_total", "counter", "adapters of a step's rows that were there", {"": stats.hits}),
            (
                "adapter_loads_total",
                "counter",
                "adapters that came into the model, swaps among them",
                {"": stats.loads},
            ),
            ("adapter_swaps_total", "counter", "adapters whose weights were exchanged", {"": stats.swaps}),
            ("adapter_evictions_total", "counter", "adapters that left for others", {"": stats.evictions}),
            ("adapter_failures_total", "counter", "adapters whose files could not be used", {"": stats.failures}),
        ]
    lines = []
    for name, kind, help_, values in found:
        lines += [f"# HELP fastlora_{name} {help_}", f"# TYPE fastlora_{name} {kind}"]
        lines += [
            f"fastlora_{name}{{{labels}}} {n}" if labels else f"fastlora_{name} {n}" for labels, n in values.items()
        ]
    return "\n".join(lines) + "\n"


def _label(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
