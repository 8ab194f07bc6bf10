"""What becomes of what a process apart says, and of how it ends: scripts in its place, which import nothing."""

import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from measurements import entry

from fastlora.choice import trial
from fastlora.choice.problems import Problem

TODO = [Problem("lora_linear", torch.float32, 64, size, False) for size in ("small", "large")]
END = "no more is measured on cpu: "
FOUND = [entry(0.5), entry(0.5, "lora_linear_backward")]
HEAD = (
    "import json, os, signal, sys, time",
    "names, device, seconds, refused = json.loads(sys.argv[1])",
    "def say(*line): print(json.dumps(line), flush=True)",
    # A shell's background jobs are born without the first, nohup's without the second.
    "for one in (signal.SIGINT, signal.SIGHUP): signal.signal(one, signal.SIG_DFL)",
)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs these lines in the process apart; returns what `_apart` yields, what is refused by then, and the words of its warnings."""

    def run(*lines: str, refused: tuple[Any, ...] = ()) -> Any:
        monkeypatch.setattr(trial, "ANSWER", "\n".join((*HEAD, *lines)))
        known = set(refused)
        with pytest.warns(UserWarning) as told:
            yielded = list(trial._apart(TODO, torch.device("cpu"), 0.25, known))
        return yielded, known, [str(one.message) for one in told if "fastlora" in str(one.message)]

    return run


def test_it_is_asked_for_what_is_left_and_told_what_is_refused(script: Callable[..., Any]) -> None:
    """A second process goes on where the first ended, which was begun with what was refused before."""
    here = ("rms_norm", "float32", "cpu")
    yielded, refused, told = script(
        "say('warning', f'fastlora: {len(names)} {names[0][1:]} {device} {seconds} {sorted(refused)}')",
        f"found = json.loads({json.dumps(FOUND)!r})",
        "if len(names) == 2:",
        "    say('trying', ['lora_linear', ['cpu']])",
        "    say('found', [found, refused])",
        "    say('trying', ['lora_linear_backward', ['cpu plain', 'cpu product']])",
        "    os._exit(7)",
        "say('found', [[], refused + [['swiglu', 'float32', 'cpu']]])",
        refused=(here,),
    )
    assert yielded == [FOUND, []] and all(type(one) is type(FOUND[0]) for one in yielded[0])
    apart = [("lora_linear_backward", "float32", f"cpu {way}") for way in ("plain", "product")]
    assert refused == {here, *apart, ("swiglu", "float32", "cpu")}
    first, ended, second = told
    assert first == f"fastlora: 2 ['float32', 64, 'small', False] cpu 0.25 {[list(here)]}"
    assert ended == (
        "fastlora: cpu plain, cpu product is refused for lora_linear_backward: its process ended with code 7"
    )
    assert second == f"fastlora: 1 ['float32', 64, 'large', False] cpu 0.25 {sorted(map(list, (here, *apart)))}"


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (("os._exit(3)",), "its process ended with code 3"),
        (("sys.exit()",), "its process ended with code 0"),
        (("sys.stderr.write('first\\nlast\\n')", "sys.exit(1)"), f"{END}last"),
        (("sys.stderr.write('alone')",), f"{END}alone"),
        (("say('ended', 'a fault')", "sys.stderr.write('a trace')", "sys.exit(1)"), "a fault"),
        (("sys.stderr.write('noise')", "sys.stderr.flush()", "os.abort()"), "it ended its process (SIGABRT)"),
        (
            ("say('trying', ['lora_linear', ['cpu']])", "say('trying', ['lora_linear', []])", "os.abort()"),
            "it ended its",
        ),
        *(
            (("say('trying', ['a', ['cpu']])", f"os.kill(os.getpid(), signal.{one})"), one)
            for one in trial.FROM_OUTSIDE
        ),
    ],
)
def test_how_it_ended(lines: tuple[str, ...], words: str, script: Callable[..., Any]) -> None:
    yielded, refused, told = script(*lines)
    assert yielded == [] and refused == set()
    assert len(told) == 1 and told[0].startswith(f"fastlora: {END}") and words in told[0]


def test_what_ends_its_process_is_to_blame(script: Callable[..., Any]) -> None:
    """By a signal of its own; those from outside, above, are no kernel's fault."""
    _, refused, told = script("if not refused: say('trying', ['a', ['cpu']])", "if not refused: os.abort()")
    assert refused == {("a", "float32", "cpu")}
    assert told[0] == "fastlora: cpu is refused for a: it ended its process (SIGABRT)"


def test_what_says_nothing_is_ended(script: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "PATIENCE", 1.0)
    assert script("time.sleep(600)")[2] == [f"fastlora: {END}it did not end within 1 s"]


class Watchdog:
    """In the place of threading.Timer: it is never patient too long, and notes what becomes of it."""

    def __init__(self, seconds: float, function: Callable[[], None]) -> None:
        self.waits = [one for one in Watchdog.all if one.said == ["started"]]  # at the same time
        self.seconds, self.function, self.daemon, self.said = seconds, function, False, []
        Watchdog.all.append(self)

    all: list["Watchdog"] = []

    def start(self) -> None:
        assert self.daemon  # or Python could not end before it
        self.said.append("started")

    def cancel(self) -> None:
        self.said.append("cancelled")


def test_each_word_is_waited_for_anew(script: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """By one watchdog at a time, the last of which watches the end, too; none outlives the process."""
    monkeypatch.setattr(Watchdog, "all", [])
    monkeypatch.setattr("threading.Timer", Watchdog)
    script("say('warning', 'fastlora: one')", "say('warning', 'fastlora: two')")
    assert [one.seconds for one in Watchdog.all] == [trial.PATIENCE] * 3
    assert all(one.said[:2] == ["started", "cancelled"] and not one.waits for one in Watchdog.all)
    assert all(one.function.__name__ == "kill" for one in Watchdog.all)


def test_no_file_is_left_open(script: Callable[..., Any]) -> None:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in trial._run_apart(TODO, torch.device("cpu"), 0.25, set()):
            ...
    assert found == []


@pytest.mark.parametrize("python", ["", None])
def test_where_python_does_not_know_itself(python: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a program that has Python in it."""
    monkeypatch.setattr(sys, "executable", python)
    ((kind, words),) = trial._run_apart(TODO, torch.device("cpu"), 0.25, set())
    assert kind == "ended" and words.startswith("no process can be started: ")


@pytest.mark.parametrize(("kind", "expected"), [("cpu", "_here"), ("cuda", "_apart")])
def test_where_a_fault_ends_the_process_it_is_one_apart(
    kind: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[str] = []
    for place in ("_here", "_apart"):
        monkeypatch.setattr(trial, place, lambda *_, place=place: places.append(place) or [[]])
    assert list(trial._measured(TODO, torch.device(kind), 0.25, set())) == [[]]
    assert places == [expected]


def test_what_others_are_measured_with_is_known_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    learnt: list[Any] = []
    monkeypatch.setattr(trial, "one_class", lambda problem, *_: [entry(0.5, problem.op)])
    monkeypatch.setattr(trial.table, "learn", lambda *what: learnt.append(what))
    todo = [one._replace(op=op) for one, op in zip(TODO, ("lora_linear", "frozen_linear"), strict=True)]
    found = list(trial._here(todo, torch.device("cpu"), 0.25, set()))
    assert found == [[entry(0.5, "lora_linear")], [entry(0.5, "frozen_linear")]]
    assert learnt == [("cpu", found[1])]


def test_what_is_tried_again_though_it_is_refused_ends_it(script: Callable[..., Any]) -> None:
    _, refused, told = script("say('trying', ['a', ['cpu']])", "sys.exit(4)")
    assert refused == {("a", "float32", "cpu")}
    assert told == [
        "fastlora: cpu is refused for a: its process ended with code 4",
        f"fastlora: {END}its process ended with code 4",
    ]


def test_the_modules_and_the_input_of_the_process_apart(
    script: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, tmp_path, str(tmp_path / "modules")])
    _, _, told = script(
        "print('a word of welcome')",
        "print({})",
        "path = os.environ['PYTHONPATH'].split(os.pathsep)",
        "say('warning', f'fastlora: {path[-1]} {sys.stdin.read()!r} {sys.flags.safe_path}')",
        "[say('found', [[], []]) for _ in names]",
    )
    assert told == [f"fastlora: {tmp_path / 'modules'} '' True"]


def test_a_process_is_ended_where_nobody_listens_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ("say('warning', str(os.getpid()))", "time.sleep(600)")
    monkeypatch.setattr(trial, "ANSWER", "\n".join((*HEAD, *lines)))
    said = trial._run_apart(TODO, torch.device("cpu"), 0.25, set())
    kind, pid = next(said)
    said.close()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)
    assert kind == "warning"
