"""python -m benchmarks [lora_linear multi_lora prefix_concat step goals launch] [--quick] [--json] [--out FOLDER] [--device cuda] [--no-gate]

Runs the tests of each operator named (all by default), and times it only if they are green: fastlora against the
frozen layer alone, PEFT, PEFT under torch.compile, torch's products and the merged weight. `goals` fills the table of
what fastlora wants to reach on this kind of device (on a CPU, `step` adds its rows), `launch` says what a call of a
small layer costs the host. Exit codes: 0 done, 1 something was wrong and was not timed, 2 wrong arguments, 3 (goals on
a card) something broke this process: `--resume` goes on in another one, without it.
"""

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastlora import writing

from . import gate
from .card_goals import BARE_LINES, HUNG_CODE, OUT_OF_TIME, Record, Session, card_lines, measure_card
from .cases import OPERATORS, cases_of, dtype_name, steps_of
from .goals import Goal, measure_goals, step_goals
from .launch import launch_rows
from .machine import Limits, Machine, describe, measure_limits, results_folder
from .measure import CaseError, Row, measure
from .step import StepError, measure_step
from .table import goals_markdown, goals_table, launch_table, operator_table, step_table

ALL = (*OPERATORS, "step", "goals", "launch")
SECONDS = {"lora_linear": 30.0, "multi_lora": 30.0, "prefix_concat": 16.0}  # of timing alone, on all cases
QUICK_SECONDS = 4.0
QUICK_LINES = 1  # of the goals on a card


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks", description="Test fastlora's operators, then time them.")
    parser.add_argument("operators", nargs="*", metavar="operator", help=f"{', '.join(ALL)} (default: all)")
    parser.add_argument(
        "--quick", action="store_true", help="the first cases only, a short check, no torch.compile: a minute"
    )
    parser.add_argument("--json", action="store_true", help="write DATE-MACHINE-OPERATOR.json")
    parser.add_argument("--out", type=Path, default=None, help="where (default: benchmarks/results); implies --json")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--no-gate", action="store_true", help="do not run the tests (each case is still checked)")
    parser.add_argument(
        "--readme", action="store_true", help="print the README's table of the newest result file, only"
    )
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="goals on a card: begin nothing after that long"
    )
    parser.add_argument(
        "--bare",
        action="store_true",
        help="goals on a card: three of them, of fastlora alone, as CUDA graphs: half a minute",
    )
    parser.add_argument(
        "--line-seconds", type=float, default=math.inf, help="goals on a card: end the process where one takes longer"
    )
    parser.add_argument("--resume", action="store_true", help="goals on a card: go on from today's result file")
    arguments = parser.parse_args(argv)
    arguments.json |= arguments.out is not None
    arguments.out = arguments.out or results_folder()
    for operator in arguments.operators:
        if operator not in ALL:
            parser.error(f"operator: got {operator!r}, expected one of {', '.join(ALL)}")
    try:
        device = torch.device(arguments.device)
    except RuntimeError:
        parser.error(f"--device: got {arguments.device!r}, expected cpu or cuda")
    if device.type not in ("cpu", "cuda"):
        parser.error(f"--device: got {arguments.device!r}, expected cpu or cuda")
    if device.type == "cuda" and not arguments.readme and not torch.cuda.is_available():
        parser.error(f"--device: got {arguments.device!r}, but torch {torch.__version__} finds no CUDA device")
    return arguments


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _is_green(operator: str, device: torch.device, arguments: argparse.Namespace) -> bool:
    """Run the gate of one operator and say what it was."""
    if arguments.no_gate:
        print(f"{operator}: the tests were not run (--no-gate)", flush=True)
        return True
    if gate.has_tests(operator) and not arguments.quick:
        print(f"{operator}: running tests/test_{gate.test_stem(operator)}.py", flush=True)
        if gate.run_tests(operator):
            return True
        print(f"{operator}: the tests are red: not timed", flush=True)
        return False
    if operator in ("goals", "launch"):
        return True  # each case is checked before it is timed, or is timed for what it costs the host
    if operator == "step":
        print("step: no tests were run; without dropout the losses must agree", flush=True)
        return True
    wrong = gate.check(operator, device)
    reason = "--quick" if arguments.quick else "its tests are not here"
    outcome = "wrong: not timed" if wrong else "all within their bounds"
    print(
        f"{operator}: the tests were not run ({reason}); every implementation against the float64 reference: {outcome}"
    )
    for line in wrong:
        print(f"  {line}")
    return not wrong


def _measure(operator: str, device: torch.device, limits: Limits | None, quick: bool) -> tuple[str, dict[str, Any]]:
    """(the table to print, what the result file holds) of one operator."""
    if operator == "step":
        steps = []
        for case in steps_of(device, quick):
            _say(f"step: {case.name}, {dtype_name(case.dtype)}")
            steps.append((case, measure_step(case, device)))
        return step_table(steps), {"rows": [{"case": case, "result": result} for case, result in steps]}
    assert limits is not None  # measured where there is an operator to time
    cases = cases_of(operator, device, quick)
    budget = (QUICK_SECONDS if quick else SECONDS[operator]) / sum(len(case.passes) for case in cases)
    rows: list[Row] = []
    notes: list[str] = ["torch.compile was left out (--quick)"] if quick else []
    not_timed: list[str] = []
    for number, operator_case in enumerate(cases, 1):
        _say(f"{operator} {number}/{len(cases)}: {operator_case.name}")
        try:
            for row in measure(operator, operator_case, device, limits, budget, not quick, notes):
                rows.append(row)
        except CaseError as error:
            not_timed.append(str(error))
    result = {"limits": limits, "rows": rows, "notes": notes, "not_timed": not_timed}
    return operator_table(operator, rows, [*notes, *not_timed]), result


def _jsonable(value: Any) -> Any:
    """For json: dtypes by name, dataclasses and named tuples as objects."""
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        # pass_ is "pass", which Python keeps for itself
        return {field.name.rstrip("_"): _jsonable(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if hasattr(value, "_asdict"):
        return _jsonable(value._asdict())
    if isinstance(value, dict):
        return {_jsonable(key): _jsonable(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(entry) for entry in value]
    return value


def _path(machine: Machine, operator: str, folder: Path) -> Path:
    return folder / f"{machine.date}-{machine.slug()}-{operator}.json"


def _write(machine: Machine, operator: str, argv: Sequence[str], folder: Path, result: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = _path(machine, operator, folder)
    content = {"operator": operator, "command": " ".join(["python -m benchmarks", *argv]), "machine": machine, **result}
    writing.whole(path, (json.dumps(_jsonable(content), indent=1) + "\n").encode())
    return path


def _print_readme(device: torch.device, folder: Path) -> int:
    """Print the README's table of the newest result file of the goals on this kind of device; returns the exit code."""
    contents = [json.loads(path.read_text()) for path in sorted(folder.glob("*-goals.json"))]
    found = [content for content in contents if content["machine"].get("device", "cpu") == device.type]
    if not found:
        _say(f"{folder} holds no goals: run python -m benchmarks goals --device {device.type} --json")
        return 1
    print(goals_markdown([Goal(**row) for row in found[-1]["rows"]]))
    return 0


def _measure_card(
    machine: Machine, device: torch.device, arguments: argparse.Namespace, argv: Sequence[str], deadline: float
) -> int:
    """The goals on a card, saved after every figure; returns the exit code."""
    record = Record()
    name = "first" if arguments.bare else "goals"
    path = _path(machine, name, arguments.out)
    if arguments.resume and path.is_file():
        content = json.loads(path.read_text())
        kept = {name: content[name] for name in ("notes", "begun", "failed", "refused")}
        record = Record(rows=[Goal(**row) for row in content["rows"]], **kept)
        record.notes = [note for note in record.notes if not note.endswith(OUT_OF_TIME)]

    def save() -> None:
        if arguments.json:
            _write(machine, name, argv, arguments.out, vars(record))

    lines = {name: card_lines()[name] for name in BARE_LINES} if arguments.bare else card_lines()
    lines = dict(list(lines.items())[:QUICK_LINES]) if arguments.quick else lines
    whole = measure_card(lines, device, record, save, _say, deadline, arguments.bare, arguments.line_seconds)
    print(f"\n{goals_table(record.rows, record.notes)}" if record.rows else "\n".join(record.notes), flush=True)
    if not whole:
        return HUNG_CODE
    return int(len(record.begun) < len(lines) or bool(record.failed))


def _measure_launch(machine: Machine, device: torch.device, arguments: argparse.Namespace, argv: Sequence[str]) -> None:
    notes: list[str] = []
    rows = launch_rows(Session(device, notes))
    print(f"\n{launch_table(rows, notes)}", flush=True)
    if arguments.json:
        print(f"written: {_write(machine, 'launch', argv, arguments.out, {'rows': rows, 'notes': notes})}", flush=True)


def _limits_line(limits: Limits) -> str:
    rates = ", ".join(f"{dtype_name(dtype)} product {rate / 1e9:.0f} GFLOP/s" for dtype, rate in limits.flops.items())
    return f"this machine's limits, measured now: {rates}, copy {limits.bandwidth / 1e9:.0f} GB/s"


def main(argv: Sequence[str]) -> int:
    """Run the benchmarks that the arguments name; returns the exit code."""
    start = time.perf_counter()
    try:
        arguments = _parse(argv)
    except SystemExit as exit_:  # argparse has printed why; `fastlora bench` calls this function
        return exit_.code if isinstance(exit_.code, int) else 2
    device = torch.device(arguments.device)
    if arguments.readme:
        return _print_readme(device, arguments.out)
    operators = [operator for operator in ALL if operator in (arguments.operators or ALL)]
    machine = describe(device)
    print(machine.line(), flush=True)
    green = [operator for operator in operators if _is_green(operator, device, arguments)]
    code = int(len(green) < len(operators))

    limits = None
    dtypes = {case.dtype for name in green if name in OPERATORS for case in cases_of(name, device, arguments.quick)}
    if dtypes:
        limits = measure_limits(device, sorted(dtypes, key=dtype_name))
        print(_limits_line(limits), flush=True)
    steps: list[Goal] = []
    for operator in green:
        if operator == "launch":
            _measure_launch(machine, device, arguments, argv)
        elif operator == "goals" and device.type == "cuda":
            code = max(code, _measure_card(machine, device, arguments, argv, start + arguments.seconds))
        elif operator == "goals" and arguments.quick:
            print("goals: left out (--quick)", flush=True)
        elif operator == "goals":
            code = max(code, _measure_goals(machine, steps, arguments, argv))
        else:
            try:
                table, result = _measure(operator, device, limits, arguments.quick)
            except StepError as error:
                print(f"\n{operator}: {error}", flush=True)
                code = max(code, 1)
                continue
            code = max(code, int(bool(result.get("not_timed"))))
            print(f"\n{table}", flush=True)
            if arguments.json:
                print(f"written: {_write(machine, operator, argv, arguments.out, result)}", flush=True)
            if operator == "step" and device.type == "cpu" and not arguments.quick:
                steps += step_goals(result["rows"])
    _say(f"{time.perf_counter() - start:.0f} s in all")
    return code


def _measure_goals(machine: Machine, steps: list[Goal], arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    """The goals on a CPU, with those of the training steps where `step` was measured too; returns the exit code."""
    not_timed: list[str] = []
    goals = [*measure_goals(_say, not_timed), *steps]
    print(f"\n{goals_table(goals, not_timed)}", flush=True)
    if arguments.json:
        content = {"rows": goals, "not_timed": not_timed}
        print(f"written: {_write(machine, 'goals', argv, arguments.out, content)}", flush=True)
    return int(bool(not_timed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
