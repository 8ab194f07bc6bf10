"""`python -m benchmarks serve`: what its clients count, on a tiny model. No time is asserted."""

from pathlib import Path

import pytest
import served

from benchmarks import serve
from benchmarks.model_steps import Material


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "TOKENS", 5)


def test_clients_of_the_engine_and_of_the_socket(tmp_path: Path) -> None:
    served.save(tmp_path)
    asked = [serve.Asked(name, [5, 6, 7]) for name in (*served.RANKS, served.BASE)]
    engine = served.load(tmp_path, max_rows=3, max_length=64)
    engine.start()
    with serve._listening(engine) as port:
        rate, texts = serve.answers(engine, asked, 2)
        assert rate > 0 and len(set(texts)) == len(asked)
        assert serve.answers(engine, asked, 1)[1] == texts
        assert serve.streams(port, asked, 3) > 0
        with pytest.raises(RuntimeError, match="the server answered b'HTTP/1.1 404"):
            serve.streams(port, [serve.Asked("yellow", [5])], 1)
    assert not engine.is_alive
    assert engine.counts.answer_tokens == 3 * len(asked) * 5


def test_the_lines_and_what_is_asked() -> None:
    assert list(serve.serve_lines(Material())) == ["the engine", "the socket"]
    asked = serve._asked(40)
    assert asked[:8] == serve._asked(8) and len({one.adapter for one in asked}) == serve.ADAPTERS
    low, high = serve.PROMPT
    assert all(low <= len(one.tokens) <= high for one in asked)
    speed, rate = serve._goals("the engine", 10.0, 70.0)
    assert speed.ours == 7 and speed.is_met() and rate.goal is None and rate.rivals == {"one client": 10.0}
