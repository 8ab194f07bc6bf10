"""`make gpu` rehearsed with a card that hangs, faults and is slow: benchmarks/gpu.sh with its commands replaced, and its runner of tests with tests
that end their process in every way that a card has."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

ROOT = Path(__file__).parent.parent

# One file of tests: what follows what breaks its process must run in another one, or it fails, too.
FAULTY = """
import os, signal, subprocess, sys, time
import pytest

broken = False

@pytest.fixture(autouse=True)
def card():
    assert not broken, "CUDA error: the card was of no use before"

def test_first(): pass

def test_wrong(): assert 1 == 2, "beyond its bound"

def test_after_a_failure(): pass

def test_hangs():
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    while True: time.sleep(0.1)

def test_after_a_hang(): pass

def test_faults():
    global broken
    broken = True
    print("fastlora: block 3, thread 96 waited in vain for the boxes of a stage, stage 2, tile 7")
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

def test_after_a_fault(): pass

def test_dies(): os.kill(os.getpid(), signal.SIGSEGV)

def test_leaves(): os._exit(3)

@pytest.mark.skip(reason="no such card")
def test_skipped(): pass

@pytest.mark.parametrize("case", ["float16, float32 adapter", "a::b [c]"])
def test_last(case): pass
"""
SLOW = """
import time

def test_slow(): time.sleep(60)
"""


def runner(folder: Path, *options: str, **files: str) -> "subprocess.Popen[str]":
    (folder / "pytest.ini").write_text("[pytest]\n")
    for name, text in files.items():
        (folder / f"test_{name}.py").write_text(text)
    paths = [str(folder / f"test_{name}.py") for name in files]
    command = [sys.executable, "benchmarks/card_tests.py", "--out", str(folder), "--within", str(folder), *options]
    quick = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    # A shell's background jobs, and what they start, ignore SIGINT.
    heeds = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(
        [*command, *paths], cwd=ROOT, env=quick, stdout=subprocess.PIPE, text=True, preexec_fn=heeds
    )


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "tests.json").read_text())


def test_no_test_takes_others_with_it(tmp_path: Path) -> None:
    options = "--test-seconds", "3", "--processes", "2", "--piece", "20"
    run = runner(tmp_path, *options, faulty=FAULTY, broken="import no_such_module", good="def test(): pass")
    said_at_once, _ = run.communicate(timeout=100)
    content = results(tmp_path)
    outcomes = {test.partition("::")[2]: one["outcome"] for test, one in content["tests"].items()}
    assert outcomes == {
        "test_first": "passed",
        "test_wrong": "failed",
        "test_after_a_failure": "passed",
        "test_hangs": "hung, ended after 3 s",
        "test_after_a_hang": "passed",
        "test_faults": "failed",
        "test_after_a_fault": "passed",
        "test_dies": "ended its process by SIGSEGV",
        "test_leaves": "ended its process with exit code 3",
        "test_skipped": "skipped",
        "test_last[float16, float32 adapter]": "passed",
        "test_last[a::b [c]]": "passed",
        "test": "passed",
    }
    assert run.returncode == 1 and content["running"] == [] and content["counts"]["passed"] == 7
    (unlisted,) = content["unlisted"].values()
    assert "no_such_module" in unlisted
    said = {test.partition("::")[2]: one["said"] for test, one in content["tests"].items()}
    assert "beyond its bound" in said["test_wrong"] and "illegal memory access" in said["test_faults"]
    assert "waited in vain for the boxes of a stage, stage 2, tile 7" in said["test_faults"]
    assert "in test_hangs" in said["test_hangs"]
    assert "HUNG, ENDED AFTER 3 S: test_faulty.py::test_hangs" in said_at_once
    suite = ElementTree.parse(tmp_path / "tests.xml").getroot()
    assert len(suite) == 13 and len(suite.findall(".//failure")) == 5 and len(suite.findall(".//skipped")) == 1


def test_a_runner_that_is_stopped_says_which_test_ran(tmp_path: Path) -> None:
    run = runner(tmp_path, "--processes", "1", "--piece", "1", good="def test(): pass", slow=SLOW)
    began = time.monotonic()
    while not (tmp_path / "tests.json").exists() or results(tmp_path)["running"] != ["test_slow.py::test_slow"]:
        assert run.poll() is None and time.monotonic() - began < 60
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    said, _ = run.communicate(timeout=30)
    outcomes = [one["outcome"] for one in results(tmp_path)["tests"].values()]
    assert outcomes == ["passed", "running when time was up"] and run.returncode != 0
    assert "RUNNING WHEN TIME WAS UP: test_slow.py::test_slow" in said and (tmp_path / "tests.xml").exists()


# torch says that there is a card, and the commands of `make gpu` do what commands on a card may do.
STUB = """#!/usr/bin/env bash
echo "$*" >>"$STUB_LOG"
case "$*" in
  *"torch.cuda.is_available"*) printf '%s\\n' '{"name": "Some Card", "date": "today", "commit": "c0ffee"}' some-card-sm90 ;;
  *"--build-lib"*) mkdir -p build/checked/fastlora ;;
  *card_tests.py*) exit "${STUB_TESTS:-0}" ;;
  *card_summary.py*) exec "$REAL" "$@" ;;
  *"--bare"*--resume*) exit 0 ;;
  *"--bare"*) exit 3 ;;
  *"benchmarks goals"*) kill -KILL $$ ;;
  *"fastlora tune"*) sleep 60 ;;
esac
"""


def gpu(folder: Path, *arguments: str, **environment: str) -> "subprocess.Popen[str]":
    """In a copy of the script's folder."""
    stub = folder / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    (folder / "benchmarks").mkdir()
    for name in ("gpu.sh", "card_summary.py"):
        shutil.copy(ROOT / "benchmarks" / name, folder / "benchmarks")
    return subprocess.Popen(
        ["bash", "benchmarks/gpu.sh", "--out", str(folder / "out"), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHON": str(stub), "REAL": sys.executable, "STUB_LOG": str(folder / "log"), **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def parts(folder: Path) -> dict[str, str]:
    content = json.loads((folder / "out" / "gpu.json").read_text())
    assert content["machine"]["name"] == "Some Card" and content["command"].startswith("benchmarks/gpu.sh build")
    return {part["part"]: part["state"] for part in content["parts"]}


def test_a_part_that_is_slow_dies_or_fails_takes_no_other_with_it(tmp_path: Path) -> None:
    run = gpu(tmp_path, LIMIT_TUNE="1", STUB_TESTS="1")
    said, _ = run.communicate(timeout=60)
    assert parts(tmp_path) == {
        "build": "done",
        "test": "failed (1)",
        "bare": "done",
        "counters": "done",
        "tune": "out of time",
        "bench": "failed (137)",
        "sanitize": "done",
        "plot": "done",
    }
    assert run.returncode == 1 and said.endswith(
        "make gpu: test: failed (1)\nmake gpu: tune: out of time\nmake gpu: bench: failed (137)\n"
    )
    assert "Some Card, today, commit c0ffee" in said and "tune: out of time" in said
    calls = (tmp_path / "log").read_text().splitlines()
    tests = next(call for call in calls if "card_tests.py" in call)
    assert (
        f"--within {tmp_path}/build/checked" in tests and "tests/test_cuda_card.py tests/test_lora_linear.py" in tests
    )
    bare = [call for call in calls if "--bare" in call]
    assert len(bare) == 2 and "--resume" not in bare[0] and bare[1].endswith("--bare --resume")
    assert sum("benchmarks goals" in call and "--bare" not in call for call in calls) == 1  # what killed it may again
    assert any("benchmarks launch" in call for call in calls)
    assert any(f"--output {tmp_path}/out/some-card-sm90.json" in call for call in calls)
    assert "build_ext --inplace" in (tmp_path / "log").read_text()


def test_a_part_of_the_script_stands_alone(tmp_path: Path) -> None:
    run = gpu(tmp_path, "first", "build", "test")
    run.communicate(timeout=60)
    assert list(parts(tmp_path)) == ["build", "test", "bare", "counters"] and run.returncode == 0


def test_a_script_that_is_killed_has_said_what_ran(tmp_path: Path) -> None:
    run = gpu(tmp_path, "build", "tune")
    log, began = tmp_path / "log", time.monotonic()
    while not log.exists() or "fastlora tune" not in log.read_text():
        assert run.poll() is None and time.monotonic() - began < 60
        time.sleep(0.05)
    run.kill()
    run.wait(30)
    assert parts(tmp_path) == {"build": "done", "tune": "running"}


def test_the_limits_are_those_that_are_told() -> None:
    """Two hundred seconds for what a card must say first, and less than ten minutes for the rest."""
    script = (ROOT / "benchmarks" / "gpu.sh").read_text()
    limits = {name: int(seconds) for name, seconds in re.findall(r"\[(\w+)\]=(\d+)", script)}
    several = dict(re.findall(r'\[(first|rest)\]="([^"]+)"', script))
    total = {name: sum(limits[part] for part in its_parts.split()) for name, its_parts in several.items()}
    assert total == {"first": 200, "rest": 490}
    for name, seconds in total.items():
        assert re.search(rf"^#   {name} +{several[name]}: {seconds} seconds$", script, re.MULTILINE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_make_gpu_says_that_there_is_no_card(tmp_path: Path) -> None:
    def say(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", "benchmarks/gpu.sh", "--out", str(tmp_path), *arguments]
        environment = {**os.environ, "PYTHON": sys.executable}
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=60
        )

    done = say()
    assert done.returncode == 1 and "torch sees no CUDA card" in done.stdout
    assert say("every").returncode == 2
