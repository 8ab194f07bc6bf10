"""python benchmarks/card_tests.py --out FOLDER [--within FOLDER] [-k EXPRESSION] FILE...: the device tests, none of which takes others with it.

Each file's tests, in their order, are cut into pieces, and each piece is run by a process of its own, some at a time. A test that hangs is ended with
its process after --test-seconds; after one that ends its process, or leaves the card of no more use to it, another process goes on with what is left.
FOLDER/tests.json, written as it goes, says what became of each test, which ones are running, and of what went wrong what was said; tests.xml is the
same as JUnit's. `within` is where the processes run: whose `fastlora` they import. Exit code 0: every test ran and none failed. Nothing but pytest
is needed.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
# After one of these no process computes on its card any more.
BROKEN = re.compile(
    r"CUDA error|CUDA says:|CUDA_ERROR|illegal memory access|unspecified launch failure|device-side assert"
)
BROKEN_CODE = 86  # of a process that leaves the rest to another one
NO_TESTS = 5  # pytest's
START_SECONDS = 60.0  # to import what the tests need
STUCK = "Timeout ("  # what faulthandler begins with
TOLD = 2000  # characters of what was said of one, the last ones


class Events:
    """pytest's plugin in a process that lists or runs tests: it writes down what is found, begins and ends, a JSON object a line."""

    def __init__(self, path: str) -> None:
        self.path = path

    def write(self, **event: Any) -> None:
        with open(self.path, "a") as log:
            log.write(json.dumps(event) + "\n")

    def pytest_collection_finish(self, session: Any) -> None:
        self.write(listed=[item.nodeid for item in session.items])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.write(begun=nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or not report.passed:
            said = "" if report.passed else report.longreprtext[-TOLD:]
            self.write(test=report.nodeid, outcome=report.outcome, seconds=report.duration, said=said)
            if report.failed and BROKEN.search(said):
                import pytest

                pytest.exit("the card is of no more use to this process", returncode=BROKEN_CODE)


class Process:
    """One that lists or runs tests, and what it has written."""

    def __init__(self, tests: list[str], pytest_arguments: list[str], within: Path, folder: Path) -> None:
        self.tests = tests  # that it runs, those that have ended left out
        self.now: str | None = None  # the one that runs
        self.last: str | None = None  # that has ended
        self.since = time.monotonic()  # its beginning
        self.events, self.output, self.read = folder / "events", folder / "output", 0
        folder.mkdir()
        self.events.touch()
        command = [sys.executable, __file__, "worker", str(self.events), *pytest_arguments]
        with open(self.output, "w") as output:
            self.process = subprocess.Popen(
                command, cwd=within, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, process_group=0
            )

    def new_events(self) -> list[dict[str, Any]]:
        content = self.events.read_bytes()
        whole = content.rfind(b"\n") + 1
        lines, self.read = content[self.read : whole].splitlines(), whole
        return [json.loads(line) for line in lines]

    def end(self) -> None:
        """With all that it started."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()

    def said(self) -> str:
        """The end of its output; where a test took long, from where faulthandler says what it was doing, the innermost call first."""
        text = self.output.read_text(errors="replace")
        stuck = text.rfind(STUCK)
        return text[-TOLD:] if stuck < 0 else text[stuck : stuck + TOLD]


class Runner:
    def __init__(self, arguments: argparse.Namespace, scratch: Path) -> None:
        self.arguments, self.scratch, self.began = arguments, scratch, time.monotonic()
        self.started = 0
        self.running: list[Process] = []
        self.pieces: deque[list[str]] = deque()
        self.tests: dict[str, dict[str, Any]] = {}
        self.arguments_of: dict[str, str] = {}  # a test's, for pytest
        self.unlisted: dict[str, str] = {}  # files, and why

    def left(self) -> float:
        return float(self.arguments.seconds) - (time.monotonic() - self.began)

    def start(self, tests: list[str], *pytest_arguments: str) -> Process:
        self.started += 1
        process = Process(tests, [*pytest_arguments], self.arguments.within, self.scratch / str(self.started))
        self.running.append(process)
        return process

    def list_tests(self) -> None:
        """Of every file, at the same time; pieces are made of them in the files' order."""
        expression = ("-k", self.arguments.expression) if self.arguments.expression else ()
        listing = {file: self.start([], "--collect-only", *expression, file) for file in self.arguments.files}
        for file, process in listing.items():
            try:
                code = process.process.wait(max(0.1, min(START_SECONDS, self.left())))
            except subprocess.TimeoutExpired:
                code = None
            process.end()
            self.running.remove(process)
            found = [test for event in process.new_events() for test in event["listed"]]
            if code not in (0, NO_TESTS):
                self.unlisted[file] = process.said()
                print(f"CANNOT BE LISTED: {file}\n{process.said()}", flush=True)
            for test in found:
                self.tests[test] = {"outcome": "not run", "seconds": 0.0, "said": ""}
                self.arguments_of[test] = f"{file}::{test.partition('::')[2]}"
            size = self.arguments.piece
            self.pieces.extend(found[begin : begin + size] for begin in range(0, len(found), size))

    def note(self, test: str, outcome: str, seconds: float, said: str) -> None:
        if self.tests[test]["outcome"] not in ("running", "not run", "passed"):
            return  # what its teardown adds
        self.tests[test] = {"outcome": outcome, "seconds": round(seconds, 2), "said": said}
        if outcome not in ("passed", "skipped"):
            print(f"{outcome.upper()}: {test}\n{said}", flush=True)

    def hear(self, process: Process) -> None:
        for event in process.new_events():
            if "begun" in event:
                process.now, process.since = event["begun"], time.monotonic()
                self.tests[process.now]["outcome"] = "running"
            elif "test" in event:
                self.note(event["test"], event["outcome"], event["seconds"], event["said"])
                process.last = event["test"]
                if event["test"] in process.tests:
                    process.tests.remove(event["test"])
                process.now, process.since = None, time.monotonic()

    def look_at(self, process: Process) -> None:
        code = process.process.poll()  # before its events are read: none comes after
        self.hear(process)
        limit = self.arguments.test_seconds if process.now else START_SECONDS
        if code is None and time.monotonic() - process.since <= limit:
            return
        process.end()
        self.running.remove(process)
        if code is None:
            why = f"hung, ended after {limit:.0f} s"
        elif code < 0:
            why = f"ended its process by {signal.Signals(-code).name}"
        else:
            why = f"ended its process with exit code {code}"
        if code == BROKEN_CODE and process.last:  # what is told as a process ends is of the card
            self.tests[process.last]["said"] += f"\n{process.said()}"
            print(f"the process of {process.last} said:\n{process.said()}", flush=True)
        elif process.now or code not in (0, 1):
            culprits = [process.now] if process.now else list(process.tests)  # of none it is known: nobody tries again
            for test in culprits:
                self.note(test, why, time.monotonic() - process.since, process.said())
            process.tests = [test for test in process.tests if test not in culprits]
        if process.tests:
            self.pieces.appendleft(process.tests)

    def run(self) -> int:
        try:
            self.list_tests()
            stuck = "-o", f"faulthandler_timeout={self.arguments.test_seconds / 2}"  # then it says where it is
            while (self.pieces or self.running) and self.left() > 0:
                while self.pieces and len(self.running) < self.arguments.processes:
                    tests = self.pieces.popleft()
                    self.start(tests, *stuck, *(self.arguments_of[test] for test in tests))
                for process in list(self.running):
                    self.look_at(process)
                self.save()
                time.sleep(0.05)
        finally:  # also where this process is to end
            for process in self.running:
                process.end()
                self.hear(process)
                if process.now:
                    self.note(process.now, "running when time was up", time.monotonic() - process.since, process.said())
            self.running = []
            self.save()
            self.save_junit()
        counts = self.counts()
        print("tests: " + ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common()), flush=True)
        return int(bool(self.unlisted) or counts.keys() - {"passed", "skipped"} != set() or not counts["passed"])

    def counts(self) -> Counter[str]:
        return Counter(one["outcome"] for one in self.tests.values())

    def save(self) -> None:
        content = {
            "seconds": round(time.monotonic() - self.began, 1),
            "counts": self.counts(),
            "running": [process.now for process in self.running if process.now],
            "unlisted": self.unlisted,
            "tests": self.tests,
        }
        path = self.arguments.out / "tests.json"
        path.with_suffix(".new").write_text(json.dumps(content, indent=1) + "\n")
        path.with_suffix(".new").replace(path)

    def save_junit(self) -> None:
        suite = ElementTree.Element("testsuite", name="device tests", tests=str(len(self.tests)))
        for test, one in self.tests.items():
            file, _, name = test.partition("::")
            entry = ElementTree.SubElement(suite, "testcase", classname=file, name=name, time=str(one["seconds"]))
            if one["outcome"] != "passed":
                kind = "skipped" if one["outcome"] in ("skipped", "not run") else "failure"
                said = "".join(letter for letter in one["said"] if letter.isprintable() or letter in "\n\t")
                ElementTree.SubElement(entry, kind, message=one["outcome"]).text = said
        ElementTree.ElementTree(suite).write(self.arguments.out / "tests.xml", encoding="utf-8")


def work(events: str, pytest_arguments: list[str]) -> int:
    """In a process of its own."""
    sys.path[0] = os.getcwd()  # as `python -m pytest` has it: not this file's folder, which would hide others' modules
    import pytest

    quiet = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    return int(pytest.main([*quiet, *pytest_arguments], plugins=[Events(events)]))


def main(argv: list[str]) -> int:
    if argv[:1] == ["worker"]:
        return work(argv[1], argv[2:])
    parser = argparse.ArgumentParser(description="Run the device tests, each piece of them in a process of its own.")
    parser.add_argument("files", nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--within", type=Path, default=ROOT, help="where the processes run: whose fastlora they import")
    parser.add_argument("-k", dest="expression", default="", help="pytest's: which tests of the files")
    parser.add_argument("--seconds", type=float, default=300, help="for all")
    parser.add_argument("--test-seconds", type=float, default=40, help="for a test")
    parser.add_argument("--processes", type=int, default=max(1, min(14, (os.cpu_count() or 2) - 2)), help="at a time")
    parser.add_argument("--piece", type=int, default=12, help="tests that a process runs")
    arguments = parser.parse_args(argv)
    arguments.files = [str(Path(file).resolve()) for file in arguments.files]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as SIGINT: what runs is ended, what is known is written
    with tempfile.TemporaryDirectory() as scratch:
        return Runner(arguments, Path(scratch)).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
