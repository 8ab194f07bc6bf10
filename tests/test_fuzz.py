"""Ten thousand hostile files for each reader (fuzz.py; `make fuzz` has a million), and proof that a fault would be seen."""

import random
import sys
from pathlib import Path

import fuzz
import pytest

CASES = 10_000


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_hostile_files(name: str) -> None:
    fuzz.run(name, range(CASES))


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_a_fault_is_told_with_its_number(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same number is the same file; an exception that is not the reader's own ends the run."""
    seen: list[fuzz.Files] = []

    def read(folder: Path, files: fuzz.Files) -> None:
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
        seen.append(files)
        if len(seen) == 4:
            raise RecursionError("a fault")

    monkeypatch.setitem(fuzz.TARGETS, name, fuzz.TARGETS[name]._replace(read=read))
    with pytest.raises(AssertionError, match=rf"fuzz.py {name} --first 7 --cases 1: RecursionError"):
        fuzz.run(name, range(5, 100))
    fuzz.run(name, range(7, 8))
    assert seen[3] == seen[-1] != seen[0]


@pytest.mark.parametrize(("words", "run"), [([], list(fuzz.TARGETS)), (["table"], ["table"]), (["tables"], [])])
def test_the_command_runs_what_is_named_or_else_all(
    words: list[str], run: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[str, range]] = []
    monkeypatch.setattr(fuzz, "run", lambda *case: seen.append(case))
    monkeypatch.setattr(sys, "argv", ["fuzz.py", *words, "--cases", "12000"])
    try:
        fuzz.main()
    except SystemExit as end:
        assert end.code == 2 and not run and "got 'tables', expected " in capsys.readouterr().err
    assert seen == [(name, cases) for name in run for cases in (range(10_000), range(10_000, 12_000))]


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_most_cases_are_changed_and_differ(name: str) -> None:
    target = fuzz.TARGETS[name]
    good = target.files()
    cases = [target.change(random.Random(f"{name} {case}"), good) for case in range(200)]
    assert sum(files != good for files in cases) > 150
    assert len({tuple(sorted(files.items())) for files in cases}) > 150
