"""`python -m benchmarks model`: its arithmetic by hand, and that a longer kernel is a slower one."""

from dataclasses import replace

import pytest

from fastlora.benchmarks import model
from fastlora.benchmarks.session import Session


def test_cycles_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "COUNTS", model.Counts(epilogue=500, masked=100))
    # A rank step of 16 is a quarter of 64; eight warps on four schedulers issue 500 instructions in 1,000 cycles.
    assert model.forward_cycles(16) == 256 + 150 + 1000
    assert model.forward_cycles(17) == 512 + 150 + 1000
    assert model.backward_cycles(16, dropout=True) == 4 * (64 + 150) + 2 * (4 * 100 + 500)
    assert model.backward_cycles(16, dropout=False) == model.forward_cycles(16)


def test_percent_of_a_tile() -> None:
    """Of K 4096 the products take 64 times 1,024 cycles, however many tiles there are; a thin one a 256th of that, on three tensor cores of four."""
    forward, _, _ = model.layer(8192, 4096, 4096, 16)
    assert forward == pytest.approx(100 * (model.forward_cycles(16) / 65536 + 16 / 4096 * 4 / 3))
    assert model.layer(1024, 4096, 4096, 16)[0] == pytest.approx(forward)


def test_thin_products_count_where_they_take_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    before = model.layer(8192, 4096, 1024, 16)
    monkeypatch.setattr(model, "MEMORY", model.MEMORY / 100)
    assert model.layer(8192, 4096, 1024, 16)[1] > before[1] + 100


def test_thin_products_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of 32 rows and 96 of the depth, and one of 16 rows and 48 columns, each on one multiprocessor of 132, two cycles an instruction."""
    monkeypatch.setattr(model, "COUNTS", model.Counts(shrink_64=500, gradient_64=300))
    cycles = (1000 + 3 * 150) * 10 * 256 + 2 * 600 * 20 * 512  # of dy b; of dB and dA
    seconds = model.side_seconds(8192, 960, 960, 64, True, True)
    assert seconds == pytest.approx(cycles / (132 * 1.755e9))
    assert model.side_seconds(8192, 960, 960, 33, True, True) == seconds
    beyond = model.side_seconds(8192, 960, 960, 65, True, True)
    assert beyond == pytest.approx(2 * seconds)


def test_the_table_has_every_goal_and_says_that_it_is_reckoned(monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> list[model.Share]:
        return [row for line in model.model_lines().values() for row in line(Session(None))]  # type: ignore[arg-type]

    first = found()
    text = model.model_table(first, [])
    assert "not measured" in text and all(what in text for what in model.CASES)
    monkeypatch.setattr(model, "COUNTS", replace(model.COUNTS, epilogue=2000))
    assert all(after.both > before.both + 1 for before, after in zip(first, found(), strict=True))
