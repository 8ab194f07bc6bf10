"""The engine: a queue, and one thread that owns the model. Rows of all adapters share its steps; they join and leave between two of them.

A turn of the thread: rows that nobody waits for leave; new ones get their prompt's keys and values, and with them their first token; all others get
their next token in one step. What new rows may bring into a turn is bounded by CHUNK, and a longer prompt takes several turns, so that nobody who is
under way waits long. A row's text does not hang on the others: `batch` sees to it.
"""

import itertools
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fastlora.data.rows import require_count
from fastlora.layers import BASE
from fastlora.serving.adapters import Adapters, NoRoom
from fastlora.serving.batch import Batch
from fastlora.serving.picking import Picker, pick
from fastlora.serving.words import Words

logger = logging.getLogger("fastlora")

CHUNK = 512  # tokens of new rows' prompts in a turn, padding counted
PAUSE = 0.005  # seconds, where all that there is to do is to wait for a file
THREAD = "fastlora-engine"
LONGEST_WAIT = 60  # seconds that a client is told to wait
MOST_PASSED = 32  # rows that go before one whose adapter finds no room: then they wait until it does


class EngineError(Exception):
    """A request that the engine did not answer, or not to its end."""


class UnknownName(EngineError):
    """No adapter, nor the base, has it."""


class TooLong(EngineError):
    """More tokens than a row may have."""


class QueueFull(EngineError):
    def __init__(self, waiting: int, seconds: int) -> None:
        super().__init__(f"{waiting} requests are waiting already: try again in {seconds} s")
        self.seconds = seconds  # after which there may be room


class Closing(EngineError):
    """The server is about to end, and takes no more."""


@dataclass(frozen=True)
class Request:
    """Raises ValueError: there are no tokens, or none may be answered."""

    tokens: Sequence[int]  # the prompt's
    adapter: str  # the name that was asked for
    max_tokens: int  # of the answer
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    ends: frozenset[int] = frozenset()  # tokens that end the answer, and are not part of its text

    def __post_init__(self) -> None:
        require_count("max_tokens", self.max_tokens)
        require_count("tokens", len(self.tokens))


@dataclass(frozen=True)
class Piece:
    """What a step adds to an answer."""

    text: str
    tokens: int  # of the answer so far, its end token counted
    finish: str | None = None  # with the last: "stop" (an end token, a stop string) or "length"


Listener = Callable[[Piece | EngineError], None]
"""Hears of every piece and of at most one error, which ends the answer. It is called by the engine's thread, which waits for it."""


@dataclass(eq=False)
class Row:
    """A request on its way."""

    request: Request
    listener: Listener
    name: str  # what the adapters call it
    picker: Picker
    words: Words
    asked: float  # time.perf_counter
    filled: int = 0  # places of its slot that are, those of a soft prompt among them
    last: int = 0  # the newest token, which does not yet
    count: int = 0  # tokens of the answer
    gone: bool = False  # nobody waits for it any more
    held: bool = False  # it has begun, and its adapter is not swapped until it has ended
    kept: bool = False  # its adapter is on its way into the model, or there, where it stays until the row ends
    tried: int = -1  # how many rows had ended when there was no room for its adapter
    passed: int = 0  # rows behind it in the queue that went before it since


@dataclass
class Counts:
    """What has happened since the start."""

    answers: Counter[tuple[str, str]] = field(default_factory=Counter)  # by the name asked for, and how it ended
    prompt_tokens: int = 0
    answer_tokens: int = 0
    steps: int = 0
    step_seconds: float = 0.0
    first_tokens: int = 0
    first_token_seconds: float = 0.0  # from the request on, the queue counted


class Engine:
    """Answers of a causal model and its adapters, to any number of callers.

    Args:
        model: transformers', or PEFT's with the adapters, in eval mode. From `start` on it is the engine's thread's alone.
        adapters: which names may be asked for.
        max_rows: answers under way at once.
        max_length: tokens of a prompt and its answer.
        max_queue: requests that may wait.

    Raises:
        ValueError: a bad option, or a model whose rows cannot join and leave.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        adapters: Adapters,
        *,
        max_rows: int = 32,
        max_length: int = 2048,
        max_queue: int = 64,
    ) -> None:
        require_count("max_rows", max_rows)
        require_count("max_length", max_length, 8, "what the model is tried out with")
        require_count("max_queue", max_queue)
        self.model, self.tokenizer, self.adapters = model, tokenizer, adapters
        self.max_rows, self.max_length, self.max_queue = max_rows, max_length, max_queue
        self.counts = Counts()
        self._batch = Batch(model, adapters, max_rows + 1, max_length)
        self._batch.require_rows_alone()
        self._under_way: list[Row] = []  # each in the slot of its index
        self._long: Row | None = None  # in the last slot, until all of its prompt is there
        self._waiting: deque[Row] = deque()
        self._changed = threading.Condition()  # holds _waiting, _closing, _pace and every row's gone
        self._closing = self._broken = False
        self._ended = 0  # rows
        self._pace, self._finished = 1.0, 0.0  # seconds from one answer's end to the next, about; the last one's
        self._thread: threading.Thread | None = None

    def start(self, thread: threading.Thread | None = None) -> None:
        """Begin to answer. thread: that will call `run`; None: one of its own."""
        self._thread = thread or threading.Thread(target=self.run, name=THREAD, daemon=True)
        if thread is None:
            self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive() and not self._closing

    @property
    def load(self) -> tuple[int, int]:
        """Rows under way, and requests waiting."""
        return len(self._under_way) + (self._long is not None), sum(not row.gone for row in list(self._waiting))

    def submit(self, request: Request, listener: Listener) -> Row:
        """Put a request into the queue.

        Raises:
            UnknownName, TooLong, QueueFull, Closing: as they say.
        """
        name = self.adapters.find(request.adapter)
        if name is None:
            raise UnknownName(request.adapter)
        before = self.adapters.tokens_before(name)
        if before + len(request.tokens) + request.max_tokens > self.max_length:
            own = f"{before} of the adapter's own, " if before else ""
            text = f"{own}{len(request.tokens)} tokens of the prompt and {request.max_tokens} of the answer"
            raise TooLong(f"{text} are more than the {self.max_length} that a request may have together")
        picker = Picker(request.temperature, request.top_p, request.seed)
        words = Words(self.tokenizer, request.stop)
        row = Row(request, listener, name, picker, words, time.perf_counter())
        with self._changed:
            if self._closing or self._broken:
                raise Closing("the server is ending: it takes no more requests")
            waiting = sum(not one.gone for one in self._waiting)
            if waiting >= self.max_queue:
                raise QueueFull(waiting, max(1, min(LONGEST_WAIT, round(self._pace))))
            self._waiting.append(row)
            self._changed.notify()
        return row

    def cancel(self, row: Row) -> None:
        """Nobody waits for it any more: it leaves the queue, or the batch, before the next step. Nothing, if it has ended."""
        with self._changed:
            row.gone = True
            self._changed.notify()

    def close(self, *, drain: bool = True) -> None:
        """End the thread, and wait for that. drain: answer first whoever is under way or waits; else each hears a Closing."""
        with self._changed:
            self._closing = True
            self._broken |= not drain
            self._changed.notify()
        if self._thread is not None and self._thread.is_alive():
            self._thread.join()

    def run(self) -> None:
        """Answer, in this thread, until `close`."""
        try:
            while True:
                with self._changed:
                    while not (self._waiting or self._under_way or self._long or self._closing):
                        self._changed.wait()
                    idle = not (self._waiting or self._under_way or self._long)
                if self._broken or idle:
                    return
                if not self._take_turn():
                    time.sleep(PAUSE)  # all that wait, wait for their adapters
        except Exception:
            logger.exception("the engine has ended")
        finally:
            with self._changed:
                self._broken = True
            for row in [*self._under_way, *filter(None, [self._long]), *self._waiting]:
                self._fail(row, Closing("the server is ending"))

    def _take_turn(self) -> bool:
        """Whether there was anything to do."""
        steps = self.counts.steps
        for row in [row for row in self._under_way if row.gone]:
            self._leave(row, "cancelled")
        with self._changed:
            gone = [row for row in (*self._waiting, *filter(None, [self._long])) if row.gone]
            self._waiting = deque(row for row in self._waiting if not row.gone)
        for row in gone:
            self._end(row, "cancelled")
            self._long = None if row is self._long else self._long
        if self._long is None:
            self._take_in(self._next_rows())
        if self._long is not None:
            self._take_in_a_part(self._long)
        before = self._under_way[:]
        if before:
            self._go_on(before)
        return bool(gone) or self.counts.steps > steps

    def _next_rows(self) -> list[Row]:
        """Of those that wait, in turn, as many as have room and their adapters; a row that fills a turn alone becomes the long one."""
        with self._changed:
            first = list(itertools.islice(self._waiting, self.max_rows - len(self._under_way)))
        ready = self._ready(first)
        if ready and len(ready[0].request.tokens) > CHUNK:
            self._long = ready[0]
        taken = [] if self._long is not None else _beside(ready)
        gone = {*taken, *filter(None, [self._long])}
        with self._changed:
            for row in gone:
                self._waiting.remove(row)
        for i, row in enumerate(first):
            if row.tried >= 0:
                row.passed += sum(one in gone for one in first[i + 1 :])
        return taken

    def _ready(self, rows: Sequence[Row]) -> list[Row]:
        """Of these, in turn, those whose adapters are there; none behind one that has waited long enough for room, but the base's."""
        ready, is_waited_for = [], False
        for row in rows:
            if is_waited_for and row.name != BASE:
                if row.kept:
                    self.adapters.release(row.name)
                    row.kept = False
            elif self._has_adapter(row):
                ready.append(row)
            else:
                is_waited_for |= row.tried >= 0 and row.passed >= MOST_PASSED
        return ready

    def _has_adapter(self, row: Row) -> bool:
        """Whether the adapter of a row that waits is in the model, to stay; it is sent for. A row whose adapter cannot be had hears of it."""
        if row.tried == self._ended:
            return False
        try:
            if not row.kept:
                self.adapters.keep(row.name)
                row.kept = True
            return self.adapters.is_there(row.name)
        except NoRoom:
            self.adapters.release(row.name)
            row.kept = False
            row.tried = self._ended if self.adapters.keeps_any else -1  # once another row has ended, there may be
        except Exception:  # of any kind: its files
            logger.exception("the adapter %s cannot be used", row.request.adapter)
            with self._changed:
                self._waiting.remove(row)
            self._fail(row, EngineError(f"the adapter {row.request.adapter} cannot be used"))
        return False

    def _take_in(self, rows: list[Row]) -> None:
        """New rows: their prompts, and each one's first token."""
        if not rows:
            return
        first = len(self._under_way)
        logits = self._step(first, rows, [list(row.request.tokens) for row in rows])
        if logits is not None:
            self._under_way += rows
            self._pick(rows, logits)

    def _take_in_a_part(self, row: Row) -> None:
        """The next part of a long prompt; with the last one the row joins the others."""
        before = self.adapters.tokens_before(row.name)
        first = max(row.filled - before, 0)
        logits = self._step(self.max_rows, [row], [list(row.request.tokens[first : first + CHUNK])])
        if logits is None:
            self._long = None
        elif row.filled == before + len(row.request.tokens):
            self._batch.cache.move(self.max_rows, len(self._under_way), row.filled)
            self._long = None
            self._under_way.append(row)
            self._pick([row], logits)

    def _go_on(self, rows: list[Row]) -> None:
        """The next token of all that are under way."""
        logits = self._step(0, rows, [[row.last] for row in rows])
        if logits is not None:
            self._pick(rows, logits)

    def _step(self, first: int, rows: list[Row], tokens: list[list[int]]) -> Tensor | None:
        """A step of the model; None where it has failed, which these rows have heard then."""
        begun = time.perf_counter()
        try:
            for slot, row in enumerate(rows, first):
                if not row.held:
                    self.adapters.hold(row.name)
                    row.held = True
                row.filled = row.filled or self._batch.begin(slot, row.name)
            logits = self._batch.step(first, tokens, [row.filled for row in rows], [row.name for row in rows])
        except Exception as error:  # of any kind: out of memory, an adapter that went away
            logger.exception("a step of %d rows has failed", len(rows))
            del self._under_way[first:]  # rows that are new are not there yet
            for i, row in enumerate(rows):
                self._batch.cache.clear(first + i)
                self._fail(row, EngineError(f"the model has failed: {type(error).__name__}"))
            return None
        for row, new in zip(rows, tokens, strict=True):
            row.filled += len(new)
        self.counts.steps += 1
        self.counts.step_seconds += time.perf_counter() - begun
        return logits

    def _pick(self, rows: list[Row], logits: Tensor) -> None:
        """The next token of rows under way, by what the step has found of each: [rows, V]."""
        for row, token in zip(rows, pick(logits, [row.picker for row in rows]), strict=True):
            if token is None:
                self._leave(row, None)
                self._fail(row, EngineError(f"the model's numbers for {row.request.adapter} are not finite"))
            else:
                self._add(row, token)

    def _add(self, row: Row, token: int) -> None:
        row.last, row.count = token, row.count + 1
        self.counts.answer_tokens += 1
        if row.count == 1:
            self.counts.prompt_tokens += len(row.request.tokens)
            self.counts.first_tokens += 1
            self.counts.first_token_seconds += time.perf_counter() - row.asked
        ended = token in row.request.ends
        text = "" if ended else row.words.push(token)
        finish = "stop" if ended or row.words.stopped else "length" if row.count == row.request.max_tokens else None
        if finish is not None:
            text += row.words.close()
            finish = "stop" if row.words.stopped else finish  # by what was held back
        if finish is not None:
            self._leave(row, finish)
        if not self._tell(row, Piece(text, row.count, finish)) and finish is None:
            self._leave(row, "cancelled")

    def _leave(self, row: Row, finish: str | None) -> None:
        """A row under way gives its slot to the last one. finish: None: its numbers are not finite."""
        slot, last = self._under_way.index(row), len(self._under_way) - 1
        if finish is None:
            self._batch.cache.clear(slot)
        else:
            self._end(row, finish)
        if slot != last:
            self._batch.cache.move(last, slot, self._under_way[last].filled)
            self._under_way[slot] = self._under_way[last]
        self._under_way.pop()
        now = time.perf_counter()
        with self._changed:
            self._pace += 0.2 * (min(now - self._finished, LONGEST_WAIT) - self._pace)
        self._finished = now

    def _fail(self, row: Row, error: EngineError) -> None:
        self._end(row, "failed")
        self._tell(row, error)

    def _end(self, row: Row, finish: str) -> None:
        self.counts.answers[row.request.adapter, finish] += 1
        self._ended += 1
        if row.held:
            row.held = False
            self.adapters.let_go(row.name)
        if row.kept:
            row.kept = False
            self.adapters.release(row.name)

    def _tell(self, row: Row, news: Piece | EngineError) -> bool:
        """Whether somebody has heard it."""
        if row.gone:
            return False
        try:
            row.listener(news)
        except Exception:  # a stranger's
            logger.exception("a listener has failed")
            return False
        return True


def _beside(rows: Sequence[Row]) -> list[Row]:
    """The first row, and those nearest to it in length, so that little is padding: as many as a turn may bring in."""
    lengths = {row: len(row.request.tokens) for row in rows}
    taken: list[Row] = []
    for row in sorted(rows, key=lambda row: abs(lengths[row] - lengths[rows[0]])):
        if max(lengths[one] for one in (*taken, row)) * (len(taken) + 1) > CHUNK:
            break
        taken.append(row)
    return taken
