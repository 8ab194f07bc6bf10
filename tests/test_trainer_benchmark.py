"""The benchmark of what a Trainer user gains: its ways train on the same rows, and a loss that differs is not timed."""

from pathlib import Path
from typing import Any

import pytest
import tiny

from benchmarks import plot, trainer
from benchmarks.step import StepError


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> trainer.Setting:
    folder = tmp_path_factory.mktemp("tiny")
    base = tiny.save_model(folder / "model")
    rows = [{"prompt": f"one {i}", "completion": f" two {i}"} for i in range(4)]
    return trainer.Setting(str(base), rows, 2, "float32")


def test_every_way_trains_on_the_same_rows(setting: trainer.Setting) -> None:
    runs = {way: trainer.run(setting, way) for way in trainer.WAYS}
    for way, one in runs.items():
        assert len(one.seconds) == len(one.losses) == 2 and all(seconds > 0 for seconds in one.seconds), way
        assert one.losses[0] == pytest.approx(runs["trainer"].losses[0], rel=1e-4), way


class Here:
    """In the place of a process."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> "Here":
        return self

    def __exit__(self, *_: object) -> None: ...

    def submit(self, function: Any, *args: Any) -> "Here":
        self.found = function(*args)
        return self

    def result(self) -> trainer.Run:
        return self.found


def test_a_loss_that_differs_is_not_timed(setting: trainer.Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = dict.fromkeys(trainer.WAYS, 1.0) | {"loss": 1.01}
    monkeypatch.setattr(trainer, "own_process", Here)
    monkeypatch.setattr(trainer, "run", lambda _, way: trainer.Run([9.0, 1.0, 1.0], [losses[way]], 20, 10))
    with pytest.raises(StepError, match=r"the first loss of .*loss=True.* is 1.01, of Trainer \+ PEFT 1: not timed"):
        trainer.measure(setting, 1)


def test_the_table_is_of_medians_without_the_first_step(
    setting: trainer.Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {"trainer": 4.0, "accelerate": 2.0, "loss": 2.0, "fuse": 1.0, "train": 1.0, "full": 3.0}
    monkeypatch.setattr(trainer, "own_process", Here)
    monkeypatch.setattr(trainer, "run", lambda _, way: trainer.Run([99.0, seconds[way]], [3.0, 2.5], 20, 2 * 10**9))
    found = trainer.measure(setting, 3)
    assert [one["ratio"] for one in found] == [1, 0.5, 0.5, 0.25, 0.25, 0.75]
    assert (
        trainer.table(found).splitlines()[-2]
        == "| `fastlora train` in their place | 1.0 | 0.25 × | 20 | 2.0 GB | 1.00 × | 3.000, 2.500 |"
    )
    pytest.importorskip("matplotlib", reason="no matplotlib on this machine")
    step, memory = plot.charts({"operator": "trainer", "ways": found})
    assert step[1:3] == ("seconds", {one["name"]: one["seconds"] for one in found}) and memory[1] == "GB"
