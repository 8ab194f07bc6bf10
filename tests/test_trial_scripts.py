"""What becomes of what a process apart says, and of how it ends: scripts in its place, which import nothing."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from measurements import entry

from fastlora.choice import trial
from fastlora.choice.problems import Problem

TODO = [Problem("lora_linear", torch.float32, 64, size, False) for size in ("small", "large")]
FOUND = [entry(0.5), entry(0.5, "lora_linear_backward")]
HEAD = (
    "import json, os, signal, sys, time",
    "names, device, seconds, refused = json.loads(sys.argv[1])",
    "def say(*line): print(json.dumps(line), flush=True)",
    "signal.signal(signal.SIGINT, signal.SIG_DFL)",  # a shell's background jobs are born without it
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


END = "no more is measured on cpu: "


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (("os._exit(3)",), "its process ended with code 3"),
        (("sys.exit()",), "its process ended with code 0"),
        (("sys.stderr.write('first\\nlast\\n')", "sys.exit(1)"), "last"),
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
