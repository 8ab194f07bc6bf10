"""peft/prompts.py, what generation asks for at each step, an encoder-decoder's before its first: who answers, and with which cache and mask."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftType
from prompted_models import P, prompted
from test_prompt_parts import IDS as TOKENS
from test_prompt_parts import REAL, a_batch
from test_prompts_of_encoders import t5
from torch import Tensor
from transformers import DynamicCache

import fastlora
from fastlora import sharing
from fastlora.peft import prompts
from fastlora.peft.prompts import APART, KEY, Apart

IDS = torch.arange(5, 19).view(2, 7)


@pytest.fixture
def model() -> Any:
    found = fastlora.accelerate(prompted("prompt tuning", dtype=torch.float32)).eval()
    found.base_model_prepare_inputs_for_generation = lambda ids, *args, **given: ("ours", given)
    return found


def pefts(self: Any, ids: Tensor, *args: Any, **given: Any) -> tuple[str, Any]:
    return "PEFT's", given


PREPARE = prompts._preparing(SimpleNamespace(prepare_inputs_for_generation=pefts))


class OtherCache(DynamicCache):
    pass


@pytest.mark.parametrize("why", ["embeddings", "another cache", "no state", "not ours"])
def test_a_step_that_is_pefts(why: str, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {"attention_mask": torch.ones(2, 7)}
    if why == "embeddings":
        given["inputs_embeds"] = torch.ones(2, 7, 32)
    elif why == "another cache":
        given["past_key_values"] = OtherCache()
    elif why == "no state":
        model.__dict__.pop(KEY)
    else:
        monkeypatch.setattr(prompts, "_is_known", lambda config: False)
    assert PREPARE(model, IDS, task_ids=None, **given) == ("PEFT's", {"task_ids": None, **given})


def test_a_first_step_begins_a_cache(model: Any) -> None:
    who, given = PREPARE(model, IDS)
    cache = given.pop("past_key_values")
    assert who == "ours" and given == {} and type(cache) is DynamicCache
    assert cache.get_seq_length() == P and cache.__dict__[KEY].lengths.tolist() == [P, P]
    mine = DynamicCache()
    assert PREPARE(model, IDS, past_key_values=mine)[1]["past_key_values"] is mine and mine.get_seq_length() == P
    assert PREPARE(model, IDS, past_key_values=mine)[1]["past_key_values"] is mine and mine.get_seq_length() == P
    of_the_step = PREPARE(model, IDS, past_key_values=mine, use_cache=False)[1]["past_key_values"]
    assert of_the_step is not mine and of_the_step.get_seq_length() == P


def test_masks_and_positions_count_the_prompt(model: Any) -> None:
    """Of a row without a prompt they say so, given a mask or not."""
    mask, positions = torch.ones(2, 7, dtype=torch.long), torch.arange(7).expand(2, -1)
    given = PREPARE(model, IDS, attention_mask=mask, position_ids=positions)[1]
    assert torch.equal(given["attention_mask"], torch.ones(2, P + 7)) and torch.equal(
        given["position_ids"], positions + P
    )
    index = torch.tensor([0, -1])
    expected = torch.tensor([[1] * (P + 7), [0] * P + [1] * 7])
    for more in ({}, {"attention_mask": mask}):
        given = PREPARE(model, IDS, prompt_index=index, position_ids=positions, **more)[1]
        assert torch.equal(given["attention_mask"], expected) and given["attention_mask"].dtype is torch.long
        assert torch.equal(given["position_ids"], positions + torch.tensor([[P], [0]]))


def test_a_cache_of_an_earlier_call_counts_its_prompt_among_what_is_cached(model: Any) -> None:
    cache = PREPARE(model, IDS)[1]["past_key_values"]
    more = {"past_key_values": cache, "next_sequence_length": 3}
    assert PREPARE(model, IDS, is_first_iteration=True, **more)[1]["next_sequence_length"] == 3 + P
    assert PREPARE(model, IDS, is_first_iteration=False, **more)[1]["next_sequence_length"] == 3
    assert (
        PREPARE(model, IDS, is_first_iteration=True, past_key_values=cache, next_sequence_length=None)[1][
            "next_sequence_length"
        ]
        is None
    )


@pytest.mark.parametrize("how", ["ours", "before both", "embeddings", "no state", "not ours"])
def test_an_encoder_decoders_generation(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = t5("multitask prompts" if how == "before both" else "prompt tuning", 2 if how == "before both" else 1)
    asked: list[tuple[str, dict[str, Any]]] = []
    generate = prompts._generating_seq2seq(
        SimpleNamespace(generate=lambda self, **given: asked.append(("PEFT's", given)) or "theirs")
    )
    monkeypatch.setattr(
        type(model.base_model), "generate", lambda self, **given: asked.append(("ours", given)) or "ours"
    )
    given: dict[str, Any] = {"input_ids": IDS, "max_new_tokens": 3}
    if how == "before both":
        given |= {"task_ids": torch.tensor([1, 0]), "attention_mask": torch.tensor([[0] * 2 + [1] * 5, [1] * 7])}
    elif how == "embeddings":
        given["inputs_embeds"] = torch.ones(2, 7, 32)
        del given["input_ids"]
    elif how == "no state":
        model.__dict__.pop(KEY)
    elif how == "not ours":
        monkeypatch.setattr(prompts, "_is_known", lambda config: False)
    if how == "ours":
        assert generate(model, **given, task_ids=torch.tensor([0, 0])) == "ours"
        ((who, found),) = asked
        assert who == "ours" and found.keys() == {"inputs_embeds", "attention_mask", "max_new_tokens"}
        assert found["inputs_embeds"].shape[:2] == found["attention_mask"].shape == (2, P + 7)
        return
    assert generate(model, **given) == "theirs"
    ((who, found),) = asked
    if how == "before both":
        assert found.keys() == {"input_ids", "attention_mask", "task_ids", "max_new_tokens"}
        assert found["attention_mask"].tolist() == [[1] * 5 + [0] * 2, [1] * 7]
        assert found["input_ids"][0].tolist() == [*IDS[0, 2:].tolist(), 0, 0]
    else:
        assert found.keys() == given.keys() and all(found[name] is one for name, one in given.items())


@pytest.mark.parametrize(
    ("kind", "submodules", "expected"),
    [
        (PeftType.PROMPT_TUNING, 2, False),
        (PeftType.PROMPT_TUNING, 1, False),
        (PeftType.MULTITASK_PROMPT_TUNING, 2, True),
        (PeftType.MULTITASK_PROMPT_TUNING, 1, False),
        (PeftType.PREFIX_TUNING, 1, True),
        (PeftType.CARTRIDGE, 2, True),
    ],
)
def test_where_a_prompt_stands(kind: PeftType, submodules: int, expected: bool) -> None:
    config = SimpleNamespace(peft_type=kind, num_transformer_submodules=submodules)
    assert prompts._stands_elsewhere(SimpleNamespace(peft_config={"own": config}), "own") == expected
    assert not prompts._stands_elsewhere(SimpleNamespace(peft_config={"own": config}), "__base__")


@pytest.mark.parametrize(("pad", "fill"), [(3, 3), (None, 0)])
def test_padding_goes_to_the_right_of_all_that_tokens_have(pad: int | None, fill: int) -> None:
    base = SimpleNamespace(config=SimpleNamespace(pad_token_id=pad))
    batch = a_batch(labels=TOKENS, token_type_ids=TOKENS)
    apart = Apart(batch, batch.rows)
    found = prompts._without_gaps(SimpleNamespace(base_model=base), batch, apart)
    assert found.keys() == {"input_ids", "token_type_ids", "attention_mask"}
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    assert torch.equal(found["attention_mask"], mask) and found["attention_mask"].dtype is torch.long
    for name, of_padding in (("input_ids", fill), ("token_type_ids", 0)):
        assert bool((found[name][mask == 0] == of_padding).all())
        assert torch.equal(found[name][mask == 1], TOKENS[REAL == 1])
    labels = prompts._without_gaps(SimpleNamespace(base_model=base), batch, apart, per_token=True)["labels"]
    assert bool((labels[mask == 0] == prompts.IGNORE).all())
    embedded = prompts.Batch(
        SimpleNamespace(word_embeddings=None),
        {"inputs_embeds": TOKENS[..., None].float(), "attention_mask": REAL},
    )
    found = prompts._without_gaps(SimpleNamespace(base_model=base), embedded, Apart(embedded, embedded.rows))
    assert found.keys() == {"inputs_embeds", "attention_mask"} and bool(
        (found["inputs_embeds"][mask == 0] == fill).all()
    )


def test_what_an_encoder_has_found_is_pefts() -> None:
    model, _ = t5("prompt tuning", 1)
    state, asked = sharing.State(), []
    plain = SimpleNamespace(forward=lambda self, **given: asked.append(given) or "theirs")
    given = {"encoder_outputs": object(), "decoder_input_ids": IDS}
    assert prompts._encoder(model, plain, state, dict(given)) == "theirs" and asked == [given]
    assert state.last == (APART, "PEFT's own forward: encoder_outputs was given")


def test_where_the_prompt_of_an_encoder_stands_is_told() -> None:
    for method, submodules, words in (
        ("prompt tuning", 1, "each row has its prompt for itself, which sees the input"),
        (
            "prefix tuning",
            None,
            "PEFT's own forward, without gaps: the prompt does not stand before the encoder's input alone",
        ),
    ):
        model, _ = t5(method, submodules)
        model(input_ids=IDS, labels=IDS)
        assert model.__dict__[KEY].last == (APART, words)
