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


def test_percent_of_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of K 4096 the products take 64 times 1,024 cycles, however many tiles there are."""
    monkeypatch.setattr(model, "side_seconds", lambda *_: 0.0)
    monkeypatch.setattr(model, "ROUND", (0.0, 0.0))
    forward, _, _ = model.layer(8192, 4096, 4096, 16)
    assert forward == pytest.approx(100 * (model.forward_cycles(16) / 65536 + model.BEHIND))
    assert model.layer(1024, 4096, 4096, 16)[0] == pytest.approx(forward)


def test_thin_products_count_where_the_product_is_short() -> None:
    wide, narrow = (model.layer(8192, 4096, N, 16)[0] for N in (14336, 1024))
    assert narrow > wide + 20


def test_thin_products_by_hand() -> None:
    """x [1000, 4000] and dy [1000, 2000]: 8 and 4 MB, each read once, dy once more from the cache; of 65 ranks all of it twice."""
    assert model.side_seconds(1000, 4000, 2000, 16, False, False) == pytest.approx(8e6 / 2.6e12)
    assert model.side_seconds(1000, 4000, 2000, 16, False, True) == pytest.approx(8e6 / 2.6e12 + 4e6 * model.DRAW)
    backward = 4e6 / 1.0e12 + 4e6 / 1.4e12 + 8e6 / 1.6e12
    assert model.side_seconds(1000, 4000, 2000, 64, True, True) == pytest.approx(backward)
    assert model.side_seconds(1000, 4000, 2000, 65, True, True) == pytest.approx(2 * backward)


def test_what_the_first_card_took_is_reckoned() -> None:
    """A layer of 4096² on the H200, kernel by kernel: 369 and 363 us beside cuBLAS's 339 and 337, 46 and 76 us in thin products and sums."""
    forward, backward, _ = model.layer(8192, 4096, 4096, 16)
    assert forward == pytest.approx(100 * ((369 + 46) / 339 - 1), abs=3)
    assert backward == pytest.approx(100 * ((363 + 76) / 337 - 1), abs=3)


def test_the_table_has_every_goal_and_says_that_it_is_reckoned(monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> list[model.Share]:
        return [row for line in model.model_lines().values() for row in line(Session(None))]  # type: ignore[arg-type]

    first = found()
    text = model.model_table(first, [])
    assert "not measured" in text and all(what in text for what in model.CASES)
    monkeypatch.setattr(model, "COUNTS", replace(model.COUNTS, epilogue=2000))
    assert all(after.both > before.both + 1 for before, after in zip(first, found(), strict=True))
