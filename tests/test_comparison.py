"""`fastlora compare`: every run is measured alike, none twice, and the best rate of each method is told."""

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from process_here import Here
from typer.testing import CliRunner

from fastlora import cli, comparison
from fastlora.comparison import (
    BASE,
    FILES,
    NAME,
    RESULT,
    RUNS,
    Comparison,
    Outcome,
    Run,
    best,
    compare,
    failures,
)


@pytest.fixture(scope="module", autouse=True)
def on_cpu() -> Iterator[None]:
    with tiny.on_cpu():
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    for name in ("data", "eval_data", "retain_data"):
        rows = tiny.rows(8, seed=len(name))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = {name: folder / f"{name}.jsonl" for name in ("data", "eval_data", "retain_data")}
    return {"model": tiny.save_model(folder / "base"), **paths}


SMALL: dict[str, Any] = {
    "max_steps": 3,
    "batch_size": 4,
    "max_length": 64,
    "max_new_tokens": 3,
    "r": [2],
    "eval_batch_size": 8,
}


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "ProcessPoolExecutor", Here)


def test_methods_are_measured_alike_and_a_stopped_comparison_goes_on(
    files: dict[str, Path], tmp_path: Path, in_this_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = Comparison(**files, output=tmp_path / "out", methods=["lora", "prompt", "full"], lr=[1e-2, 1e-3], **SMALL)
    found = compare(given)
    names = ["lora-r2-lr0.01", "lora-r2-lr0.001", "prompt-lr0.01", "prompt-lr0.001", "full-lr0.01", "full-lr0.001"]
    assert [one.name for one in found] == [BASE, *names]
    base, *trained = found
    for one in trained:
        assert one.steps == 3 and one.tokens == trained[0].tokens and one.seconds_per_step and one.peak_bytes
        assert one.forgetting == pytest.approx(one.retained_loss - base.retained_loss)
        assert one.answer_tokens_per_second > 0 and one.file_bytes > 0
    assert trained[4].trainable_parameters == trained[4].parameters > trained[0].trainable_parameters > 0
    content = json.loads((tmp_path / "out" / NAME).read_text())
    assert [one["name"] for one in content["outcomes"]] == [BASE, *names] and len(content["best"]) == 4
    assert (tmp_path / "out" / "compare.png").is_file()

    monkeypatch.setattr(comparison, "_train", lambda run, *_: pytest.fail(f"{run} was trained again"))
    assert compare(given) == found
    with pytest.raises(FileExistsError, match=r"holds a comparison with max_steps=3: expected that, or overwrite=True"):
        compare(replace(given, max_steps=4))
    path = tmp_path / "out" / RUNS / "full-lr0.01" / RESULT
    path.write_text("{}")
    with pytest.raises(ValueError, match=re.escape(f"{path}: no outcome of this version of fastlora")):
        compare(given)


def test_a_rate_that_diverges_is_told_and_the_others_go_on(
    files: dict[str, Path], tmp_path: Path, in_this_process: None, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    given = Comparison(**files, output=tmp_path / "out", methods=["full", "lora"], lr=[1e30, 1e-3], **SMALL)
    monkeypatch.setattr(comparison, "_answer_rate", lambda *_: 1.0)
    found = compare(given)
    assert [one.name for one in found] == [BASE, "full-lr0.001", "lora-r2-lr0.001"]
    assert [one.name for one in best(found)[1:]] == ["full-lr0.001", "lora-r2-lr0.001"]
    full, lora = failures(given)
    assert (full.name, full.kind, full.method, full.r, full.lr) == ("full-lr1e+30", "full", "full", None, 1e30)
    assert (lora.name, lora.kind, lora.r) == ("lora-r2-lr1e+30", "lora, r 2", 2)
    for one in (full, lora):
        assert (
            one.step in (2, 3) and one.failed.startswith(f"step {one.step}: ") and "a lower lr may help" in one.failed
        )
        assert f"{one.name} came to nothing: step {one.step}: " in capsys.readouterr().out or one is lora
    content = json.loads((tmp_path / "out" / NAME).read_text())
    assert [one["name"] for one in content["failed"]] == [full.name, lora.name] and len(content["best"]) == 3
    table = list(comparison.rows(found, [full, lora]))
    assert [row["method"] for row in table] == [BASE, "full", "lora, r 2", "full", "lora, r 2"]
    assert table[3]["held-out loss"] == f"failed in step {full.step}" and table[3]["lr"] == "1e+30"
    assert {tuple(row) for row in table} == {tuple(table[0])} and table[3]["trained"] == "-"

    monkeypatch.setattr(comparison, "_train", lambda run, *_: pytest.fail(f"{run} was trained again"))
    assert compare(given) == found and failures(given) == [full, lora]
    path = tmp_path / "out" / RUNS / "full-lr1e+30" / RESULT
    path.write_text(path.read_text().replace('"step": ', '"step": "", "more": '))
    with pytest.raises(ValueError, match=re.escape(f"{path}: no outcome of this version of fastlora")):
        compare(given)


def test_a_method_that_the_model_has_nothing_for_is_told_and_the_others_go_on(
    files: dict[str, Path], tmp_path: Path, in_this_process: None, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    given = Comparison(**files, output=tmp_path / "out", methods=["bitfit", "lora"], lr=[1e-3], **SMALL)
    monkeypatch.setattr(comparison, "_answer_rate", lambda *_: 1.0)
    found = compare(given)
    assert [one.name for one in found] == [BASE, "lora-r2-lr0.001"]
    (bitfit,) = failures(given)
    assert (bitfit.method, bitfit.step) == ("bitfit", 0) and bitfit.failed.startswith("method=bitfit: ")
    assert "bitfit-lr0.001 came to nothing: method=bitfit: LlamaForCausalLM has no biases" in capsys.readouterr().out
    assert list(comparison.rows(found, [bitfit]))[-1]["held-out loss"] == "not for this model"


def test_what_diverges_on_held_out_rows_only_is_a_failure_and_of_the_base_an_error(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = Comparison(**files, output=tmp_path / "out", methods=["lora"], **SMALL)
    measured = {"eval_loss": 1.0, "loss": 1.0, "retained_loss": None}
    monkeypatch.setattr(comparison, "_train", lambda *_: {"steps": 3})
    for name in measured:
        monkeypatch.setattr(comparison, "_measure", lambda *_, name=name: measured | {name: float("nan")})
        said = {"step": 3, "failed": f"step 3: {name} is nan"}
        assert comparison._find(given.runs()[0], given, tmp_path) == said
        with pytest.raises(ValueError, match=rf"^model=.*base: its {name} is nan, expected one that is finite"):
            comparison._find(None, given, tmp_path)
    monkeypatch.setattr(comparison, "_measure", lambda *_: dict(measured))
    assert comparison._find(given.runs()[0], given, tmp_path) == {"steps": 3, **measured}


def test_a_comparison_is_of_what_its_files_say(
    files: dict[str, Path], tmp_path: Path, in_this_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(files["data"].read_bytes())
    monkeypatch.setattr(comparison, "_find", lambda *_: {"step": 1, "failed": "not tried"})
    given = Comparison(**files | {"data": rows}, output=tmp_path / "out", methods=["lora"], **SMALL)
    monkeypatch.setattr(comparison, "_once", lambda *_: pytest.fail("reached"))
    setup = tmp_path / "out" / RUNS / "setup.json"
    for _ in range(2):
        comparison._claim(tmp_path / "out", given)
    rows.write_text(rows.read_text().replace("cat", "cow"))
    with pytest.raises(
        FileExistsError, match=rf"holds a comparison in which {rows} said something else: expected that"
    ):
        compare(given)
    # One of an earlier version has no such file, and is gone on with.
    before = setup.read_bytes()
    setup.with_name(FILES).unlink()
    comparison._claim(tmp_path / "out", given)
    assert setup.read_bytes() == before and json.loads(setup.with_name(FILES).read_text()).keys() == {
        *map(str, (rows, files["eval_data"], files["retain_data"]))
    }
    comparison._claim(tmp_path / "out", replace(given, overwrite=True, max_steps=9))


def test_answers_have_room_behind_prompts_as_long_as_the_model_has_positions(tmp_path: Path) -> None:
    model, words = tiny.llama(vocab_size=420, max_position_embeddings=48), tiny.tokenizer()
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "The cat runs. " * 30, "completion": " It runs."}) + "\n")
    seen: list[tuple[int, ...]] = []
    model.generate = lambda input_ids, **_: seen.append(tuple(input_ids.shape))
    given = Comparison("m", path, path, "o", ["lora"], max_length=64)
    assert comparison._answer_rate(model, words, given) > 0
    assert seen[0][1] + comparison.ANSWER_TOKENS <= 48


def test_rates_are_chosen_on_some_rows_and_told_on_others(
    files: dict[str, Path], tmp_path: Path, in_this_process: None
) -> None:
    given = Comparison(**files, output=tmp_path / "one", methods=["lora"], lr=[1e-2, 1e-3], **SMALL)
    rows = given.eval_data, given.retain_data
    apart = compare(replace(given, output=tmp_path / "two", test_data=given.retain_data))
    for alone, one in zip(compare(given), apart, strict=True):
        assert alone.eval_loss == alone.loss == one.eval_loss
        assert one.loss == one.retained_loss == alone.retained_loss != one.eval_loss
    assert (given.told_data, replace(given, test_data=rows[1]).told_data) == rows
    path = tmp_path / "two" / RUNS / "setup.json"
    setup = json.loads(path.read_text())
    path.write_text(json.dumps({name: setup[name] for name in setup if name != "test_data"}))
    with pytest.raises(ValueError, match=re.escape(f"{path}: no comparison of this version of fastlora")):
        compare(replace(given, output=tmp_path / "two"))


def test_a_runs_process_is_as_silent_as_this_one() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="nothing to see")
        filters = list(warnings.filters)
    with warnings.catch_warnings(action="error"):
        comparison._begin(filters, None)
        warnings.warn("nothing to see", stacklevel=1)
    begun: list[str] = []
    with warnings.catch_warnings():
        comparison._begin(filters, lambda: begun.append("begun"))
    assert begun == ["begun"]


def test_a_process_of_a_command_speaks_as_the_command_does() -> None:
    """As `compare` begins each run's: other packages are silent there, too, and messages name options, a line each."""
    said = (
        "import logging, warnings; from fastlora import cli; cli.begin_process();"
        "logging.getLogger('fastlora').warning('max_length=%d: cut\\nrows', 8); warnings.warn('train_on_turns=all')"
    )
    found = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True)
    assert found.stderr.splitlines() == ["--max-length 8: cut rows", "--train-on-turns all"]


class Killed(Here):
    def result(self) -> Any:
        raise BrokenProcessPool


def test_a_process_that_is_killed_is_told(files: dict[str, Path], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(comparison, "ProcessPoolExecutor", Killed)
    monkeypatch.setattr(comparison, "_find", lambda *_: {})
    given = Comparison(**files, output=tmp_path / "out", methods=["lora"])
    with pytest.raises(comparison.RunEnded, match="^base: its process ended without an answer"):
        compare(given)


def test_methods_that_there_are_not_are_named(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(
        TypeError, match=r"^methods=\['lora', 'lro'\]: expected a list of 'lora' or .*, got list with 'lro'$"
    ):
        Comparison(**files, output=tmp_path / "out", methods=["lora", "lro"])


def test_the_best_rate_of_each_kind_is_told() -> None:
    values: dict[str, Any] = {one.name: None for one in fields(Outcome)} | {
        "answer_tokens_per_second": 1.0,
        "method": "lora",
    }
    values |= {"trainable_parameters": 5, "file_bytes": 2_000_000, "lr": 0.1, "loss": 2.0, "forgetting": 0.25}
    runs = [
        Outcome(**values | {"name": str(i), "kind": kind, "eval_loss": loss, "loss": 4 - loss})
        for i, (kind, loss) in enumerate([("a", 2.0), ("b", 1.0), ("a", 1.5)])
    ]
    assert [one.name for one in best(runs)] == ["2", "1"]
    assert next(comparison.rows(runs))["held-out loss"] == "2.5000"
    assert [row["file MB"] for row in comparison.rows(runs)] == ["2", "2"]


def test_ranks_and_rates_make_runs(files: dict[str, Path]) -> None:
    given = Comparison(**files, output="o", methods=["dora", "norm"], r=[1, 4])
    assert given.runs() == [Run("dora", 1, 2e-4), Run("dora", 4, 2e-4), Run("norm", None, 1e-3)]
    own = replace(given, lr_factors=[1, 0.5], r=[4]).runs()
    assert own == [Run("dora", 4, 2e-4), Run("dora", 4, 1e-4), Run("norm", None, 1e-3), Run("norm", None, 5e-4)]
    config = given.config_of(given.runs()[1], Path("x"))
    assert (config.method, config.r, config.lora_alpha, config.target_modules) == ("dora", 4, 8, "all-linear")
    some = replace(given, target_modules=["q_proj"])
    assert [some.config_of(run, Path("x")).target_modules for run in some.runs()[1:]] == [["q_proj"], "all-linear"]


def test_a_budget_of_tokens_is_turned_into_steps(files: dict[str, Path], tmp_path: Path) -> None:
    given = Comparison(**files, output="o", methods=["lora"], max_tokens=1000, batch_size=4)
    config = given.config_of(given.runs()[0], tmp_path)
    steps = comparison._steps(config, given, tmp_path)
    tokens = (
        steps
        * 4
        * sum(len(tiny.tokenizer()(row["prompt"] + row["completion"]).input_ids) + 1 for row in tiny.rows(8, seed=4))
        / 8
    )
    assert tokens == pytest.approx(1000, rel=0.1)


def test_a_budget_of_seconds_is_measured_first(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = Comparison(**files, output="o", methods=["lora"], max_seconds=6.0, batch_size=4)
    monkeypatch.setattr(comparison, "_seconds", lambda _: [99.0, 2.0, 2.0, 2.0])
    assert comparison._steps(given.config_of(given.runs()[0], tmp_path / "run"), given, tmp_path / "run") == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ["lora", "nolora"]}, r"methods=\['lora', 'nolora'\]: expected a list of 'lora'"),
        ({"methods": []}, r"methods=\[\] is empty"),
        ({"methods": ["peft"]}, "methods: peft has a configuration of its own"),
        ({"max_steps": 1, "max_tokens": 5}, "max_steps and max_tokens exclude each other"),
        ({"max_seconds": 0.0}, "max_seconds=0.0: expected more than 0"),
        ({"limit": 0}, "limit=0: expected at least 1"),
        ({"eval_batch_size": 0}, "eval_batch_size=0: expected at least 1"),
        ({"lr": [0.1], "lr_factors": [1.0]}, "lr and lr_factors exclude each other"),
        ({"lr_factors": [-1.0]}, "lr=-0.0002: expected"),
        ({"lr": [1e-3, 1.0000001e-3]}, "lr: two rates are so close that both runs are called lora-r16-lr0.001"),
        ({"r": [0]}, "r=0: expected at least 1"),
        ({"methods": ["tokens"]}, "token_indices: method=tokens needs one"),
        ({"target_modules": "(q_proj"}, r"target_modules='\(q_proj': no regular expression"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"model": "m", "data": "d", "eval_data": "e", "output": "o", "methods": ["lora"]} | options
    with pytest.raises((ValueError, TypeError), match=message):
        Comparison(**given)


def test_the_command_prints_a_table(files: dict[str, Path], tmp_path: Path, in_this_process: None) -> None:
    paths = [word for name, path in files.items() for word in (f"--{name.replace('_', '-')}", str(path))]
    small = ["--max-steps", "2", "--batch-size", "4", "--max-length", "64", "--max-new-tokens", "3", "--r", "2"]
    small += ["--target-modules", "q_proj,v_proj", "--test-data", str(files["eval_data"])]
    ran = CliRunner().invoke(
        cli.app, ["compare", *paths, *small, "--methods", "lora,ia3", "--output", str(tmp_path / "out")]
    )
    assert ran.exit_code == 0, ran.output
    assert "lora, r 2" in ran.output and "ia3" in ran.output and "forgetting" in ran.output
    assert "the best on eval_data is shown, with its figures on test_data" in " ".join(ran.output.split())
    adapter = next((tmp_path / "out" / RUNS).glob("lora-*")) / "adapter_config.json"
    assert set(json.loads(adapter.read_text())["target_modules"]) == {"q_proj", "v_proj"}
    wrong = CliRunner().invoke(cli.app, ["compare", *paths, "--methods", "lora", "--lr", "1e-3,x", "--output", "o"])
    assert wrong.exit_code == 2 and "--lr '1e-3,x': expected numbers with commas" in wrong.output
