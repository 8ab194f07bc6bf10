"""python -m benchmarks [lora_linear multi_lora prefix_concat step goals launch] [--quick] [--json] [--out FOLDER] [--device cuda] [--no-gate]

Runs the tests of each operator named (all by default), and times it only if they are green: fastlora against the
frozen layer alone, PEFT, PEFT under torch.compile, torch's products and the merged weight. `goals` fills the table of
what fastlora wants to reach on this kind of device (on a CPU, `step` adds its rows), `launch` says what a call of a
small layer costs the host. Exit codes: 0 done, 1 something was wrong and was not timed, 2 wrong arguments, 3 (goals)
something broke this process: `--resume` goes on in another one, without it.
"""

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from . import gate
from .card_goals import BARE_LINES, card_lines
from .cases import OPERATORS, cases_of, dtype_name
from .goals import HUNG_CODE, OUT_OF_TIME, Goal, Line, Record, cpu_lines, measure_lines, step_goals
from .launch import launch_lines
from .machine import Limits, Machine, measure_limits, results_folder, this_machine
from .operators import Row, measure_operator
from .session import Session
from .step import StepError, measure_step
from .table import goals_markdown, goals_table, operator_table, step_table

QUICK_SECONDS = 4.0
QUICK_LINES = 1  # of the goals on a card


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks", description="Test fastlora's operators, then time them.")
    add = parser.add_argument
    add("operators", nargs="*", metavar="operator", help=f"{', '.join(VERBS)} (default: all)")
    add("--quick", action="store_true", help="the first cases only, a short check, no torch.compile: a minute")
    add("--json", action="store_true", help="write DATE-MACHINE-OPERATOR.json")
    add("--out", type=Path, default=None, help="where (default: benchmarks/results); implies --json")
    add("--device", default="cpu", help="cpu (default) or cuda")
    add("--no-gate", action="store_true", help="do not run the tests (each case is still checked)")
    add("--readme", action="store_true", help="only print benchmarks/README.md's table of the newest result file")
    add("--seconds", type=float, default=math.inf, help="goals: begin nothing after that long")
    add("--bare", action="store_true", help="goals on a card: three, of fastlora alone, as CUDA graphs")
    add("--line-seconds", type=float, default=math.inf, help="goals: end the process where one takes longer")
    add("--resume", action="store_true", help="goals: go on from today's result file")
    arguments = parser.parse_args(argv)
    arguments.json |= arguments.out is not None
    arguments.out = arguments.out or results_folder()
    for operator in arguments.operators:
        if operator not in VERBS:
            parser.error(f"operator: got {operator!r}, expected one of {', '.join(VERBS)}")
    try:
        device = torch.device(arguments.device)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        parser.error(f"--device: got {arguments.device!r}, expected cpu or cuda")
    if arguments.bare and device.type == "cpu":
        parser.error("--bare: measures goals on a card: expected --device cuda")
    if device.type == "cuda" and not arguments.readme and not torch.cuda.is_available():
        parser.error(f"--device: got {arguments.device!r}, but torch {torch.__version__} finds no CUDA device")
    return arguments


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _is_green(name: str, device: torch.device, arguments: argparse.Namespace) -> bool:
    """Run the gate of an operator, or of a training step, and say what it was; what else is measured is checked case by case."""
    wrong: list[str] = []
    tests = None if arguments.quick else gate.tests_of(name)
    if arguments.no_gate:
        said = "the tests were not run (--no-gate)"
    elif tests is not None:
        print(f"{name}: running {tests}", flush=True)
        if gate.run_tests(tests):
            return True
        said, wrong = "the tests are red: not timed", [tests]
    elif name == "step":
        said = "no tests were run; without dropout the losses must agree"
    elif name in OPERATORS:
        wrong = gate.check(name, device)
        reason = "--quick" if arguments.quick else "its tests are not here"
        outcome = "wrong: not timed" if wrong else "all within their bounds"
        said = f"the tests were not run ({reason}); every implementation against the float64 reference: {outcome}"
    else:
        return True
    print("\n  ".join([f"{name}: {said}", *wrong]), flush=True)
    return not wrong


@dataclasses.dataclass(frozen=True)
class Command:
    """What is to be measured, on which machine, and where the results go."""

    arguments: argparse.Namespace
    argv: Sequence[str]
    device: torch.device
    machine: Machine
    deadline: float = math.inf  # in seconds of time.perf_counter
    limits: Limits | None = None  # None where no operator is timed
    steps: list[Goal] = dataclasses.field(default_factory=list)  # the goals of the training steps that were measured

    def write(self, name: str, result: dict[str, Any]) -> Path:
        return self.machine.write(self.arguments.out, name, ["python -m benchmarks", *self.argv], result)

    def show(self, name: str, table: str, result: dict[str, Any]) -> None:
        """Print the table, and write the result where that was asked for."""
        print(f"\n{table}", flush=True)
        if self.arguments.json:
            print(f"written: {self.write(name, result)}", flush=True)


def _operator(name: str, command: Command) -> int:
    quick, limits, session = command.arguments.quick, command.limits, Session(command.device)
    assert limits is not None  # measured where there is an operator to time
    cases = cases_of(name, command.device, quick)
    budget = (QUICK_SECONDS if quick else OPERATORS[name].seconds) / sum(len(case.passes) for case in cases)
    session.notes += ["torch.compile was left out (--quick)"] if quick else []
    rows: list[Row] = []
    not_timed: list[str] = []
    for number, case in enumerate(cases, 1):
        _say(f"{name} {number}/{len(cases)}: {case.name}")
        try:
            rows.extend(measure_operator(case, session, limits, budget, not quick))
        except gate.CaseError as error:
            not_timed.append(str(error))
    result = {"limits": limits, "rows": rows, "notes": session.notes, "not_timed": not_timed}
    command.show(name, operator_table(name, rows, [*session.notes, *not_timed]), result)
    return int(bool(not_timed))


def _steps(name: str, command: Command) -> int:
    quick, found = command.arguments.quick, []
    try:
        for case in cases_of(name, command.device, quick):
            _say(f"step: {case.name}, {dtype_name(case.dtype)}")
            found.append((case, measure_step(case, command.device)))
    except StepError as error:
        print(f"\n{name}: {error}", flush=True)
        return 1
    rows = [{"case": case, "result": result} for case, result in found]
    command.show(name, step_table(found), {"rows": rows})
    if command.device.type == "cpu" and not quick:
        command.steps.extend(step_goals(rows))
    return 0


def _goals(name: str, command: Command) -> int:
    """On a CPU with those of the training steps, where `step` was measured, too."""
    quick, on_card = command.arguments.quick, command.machine.device == "cuda"
    if quick and not on_card:
        print("goals: left out (--quick)", flush=True)
        return 0
    lines = card_lines() if on_card else cpu_lines(command.steps)
    if command.arguments.bare:
        return _lines("first", {line: lines[line] for line in BARE_LINES}, command)
    return _lines(name, dict(list(lines.items())[: QUICK_LINES if quick else None]), command)


def _lines(name: str, lines: Mapping[str, Line], command: Command) -> int:
    """Saved after every figure."""
    arguments, record = command.arguments, Record()
    path = command.machine.path(arguments.out, name)
    if arguments.resume and path.is_file():
        content = json.loads(path.read_text())
        kept = {part: content[part] for part in ("notes", "begun", "failed", "refused")}
        record = Record(rows=[Goal(**row) for row in content["rows"]], **kept)
        record.notes = [note for note in record.notes if not note.endswith(OUT_OF_TIME)]

    def save() -> None:
        if arguments.json:
            command.write(name, vars(record))

    limits = command.deadline, arguments.bare, arguments.line_seconds
    whole = measure_lines(lines, command.device, record, save, _say, *limits)
    print(f"\n{goals_table(record.rows, record.notes)}" if record.rows else "\n".join(record.notes), flush=True)
    return int(len(record.begun) < len(lines) or bool(record.failed)) if whole else HUNG_CODE


# What can be asked for, in the order in which it is measured; each returns an exit code.
VERBS: dict[str, Callable[[str, Command], int]] = {
    **dict.fromkeys(OPERATORS, _operator),
    "step": _steps,
    "goals": _goals,
    "launch": lambda name, command: _lines(name, launch_lines(), command),
}


def _print_readme(device: torch.device, folder: Path) -> int:
    """Print benchmarks/README.md's table of the newest result file of the goals on this kind of device; returns the exit code."""
    contents = [json.loads(path.read_text()) for path in sorted(folder.glob("*-goals.json"))]
    found = [content for content in contents if content["machine"].get("device", "cpu") == device.type]
    if not found:
        _say(f"{folder} holds no goals: run python -m benchmarks goals --device {device.type} --json")
        return 1
    print(goals_markdown([Goal(**row) for row in found[-1]["rows"]]))
    return 0


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
    names = [name for name in VERBS if name in (arguments.operators or VERBS)]
    machine, limits = this_machine(device), None
    print(machine.line(), flush=True)
    green = [name for name in names if _is_green(name, device, arguments)]
    dtypes = {case.dtype for name in green if name in OPERATORS for case in cases_of(name, device, arguments.quick)}
    if dtypes:
        limits = measure_limits(device, sorted(dtypes, key=dtype_name))
        print(limits.line(), flush=True)
    command = Command(arguments, argv, device, machine, start + arguments.seconds, limits)
    codes = [int(len(green) < len(names)), *(VERBS[name](name, command) for name in green)]
    _say(f"{time.perf_counter() - start:.0f} s in all")
    return max(codes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
