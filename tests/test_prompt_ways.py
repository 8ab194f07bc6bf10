"""peft/prompts.py, one call of a causal model: when a prompt's kept keys and values may stand for it, and when each row has its prompt for itself."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from prompted_models import METHODS, VOCABULARY, P, alone, prompted
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

import fastlora
from fastlora import sharing
from fastlora.peft.prompts import KEY, Prompts, State, _choose
from fastlora.sharing import MASK, TREE

IDS = torch.randint(5, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(2))
APART = "each row has its prompt for itself: "


def both(method: str = "prompt tuning", **options: Any) -> tuple[Any, Any]:
    """A model of PEFT's in eval mode, and its accelerated copy."""
    peer = prompted(method).eval()
    return peer, fastlora.accelerate(copy.deepcopy(peer), **options)


def told(model: Any) -> str:
    return str(model.__dict__[KEY].last[1])


def each_alone(peer: Any, method: str = "prompt tuning", ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return torch.stack([alone(peer, method, text)[1:] for text in ids])


def assert_alone(found: Tensor, peer: Any, method: str = "prompt tuning", ids: Tensor = IDS) -> None:
    torch.testing.assert_close(found, each_alone(peer, method, ids), rtol=1e-6, atol=1e-6)


def test_a_tuple_where_one_is_wanted() -> None:
    peer, model = both()
    out = model(IDS, return_dict=False)
    assert type(out) is tuple
    assert_alone(out[0].detach(), peer)


def test_a_prompt_that_gets_gradients_is_not_a_kept_one() -> None:
    _, model = both()
    for training in (False, True):
        model.train(training)
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        grad = model.prompt_encoder["default"].embedding.weight.grad
        assert bool((grad != 0).any()) and model.__dict__[KEY].kept == {}


def test_a_model_in_training_mode_keeps_nothing_and_one_that_infers_does() -> None:
    """With dropout on, what a prompt leaves in the layers is another each time."""
    peer, model = both()
    with torch.no_grad():
        model.train()(IDS)
        assert model.__dict__[KEY].kept == {}
        assert_alone(model.eval()(IDS).logits, peer)
    assert model.__dict__[KEY].kept.keys() == {("default", 0)} and "given as keys and values" in told(model)


def test_what_is_asked_beside_the_logits_is_of_each_row_alone() -> None:
    peer, model = both()
    with torch.no_grad():
        out = model(IDS, output_hidden_states=True)
    assert told(model) == f"{APART}output_hidden_states was given" and len(out.hidden_states) == 3
    assert_alone(out.logits, peer)


def test_a_cache_begins_with_kept_keys_where_each_row_is_one_text(monkeypatch: pytest.MonkeyPatch) -> None:
    peer, model = both()
    packed = torch.tensor([[0, 1, 2, 0, 1, 2, 3]] * 2)
    with torch.no_grad():
        out = model(IDS, use_cache=True)
        assert told(model) == "each row's cache begins with its prompt's keys and values, kept"
        assert_alone(out.logits, peer)
        assert out.past_key_values.get_seq_length() == P + 7
        logits = model(IDS, use_cache=True, position_ids=packed).logits
        assert told(model) == f"{APART}use_cache was given"
        for part in (slice(0, 3), slice(3, 7)):
            assert_alone(logits[:, part], peer, ids=IDS[:, part])
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        model(IDS, use_cache=True)
        assert told(model) == f"{APART}use_cache was given"


def test_logits_that_nobody_asks_for_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    peer, model = both()
    base, kept = type(model.base_model), []
    forward = base.forward

    def noted(self: Any, *args: Any, logits_to_keep: Any = 0, **kwargs: Any) -> Any:
        out = forward(self, *args, logits_to_keep=logits_to_keep, **kwargs)
        kept.append(out.logits.shape[1])
        return out

    with torch.no_grad():
        model(IDS)  # the prompt has been run, and the ways compared
        monkeypatch.setattr(base, "forward", noted)
        out = model(IDS, logits_to_keep=2).logits
    assert kept == [4] and out.shape[:2] == (2, 2)
    torch.testing.assert_close(out, each_alone(peer)[:, -2:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("keyed", "inferring", "checkpoints", "ways", "expected"),
    [
        (False, False, True, {False: MASK}, (MASK, False)),  # what is run again in the backward runs its prompt again
        (False, True, False, {True: MASK, False: MASK}, (MASK, True)),
        (False, True, True, {True: MASK, False: MASK}, (MASK, False)),  # checkpointing drops the cache
        (False, True, True, {True: TREE, False: MASK}, (TREE, True)),
        (False, True, False, {True: sharing.APART, False: MASK}, (MASK, False)),
        (False, True, False, {True: sharing.APART, False: sharing.APART}, (sharing.APART, False)),
        (True, False, False, {True: MASK}, (MASK, True)),
        (True, True, True, {True: MASK}, (sharing.APART, True)),
    ],
)
def test_the_ways_are_tried_in_turn(
    keyed: bool,
    inferring: bool,
    checkpoints: bool,
    ways: dict[bool, str],
    expected: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sharing, "find_way", lambda *_, keys_only: ways[keys_only])
    monkeypatch.setattr(sharing, "checkpoints", lambda base: checkpoints)
    found = Prompts([P], [0], [], [object()] * keyed, [("default", 0)])  # type: ignore[list-item]
    assert _choose(State(), None, SimpleNamespace(embedding=None), found, inferring) == expected  # type: ignore[arg-type]


def test_embeddings_have_nothing_in_common_that_could_be_seen() -> None:
    peer, model = both(share_prefix=True)
    begun = torch.arange(5, 15).expand(2, -1)
    ids = torch.cat((begun, IDS), 1)
    with torch.no_grad():
        assert_alone(model(ids).logits, peer, ids=ids)
        assert "; 24 tokens run" in told(model)
        assert_alone(model(inputs_embeds=model.word_embeddings(ids)).logits, peer, ids=ids)
        assert "; 34 tokens run" in told(model)


def test_a_window_that_is_shorter_than_prompt_and_text() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MistralConfig(
        **sizes, num_key_value_heads=2, vocab_size=VOCABULARY, sliding_window=24, initializer_range=0.3
    )
    peer = get_peft_model(MistralForCausalLM(config), METHODS["prompt tuning"]()).double().eval()
    model = fastlora.accelerate(copy.deepcopy(peer))
    ids = torch.cat((IDS, IDS.flip(0), IDS), 1)
    for training in (False, True):
        out = model.train(training)(ids).logits.detach()
        assert told(model) == f"{APART}some layer sees 24 tokens"
        assert_alone(out, peer, ids=ids)
    model(IDS)
    assert "some layer" not in told(model)
