"""serving/engine.py: every answer is that of its request alone, whoever joins and leaves, and nobody waits for rows that nobody wants."""

import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import served
import tiny
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
)

import fastlora
from fastlora.models import load_model
from fastlora.serving import batch
from fastlora.serving import engine as engines
from fastlora.serving.adapters import Adapters
from fastlora.serving.batch import Batch
from fastlora.serving.engine import Closing, Engine, EngineError, Piece, QueueFull, Request, TooLong, UnknownName
from fastlora.serving.picking import Picker
from fastlora.serving.words import Words


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("served")
    served.save(found)
    return found


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    with served.running(served.load(folder, max_rows=6, max_length=200, max_queue=100)) as found:
        yield found


def generated(model: Any, tokenizer: Any, request: Request, inner: dict[str, str]) -> str:
    """What transformers generates for the request alone, with its adapter active."""
    ids = torch.tensor([list(request.tokens)])
    options = {"max_new_tokens": request.max_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    without = model.disable_adapter() if inner and request.adapter == served.BASE else nullcontext()
    if request.adapter in inner:
        model.set_adapter(inner[request.adapter])
    with without:
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    words = Words(tokenizer, ())
    return "".join(map(words.push, out[0, ids.shape[1] :].tolist())) + words.close()


def test_each_answer_is_that_of_its_request_alone(
    engine: Engine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside others of other lengths and adapters, which come and go meanwhile; a prompt of several turns among them; and as transformers has it."""
    monkeypatch.setattr(engines, "CHUNK", 64)
    asked = served.requests(40)
    assert max(len(one.tokens) for one in asked) > 64
    mixed = served.answers(engine, asked)
    assert mixed == [served.answers(engine, [one])[0] for one in asked]
    assert len({text for text, _ in mixed}) > 30 and {finish for _, finish in mixed} == {"length"}
    with tiny.on_cpu():
        peer, tokenizer = load_model(
            str(folder / served.BASE), {name: folder / "adapters" / name for name in served.RANKS}, accelerate=False
        )
    inner = {name: name for name in served.RANKS}
    assert [text for text, _ in mixed] == [generated(peer, tokenizer, one, inner) for one in asked]


def test_answers_are_drawn_alike_by_their_seeds(engine: Engine) -> None:
    asked = [request for seed in (1, 2) for request in served.requests(6, 3, temperature=0.9, top_p=0.8, seed=seed)]
    mixed = served.answers(engine, asked)
    assert mixed == [served.answers(engine, [one])[0] for one in asked]
    assert mixed[:6] != mixed[6:]


def test_a_stop_string_ends_it_and_is_no_part_of_it(engine: Engine) -> None:
    request = Request([7, 8, 9], "red", 30)
    ((whole, _),) = served.answers(engine, [request])
    heard = served.Heard()
    engine.submit(Request([7, 8, 9], "red", 30, stop=(whole[4:7],)), heard)
    text, finish = heard.answer()
    assert text == whole[: whole.index(whole[4:7])] and finish == "stop"


def test_the_end_token_ends_it_and_is_no_text(engine: Engine) -> None:
    heard = served.Heard()
    engine.submit(Request([7, 8, 9], "blue", 30, ends=frozenset(range(10_000))), heard)
    assert heard.news.get(timeout=60) == Piece("", 1, "stop")


def test_who_goes_away_frees_the_row(engine: Engine) -> None:
    """A row under way, one that waits, and one whose long prompt is only half there; the others' answers are as ever."""
    others = served.requests(8, 5)
    alone = [served.answers(engine, [one])[0] for one in others]
    before = engine.counts.answers["green", "cancelled"]
    begun = threading.Event()
    tells = [served.Heard() for _ in others]
    rows = [engine.submit(Request([5] * 4, "green", 190), lambda _: begun.set()) for _ in range(3)]
    for request, heard in zip(others, tells, strict=True):
        engine.submit(request, heard)
    waiting = engine.submit(Request([5] * 4, "green", 190), lambda _: pytest.fail("it was cancelled"))
    engine.cancel(waiting)
    assert begun.wait(60)
    for row in rows:
        engine.cancel(row)
    assert [heard.answer() for heard in tells] == alone
    ((text, _),) = served.answers(engine, [Request([9], "red", 2)])
    assert text and engine.load == (0, 0)
    assert engine.counts.answers["green", "cancelled"] == before + 4


def test_what_is_refused(folder: Path) -> None:
    engine = served.load(folder, max_rows=1, max_length=32, max_queue=2)
    request = Request([5] * 8, "red", 8)
    for _ in range(2):
        engine.submit(request, lambda _: None)
    with pytest.raises(QueueFull, match="2 requests are waiting already: try again in 1 s"):
        engine.submit(request, lambda _: None)
    with pytest.raises(TooLong, match="30 tokens of the prompt and 3 of the answer are more than the 32"):
        engine.submit(Request([5] * 30, "red", 3), lambda _: None)
    with pytest.raises(UnknownName, match="../red"):
        engine.submit(Request([5], "../red", 3), lambda _: None)
    with pytest.raises(ValueError, match="tokens=0: expected an integer, at least 1"):
        Request([], "red", 3)
    with pytest.raises(ValueError, match="max_tokens=0"):
        Request([5], "red", 0)
    engine.close(drain=False)
    with pytest.raises(Closing):
        engine.submit(request, lambda _: None)


def test_closing_answers_first_who_is_there(folder: Path) -> None:
    engine = served.load(folder, max_rows=2, max_length=64, max_queue=10)
    heard = [served.Heard() for _ in range(5)]
    for one in heard:
        engine.submit(Request([5, 6], "red", 20), one)
    engine.start()
    assert engine.is_alive
    engine.close()
    assert not engine.is_alive
    assert len({one.answer() for one in heard}) == 1


def test_closing_at_once_tells_everybody(folder: Path) -> None:
    engine = served.load(folder, max_rows=2, max_length=200, max_queue=10)
    begun, heard = threading.Event(), served.Heard()
    with served.running(engine):
        engine.submit(Request([5, 6], "red", 190), lambda _: begun.set())
        for _ in range(3):
            engine.submit(Request([5, 6], "red", 190), heard)
        assert begun.wait(60)
    with pytest.raises(Closing):
        while True:
            heard.answer()


def test_a_step_that_fails_takes_its_rows_and_no_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = served.load(folder, max_rows=4, max_length=100)
    with served.running(engine):
        request = Request([5, 6, 7], "blue", 12)
        alone = served.answers(engine, [request])
        step = Batch.step

        def failing(self: Batch, first: int, tokens: Any, starts: Any, names: Any) -> torch.Tensor:
            if "green" in names:
                raise RuntimeError("out of memory, on purpose")
            found = step(self, first, tokens, starts, names).clone()
            for i, name in enumerate(names):
                if name == "red":  # and what it leaves is not finite
                    found[i] = float("nan")
                    with torch.inference_mode():
                        for part in self.cache._parts():
                            part[first + i, :, :9] = float("nan")
            return found

        monkeypatch.setattr(Batch, "step", failing)
        heard = served.Heard()
        engine.submit(Request([5, 6, 7], "green", 12), heard)
        with pytest.raises(EngineError, match="the model has failed: RuntimeError"):
            heard.answer()
        engine.submit(Request([5, 6, 7], "red", 12), heard)
        with pytest.raises(EngineError, match="numbers for red are not finite"):
            heard.answer()
        assert served.answers(engine, [request] * 4) == alone * 4
        assert engine.counts.answers["green", "failed"] == engine.counts.answers["red", "failed"] == 1


def test_a_listener_that_fails_is_a_client_that_went_away(engine: Engine) -> None:
    called: list[Piece | EngineError] = []

    def fails(news: Piece | EngineError) -> None:
        called.append(news)
        raise RuntimeError("its loop is closed")

    engine.submit(Request([5], "green", 50), fails)
    ((text, _),) = served.answers(engine, [Request([5], "red", 5)])
    assert text and len(called) == 1


SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
KINDS = ["sliding_attention", "full_attention"]
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "a window in every layer": lambda: MistralConfig(**SIZES, sliding_window=4),
    "a window in every second": lambda: Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=4, layer_types=KINDS),
    "learned positions": lambda: GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=64),
}


@pytest.mark.parametrize("name", MODELS)
def test_bases_of_other_kinds(name: str) -> None:
    """Without adapters: what its own generate gives, beyond the window."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[name](), dtype=torch.float32).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    tokenizer = tiny.tokenizer()
    asked = [
        replace(one, tokens=[token % 40 for token in one.tokens][:20], adapter="base") for one in served.requests(8)
    ]
    with served.running(Engine(model, tokenizer, Adapters("base", {}), max_rows=4, max_length=64)) as engine:
        found = [text for text, _ in served.answers(engine, asked)]
    assert found == [generated(model, tokenizer, one, {}) for one in asked]


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (BloomConfig(vocab_size=40, hidden_size=32, n_layer=2, n_head=4), "bloom cannot be served in batches"),
        (
            MambaConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2),
            "mamba has layers of linear_attention, expected",
        ),
    ],
)
def test_a_model_whose_rows_cannot_join_is_refused(config: Any, problem: str) -> None:
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with pytest.raises(ValueError, match=problem):
        Engine(model, tiny.tokenizer(), Adapters("base", {}), max_rows=4, max_length=64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_deep_model_in_16_bits_is_served(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows differ from each alone by more than a rounding, as they do by the model's own cache; not by what another row's tokens would make."""
    torch.manual_seed(0)
    deep = LlamaConfig(**{**SIZES, "num_hidden_layers": 30})
    model = AutoModelForCausalLM.from_config(deep, dtype=dtype).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    fastlora.accelerate(model, frozen=True, fuse=True)
    if dtype is torch.bfloat16:
        with monkeypatch.context() as patch, pytest.raises(ValueError, match="other logits than alone"):
            patch.setattr(batch, "MOST_NOISE", 0.0)
            Batch(model, Adapters("base", {}), 4, 64).require_rows_alone()
    Batch(model, Adapters("base", {}), 4, 64).require_rows_alone()
    step = Batch.step
    monkeypatch.setattr(Batch, "step", lambda self, *given: step(self, *given).flip(0))
    with pytest.raises(ValueError, match="other logits than alone"):
        Batch(model, Adapters("base", {}), 4, 64).require_rows_alone()


def test_bad_options_are_named(engine: Engine) -> None:
    for options, problem in (
        ({"max_rows": 0}, "max_rows=0"),
        ({"max_length": 7}, "max_length=7: expected an integer, at least 8"),
        ({"max_queue": 0}, "max_queue=0"),
    ):
        with pytest.raises(ValueError, match=problem):
            Engine(engine.model, engine.tokenizer, engine.adapters, **options)


def test_new_rows_of_like_lengths_join_together(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that waits longest is among them; padding counts, and no turn takes more than a chunk."""
    rows = [
        engines.Row(Request([5] * n, "red", 1), print, "red", Picker(0, 1, 0), Words(engine.tokenizer, ()), 0.0)
        for n in (30, 90, 28, 2, 29, 33)
    ]
    for chunk, expected in ((30, [30]), (90, [30, 29, 28]), (600, [30, 29, 28, 33, 2, 90]), (119, [30, 29, 28])):
        monkeypatch.setattr(engines, "CHUNK", chunk)
        assert [len(row.request.tokens) for row in engines._beside(rows)] == expected
