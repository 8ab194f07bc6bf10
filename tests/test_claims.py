"""`python -m benchmarks.claims`: the verdicts' arithmetic by hand, what a claims.yaml names, and that what is done is not done again."""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from process_here import Here

from benchmarks.claims import __main__ as command
from benchmarks.claims import material, trials, verdicts
from benchmarks.claims.experiments import EXPERIMENTS
from benchmarks.claims.trials import LORA, QUICK, SEEDS, Bench, Found, Sizes
from fastlora import comparison, demo
from fastlora.comparison import RESULT, Failure, Outcome
from fastlora.config import DEFAULT_LR
from fastlora.demo.tasks import generate
from fastlora.models import load_tokenizer


@pytest.fixture(scope="module", autouse=True)
def on_cpu() -> Iterator[None]:
    with tiny.on_cpu():
        yield


def write_material(folder: Path, rows: int = 24) -> Path:
    """Generated: dialogues, three clusters of a task each, and two tasks of other kinds."""

    def write(path: Path, task: str, split: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        found = [{"prompt": one.prompt, "completion": one.completion} for one in generate(task, rows, 0, split)]
        path.write_text("".join(json.dumps(row) + "\n" for row in found))

    for split in ("train", "validation", "test"):
        write(folder / f"dialogues/{split}.jsonl", "summarization", split)
    for task in ("sentiment", "ordering", "translation"):
        write(folder / f"clusters/{task}/rows.jsonl", task, "train")
    for task in ("arithmetic", "extraction"):
        write(folder / f"others/{task}.jsonl", task, "test")
    (folder / "claims.yaml").write_text(
        "dialogues:\n  train: dialogues/train.jsonl\n  validation: dialogues/validation.jsonl\n  test: dialogues/test.jsonl\n"
        "clusters:\n  sentiment: clusters/sentiment\n  ordering: clusters/order*/*.jsonl\n  translation: [clusters/translation]\n"
        "others: others\n"
    )
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_material(tmp_path_factory.mktemp("material"))


@pytest.fixture(scope="module")
def rows(folder: Path) -> material.Material:
    return material.read(folder, load_tokenizer(str(demo.BASE_MODEL)), 384)


def outcome(name: str, kind: str, lr: float | None, **more: Any) -> Outcome:
    given = {"eval_loss": 2.0, "loss": 2.0, "rouge1": 0.1, "rougeL": 0.1, "exact_match": 0.0, "retained_loss": None,
             "forgetting": None, "answer_tokens_per_second": 10.0, "trainable_parameters": 5, "file_bytes": 10**6,
             "peak_bytes": 10**9, "seconds_per_step": 2.0 if kind == "full" else 1.0}  # fmt: skip
    method = kind.partition(",")[0]
    return Outcome(name, kind, method, int(kind.rpartition(" ")[2]) if ", r " in kind else None, lr, **given | more)


def test_the_share_of_a_gain() -> None:
    assert verdicts.share_of_gain(0.2, 0.4, 0.35) == pytest.approx(0.75)
    assert verdicts.share_of_gain(0.2, 0.4, 0.5) == pytest.approx(1.5)
    assert verdicts.share_of_gain(0.2, 0.2, 0.3) is None and verdicts.share_of_gain(0.2, 0.1, 0.3) is None
    assert verdicts.share_of_gain(*verdicts.PUBLISHED.values()) == pytest.approx(verdicts.SHARE_GOAL, abs=5e-4)


def test_the_size_at_which_nine_tenths_of_the_gain_are_there() -> None:
    """0.1 + 0.9 x 0.2 = 0.28: two thirds of the way from 0.24 to 0.30, which in logarithms of 100 to 800 is 100 x 8^(2/3) = 400."""
    assert verdicts.size_at([(50, 0.2), (100, 0.24), (800, 0.3)], 0.1) == pytest.approx(400)
    assert verdicts.size_at([(50, 0.29), (100, 0.3)], 0.1) == 50
    assert verdicts.size_at([(50, 0.2), (100, 0.3), (800, 0.25)], 0.1) == pytest.approx(100 / 2**0.2)
    assert verdicts.size_at([(50, 0.1), (100, 0.05)], 0.1) is None


def test_forgetting_at_equal_scores() -> None:
    """From the base on: 0.3 lies half-way between 0.2 and 0.4; behind the top the path is not looked at."""
    path = [(0.1, 0.0), (0.2, 0.1), (0.4, 0.5), (0.3, 2.0)]
    assert verdicts.forgotten_at(path, 0.3) == pytest.approx(0.3)
    assert verdicts.forgotten_at(path, 0.15) == pytest.approx(0.05)
    assert verdicts.forgotten_at(path, 0.1) == 0.0 and verdicts.forgotten_at(path, 0.41) is None
    assert verdicts.common_score([path, [(0.1, 0.0), (0.35, 1.0)]]) == 0.35


def test_what_is_close() -> None:
    """Two runs with a spread of 0.01 each differ by 0.014 as a rule: twice that is 0.0283."""
    assert verdicts.is_close(0.30, 0.328, 0.01) and verdicts.is_close(0.328, 0.30, 0.01)
    assert not verdicts.is_close(0.30, 0.329, 0.01) and verdicts.is_close(0.3, 0.3, 0.0)
    assert verdicts.mean_and_spread([1.0]) == (1.0, None)
    assert verdicts.mean_and_spread([1.0, 2.0, 3.0]) == (2.0, 1.0)


def test_few_rows_have_few_steps() -> None:
    assert [Sizes().steps_of(rows) for rows in (50, 100, 200, 500)] == [40, 50, 100, 112]


def test_material(rows: material.Material, folder: Path, tmp_path: Path) -> None:
    assert list(rows.clusters) == ["sentiment", "ordering", "translation"] and set(rows.others) == {
        *("arithmetic", "extraction")
    }
    assert rows.examples is rows.dialogues and len(rows.dialogues.train) == 24
    cluster = rows.clusters["ordering"]
    assert len(cluster.train) == 22 and cluster.test is cluster.validation
    held = {one.source.rpartition(":")[2] for one in cluster.test}
    assert held == {"1", "2"}, "the first rows of each file, whatever its wording, are never trained on"
    tokenizer = load_tokenizer(str(demo.BASE_MODEL))
    assert material.read(folder, tokenizer, 384) == rows
    some = material.mixed({name: one.train for name, one in rows.clusters.items()}, 9)
    assert len(some) == 9 and some == material.mixed({name: one.train for name, one in rows.clusters.items()}, 9)
    path = material.write(tmp_path / "rows.jsonl", some)
    assert material.write(path, some) == path and len(path.read_text().splitlines()) == 9
    with pytest.raises(FileExistsError, match=r"rows\.jsonl: the material has changed .* expected another --output"):
        material.write(path, some[1:])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("others: others", "", "expected dialogues, clusters, others"),
        ("others: others", "others: others\nmore: 1", "nothing else"),
        ("others: others", "others: nowhere", "nowhere: expected a file, a folder with JSONL files, or a pattern"),
        ("others: others", "others: [3]", r"got \[3\], expected a file"),
        ("  test: dialogues", "  tests: dialogues", "dialogues: expected train, validation, test, and columns"),
        ("clusters/sentiment", "", "got None, expected a file"),
        (
            "others: others",
            "others: [others/arithmetic.jsonl, others/a*.jsonl]",
            "others: two files are called arithmetic",
        ),
        ("others: others", "others: [", r"claims\.yaml: while parsing"),
        ("clusters:", "  columns: prompt\nclusters:", "dialogues: columns: got 'prompt', expected field: column"),
        ("others: others", "others: short.jsonl", r"claims\.yaml: others: short: max_length=384 .* drops every one"),
    ],
)
def test_a_claims_file_that_says_something_else(
    folder: Path, tmp_path: Path, old: str, new: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (folder / "claims.yaml").read_text()
    assert old in text
    (tmp_path / "short.jsonl").write_text(json.dumps({"prompt": "a " * 999, "completion": "b"}))
    (tmp_path / "claims.yaml").write_text(
        re.sub(r"\b(dialogues|clusters|others)/", rf"{folder}/\1/", text.replace(old, new))
    )
    assert command.main(given(tmp_path, tmp_path / "out", "--dry-run")) == 2
    assert re.search(message, capsys.readouterr().err)


def given(folder: Path, output: Path, *more: str, experiment: str = "dialogue") -> list[str]:
    return [experiment, "--model", str(demo.BASE_MODEL), "--material", str(folder), "--output", str(output),
            "--dtype", "float32", "--quick", *more]  # fmt: skip


def test_runs_are_made_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a model, rows and trainings; a dry run says what is left."""
    monkeypatch.setattr(comparison, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(comparison, "_answer_rate", lambda *_: 1.0)
    monkeypatch.setattr(trials, "SEEDS", (1,))
    monkeypatch.setattr(command, "QUICK", replace(QUICK, rates=(3.0,), other=1))
    output = tmp_path / "out"
    assert command.main(given(folder, output, "--dry-run")) == 0
    assert "24 rows, 4 to choose by, 4 to tell of, 2 steps; 3 runs left" in capsys.readouterr().out
    assert command.main(given(folder, output)) == 0
    (result,) = output.glob("*-claims-dialogue.json")
    content = json.loads(result.read_text())
    (trial,) = content["trials"]
    assert [one["name"] for one in trial["outcomes"]][:2] == ["base", "lora-r16-lr0.0006"] and content["machine"][
        "date"
    ]
    assert trial["outcomes"][1]["others"].keys() == {"other/arithmetic", "other/extraction", "cluster/sentiment",
                                                     "cluster/ordering", "cluster/translation"}  # fmt: skip
    assert set(trial["best_rate_at_edge"]) == {LORA, "full"} and trial["seeds"][LORA].keys() == {"1"}
    assert result.with_suffix(".md").read_text().startswith("# dialogue summarisation")
    assert result.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert list(output.glob("trials/dialogues/runs/lora*/*.safetensors"))
    assert not list(output.glob("trials/dialogues/runs/full*/*.safetensors")), "measured, and half a gigabyte"
    assert not list(output.rglob("checkpoints")), "nothing goes on from them, and an optimiser is a gigabyte"

    monkeypatch.setattr(comparison, "_train", lambda run, *_: pytest.fail(f"{run} was trained again"))
    monkeypatch.setattr(trials, "load", lambda *_: pytest.fail("measured again"))
    assert command.main(given(folder, output)) == 0
    assert json.loads(result.read_text())["trials"] == content["trials"]
    (output / "trials/dialogues/runs/full-lr6e-05" / RESULT).unlink()
    capsys.readouterr()
    assert command.main(given(folder, output, "--dry-run")) == 0
    assert "1 runs left" in capsys.readouterr().out


def made_up(given: comparison.Comparison) -> list[Outcome]:
    """More rank, more rows, more rate: a better score, by a little more with each seed."""
    rows = len(Path(str(given.data)).read_text().splitlines())
    found = [outcome("base", "base", None)]
    for run in given.runs():
        score = 0.2 + 0.001 * rows + 0.001 * (run.r or 20) + run.lr + 0.001 * given.seed
        found.append(outcome(run.name, run.kind, run.lr, rouge1=score, loss=2 - score, eval_loss=2 - score))
    return found


def others_of(bench: Bench, _: object, one: Outcome) -> dict[str, dict[str, float]]:
    return {name: {"loss": 1 + (one.lr or 0), "accuracy": 0.5} for name in bench.other_rows}


@pytest.fixture
def diverging(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Runs of a rate or a seed that is put in here fail in their seventh step."""
    failing: dict[str, Any] = {"rate": lambda given, run: False}

    def failed(given: comparison.Comparison) -> list[Failure]:
        bad = [run for run in given.runs() if failing["rate"](given, run)]
        return [Failure(run.name, run.kind, run.method, run.r, run.lr, 7, "step 7: the loss is nan") for run in bad]

    def compared(given: comparison.Comparison) -> list[Outcome]:
        names = {one.name for one in failed(given)}
        return [one for one in made_up(given) if one.name not in names]

    monkeypatch.setattr(trials, "compare", compared)
    monkeypatch.setattr(trials, "failures", failed)
    monkeypatch.setattr(Bench, "_others", others_of)
    return failing


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_rate_at_which_all_diverge_is_never_the_best_and_the_rest_is_told(
    experiment: str, folder: Path, tmp_path: Path, diverging: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    diverging["rate"] = lambda given, run: given.lr_factors and run.lr > 19 * DEFAULT_LR[run.method]
    monkeypatch.setattr(command, "QUICK", replace(QUICK, rates=(3.0, 8.0, 20.0)))
    assert command.main(given(folder, tmp_path, experiment=experiment)) == 0
    (result,) = tmp_path.glob("*.json")
    content = json.loads(result.read_text())
    bad = [row for row in content["rows"] if row[1] == "failed in step 7"]
    failed = [one for trial in content["trials"] for one in trial["failed"]]
    assert len(bad) == len(failed) >= 2 and {one["step"] for one in failed} == {7}
    assert {len(row) for row in content["rows"]} == {len(content["head"])} and len(content["rows"]) > len(bad)
    assert all("rate" in row[0] and set(row[2:]) == {"-"} for row in bad)
    for trial in content["trials"]:
        names = {one["name"] for one in trial["failed"]}
        assert not names & set(trial["best"]) and not names & {one["name"] for one in trial["outcomes"]}
        assert not trial["best_rate_at_edge"], "a higher one was tried"
    assert "failed in step 7" in result.with_suffix(".md").read_text() and result.with_suffix(".png").is_file()
    assert not any("nothing is concluded" in line for line in content["says"])


def test_where_every_rate_diverges_nothing_is_concluded_and_all_runs_are_told(
    folder: Path, tmp_path: Path, diverging: dict[str, Any]
) -> None:
    diverging["rate"] = lambda given, run: run.method == "full"
    assert command.main(given(folder, tmp_path)) == 0
    (result,) = tmp_path.glob("*.json")
    content = json.loads(result.read_text())
    said = "nothing is concluded: full (dialogues) failed at every rate: at 6e-05 in step 7; at 0.0004 in step 7"
    assert content["says"][0] == said
    names = [row[:2] for row in content["rows"]]
    assert names == [["dialogues", "base"], *[["dialogues", LORA]] * 2, *[[f"full (dialogues), rate {rate}", "failed in step 7"]
                                                                  for rate in ("6e-05", "0.0004")]]  # fmt: skip
    assert "no png" if not result.with_suffix(".png").exists() else pytest.fail("of what?")


def test_seeds_that_diverge_leave_fewer_or_none(folder: Path, tmp_path: Path, diverging: dict[str, Any]) -> None:
    diverging["rate"] = lambda given, run: given.seed == 1
    assert command.main(given(folder, tmp_path / "one")) == 0
    (result,) = (tmp_path / "one").glob("*.json")
    content = json.loads(result.read_text())
    assert any("the standard deviation over two seeds is 0.0014" in line for line in content["says"])
    assert [row[:2] for row in content["rows"] if "seed" in row[0]] == [
        [f"{kind} (dialogues), seed 1", "failed in step 7"] for kind in (LORA, "full")
    ]
    assert content["trials"][0]["seeds"].keys() == {LORA, "full"}
    diverging["rate"] = lambda given, run: given.seed > 0
    assert command.main(given(folder, tmp_path / "none")) == 0
    (result,) = (tmp_path / "none").glob("*.json")
    says = json.loads(result.read_text())["says"]
    assert f"rouge1: the standard deviation is unknown, all but one of the seeds failed ({LORA}, dialogues)" in says


def test_other_rows_that_have_changed_are_told(folder: Path, tmp_path: Path, rows: material.Material) -> None:
    bench = Bench(demo.BASE_MODEL, tmp_path, rows, QUICK, "float32")
    assert len(bench.other_rows) == 5 and len(list((tmp_path / "data").iterdir())) == 5
    changed = replace(rows, others={**rows.others, "arithmetic": rows.others["arithmetic"][::-1]})
    with pytest.raises(FileExistsError, match=r"other-arithmetic\.jsonl: the material has changed"):
        _ = replace(bench, rows=changed).other_rows


def test_a_run_that_failed_is_not_left_to_be_measured(folder: Path, tmp_path: Path, rows: material.Material) -> None:
    bench = Bench(demo.BASE_MODEL, tmp_path, rows, QUICK, "float32")
    trial = bench.trial("dialogues", rows.dialogues, others=True)
    runs = bench.comparison(trial).runs()
    assert [name for name, _ in bench.left(trial, lambda _: 10)] == ["base", *(run.name for run in runs)]
    run = runs[0]
    path = tmp_path / "trials" / "dialogues" / "runs" / run.name / RESULT
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(asdict(Failure(run.name, run.kind, run.method, run.r, run.lr, 7, "nan"))))
    assert [name for name, _ in bench.left(trial, lambda _: 10)] == ["base", *(run.name for run in runs[1:])]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_says_something(
    experiment: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trials, "compare", made_up)
    monkeypatch.setattr(Bench, "_others", others_of)
    assert command.main(given(folder, tmp_path, experiment=experiment)) == 0
    (result,) = tmp_path.glob("*.json")
    content = json.loads(result.read_text())
    assert {len(row) for row in content["rows"]} == {len(content["head"])} and len(content["rows"]) > 1
    assert "the standard deviation over three seeds is 0.0010" in capsys.readouterr().out
    assert result.with_suffix(".png").is_file() and content["figures"]
    assert len(content["sizes"]["rates"]) == len(QUICK.rates) and len(Sizes().rates) >= 3


def test_more_seeds_where_a_difference_is_small(
    rows: material.Material, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bench = Bench(demo.BASE_MODEL, tmp_path, rows, QUICK, "float32")
    trial = bench.trial("dialogues", rows.dialogues, ranks=(1, 4, 16, 64))
    monkeypatch.setattr(trials, "compare", made_up)
    found = Found(trial, made_up(bench.comparison(trial)), {})
    pairs = [((found, kind), (found, LORA)) for kind in ("lora, r 64", "lora, r 16")]
    said = trials.settle(bench, (found, LORA), pairs, "rouge1")
    assert found.seeds.keys() == {LORA} and found.seeds[LORA].keys() == set(SEEDS)
    assert said[1].endswith("differ by 0.0480: one seed tells them apart") and "three seeds each" in said[2]
    assert trials.settle(bench, (found, LORA), [((found, "full"), (found, LORA))], "rouge1")[1].endswith(
        "means are told"
    )
    values = found.values("full", "rouge1")
    assert len(values) == 3 and found.mean("full", "rouge1") == pytest.approx(values[0] + 0.001)
    assert replace(trial, name="other").train is trial.train and found.is_at_edge(LORA)
