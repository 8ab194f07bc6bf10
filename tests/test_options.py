"""Options from a file, into one, and by others' names: `fastlora train --config` and the table in options.py."""

import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from training import (  # noqa: F401  (fixtures)
    a_base,
    a_config,
    adapter,
    assert_same_bits,
    numbers,
    on_cpu,
    one_thread,
    some_data,
)
from typer.main import get_command
from typer.testing import CliRunner

from fastlora import options
from fastlora.cli import app
from fastlora.comparison import Comparison
from fastlora.config import TrainConfig
from fastlora.options import ALIASES, INSTEAD, own_name, read
from fastlora.train import train

KNOWN = [field.name for field in fields(TrainConfig)]
DOCS = Path(__file__).parent.parent / "docs/command-line.md"


def run(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    (folder / name).write_text(text)
    return folder / name


SAME = {
    "run.yaml": "model: m\nlr: 1e-4\ntarget-modules: [q_proj, v_proj]\nuse_rslora: true\nmax_steps: null\n",
    "run.json": '{"model": "m", "lr": 1e-4, "target-modules": ["q_proj", "v_proj"],\n "use_rslora": true, "max_steps": null}',
    "run.toml": 'model = "m"\nlr = 1e-4\n"target-modules" = ["q_proj", "v_proj"]\nuse_rslora = true\n',
}


@pytest.mark.parametrize("name", SAME)
def test_a_file_of_any_kind_gives_the_same_options(tmp_path, name):
    given = read(write(tmp_path, SAME[name], name), KNOWN)
    values = {name: value for name, value in given.values.items() if value is not None}  # TOML has no null
    assert values == {"model": "m", "lr": 1e-4, "target_modules": ["q_proj", "v_proj"], "use_rslora": True}
    assert given.where("lr") == (f"{tmp_path / name}:2" if name != "run.json" else f"{tmp_path / name}")
    assert given.where("use_rslora") == f"{tmp_path / name}:{ {'run.yaml': 4, 'run.json': 2, 'run.toml': 4}[name] }"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "model: m\nlearning_rat: 1\n",
            r"run.yaml:2: there is no option 'learning_rat'; the nearest is learning_rate$",
        ),
        ("epoch: 1\n", r"run.yaml:1: there is no option 'epoch'; the nearest is epochs$"),
        ("zzz: 1\n", r"run.yaml:1: there is no option 'zzz'$"),
        ("logging_steps: 1\n", r"run.yaml:1: there is no option 'logging_steps': every step is in metrics.jsonl"),
        ("lr: 1\nlearning_rate: 2\n", r"run.yaml:2: learning_rate is the option lr, which is there already"),
        ("lr: 1\nlr: 2\n", r"^config=.*run.yaml: the field 'lr' is there twice$"),
        ("- lr: 1\n", r"^config=.*run.yaml: expected options by name, got \["),
        ("3: 1\n", r"run.yaml"),
        ("lr: [1\n", r"^config=.*run.yaml: "),
        ("lr: !!python/object:os.system {}\n", r"^config=.*run.yaml: "),
        ("a: &x [1]\nlr: *x\n", r"^config=.*run.yaml: an alias"),
        ("lr: " + "[" * 5000, r"^config=.*run.yaml: "),
        ("", r"^config=.*run.yaml: expected options by name, got None$"),
    ],
)
def test_a_file_that_is_none_is_told(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read(write(tmp_path, text), KNOWN)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("run.json", '{"lr": 1, "lr": 2}', r"config=.*run.json: not JSON .the field 'lr' is there twice"),
        ("run.json", "[1]", "config=.*run.json: expected a JSON object"),
        ("run.toml", "lr = \n", "config=.*run.toml: "),
        ("run.toml", "lr = " + "[" * 50000, "config=.*run.toml: "),
        ("run.ini", "lr = 1", r"config=.*run.ini: expected a file whose name ends in .yaml, .yml, .json or .toml"),
    ],
)
def test_other_files_that_are_none_are_told(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        read(write(tmp_path, text, name), KNOWN)


def test_paths_are_written_whole_and_the_hubs_names_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"data": ["rows.jsonl", "hf:one/rows"], "rehearse": 0.1, "rehearse_data": "hf:two/rows"}
    config = TrainConfig(model="m", output="out", method="peft", peft_config="c.json", **given)
    options.write(tmp_path, config)
    found = yaml.safe_load((tmp_path / options.NAME).read_text())
    assert found["data"] == [str(tmp_path / "rows.jsonl"), "hf:one/rows"] and found["rehearse_data"] == "hf:two/rows"
    assert found["peft_config"] == str(tmp_path / "c.json") == config.peft_config


def test_lines_are_those_that_editors_show(tmp_path):
    with pytest.raises(ValueError, match="run.json:2: there is no option 'zzz'"):
        read(write(tmp_path, '{"run_name": "a\u2028b",\n "zzz": 1}', "run.json"), KNOWN)


def test_a_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^config: there is no file .*none.yaml$"):
        read(tmp_path / "none.yaml", KNOWN)


def test_what_is_wrong_in_a_file_is_told_with_its_line(base, data, tmp_path):
    text = f"model: {base}\ndata: {data}\noutput: {tmp_path / 'out'}\nr: '16'\n"
    told = run("train", "--config", write(tmp_path, text), code=2).splitlines()[-1]
    assert told == f"fastlora train: {tmp_path / 'run.yaml'}:4: --r '16': expected int, got str"
    assert "--r 0: expected" in run("train", "--config", write(tmp_path, text), "--r", 0, code=2).splitlines()[-1]
    told = run("train", "--config", write(tmp_path, "learning_rat: 1\n"), code=2).splitlines()
    assert told == [
        f"fastlora train: {tmp_path / 'run.yaml'}:1: there is no option 'learning_rat'; the nearest is learning_rate"
    ]
    assert "--output" in run("train", "--config", write(tmp_path, f"model: {base}\ndata: {data}\n"), code=2)


def test_a_run_leaves_the_file_that_repeats_it(config, tmp_path, monkeypatch):
    train(replace(config, lr=None, lr_scheduler_type="cosine", run_name="1e5"), progress=False)
    path = config.output / options.NAME
    found = yaml.safe_load(path.read_text())
    assert found["run_name"] == "1e5" and Path(found["data"]).is_absolute()
    assert set(found) == set(KNOWN) - set(options.OF_ONE_CALL)
    monkeypatch.chdir(tmp_path)
    assert "--resume goes on from there" in run("train", "--config", path, code=2)
    run("train", "--config", path, "--output", tmp_path / "again")
    assert numbers(tmp_path / "again") == numbers(config.output)
    assert_same_bits(adapter(tmp_path / "again"), adapter(config.output))
    again = yaml.safe_load((tmp_path / "again" / options.NAME).read_text())
    assert again | {"output": found["output"]} == found
    run("train", "--config", path, "--resume")
    run("train", "--config", path, "--overwrite")
    assert numbers(tmp_path / "again") == numbers(config.output)


def test_a_file_of_the_users_own_in_the_output_is_not_replaced(config):
    config.output.mkdir()
    own = write(config.output, "lr: 1\n", options.NAME)
    with pytest.raises(FileExistsError, match=r"holds config.yaml: expected a folder of its own"):
        train(config, progress=False)
    assert own.read_text() == "lr: 1\n"
    (config.output / "metrics.jsonl").touch()  # as a run leaves both that ended in its first step
    train(config, progress=False)


def test_what_is_typed_overrides_the_file_and_either_may_use_others_names(base, data, tmp_path):
    text = f"model_name_or_path: {base}\ntrain-file: {data}\noutput_dir: {tmp_path / 'out'}\nmax_steps: 5\nnum_train_epochs: 2.0\n"
    path = write(tmp_path, text + "learning_rate: 1e-3\nlora_target: [q_proj]\nlora_r: 4\ncutoff_len: 64\n")
    run("train", "--config", path, "--learning_rate", 2e-3, "--lora-rank", 2, "--max_steps", 1)
    found = json.loads((tmp_path / "out" / "summary.json").read_text())["config"]
    assert found["lr"] == 2e-3 and found["r"] == 2 and found["max_steps"] == 1 and found["max_length"] == 64
    assert found["target_modules"] == ["q_proj"] and found["epochs"] == 2


def test_llama_factorys_all_is_all_linear(base, data, tmp_path):
    text = f"model: {base}\ndataset: {data}\noutput: {tmp_path / 'out'}\nmax_steps: 1\nlora_target: all\n"
    run("train", "--config", write(tmp_path, text))
    run("train", "--config", tmp_path / "run.yaml", "--target-modules", "all", "--output", tmp_path / "typed")
    for name in ("out", "typed"):
        config = json.loads((tmp_path / name / "summary.json").read_text())["config"]
        assert config["target_modules"] == "all-linear"


@pytest.mark.parametrize(
    ("given", "here"),
    [("tatsu-lab/alpaca", "hf:tatsu-lab/alpaca"), ("rows.jsonl", "rows.jsonl"), ("there/rows", "there/rows")],
)
def test_axolotls_data_sets_are_told_what_they_are_here(tmp_path, monkeypatch, given, here):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there" / "rows").mkdir(parents=True)
    path = write(tmp_path, f"base_model: m\noutput: out\ndatasets:\n  - path: {given}\n    type: alpaca\n")
    told = run("train", "--config", path, code=2).splitlines()[-1]
    assert told == (
        f"fastlora train: {path}:3: --data {{'path': '{given}', 'type': 'alpaca'}}: expected FILE or hf:OWNER/NAME:CONFIG:SPLIT,"
        f" here {here}, or a list of such; what format a row has, its fields say"
    )


def test_eval_takes_a_file_too(base, data, tmp_path):
    path = write(tmp_path, f"model: {base}\ndata: {data}\nlimit: 3\ngenerations: false\njson: true\n")
    assert json.loads(run("eval", "--config", path).splitlines()[-1])["rows"] == 3
    assert json.loads(run("eval", "--config", path, "--limit", 2).splitlines()[-1])["rows"] == 2
    assert "as_json" in run("eval", "--config", write(tmp_path, "as_json: true\n"), code=2)


def test_sweep_and_compare_take_a_file_too(base, data, tmp_path):
    common = (
        f"model: {base}\ndata: {data}\neval_data: {data}\noutput: {tmp_path / 'out'}\nmax_steps: 1\nbatch_size: 2\n"
    )
    told = run("sweep", "--config", write(tmp_path, common + "r: [2, 4]\nlearning_rate: 1e-3\nlimit: 2\n"))
    assert "r2-lr0.001" in told and "r4-lr0.001" in told
    told = run("compare", "--config", write(tmp_path, common + "methods: [lora, nope]\n"), code=2)
    assert f"{tmp_path / 'run.yaml'}:7: --methods ['lora', 'nope']: expected" in told.replace("\n", " ")


def options_of(command: str) -> dict[str, Any]:
    commands: Any = get_command(app)
    return {option.opts[0].removeprefix("--").replace("-", "_"): option for option in commands.commands[command].params}


def test_no_name_of_others_is_one_of_ours():
    commands: Any = get_command(app)
    for command in commands.commands:
        assert not ALIASES.keys() & options_of(command).keys() and not INSTEAD.keys() & options_of("train").keys()
    assert set(ALIASES.values()) <= set(KNOWN) and not ALIASES.keys() & INSTEAD.keys()


def test_no_value_of_a_choice_is_taken_for_an_option():
    """typer asks for another spelling of those, too."""
    commands: Any = get_command(app)
    hints = [*TrainConfig.__annotations__.values(), *Comparison.__annotations__.values()]
    choices = {one for hint in hints for one in get_args(hint) if isinstance(one, str)}
    known = {name for command in commands.commands for name in options_of(command)}
    assert len(choices) > 20
    for choice in choices:
        assert own_name(choice, known).replace("_", "-") == choice or own_name(choice, known) == choice, choice


def test_an_option_that_there_is_not_names_the_nearest():
    for typed, told in {
        "--learning-rat": "No such option: --learning-rat; the nearest is --learning-rate",
        "--bathc-size": "; the nearest is --batch-size",
        "--bf16": "No such option: --bf16: dtype says it, as bfloat16",
        "--val-size": "No such option: --val-size: eval_data, rows of a file of their own",
        "--train-on-inputs": "--train-on-inputs: no_completion_only_loss counts the prompt, too",
        "--assistant-only-loss": "--assistant-only-loss: train_on_turns: auto, last or all",
        "--logging-steps": "every step is in metrics.jsonl",
        "--zzzz": "No such option: --zzzz\n",
    }.items():
        assert told in run("train", typed, "1", code=2)


def test_the_page_tells_of_every_name():
    table = re.findall(r"^\| (`--.*`.*) \| (`--.*`) \|$", DOCS.read_text(), re.MULTILINE)
    told = {
        theirs: re.findall(r"--[a-z-]+", ours) for ours, names in table for theirs in re.findall(r"--[a-z-]+", names)
    }
    assert told.keys() == {f"--{name.replace('_', '-')}" for name in ALIASES}
    for theirs, ours in told.items():
        own = ALIASES[theirs.removeprefix("--").replace("-", "_")]
        assert f"--{own.replace('_', '-')}" in ours


def test_help_is_whole_at_eighty_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for word in ("-h", "--help"):
        told = run("train", word)
        for name in KNOWN:
            assert re.search(rf"--{name.replace('_', '-')}\b", told), name
    assert all(len(line) <= 80 or "|" in line for line in told.splitlines())
    assert "--config" in told and "--dry-run" in told
    assert run("--version").startswith("fastlora ")


@pytest.mark.parametrize(("epochs", "steps"), [(0.5, 3), (1, 6), (1.5, 9), (0.1, 1), (1e-9, 1), (2.0, 12)])
def test_epochs_may_be_parts_of_one(config, epochs, steps):
    assert train(replace(config, epochs=epochs), progress=False).steps == steps
