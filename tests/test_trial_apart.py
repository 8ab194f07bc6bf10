"""The trial in a process apart, as on a card: whatever ends that process, or never ends, ends no more than one implementation."""

import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
from measurements import a_machine, choose, needs_native, restart, small_weights  # noqa: F401  (a fixture)

from fastlora.choice import table, trial


def apart(monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """Measure in a process apart, as on a GPU, where lora_linear in native C++ is a function with this body."""
    lines = (
        "import os, signal, torch",
        "from fastlora import ops",
        "from fastlora.choice import measure, problems, trial",
        "problems.SHAPES = {'small': (48, 40), 'large': (56, 64)}",
        "measure.ratios = lambda functions, *_: {name: 0.5 for name in functions if name != 'reference'}",
        f"def faulty(*args): {body}",
        "ops.implementations['lora_linear', 'cpu'] = faulty",
        "trial.answer()",
    )
    monkeypatch.setattr(trial, "APART", ("cpu",))
    monkeypatch.setattr(trial, "ANSWER", "\n".join(lines))


@needs_native
@pytest.mark.parametrize(
    ("body", "how"),
    [
        ("os.abort()", "it ended its process (SIGABRT)"),
        ("os._exit(7)", "its process ended with code 7"),
        ("raise SystemExit('a fault')", "a fault"),
        ("raise ValueError('no good')", "it raises ValueError: no good"),
        (
            "print('noise'); y, *state = ops.reference.lora_linear(*args); return [0.5 * one for one in y], *state",
            "the error of result 0 is",
        ),
    ],
)
def test_what_ends_its_process_is_refused_and_the_rest_is_measured(
    body: str, how: str, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apart(monkeypatch, body)
    with pytest.warns(UserWarning, match=f"cpu is refused for lora_linear: .*{re.escape(how)}"):
        trial.try_out(small_weights())
    for _ in range(2):
        assert {choose(rows) for rows in (1, 8, 64)} == {"reference"}
        assert {choose(rows, backward=True) for rows in (1, 8, 64)} == {"cpu"}
        assert len(table.entries("cpu")) == 8
        restart()  # the cache remembers
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trial.try_out({"lora_linear": [torch.empty(1).expand(2048, 2048)]})  # of another class: it is not run again
    assert choose(elements=2**22) == "reference" and choose(elements=2**22, backward=True) == "cpu"


@needs_native
@pytest.mark.parametrize(
    ("body", "how"),
    [
        ("raise torch.OutOfMemoryError('the card is full')", "the card is full"),
        ("raise RuntimeError('Triton Error [CUDA]: out of memory')", "out of memory"),
        ("raise RuntimeError('FASTLORA_ISA=avx1024: expected portable')", "RuntimeError: FASTLORA_ISA=avx1024"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL"),
        ("...\nraise OSError('no driver')", "no driver"),
    ],
)
def test_a_trial_that_cannot_run_blames_no_implementation(
    body: str, how: str, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apart(monkeypatch, body)
    with pytest.warns(UserWarning, match=f"fastlora: no more is measured on cpu: .*{how}"):
        trial.try_out(small_weights())
    assert table.entries("cpu") == [] and not machine.exists()


@needs_native
def test_what_never_ends_is_refused(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = (
        "import json, sys, time",
        "names, *_, refused = json.loads(sys.argv[1])",
        "if refused:",
        "    for _ in names: print(json.dumps(['found', [[], refused]]))",
        "    sys.exit()",
        """print(json.dumps(['trying', ['lora_linear', ['cpu']]]), flush=True)""",
        "time.sleep(600)",
    )
    monkeypatch.setattr(trial, "APART", ("cpu",))
    monkeypatch.setattr(trial, "PATIENCE", 1.0)
    monkeypatch.setattr(trial, "ANSWER", "\n".join(lines))
    with pytest.warns(UserWarning, match="cpu is refused for lora_linear: it did not end within 1 s"):
        trial.try_out(small_weights())


@needs_native
def test_a_process_that_hangs_as_it_ends_is_not_waited_for(
    machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = (
        "import json, os, sys, time",
        "names, *_ = json.loads(sys.argv[1])",
        "for _ in names: print(json.dumps(['found', [[], []]]), flush=True)",
        "os.close(1)",
        "time.sleep(15)",
        f"open({str(tmp_path / 'ended')!r}, 'w')",
        "os._exit(0)",
    )
    monkeypatch.setattr(trial, "APART", ("cpu",))
    monkeypatch.setattr(trial, "PATIENCE", 1.0)
    monkeypatch.setattr(trial, "ANSWER", "\n".join(lines))
    trial.try_out(small_weights())
    assert not (tmp_path / "ended").exists()


@needs_native
def test_a_process_apart_has_this_ones_modules(
    machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """Not those of the working directory, whatever sys.path holds besides, and whatever Python prints as it starts."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "statistics.py").write_text("raise RuntimeError('not this one')")
    (tmp_path / "sitecustomize.py").write_text("print('a word of welcome', flush=True)")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path] + [tmp_path])  # Python passes over a Path
    apart(monkeypatch, "return ops.reference.lora_linear(*args)")
    trial.try_out(small_weights())
    assert len(table.entries("cpu")) == 8
    assert not [one for one in recwarn if "fastlora" in str(one.message)]


@needs_native
def test_no_trial_where_no_process_can_be_started(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "APART", ("cpu",))
    monkeypatch.setattr(sys, "executable", "")
    with pytest.warns(UserWarning, match="no more is measured on cpu: no process can be started"):
        trial.try_out(small_weights())
