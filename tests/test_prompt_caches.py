"""peft/prompts.py, a cache that begins with prompts: whose they are, where a row's tokens stand, and how a caller's own loop goes on."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig
from prompted_models import VOCABULARY, P, prompted
from torch import Tensor
from transformers import DynamicCache

import fastlora
from fastlora import sharing
from fastlora.peft import prompts
from fastlora.peft.prompts import Prompts

IDS = torch.randint(5, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(2))


def near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def accelerated(family: str = "llama") -> tuple[Any, Any]:
    """Its base with the prompt before rows as embeddings, called with more; and the model, in eval mode."""
    peer = prompted("prompt tuning", family).eval()
    prompt = peer.get_prompt(1)[:, :P]

    def by_hand(ids: Tensor, positions: Tensor) -> Tensor:
        embeds = torch.cat((prompt.expand(len(ids), -1, -1), peer.word_embeddings(ids)), 1)
        before = torch.arange(P).expand(len(ids), -1)
        logits: Tensor = peer.base_model(
            inputs_embeds=embeds, position_ids=torch.cat((before, positions + P), 1)
        ).logits
        return logits[:, P:]

    return by_hand, fastlora.accelerate(copy.deepcopy(peer))


def test_two_prompts_and_no_row_without() -> None:
    keys = [[(torch.full((1, 2, 3, 4), value), torch.full((1, 2, 3, 4), -value))] for value in (1.0, 2.0)]
    found = Prompts([3, 3], [0, 1, 0], [], [], [("a", 0), ("b", 0)])
    cache = DynamicCache()
    prompts._fill(cache, found, keys, prompts._before(found, "cpu"))
    ((key, value),) = sharing.keys_of(cache)
    assert key[:, 0, 0, 0].tolist() == [1, 2, 1] and value[:, 0, 0, 0].tolist() == [-1, -2, -1]


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_positions_that_are_given_are_behind_the_prompt(family: str) -> None:
    by_hand, model = accelerated(family)
    positions = torch.arange(7).expand(2, -1) + 4
    expected = by_hand(IDS, positions)
    begun = model(IDS[:, :4], position_ids=positions[:, :4], use_cache=True)
    near(begun.logits, expected[:, :4])
    more = model(IDS[:, 4:], position_ids=positions[:, 4:], past_key_values=begun.past_key_values)
    near(more.logits, expected[:, 4:])


@torch.no_grad()
def test_a_cache_goes_on_with_embeddings_and_without_a_mask() -> None:
    by_hand, model = accelerated()
    expected = by_hand(IDS, torch.arange(7).expand(2, -1))
    begun = model(IDS[:, :4], use_cache=True)
    cache = copy.deepcopy(begun.past_key_values)
    near(model(IDS[:, 4:], past_key_values=begun.past_key_values).logits, expected[:, 4:])
    embeds = model.word_embeddings(IDS[:, 4:])
    near(model(inputs_embeds=embeds, past_key_values=cache).logits, expected[:, 4:])
    with pytest.raises(
        ValueError, match=r"^attention_mask: got shape \[2, 3\], expected \[2, 10\], the cache's tokens"
    ):
        model(IDS[:, 4:], attention_mask=torch.ones(2, 3), past_key_values=cache)


@torch.no_grad()
def test_a_base_that_knows_no_positions_is_told_none(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = accelerated()
    told: list[set[str]] = []
    model.base_model.register_forward_pre_hook(lambda _, args, given: told.append(set(given)), with_kwargs=True)
    for knows in (True, False):
        if not knows:
            monkeypatch.setattr(prompts, "_parameters", lambda base: {})
        told.clear()
        out = model(IDS, use_cache=True)
        model(IDS, past_key_values=out.past_key_values)
        assert ["position_ids" in one for one in told[-2:]] == [knows] * 2


@torch.no_grad()
def test_another_cache_is_pefts() -> None:
    _, model = accelerated()
    out = model.base_model(IDS, use_cache=True)
    model(IDS, past_key_values=out.past_key_values)
    assert model.__dict__[prompts.KEY].last[1] == "PEFT's own forward: past_key_values was given"


def test_checkpointing_is_in_a_prefixs_way_alone() -> None:
    for method in ("prompt tuning", "prefix tuning"):
        model = fastlora.accelerate(prompted(method)).train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if method == "prompt tuning":
            assert len(model(IDS, output_hidden_states=True).hidden_states) == 3
        else:
            with pytest.raises(ValueError, match="^gradient_checkpointing: a prefix needs a cache"):
                model(IDS, output_hidden_states=True)


@torch.no_grad()
@pytest.mark.parametrize("method", ["prompt tuning", "prefix tuning"])
def test_prompts_of_rows_for_themselves_stand_before_embeddings_and_positions_too(method: str) -> None:
    model = fastlora.accelerate(prompted(method)).eval()
    for given in ({}, {"position_ids": torch.arange(7).expand(2, -1) + 4}):
        expected = model(IDS, **given).logits
        assert "given as keys and values" in model.__dict__[prompts.KEY].last[1]
        for tokens in ({"input_ids": IDS}, {"inputs_embeds": model.word_embeddings(IDS)}):
            out = model(**tokens, **given, output_hidden_states=True)
            assert model.__dict__[prompts.KEY].last[1].startswith("each row has its prompt for itself: output_hidden")
            near(out.logits, expected)
            assert out.past_key_values is None


@pytest.mark.parametrize("method", ["prompt tuning", "prefix tuning"])
def test_shifted_labels_of_rows_for_themselves(method: str) -> None:
    model = fastlora.accelerate(prompted(method)).train()
    shifted = torch.where(torch.arange(7) < 3, -100, IDS.roll(-1, 1))
    expected = model(IDS, labels=IDS, shift_labels=shifted).loss
    out = model(IDS, labels=IDS, shift_labels=shifted, output_hidden_states=True)
    near(out.loss, expected)
    near(expected, torch.nn.functional.cross_entropy(out.logits[:, 3:].flatten(0, 1).float(), shifted[:, 3:].flatten()))


@pytest.mark.parametrize("method", ["prompt tuning", "prefix tuning"])
def test_a_cache_that_is_asked_for_in_training_is_returned(method: str) -> None:
    out = fastlora.accelerate(prompted(method)).train()(IDS, use_cache=True)
    assert out.past_key_values.get_seq_length() == P + 7


@pytest.mark.parametrize("how", ["no names", "no state", "not ours", "ours"])
def test_names_in_generation(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = accelerated()
    model.add_adapter("other", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P))
    given: list[dict[str, Any]] = []
    plain = SimpleNamespace(generate=lambda self, *args, **kwargs: given.append({"args": args, **kwargs}) or "answers")
    generate = prompts._generating(plain)
    if how == "no state":
        model.__dict__.pop(prompts.KEY)
    if how == "not ours":
        monkeypatch.setattr(prompts, "_is_known", lambda config: False)
    names = None if how == "no names" else ["other", "__base__", "default"]
    assert generate(model, IDS, adapter_names=names, max_new_tokens=3) == "answers"
    ((one),) = given
    assert one["args"] == (IDS,) and one["max_new_tokens"] == 3
    assert ("prompt_index" in one) == (how == "ours") and ("adapter_names" in one) == (how in ("no state", "not ours"))
    if how == "ours":
        assert one["prompt_index"].tolist() == [1, -1, 0]
