"""Rows to measure on come from wherever rows to train on do, tasks' files among them, and as many of their tokens count."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from process_here import Here
from typer.testing import CliRunner

from fastlora import Task, comparison
from fastlora.cli import app
from fastlora.comparison import Comparison, compare
from fastlora.config import TrainConfig
from fastlora.data.examples import DataError, read_examples
from fastlora.data.rows import encode, row_length
from fastlora.data.tasks import read_rows
from fastlora.evaluation import EvalResult, evaluate
from fastlora.generation import generate
from fastlora.models import load_model
from fastlora.sweep.jobs import Sweep
from fastlora.sweep.run import sweep
from fastlora.train import train

ACTED = [{"animal": one, "act": act} for one in tiny.ANIMALS for act in tiny.ACTS[:2]]
TASK = """
name: acts
data: acts.jsonl
templates:
  - {name: what, input: "What does the {animal} do?", target: "It {act}."}
  - {name: does, input: "The {animal}?", target: "It {act}."}
few_shot_share: 1.0
shots: [3]
example_separator: "\\n"
"""
ROOM = 48  # tokens: for two examples in front of a row, or so
TURNS = [
    {"role": role, "content": f"the {one} runs"} for role, one in zip(("user", "assistant") * 2, "abcd", strict=True)
]


@pytest.fixture(scope="module", autouse=True)
def on_cpu() -> Iterator[None]:
    with tiny.on_cpu():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a task of 16 rows, and files of rows."""
    found = tmp_path_factory.mktemp("held out")
    tiny.save_model(found / "base")
    (found / "acts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ACTED))
    (found / "acts.yaml").write_text(TASK)
    (found / "table.csv").write_text("q,a\nThe cat runs?, It runs.\nThe cow?, It sings.\n")
    (found / "chats.jsonl").write_text(json.dumps({"messages": TURNS}) + "\n")
    tiny.save_data(found / "plain.jsonl", 8)
    return found


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[Any, Any]:
    return load_model(str(folder / "base"))


def asked(folder: Path, tokenizer: Any) -> list[Any]:
    return Task.read(folder / "acts.yaml").examples(length=row_length(tokenizer), max_tokens=ROOM)


def test_sources_follow_one_another_and_a_task_asks_its_own(folder: Path, loaded: Any) -> None:
    sources = [str(folder / name) for name in ("table.csv", "acts.yaml")]
    columns = {"prompt": "q", "completion": "a"}
    table = read_examples(sources[0], columns=columns)
    found = read_rows(sources, columns=columns, length=row_length(loaded[1]), max_tokens=ROOM)
    assert found == table + asked(folder, loaded[1]) and len(found) == 2 + len(ACTED)
    assert read_rows(sources[:1], columns=columns) == table and read_rows(folder / "acts.yaml")[0].task == "acts"
    assert read_rows(Path(sources[1])) != found[2:]  # where nothing counts tokens, examples stay that do not fit
    assert all(row_length(loaded[1])(one) <= ROOM for one in found)


def test_bad_lines_of_all_sources_are_told_at_once(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "acts.jsonl").write_text('{"animal": "cat"}\n')
    (tmp_path / "acts.yaml").write_text(TASK)
    (tmp_path / "bad.jsonl").write_text("{}\n")
    with pytest.raises(DataError) as raised:
        read_rows([tmp_path / "bad.jsonl", folder / "acts.yaml", tmp_path / "acts.yaml"])
    assert [one.partition(": ")[0] for one in raised.value.problems] == [
        f"{tmp_path}/bad.jsonl:1",
        f"{tmp_path}/acts.jsonl:1",
    ]


@pytest.mark.parametrize("option", ["eval_data", "retain_data", "rehearse_data"])
def test_what_is_wrong_with_a_source_is_said_of_its_option(folder: Path, tmp_path: Path, option: str) -> None:
    given: dict[str, Any] = {"model": folder / "base", "data": folder / "plain.jsonl", "output": tmp_path / "out"}
    if option == "rehearse_data":
        given["rehearse"] = 0.5
    missing = str(tmp_path / "missing.jsonl")
    with pytest.raises(FileNotFoundError, match=f"^{option}: there is no file {missing}$"):
        train(TrainConfig(**given, **{option: missing}), progress=False)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match=f"^{option}: .*empty.jsonl has no rows$"):
        train(TrainConfig(**given, **{option: str(tmp_path / "empty.jsonl")}), progress=False)
    (tmp_path / "bad.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"bad\.jsonl:1: "):
        train(TrainConfig(**given, **{option: str(tmp_path / "bad.jsonl")}), progress=False)


@pytest.mark.parametrize("option", ["eval_data", "test_data", "retain_data"])
def test_a_comparison_and_a_sweep_name_it_too(folder: Path, tmp_path: Path, option: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(comparison, "ProcessPoolExecutor", Here)
    given: dict[str, Any] = {"model": folder / "base", "data": folder / "plain.jsonl", "output": tmp_path / "out"}
    given |= {"eval_data": folder / "plain.jsonl", "max_length": ROOM}
    missing = tmp_path / "missing.jsonl"
    with pytest.raises(FileNotFoundError, match=f"^{option}: there is no file {missing}$"):
        compare(Comparison(**given | {option: missing}, methods=["lora"], max_steps=1, generations=False))
    if option == "eval_data":
        with pytest.raises(FileNotFoundError, match=f"^{option}: there is no file {missing}$"):
            sweep(Sweep(**given | {option: missing}, max_steps=1))


def test_what_a_tasks_file_says_itself_is_not_told_beside_it(folder: Path, tmp_path: Path) -> None:
    columns = {"prompt": "q", "completion": "a"}
    given: dict[str, Any] = {"model": folder / "base", "output": tmp_path / "out", "columns": columns}
    with pytest.raises(ValueError, match="^columns=.*beside a task's file"):
        TrainConfig(**given, data=str(folder / "acts.yaml"))
    TrainConfig(**given, data=[str(folder / "acts.yaml"), str(folder / "table.csv")])


def test_a_training_validates_on_tasks(folder: Path, tmp_path: Path, loaded: Any) -> None:
    config = TrainConfig(
        **{"model": folder / "base", "data": folder / "acts.yaml", "eval_data": folder / "acts.yaml"},
        **{"retain_data": [str(folder / "acts.yaml"), str(folder / "plain.jsonl")], "output": tmp_path / "out"},
        **{"r": 2, "max_steps": 1, "max_length": ROOM, "seed": 7},
    )
    train(config, progress=False)
    record = json.loads((tmp_path / "out" / "validation.jsonl").read_text().splitlines()[0])
    assert record["step"] == 0
    for name, data in (("eval", config.eval_data), ("retain", config.retain_data)):
        found = evaluate(*loaded, data, max_length=ROOM, generations=False)
        assert record[f"{name}_loss"] == pytest.approx(found.loss, rel=1e-5)
        assert record[f"{name}_tokens"] == found.tokens
    assert record["retain_tokens"] > record["eval_tokens"]


def test_a_sweep_is_measured_on_tasks(folder: Path, tmp_path: Path, loaded: Any) -> None:
    given = Sweep(
        model=folder / "base",
        data=str(folder / "acts.yaml"),
        eval_data=str(folder / "acts.yaml"),
        output=tmp_path / "out",
        **{"r": [2], "lr": [0.0], "seed": [3], "max_steps": 1, "max_length": ROOM, "limit": 4},
    )
    (found,) = sweep(given, progress=False)
    expected = evaluate(*loaded, asked(folder, loaded[1]), max_length=ROOM, generations=False, limit=4)
    assert found.evaluations[-1][1] == pytest.approx(expected.loss, rel=1e-5)


COUNTED: dict[str, dict[str, Any]] = {
    "last": {"train_on_turns": "last"},
    "all": {"train_on_turns": "all"},
    "the prompt, too": {"completion_only_loss": False},
}


def test_the_tokens_that_count_are_those_of_a_training(folder: Path, tmp_path: Path, loaded: Any) -> None:
    """In a validation, in `evaluate`, and from the command line."""
    data = folder / "chats.jsonl"
    counts = []
    for number, options in enumerate(COUNTED.values()):
        (row,) = encode(read_examples(data), loaded[1], 512, **options).rows
        found = evaluate(*loaded, data, generations=False, **options)
        assert found.tokens == row.labelled
        counts.append(found.tokens)
        config = TrainConfig(
            model=folder / "base", data=data, eval_data=data, output=tmp_path / str(number), r=2, max_steps=1, **options
        )
        result = train(replace(config, eval_on_start=True), progress=False)
        record = json.loads((Path(result.output) / "validation.jsonl").read_text().splitlines()[0])
        assert record["eval_tokens"] == found.tokens and record["eval_loss"] == pytest.approx(found.loss, rel=1e-5)
    assert counts == sorted(set(counts))


def measured(*options: object) -> EvalResult:
    found = CliRunner().invoke(app, ["eval", "--json", "--no-generations", *map(str, options)])
    assert found.exit_code == 0, found.output
    return EvalResult(**json.loads(found.stdout))


def test_eval_takes_tasks_and_says_which_tokens_count(folder: Path, loaded: Any) -> None:
    model = ("--model", folder / "base", "--max-length", ROOM)
    task = measured(*model, "--data", folder / "acts.yaml")
    assert task == evaluate(*loaded, asked(folder, loaded[1]), max_length=ROOM, generations=False)
    chats = (*model[:2], "--data", folder / "chats.jsonl")
    for typed, options in (
        (("--train-on-turns", "all"), COUNTED["all"]),
        (("--no-completion-only-loss",), COUNTED["the prompt, too"]),
    ):
        assert measured(*chats, *typed) == evaluate(*loaded, folder / "chats.jsonl", generations=False, **options)
    both = (*chats, "--train-on-turns", "all", "--no-completion-only-loss")
    found = CliRunner().invoke(app, ["eval", *map(str, both)])
    assert found.exit_code == 2 and "--train-on-turns 'all' exclude each other" in found.stderr


@pytest.fixture
def compared(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Comparison:
    monkeypatch.setattr(comparison, "ProcessPoolExecutor", Here)
    labels = [
        {"prompt": f"The {one} runs. Does it run? ", "completion": ("yes", "no")[i % 2]}
        for i, one in enumerate("abcdef")
    ]
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labels))
    return Comparison(
        **{"model": folder / "base", "data": str(folder / "chats.jsonl"), "eval_data": str(folder / "chats.jsonl")},
        **{"test_data": str(folder / "acts.yaml"), "retain_data": str(tmp_path / "labels.jsonl")},
        **{"output": tmp_path / "out", "methods": ["lora"], "r": [2], "max_steps": 1, "max_new_tokens": 3},
        **{"max_length": ROOM, "completion_only_loss": False},
    )


def test_a_comparison_counts_as_told_and_scores_labels_of_other_rows(
    compared: Comparison, loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastlora.evaluation.answer", lambda model, tokenizer, prompts, *_: ["Yes."] * len(prompts))
    base, trained = compare(compared)
    counted: dict[str, Any] = {"max_length": ROOM, "completion_only_loss": False}
    expected = [
        evaluate(*loaded, data, generations=False, **counted).loss for data in (compared.eval_data, compared.test_data)
    ]
    assert (base.eval_loss, base.loss) == pytest.approx(expected, rel=1e-5)
    other = evaluate(*loaded, compared.retain_data, generations=False, **counted)
    assert base.retained_loss == pytest.approx(other.loss, rel=1e-5)
    assert (base.accuracy, base.retained_accuracy, trained.retained_accuracy) == (0.0, 0.5, 0.5)
    found = list(comparison.rows([base, replace(trained, retained_accuracy=None)]))
    assert [row["retained accuracy"] for row in found] == ["50.0", "-"] and found[0]["accuracy"] == "0.0"
    without = replace(base, accuracy=None, retained_accuracy=None)
    assert not any("accuracy" in name for row in comparison.rows([without]) for name in row)
    run = compared.config_of(compared.runs()[0], Path("x"))
    assert (run.completion_only_loss, run.max_length, run.train_on_turns) == (False, ROOM, "auto")


def test_other_rows_are_answered_only_where_that_is_asked_for_and_tells(
    compared: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastlora.evaluation.answer", lambda *_: pytest.fail("it was asked"))
    base, _ = compare(replace(compared, generations=False))
    assert base.retained_accuracy is None
    given = replace(compared, retain_data=compared.eval_data, test_data=None, overwrite=True)
    answered: list[int] = []

    def answer(model: Any, tokenizer: Any, prompts: list[Any], *_: Any) -> list[str]:
        answered.append(len(prompts))
        return ["no"] * len(prompts)

    monkeypatch.setattr("fastlora.evaluation.answer", answer)
    compare(given)
    assert answered == [1, 1]  # of the held-out conversation, by the base and by the run


def test_generate_asks_as_a_task_does(folder: Path, loaded: Any) -> None:
    options = ("--data", folder / "acts.yaml", "--max-length", ROOM, "--max-new-tokens", 2)
    found = CliRunner().invoke(app, ["generate", "--model", str(folder / "base"), *map(str, options)])
    assert found.exit_code == 0, found.output
    prompts = [one.prompt for one in asked(folder, loaded[1])]
    answers = generate(*loaded, prompts, max_new_tokens=2, max_length=ROOM)
    assert found.stdout == "".join(f"> {one}\n{text.strip()}\n" for one, text in zip(prompts, answers, strict=True))
