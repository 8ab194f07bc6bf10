"""README, CONTRIBUTING, benchmarks/README.md and docs/: the Python runs as it stands, and whatever they name is there: options, targets of make,
files, links, and what CONTRIBUTING's last table says to look for in a file.
"""

import re
import warnings
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from typer.main import get_command

import fastlora
from fastlora.cli import app
from fastlora.options import ALIASES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")), *DOCS]
ALL = "".join(page.read_text() for page in PAGES)
MOST_LINES = 120  # of a page in docs/
HUB_ID = re.compile(r'(?<=from_pretrained\(")[^"]+')
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
FIRST, SECOND = PYTHON.findall(README)


@pytest.mark.filterwarnings("ignore")
def test_a_model_is_made_fast(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tiny model takes the place of the hub's."""
    model = str(tiny.save_model(tmp_path / "model"))
    code, models = HUB_ID.subn(lambda _: model, FIRST)
    assert models == 1
    exec(code, {})
    assert "layers.1.mlp.down_proj" in capsys.readouterr().out


def test_modules_and_operators_run() -> None:
    found: dict[str, Any] = {}
    with warnings.catch_warnings(action="error"):
        exec(SECOND, found)
    assert found["y"].shape == (3, 32)
    batch = found["batch"]
    assert batch.attention_mask.tolist() == [[0, 1, 1, 1, 1, 1]]
    assert torch.equal(batch.embeds[0, 1:4], found["embedding"].weight[found["ids"][0]])


def test_options_are_there() -> None:
    commands: Any = get_command(app)
    every = [parameter for one in commands.commands.values() for parameter in one.params]
    known = {option for one in every for option in (*one.opts, *one.secondary_opts)}
    known |= {f"--{name.replace('_', '-')}" for name in ALIASES}
    for file in ("__main__.py", "claims/__main__.py", "gpu.sh", "kills.py", "trainer.py"):
        known.update(re.findall(r"--[a-z-]+", (ROOT / "benchmarks" / file).read_text()))
    others = {"--nproc-per-node", "--shutdown-timeout"}  # torchrun's
    others |= {"--multi-gpu", "--num-processes", "--use-fsdp", "--fsdp-version"}  # accelerate's
    others |= {"--enable-lora", "--lora-modules", "--max-lora-rank"}  # vLLM's
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", ALL)) - others
    assert len(named) > 10 and not named - known


def test_targets_of_make_are_there() -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = set(re.findall(r"(?:`|^)make ([a-z]+)", ALL, re.MULTILINE))
    assert len(named) > 5 and not named - {*targets}


def test_files_are_there() -> None:
    named = re.findall(r"`([\w/.]+/[\w.]+\.\w+)", ALL)
    assert len(named) > 10
    for name in named:
        assert any((folder / name).exists() for folder in (ROOT, ROOT / "benchmarks")), name


def test_links_lead_to_something() -> None:
    found = [(page, link) for page in PAGES for link in re.findall(r"\]\(([^)]+)\)", page.read_text())]
    assert {page.name for page, _ in found} >= {"README.md", *(page.name for page in DOCS)}
    for page, link in found:
        file, _, heading = link.partition("#")
        assert not heading and (page.parent / file).exists(), f"{page.name}: {link}"


def test_every_page_and_example_is_linked() -> None:
    linked = {
        (page.parent / link).resolve() for page in PAGES for link in re.findall(r"\]\(([^)#]+)", page.read_text())
    }
    assert len(DOCS) == 14 and {page.resolve() for page in DOCS} <= linked
    assert {path.resolve() for path in (ROOT / "examples").glob("*.py")} <= linked


def test_the_pages_are_short_and_their_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    config = LoraConfig(target_modules="all-linear")
    known = {"fastlora": fastlora, "model": get_peft_model(tiny.llama(), config)}
    for page in DOCS:
        text = page.read_text()
        assert len(text.splitlines()) <= MOST_LINES, page.name
        for block in PYTHON.findall(text):
            exec(block, known)
    assert "layers.1.mlp.down_proj" in capsys.readouterr().out


def test_the_drawing_is_one() -> None:
    """Each row's number is that of its boxes, and of its letters."""
    drawing = ElementTree.parse(ROOT / "docs/passes.svg").getroot()
    rows, boxes = [], 0
    for element in drawing:
        text = element.text or ""
        if element.get("class") == "n":
            rows.append((boxes, len(text), len(element.get("x", "").split())))
        elif element.tag.endswith("path"):
            boxes += element.get("d", "").count("M")
        else:
            boxes = 0
    numbers = re.findall(r">(?:PEFT|fastlora, \w+): (\d+)<", (ROOT / "docs/passes.svg").read_text())
    assert rows == [(int(number),) * 3 for number in numbers] and len(rows) == 6


def test_every_question_is_answered_by_a_file_that_has_it() -> None:
    _, table = (ROOT / "CONTRIBUTING.md").read_text().split("## Where is ...?\n")
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|") and "?" in line]
    assert len(rows) == 10
    for question, answer in rows:
        paths = re.findall(r"`(\w[\w/.-]*/[\w.-]+)`", answer)
        assert paths and all((ROOT / path).exists() for path in paths), question
        for path, names in re.findall(r"`([\w/.-]+\.\w+)`, (`[^`]+`(?: and `\w+`)?)", answer):
            for name in re.findall(r"`([^`]+)`", names):
                assert name in (ROOT / path).read_text(), f"{path}: {name}"
