"""`fastlora train --dry-run`: what a run would be, without one, and without reading weights."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import encoder_decoders
import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_options import run
from training import (  # noqa: F401  (fixtures)
    a_base,
    a_config,
    contents,
    numbers,
    on_cpu,
    one_thread,
    records,
    some_data,
)
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from fastlora import models, planning, trainable
from fastlora.planning import plan
from fastlora.train import train


def test_a_plan_tells_what_the_run_then_is(config, base, monkeypatch, capsys):
    config = replace(config, epochs=1.5, batch_size=4, gradient_accumulation_steps=2)
    before = contents(config.output.parent)
    with monkeypatch.context() as patch:
        patch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a plan reads weights"))
        found = plan(config)
    assert contents(config.output.parent) == before and not config.output.exists()
    result = train(config)
    told = capsys.readouterr().err
    for name, value in found.told.items():
        assert value in told, name
    assert found.steps == result.steps == 9
    assert found.samples[0].source.endswith("train.jsonl:1") and len(found.samples) == 3
    first = json.loads(config.data.read_text().splitlines()[0])
    text = found.samples[0].text
    assert text == f"<s>{first['prompt']}[[{first['completion']}</s>]]"
    assert found.samples[0].counted < found.samples[0].tokens
    epoch = sum(record["tokens_per_second"] * record["seconds"] for record in records(config.output)[:6])
    assert found.tokens_per_step == pytest.approx(epoch / 6)
    assert 0 < found.labelled_per_step < found.tokens_per_step
    assert found.memory["gradients"] == 4 * result.trainable_parameters
    assert found.memory["optimiser"] == 8 * result.trainable_parameters
    tensors = load_file(base / "model.safetensors")
    assert found.memory["weights"] == 4 * sum(one.numel() for one in tensors.values()) + 4 * result.trainable_parameters
    taken = sum(len(content) for content in contents(config.output).values())
    assert taken <= 1.1 * found.disk + 200_000, "the tokenizer, the plot and the words aside"


@pytest.mark.parametrize(
    "method", ["full", "bitfit", "dora", "ia3", "prompt", "prefix", "adapter", "norm", "tokens", "cartridge"]
)
def test_a_plan_of_every_method(config, tmp_path, method):
    options = {"token_indices": [1]} if method == "tokens" else {}
    model = config.model
    if method == "bitfit":
        model = str(tiny.save_model(tmp_path / "biased", attention_bias=True))
    config = replace(config, method=method, r=16, lora_alpha=32, lora_dropout=None, max_steps=1, model=model, **options)
    found = plan(config)
    assert found.memory["gradients"] == 4 * train(config, progress=False).trainable_parameters > 0
    assert found.peak > 0 and found.disk > 0


def test_of_several_tasks_a_row_of_each_is_shown(config, tmp_path):
    names = ("b", "a", "d", "c")
    for name in names:
        tiny.save_data(tmp_path / f"{name}.jsonl", 5)
    found = plan(replace(config, data=[str(tmp_path / f"{name}.jsonl") for name in names]))
    assert [one.source for one in found.samples] == [f"{tmp_path}/{name}.jsonl:1" for name in names]
    one_task = plan(replace(config, data=str(tmp_path / "a.jsonl"), rehearse=0.5, rehearse_data=tmp_path / "b.jsonl"))
    assert [one.source for one in one_task.samples] == [f"{tmp_path}/{name}.jsonl:1" for name in ("a", "b")]


def test_a_plan_of_a_run_that_goes_on(config):
    train(replace(config, max_steps=2), progress=False)
    before = contents(config.output)
    found = plan(replace(config, max_steps=5, resume=True))
    assert found.told["steps"] == "5, of 8 rows each, from step 3 on" and found.steps == 3 and "extended" in found.told
    assert plan(replace(config, max_steps=2, resume=True)).told["steps"] == "2, of 8 rows each, all of them done"
    assert contents(config.output) == before
    for rows, told in ((1, "5, of 1 row each"), (9, "5, of at most 9 rows each"), (48, "5, of 48 rows each")):
        assert plan(replace(config, output=config.output / "new", max_steps=5, batch_size=rows)).told["steps"] == told
    with pytest.raises(FileExistsError, match="resume=True goes on from there"):
        plan(config)


def test_the_plan_is_printed(config, base, data):
    words = ("--model", base, "--data", data, "--output", config.output, "--max-steps", 3)
    told = run("train", *words, "--dry-run")
    for part in ("48", "3, of 8 rows each", "count in the loss", "an estimate: weights", "GB free"):
        assert part in told, part
    assert "[[ It" in told and ":3: " in told and not config.output.exists()
    assert "--r 0: expected" in run("train", *words, "--dry-run", "--r", 0, code=2)


def test_an_empty_base_is_the_base_but_for_its_values(base):
    device = torch.device("cpu")
    empty, full = (
        models.empty_base(str(base), torch.bfloat16, device),
        models.load_base(str(base), torch.bfloat16, device),
    )
    own, theirs = (
        {name: (one.shape, one.dtype, one.device) for name, one in each.named_parameters()} for each in (empty, full)
    )
    assert own == theirs
    for name, buffer in full.named_buffers():
        assert torch.equal(dict(empty.named_buffers())[name], buffer), name
    assert all(bool((one == 1).all()) for one in empty.parameters() if one.dim() == 1)


def test_an_empty_base_keeps_its_ties(tmp_path):
    model = tiny.gpt2()
    model.save_pretrained(tmp_path)
    empty = models.empty_base(str(tmp_path), None, torch.device("cpu"))
    assert empty.lm_head.weight is empty.transformer.wte.weight
    assert sum(one.nbytes for one in empty.parameters()) == sum(one.nbytes for one in model.parameters())


def test_an_empty_encoder_decoder_is_one(tmp_path):
    model = tiny.t5()
    model.save_pretrained(tmp_path)
    empty = models.empty_base(str(tmp_path), None, torch.device("cpu"))
    assert type(empty) is type(model) and empty.encoder.embed_tokens.weight is empty.shared.weight
    assert [one.shape for one in empty.parameters()] == [one.shape for one in model.parameters()]


def test_more_tokens_checkpointing_and_bits_change_the_estimate_as_they_should(config):
    model = trainable.build(config, torch.float32, torch.device("cpu"), None, models.empty_base)
    base = planning.needed_memory(config, model, 1000)
    assert planning.needed_memory(config, model, 2000)["activations"] > 1.8 * base["activations"] - 3 * 2**23 * 4
    thrifty = planning.needed_memory(replace(config, gradient_checkpointing=True), model, 10**6)["activations"]
    eager = planning.needed_memory(replace(config, accelerate=False), model, 10**6)["activations"]
    assert thrifty < planning.needed_memory(config, model, 10**6)["activations"] < eager
    assert planning.needed_memory(replace(config, load_in_4bit=True), model, 1)["weights"] < base["weights"]


PEAK = """
import json, sys
import torch
from fastlora import memory
from fastlora.config import TrainConfig
from fastlora.planning import plan
from fastlora.train import train
given = json.loads(sys.argv[1])
output = given.pop("output")
found = plan(TrainConfig(**given, output=output)).memory
train(TrainConfig(**given, output=output), progress=False)
print(json.dumps({"estimate": found, "peak": memory.resident("VmHWM")}))
"""


def wide_llama(folder: Path) -> Path:
    return tiny.save_model(folder, hidden_size=512, intermediate_size=1536, num_hidden_layers=6)


def wide_gpt2(folder: Path) -> Path:
    words = tiny.tokenizer()
    torch.manual_seed(0)
    sizes = {"vocab_size": len(words), "n_embd": 512, "n_layer": 6, "n_head": 8, "n_positions": 256}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def wide_t5(folder: Path) -> Path:
    sizes = {"d_model": 512, "d_kv": 64, "num_heads": 8, "d_ff": 1024, "num_layers": 2}
    return encoder_decoders.save_model(folder, "t5", dropout=0.1, **sizes)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells what a process holds")
@pytest.mark.parametrize("make", [wide_llama, wide_gpt2, wide_t5])
def test_the_estimate_is_within_a_quarter_of_the_measured_peak(make, tmp_path):
    """Of a step that takes much more than the process itself, in a process of its own."""
    rows = [{"prompt": row["prompt"] * 8, "completion": row["completion"]} for row in tiny.rows(64)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {
        "model": str(make(tmp_path / "model")),
        "data": str(tmp_path / "rows.jsonl"),
        "output": str(tmp_path / "out"),
    }
    given |= {"batch_size": 32, "max_steps": 2, "r": 8}
    ran = subprocess.run([sys.executable, "-c", PEAK, json.dumps(given)], check=True, capture_output=True, text=True)
    found = json.loads(ran.stdout.splitlines()[-1])
    estimate = sum(found["estimate"].values())
    assert abs(estimate - found["peak"]) <= 0.25 * found["peak"], found
    assert found["estimate"]["activations"] > 0.3 * found["peak"], found
