"""python -m benchmarks [lora_linear multi_lora prefix_concat step] [--quick] [--json] [--device cuda] [--no-gate] [--readme]

Runs the tests of each operator named (all by default), and times it only if they are green: fastlora against the
frozen layer alone, PEFT, PEFT under torch.compile and the merged weight. On a CPU lora_linear and step also fill the
table of the goals. Exit codes: 0 done, 1 something was wrong and was not timed, 2 wrong arguments.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import gate
from .cases import OPERATORS, cases_of, dtype_name, steps_of
from .goals import Goal, measure_goals, step_goals
from .machine import Limits, Machine, describe, measure_limits, results_folder
from .measure import CaseError, Row, measure
from .step import StepError, measure_step
from .table import goals_markdown, goals_table, operator_table, step_table

ALL = (*OPERATORS, "step")
SECONDS = {"lora_linear": 30.0, "multi_lora": 30.0, "prefix_concat": 16.0}  # of timing alone, on all cases
QUICK_SECONDS = 4.0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks", description="Test fastlora's operators, then time them.")
    parser.add_argument("operators", nargs="*", metavar="operator", help=f"{', '.join(ALL)} (default: all)")
    parser.add_argument(
        "--quick", action="store_true", help="the first cases only, a short check, no torch.compile: a minute"
    )
    parser.add_argument("--json", action="store_true", help="write benchmarks/results/DATE-MACHINE-OPERATOR.json")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--no-gate", action="store_true", help="do not run the tests (each case is still checked)")
    parser.add_argument(
        "--readme", action="store_true", help="print the README's table of the newest result file, only"
    )
    arguments = parser.parse_args(argv)
    for operator in arguments.operators:
        if operator not in ALL:
            parser.error(f"operator: got {operator!r}, expected one of {', '.join(ALL)}")
    try:
        device = torch.device(arguments.device)
    except RuntimeError:
        parser.error(f"--device: got {arguments.device!r}, expected cpu or cuda")
    if device.type not in ("cpu", "cuda"):
        parser.error(f"--device: got {arguments.device!r}, expected cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
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


def _write(machine: Machine, operator: str, argv: Sequence[str], result: dict[str, Any]) -> Path:
    folder = results_folder()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{machine.date}-{machine.slug()}-{operator}.json"
    content = {"operator": operator, "command": " ".join(["python -m benchmarks", *argv]), "machine": machine, **result}
    path.write_text(json.dumps(_jsonable(content), indent=1) + "\n")
    return path


def _print_readme() -> int:
    """Print the README's table of the newest result file of the goals; returns the exit code."""
    files = sorted(results_folder().glob("*-goals.json"))
    if not files:
        _say(f"{results_folder()} holds no goals: run python -m benchmarks lora_linear step --json")
        return 1
    print(goals_markdown([Goal(**row) for row in json.loads(files[-1].read_text())["rows"]]))
    return 0


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
    if arguments.readme:
        return _print_readme()
    device = torch.device(arguments.device)
    operators = [operator for operator in ALL if operator in (arguments.operators or ALL)]
    machine = describe(device)
    print(machine.line(), flush=True)
    green = [operator for operator in operators if _is_green(operator, device, arguments)]
    failed = len(green) < len(operators)

    limits = None
    dtypes = {case.dtype for name in green if name != "step" for case in cases_of(name, device, arguments.quick)}
    if dtypes:
        limits = measure_limits(device, sorted(dtypes, key=dtype_name))
        print(_limits_line(limits), flush=True)
    goals: list[Goal] = []
    not_timed: list[str] = []
    for operator in green:
        try:
            table, result = _measure(operator, device, limits, arguments.quick)
        except StepError as error:
            print(f"\n{operator}: {error}", flush=True)
            failed = True
            continue
        failed |= bool(result.get("not_timed"))
        print(f"\n{table}", flush=True)
        if arguments.json:
            print(f"written: {_write(machine, operator, argv, result)}", flush=True)
        if device.type == "cpu" and not arguments.quick:
            if operator == "lora_linear":
                goals += measure_goals(_say, not_timed)
            elif operator == "step":
                goals += step_goals(result["rows"])
    failed |= bool(not_timed)
    if goals:
        print(f"\n{goals_table(goals, not_timed)}", flush=True)
        if arguments.json:
            written = _write(machine, "goals", argv, {"rows": goals, "not_timed": not_timed})
            print(f"written: {written}", flush=True)
    _say(f"{time.perf_counter() - start:.0f} s in all")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
