"""Generation with an adapter a row: greedy, by beams, drawn, assisted; each row's answer is the one that it has alone."""

import copy
from typing import Any

import pytest
import torch
from mixed_rows import BASE, answers_row_by_row, lora_and_dora
from peft_models import IDS, peft_model
from transformers import GenerationConfig

import fastlora
from fastlora.peft import mixed

NAMES = ["dora", BASE, "default"]
OPTIONS = {"max_new_tokens": 4, "min_new_tokens": 4, "pad_token_id": 0}


@pytest.fixture(name="models", scope="module")
def a_pair() -> tuple[Any, Any]:
    """An accelerated model, and one left to PEFT."""
    model = lora_and_dora().eval()
    peer = copy.deepcopy(model)
    return fastlora.accelerate(model), peer


@pytest.mark.parametrize("beams", [1, 3])
def test_beams(models: Any, beams: int) -> None:
    model, peer = models
    expected = answers_row_by_row(peer, NAMES, num_beams=beams, do_sample=False, **OPTIONS)
    found = model.generate(input_ids=IDS, adapter_names=NAMES, num_beams=beams, do_sample=False, **OPTIONS)
    assert torch.equal(found, expected) and mixed.under_way == 0
    config = GenerationConfig(num_beams=beams, do_sample=False, **OPTIONS)
    assert torch.equal(model.generate(input_ids=IDS, adapter_names=NAMES, generation_config=config), expected)


def test_several_beams_of_each_row(models: Any) -> None:
    model, peer = models
    options = {"num_beams": 3, "num_return_sequences": 2, "do_sample": False, **OPTIONS}
    expected = answers_row_by_row(peer, NAMES, **options)
    assert torch.equal(model.generate(input_ids=IDS, adapter_names=NAMES, **options), expected)


def test_drawn_answers(models: Any) -> None:
    """Of the likeliest token alone, for which the seed is no matter; and as any are drawn twice from one seed."""
    model, peer = models
    options = {"do_sample": True, "num_return_sequences": 2, **OPTIONS}
    expected = answers_row_by_row(peer, NAMES, top_k=1, **options)
    assert torch.equal(model.generate(input_ids=IDS, adapter_names=NAMES, top_k=1, **options), expected)
    drawn = []
    for _ in range(2):
        torch.manual_seed(4)
        drawn.append(model.generate(input_ids=IDS, adapter_names=NAMES, **options))
    assert torch.equal(*drawn) and drawn[0].shape == (6, 15)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", ["lookup", "assistant"])
def test_assisted(models: Any, name: str, how: str) -> None:
    """Of one row, as transformers has it. The assistant is another model, which no name reaches."""
    model, peer = models
    assistant = peft_model()[0].eval().unload()
    options: Any = {"prompt_lookup_num_tokens": 2} if how == "lookup" else {"assistant_model": assistant}
    options |= {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0}
    ids = IDS[:1].repeat(1, 2)  # with something to be looked up
    if name != BASE:
        peer.set_adapter(name)
    if name == BASE:
        with peer.disable_adapter():
            expected = peer.generate(input_ids=ids, **options)
    else:
        expected = peer.generate(input_ids=ids, **options)
    assert torch.equal(model.generate(input_ids=ids, adapter_names=[name], **options), expected)


@pytest.mark.parametrize("beams", [1, 2])
def test_an_encoder_sees_each_row_once(beams: int) -> None:
    model = lora_and_dora("t5").eval()
    peer = copy.deepcopy(model)
    fastlora.accelerate(model)
    expected = answers_row_by_row(peer, NAMES, num_beams=beams, **OPTIONS)
    assert torch.equal(model.generate(input_ids=IDS, adapter_names=NAMES, num_beams=beams, **OPTIONS), expected)


def test_names_of_fewer_rows_are_refused(models: Any) -> None:
    model, _ = models
    with pytest.raises(ValueError, match="adapter_names"):
        model.generate(input_ids=IDS, adapter_names=NAMES[:1], num_beams=3, **OPTIONS)
    assert mixed.under_way == 0
