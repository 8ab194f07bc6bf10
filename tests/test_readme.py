"""README, CONTRIBUTING and benchmarks/README.md: the Python runs as it stands, and whatever they name is there: options, targets of make, files."""

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from typer.main import get_command

from fastlora.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
ALL = README + "".join((ROOT / name).read_text() for name in ("CONTRIBUTING.md", "benchmarks/README.md"))
HUB_ID = re.compile(r'(?<=from_pretrained\(")[^"]+')
FIRST, SECOND = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


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
    known = {option for one in commands.commands.values() for parameter in one.params for option in parameter.opts}
    for file in ("benchmarks/__main__.py", "benchmarks/gpu.sh"):
        known.update(re.findall(r"--[a-z-]+", (ROOT / file).read_text()))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", ALL)) - {"--nproc-per-node"}  # torchrun's
    assert len(named) > 10 and not named - known


def test_targets_of_make_are_there() -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = set(re.findall(r"(?:`|^)make ([a-z]+)", ALL, re.MULTILINE))
    assert len(named) > 5 and not named - {*targets}


def test_files_are_there() -> None:
    named = re.findall(r"`([\w/.]+/[\w.]+\.\w+)", ALL)
    assert len(named) > 10
    for name in named:
        assert (ROOT / name).exists(), name
