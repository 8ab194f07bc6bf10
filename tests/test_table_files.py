"""choice/table.py's files: the cache, the shipped tables and a named one are read anew, and whatever is wrong with one is told."""

import json
import math
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from measurements import ON_A_CPU, a_machine, choose, entry, half_times, needs_native, restart, small_weights, spoil  # noqa: F401  (fixtures)

from fastlora import operators, ops
from fastlora.choice import problems, table, trial
from fastlora.frozen import packed


@needs_native
def test_the_cache_lasts_and_goes_before_the_shipped_table(machine: Path) -> None:
    shipped = table.SHIPPED / f"{table.kind_of('cpu')}.json"
    table.write(shipped, "cpu", [entry(2.0), entry(2.0, rows=512)], "a test")
    restart()
    assert (choose(64), choose(512)) == ("reference", "reference")
    assert table.kind_of("cpu") in operators.lora_linear.choose(torch.ones(64, 1), torch.ones(1, 1)).reason
    assert table.keep("cpu", [entry(0.5)], "a test") == machine
    restart()
    assert (choose(64), choose(512)) == ("cpu", "reference")
    assert "this machine" in operators.lora_linear.choose(torch.ones(64, 1), torch.ones(1, 1)).reason
    assert [path.name for path in machine.parent.iterdir()] == [machine.name]  # nothing half-written is left


@needs_native
@pytest.mark.parametrize("other", [{"threads": 3}, {"isa": "z80"}, {"threads": None}])
def test_what_was_shipped_for_another_setting_holds_until_the_trial(
    other: dict[str, Any], machine: Path, timed: list[list[str]]
) -> None:
    """A machine with more threads, or FASTLORA_ISA's, is measured once, as one of an unknown kind is."""
    shipped = table.SHIPPED / f"{table.kind_of('cpu')}.json"
    classes = problems.listed("cpu", ["lora_linear"], [torch.float32], ["small"])
    known = [
        entry(2.0, op, one.rows, one.size, one.dropout)
        for one in classes
        for op in ("lora_linear", "lora_linear_backward")
    ]
    table.write(shipped, "cpu", known, "a test")
    restart()
    assert choose() == "reference"
    trial.try_out(small_weights())
    assert timed == []  # what was shipped is of this very setting
    spoil(shipped, **other)
    restart()
    assert choose() == "reference"
    assert "measured on" in operators.lora_linear.choose(torch.ones(64, 1), torch.ones(1, 1)).reason
    assert len(table.state()["cpu"]) == len(table.entries("cpu")) == len(known)
    trial.try_out(small_weights())
    assert timed != [] and choose() == "cpu"
    restart()
    assert choose() == "cpu"  # from the cache, which goes before
    table.load_state({"cpu": []})
    assert table.entries("cpu") == []


def test_the_smallest_ratio_can_be_read_again(machine: Path) -> None:
    table.keep("cpu", [table.record("lora_linear", torch.float16, 64, "small", False, "cpu", 1e-5)], "a test")
    restart()
    assert [one.ratio for one in table.entries("cpu")] == [0.001]


@needs_native
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (None, "Expecting"),
        ({"schema": 0}, "schema is 0, expected 1"),
        ({"torch": "1.0"}, "torch is '1.0'"),
        ({"kind": "z80"}, "kind is 'z80'"),
        ({"entries": [{"op": "lora_linear"}]}, "missing"),
        (
            {"entries": [{**entry(0.5)._asdict(), "ratio": "fast"}]},
            r"entries\[0\]: ratio='fast': expected float or None",
        ),
        ({"entries": None}, "entries: expected a list"),
    ],
)
def test_a_bad_cache_is_ignored_with_a_warning_and_replaced(
    changes: dict[str, Any] | None, message: str, machine: Path, timed: list[list[str]]
) -> None:
    table.keep("cpu", [entry(2.0)], "a test")
    if changes is None:
        machine.write_text(machine.read_text()[:-20])
    else:
        for one in changes.get("entries") or []:
            one.pop("origin", None)
        spoil(machine, **changes)
    restart()
    with pytest.warns(UserWarning, match=f"cache is ignored.*{re.escape(machine.name)}.*{message}"):
        assert choose() == "cpu"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trial.try_out(small_weights())
    restart()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(table.entries("cpu")) == 8  # forward and backward: 1, 8, 64 rows, and 64 with dropout


ENTRY = {**entry(0.5)._asdict(), "way": ""}
WRONG_TABLES: dict[str, Any] = {
    "no object": [],
    "null": None,
    "no entries": {"schema": 1, "entries": None},
    "entries of numbers": {"schema": 1, "entries": [3]},
    **{
        f"{name} is {value!r}": {"schema": 1, "entries": [{**ENTRY, name: value}]}
        for name, value in [
            ("op", ["lora_linear"]),
            ("dtype", {}),
            ("rows", 64.0),
            ("rows", 3),
            ("size", "huge"),
            ("dropout", 0),
            ("implementation", None),
            ("checked", 1),
            ("ratio", 0),
            ("ratio", -1.0),
            ("ratio", math.nan),
            ("ratio", math.inf),
            ("ratio", True),
            ("ratio", "0.5"),
            ("ratio", None),
            ("way", "nonsense"),
            ("way", []),
            ("without_copy", "nonsense"),
            ("without_copy", []),
            ("colour", "blue"),
        ]
    },
}


@pytest.mark.parametrize("content", WRONG_TABLES.values(), ids=WRONG_TABLES)
def test_a_wrong_table_is_an_error_that_names_it(
    content: Any, machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = tmp_path / "table.json"
    for one in content["entries"] or [] if isinstance(content, dict) else []:
        if isinstance(one, dict):
            one.pop("origin", None)
    named.write_text(json.dumps(content))
    monkeypatch.setenv("FASTLORA_TABLE", str(named))
    restart()
    with pytest.raises(ValueError, match=r"FASTLORA_TABLE: .*table\.json is no table for this machine"):
        table.entries("cpu")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[" * 100_000, b'{"schema": ' + b"1" * 5000 + b"}", b"\0" * 64])
def test_a_table_that_is_no_json(
    content: bytes, machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = tmp_path / "table.json"
    named.write_bytes(content)
    monkeypatch.setenv("FASTLORA_TABLE", str(named))
    restart()
    with pytest.raises(ValueError, match=r"FASTLORA_TABLE: .*table\.json is no table for this machine"):
        table.entries("cpu")


@pytest.mark.parametrize("name", ["none.json", "."])
def test_a_table_that_is_no_file_is_an_error_that_names_the_variable(
    name: str, machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTLORA_TABLE", str(tmp_path / name))
    restart()
    with pytest.raises(OSError, match=re.escape(f"FASTLORA_TABLE={tmp_path / name}: expected a file made by")):
        table.entries("cpu")


@needs_native
def test_a_named_table_stands_alone(
    machine: Path, timed: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table.keep("cpu", [entry(0.5), entry(0.5, rows=1)], "a test")
    named = tmp_path / "table.json"
    table.write(named, "cpu", [entry(2.0)], "a test")
    spoil(named, kind="z80", torch="1.0")
    monkeypatch.setenv("FASTLORA_TABLE", str(named))
    restart()
    assert (choose(64), choose(1)) == ("reference", "reference")
    trial.try_out(small_weights())
    assert timed == []
    spoil(named, schema=0)
    restart()
    with pytest.raises(ValueError, match="table.json is no table for this machine: schema is 0, expected 1"):
        choose()


@needs_native
def test_a_cache_that_cannot_be_written_is_told(machine: Path) -> None:
    machine.parent.write_text("a file where the folder would be")
    with pytest.warns(UserWarning, match="cannot be kept"):
        assert table.keep("cpu", [entry(2.0)], "a test") is None
    assert choose() == "reference"


def shipped_tables() -> list[Path]:
    return sorted(table.SHIPPED.glob("*.json"))


LEFT_TO_THE_TRIAL = {
    "amd-zen4-avx512bf16": [
        *("frozen_linear", "multi_lora_shared", "attention", "rms_norm", "rotary", "swiglu"),
        *map(table.rank_case, table.RANKS),
    ]
}
"""What a table was made before: there each machine measures it for itself."""


@pytest.mark.parametrize("path", shipped_tables(), ids=lambda path: path.stem)
def test_shipped_tables_are_whole(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each covers every class of its kind of machine, and everything in it passed its check."""
    if json.loads(path.read_text())["isa"] == "avx2":
        # Torch has no library for 16 bits there, and fewer classes are measured.
        monkeypatch.setattr(packed, "has_library", lambda dtype: dtype is torch.float32)
    covered = [op for op in ON_A_CPU if op not in LEFT_TO_THE_TRIAL.get(path.stem, [])]
    shipped = table._read(path, {"schema": table.SCHEMA, "kind": path.stem})
    assert all(one.checked for one in shipped.values())
    table.load_state({"cpu": shipped.values()})
    for problem in problems.listed("cpu", covered, ops.KERNEL_DTYPES, list(problems.SHAPES)):
        for op in (problem.op, f"{problem.op}_backward"):
            assert table.has("cpu", op, *problem[1:]), (op, problem)
