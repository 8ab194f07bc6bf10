"""examples/: each script runs as it stands, offline, and what it says of itself is so."""

import importlib.util
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from fastlora.demo import BASE_MODEL
from fastlora.demo.tasks import generate, write_jsonl

EXAMPLES = Path(__file__).parent.parent / "examples"
MOST_LINES = 60

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def cpu() -> Iterator[None]:
    with tiny.on_cpu():
        yield


def run(name: str, *arguments: str | Path) -> Any:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]([str(one) for one in arguments])


def assert_falls(losses: list[float]) -> None:
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3]), losses


def assert_trained_adapter(folder: Path, base: Path) -> None:
    """PEFT itself loads the folder, and what it finds there has moved from where adapters begin: B is not 0."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    trained = {name: one for name, one in model.named_parameters() if "lora_B" in name}
    assert len(trained) == 28 and all(one.abs().max() > 0 for one in trained.values())


def test_each_is_short_and_says_how_it_is_run() -> None:
    scripts = sorted(EXAMPLES.glob("*.py"))
    assert len(scripts) == 10
    for path in scripts:
        text = path.read_text()
        assert len(text.splitlines()) <= MOST_LINES, path.name
        assert f"\npython examples/{path.name}" in text, path.name


def reported(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """The implementations that a script has printed, by layer."""
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("base_model.")]
    return {name: implementation for name, implementation, *_ in lines}


def assert_accelerated(layers: dict[str, str], loss: bool = False) -> None:
    """Every LoRA layer, and the loss where that was asked for."""
    assert layers.pop("base_model.model.loss", None) == ("fused" if loss else None)
    assert len(layers) == 28 and "peft" not in layers.values()


needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")


def test_trainer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_falls(run("trainer", "--output", tmp_path / "out"))
    assert_trained_adapter(tmp_path / "out", BASE_MODEL)
    assert_accelerated(reported(capsys), loss=True)


@needs_trl
def test_sft_trainer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With rows of a file."""
    write_jsonl(generate("sentiment", 32, seed=1), tmp_path / "train.jsonl")
    losses = run("sft_trainer", "--data", tmp_path / "train.jsonl", "--output", tmp_path / "out", "--steps", "16")
    assert_falls(losses)
    assert_trained_adapter(tmp_path / "out", BASE_MODEL)
    assert_accelerated(reported(capsys))


@needs_trl
def test_dpo_trainer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_falls(run("dpo_trainer", "--output", tmp_path / "out"))
    assert_trained_adapter(tmp_path / "out", BASE_MODEL)
    assert_accelerated(reported(capsys))


@needs_trl
def test_grpo_trainer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(run("grpo_trainer", "--output", tmp_path / "out", "--steps", "2")) == 2
    assert_trained_adapter(tmp_path / "out", BASE_MODEL)
    assert_accelerated(reported(capsys))


@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="lightning is not installed")
def test_lightning_trainer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_falls(run("lightning_trainer", "--output", tmp_path / "out"))
    assert_trained_adapter(tmp_path / "out", BASE_MODEL)
    assert_accelerated(reported(capsys), loss=True)


@pytest.mark.parametrize("own", [False, True], ids=["shipped", "own-model-and-rows"])
def test_plain_loop(own: bool, tmp_path: Path) -> None:
    """PEFT's losses and fastlora's are the same numbers but for the order of the sums, which a dozen steps of Adam amplify."""
    base = tiny.save_model(tmp_path / "model") if own else BASE_MODEL
    rows = ["--data", tiny.save_data(tmp_path / "train.jsonl")] if own else []
    theirs, ours = run("plain_loop", base, *rows)
    assert len(ours) == len(theirs) == 12
    assert all(abs(a - b) <= 1e-3 * b for a, b in zip(ours, theirs, strict=True)), (ours, theirs)
    assert_falls(ours)


def test_instruction_mixture(tmp_path: Path) -> None:
    """Of every ten rows one is rehearsed; the 90 reviews count as 40, the 30 places as 30."""
    lines = run("instruction_mixture", "--output", tmp_path / "out")
    assert_falls([one["loss"] for one in lines])
    rows = {
        name: sum(one["tasks"].get(name, {"rows": 0})["rows"] for one in lines)
        for name in ("reviews", "places", "rehearsal")
    }
    assert rows == {"reviews": 82, "places": 62, "rehearsal": 16}
    assert_trained_adapter(tmp_path / "out", BASE_MODEL)


def test_mixed_batch(capsys: pytest.CaptureFixture[str]) -> None:
    losses, mixed, alone = run("mixed_batch")
    assert_falls(losses)
    assert (mixed - alone).abs().max() <= 1e-5 * alone.abs().max()
    assert len(capsys.readouterr().out.splitlines()) == 3  # the losses, and an answer of each adapter


def test_soft_prompt() -> None:
    losses, padded, alone = run("soft_prompt")
    assert_falls(losses)
    assert (padded - alone).abs().max() <= 1e-5 * alone.abs().max()


def test_merge_and_serve(tmp_path: Path) -> None:
    report, commands = run("merge_and_serve", "--output", tmp_path)
    assert report.layers == 28 and report.logits_relative_error < 0.02  # of a bfloat16 model
    merged, beside = map(shlex.split, commands)
    assert merged == ["vllm", "serve", str(tmp_path / "merged")]
    assert AutoModelForCausalLM.from_pretrained(merged[-1]).config.architectures == ["LlamaForCausalLM"]
    assert beside[:3] == ["vllm", "serve", str(BASE_MODEL)]
    assert beside[3:] == [
        "--enable-lora",
        "--max-lora-rank",
        "16",
        "--lora-modules",
        f"adapter={tmp_path / 'adapter'}",
    ]
    assert_trained_adapter(tmp_path / "adapter", BASE_MODEL)


def test_an_adapter_of_ones_own_is_served(tmp_path: Path) -> None:
    """Its rank, 12, is none that vLLM's option takes: the next one is asked for."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(BASE_MODEL),
        LoraConfig(r=12, target_modules=["q_proj"], init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "mine")
    report, (_, beside) = run("merge_and_serve", tmp_path / "mine", "--output", tmp_path / "served")
    assert report.layers == 4
    assert shlex.split(beside)[4:] == ["--max-lora-rank", "16", "--lora-modules", f"mine={tmp_path / 'mine'}"]
