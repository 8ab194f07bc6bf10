"""The benchmarks measure what they say: the work counted, rivals that compute the same, and no time on a red gate."""

import ast
import itertools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import __main__ as command
from benchmarks import cases, device, gate, goals, machine, operators, rivals, session, step, table
from benchmarks.cases import (
    BOTH,
    FORWARD,
    TRAINING,
    BlockCase,
    LoRALinearCase,
    StepCase,
)
from fastlora import ops, reference
from fastlora.operators import lora_linear

CPU = torch.device("cpu")
TINY = LoRALinearCase("tiny", torch.float32, torch.float32, 5, 24, 16, 3, 0.1)
SIZES = {
    "M": 5,
    "B": 4,
    "T": 3,
    "K": 24,
    "N": 16,
    "R": 3,
    "ranks": (2, 3),
    "S": 2,
    "P": 4,
    "D": 8,
    "V": 11,
    "bias": False,
}


def tiny(case: Any) -> Any:
    """The case with its dtypes and dropout, in sizes that cost nothing."""
    return replace(case, name="tiny", **{name: size for name, size in SIZES.items() if name in vars(case)})


ODD = {name: next(case for case in one.on_cpu if case.name == "odd") for name, one in cases.OPERATORS.items()}
TINY_CASES = {name: tiny(case) for name, case in ODD.items()}
TINY_BLOCK = BlockCase("tiny", torch.bfloat16, torch.float32, 7, 24, 40, 8, 3)
TINY_STEP = StepCase("tiny", torch.float32, torch.float32, 32, 64, 1, 2, 1, 64, 2, 8, 4, 0.0, 2)


@pytest.fixture(autouse=True)
def known_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the machine, unmeasured."""
    for module in (operators, step):
        monkeypatch.setattr(module, "product_rate", lambda *_: 1e11)
    monkeypatch.setattr(operators, "bandwidths", lambda _: {"copy": 1e10})


def test_peak_of_call_sees_the_memory_of_the_call() -> None:
    def hold(_: int) -> None:
        torch.ones(64 * 2**20, dtype=torch.int8)

    hold(0)
    peak = device.peak_of_call(hold, CPU)
    if peak is None:
        pytest.skip("this system does not let a process reset its peak memory")
    assert 63 * 2**20 <= peak <= 80 * 2**20


def addmm_in_place(_: object, x: torch.Size, y: torch.Size, **__: object) -> int:
    """The operations of addmm_ on these shapes, which torch's counter does not know."""
    return 2 * x[0] * x[1] * y[1]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("operator", ["lora_linear", "multi_lora"])
def test_work_counts_the_reference_products(operator: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case, flops = TINY_CASES[operator], []

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*inputs: Any) -> Any:
            with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_in_place}) as counter:
                results = function(*inputs)
            flops.append(counter.get_total_flops())
            return results

        return run

    for op in (operator, f"{operator}_backward"):
        monkeypatch.setitem(ops.implementations, (op, "reference"), counted(ops.implementations[op, "reference"]))
    rivals.build(case, training, CPU, ["fastlora"]).run("fastlora", training, "reference")(0)
    assert len(flops) == 1 + training and case.work(training).flops == sum(flops)


def test_work_counts_every_tensor_once() -> None:
    M, K, N, R = 5, 24, 16, 3
    forward = 4 * (M * K + N * K + M * N + R * (K + N))
    assert TINY.work(False).bytes == forward
    assert TINY.work(True).bytes == forward + 4 * (M * N + N * K + 2 * M * K + 2 * R * (K + N))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("operator", cases.OPERATORS)
def test_rivals_compute_the_same(operator: str, training: bool) -> None:
    case = TINY_CASES[operator]
    case = replace(case, **({"dropout_p": 0.0} if hasattr(case, "dropout_p") else {}))
    contest = rivals.build(case, training, CPU)
    assert tuple(contest.rivals) == cases.OPERATORS[operator].rivals
    for copy in {0, contest.copies - 1}:
        outputs = {name: contest.rivals[name].call(copy) for name in contest.rivals if name != "compiled"}
        for name in outputs.keys() - {"frozen", "packed"}:
            torch.testing.assert_close(outputs[name], outputs["peft"])
        if "packed" in outputs:
            torch.testing.assert_close(outputs["packed"][0], outputs["frozen"])
            assert len(outputs["packed"]) == 1 + training  # y, and dx
        if outputs["frozen"].shape == outputs["peft"].shape:  # else what is frozen is a part of it
            assert not torch.allclose(outputs["frozen"], outputs["peft"])
        for name in {"fastlora", "addmm"} & contest.rivals.keys() if training else ():
            torch.testing.assert_close(contest.run(name, True)(copy), contest.run("peft", True)(copy))


def test_a_few_rows_meet_weights_that_are_not_in_the_cache() -> None:
    decode = LoRALinearCase("decode", torch.float32, torch.float32, 1, 256, 1024, 2, passes=(FORWARD,))
    contest = rivals.build(decode, False, CPU)
    weight_bytes = 256 * 1024 * 4
    assert contest.copies == rivals.MOST_COPIES or contest.copies * weight_bytes > 2 * machine.last_level_cache()
    outputs = [contest.rivals["frozen"].call(copy) for copy in range(2)]
    assert not torch.equal(*outputs)


@pytest.mark.parametrize("operator", cases.OPERATORS)
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_cases_are_real_and_none_is_there_twice(operator: str, kind: str) -> None:
    found = cases.cases_of(operator, torch.device(kind))
    assert cases.cases_of(operator, torch.device(kind), quick=True) == found[: cases.OPERATORS[operator].quick]
    assert len(set(found)) == len(found)
    for case in found:
        assert set(case.passes) <= set(BOTH)
        for training in (False, True):
            assert case.work(training).bytes > 0
    assert any("8B" in case.name for case in found)
    assert any("odd" in case.name for case in found)


@pytest.mark.parametrize("operator", cases.OPERATORS)
def test_gate_is_green_here(operator: str) -> None:
    assert gate.check(operator, CPU) == []
    for training in (False, True):
        for name in rivals.implementations(TINY_CASES[operator], training, CPU):
            gate.require_right(TINY_CASES[operator], training, name, CPU)


def break_lora_linear(monkeypatch: pytest.MonkeyPatch, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Enter a `cpu` implementation whose y is wrong."""

    def wrong(*inputs):
        ys, *state = reference.lora_linear(*inputs)
        return [change(y) for y in ys], *state

    few = lora_linear._few_rows_now
    monkeypatch.setitem(ops.implementations, ("lora_linear", "cpu"), wrong)
    monkeypatch.setattr(lora_linear, "_few_rows_now", lambda *inputs: change(few(*inputs)))
    monkeypatch.setitem(ops.implementations, ("lora_linear_backward", "cpu"), reference.lora_linear_backward)


@pytest.mark.parametrize("change", [lambda y: y * 1.001, lambda y: y * torch.nan], ids=["a little off", "NaN"])
def test_gate_reports_a_wrong_implementation(monkeypatch, change) -> None:
    break_lora_linear(monkeypatch, change)
    wrong = gate.check("lora_linear", CPU)
    assert any(re.match(r"lora_linear, cpu : .*: the error of result 0 is", line) for line in wrong)
    with pytest.raises(gate.CaseError, match="lora_linear cpu, odd, M 37, .*: the error of y is"):
        gate.require_right(replace(ODD["lora_linear"], K=65, N=51), False, "cpu", CPU)


def test_an_operator_is_named_in_two_files_and_nowhere_else() -> None:
    assert rivals.CONTESTS.keys() == cases.OPERATORS.keys()
    for path in Path(command.__file__).parent.glob("*.py"):
        constants = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        assert path.name in ("cases.py", "rivals.py") or not constants & cases.OPERATORS.keys(), path.name


def refuse_to_time(*_: object) -> None:
    raise AssertionError("timed in spite of a red gate")


def test_nothing_is_timed_where_the_check_fails(monkeypatch, capsys) -> None:
    break_lora_linear(monkeypatch, lambda y: y * 1.001)
    monkeypatch.setattr(command, "measure_operator", refuse_to_time)
    assert command.main(["lora_linear", "--quick"]) == 1
    assert "wrong: not timed" in capsys.readouterr().out


def test_nothing_is_timed_where_the_tests_are_red(monkeypatch, tmp_path, capsys) -> None:
    for folder in ("tests", "fastlora"):
        (tmp_path / folder).mkdir()
    (tmp_path / "tests" / "test_lora_linear.py").write_text("def test_red():\n    assert False\n")
    for module in (machine, gate):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(command, "measure_operator", refuse_to_time)
    assert command.main(["lora_linear"]) == 1
    assert "the tests are red: not timed" in capsys.readouterr().out


def test_a_case_beyond_its_bound_is_not_timed(monkeypatch) -> None:
    break_lora_linear(monkeypatch, lambda y: y * 1.001)
    monkeypatch.setattr(session.clock, "time_in_turn", refuse_to_time)
    with pytest.raises(gate.CaseError, match=r"lora_linear cpu, tiny, M 5, .*: the error of y is .*: not timed"):
        list(operators.measure_operator(session.Session(CPU), TINY, 0.01, False))


def test_the_other_cases_are_timed_and_the_command_fails(monkeypatch, capsys) -> None:
    def one_bad(_, case, **__):
        if case.bias:
            raise gate.CaseError("bad, forward: not timed")
        yield row(0.9, 1.2)

    monkeypatch.setattr(command, "cases_of", lambda *_: (replace(TINY, bias=True), TINY))
    monkeypatch.setattr(command, "measure_operator", one_bad)
    assert command.main(["lora_linear", "--no-gate"]) == 1
    printed = capsys.readouterr().out
    assert "case 0.9" in printed
    assert "bad, forward: not timed" in printed


def test_a_torch_compile_that_fails_is_left_out_and_said(monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no compiler\nand a long story")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: fail)
    here = session.Session(CPU)
    rows = list(operators.measure_operator(here, replace(TINY, passes=(FORWARD,)), 0.01, True))
    assert rows and all("peft" in row.seconds and "compiled" not in row.seconds for row in rows)
    assert here.notes[1:] == ["tiny, forward, eager: compiled fails: no compiler"]


@pytest.mark.parametrize("operator", cases.OPERATORS)
def test_command_prints_a_table_and_writes_a_file(monkeypatch, tmp_path, capsys, operator: str) -> None:
    monkeypatch.setattr(command, "cases_of", lambda *_: (TINY_CASES[operator],))
    monkeypatch.setattr(command, "results_folder", lambda: tmp_path)
    monkeypatch.setattr(command, "QUICK_SECONDS", 0.02)
    assert command.main([operator, "--quick", "--json"]) == 0
    printed = capsys.readouterr().out
    assert machine.this_machine(CPU).line() in printed.splitlines()[0]
    (path,) = tmp_path.iterdir()
    assert path.name.endswith(f"-{operator}.json")
    assert path.name.startswith(machine.this_machine(CPU).date)
    content = json.loads(path.read_text())
    assert content["command"] == f"python -m benchmarks {operator} --quick --json"
    assert content["machine"]["versions"]["torch"] == torch.__version__
    assert {row["pass"] for row in content["rows"]} == set(BOTH)
    for row in content["rows"]:
        assert row["ratios"]["frozen"] == 1.0
        assert row["seconds"]["fastlora"] > 0
        assert row["error"]["error"] <= row["error"]["bound"]
        assert row["limit"] > 0
    lines = printed.split(f"\n{operator}: time over")[1].splitlines()
    (rule,) = (number for number, line in enumerate(lines) if set(line) == {"-", " "})
    body = list(itertools.takewhile(bool, lines[rule + 1 :]))
    assert len(body) == len(content["rows"])
    chosen = sum(row["chosen"] for row in content["rows"])
    assert f"of {chosen} rows" in printed


def row(ratio: float, peft: float, chosen: bool = True) -> operators.Row:
    error = gate.Error("y", 1e-7, 1e-7, 3e-7)
    seconds = {"frozen": 1e-3, "merged": 1e-3, "peft": peft * 1e-3, "fastlora": ratio * 1e-3}
    ratios = {"frozen": 1.0, "merged": 1.0, "peft": peft, "fastlora": ratio}
    peaks = {"peft": None, "fastlora": 5 * 2**20}
    name = f"case {ratio}"
    return operators.Row(
        name, "M 1", "float32", FORWARD, "cpu", chosen, 9, seconds, ratios, peaks, 10, 10, 0.5, "flops", error
    )


def test_table_puts_the_worst_first_and_counts_losses() -> None:
    text = table.operator_table(
        "lora_linear", [row(0.8, 1.2), row(1.5, 1.2), row(1.1, 1.2), row(9.0, 1.2, chosen=False)], []
    )
    places = [text.index(f"case {ratio}") for ratio in (9.0, 1.5, 1.1, 0.8)]
    assert places == sorted(places)
    assert "slower than PEFT or PEFT compiled in 1 of 3 rows" in text


def test_table_aligns_its_columns() -> None:
    lines = table.render(["name", "time"], [["a", "1.5"], ["longer", "10"]]).splitlines()
    assert lines == ["name    time", "------  ----", "a        1.5", "longer    10"]


def test_quantities_read_well() -> None:
    assert [table.seconds(value) for value in (2.5, 0.0123, 4.2e-5)] == ["2.5 s", "12.3 ms", "42 us"]
    assert [table.mebibytes(value) for value in (None, 2**19, 300 * 2**20)] == ["-", "0.5", "300"]


def test_block_is_seven_layers_whose_shared_x_gets_the_sum_of_their_gradients(monkeypatch) -> None:
    case = replace(TINY_BLOCK, dtype=torch.float32, dropout_p=0.0)
    block = rivals.make_layer(case, True, CPU)
    monkeypatch.setattr(rivals, "make_layer", lambda *_: block)
    contest = rivals.build(case, True, CPU)
    outputs = {name: rival.call(0) for name, rival in contest.rivals.items() if name != "compiled"}
    assert len(outputs["frozen"]) == 7 and not torch.equal(outputs["frozen"][0], outputs["peft"][0])
    attention = block.self_attn
    dq, dk, dv = contest.dy[:3]
    dx = dq @ attention.q_proj.weight + dk @ attention.k_proj.weight + dv @ attention.v_proj.weight
    torch.testing.assert_close(contest.run("frozen", True)(0)[0], dx)
    for name in ("fastlora", "addmm"):
        torch.testing.assert_close(contest.run(name, True)(0), contest.run("peft", True)(0))


def measured_goals() -> session.Record:
    record = session.Record()
    assert session.measure_lines(goals.layer_lines(), CPU, record, lambda: None, lambda _: None, float("inf"))
    return record


def test_goals_are_those_of_the_shape_and_a_wrong_layer_is_not_timed(monkeypatch) -> None:
    training = replace(TINY, passes=(TRAINING,))
    rows = [replace(TINY, K=4096, M=M, passes=(FORWARD,)) for M in (1, 4)]
    monkeypatch.setattr(goals, "GOAL_LAYERS", (training, *rows))
    monkeypatch.setattr(goals, "GOAL_CELLS", (training, replace(training, R=1), *rows))
    monkeypatch.setattr(goals, "SECONDS", 0.01)
    monkeypatch.setattr(goals, "CELL_SECONDS", 0.01)
    monkeypatch.setattr(goals, "product_rate", lambda *_: 1e9)
    monkeypatch.setattr(goals, "bandwidths", lambda _: {"read": 1e9})
    record = measured_goals()
    layer, one_row, four_rows, cells = record.rows
    assert record.failed == [] and len(record.notes) == 1 and record.notes[0].startswith("cells, ")
    M, K, N, R = training.M, training.K, training.N, training.R
    limit = (4 * M * K * N + 6 * M * R * (K + N)) / 1e9 + M * K * training.dtype.itemsize / 1e9
    assert goals.limit(training, CPU) == pytest.approx(limit)
    assert layer.goal == 1.15 and layer.ours == pytest.approx(layer.seconds["fastlora"] / limit)
    assert layer.frozen == pytest.approx(layer.seconds["frozen"] / limit) and "addmm" in layer.rivals
    assert one_row.goal == goals.ONE_ROW[TINY.dtype] and four_rows.goal is four_rows.is_met() is one_row.frozen is None
    assert one_row.ours == pytest.approx(one_row.seconds["fastlora"] / one_row.seconds["frozen"])
    assert cells.goal == 0 and cells.ours in range(5) and cells.what.startswith("cells of 4 ")
    assert cells.is_met() == (cells.ours == 0)
    break_lora_linear(monkeypatch, lambda y: y * 1.1)
    record = measured_goals()
    assert record.rows == [] and len(record.failed) == 4
    assert sum("not timed" in line for line in record.notes) == 4


GOALS = [
    goals.Goal("layers", "small", "float32", 0.8, 0.5, 1.2, 0.4),
    goals.Goal("layers", "large", "float32", 0.9, 0.91, 1.4),
    goals.Goal("rows", "eight", "float32", None, 0.5, 1.2),
    goals.Goal("rate", "all", "float32", 0.7, 0.71, 0.4, at_least=True),
]


def test_goals_are_met_or_not_and_make_the_tables() -> None:
    assert [goal.is_met() for goal in GOALS] == [True, False, None, True]
    assert not replace(GOALS[0], ours=float("nan")).is_met()
    assert "2 of 3 goals are met" in table.goals_table(GOALS, [])
    rate = goals.Goal("rate of tokens", "all", "float32", None, 1234.5, 1000.0, unit="tokens/s")
    assert table.goals_markdown([*GOALS, rate]).splitlines()[2:] == [
        "| layers | ≤ 0.80 to 0.90 | 0.50 to 0.91 | 1.20 to 1.40 | 1 of 2 |",
        "| rate | ≥ 0.70 | 0.71 | 0.40 | 1 of 1 |",
        "| rate of tokens |  | 1,234 tokens/s | 1,000 tokens/s |  |",
    ]


def test_command_writes_the_goals_and_makes_the_readme_of_them(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(command, "model_step_lines", lambda _: {})
    monkeypatch.setattr(command, "layer_lines", lambda: {"all": lambda _: iter(GOALS)})
    monkeypatch.setattr(command, "results_folder", lambda: tmp_path)
    assert command.main(["--readme"]) == 1
    assert "python -m benchmarks goals --device cpu --json" in capsys.readouterr().err
    assert command.main(["goals", "--no-gate", "--json"]) == 0
    assert table.goals_table(GOALS, []) in capsys.readouterr().out
    assert command.main(["--readme"]) == 0
    assert capsys.readouterr().out.endswith(f":\n\n{table.goals_markdown(GOALS)}\n\n")


def test_lines_can_be_chosen_by_their_titles(monkeypatch, capsys) -> None:
    def line(said: str):
        return lambda _: iter([replace(GOALS[0], what=said)])

    monkeypatch.setattr(command, "model_step_lines", lambda _: {})
    monkeypatch.setattr(command, "layer_lines", lambda: {f"all, {one}": line(one) for one in ("float32", "bfloat16")})
    assert command.main(["goals", "--no-gate", "--matching", "float32"]) == 0
    printed = capsys.readouterr().out
    assert "float32" in printed and "bfloat16" not in printed
    assert command.main(["goals", "--no-gate", "--matching", "float8"]) == 2
    assert (
        "--matching: got 'float8', which no line of goals has: all, float32, all, bfloat16" in capsys.readouterr().err
    )


def test_the_readme_has_the_newest_goals_and_every_file(capsys) -> None:
    folder = Path(command.__file__).parent
    text = (folder / "README.md").read_text()
    measured = [verb for verb in ("goals", "families") if any(folder.glob(f"results/*-{verb}.json"))]
    assert "goals" in measured
    for verb in measured:
        assert command.main([verb, "--readme", "--out", str(folder / "results")]) == 0
        tables = re.findall(r"^(\|.*?)\n\n", capsys.readouterr().out, re.MULTILINE | re.DOTALL)
        assert tables and all(f"\n\n{one}\n\n" in text for one in tables)
    listed = re.findall(r"^\| `([\w/]+\.\w+)` \|", text, re.MULTILINE)
    files = [path for path in folder.rglob("*") if path.suffix in (".py", ".sh") and path.name != "__init__.py"]
    assert sorted(listed) == sorted(path.relative_to(folder).as_posix() for path in files)


@pytest.mark.parametrize("arguments", [["lora"], ["--device", "tpu"], ["--device", "mps"], ["--fast"]])
def test_wrong_arguments_end_with_2(arguments: list[str], capsys) -> None:
    assert command.main(arguments) == 2
    assert arguments[-1] in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_a_missing_card_is_said(capsys) -> None:
    assert command.main(["--device", "cuda"]) == 2
    assert "finds no CUDA device" in capsys.readouterr().err


def test_training_steps_are_timed_in_turn_and_agree() -> None:
    result = step.measure_step(TINY_STEP, CPU)
    assert result.rounds == 2
    assert all(len(losses) == 3 for losses in result.losses.values())
    for ours, theirs in zip(result.losses["fastlora"], result.losses["peft"], strict=True):
        assert abs(ours - theirs) <= 1e-4 * theirs
    assert sum(result.implementations.values()) == 8  # q, k, v, o, gate, up, down, and the frozen head
    assert result.ratio > 0
    text = table.step_table([{"case": TINY_STEP, "result": result}], [])
    assert f"in {int(result.ratio > 1)} of 1 rows" in text


def test_a_training_process_that_fails_says_why() -> None:
    with (
        step.Worker(replace(TINY_STEP, R=0), "peft", CPU) as worker,
        pytest.raises(step.StepError, match=r"peft, tiny:(.|\n)*ValueError"),
    ):
        worker.step()


@pytest.mark.parametrize("loss", [9.0, float("nan")])
def test_steps_whose_losses_differ_are_not_timed(loss: float) -> None:
    with pytest.raises(step.StepError, match="tiny: the first loss of fastlora is"):
        step.require_agreement({"peft": 4.0, "fastlora": loss}, 1e-5, "tiny")
    step.require_agreement({"peft": 4.0, "fastlora": 4.1}, 0.03, "tiny")
    step.require_agreement({"peft": 4.0, "fastlora": 4.0000001}, 1e-5, "tiny")
