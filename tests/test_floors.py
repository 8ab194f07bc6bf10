"""The house's rules that a machine can check: imports point down, implementations stand apart, names say something."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OPERATORS = sorted(path.stem for path in (ROOT / "fastlora/operators").glob("[a-z]*.py"))
MIXED = "multi_lora"  # the half of lora_linear's kernels whose rows have adapters of their own
KERNELS = (
    "lora_linear",
    MIXED,
    "prefix_concat",
)  # frozen_linear is frozen/'s, linear_cross_entropy is blocks of frozen_linear

# From the bottom up; a file imports only from floors below its own, or from its own package.
FLOORS = (
    ("bounds", "checks", "choice.clock", "distribution", "drawing", "memory", "reading", "swap", "typed", "writing"),
    ("reference", "gradients", "packing", "trees", "choice.table"),
    ("ops",),
    ("frozen",),
    ("_C", "kernels", "native", "limits", "choice.problems"),
    ("operators",),
    ("choice.measure",),
    ("functional", "choice.trial"),
    ("bottleneck", "layers", "language_model_loss", "fusion"),
    ("model_loss", "sharing"),
    ("peft",),
    ("receipts",),
    ("adapters",),
    ("bank", "data", "integrations"),
    ("fastlora",),  # the package itself
    ("checkpoint", "metrics", "environment", "schedules"),
    ("config", "models", "options"),
    (
        *(
            "generation",
            "steps",
            "course",
            "optimisers",
            "neftune",
            "divergence",
            "progress",
            "summary",
            "card",
            "page",
        ),
        *("warm_start", "tracking", "task_losses", "training_data"),
    ),
    ("batching",),
    ("evaluation", "inventory", "merge", "processes", "serving", "trainable", "resuming"),
    ("validation",),
    ("train", "combine"),
    ("comparison", "sweep", "planning"),
    ("demo",),
    ("benchmarks",),
    ("cli",),
    ("__main__",),
)
FLOOR_OF = {name: number for number, floor in enumerate(FLOORS) for name in floor}


def sources() -> list[Path]:
    """Every Python file of the product; kernels and benchmarks also appear inside fastlora, as links."""
    folders = ("fastlora", "kernels", "benchmarks")
    found = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return sorted(path for path in found if not any(parent.is_symlink() for parent in path.parents))


def part_of(path: Path) -> str:
    """The name in FLOORS of a file: its module, or the package that it lies in."""
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    return folder if folder != "fastlora" else named(rest[:-1] if rest[-1] == "__init__" else rest)


def named(parts: list[str]) -> str:
    """The name in FLOORS of a module of fastlora, by its own or its package's; "fastlora" for what has none."""
    return next((name for name in (".".join(parts[:2]), *parts[:1]) if name in FLOOR_OF), "fastlora")


def package_of(path: Path) -> list[str]:
    """The package that a file's relative imports start from, from the top down."""
    folder, *rest = path.relative_to(ROOT).parent.parts
    return ["fastlora", *([] if folder == "fastlora" else [folder]), *rest]


def imports_of(path: Path, text: str | None = None) -> list[tuple[int, str]]:
    """(line, name in FLOORS) for everything of fastlora that a file imports, also inside functions. text: what the file says, if not what it does."""
    found = []
    for node in ast.walk(ast.parse(path.read_text() if text is None else text)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = package_of(path)[: -node.level + 1 or None] if node.level else []
            module = [*package, *([node.module] if node.module else [])]
            names = [".".join([*module, alias.name]) for alias in node.names]
        for name in names:
            package, *rest = name.split(".")
            if package == "fastlora":
                found.append((node.lineno, named(rest)))
            elif package in ("kernels", "benchmarks"):
                found.append((node.lineno, package))
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    part = part_of(path)
    assert part in FLOOR_OF, f"{path.name} has no floor: give it one in FLOORS"
    for line, name in imports_of(path):
        assert name == part or FLOOR_OF[name] < FLOOR_OF[part], f"line {line} imports {name}, which is not below {part}"


def first_column() -> list[str]:
    """Of CONTRIBUTING's table, from the top down. csrc is the source of _C; the package and its __main__ only hand out what the others have."""
    told = [floor for floor in reversed(FLOORS) if not {"fastlora", "__main__"} & set(floor)]
    return [", ".join("csrc" if name == "_C" else name for name in floor) for floor in told]


def test_the_law_tells_of_every_floor() -> None:
    """A line that begins with spaces goes on with the one above. `python tests/test_floors.py` prints the first column."""
    _, table, _ = (ROOT / "CONTRIBUTING.md").read_text().split("```\n", 2)
    assert [re.split(r"  +", line)[0] for line in table.splitlines() if not line.startswith(" ")] == first_column()


def test_the_walk_sees_imports() -> None:
    """The rule above is about something: the known arrows are found."""
    assert {name for _, name in imports_of(ROOT / "fastlora" / "ops.py")} == {"reference", "choice.table"}
    assert {"checks", "frozen", "operators"} <= {name for _, name in imports_of(ROOT / "fastlora/peft/layers.py")}
    of_operators = {name for path in (ROOT / "fastlora/operators").glob("*.py") for _, name in imports_of(path)}
    assert of_operators == {
        "operators",
        "checks",
        "choice.problems",
        "choice.table",
        "frozen",
        "gradients",
        "ops",
        "reference",
    }
    assert len(sources()) > 10


@pytest.mark.parametrize(
    ("file", "line", "name"),
    [
        ("fastlora/ops.py", "from . import functional", "functional"),
        ("fastlora/ops.py", "from .peft import accelerate", "peft"),
        ("fastlora/ops.py", "from . import anything", "fastlora"),
        ("fastlora/data/examples.py", "from .. import train", "train"),
        ("fastlora/data/examples.py", "from . import rows", "data"),
        ("fastlora/__init__.py", "from .cli import main", "cli"),
        ("benchmarks/gate.py", "from .cases import CHECKS", "benchmarks"),
        ("benchmarks/gate.py", "from ..cli import main", "cli"),
        ("kernels/tiles.py", "from ..functional import lora_linear", "functional"),
        ("fastlora/ops.py", "def late():\n    import fastlora.language_model_loss", "language_model_loss"),
        ("fastlora/ops.py", "from benchmarks import cases", "benchmarks"),
        ("fastlora/frozen/products.py", "from ..operators.lora_linear import run", "operators"),
        ("fastlora/operators/lora_linear.py", "from . import frozen_linear", "operators"),
    ],
)
def test_the_walk_sees_every_spelling(file: str, line: str, name: str) -> None:
    assert [found for _, found in imports_of(ROOT / file, line)] == [name]


@pytest.mark.parametrize("stem", KERNELS)
def test_kernels_stand_apart(stem: str) -> None:
    """An operator's kernels import no other operator's and not the reference; what they share has files with names of their own."""
    others = {*OPERATORS, *KERNELS} - {stem}
    tree = ast.parse((ROOT / "kernels" / f"{stem}.py").read_text())
    modules = [
        f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]
    modules += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert "fastlora.ops" in modules
    for module in modules:
        assert not set(module.split(".")) & {*others, "reference"}, module


def test_shared_kernel_files_import_no_operator() -> None:
    for path in (ROOT / "kernels").glob("*.py"):
        if path.stem not in KERNELS:
            stems = "|".join({*OPERATORS, *KERNELS})
            assert not re.search(rf"^\s*(from|import) .*\b({stems})\b", path.read_text(), re.MULTILINE), path.name


def native_files() -> list[Path]:
    return sorted(path for path in (ROOT / "csrc").rglob("*.*") if path.suffix in (".cpp", ".cu", ".cuh", ".h"))


@pytest.mark.parametrize("path", native_files(), ids=lambda path: str(path.relative_to(ROOT / "csrc")))
def test_native_files_stand_apart(path: Path) -> None:
    """An operator's C++ includes no other operator's, and no .cpp or .cu; but kernels.cpp has all, and lora_linear runs multi_lora's on a card."""
    every = path.name == "kernels.cpp"
    for included in re.findall(r'#include "([^"]+)"', path.read_text()):
        stem, _, suffix = Path(included).name.partition(".")
        its_own = path.stem in (stem, f"register_{stem}") or (path.stem, stem) == ("register_lora_linear", "multi_lora")
        assert suffix in ("h", "hpp", "cuh") and (every or stem not in {*OPERATORS, *KERNELS} or its_own), included


@pytest.mark.parametrize("path", sorted((ROOT / "csrc/cuda").glob("*.*")), ids=lambda path: path.name)
def test_kernels_see_no_torch_and_inline_no_instructions(path: Path) -> None:
    """CUDA C++ is compiled without torch; launches and instructions go through the files that the tests replace."""
    text = path.read_text()
    assert path.stem.startswith("register") or not re.search(r"#include <(torch|ATen|c10)/", text)
    assert path.name == "launch.h" or "<<<" not in text
    assert path.name == "ptx.cuh" or not re.search(r"\basm\b", text)


def test_kernels_is_no_regular_package() -> None:
    """With an __init__.py there, transformers would take it for Hugging Face's package `kernels`."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    link = ROOT / "fastlora" / "kernels"
    assert link.is_symlink() and link.readlink() == Path("../kernels")


def test_files_have_names() -> None:
    nameless = {"utils", "util", "common", "helpers", "helper", "misc"}
    folders = ("fastlora", "kernels", "csrc", "benchmarks", "tests")
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*")):
        assert not nameless & set(re.split(r"[_.]", path.name.lower())), path


def test_no_test_file_is_too_long_to_have_one_subject() -> None:
    lines = {path.name: len(path.read_text().splitlines()) for path in (ROOT / "tests").glob("test_*.py")}
    assert {name: number for name, number in lines.items() if number > 500} == {}


def test_each_operator_is_one_stem_everywhere() -> None:
    def defined(path: str) -> set[str]:
        return set(re.findall(r"^def (\w+)\(", (ROOT / path).read_text(), re.MULTILINE))

    assert {path.stem for path in (ROOT / "fastlora/operators").glob("*.py")} == {*OPERATORS, "__init__"}
    for operator in OPERATORS:
        assert {operator, f"{operator}_backward"} <= defined("fastlora/reference.py"), operator
        assert operator in defined(f"fastlora/operators/{operator}.py"), operator
    paths = [f"tests/test_{stem}.py" for stem in {*OPERATORS, *KERNELS}]
    paths += [f"{folder}/{stem}.{suffix}" for stem in KERNELS
              for folder, suffix in (("kernels", "py"), ("csrc/cuda", "cu"), ("csrc/cuda", "h"))]  # fmt: skip
    paths += [f"csrc/cpu/{stem}.cpp" for stem in KERNELS if stem != MIXED]
    for path in paths:
        assert (ROOT / path).is_file(), path


if __name__ == "__main__":
    print("\n".join(first_column()))
