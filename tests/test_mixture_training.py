"""A training on several tasks: each step's rows and losses by task, rehearsal, and a resumed run's same bits."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from training import (  # noqa: F401  (fixtures)
    a_base,
    adapter,
    assert_same_bits,
    interrupt_at,
    numbers,
    on_cpu,
    one_thread,
    records,
    train_on_two_processes,
)
from typer.testing import CliRunner

from fastlora import training_data
from fastlora.cli import app
from fastlora.config import TrainConfig
from fastlora.models import load_tokenizer
from fastlora.train import TrainingInterrupted, train

ACTED = [{"animal": one, "act": act} for one in tiny.ANIMALS for act in tiny.ACTS]
TASK = """
name: acts
data: acts.jsonl
templates:
  - {name: what, input: "What does the {animal} do?", target: "It {act}."}
  - {name: does, input: "The {animal}?", target: "It {act}."}
inverted:
  - {name: who, input: "Who {act}?", target: "The {animal}."}
few_shot_share: 0.5
inverted_share: 0.25
shots: [1, 2]
example_separator: "\\n"
"""


@pytest.fixture(name="folder", scope="module")
def some_tasks(tmp_path_factory: Any) -> Path:
    """A task of 40 rows, two files of prompts and completions, of 24 and 6, and a mixture of all."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "acts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ACTED))
    (folder / "acts.yaml").write_text(TASK)
    tiny.save_data(folder / "plain.jsonl", 24)
    tiny.save_data(folder / "few.jsonl", 6, seed=1)
    (folder / "mixture.yaml").write_text(
        "mixing: fixed\ntasks:\n- {task: acts.yaml, weight: 2}\n- {task: plain.jsonl, weight: 1}\n- {task: few.jsonl, weight: 1}\n"
    )
    return folder


@pytest.fixture(name="config")
def a_mixture(base: Path, folder: Path, tmp_path: Path) -> TrainConfig:
    common: dict[str, Any] = {"r": 4, "lora_alpha": 8, "lr": 1e-2, "max_steps": 12, "save_steps": 4}
    return TrainConfig(model=base, mixture=folder / "mixture.yaml", output=tmp_path / "out", **common)


def test_each_step_says_what_each_task_had_of_it(config):
    result = train(config, progress=False)
    for record in records(config.output):
        assert {name: one["rows"] for name, one in record["tasks"].items()} == {"acts": 4, "plain": 2, "few": 2}
    tasks = json.loads((config.output / "summary.json").read_text())["tasks"]
    assert tasks == result.tasks and {name: one["rows"] for name, one in tasks.items()} == {
        "acts": 48,
        "plain": 24,
        "few": 24,
    }
    first, last = records(config.output)[0]["tasks"], records(config.output)[-1]["tasks"]
    assert all(last[name]["loss"] < 0.9 * first[name]["loss"] for name in first)
    assert tasks["acts"]["loss"] == pytest.approx(
        sum(one["tasks"]["acts"]["loss"] for one in records(config.output)[-10:]) / 10
    )


@pytest.mark.parametrize(
    "options", [{}, {"method": "full", "lr": 1e-3}, {"target_modules": ["q_proj", "lm_head"]}], ids=str
)
def test_tasks_losses_are_the_steps_loss_by_parts_and_change_no_bit(
    config, base, folder, tmp_path, options, monkeypatch
):
    """With a frozen head, a trained one, and one with an adapter; in batches of several."""
    config = replace(config, max_steps=3, batch_size=3, gradient_accumulation_steps=2, **options)
    train(config, progress=False)
    data = training_data.read(config, load_tokenizer(str(base)))
    for record in records(config.output):
        rows = [data.rows[i] for i in data.order.draws(6 * (record["step"] - 1), 6 * record["step"])]
        labelled: Counter[str] = Counter()
        for row in rows:
            labelled[row.task] += row.labelled
        assert record["tasks"].keys() == labelled.keys()
        parts = sum(one["loss"] * labelled[name] for name, one in record["tasks"].items())
        assert parts / sum(labelled.values()) == pytest.approx(record["loss"], rel=1e-5)
    monkeypatch.setattr("fastlora.task_losses.TaskLosses.room", lambda *_: None)
    monkeypatch.setattr("fastlora.task_losses.TaskLosses.record", lambda *_: {})
    train(replace(config, output=tmp_path / "untold"), progress=False)
    assert numbers(config.output) == numbers(tmp_path / "untold")


def test_a_stopped_run_goes_on_to_the_same_bits(config, tmp_path):
    stopped = replace(config, output=tmp_path / "stopped", max_steps=24)
    thread = interrupt_at(stopped.output / "metrics.jsonl", 5)
    with pytest.raises(TrainingInterrupted, match="resume=True goes on"):
        train(stopped, progress=False)
    thread.join()
    assert 5 <= len(records(stopped.output)) < 24
    result = train(replace(stopped, resume=True), progress=False)
    whole = train(replace(config, max_steps=24), progress=False)
    assert_same_bits(adapter(stopped.output), adapter(config.output))
    assert numbers(stopped.output) == numbers(config.output)
    assert [one["tasks"] for one in records(stopped.output)] == [one["tasks"] for one in records(config.output)]
    assert result.tasks == whole.tasks


def test_a_run_goes_on_with_its_own_mixture_only(config, folder, tmp_path):
    train(replace(config, max_steps=4), progress=False)
    text = (folder / "mixture.yaml").read_text()
    for name, changed in (
        ("weights", text.replace("weight: 2", "weight: 3")),
        ("tasks", text.replace("few.jsonl", "plain2.jsonl")),
    ):
        other = folder / f"{name}.yaml"
        other.write_text(changed)
        tiny.save_data(folder / "plain2.jsonl", 6, seed=1)
        with pytest.raises(ValueError, match=r"^mixture=.*: its token rows are not those .*, or are mixed otherwise$"):
            train(replace(config, max_steps=4, mixture=other, resume=True), progress=False)
    copied = folder / "copied.yaml"
    copied.write_text(text)
    assert train(replace(config, max_steps=4, mixture=copied, resume=True), progress=False).steps == 4


def test_rehearsal_has_its_share_of_the_steps(base, folder, tmp_path, capsys):
    options: dict[str, Any] = {"rehearse": 0.25, "rehearse_data": folder / "few.jsonl", "epochs": 2, "lr": 1e-2}
    config = TrainConfig(model=base, data=folder / "plain.jsonl", output=tmp_path / "out", r=2, **options)
    result = train(config)
    told = capsys.readouterr().err
    assert "tasks" in told and "plain 24 rows 75 %, rehearsal 6 rows 25 %" in told
    assert result.steps == 8, "32 draws an epoch: 24 of the data, and a third as many again"
    assert {name: one["rows"] for name, one in result.tasks.items()} == {"plain": 48, "rehearsal": 16}
    for record in records(config.output):
        assert {name: one["rows"] for name, one in record["tasks"].items()} == {"plain": 6, "rehearsal": 2}


def test_one_file_alone_is_trained_as_ever(base, folder, tmp_path):
    config = TrainConfig(model=base, data=[folder / "plain.jsonl"], output=tmp_path / "out", r=2, max_steps=2)
    assert config.data == str(folder / "plain.jsonl")
    assert train(config, progress=False).tasks == {} and "tasks" not in records(config.output)[0]


def test_the_command_mixes_files(base, folder, tmp_path):
    words = [
        "--model",
        base,
        "--data",
        folder / "plain.jsonl",
        "--data",
        folder / "acts.yaml",
        "--max-steps",
        2,
        "--r",
        2,
    ]
    done = CliRunner().invoke(
        app,
        [
            str(word)
            for word in (
                "train",
                *words,
                "--output",
                tmp_path / "a",
                "--mixing",
                "fixed",
                "--interleave-probs",
                "0.25,0.75",
            )
        ],
    )
    assert done.exit_code == 0, done.output
    assert "plain: 4 rows, " in done.output and "acts: 12 rows, " in done.output
    mixed = ("--mixing", "temperature", "--mixing-temperature", 2, "--mixing-maximum", 24)
    done = CliRunner().invoke(app, [str(word) for word in ("train", *words, "--output", tmp_path / "b", *mixed)])
    assert done.exit_code == 0, done.output
    assert {name: one["rows"] for name, one in records(tmp_path / "b")[0]["tasks"].items()} == {"plain": 4, "acts": 4}


def test_two_processes_tell_tasks_apart_as_one_does(config, tmp_path):
    """Each has half of a step's rows; what is told is of both."""
    options = {
        "model": config.model,
        "mixture": config.mixture,
        "output": tmp_path / "two",
        "r": 4,
        "lora-alpha": 8,
        "lr": 1e-2,
    }
    options |= {"max-steps": 2, "lora-dropout": 0, "batch-size": 4}
    arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    done = train_on_two_processes(*arguments)
    assert done.returncode == 0, done.stderr
    train(replace(config, max_steps=2, lora_dropout=0.0), progress=False)
    for two, one in zip(records(tmp_path / "two"), records(config.output), strict=True):
        for name, task in one["tasks"].items():
            assert two["tasks"][name]["rows"] == task["rows"]
            assert two["tasks"][name]["loss"] == pytest.approx(task["loss"], rel=1e-4)


def test_a_task_is_measured_on_as_it_is_trained_on(base, folder, tmp_path):
    """Held-out rows in the task's wordings: the loss while training is the one that `fastlora eval` has of them."""
    options: dict[str, Any] = {"data": folder / "plain.jsonl", "eval_data": folder / "acts.yaml", "max_length": 40}
    train(TrainConfig(model=base, output=tmp_path / "out", r=2, max_steps=1, lr=0.0, **options), progress=False)
    (measured,) = [json.loads(line) for line in (tmp_path / "out" / "validation.jsonl").read_text().splitlines()]
    words = ("eval", "--model", base, "--data", folder / "acts.yaml", "--max-length", 40, "--no-generations", "--json")
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["rows"], found["prompt_cut_rows"], found["tokens"]) == (40, 0, measured["eval_tokens"])
    assert found["loss"] == pytest.approx(measured["eval_loss"], rel=1e-6)


def test_examples_that_would_not_fit_are_left_out(base, folder, tmp_path):
    """What max_length would have cut off is no half example."""
    words = load_tokenizer(str(base))
    config = TrainConfig(model=base, data=folder / "acts.yaml", output=tmp_path, max_length=40)
    short = training_data.read(config, words)
    long = training_data.read(replace(config, max_length=200), words)
    assert not short.prompt_cut and not short.dropped and max(len(row.input_ids) for row in short.rows) <= 40
    shots = [sum("shot" in one.template for one in data.examples) for data in (short, long)]
    assert 10 < shots[0] <= shots[1] == 19, shots


WRONG = [
    ({}, "^data: expected data or mixture, and not both"),
    ({"mixture": "b", "max_samples": 3}, "^max_samples=3: expected none beside mixture"),
    ({"mixture": "b", "columns": {"prompt": "x"}}, "^columns=.*: expected none beside mixture"),
    ({"data": "a", "mixture": "b"}, "^data='a': expected data or mixture, and not both"),
    ({"data": ["a", ""]}, r"^data=\['a', ''\] is empty"),
    ({"data": "a", "mixing": "fixed"}, "^mixing=fixed: expected several data"),
    ({"mixture": "a", "mixing_maximum": 3}, "^mixing_maximum=3: expected several data; of a mixture its file says it"),
    ({"data": ["a", "b"], "mixing": "fixed"}, "^mixing=fixed: expected interleave_probs with fixed"),
    (
        {"data": ["a", "b"], "interleave_probs": [1.0, 2.0]},
        "^mixing=proportional: expected interleave_probs with fixed",
    ),
    (
        {"data": ["a", "b"], "mixing": "fixed", "interleave_probs": [1.0]},
        r"^interleave_probs=\[1.0\]: expected 2, one a file",
    ),
    (
        {"data": ["a", "b"], "mixing": "fixed", "interleave_probs": [1.0, 0.0]},
        r"^interleave_probs=\[1.0, 0.0\]: expected finite numbers above 0",
    ),
    ({"data": ["a", "b"], "mixing_temperature": 2.0}, "^mixing_temperature=2.0: expected one with mixing=temperature"),
    ({"data": ["a", "b"], "mixing": "temperature"}, "^mixing_temperature: expected one with"),
    ({"data": ["a", "b"], "mixing_maximum": 0}, "^mixing_maximum=0: expected 1 or more"),
    ({"data": "a", "rehearse": 0.1}, "^rehearse=0.1: expected above 0 with rehearse_data"),
    ({"data": "a", "rehearse_data": "b"}, "^rehearse=0.0: expected above 0 with rehearse_data"),
    ({"data": "a", "rehearse": 1.0, "rehearse_data": "b"}, "^rehearse=1.0: expected a number from 0 to below 1"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_options_that_do_not_go_together_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(model="m", output="o", **options)


def test_a_mixture_in_the_output_is_not_replaced(base, folder, tmp_path):
    (tmp_path / "out").mkdir()
    path = tmp_path / "out" / "summary.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match="^rehearse_data=.*: expected another place or name"):
        train(
            TrainConfig(
                model=base, data=folder / "plain.jsonl", output=tmp_path / "out", rehearse=0.5, rehearse_data=path
            ),
            progress=False,
        )
