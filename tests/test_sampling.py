"""How an answer's tokens are chosen: greedily, drawn or by beams, as transformers would; and that a seed repeats them."""

import json
from typing import Any

import pytest
import tiny
import torch
from typer.testing import CliRunner

from fastlora import generation
from fastlora.cli import app
from fastlora.generation import Sampling, generate
from fastlora.models import load_model
from fastlora.summary import is_of_chat

PROMPTS = ["The owl hides. What does the owl do?", "The cat runs. What does the cat do?", "The dog"]


@pytest.fixture(scope="module", autouse=True)
def on_cpu():
    with tiny.on_cpu():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def loaded(folder) -> tuple[Any, Any]:
    return load_model(str(folder))


def answers(loaded: tuple[Any, Any], **options: Any) -> list[str]:
    return generate(*loaded, PROMPTS, max_new_tokens=12, sampling=Sampling(**options))


def test_nothing_told_is_the_likeliest_token(loaded):
    assert answers(loaded) == generate(*loaded, PROMPTS, max_new_tokens=12) == answers(loaded, seed=7)


def test_a_seed_repeats_what_is_drawn_and_leaves_torchs_own_as_it_was(loaded):
    before = torch.get_rng_state()
    first = answers(loaded, temperature=1.0, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)
    assert answers(loaded, temperature=1.0, seed=3) == first != answers(loaded, temperature=1.0, seed=4)


def test_one_token_to_draw_from_is_greedy(loaded):
    greedy = answers(loaded)
    assert answers(loaded, temperature=2.0, top_k=1) == greedy == answers(loaded, temperature=2.0, top_p=1e-9)
    assert answers(loaded, temperature=2.0) != greedy


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"repetition_penalty": 1.5}], ids=str)
def test_beams_and_penalties_are_transformers_own(loaded, options):
    model, words = loaded
    ids = words(PROMPTS[0], return_tensors="pt")["input_ids"]
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=words.pad_token_id,
        **options,
    )
    (expected,) = words.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    assert generate(model, words, PROMPTS[:1], max_new_tokens=12, sampling=Sampling(**options)) == [expected]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1: expected 0 or more"),
        ({"temperature": float("nan")}, "temperature=nan: expected 0 or more"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p=0.0: expected above 0, at most 1"),
        ({"temperature": 1.0, "top_k": -1}, "top_k=-1: expected 0 or more"),
        ({"top_p": 0.5}, "top_p=0.5: expected temperature as well"),
        ({"top_k": 5}, "top_k=5: expected temperature as well"),
        ({"num_beams": 0}, "num_beams=0: expected 1 or more"),
        ({"num_beams": 2, "temperature": 1.0}, "num_beams=2 and temperature=1.0 exclude each other"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0: expected above 0"),
        ({"seed": -1}, "seed=-1: expected 0 or more"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_wrong_values_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


def test_what_is_no_number_is_named():
    with pytest.raises(TypeError, match="top_k=0.5: expected int"):
        Sampling(temperature=1.0, top_k=0.5)  # type: ignore[arg-type]


def said(*words: object) -> tuple[int, str, str]:
    found = CliRunner().invoke(app, [str(word) for word in words])
    return found.exit_code, found.stdout, found.stderr


def test_the_command_draws(folder):
    given = ("generate", "--model", folder, "--prompt", PROMPTS[0], "--max-new-tokens", 12)
    code, greedy, _ = said(*given)
    assert code == 0
    drawn = [said(*given, "--temperature", 1.5, "--seed", seed)[1] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2] and greedy not in drawn
    code, _, error = said(*given, "--top-p", 0.5)
    assert code == 2 and "--top-p 0.5: expected temperature as well" in error


def test_a_system_message_goes_before_the_users(folder, monkeypatch):
    seen: list[Any] = []
    monkeypatch.setattr(generation, "generate", lambda _, __, prompts, **___: seen.extend(prompts) or ["x"])
    assert said("generate", "--model", folder, "--prompt", "a", "--chat", "--system", "Be brief.")[0] == 0
    assert seen == [[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}]]


def test_who_was_trained_on_conversations_is_asked_as_in_one(folder, tmp_path):
    """By what training left beside the adapter; --no-chat asks as ever."""
    chat = [{"role": "user", "content": "The cat runs."}, {"role": "assistant", "content": "It runs."}]
    data = {"chat": [{"messages": chat}] * 4, "plain": [{"prompt": "The cat", "completion": " runs."}] * 4}
    for name, rows in data.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        options = ("--model", folder, "--data", tmp_path / f"{name}.jsonl", "--output", tmp_path / name, "--lr", 0.01)
        assert said("train", *options, "--max-steps", 3, "--batch-size", 4)[0] == 0
        assert is_of_chat(tmp_path / name) == (name == "chat")
    asked = ("--prompt", "The cat", "--max-new-tokens", 4)
    code, output, error = said("generate", "--adapter", tmp_path / "chat", *asked)
    assert code == 0 and "trained on conversations" in error
    same = said("generate", "--adapter", tmp_path / "chat", *asked, "--chat")
    assert same[1] == output and "trained on conversations" not in same[2]
    for options in (("--adapter", tmp_path / "plain"), ("--adapter", tmp_path / "chat", "--no-chat")):
        assert "trained on conversations" not in said("generate", *options, *asked)[2]
    told = said("generate", "--adapter", tmp_path / "chat", *asked, "--system", "Be brief.")
    assert told[0] == 0 and told[1].startswith("> The cat\n")
    code, _, error = said("generate", "--adapter", tmp_path / "plain", *asked, "--system", "Be brief.")
    assert code == 2 and "--system 'Be brief.': expected chat as well" in error
    both = ("--adapter", tmp_path / "chat", "--adapter", tmp_path / "plain")
    code, _, error = said("generate", *both, *asked)
    assert code == 2 and "expected --chat or --no-chat" in error
    assert not is_of_chat(tmp_path / "none")
    (tmp_path / "plain" / "summary.json").write_text("{")
    assert not is_of_chat(tmp_path / "plain")
