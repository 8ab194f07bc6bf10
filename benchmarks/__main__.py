"""python -m benchmarks [VERB ...] [--quick] [--json] [--out FOLDER] [--device cuda] [--no-gate]

The verbs are lora_linear, multi_lora, prefix_concat, step, goals, launch, prompts, families, sweep, serve, adapters, trainers and model.
Runs the tests of each operator named (all by default), and times it only if they are green: fastlora against the
frozen layer alone, PEFT, PEFT under torch.compile, torch's products and the merged weight. `goals` fills the table of
what fastlora wants to reach on this kind of device (on a CPU with a whole training step in its first rows: of random weights
of SmolLM2-135M's shape, or of --model on --data), `launch` says what a call of a small layer costs the host; `prompts` in which settings soft prompts
are right on a CPU, and what they cost there; `families` that, DoRA, quantised bases and a mixture's experts; `sweep` what adapters gain that are
trained in one batch; `serve` what many clients of `fastlora serve` get over one at a time; `adapters` what many adapters on one base want to reach,
those two's goals among them;
`trainers` whether six trainers train six kinds of models the same with fastlora as without;
`model` where an H100's time would go by the kernels' instructions, reckoned and not measured.
Exit codes: 0 done, 1 something was wrong and was not timed, 2 wrong arguments, 3 (goals) something broke
this process: `--resume` goes on in another one, without it.
"""

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import gate
from .adapters import adapter_lines, adapters_table
from .card_goals import BARE_LINES, card_lines
from .cases import OPERATORS, cases_of
from .families import family_lines
from .goals import Goal, layer_lines
from .launch import launch_lines
from .machine import Machine, results_folder, this_machine
from .model import model_lines, model_table
from .model_steps import Material
from .model_steps import step_lines as model_step_lines
from .operators import measure_operator
from .prompts import prompt_lines
from .serve import serve_lines
from .session import HUNG_CODE, OUT_OF_TIME, Line, Record, measure_lines
from .step import step_lines
from .sweep import sweep_lines, sweep_table
from .table import goals_markdown, goals_table, operator_table, step_table
from .trainers import trainer_lines, trainers_table

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
    add(
        "--readme",
        action="store_true",
        help="only print benchmarks/README.md's table of the newest result file, of goals or families",
    )
    add("--matching", default="", metavar="TEXT", help="only the lines whose title has this in it, as float32")
    add("--seconds", type=float, default=math.inf, help="goals: begin nothing after that long")
    add("--bare", action="store_true", help="goals on a card: three, of fastlora alone, as CUDA graphs")
    add(
        "--model",
        help="goals on a CPU, serve, adapters: the model of the training step or of the server, a folder or a hub id",
    )
    add("--data", type=Path, help="goals on a CPU, adapters: its rows, JSONL of prompt and completion, or messages")
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
    if arguments.readme and {*arguments.operators} - {"goals", "families"}:
        parser.error(
            f"--readme: got {', '.join(arguments.operators)}, expected goals or families, whose tables are there"
        )
    if arguments.bare and device.type == "cpu":
        parser.error("--bare: measures goals on a card: expected --device cuda")
    if arguments.data is not None and not arguments.data.is_file():
        parser.error(f"--data: got {str(arguments.data)!r}, expected a file")
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
        wrong, reason = gate.check(name, device), "--quick" if arguments.quick else "its tests are not here"
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


def _operator_lines(name: str, command: Command) -> dict[str, Line]:
    quick = command.arguments.quick
    cases = cases_of(name, command.device, quick)
    budget = (QUICK_SECONDS if quick else OPERATORS[name].seconds) / sum(len(case.passes) for case in cases)
    return {
        case.title(True): partial(measure_operator, case=case, budget=budget, with_compile=not quick) for case in cases
    }


def _goal_lines(command: Command) -> dict[str, Line]:
    arguments = command.arguments
    if command.machine.device == "cpu":
        material = Material(arguments.model, arguments.data)
        return {} if arguments.quick else model_step_lines(material) | layer_lines()
    lines = card_lines()
    lines = {line: lines[line] for line in BARE_LINES} if arguments.bare else lines
    return dict(list(lines.items())[: QUICK_LINES if arguments.quick else None])


def _only_on_a_cpu(lines: Callable[[], dict[str, Line]], command: Command) -> dict[str, Line]:
    return lines() if command.machine.device == "cpu" and not command.arguments.quick else {}


def _serve_lines(command: Command) -> dict[str, Line]:
    return _only_on_a_cpu(partial(serve_lines, Material(command.arguments.model)), command)


def _adapter_lines(command: Command) -> dict[str, Line]:
    arguments = command.arguments
    on_a_cpu = command.machine.device == "cpu"
    return adapter_lines(Material(arguments.model, arguments.data), arguments.quick) if on_a_cpu else {}


Lines = Callable[[Command], dict[str, Line]]
Table = Callable[[Sequence[Any], Sequence[str]], str]  # of rows and notes

# What can be asked for, in the order in which it is measured.
VERBS: dict[str, tuple[Lines, Table]] = {
    **{name: (partial(_operator_lines, name), partial(operator_table, name)) for name in OPERATORS},
    "step": (lambda command: step_lines(cases_of("step", command.device, command.arguments.quick)), step_table),
    "goals": (_goal_lines, goals_table),
    "launch": (lambda _: launch_lines(), goals_table),
    "prompts": (partial(_only_on_a_cpu, prompt_lines), goals_table),
    "families": (partial(_only_on_a_cpu, family_lines), goals_table),
    "sweep": (lambda command: sweep_lines(command.arguments.quick), sweep_table),
    "serve": (_serve_lines, goals_table),
    "adapters": (_adapter_lines, adapters_table),
    "trainers": (lambda command: trainer_lines(command.arguments.quick), trainers_table),
    "model": (lambda _: model_lines(), model_table),
}
WITHIN = {"prompts", "adapters"}
"""What is measured by itself only where it is named: another verb has all of it, or most of it is others'."""


def _measure(name: str, command: Command) -> int:
    """Measure a verb's lines, saved after every row where that was asked for, and print their table; returns the exit code."""
    arguments, machine, record = command.arguments, command.machine, Record()
    lines_of, table = VERBS[name]
    lines = lines_of(command)
    matching = {title: line for title, line in lines.items() if arguments.matching in title}
    if lines and not matching:
        _say(f"--matching: got {arguments.matching!r}, which no line of {name} has: {', '.join(lines)}")
        return 2
    lines = matching
    if not lines:
        why = "--quick" if arguments.quick else "measured on a CPU only"
        print(f"{name}: left out ({why})", flush=True)
        return 0
    file = "first" if arguments.bare and name == "goals" else name
    path = machine.path(arguments.out, file)
    if arguments.resume and path.is_file() and table is goals_table:
        content = json.loads(path.read_text())
        kept = {part: content[part] for part in ("notes", "begun", "failed", "refused")}
        record = Record(rows=[Goal(**row) for row in content["rows"]], **kept)
        record.notes = [note for note in record.notes if not note.endswith(OUT_OF_TIME)]

    def save() -> None:
        if arguments.json:
            machine.write(arguments.out, file, ["python -m benchmarks", *command.argv], vars(record))

    patience = command.deadline, arguments.bare, arguments.line_seconds
    whole = measure_lines(lines, command.device, record, save, lambda text: _say(f"{name} {text}"), *patience)
    nothing = "\n".join([f"{name}: nothing was timed", *record.notes])
    print(f"\n{table(record.rows, record.notes) if record.rows else nothing}", flush=True)
    if arguments.json:
        print(f"written: {path}", flush=True)
    return int(len(record.begun) < len(lines) or bool(record.failed)) if whole else HUNG_CODE


def _print_readme(name: str, device: torch.device, folder: Path) -> int:
    """Print benchmarks/README.md's tables of that verb, of each kind of machine with such a device the newest; returns the exit code."""
    contents = [json.loads(path.read_text()) for path in sorted(folder.glob(f"*-{name}.json"))]
    found = {one["machine"]["kind"]: one for one in contents if one["machine"].get("device", "cpu") == device.type}
    if not found:
        _say(f"{folder} holds no {name}: run python -m benchmarks {name} --device {device.type} --json")
        return 1
    for kind, content in found.items():
        print(f"{kind}, {content['machine']['date']}:\n\n{goals_markdown([Goal(**row) for row in content['rows']])}\n")
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
        return max(_print_readme(name, device, arguments.out) for name in arguments.operators or ["goals"])
    wanted = arguments.operators or VERBS.keys() - WITHIN
    names = [name for name in VERBS if name in wanted]
    machine = this_machine(device)
    print(machine.line(), flush=True)
    green = [name for name in names if _is_green(name, device, arguments)]
    command = Command(arguments, argv, device, machine, start + arguments.seconds)
    codes = [int(len(green) < len(names)), *(_measure(name, command) for name in green)]
    _say(f"{time.perf_counter() - start:.0f} s in all")
    return max(codes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
