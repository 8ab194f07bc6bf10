"""What an encoder-decoder and its adapter are used for: answers as model.generate gives them, eval, merging, comparisons, the commands."""

import json
from pathlib import Path
from typing import Any

import encoder_decoders
import pytest
import tiny
import torch
from process_here import Here
from training import on_cpu, one_thread  # noqa: F401  (fixtures)
from transformers import AutoModelForSeq2SeqLM
from typer.testing import CliRunner

from fastlora import comparison, evaluation, validation
from fastlora.cli import app
from fastlora.comparison import Comparison, compare
from fastlora.config import TrainConfig
from fastlora.data import tasks
from fastlora.data.examples import Example
from fastlora.evaluation import evaluate
from fastlora.generation import generate
from fastlora.merge import merge
from fastlora.models import load_model
from fastlora.train import train

KINDS = ["t5", "bart"]
PROMPTS = ["The cat runs. What does the cat do?", "The owl", "What does the hen do? It sings. The hen", "sleeps"]


@pytest.fixture(name="files", scope="module")
def some_files(tmp_path_factory) -> dict[str, Path]:
    """Bases, rows, and of each base an adapter that gives other answers than it."""
    folder = tmp_path_factory.mktemp("files")
    found = {
        "data": tiny.save_data(folder / "data.jsonl", 16),
        "held": tiny.save_data(folder / "held.jsonl", 6, seed=1),
    }
    for kind in KINDS:
        found[kind] = encoder_decoders.save_model(folder / kind, kind)
        found[f"{kind} adapter"] = folder / f"{kind}-adapter"
        config = TrainConfig(
            model=found[kind], data=found["data"], output=found[f"{kind} adapter"], lr=0.05, max_steps=3
        )
        train(config, progress=False)
    return found


def own_answers(model: Any, words: Any, prompts: list[str]) -> list[str]:
    """model.generate's, a prompt alone at a time."""
    found = []
    for prompt in prompts:
        out = model.generate(**words(prompt, return_tensors="pt"), max_new_tokens=6, do_sample=False, num_beams=1)
        found.append(words.decode(out[0], skip_special_tokens=True))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_model_generates_own(files, kind):
    model, words = load_model(None, {"tuned": files[f"{kind} adapter"]})
    plain, _ = load_model(None, {"tuned": files[f"{kind} adapter"]}, accelerate=False)
    found = generate(model, words, PROMPTS, max_new_tokens=6, batch_size=3)
    assert found == own_answers(plain, words, PROMPTS)
    with plain.disable_adapter():
        base = own_answers(plain, words, PROMPTS)
    assert generate(model, words, PROMPTS, max_new_tokens=6, adapter_name="__base__") == base != found


@pytest.mark.parametrize("kind", KINDS)
def test_eval_is_of_the_rows_as_transformers_has_them(files, kind):
    model, words = load_model(None, {"tuned": files[f"{kind} adapter"]})
    plain, _ = load_model(None, {"tuned": files[f"{kind} adapter"]}, accelerate=False)
    found = evaluate(model, words, files["held"], max_new_tokens=6, batch_size=4)
    rows = [json.loads(line) for line in files["held"].read_text().splitlines()]
    total, tokens = 0.0, 0
    for row in rows:
        labels = words(text_target=row["completion"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            loss = plain(**words(row["prompt"], return_tensors="pt"), labels=labels).loss
        total, tokens = total + loss.item() * labels.numel(), tokens + labels.numel()
    assert found.tokens == tokens and found.loss == pytest.approx(total / tokens, rel=1e-5)
    for options in ({"train_on_turns": "last"}, {"completion_only_loss": False}):
        with pytest.raises(ValueError, match="an encoder-decoder's completion counts, no turns"):
            evaluate(model, words, files["held"], **options)
    answers = own_answers(plain, words, [row["prompt"] for row in rows])
    same = [answer.strip() == row["completion"].strip() for answer, row in zip(answers, rows, strict=True)]
    assert found.exact_match == sum(same) / len(rows)


def test_a_prompt_has_as_much_room_as_its_side(files, caplog):
    model, words = load_model(str(files["bart"]))
    long = "The cat runs. " * 40  # of 64 positions
    (found,) = generate(model, words, [long], max_new_tokens=6)
    ids = words(long)["input_ids"]
    out = model.generate(input_ids=torch.tensor([ids[:1] + ids[-63:]]), max_new_tokens=6, do_sample=False, num_beams=1)
    assert found == words.decode(out[0], skip_special_tokens=True)
    assert "cut the oldest tokens of 1 of 1 prompts" in caplog.text
    assert generate(model, words, ["a"], max_new_tokens=63)
    with pytest.raises(ValueError, match="max_new_tokens=64 leaves nothing to the prompt: the number of the model's"):
        generate(model, words, ["a"], max_new_tokens=64)
    with pytest.raises(ValueError, match=r"prompts\[0\]: an encoder-decoder has no chat template"):
        generate(model, words, [[{"role": "user", "content": "a"}]])


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_model_is_the_adapters(files, kind, tmp_path):
    report = merge(None, files[f"{kind} adapter"], tmp_path / "merged")
    assert report.layers > 0 and report.logits_relative_error < 1e-5
    model, words = load_model(None, {"tuned": files[f"{kind} adapter"]}, accelerate=False)
    merged: Any = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged").eval()
    assert own_answers(merged, words, PROMPTS) == own_answers(model, words, PROMPTS)


def test_methods_are_compared(files, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "ProcessPoolExecutor", Here)
    given: dict[str, Any] = {"model": files["t5"], "data": files["data"], "eval_data": files["held"], "r": [2]}
    given |= {"methods": ["lora", "prefix"], "max_tokens": 300, "batch_size": 4, "max_new_tokens": 3, "lr": [1e-2]}
    base, *trained = compare(Comparison(**given, output=tmp_path / "out", retain_data=files["data"]))
    for one in trained:
        assert one.loss < base.loss and one.answer_tokens_per_second > 0 and one.forgetting is not None
        assert one.tokens == pytest.approx(300, rel=0.3)


TASK = """
name: acts
data: {data}
templates: [{{name: as it is, input: "{{prompt}}", target: "{{completion}}"}}]
few_shot_share: 1.0
shots: [3]
"""


def test_a_tasks_examples_have_as_much_room_as_its_side(files, tmp_path, monkeypatch):
    """Wherever a task is measured on, as where it is trained on: an example counts by its longer side."""
    task, counted = tmp_path / "task.yaml", []
    task.write_text(TASK.format(data=files["held"]))
    read = tasks.read_rows

    def reading(*data: Any, **given: Any) -> Any:
        counted.append(given["length"](Example("The cat runs.", "It")))
        return read(*data, **given)

    for module in (tasks, evaluation, validation):
        monkeypatch.setattr(module, "read_rows", reading)
    monkeypatch.setattr(comparison, "ProcessPoolExecutor", Here)
    model, words = load_model(str(files["t5"]))
    evaluate(model, words, task, generations=False)
    given: dict[str, Any] = {"model": files["t5"], "data": files["data"], "eval_data": task, "max_steps": 1}
    train(TrainConfig(**given, output=tmp_path / "trained"), progress=False)
    compare(Comparison(**given, output=tmp_path / "out", retain_data=task, methods=["prompt"], lr=[1e-2], limit=2))
    assert len(counted) > 4 and set(counted) == {len(words("The cat runs.")["input_ids"])}


def run(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.output


def test_the_commands(files, tmp_path):
    given = ("train", "--model", files["t5"], "--data", files["data"], "--output", tmp_path / "out", "--max-steps", 2)
    assert "\ndecoder: [[" in run(*given, "--dry-run")
    run(*given)
    found = json.loads(run("eval", "--adapter", tmp_path / "out", "--data", files["held"], "--json").splitlines()[-1])
    assert found["rows"] == 6 and found["loss"] > 0
    assert run("generate", "--adapter", tmp_path / "out", "--prompt", "The cat").startswith("> The cat\n")
    run("merge", "--adapter", tmp_path / "out", "--output", tmp_path / "merged")
