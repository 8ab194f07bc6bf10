"""The goals on a card, rehearsed: every line of their table at tiny sizes on the CPU, where a CUDA graph is the run itself."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import card_goals, cases, gate, launch, machine, plot, probe, rivals, session, step, table
from benchmarks.cases import BOTH, StepCase
from benchmarks.goals import Goal
from benchmarks.session import EAGER, GRAPH, Record, Session
from fastlora import choice, environment, ops, reference

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hardly timed, and without torch.compile, which takes longer than all the rest."""
    for module in (card_goals, launch):
        monkeypatch.setattr(module, "SECONDS", 0.001)
    monkeypatch.setattr(card_goals, "KERNEL_ROUNDS", 2)
    monkeypatch.setattr(rivals, "MOST_COPIES", 2)
    monkeypatch.setattr(launch, "CALLS", 2)
    monkeypatch.setattr(step, "STEP_SECONDS", 0.001)
    monkeypatch.setattr(torch, "compile", lambda layer, **_: layer)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)
    monkeypatch.setattr(card_goals, "bandwidths", lambda _: {"copy": 1e9, "read": 2e9})


def tiny(case: Any) -> Any:
    """The case with its dtypes and dropout, in sizes that cost nothing."""
    sizes: dict[str, Any] = {
        "M": 6,
        "K": 16,
        "N": 24,
        "R": 4,
        "hidden": 16,
        "intermediate": 24,
        "kv_width": 8,
        "B": 4,
        "ranks": (2, 3),
    }
    if isinstance(case, StepCase):
        sizes = {
            "hidden": 32,
            "intermediate": 64,
            "layers": 2,
            "heads": 2,
            "kv_heads": 1,
            "vocabulary": 64,
            "tokens": 8,
        }
    if getattr(case, "T", 1) > 1:
        sizes["T"] = 3
    return replace(case, **{name: size for name, size in sizes.items() if name in vars(case)})


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> dict[str, session.Line]:
    for name in ("CARD_BLOCK", "CARD_DECODE", "CARD_KERNEL", "CARD_MODEL", "CARD_PREFILL"):
        monkeypatch.setattr(cases, name, tiny(getattr(cases, name)))
    monkeypatch.setattr(cases, "CARD_LAYERS", (tiny(cases.CARD_LAYERS[0]),))
    monkeypatch.setattr(cases, "CARD_ERRORS", tuple(map(tiny, cases.CARD_ERRORS)))
    monkeypatch.setattr(card_goals, "LAYER_GOALS", {(16, 4): (5.0, 12.0)})
    return card_goals.card_lines()


def measured(lines: dict[str, session.Line], *names: str) -> Record:
    record = Record()
    chosen = {name: lines[name] for name in names or lines}
    assert session.measure_lines(chosen, CPU, record, lambda: None, lambda _: None, float("inf"))
    return record


def test_every_line_has_its_goals_eager_and_by_graph(lines) -> None:
    record = measured(lines)
    assert record.failed == [] and record.begun == list(lines)
    by_name: dict[str, Goal] = {row.what: row for row in record.rows}
    assert len(by_name) == len(record.rows) == 14
    training = {"merged", "addmm", "compiled", "peft32", "fastlora32", "reference"}
    for start, others in (
        ("a layer", training),
        ("the seven", training - {"merged"}),
        ("prefill", {"reference"}),
        ("decode", {"reference"}),
    ):
        rows = {
            mode: row
            for mode in (EAGER, GRAPH)
            for what, row in by_name.items()
            if what.startswith(start) and what.endswith(mode)
        }
        assert set(rows) == {EAGER, GRAPH}
        for row in rows.values():
            assert others <= row.rivals.keys()
            assert set(row.seconds) >= {"frozen", "fastlora", *others} and all(
                value > 0 for value in row.seconds.values()
            )
            assert row.unit == "%" and row.first_step is not None
        assert rows[EAGER].peft is not None and (rows[GRAPH].peft is None) == (start in ("prefill", "decode"))
    for row in by_name.values():
        if "over frozen" in row.what:  # percent over the baseline, in the same rounds
            assert row.ours > -100
        if row.unit == "tokens/s":
            assert row.at_least and row.ours > 0
    decode = next(row for row in record.rows if row.what.startswith("decode"))
    least = cases.CARD_DECODE.work(False).bytes / 2e9
    assert decode.ours == pytest.approx(100 * least / decode.seconds["fastlora"]) and decode.at_least
    for row in record.rows:
        if row.what.startswith("error"):
            assert row.goal == 1.0 and 0 < row.rivals["reference"] < 3
    text = table.goals_table(record.rows, record.notes)
    assert "first step" in text and "peft32" in text and "floor" not in text.splitlines()[4]
    assert "| ≥ 15,000 tokens/s |" in table.goals_markdown(record.rows)


def test_a_bare_session_times_the_frozen_layer_and_kernels_alone(lines) -> None:
    record, bare = (
        Record(),
        {"layer": lines["layer 16 r 4"], "kernel": lines["kernel"], "decode": lines["decode"]},
    )
    assert session.measure_lines(bare, CPU, record, lambda: None, lambda _: None, float("inf"), bare=True)
    assert record.failed == [] and len(record.rows) == 3
    for row in record.rows:
        assert row.implementation == "cpu" and row.rivals == {} and row.peft is None
        assert set(row.seconds) == {"frozen", "fastlora"}
        assert "eager" not in row.what


def test_the_first_lines_are_lines_of_the_table() -> None:
    assert set(card_goals.BARE_LINES) < card_goals.card_lines().keys()


def test_a_copy_without_git_is_told_its_commit(monkeypatch) -> None:
    monkeypatch.setenv("FASTLORA_COMMIT", "c0ffee1234")
    assert machine.this_machine(CPU).commit == "c0ffee1234"


def test_a_line_that_never_ends_ends_its_process_and_is_not_begun_again(monkeypatch) -> None:
    ended = threading.Event()
    codes: list[int] = []

    def hang(_: Session) -> Any:
        assert ended.wait(60)
        yield from ()

    def exit_(code: int) -> None:
        codes.append(code)
        ended.set()

    monkeypatch.setattr(session.os, "_exit", exit_)
    saved: list[list[str]] = []
    record = Record()
    session.measure_lines(
        {"hung": hang}, CPU, record, lambda: saved.append(list(record.failed)), print, float("inf"), line_seconds=0.05
    )
    assert codes == [session.HUNG_CODE] and saved[0] == ["hung"] == record.begun
    assert record.notes == ["hung: ended after 0 s, with its process"]


def test_a_line_that_fails_takes_no_other_with_it(lines, monkeypatch) -> None:
    def fail(_: Session) -> Any:
        raise MemoryError("no room\nat all")
        yield

    saved: list[int] = []
    record = Record()
    two = {"bad": fail, "kernel": lines["kernel"]}
    assert session.measure_lines(two, CPU, record, lambda: saved.append(len(record.rows)), print, float("inf"))
    assert record.failed == ["bad"] and "bad: no room" in record.notes and len(record.rows) == 1
    assert saved[-1] == 1
    late = Record()
    assert session.measure_lines(two, CPU, late, lambda: None, print, float("-inf"))
    assert (late.begun, late.rows) == ([], []) and late.notes == [f"{name}: {session.OUT_OF_TIME}" for name in two]


def test_what_breaks_the_process_is_left_out_by_the_next_one(lines, monkeypatch) -> None:
    record = Record()
    two = {name: lines[name] for name in ("prefill", "kernel")}
    with monkeypatch.context() as broken:

        def break_it(*_: object) -> Any:
            broken.setattr(session, "answers", lambda _: False)
            raise RuntimeError("an illegal memory access was encountered")

        broken.setattr(session, "captured", break_it)
        assert not session.measure_lines(two, CPU, record, lambda: None, print, float("inf"))
    assert record.refused == [f"frozen, {GRAPH}"] and record.begun == [] and record.rows == []
    eager, graph = lines["prefill"](Session(CPU, refused=frozenset([f"reference, {GRAPH}"])))
    assert "reference" in eager.rivals and "reference" not in graph.rivals


def test_a_wrong_implementation_is_not_timed(lines, monkeypatch) -> None:
    def wrong(case: Any, training: bool, implementation: str, device: torch.device) -> dict[str, Any]:
        found = card_goals_errors(case, training, implementation, device)
        return {"y": found["y"]._replace(error=float("nan"))}

    card_goals_errors = gate.errors
    monkeypatch.setattr(gate, "errors", wrong)
    record = Record()
    assert session.measure_lines({"prefill": lines["prefill"]}, CPU, record, lambda: None, print, float("inf"))
    assert record.rows == [] and record.failed == ["prefill"]
    assert any("not timed" in note for note in record.notes)


@pytest.mark.parametrize("pass_", BOTH)
@pytest.mark.parametrize("case", cases.LAUNCHES, ids=lambda case: case.number_format())
def test_launches_cost_microseconds(case, pass_) -> None:
    (row,) = launch.launch_line(Session(CPU), case, pass_)  # no graph on a CPU
    assert row.what == f"a call of a {case.name}, {pass_}, {EAGER}" and row.unit == "us" and row.goal is None
    assert {"frozen", "reference"} <= row.rivals.keys() and row.rivals.keys() | {
        "peft",
        "fastlora",
    } == row.seconds.keys()
    assert row.ours > 0 and row.peft is not None and row.peft > 0 and all(value > 0 for value in row.rivals.values())
    assert row.rivals["frozen"] == pytest.approx(1e6 * row.seconds["frozen"])
    assert "wall-clock time a call" in table.goals_table([row], [])


def card_status(results: Path = environment.RESULTS) -> str:
    """What no card has run yet, in a sentence: README has it, word for word."""
    cards = {title: ", ".join(environment.cards_of(name, results)) for name, title in environment.ON_CARDS.items()}
    lacking = [title for title, kinds in cards.items() if not kinds]
    if len(lacking) == len(cards):
        return "No card has run fastlora yet."
    ran = [f"{title} has run on {kinds}" for title, kinds in cards.items() if kinds]
    ran += [f"no card has run {' or '.join(lacking)} yet"] if lacking else []
    text = "; ".join(ran) + "."
    return text[0].upper() + text[1:]


def test_the_command_writes_the_goals_and_goes_on_from_them(lines, monkeypatch, tmp_path, capsys) -> None:
    """As on a card: only what asks for the card itself is told that it is the CPU."""
    two = {name: lines[name] for name in ("kernel", "prefill")}
    arguments = command._parse(["goals", "--out", str(tmp_path)])
    monkeypatch.setattr(command, "card_lines", lambda: {"kernel": two["kernel"]})
    here = replace(command.this_machine(CPU), device="cuda", kind="some-card-sm90", name="Some Card")
    assert command._measure("goals", command.Command(arguments, ["goals"], CPU, here)) == 0
    monkeypatch.setattr(command, "card_lines", lambda: two)
    arguments.resume = True
    assert command._measure("goals", command.Command(arguments, ["goals", "--resume"], CPU, here)) == 0
    (path,) = tmp_path.iterdir()
    content = json.loads(path.read_text())
    assert (
        content["begun"] == list(two) and len(content["rows"]) == 3 and content["machine"]["kind"] == "some-card-sm90"
    )
    assert "over cuBLAS's product" in capsys.readouterr().out
    assert command.main(["--readme", "--device", "cuda", "--out", str(tmp_path)]) == 0
    assert "| prefill" in capsys.readouterr().out
    assert command.main(["--readme", "--out", str(tmp_path)]) == 1  # none of a CPU there

    assert environment.cards_of("reference", tmp_path) == {"some-card-sm90": here.date}
    assert environment.cards_of("cuda", tmp_path) == {}
    status = card_status(tmp_path)
    assert status == "Plain PyTorch has run on some-card-sm90; no card has run Triton or CUDA C++ yet."
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for kind, mark in (
        ("some-card-sm90", f"checked and timed on this kind of card, {here.date}"),
        ("other", "no card of this kind has run it yet"),
    ):
        monkeypatch.setattr(choice.table, "kind_of", lambda _, kind=kind: kind)
        assert environment._on_cards("reference", tmp_path) == mark
    pytest.importorskip("matplotlib", reason="no matplotlib on this machine")
    assert plot.main(tmp_path) == 0
    assert path.with_suffix(".png").stat().st_size > 10_000


def test_readme_says_what_no_card_has_run() -> None:
    assert f"**{card_status()}**" in (ROOT / "README.md").read_text()
    if not torch.cuda.is_available():
        marks = {one.name: one.detail for one in environment.all_findings() if one.part == "implementation"}
        for name in environment.ON_CARDS:
            kinds = ", ".join(environment.cards_of(name))
            assert marks[name].endswith(f"run on {kinds}" if kinds else "no card has run it yet")


def test_sanitized_implementations_are_right_here() -> None:
    assert probe.flaws(CPU) == []


def test_what_a_profiler_looks_at_is_a_forward_and_a_backward_each_time(monkeypatch) -> None:
    called: list[str] = []

    def noted(op: str) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            called.append(op)
            return getattr(reference, op)(*given)

        return run

    for op in ("lora_linear", "lora_linear_backward"):
        monkeypatch.setitem(ops.implementations, (op, "cpu"), noted(op))
    rivals.forced(probe.call, "cpu")(CPU, 5, 24)
    assert called == ["lora_linear", "lora_linear_backward"] * 3


def test_make_gpu_needs_no_package_that_only_training_uses() -> None:
    """`import fastlora`, and all that `make gpu` runs, on a machine without these."""
    code = (
        "import sys\n"
        "for name in ('datasets', 'trl', 'rouge_score', 'pytest_benchmark', 'xdist'):\n"
        "    sys.modules[name] = None\n"
        "import fastlora, fastlora.peft, fastlora.cli, fastlora.environment\n"
        "from benchmarks import __main__, plot, probe\n"
        "fastlora.environment.all_findings()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
