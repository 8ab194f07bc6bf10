"""A step whose loss is not finite ends the run with its rows by name, and leaves what was good."""

import math
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from training import a_base, a_config, adapter, assert_same_bits, on_cpu, one_thread, records, some_data  # noqa: F401  (fixtures)

from fastlora import checkpoint, divergence
from fastlora.course import Diverged, TrainingError
from fastlora.divergence import Blame, has_risen
from fastlora.train import train


@pytest.fixture(name="poisoned")
def a_base_with_a_broken_token(tmp_path) -> tuple[Path, Path]:
    """A base one of whose embeddings is NaN, and rows of which only the 13th has that token."""
    base = tiny.save_model(tmp_path / "poisoned")
    data = tiny.save_data(tmp_path / "rows.jsonl", 24)
    lines = data.read_text().splitlines()
    lines[12] = '{"prompt": "What does the Z do?", "completion": " It Zs."}'
    data.write_text("\n".join(lines) + "\n")
    (token,) = tiny.tokenizer()("Z", add_special_tokens=False)["input_ids"]
    weights = load_file(base / "model.safetensors")
    weights["model.embed_tokens.weight"][token] = math.nan
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    return base, data


def failing(config) -> str:
    with pytest.raises(TrainingError) as caught:
        train(config, progress=False)
    return str(caught.value)


def test_a_bad_row_is_named_and_the_step_before_is_kept(config, poisoned, tmp_path):
    base, data = poisoned
    config = replace(config, model=base, data=data, batch_size=2, epochs=1, save_steps=50)
    seed = next(
        seed for seed in range(20) if failing_step(replace(config, seed=seed, output=tmp_path / f"s{seed}")) > 2
    )
    config = replace(config, seed=seed)
    told = failing(config)
    step = failing_step_of(told)
    assert (
        f"1 of its 2 rows alone have no finite loss: {data}:13; the base alone has none either for each of them" in told
    )
    assert "the loss is nan" in told and "a lower lr may help" in told
    assert told.endswith(f"; kept is {config.output / 'checkpoints' / f'step-{step - 1}'}")
    assert [one["step"] for one in records(config.output)] == list(range(1, step))
    # The checkpoint is that of a run that ended there, generators and all.
    saved = checkpoint.read(config.output / "checkpoints" / f"step-{step - 1}")
    stopped = replace(config, output=tmp_path / "stopped", save_steps=step - 1)
    failing(stopped)
    other = checkpoint.read(stopped.output / "checkpoints" / f"step-{step - 1}")
    assert torch.equal(saved.state["rng"][0]["torch"], other.state["rng"][0]["torch"])
    assert saved.state["rng"][0]["python"] == other.state["rng"][0]["python"]
    assert_same_bits(adapter(saved.folder), adapter(other.folder))
    # A resumed run comes to the same end.
    assert failing(replace(config, resume=True)) == told


def failing_step_of(told: str) -> int:
    return int(told.split()[1].rstrip(":"))


def failing_step(config) -> int:
    return failing_step_of(failing(config))


def test_it_says_in_which_step_even_to_another_process(config):
    with pytest.raises(Diverged) as caught:
        train(replace(config, lr=1e30, max_grad_norm=0.0, save_steps=50), progress=False)
    assert caught.value.step == failing_step_of(str(caught.value)) >= 2
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), again.step, str(again)) == (Diverged, caught.value.step, str(caught.value))


def test_weights_that_have_a_loss_for_no_row_are_not_kept(config):
    told = failing(replace(config, lr=1e30, max_grad_norm=0.0, save_steps=50))
    assert "8 of its 8 rows alone have no finite loss" in told and "the base alone has one for each of them" in told
    assert not checkpoint.steps(config.output) and "kept is" not in told


def test_an_update_to_infinite_weights_is_no_checkpoint(config):
    config = replace(config, optim="sgd", lr=1e38, lr_scheduler_type="constant", max_grad_norm=0.0, weight_decay=1e30)
    told = failing(replace(config, save_steps=1))
    assert "its update made trained weights infinite or NaN; a lower lr may help" in told
    assert not checkpoint.steps(config.output)


def test_of_a_whole_model_there_is_no_base_to_ask(config, poisoned):
    base, data = poisoned
    told = failing(replace(config, model=base, data=data, method="full", r=16, lora_alpha=32))
    assert f"{data}:13" in told and "base alone" not in told


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (
            Blame(4, [], []),
            "each of its 4 rows alone has a finite loss: it is the gradient, or dropout, that is to blame",
        ),
        (Blame(4, ["a:1"], None), "1 of its 4 rows alone have no finite loss: a:1"),
        (Blame(4, ["a:1", "a:2"], ["a:2"]), "a:1, a:2; the base alone has none either for a:2"),
        (Blame(99, [f"a:{n}" for n in range(40)], []), "a:11 and 28 more; the base alone has one for each of them"),
    ],
)
def test_the_words(found, text):
    assert text in str(found)
    assert found.spares_the_weights
    assert not Blame(2, ["a:1", "a:2"], []).spares_the_weights


def test_a_loss_that_ends_far_above_where_it_began_is_told(config, caplog, monkeypatch):
    asked = []
    for answer in (False, True):
        monkeypatch.setattr(divergence, "has_risen", lambda losses, answer=answer: asked.append(losses) or answer)
        result = train(replace(config, epochs=1, overwrite=True), progress=False)
        told = [message for message in caplog.messages if "has risen" in message]
        assert asked[-1] == [record["loss"] for record in records(config.output)] and len(told) == answer
    first, last = f"{asked[-1][0]:.3g}", f"{result.loss:.3g}"
    assert told == [
        f"the loss has risen, from {first} in the first step to {last} in the last ones: a lower lr than 0.01 may help"
    ]


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([2.0], False),
        ([2.0, 2.9], False),
        ([2.0, 3.1], True),
        ([0.1, 0.5], False),  # by less than half a nat
        ([0.1, 0.7], True),
        ([2.0, *[9.0] * 5, *[2.0] * 10], False),  # it came back
        ([2.0, *[2.0] * 10, *[9.0] * 10], True),
    ],
)
def test_what_is_a_rise(losses, expected):
    assert has_risen(losses) is expected
