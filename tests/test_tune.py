"""`fastlora tune`: it measures every class, writes a table that is used, ends in time, and says what it cannot."""

import json
from pathlib import Path

import pytest
import torch
from measurements import ON_A_CPU, a_machine, choose, half_times, needs_native, restart, small_weights  # noqa: F401  (fixtures)
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
