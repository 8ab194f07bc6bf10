"""Generation from accelerated soft prompts: each row, padded at the left in a batch, gives what it gives alone."""

from typing import Any

import pytest
import torch
from prompted_models import FAMILIES, METHODS, TASKS, VOCABULARY, alone, prompted, tasks_of
from torch import Tensor
from transformers import DynamicCache

import fastlora
from fastlora.peft import prompts

LENGTHS = (7, 11, 9)
TEXTS = [torch.randint(5, VOCABULARY - 1, (n,), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]
IDS = torch.stack([torch.nn.functional.pad(text, (11 - len(text), 0)) for text in TEXTS])
MASK = torch.stack([(torch.arange(11) >= 11 - n).long() for n in LENGTHS])
NEW = 6
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": VOCABULARY - 1}


def by_hand(plain: Any, method: str, text: Tensor, task: int) -> list[int]:
    """The most likely tokens, each from a run over all of them, until the last of the vocabulary; without 0, which pads others."""
    found: list[int] = []
    while len(found) < NEW and VOCABULARY - 1 not in found:
        with torch.no_grad():
            found.append(
                int(alone(plain, method, torch.cat((text, torch.tensor(found, dtype=torch.long))), task)[-1].argmax())
            )
    return [token for token in found if token != 0]


def answers(out: Tensor) -> list[list[int]]:
    """Of each row what comes after the batch's 11 columns, without padding."""
    return [[token for token in row if token != 0] for row in out[:, 11:].tolist()]


@pytest.mark.parametrize("how", [{}, {"use_cache": False}], ids=["with a cache", "without"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy(family: str, method: str, how: dict[str, Any]) -> None:
    model, plain = (prompted(method, family).eval() for _ in range(2))
    fastlora.accelerate(model)
    out = model.generate(input_ids=IDS, attention_mask=MASK, **GREEDY, **how, **tasks_of(method))
    assert answers(out) == [by_hand(plain, method, text, int(task)) for text, task in zip(TEXTS, TASKS, strict=True)]


@pytest.mark.parametrize(
    "more", [{"num_return_sequences": 2}, {"num_beams": 3, "num_return_sequences": 2}], ids=["samples", "beams"]
)
@pytest.mark.parametrize("method", ["prompt tuning", "multitask prompts", "prefix tuning"])
def test_several_answers_a_row(method: str, more: dict[str, Any]) -> None:
    """A batch of one, unpadded, has nothing that PEFT gets wrong."""
    model, plain = (prompted(method).eval() for _ in range(2))
    fastlora.accelerate(model)
    sampled = {**GREEDY, "do_sample": "num_beams" not in more, **more}
    if "num_beams" in more:
        out = answers(model.generate(input_ids=IDS, attention_mask=MASK, **sampled, **tasks_of(method)))
    for row, text in enumerate(TEXTS):
        given = {**sampled, **tasks_of(method, slice(row, row + 1)), "attention_mask": torch.ones(1, len(text))}
        torch.manual_seed(3)
        expected = plain.generate(input_ids=text[None], **given)
        torch.manual_seed(3)
        assert torch.equal(model.generate(input_ids=text[None], **given), expected)
        if "num_beams" in more:
            assert out[2 * row : 2 * row + 2] == [
                [one for one in beam if one] for beam in expected[:, len(text) :].tolist()
            ]


@pytest.mark.parametrize("how", ["another model", "what the text has said"])
@pytest.mark.parametrize("method", [method for method in METHODS if method != "multitask prompts"])
def test_assisted(method: str, how: str) -> None:
    """Guesses are taken back from the cache, the prompt never. transformers gives multitask prompts' tasks to the assistant, too, which has none."""
    model, plain = (prompted(method).eval() for _ in range(2))
    fastlora.accelerate(model)
    assistant = {"assistant_model": plain.base_model} if how == "another model" else {"prompt_lookup_num_tokens": 3}
    for text in TEXTS:
        out = model.generate(input_ids=text[None], **GREEDY, **assistant)
        assert [token for token in out[0, len(text) :].tolist() if token] == by_hand(plain, method, text, 0)


@pytest.mark.parametrize("more", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
@pytest.mark.parametrize("method", ["prompt tuning", "prefix tuning"])
def test_each_row_has_its_own_prompt(method: str, more: dict[str, Any]) -> None:
    model = prompted(method)
    torch.manual_seed(5)
    model.add_adapter("longer", METHODS[method](num_virtual_tokens=9))
    fastlora.accelerate(model.double().eval())
    names = ["longer", "__base__", "default"]
    out = answers(model.generate(input_ids=IDS, attention_mask=MASK, adapter_names=names, **GREEDY, **more))
    for name, text, found in zip(names, TEXTS, out, strict=True):
        if name == "__base__":
            expected = model.base_model.generate(input_ids=text[None], **GREEDY, **more)
        else:
            model.set_adapter(name)
            expected = model.generate(input_ids=text[None], **GREEDY, **more)
        assert found == [token for token in expected[0, len(text) :].tolist() if token]


def test_a_cache_of_an_earlier_call_goes_on() -> None:
    model = fastlora.accelerate(prompted("prompt tuning").eval())
    options = {**GREEDY, "eos_token_id": None}
    whole = model.generate(input_ids=IDS, attention_mask=MASK, **options)
    begun = model.generate(
        input_ids=IDS, attention_mask=MASK, **{**options, "max_new_tokens": 3}, return_dict_in_generate=True
    )
    mask = torch.nn.functional.pad(MASK, (0, 3), value=1)
    rest = model.generate(
        input_ids=begun.sequences,
        attention_mask=mask,
        past_key_values=begun.past_key_values,
        **{**options, "max_new_tokens": 3},
    )
    assert torch.equal(rest, whole)


def test_a_prompt_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many calls there are; and again after the prompt has changed."""
    model = fastlora.accelerate(prompted("prompt tuning").eval())
    lengths: list[int] = []
    forward = model.base_model.model.forward
    monkeypatch.setattr(
        model.base_model.model,
        "forward",
        lambda **given: (
            lengths.append((given["input_ids"] if given["inputs_embeds"] is None else given["inputs_embeds"]).shape[1])
            or forward(**given)
        ),
    )
    for _ in range(2):
        model.generate(input_ids=IDS, attention_mask=MASK, **{**GREEDY, "max_new_tokens": 2})
    assert lengths == [5, 11, 1, 11, 1]
    model.prompt_encoder["default"].embedding.weight.data += 1
    model.generate(input_ids=IDS, attention_mask=MASK, **{**GREEDY, "max_new_tokens": 1})
    assert lengths[5:] == [5, 11]


def test_a_disabled_adapter_is_the_base_model() -> None:
    model = fastlora.accelerate(prompted("prompt tuning").eval())
    with model.disable_adapter():
        out = model.generate(input_ids=IDS, attention_mask=MASK, **GREEDY)
        logits = model(input_ids=IDS, attention_mask=MASK).logits
    assert torch.equal(out, model.base_model.generate(input_ids=IDS, attention_mask=MASK, **GREEDY))
    assert torch.equal(logits, model.base_model(input_ids=IDS, attention_mask=MASK).logits)


def test_another_cache_is_left_to_peft() -> None:
    model, plain = (prompted("prompt tuning").eval() for _ in range(2))
    fastlora.accelerate(model)
    cache = [DynamicCache() for _ in range(2)]
    for one, past in zip((model, plain), cache, strict=True):
        one(input_ids=IDS, past_key_values=past)
    assert "past_key_values" in model.__dict__[prompts.KEY].last[1]
    assert torch.equal(cache[0].layers[0].keys, cache[1].layers[0].keys)


def test_an_unknown_name_lists_those_that_are_loaded() -> None:
    model = fastlora.accelerate(prompted("prompt tuning").eval())
    with pytest.raises(ValueError, match=r"adapter_names: got \['typo'\], expected some of \['__base__', 'default'\]"):
        model.generate(input_ids=IDS, attention_mask=MASK, adapter_names=["default", "typo", "default"], **GREEDY)
