"""`python -m benchmarks trainers`: every trainer trains a model the same with fastlora as without, and a difference would be seen."""

from dataclasses import replace

import pytest
import tiny

from fastlora.benchmarks import trainers
from fastlora.benchmarks.trainers import BOUNDS, MODELS, TRAINERS, Cell, cells, compare, is_installed

pytestmark = pytest.mark.filterwarnings("ignore")


def require(trainer: str) -> None:
    if not is_installed(trainer):
        pytest.skip(f"{trainer}'s package is not installed")


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_every_trainer_trains_the_same(trainer: str, dtype: str) -> None:
    require(trainer)
    with tiny.on_cpu():
        cell = compare(trainer, "llama", dtype)
    assert cell.equal, cell


@pytest.mark.parametrize("model", [model for model in MODELS if model != "llama"])
def test_every_model_trains_the_same(model: str) -> None:
    with tiny.on_cpu():
        cell = compare("accelerate", model, "float32")
    assert cell.equal, cell


def test_a_difference_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer that trains the accelerated model on other rows."""

    def otherwise(model, tokenizer, dtype, folder, accelerated):
        if accelerated:
            monkeypatch.setattr(trainers, "RATE", 2 * trainers.RATE)
        return TRAINERS["accelerate"](model, tokenizer, dtype, folder, accelerated)

    monkeypatch.setitem(TRAINERS, "Trainer", otherwise)
    assert not compare("Trainer", "llama", "float32").equal


def test_a_cell_is_equal_in_all_or_not() -> None:
    good = Cell("Trainer", "llama", "float32", 1e-7, 1e-6, 14, 14, True)
    assert good.equal
    bad = ({"loss": 1e-3}, {"loss": float("nan")}, {"adapter": 0.1}, {"fused": 13}, {"files_agree": False})
    assert not any(replace(good, **one).equal for one in bad)
    assert not replace(good, fused=0, layers=0).equal


def test_every_cell_is_in_the_table() -> None:
    found = [Cell(*cell, 0.0, 0.0, 1, 1, True) for cell in cells()]
    assert len(found) == 2 * (len(TRAINERS) * len(MODELS) - 3)
    assert f"{len(found)} of {len(found)} cells are equal" in trainers.trainers_table(found, [])
    assert len(trainers.trainer_lines(quick=True)) == sum(map(is_installed, TRAINERS))
