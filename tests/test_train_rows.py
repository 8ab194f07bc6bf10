"""What a training reads: several sources, columns of other names, the turns that were asked for; and that it resumes with them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from training import a_base, adapter, assert_same_bits, numbers, on_cpu, one_thread  # noqa: F401  (fixtures)
from typer.testing import CliRunner

from fastlora.cli import app
from fastlora.comparison import Comparison
from fastlora.config import TrainConfig
from fastlora.language_model_loss import IGNORE
from fastlora.models import load_tokenizer
from fastlora.sweep.jobs import Sweep, jobs_of
from fastlora.train import train
from fastlora.training_data import read

CHAT = [
    {"role": role, "content": text}
    for role, text in zip(("user", "assistant") * 2, ("The cat?", "It runs.", "The dog?", "It sings."), strict=True)
]


@pytest.fixture(name="sources")
def some_sources(tmp_path) -> list[str]:
    """A CSV whose columns have other names, and lines that have them, too."""
    rows = tiny.rows(12)
    table, lines = tmp_path / "rows.csv", tmp_path / "lines.jsonl"
    table.write_text("id,question,answer\n" + "".join(f"1,{row['prompt']},{row['completion']}\n" for row in rows[:6]))
    lines.write_text("".join(json.dumps({"question": r["prompt"], "answer": r["completion"]}) + "\n" for r in rows[6:]))
    return [str(table), str(lines)]


@pytest.fixture(name="config")
def a_config(base, sources, tmp_path) -> TrainConfig:
    columns = {"prompt": "question", "completion": "answer"}
    options: dict[str, Any] = {"r": 2, "lr": 1e-2, "batch_size": 2, "max_steps": 4, "save_steps": 2}
    return TrainConfig(model=base, data=sources, columns=columns, output=tmp_path / "out", **options)


def test_a_run_on_several_sources_goes_on_to_the_same_bits(config, tmp_path):
    done = train(config, progress=False)
    assert done.rows == 12
    told = json.loads((Path(config.output) / "summary.json").read_text())["config"]
    assert told["data"] == config.data and told["columns"] == config.columns
    again = replace(config, output=tmp_path / "again", resume=True)
    shutil.copytree(config.output, again.output)
    shutil.rmtree(Path(again.output) / "checkpoints" / "step-4")
    train(again, progress=False)
    assert_same_bits(adapter(config.output), adapter(again.output))
    assert numbers(config.output) == numbers(again.output)


def test_a_run_goes_on_from_other_files_of_the_same_rows_only(config, tmp_path):
    config = replace(config, data=config.data[0])  # several are mixed: one file of all their rows is another training
    train(config, progress=False)
    rows = tiny.save_data(tmp_path / "one.jsonl", 6)
    shutil.rmtree(Path(config.output) / "checkpoints" / "step-4")
    with pytest.raises(ValueError, match="its token rows are not those that"):
        train(replace(config, resume=True, max_samples=5), progress=False)
    with pytest.raises(ValueError, match="its token rows are not those that"):
        train(replace(config, resume=True, completion_only_loss=False), progress=False)
    assert train(replace(config, data=rows, columns=None, resume=True), progress=False).steps == 4


def test_data_in_the_output_folder_are_not_replaced(config, sources):
    output = Path(config.output)
    output.mkdir()
    inside = Path(shutil.copy(sources[1], output / "metrics.jsonl"))
    for data in ([sources[0], str(inside)], str(output), f"{output}/*.jsonl"):
        with pytest.raises(ValueError, match=rf"data={inside}: expected another place or name"):
            train(replace(config, data=data, overwrite=True), progress=False)
    assert inside.read_text() == Path(sources[1]).read_text()


def test_the_turns_and_the_prompt_count_as_the_options_say(base, tmp_path):
    data = tmp_path / "chat.jsonl"
    data.write_text(json.dumps({"messages": CHAT}) + "\n")
    words = load_tokenizer(str(base))
    found = {}
    for name, options in (
        ("last", {}),
        ("all", {"train_on_turns": "all"}),
        ("everything", {"completion_only_loss": False}),
    ):
        (row,) = read(TrainConfig(model=base, data=data, output=tmp_path / "out", **options), words).rows
        found[name] = words.decode([label for label in row.labels if label != IGNORE])
    assert found["last"] == "It sings.</s>" and found["all"] == "It runs.</s>It sings.</s>"
    assert found["everything"] == words.decode(row.input_ids[1:])


def test_the_command_line_takes_them_all(base, sources, tmp_path):
    def run(*words: object) -> Any:
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert result.exit_code == 0, result.output + repr(result.exception)
        return result

    both = [word for source in sources for word in ("--data", source)]
    columns = ("--columns", "prompt=question,completion=answer")
    output = tmp_path / "adapter"
    run("train", "--model", base, *both, *columns, "--output", output, "--max-steps", 1, "--max-samples", 3)
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["rows"], summary["config"]["data"], summary["config"]["max_samples"]) == (6, sources, 3)
    told = run("eval", "--model", base, *both, *columns, "--no-generations", "--json").output
    assert json.loads(told.splitlines()[-1])["rows"] == 12
    told = run("generate", "--model", base, "--data", sources[1], *columns, "--max-new-tokens", 1).output
    assert told.count("> The ") == 6
    failed = CliRunner().invoke(app, ["generate", "--model", str(base), "--prompt", "a", "--columns", "text=a"])
    assert failed.exit_code == 2 and "--columns 'text=a': expected data, a prompt has none" in failed.output


def test_jobs_and_methods_have_the_same_rows(sources, tmp_path):
    columns = {"prompt": "question", "completion": "answer"}
    given: dict[str, Any] = {"model": "m", "data": sources, "eval_data": sources, "columns": columns, "output": "o"}
    (job,) = jobs_of(Sweep(**given, train_on_turns="all", max_samples=3))
    assert (job.config.data, job.config.columns, job.eval_data) == (sources, columns, tuple(sources))
    assert (job.config.train_on_turns, job.config.max_samples) == ("all", 3)
    comparison = Comparison(**given, methods=["lora"], retain_data=sources)
    (run,) = comparison.runs()
    config = comparison.config_of(run, tmp_path)
    assert (config.data, config.columns) == (sources, columns)
