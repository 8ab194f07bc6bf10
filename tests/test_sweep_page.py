"""sweep.html: one page without an address, with the heat map, the curves and the recommended job."""

import re
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from typer.testing import CliRunner

from fastlora import cli, drawing
from fastlora.config import TrainConfig
from fastlora.sweep import page
from fastlora.sweep.outcome import Outcome, best, rows


def outcome(r: int, lr: float, loss: float | None, **more: Any) -> Outcome:
    config = TrainConfig(
        model="m", data="d.jsonl", output="o", r=r, lora_alpha=2 * r, lr=lr, lora_dropout=0.0, target_modules=["q", "v"]
    )
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()}
    name = f"r{r}-lr{lr:g}"
    values: dict[str, Any] = {
        "name": name,
        "status": "done",
        "reason": "",
        "steps": 4,
        "all_steps": 4,
        "loss": loss,
        "train_loss": 1.5,
    }
    values |= {
        "evaluations": [] if loss is None else [(2, loss + 1), (4, loss)],
        "tokens": 100,
        "trainable_parameters": 10 * r,
    }
    values |= {"r": r, "lr": lr, "config": plain | {"eval_data": "e & f.jsonl"}, "output": f"o/jobs/{name}"}
    return Outcome(**values | more)


OUTCOMES = [
    outcome(4, 1e-3, 2.0),
    outcome(4, 1e-2, None, status="diverged", reason="step 2: the loss is nan", steps=1),
    outcome(8, 1e-3, 1.25),
    outcome(8, 1e-2, 3.0, status="halved", reason="step 2: place 3 of 3", steps=2),
]
RECORDS = {one.name: [{"step": step, "loss": 3.0 / step} for step in range(1, one.steps + 1)] for one in OUTCOMES}


def shapes(text: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(found) for found in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]


def test_the_page_is_whole_and_alone():
    text = page.html(OUTCOMES, best(OUTCOMES), RECORDS, 12.3)
    assert "://" not in text and "<script" not in text and "src=" not in text and "href=" not in text
    assert "e &amp; f.jsonl" in text and "e & f" not in text
    assert "Recommended: <b>r8-lr0.001</b>, with a held-out loss of <b>1.2500</b>" in text
    heat, training, held_out = shapes(text)
    cells = heat.findall("rect")
    assert len(cells) == 4 and [cell.get("stroke") for cell in cells].count(drawing.BEST) == 1
    words = [one.text for one in heat.findall("text")]
    assert {"r 4", "r 8", "lr 0.001", "lr 0.01", "1.2500", "diverged", "step 2 of 4"} <= set(words)
    fills = {cell.find("title").text.split(":")[0]: cell.get("fill") for cell in cells}
    assert fills["r8-lr0.001"] == "#0b3d91" and fills["r8-lr0.01"] == "#e8f0fe" and fills["r4-lr0.01"] == "#f1f3f4"
    assert len(training.findall("polyline")) == 4 and len(held_out.findall("polyline")) == 3
    assert training.findall("polyline")[-1].get("stroke") == drawing.BEST  # over the others
    assert text.count('<tr class="best">') == 1 and "step 2: the loss is nan" in text


def test_points_stay_within_the_plot():
    for svg in shapes(page.html(OUTCOMES, best(OUTCOMES), RECORDS, 1.0))[1:]:
        for line in svg.findall("polyline"):
            for point in line.get("points").split():
                x, y = map(float, point.split(","))
                assert drawing.LEFT <= x <= drawing.WIDTH and 0 <= y <= drawing.HEIGHT - drawing.BELOW


def test_one_cell_has_no_heat_map_and_no_best_no_recommendation():
    lost = outcome(4, 1e-3, None, status="diverged", steps=0)
    text = page.html([lost], best([lost]), {lost.name: []}, 1.0)
    assert "Rank and learning rate" not in text and "No job has a held-out loss" in text and shapes(text) == []


def test_the_best_of_two_is_by_its_held_out_rows():
    other = outcome(2, 1e-3, 9.0, config={**OUTCOMES[0].config, "eval_data": "other.jsonl"})
    found = best([*OUTCOMES, other])
    assert {data: one.name for data, one in found.items()} == {"e & f.jsonl": "r8-lr0.001", "other.jsonl": "r2-lr0.001"}
    assert page.html([*OUTCOMES, other], found, {**RECORDS, other.name: []}, 1.0).count("Recommended") == 2


def test_the_command_trains_the_job_alone(monkeypatch):
    words = shlex.split(page.command(OUTCOMES[2]))
    assert words[:2] == ["fastlora", "train"] and words[-2:] == ["--output", "OUTPUT"]
    taken: list[TrainConfig] = []

    def take(config: TrainConfig) -> None:
        taken.append(config)
        raise ValueError("taken")

    monkeypatch.setattr("fastlora.train.train", take)
    ran = CliRunner().invoke(cli.app, [*words[1:-1], "o"])
    assert "fastlora train: taken" in ran.output
    expected = {**OUTCOMES[2].config, "eval_data": None}  # which the sweep measured on, and not in training
    assert {
        name: str(value) if isinstance(value, Path) else value for name, value in asdict(taken[0]).items()
    } == expected


def test_rows_tell_the_best_by_a_star():
    found = rows(OUTCOMES, best(OUTCOMES))
    assert [row["job"] for row in found] == ["r4-lr0.001", "r4-lr0.01", "r8-lr0.001 *", "r8-lr0.01"]
    assert found[1]["held-out loss"] == "-" and found[3]["steps"] == "2 of 4" and found[3]["ended"] == "halved"
