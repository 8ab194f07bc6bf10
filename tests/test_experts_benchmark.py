"""benchmarks.experts: rows of both models, and no time where the losses differ."""

from typing import Any

import pytest
from process_here import Here

import fastlora
from benchmarks import experts
from benchmarks.experts import Row, Setting

TINY = Setting(hidden=16, inner=8, layers=1, experts=3, vocabulary=32, batch=2, tokens=5, r=2)


def test_each_model_has_a_row(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "own_process", Here)
    experts.main(["--dtype", "float32", "--seconds", "0.01"], TINY)
    printed = capsys.readouterr().out
    assert "goals: 2.0 times PEFT's speed" in printed
    for name in experts.MODELS:
        (line,) = [line for line in printed.splitlines() if line.startswith(f"{name}, float32  ")]
        assert line.count(" ms") == 3


def test_what_is_told_of_memory() -> None:
    table = experts.shown(
        [Row("a", 0.1, 0.3, 0.15, 2.0, 1.5, 4 << 20, 1 << 20), Row("b", 0.1, 0.3, 0.15, 2.0, 1.5, None, None)]
    )
    _, first, second = (line.split() for line in table.splitlines())
    assert first == "a 100.0 ms 300.0 ms 150.0 ms 2.00 1.50 4.0 MiB 1.0 MiB 0.25".split()
    assert second == "b 100.0 ms 300.0 ms 150.0 ms 2.00 1.50".split()


def test_a_loss_that_differs_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(model: Any, **_: bool) -> Any:
        model.get_output_embeddings().weight.data.mul_(2)
        return model

    monkeypatch.setattr(fastlora, "accelerate", spoil)
    with pytest.raises(RuntimeError, match="mixtral, float32: the first loss of fastlora is"):
        experts.measure("mixtral", "float32", TINY, 0.01)
