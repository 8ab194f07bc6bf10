"""`fastlora tune`: it measures every class, writes a table that is used, ends in time, and says what it cannot."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from measurements import ON_A_CPU, a_machine, choose, entry, half_times, needs_native, restart, small_weights  # noqa: F401  (fixtures)
from typer.testing import CliRunner

from fastlora import cli, environment, ops
from fastlora.choice import problems, table, trial


@needs_native
def test_tune_writes_a_table_that_is_used(machine: Path, timed: list[list[str]], tmp_path: Path) -> None:
    shipped = table.SHIPPED / f"{table.kind_of('cpu')}.json"
    done = CliRunner().invoke(cli.app, ["tune", "--output", str(shipped)])
    assert done.exit_code == 0, done.output
    assert "lora_linear_backward" in done.output and "0.50" in done.output and str(shipped) in done.output
    assert not machine.exists()
    head = json.loads(shipped.read_text())
    assert head["kind"] == shipped.stem and head["command"] == f"fastlora tune --device cpu --output {shipped.name}"
    assert head["torch"] == torch.__version__ and head["threads"] == torch.get_num_threads() and head["date"]
    restart()
    for problem in problems.listed("cpu", ON_A_CPU, ops.KERNEL_DTYPES, ["small", "large"]):
        for op in (problem.op, f"{problem.op}_backward"):
            assert table.has("cpu", op, *problem[1:]), (op, problem)
    timed.clear()
    trial.try_out(small_weights())
    assert timed == []  # all is known


@needs_native
def test_tune_keeps_its_measurements(machine: Path, timed: list[list[str]]) -> None:
    path, found = trial.tune_machine("cpu", progress=False)
    assert path == machine and len(found) == len(table.entries("cpu"))
    assert choose() == "cpu"
    findings = {one.name: one for one in environment.all_findings() if one.part == "measurements"}
    assert findings["cpu"].present and f"{len(found)} measured on this machine" in findings["cpu"].detail
    assert findings["trial"].present and str(machine.parent) in findings["trial"].detail


@needs_native
def test_tune_ends_in_time_with_what_it_has(machine: Path, timed: list[list[str]], tmp_path: Path) -> None:
    whole = problems.listed("cpu", ON_A_CPU, ops.KERNEL_DTYPES, list(problems.SHAPES))
    path, found = trial.tune_machine("cpu", tmp_path / "cut.json", progress=False, seconds=0)
    assert {one.op for one in found} == {whole[0].op, f"{whole[0].op}_backward"}
    assert len(json.loads(path.read_text())["entries"]) == len(found)


@pytest.fixture
def classes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Tunes with made-up results, one list for each class, all that is known by then; returns what was asked for, and how a bar was shown."""

    def tune(*results: list[Any], device: str = "cpu", **options: Any) -> list[Any]:
        seen: list[Any] = []

        def measured(todo: list[Any], device: torch.device, seconds: float, refused: set[Any]) -> Iterator[list[Any]]:
            seen.append((todo, device, seconds, refused))
            return iter(results)

        monkeypatch.setattr(trial, "_measured", measured)
        monkeypatch.setattr(trial, "tqdm", lambda steps, **bar: seen.append(bar) or steps)
        return [*trial.tune_machine(device, **options), *seen]

    return tune


def test_tune_writes_after_every_class_that_has_a_result(
    classes: Callable[..., list[Any]], machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Any] = []
    monkeypatch.setattr(table, "write", lambda *what: written.append(what))
    one, two = entry(0.5), entry(0.5, rows=8)
    file = tmp_path / "a.json"
    path, found, (todo, device, _, refused), bar = classes([], [one], [one, two], output=file, progress=False)
    command = f"fastlora tune --device cpu --output {file.name}"
    assert (path, found) == (file, [one, two])
    assert written == [(file, "cpu", [one], command), (file, "cpu", [one, two], command)]
    assert todo == problems.listed("cpu", ON_A_CPU, ops.KERNEL_DTYPES, ["small", "large"])
    assert device == torch.device("cpu") and refused == set()
    assert bar["disable"] and bar["total"] == len(todo)
    written.clear()
    path, found, _, bar = classes([one])
    assert path == table.cache_path("cpu") and not bar["disable"]
    assert [what[1] for what in written] == ["cpu"] and written[0][3] == "fastlora tune --device cpu"


def test_tune_begins_no_class_after_its_time(
    classes: Callable[..., list[Any]], machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for those that found nothing: a table has to hold something."""
    one = entry(0.5)
    results = [[], [one], [one, one], [one, one, one]]
    for times, least, expected in (([100, 102, 103], 2, 2), ([100, 103], 2, 1), ([100, 102, 102, 102], 2, 3)):
        now = iter(times)
        monkeypatch.setattr("time.perf_counter", lambda now=now: next(now))
        assert len(classes(*results, seconds=least)[1]) == expected


def test_on_a_card_what_trains_comes_first(
    classes: Callable[..., list[Any]], machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ops, "candidates", lambda op, device, dtype: ["one"] if op != "swiglu" else [])
    monkeypatch.setattr(table, "keep", lambda *_: None)
    _, _, (todo, device, _, _), _ = classes([entry(0.5)], device="cuda")
    names = [name for name in problems.operators if name != "swiglu"]
    every = problems.listed("cuda", names, ops.KERNEL_DTYPES, ["small", "large"])
    assert device == torch.device("cuda") and sorted(todo, key=str) == sorted(every, key=str)
    assert (todo[0].dtype, todo[0].rows, todo[0].size) == (torch.bfloat16, 4096, "large")
    order = [
        (one.dtype is not torch.bfloat16, one.size != "large", trial.FIRST_ON_CARDS.index(one.rows)) for one in todo
    ]
    assert order == sorted(order)


def test_tune_says_what_is_missing(
    classes: Callable[..., list[Any]], machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = [ops.Availability("cpu", False, "not built"), ops.Availability("reference", True, "plain PyTorch")]
    monkeypatch.setattr(ops, "availability", lambda: known)
    with pytest.raises(ValueError, match=r"^nothing but .* on cpu, nothing to measure \(cpu: not built\)$"):
        classes()


def test_tune_says_what_it_cannot(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="device='tpu': expected cpu or cuda"):
        trial.tune_machine("tpu", progress=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="torch sees no CUDA card"):
        trial.tune_machine("cuda", progress=False)
    monkeypatch.setattr(
        ops, "implementations", {key: value for key, value in ops.implementations.items() if key[1] == "reference"}
    )
    with pytest.raises(ValueError, match="nothing but plain PyTorch runs on cpu"):
        trial.tune_machine("cpu", progress=False)
