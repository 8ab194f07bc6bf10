"""Whether the tests hold what the code does: changes functions one small step at a time, and names the changes that no test notices.

    python tests/mutants.py [--sample N] [--seed S] [--seconds T] [--jobs J] [--matching TEXT] [--tests FILE]... [FILE ...]

One process imports torch, the package and the tests, and collects them. It runs them once and notes which functions each of them calls, or
has torch.compile trace. A mutant then is a fork of that process in which the changed function has another code object, so that all who have
imported it have the mutant; the tests that call it run until one fails or T seconds of them (as first measured) have run: first those that have
killed another mutant of the function, then the quickest, of a test with many parameters a few. A mutant that lives is named by file, line and
change; those that mutants_explained.toml explains are counted only. Exit status 1: others lived; 2: a test fails without a mutant.

What runs while a module is imported is not mutated, nor a message's words, nor zip's strict, which asserts; and what a test does in processes
of its own does not count. Neither mutmut nor cosmic-ray does: mutmut 3 wraps every function in another, which torch.compile and the tests that
count calls do not bear; cosmic-ray imports torch again for every mutant, and has no operator that takes a condition or one of its parts away.
"""

import argparse
import ast
import collections
import functools
import gc
import json
import mmap
import os
import random
import signal
import sys
import tempfile
import threading
import time
import tomllib
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent
EXPLAINED = TESTS / "mutants_explained.toml"
OF_PEFT = ("peft*", "obstacles*", "report*", "sibling*", "layers", "unloading", "packed*")
OF_OPERATORS = (
    "lora_linear*",
    "few_rows_now",
    "composed",
    "tune",
    "multi_lora*",
    "layers*",
    "sibling*",
    "derivatives",
    "gradients",
    "ops",
    "table",
    "measure",
    "problems",
)
OF_ANY_OPERATOR = ("gradients", "derivatives", "problems")
OF_FROZEN = ("packed*", "frozen*", "product*", "native*", "quantised", "composed", "lora_linear", "multi_lora")
MODULES = {
    "fastlora/peft/__init__.py": ("accelerate", "unloading"),
    "fastlora/peft/obstacles.py": ("obstacles*", "known", "layer_calls", "layers", "dora", "unloading"),
    "fastlora/peft/siblings.py": (*OF_PEFT, "dora"),
    "fastlora/peft/reporting.py": ("report*", "layers", "quantised_layers"),
    "fastlora/peft/experts.py": ("experts", "experts_obstacles", "expert_parts"),
    "fastlora/peft/layers.py": ("layer_calls", "layer_names", "sibling*", "known", "*_biases", "quantised_layers"),
    "fastlora/operators/lora_linear.py": OF_OPERATORS,
    "fastlora/operators/rms_norm.py": ("rms_norm", *OF_ANY_OPERATOR),
    "fastlora/operators/scale_columns.py": ("scale_columns", *OF_ANY_OPERATOR),
    "fastlora/operators/dora_factor.py": ("dora_factor",),
    "fastlora/operators/lora_cross_entropy.py": ("lora_cross_entropy", *OF_ANY_OPERATOR),
    "fastlora/peft/embeddings.py": ("embeddings", "embedding_calls"),
    "fastlora/peft/merging.py": ("merging",),
    "fastlora/peft/composed.py": ("composed_layers", "dora", "mixed_dora", "*_biases", "head_adapters"),
    "fastlora/peft/scaled.py": ("ia3*", "mixed_ia3", "other_methods"),
    "fastlora/peft/probing.py": ("probing",),
    "fastlora/peft/known.py": ("known", "layer_calls", "mixed_batches"),
    "fastlora/peft/mixed.py": ("mixed*", "sweep_gradients"),
    "fastlora/peft/grouped.py": ("prompts_*",),
    "fastlora/peft/prompts.py": ("prompt_[!b]*", "prompts_*"),
    "fastlora/peft/quantised.py": ("quantised_layers",),
    "fastlora/trees.py": ("trees",),
    "fastlora/sharing.py": ("sharing", "share_prefix"),
    "fastlora/operators/swiglu.py": ("swiglu", *OF_ANY_OPERATOR),
    "fastlora/operators/rotary.py": ("rotary", *OF_ANY_OPERATOR),
    "fastlora/operators/attention.py": ("attention", *OF_ANY_OPERATOR),
    "fastlora/operators/frozen_linear.py": ("frozen_linear", "frozen_rules", *OF_ANY_OPERATOR),
    "fastlora/operators/linear_cross_entropy.py": (
        "linear_cross_entropy",
        "lora_cross_entropy",
        "losses_by_token",
        *OF_ANY_OPERATOR,
    ),
    "fastlora/operators/prefix_concat.py": ("prefix_concat*", *OF_ANY_OPERATOR),
    "fastlora/fusion.py": ("fused_parts", "fused_choice"),
    "fastlora/packing.py": ("packing",),
    "fastlora/swap.py": ("swap",),
    "fastlora/choice/problems.py": ("problems", "measure"),
    "fastlora/choice/measure.py": ("measure", "trial"),
    "fastlora/choice/clock.py": ("clock", "measure"),
    "fastlora/choice/trial.py": ("trial", "trial_again", "trial_answer", "trial_scripts", "tune"),
    "fastlora/choice/table.py": ("table*", "trial*", "measure*", "tune", "one_choice", "ops"),
    "fastlora/frozen/packed.py": OF_FROZEN,
    "fastlora/frozen/products.py": OF_FROZEN,
    "fastlora/frozen/composed.py": ("composed",),
    "fastlora/frozen/quantised.py": ("quantised",),
}
"""What is mutated, and the tests that belong to it: patterns between `test_` and `.py`."""

NEGATED = {
    ast.Eq: ast.NotEq, ast.Lt: ast.GtE, ast.LtE: ast.Gt, ast.Is: ast.IsNot, ast.In: ast.NotIn,
    ast.NotEq: ast.Eq, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.IsNot: ast.Is, ast.NotIn: ast.In,
}  # fmt: skip
SHIFTED = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}
ARITHMETIC = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
}
UNTOUCHED = (
    "annotation",
    "returns",
    "decorator_list",
    "args",
    "type_params",
)  # of a node; `args` of a def, not of a call


@dataclass(eq=False)
class Mutant:
    path: Path
    line: int
    function: str  # the outermost, qualified
    change: str
    holder: Any  # the list or node that has the old part
    place: Any  # and where
    new: ast.AST

    @property
    def name(self) -> str:
        return f"{shown(self.path)} {self.function}: {self.change}"

    def code(self, tree: ast.Module) -> types.CodeType:
        put(self.holder, self.place, self.new)
        return compile(tree, str(self.path), "exec", dont_inherit=True)


def shown(path: Path) -> str:
    return os.path.relpath(path, os.getcwd())


def put(holder: Any, place: Any, new: ast.AST) -> None:
    if isinstance(holder, list):
        holder[place] = new
    else:
        setattr(holder, place, new)


def changes_of(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in a node's place."""
    match node:
        case ast.Compare(left, [op], right):
            for table in (NEGATED, SHIFTED):
                if type(op) in table:
                    yield ast.Compare(left, [table[type(op)]()], right)
        case ast.BoolOp(op, values):
            yield ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), values)
            for i in range(len(values)):
                rest = values[:i] + values[i + 1 :]
                yield ast.BoolOp(op, rest) if len(rest) > 1 else rest[0]
        case ast.UnaryOp(ast.Not(), operand):
            yield operand
        case ast.BinOp(left, op, right) if type(op) in ARITHMETIC:
            yield ast.BinOp(left, ARITHMETIC[type(op)](), right)
        case ast.AugAssign(target, op, value) if type(op) in ARITHMETIC:
            yield ast.AugAssign(target, ARITHMETIC[type(op)](), value)
        case ast.Constant(bool() as value):
            yield ast.Constant(not value)
        case ast.Constant(int() | float() as value):
            yield ast.Constant(value + 1)
        case ast.Return(ast.expr() as value) if not isinstance(value, ast.Constant):
            yield ast.Return(ast.Constant(None))
        case ast.Continue():
            yield ast.Break()
        case ast.Raise() | ast.Expr(ast.Call()):
            yield ast.Pass()
        case ast.Assign(targets) if all(isinstance(target, ast.Attribute | ast.Subscript) for target in targets):
            yield ast.Pass()


def forced_conditions(node: ast.AST, field: str) -> list[ast.AST]:
    """What else may stand in a field: a condition that is always, or never, met."""
    values = {
        ("If", "test"): (True, False),
        ("IfExp", "test"): (True, False),
        ("While", "test"): (False,),
        ("comprehension", "ifs"): (True,),
    }
    return [ast.Constant(value) for value in values.get((type(node).__name__, field), ())]


def mutants_of(path: Path, tree: ast.Module) -> list[Mutant]:
    """Every mutant of the functions in a file, whose syntax tree this is; no two have one name."""
    found: list[Mutant] = []

    def visit(node: ast.AST, scope: tuple[str, ...], function: str | None) -> None:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            scope = (*scope, node.name)
            if function is None and isinstance(node, ast.FunctionDef):
                function = ".".join(scope)
        for field, value in ast.iter_fields(node):
            if field in UNTOUCHED and not isinstance(node, ast.Call):
                continue
            if isinstance(node, ast.keyword) and node.arg == "strict":
                continue
            parts = (
                [(value, i, part) for i, part in enumerate(value)]
                if isinstance(value, list)
                else [(node, field, value)]
            )
            for holder, place, part in parts:
                if not isinstance(part, ast.AST):
                    continue
                for new in [*changes_of(part), *forced_conditions(node, field)] if function else ():
                    ast.fix_missing_locations(ast.copy_location(new, part))
                    change = f"{one_line(part)} -> {one_line(new)}"
                    found.append(Mutant(path, part.lineno, function or "", change, holder, place, new))
                if not isinstance(part, ast.Raise):
                    visit(part, scope, function)

    visit(tree, (), None)
    times: collections.Counter[str] = collections.Counter()
    for one in found:
        times[one.name] += 1
        if times[one.name] > 1:
            one.change += f" ({times[one.name]})"
    return found


def one_line(node: ast.AST) -> str:
    return " ".join(ast.unparse(node).split())


def explained() -> set[str]:
    """The names of mutants that may live."""
    groups = tomllib.loads(EXPLAINED.read_text())["explained"] if EXPLAINED.exists() else []
    return {name for group in groups for name in group["mutants"]}


def codes_in(code: types.CodeType) -> Iterator[types.CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield constant
            yield from codes_in(constant)


def key_of(code: types.CodeType) -> tuple[str, int]:
    return code.co_qualname, code.co_firstlineno


def graphs_from_now_on() -> list[Any]:
    """What torch.compile makes from now on: what it traces is not called, and no profiler sees it."""
    graphs: list[Any] = []
    guards: Any = sys.modules.get("torch._guards")
    if guards is not None:
        begin = guards.TracingContext.__init__

        def noted(graph: Any, *args: Any, **kwargs: Any) -> None:
            begin(graph, *args, **kwargs)
            graphs.append(graph)

        guards.TracingContext.__init__ = noted
    return graphs


class Runner:
    """A plugin of pytest: in the place of running the tests that were collected it runs them on mutants."""

    def __init__(
        self, mutants: dict[Path, list[Mutant]], trees: dict[Path, ast.Module], seconds: float, jobs: int
    ) -> None:
        self.mutants, self.trees, self.seconds, self.jobs = mutants, trees, seconds, jobs
        self.survivors: list[Mutant] = []
        self.late = 0  # killed by their time limit
        self.killed: dict[str, collections.Counter[int]] = collections.defaultdict(
            collections.Counter
        )  # by function, by test
        self.broken: list[str] = []  # what fails without a mutant
        self.terminal = os.dup(1)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if session.testsfailed:
            self.broken.append("collecting the tests")
            return True
        self.session = session
        # Every function that is there, however it was decorated: all have the mutant's code.
        objects = gc.get_objects()
        functions = [one for one in objects if type(one) is types.FunctionType]
        self.functions = {
            path: [one for one in functions if one.__code__.co_filename == str(path)] for path in self.mutants
        }
        self.cached = [one for one in objects if type(one) is functools._lru_cache_wrapper]
        self.measure()
        self.try_all()
        return True

    def measure(self) -> None:
        """Run every test once, and note its seconds and the functions that it calls."""
        with tempfile.NamedTemporaryFile("r", suffix=".json") as file:
            pid = self.fork(lambda: self.note_calls(file.name))
            _, status = os.waitpid(pid, 0)
            if status:
                self.broken.append(f"all tests in a row: status {status}")
                return
            self.calls, self.took, failed = json.loads(file.read())
        self.broken += failed

    def note_calls(self, file: str) -> int:
        calls: dict[str, list[int]] = collections.defaultdict(list)
        took, failed = [], []
        files = {str(path) for path in self.mutants}
        seen: set[str] = set()
        graphs = graphs_from_now_on()

        def see(code: types.CodeType) -> None:
            if code.co_filename in files:
                seen.add(f"{code.co_filename} {code.co_qualname.split('.<locals>')[0]}")

        def note(frame: types.FrameType, event: str, _: Any) -> None:
            if event == "call":
                see(frame.f_code)

        for i, item in enumerate(self.session.items):
            before, began = self.session.testsfailed, time.monotonic()
            threading.setprofile(note)
            sys.setprofile(note)
            self.run_test(item, self.session.items[i + 1] if i + 1 < len(self.session.items) else None)
            sys.setprofile(None)
            took.append(time.monotonic() - began)
            for code in (code for graph in graphs for code in graph.traced_code):
                see(code)
            graphs.clear()
            if self.session.testsfailed > before:
                failed.append(item.nodeid)
                self.session.shouldfail = False
            else:
                for name in seen:
                    calls[name].append(i)
            seen.clear()
        Path(file).write_text(json.dumps([calls, took, failed]))
        return 0

    def run_test(self, item: pytest.Item, following: pytest.Item | None) -> None:
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)

    def tests_of(self, keys: set[str]) -> tuple[list[int], float]:
        """The tests to run, by number, of those that call any of these functions, and their seconds."""
        times: collections.Counter[str] = collections.Counter()
        order: list[tuple[int, float, int]] = []  # a test's next parameters come later than another as quick
        for i in sorted({i for key in keys for i in self.calls.get(key, ())}, key=self.took.__getitem__):
            name = self.session.items[i].nodeid.partition("[")[0]  # without its parameters
            times[name] += 1
            order.append((-max(self.killed[key][i] for key in keys), times[name] * self.took[i], i))
        total, chosen = 0.0, []
        for *_, i in sorted(order):
            total += self.took[i]
            if chosen and total > self.seconds:
                break
            chosen.append(i)
        return chosen, total

    def try_all(self) -> None:
        waiting = [(path, None) for path in self.mutants] + [
            (path, one) for path in self.mutants for one in self.mutants[path]
        ]
        waiting.reverse()
        running: dict[int, tuple[Path, Mutant | None, float, mmap.mmap]] = {}
        while not self.broken and (waiting or running):
            while waiting and len(running) < self.jobs:
                path, mutant = waiting.pop()
                of = self.mutants[path] if mutant is None else [mutant]
                tests, seconds = self.tests_of({f"{path} {one.function}" for one in of})
                killer = mmap.mmap(-1, 8)
                pid = self.fork(functools.partial(self.try_one, path, mutant, tests, killer))
                running[pid] = path, mutant, time.monotonic() + 20 + 3 * seconds, killer
            for pid in [pid for pid, (*_, until, _) in running.items() if time.monotonic() > until]:
                os.killpg(pid, signal.SIGKILL)
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                time.sleep(0.02)
                continue
            path, mutant, _, killer = running.pop(pid)
            if mutant is not None and os.waitstatus_to_exitcode(status) == 1:
                self.killed[f"{path} {mutant.function}"][int.from_bytes(killer)] += 1
            if mutant is None and status:
                self.broken.append(f"the tests of {shown(path)} in another order")
            elif mutant is not None and status == signal.SIGKILL:
                self.late += 1
                print(f"too long: {mutant.name}", flush=True)
            elif mutant is not None and status == 0:
                self.survivors.append(mutant)
                print(f"{shown(path)}:{mutant.line}  {mutant.function}: {mutant.change}", flush=True)

    def fork(self, work: Callable[[], int]) -> int:
        sys.stdout.flush()
        pid = os.fork()
        if pid:
            return pid
        status = 1
        try:
            os.setsid()
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
            status = work()
        finally:
            os._exit(status)

    def try_one(self, path: Path, mutant: Mutant | None, tests: list[int], killer: mmap.mmap) -> int:
        """killer: out: the number of the test that fails."""
        if mutant is not None:
            now = {key_of(code): code for code in codes_in(mutant.code(self.trees[path]))}
            for function in self.functions[path]:
                code = now.get(key_of(function.__code__))
                if code is not None and code != function.__code__:
                    function.__code__ = code
            for one in self.cached:
                if one.__wrapped__ in self.functions[path]:
                    one.cache_clear()
        items = [self.session.items[i] for i in tests]
        for i, test, following in zip(tests, items, [*items[1:], None], strict=True):
            self.run_test(test, following)
            if self.session.testsfailed:
                killer[:] = i.to_bytes(8)
                if mutant is None:
                    os.write(self.terminal, f"{test.nodeid} fails in another order\n".encode())
                return 1
        return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sample", type=int, metavar="N", help="of all files together; otherwise every mutant")
    parser.add_argument("--matching", default="", metavar="TEXT", help="only mutants whose names have it")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument("--seconds", type=float, default=30, metavar="T", help="of tests a mutant (30)")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), metavar="J")
    parser.add_argument(
        "--tests", action="append", metavar="FILE", help="in the place of those that belong to the file"
    )
    parser.add_argument("files", nargs="*", default=list(MODULES), metavar="FILE")
    options = parser.parse_args()
    sys.path.insert(0, os.getcwd())
    paths = [Path(file).resolve() for file in options.files]
    trees = {path: ast.parse(path.read_text()) for path in paths}
    every = [one for path in paths for one in mutants_of(path, trees[path]) if options.matching in one.name]
    if options.sample is not None:
        every = random.Random(options.seed).sample(every, min(options.sample, len(every)))
    tests = options.tests or sorted(
        {str(file) for name in options.files for pattern in MODULES[name] for file in TESTS.glob(f"test_{pattern}.py")}
    )
    mutants = {path: own for path in paths if (own := [one for one in every if one.path == path])}
    runner = Runner(mutants, trees, options.seconds, options.jobs)
    pytest.main(
        ["-q", "-s", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:faulthandler", *tests], plugins=[runner]
    )
    if runner.broken:
        print("without any mutant these fail:", *runner.broken, sep="\n  ")
        return 2
    unexplained = [one for one in runner.survivors if one.name not in explained()]
    lived = len(runner.survivors)
    print(
        f"{len(every)} mutants: {len(every) - lived} killed, {lived - len(unexplained)} explained, {len(unexplained)} lived"
        f"; {runner.late} were killed as their tests took too long"
    )
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
