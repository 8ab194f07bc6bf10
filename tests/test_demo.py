"""The demo: the shipped base model, the command that made it, and the report."""

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from process_here import Here
from safetensors import safe_open

from fastlora import comparison, demo
from fastlora.comparison import Outcome
from fastlora.data.examples import read_examples
from fastlora.demo import pretrain
from fastlora.demo.tasks import BASE_TASKS, answers, generate
from fastlora.evaluation import exact_match, rouge
from fastlora.memory import peak, resident
from fastlora.models import load_model

MIB = 2**20


@pytest.fixture(scope="module")
def base() -> tuple[Any, Any]:
    return load_model(str(demo.BASE_MODEL), dtype="float32")


@pytest.fixture
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_base_is_small_and_without_pickles() -> None:
    files = [path for path in demo.BASE_MODEL.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8 * MIB
    assert {path.suffix for path in files} <= {".json", ".jinja", ".safetensors"}
    with safe_open(demo.BASE_MODEL / "model.safetensors", framework="pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}


def test_base_says_how_it_was_made(base: tuple[Any, Any]) -> None:
    record = json.loads((demo.BASE_MODEL / "training.json").read_text())
    assert record["command"].startswith("python -m fastlora.demo.pretrain --output DIR --steps")
    assert record["step"] == record["steps"] and record["parameters"] == base[0].num_parameters()
    assert record["tasks"] == list(BASE_TASKS) and "summarization" not in BASE_TASKS
    assert set(record["exact_match"]) == set(BASE_TASKS)


def test_base_answers_as_recorded(base: tuple[Any, Any]) -> None:
    # Two tasks of those that the record calls good; binomial noise of 60 answers aside.
    recorded = json.loads((demo.BASE_MODEL / "training.json").read_text())["exact_match"]
    for task in sorted(recorded, key=recorded.__getitem__)[-2:]:
        examples = generate(task, 60, seed=77, split="test")
        given = answers(*base, examples)
        assert exact_match(given, [example.completion for example in examples]) >= recorded[task] - 0.15
        assert recorded[task] >= 0.8


def test_base_has_the_tokenizer_that_the_command_makes(base: tuple[Any, Any]) -> None:
    made, shipped = pretrain.make_tokenizer(seed=0), base[1]
    assert made.get_vocab() == shipped.get_vocab() and made.chat_template == shipped.chat_template
    text = "Übrigens: 42 naïve café-Gäste, 北京!\n"
    assert shipped.decode(shipped(text)["input_ids"], skip_special_tokens=True) == text


@pytest.mark.parametrize(("task", "limit"), [*((task, 100) for task in BASE_TASKS), ("summarization", 160)])
def test_examples_are_short(base: tuple[Any, Any], task: str, limit: int) -> None:
    texts = [example.prompt + example.completion for example in generate(task, 300, seed=9)]
    assert max(len(ids) for ids in base[1](texts)["input_ids"]) <= limit


def test_chat_template_is_the_tasks_layout(base: tuple[Any, Any]) -> None:
    tokenizer = base[1]
    messages = [{"role": "user", "content": "What is one plus one?"}, {"role": "assistant", "content": "two"}]
    asked = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert asked == "<s>What is one plus one?\nAnswer:"
    rendered = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    marked = [token for token, mask in zip(rendered["input_ids"], rendered["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(rendered["input_ids"]) == asked + " two</s>"
    assert tokenizer.decode(marked) == " two</s>"


def test_batches_weigh_completions_above_prompts() -> None:
    tokenizer = pretrain.make_tokenizer(seed=0, examples_per_task=200)
    steps = list(pretrain.batches(tokenizer, steps=3, seed=1))
    assert len(steps) == 3 and all(len(tokens) == pretrain.BATCH for tokens, _ in steps)
    for tokens, weights in steps:
        for row, weight in zip(tokens, weights, strict=True):
            shown = tokenizer.decode(row[weight == pretrain.PROMPT_WEIGHT], skip_special_tokens=True)
            answer = tokenizer.decode(row[weight == 1])
            assert shown and answer.startswith(" ") and answer.endswith("</s>")
            assert (row[weight == 0] == tokenizer.pad_token_id).all()


def test_pretraining_is_reproducible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.setattr(pretrain, "EVALUATED", 2)
    for name in "ab":
        record = pretrain.pretrain(tmp_path / name, steps=2, seed=5, threads=1)
        assert record["step"] == 2 and math.isfinite(record["loss"])
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert first == second
    model, _ = load_model(str(tmp_path / "a"), dtype="float32")
    assert model.num_parameters() == record["parameters"]


def test_scores_by_hand() -> None:
    references = [example.completion for example in generate("reading", 4, seed=0)]
    right = [reference.strip() for reference in references]
    assert exact_match([*right[:3], "nobody"], references) == 0.75
    assert rouge(right, references) == {"rouge1": 1.0, "rouge2": rouge(right, references)["rouge2"], "rougeL": 1.0}
    assert rouge(["", "", "", ""], references) == {"rouge1": 0.0, "rouge2": 0.0, "rougeL": 0.0}


def test_resident_memory() -> None:
    assert 10 * MIB < resident("VmRSS") <= resident("VmHWM")
    with pytest.raises(ValueError, match="kind must name a line .* got 'VmNone'"):
        resident("VmNone")
    assert peak(torch.device("cpu")) >= resident("VmRSS")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A demo on few dialogues, in one process; its figures mean nothing, its files are those of a whole one."""
    small = {
        "DIALOGUES": {"train": 16, "validation": 3, "test": 4},
        "RETAINED": 2,
        "EPOCHS": 1,
        "LR_FACTORS": [10.0, 50.0],
        "TIMED_STEPS": 2,
    }
    output = tmp_path_factory.mktemp("demo")
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "ProcessPoolExecutor", Here)
        for name, value in small.items():
            patch.setattr(demo, name, value)
        torch.set_num_threads(1)
        try:
            return output, demo.main(output)
        finally:
            torch.set_num_threads(threads)


def test_demo_compares_methods_at_their_best_rates(results: tuple[Path, dict[str, Any]]) -> None:
    output, found = results
    assert json.loads((output / "report.json").read_text()) == found
    compared = json.loads((output / "compare" / comparison.NAME).read_text())
    assert (compared["outcomes"], compared["best"]) == (found["outcomes"], found["best"])
    assert (output / "compare" / comparison.PLOT).is_file()
    base, *trained = [Outcome(**one) for one in found["outcomes"]]
    assert [one.kind for one in trained] == ["lora, r 16"] * 2 + ["full"] * 2
    assert all(one.steps == 4 and one.tokens == trained[0].tokens and one.loss != one.eval_loss for one in trained)
    assert all(one.forgetting == pytest.approx(one.retained_loss - base.retained_loss) for one in trained)
    assert trained[-1].trainable_parameters == found["base"]["parameters"]


def test_demo_leaves_its_data_and_the_best_of_each_method(results: tuple[Path, dict[str, Any]]) -> None:
    output, found = results
    rows = {
        name: read_examples(output / "data" / f"{name}.jsonl") for name in ("train", "validation", "test", "retain")
    }
    assert {name: len(of_file) for name, of_file in rows.items()} == {
        "train": 16,
        "validation": 3,
        "test": 4,
        "retain": 14,
    }
    answers = [{example.completion for example in rows[name]} for name in ("train", "validation", "test")]
    assert not any(one & other for one, other in itertools.combinations(answers, 2))
    for name, method in zip(found["best"][1:], ("lora", "full"), strict=True):
        weights = "adapter_model.safetensors" if method == "lora" else "model.safetensors"
        run = output / "compare" / comparison.RUNS / name / weights
        assert (output / method / weights).read_bytes() == run.read_bytes()
        assert not (output / method / "checkpoints").exists()
    load_model(None, {"default": output / "lora"})


def test_demo_answers_and_times(results: tuple[Path, dict[str, Any]]) -> None:
    _, found = results
    kinds = ["base", "lora, r 16", "full"]
    assert list(found["exact_match"]) == kinds and list(found["losses"]) == kinds[1:]
    for shares in found["exact_match"].values():
        assert list(shares) == list(BASE_TASKS) and all(0 <= share <= 1 for share in shares.values())
    assert all(list(sample["answers"]) == kinds for sample in found["samples"]) and len(found["samples"]) == 4
    for losses in found["losses"].values():
        assert len(losses) == 4 and all(math.isfinite(loss) for loss in losses)
    steps = found["step_time"]
    assert all(len(losses) == 3 and losses[-1] < losses[0] for losses in steps["losses"].values())
    # Other dropout masks, the same adapter: B is zero, so the first losses are the frozen model's.
    assert steps["losses"]["fastlora"][0] == pytest.approx(steps["losses"]["peft"][0], abs=1e-5)
    assert all(seconds > 0 for seconds in (*steps["seconds"].values(), steps["ratio"]))


def test_report_is_one_self_contained_page(results: tuple[Path, dict[str, Any]]) -> None:
    output, found = results
    page = (output / "report.html").read_text()
    assert not re.findall(r'(?:src|href)\s*=\s*["\'](?!#)', page)
    assert not re.findall(r"@import|url\((?!#)|<script|<link", page)
    assert page.count("<svg") == page.count("</svg>") == 4
    sample = found["samples"][0]["reference"]
    chosen = next(one for one in found["outcomes"] if one["name"] == found["best"][1])
    for text in (sample, found["date"], found["machine"]["cpu"], f"{chosen['trainable_parameters']:,}"):
        assert text in page


def test_a_comparison_that_is_no_demos_is_kept(tmp_path: Path) -> None:
    (tmp_path / "compare").mkdir()
    with pytest.raises(FileExistsError, match="holds compare, no demo's: expected a folder of its own"):
        demo.main(tmp_path)
