"""What a training leaves to those who meet its folder alone: a tokenizer, a card, and figures that say where they come from."""

import json
import re
from dataclasses import replace
from hashlib import sha256

import pytest
import tiny
import torch
import yaml
from peft import AutoPeftModelForCausalLM
from training import (  # noqa: F401  (fixtures)
    a_base,
    a_config,
    a_finished_run,
    a_run_to_go_on,
    on_cpu,
    one_thread,
    records,
    some_data,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastlora
from fastlora import adapters, card
from fastlora.data.examples import Example
from fastlora.generation import generate
from fastlora.merge import merge
from fastlora.models import load_model
from fastlora.summary import changed_options, data_files
from fastlora.train import train

PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def split(text: str) -> tuple[dict, str]:
    """A card's front matter and its body."""
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_an_adapters_folder_has_its_tokenizer_and_its_chat_template(finished):
    found = AutoTokenizer.from_pretrained(finished)
    assert found.chat_template == tiny.CHAT_TEMPLATE and found.eos_token == "</s>"
    text = "The cat runs."
    assert found(text)["input_ids"] == tiny.tokenizer()(text)["input_ids"]
    assert found.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False).startswith("<s><|user|>a")


def test_such_a_folder_is_read_merged_and_answered_from(finished, tmp_path):
    assert adapters.read(finished).config.r == 2
    merge(None, finished, tmp_path / "merged")
    for model, tokenizer in (load_model(None, {"default": finished}), load_model(str(tmp_path / "merged"))):
        assert len(generate(model, tokenizer, ["The cat runs."], max_new_tokens=3)) == 1
    assert "fastlora" not in {path.name for path in (tmp_path / "merged").iterdir()}
    assert not (tmp_path / "merged" / "report.html").exists()


def test_a_card_says_what_was_trained_on_what_how_and_with_which_result(finished, base, data):
    text = (finished / "README.md").read_text()
    front, body = split(text)
    assert front == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["fastlora", "lora"],
        "language": "und",
    }
    summary = json.loads((finished / "summary.json").read_text())
    digest = sha256(data.read_bytes()).hexdigest()
    for part in (
        "# out",
        f"An adapter (lora) of `{base}`, trained with fastlora: 6 steps of 8 rows, of 48.",
        f"| `train.jsonl` | data | 48 | `{digest}` |",
        "| `r` | `2` |",
        "| `lr` | `0.01` |",
        "| `max_steps` | `6` |",
        f"6 steps of 8 rows, {summary['tokens']:,} tokens",
        f"| training loss, last steps | {summary['loss']:.4f} |",
        f"| torch | {card._plain(torch.__version__)} |",
    ):
        assert part in body, part
    assert "`epochs`" not in body and "`save_steps`" in body and "More Information Needed" not in text
    (code,) = PYTHON.findall(body)
    found: dict = {}
    exec(code, found)
    assert found["tokenizer"].eos_token == "</s>" and found["model"].active_adapter == "default"


@pytest.mark.parametrize("method", ["full", "adapter", "prompt"])
def test_cards_of_other_methods_load_them(config, method):
    options = {"method": method, "r": 16, "lora_alpha": 32, "lora_dropout": None, "lr": 1e-3}
    train(replace(config, max_steps=1, **options), progress=False)
    front, body = split((config.output / "README.md").read_text())
    assert front["library_name"] == ("transformers" if method == "full" else "peft") and method in front["tags"]
    (code,) = PYTHON.findall(body)
    assert len(code.splitlines()) <= 5
    found: dict = {}
    exec(code, found)
    assert found["tokenizer"].eos_token == "</s>"
    assert isinstance(found["model"], torch.nn.Module)


HOSTILE = "x|y`` `<script>alert(1)</script>\n# [a](javascript:b)\x00\u202e---"


def test_what_strangers_named_stays_what_they_named(finished):
    summary = json.loads((finished / "summary.json").read_text())
    summary["changed"] |= {"prompt_tuning_init_text": HOSTILE}
    summary["config"] |= {"model": HOSTILE, "output": f"o/{HOSTILE.replace('/', ':')}"}
    summary["data"] = [{"option": "data", "file": HOSTILE, "rows": None}]
    summary["versions"] = {HOSTILE: HOSTILE}
    text = card.text(summary)
    front, body = split(text)
    assert not {"base_model", "datasets"} & front.keys()
    headings = [line for line in body.splitlines() if line.startswith("#")]
    assert headings[1:] == ["## How to load it", "## What it was trained on", "## How", "## Results", "## Made with"]
    outside = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", PYTHON.sub("", body).replace("\\`", ""))
    assert "<script>" not in outside and "](" not in outside and "\x00" not in text.split("---\n", 2)[2]
    rows = [line for line in body.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) in (3, 5) for row in rows)


def test_the_front_matter_has_ids_of_the_hub_and_no_paths_which_the_hub_refuses(finished):
    summary = json.loads((finished / "summary.json").read_text())
    sources = ("hf:one/rows:train[:10]", "rows.jsonl", "hf:one/rows:test", "hf:two")
    summary["data"] = [{"option": "data", "file": one, "rows": 3} for one in sources]
    summary["data"].append({"option": "eval_data", "file": "hf:three/rows", "rows": None})
    for model, known in (("some/model", True), ("gpt2", True), ("../base", False), ("/a/b/c", False), ("a/b/c", False)):
        summary["config"]["model"] = model
        front, _ = split(card.text(summary))
        assert front.get("base_model") == (model if known else None)
        assert front["datasets"] == ["one/rows", "two"]


def test_a_step_of_the_card_has_the_rows_of_all_batches_and_processes(finished):
    summary = json.loads((finished / "summary.json").read_text())
    summary["config"] |= {"batch_size": 1, "gradient_accumulation_steps": 1}
    assert ": 6 steps of 1 row, of 48." in card.text(summary)
    summary["config"] |= {"batch_size": 5}
    assert ": 6 steps of at most 5 rows, of 48." in card.text(summary)
    assert ": 6 steps of 5 rows, of 48." in card.text(
        {**summary, "tasks": {"one": {}}}
    )  # a mixture's steps are all whole
    summary["config"] |= {"batch_size": 2, "gradient_accumulation_steps": 3}
    assert ": 1 step of 24 rows, of 48." in card.text({**summary, "steps": 1, "processes": 4})


def test_code_and_plain_text_are_on_one_line():
    assert card._code("a`b") == "``a`b``" and card._code("`a") == "`` `a ``" and card._code("") == ""
    assert card._code("a|b\nc") == "`a\\|b c`" and card._plain("*a* [b](c) <d>") == "\\*a\\* \\[b\\]\\(c\\) \\<d\\>"


def test_results_tell_what_was_measured_on_held_out_rows(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert [name for name, _ in card.results(summary)] == ["training loss, first steps", "training loss, last steps"]
    more = {"best_step": 4, "best_eval_loss": 1.25, "validation": {"step": 6, "eval_loss": 1.5, "retain_loss": None}}
    found = dict(card.results({**summary, **more}))
    assert found["best_step"] == "4" and found["best_eval_loss"] == "1.2500" and found["eval_loss"] == "1.5000"
    assert "retain_loss" not in found


def test_the_summary_has_the_datas_files_configuration_and_memory(finished, data, base):
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["data"] == [
        {
            "option": "data",
            "file": str(data),
            "rows": 48,
            "bytes": data.stat().st_size,
            "sha256": sha256(data.read_bytes()).hexdigest(),
        }
    ]
    assert summary["config"]["model"] == str(base) and summary["versions"]["fastlora"] == fastlora.__version__
    assert summary["peak_memory"] > 2**20
    assert summary["tokens"] == records(finished)[-1]["tokens"] > 0


def test_files_are_those_of_options_and_of_rows(config, tmp_path):
    other, listed = tmp_path / "other.jsonl", tmp_path / "listed.jsonl"
    other.write_text("a")
    examples = [Example("a", "b", f"{other}:1"), Example("a", "b", f"{other}:2"), Example("a", "b", "hub/set:1")]
    found = data_files(replace(config, data=listed), examples)
    told = [(one["option"], one["file"], one["rows"], one.get("bytes")) for one in found]
    assert told == [
        ("data", str(listed), None, None),
        ("data", str(other), 2, 1),
        ("data", "hub/set", 1, None),
    ]


def test_a_tasks_own_file_is_told_and_rows_are_counted_once(config, tmp_path):
    rows, task = tmp_path / "rows.jsonl", tmp_path / "task.yaml"
    rows.write_text('{"q": "a", "a": "b"}\n')
    task.write_text("name: own\ndata: rows.jsonl\ncolumns: {prompt: q, completion: a}\n")
    given = replace(config, data=rows, columns={"prompt": "q", "completion": "a"}, eval_data=task)
    found = data_files(given, [Example("a", "b", f"{rows}:1")])
    assert [(one["option"], one["file"], one["rows"]) for one in found] == [
        ("data", str(rows), 1),
        ("eval_data", str(task), None),
        ("eval_data", str(rows), None),
    ]
    assert all(len(one["sha256"]) == 64 for one in found)


def test_tokens_are_counted_on_in_a_resumed_run(again, finished):
    import shutil

    shutil.rmtree(again.output / "checkpoints" / "step-6")
    train(again, progress=False)
    counts = [one["tokens"] for one in records(again.output)]
    assert counts == [one["tokens"] for one in records(finished)]
    assert all(later > earlier > 0 for earlier, later in zip(counts, counts[1:], strict=False))


def test_options_that_changed_are_those_that_shape_what_is_trained(config):
    from dataclasses import asdict

    plain = replace(config, r=16, lora_alpha=32, lr=2e-4, lora_dropout=None, epochs=3, overwrite=True)
    assert changed_options(asdict(plain)) == {}
    assert changed_options(asdict(replace(plain, method="full", lr=2e-5))) == {"method": "full"}
    assert changed_options(asdict(replace(plain, lr=1e-3, truncation="drop"))) == {"lr": 1e-3, "truncation": "drop"}


def test_a_model_that_peft_loads_computes_what_was_trained(finished):
    tokenizer = AutoTokenizer.from_pretrained(finished)
    ids = tokenizer("The cat runs.", return_tensors="pt")["input_ids"]
    theirs = AutoPeftModelForCausalLM.from_pretrained(finished).eval()
    ours, _ = load_model(None, {"default": finished})
    with torch.no_grad():
        assert torch.allclose(theirs(input_ids=ids).logits, ours(input_ids=ids).logits, atol=1e-4)
    assert not isinstance(theirs, type(AutoModelForCausalLM))
