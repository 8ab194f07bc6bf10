"""The benchmark of what a Trainer user gains: its ways train on the same rows, and a loss that differs is not timed."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from process_here import Here

from benchmarks import model_steps, plot, session, trainer
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


def test_every_way_packs_the_same_rows(setting: trainer.Setting) -> None:
    """Of mixed lengths, two at once where they are padded."""
    pytest.importorskip("trl", reason="no TRL on this machine")
    rows = [{"prompt": "one" * (i + 1), "completion": f" two {i}"} for i in range(4)]
    mixed = replace(setting, rows=rows, batch=2, held_out=rows[:1])
    runs = {way: trainer.run(mixed, way) for way in trainer.PACKING}
    for way, one in runs.items():
        assert len(one.seconds) == len(one.losses) == 2 and one.tokens == runs["trainer"].tokens, way
        assert one.losses[0] == pytest.approx(runs["trainer"].losses[0], rel=1e-4), way
        assert one.held_out == pytest.approx(runs["trainer"].held_out, rel=1e-3), way


def test_a_loss_that_differs_is_not_timed(setting: trainer.Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = dict.fromkeys(trainer.WAYS, 1.0) | {"loss": 1.01}
    monkeypatch.setattr(trainer, "own_process", Here)
    monkeypatch.setattr(trainer, "run", lambda _, way: trainer.Run([9.0, 1.0, 1.0], [losses[way]], 20, 10))
    with pytest.raises(StepError, match=r"the first loss of .*loss=True.* is 1.01, of Trainer \+ PEFT 1: not timed"):
        trainer.measure(setting, 1)


def test_the_table_is_of_medians_without_the_first_step(
    setting: trainer.Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {"trainer": 4.0, "compiled": 3.0, "accelerate": 2.0, "loss": 2.0, "fuse": 1.0, "train": 1.0, "full": 3.0}
    monkeypatch.setattr(trainer, "own_process", Here)
    monkeypatch.setattr(trainer, "run", lambda _, way: trainer.Run([99.0, seconds[way]], [3.0, 2.5], 20, 2 * 10**9))
    found = trainer.measure(setting, 3)
    assert [one["ratio"] for one in found] == [1, 0.75, 0.5, 0.5, 0.25, 0.25, 0.75]
    assert (
        trainer.table(found).splitlines()[-2]
        == "| `fastlora train` in their place | 1.0 | 0.25 × | 20 | 2.0 GB | 1.00 × | 3.000, 2.500 |"
    )
    packed = [one | {"held_out": 2.25} for one in found[:4]]
    assert trainer.table(packed, tuple(trainer.PACKING)).splitlines()[-1].endswith(" 3.000, 2.500 | 2.2500 |")
    pytest.importorskip("matplotlib", reason="no matplotlib on this machine")
    step, memory = plot.charts({"operator": "trainer", "ways": found})
    assert step[1:3] == ("seconds", {one["name"]: one["seconds"] for one in found}) and memory[1] == "GB"


def test_the_goals_of_a_step_name_its_parts() -> None:
    ratios = {"trainer": 1.0, "compiled": 0.9, "accelerate": 0.8, "loss": 0.6, "fuse": 0.3, "train": 0.2, "full": 0.5}
    found = {
        way: {"seconds": 10 * ratio, "ratio": ratio, "tokens_per_second": 100 / ratio, "memory_ratio": ratio + 0.2}
        for way, ratio in ratios.items()
    }
    rows = {row.what: row for row in model_steps.goals_of("tiny", "bfloat16", found)}
    first, *_, last = rows.values()
    assert (first.ours, first.peft, first.unit) == (500, 100, "tokens/s")
    assert first.rivals == pytest.approx({"peft compiled": 100 / 0.9, "full": 200})
    assert last.ours == pytest.approx(0.6) and last.peft == 2 and last.is_met() is (last.ours <= 0.6)
    speed = rows["fastlora train: times Trainer + PEFT's speed, bfloat16"]
    assert speed.ours == 5 and speed.goal == 4 and speed.is_met()
    memory = rows["fastlora train: part of Trainer + PEFT's peak memory, bfloat16"]
    assert memory.ours == pytest.approx(0.4) and memory.is_met()
    assert rows["accelerate(model): part of Trainer + PEFT's time, bfloat16"].ours == 0.8


def test_a_step_of_random_weights_needs_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "vocab_size": 1536,
        "num_attention_heads": 2,
    }
    monkeypatch.setitem(model_steps.SIZES, model_steps.NARROW, small)
    monkeypatch.setattr(trainer, "own_process", Here)
    batch = model_steps.Material().batch()
    assert len(batch) == 8 and batch[1]["prompt"].count("Summary:") == 2
    monkeypatch.setattr(trainer, "run", lambda setting, way: trainer.Run([9.0, 1.0], [len(setting.rows)], 20, 10))
    monkeypatch.setattr(model_steps, "WAYS", {"trainer": "", "fuse": "", "train": "", "full": ""})
    lines = model_steps.step_lines(model_steps.Material())
    rows = list(lines["whole step, SmolLM2-135M's shape, float32"](session.Session(torch.device("cpu"))))
    assert [row.ours for row in rows] == [20, 1, 1, 1, 1, 1] and not any(row.is_met() for row in rows[1::2])
