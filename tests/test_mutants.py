"""The mutation tester kills what a test holds, names what none holds, and its list of explained mutants is of code that is there."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import mutants
import pytest

HELD = """
import functools


def sign(x):
    if x < 0:
        return -1
    return 1


class Box:
    @functools.cache
    def is_full(self):
        return True


def loose(x, limit):
    while x > limit:
        x = x - 1
    if x is None or limit is None:
        raise ValueError("x")
    return x
"""
TESTS = """
import held
from held import Box, sign

BOX = Box()


def test_sign():
    assert [sign(x) for x in (-3, 0, 2)] == [-1, 1, 1]


assert BOX.is_full()


def test_box():
    assert BOX.is_full() is True


def test_loose():
    held.loose(1, 3)
"""


TRACED = """
def twice(x):
    return x * 2


def outer(x):
    return twice(x) + 1
"""
TESTS_OF_TRACED = """
import torch
import held


def test_compiled():
    compiled = torch.compile(held.outer, backend="eager", fullgraph=True)
    assert compiled(torch.ones(2)).tolist() == [3.0, 3.0]
"""


def try_mutants(folder: Path, tests: str, *options: str, held: str = HELD) -> tuple[int, list[str], str]:
    """The exit status, the survivors and the last line."""
    (folder / "held.py").write_text(held)
    (folder / "test_held.py").write_text(tests)
    command = [sys.executable, mutants.__file__, "--jobs=1", "--tests=test_held.py", *options, "held.py"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    return done.returncode, [line for line in lines if line.startswith("held.py:")], lines[-1]


def test_kills_what_is_held_and_names_what_is_not(tmp_path: Path) -> None:
    status, lived, summary = try_mutants(tmp_path, TESTS)
    assert status == 1
    assert "held.py:20  loose: x is None or limit is None -> False" in lived
    assert "held.py:21  loose: raise ValueError('x') -> pass" in lived
    assert all("loose: " in line for line in lived)  # sign and the cached Box.is_full are held
    total, killed = map(int, re.match(r"(\d+) mutants: (\d+) killed, 0 explained", summary).groups())
    assert total == killed + len(lived) and killed >= 8


def test_a_sample_is_drawn_by_its_seed(tmp_path: Path) -> None:
    first, again = (try_mutants(tmp_path, TESTS, "--sample=6", "--seed=3") for _ in range(2))
    assert first == again and first[2].startswith("6 mutants: ")


def test_a_matching_name_is_tried_alone(tmp_path: Path) -> None:
    assert try_mutants(tmp_path, TESTS, "--matching=sign: x < 0")[2].startswith("4 mutants: 4 killed")


def test_what_torch_compile_traces_is_held_by_who_compiles_it(tmp_path: Path) -> None:
    """It is not called: its part of the graph is."""
    status, lived, last = try_mutants(tmp_path, TESTS_OF_TRACED, "--matching=twice: ", held=TRACED)
    assert (status, lived) == (0, []) and last.startswith("3 mutants: 3 killed")


def test_tests_that_fail_without_a_mutant_are_told(tmp_path: Path) -> None:
    status, lived, last = try_mutants(tmp_path, TESTS + "\n\ndef test_wrong():\n    assert sign(1) == 2\n")
    assert status == 2 and not lived and "test_held.py::test_wrong" in last


def test_every_explained_mutant_is_one() -> None:
    names = {
        one.name for path in map(Path, mutants.MODULES) for one in mutants.mutants_of(path, ast.parse(path.read_text()))
    }
    assert not mutants.explained() - names


@pytest.mark.parametrize("module", mutants.MODULES)
def test_every_module_has_its_tests(module: str) -> None:
    assert all(list(mutants.TESTS.glob(f"test_{pattern}.py")) for pattern in mutants.MODULES[module])
