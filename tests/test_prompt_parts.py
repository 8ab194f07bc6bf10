"""peft/prompts.py's parts: which prompts a batch has, where rows lie, what a cache begins with, and when a kept prompt is no longer one."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModelForCausalLM
from prompted_models import VOCABULARY, P, prompted
from torch import Tensor, nn
from transformers import DynamicCache

import fastlora
from fastlora import sharing, trees
from fastlora.peft import prompts
from fastlora.peft.prompts import Apart, Batch, Prompts

REAL = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]])
IDS = torch.arange(5, 17).view(3, 4)


def a_batch(**more: Any) -> Batch:
    model = SimpleNamespace(word_embeddings=nn.Embedding(VOCABULARY, 3))
    return Batch(model, {"input_ids": IDS, "attention_mask": REAL, **more})


def test_a_batch_as_it_is_given() -> None:
    batch = a_batch(labels=IDS, cu_seq_lens_q=IDS, num_items_in_batch=3, logits_to_keep=2)
    assert batch.tokens is IDS and batch.shape == (3, 4) and torch.equal(batch.real, REAL == 1)
    assert batch.rest() == {"num_items_in_batch": 3, "logits_to_keep": 2}
    assert batch.rest("logits_to_keep") == {"num_items_in_batch": 3}
    embeds = torch.randn(3, 4, 5)
    of_embeds = a_batch(inputs_embeds=embeds, attention_mask=None)
    assert of_embeds.tokens is embeds and of_embeds.shape == (3, 4) and of_embeds.real.all()
    with pytest.raises(ValueError, match=r"^attention_mask: got shape \[3, 3\], expected \[3, 4\]$"):
        a_batch(attention_mask=REAL[:, 1:])


def test_whether_a_first_token_has_a_label() -> None:
    none = torch.full_like(IDS, -100)
    assert not a_batch().predicts_first() and not a_batch(labels=none).predicts_first()
    first, second, last = none.clone(), none.clone(), none.clone()
    first[0, 1], second[0, 2], last[2, 0] = 7, 7, 7
    assert a_batch(labels=last).predicts_first()
    assert a_batch(labels=first).predicts_first() and not a_batch(labels=second).predicts_first()
    assert not a_batch(labels=first, shift_labels=IDS).predicts_first()


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_rows_one_by_one_and_back(left: bool) -> None:
    batch = a_batch()
    apart = Apart(batch, batch.rows, left)
    assert (apart.count, apart.width, apart.of) == (3, 4, [0, 1, 2])
    spread = apart.spread(IDS, fill=9, before=left)
    rows = [[6, 7, 8, 9], [9, 10, 9, 9], [13, 14, 15, 16]]
    if left:
        rows = [[9, 9, 6, 7, 8], [9, 9, 9, 9, 10], [9, 13, 14, 15, 16]]
    assert spread.tolist() == rows
    assert torch.equal(apart.spread(IDS[..., None].expand(3, 4, 2), 9, left)[..., 1], spread)
    back = apart.gather(spread, torch.full((3,), int(left)))
    assert torch.equal(back, IDS * REAL)
    wide = torch.cat((spread.new_zeros(3, 2), spread), 1)
    assert torch.equal(apart.gather(wide, torch.full((3,), 2 + left)), IDS * REAL)
    assert apart.gather(torch.randn(3, 5, 2), torch.tensor([0, 1, 0])).shape == (3, 4, 2)


def test_packed_rows_one_by_one() -> None:
    batch = a_batch(position_ids=torch.tensor([[0, 0, 1, 0]]), attention_mask=torch.ones_like(IDS))
    apart = Apart(batch, batch.rows)
    assert (apart.count, apart.width) == (9, 2) and apart.of == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert apart.spread(IDS)[:3].tolist() == [[5, 0], [6, 7], [8, 0]]
    assert torch.equal(apart.gather(apart.spread(IDS), torch.zeros(9, dtype=torch.long)), IDS)


FOUND = Prompts([2, 3], [1, -1, 0], [], [], [("a", 0), ("b", 0)])


def test_what_stands_before_rows() -> None:
    before = prompts._before(FOUND, "cpu")
    assert before.lengths.tolist() == [3, 0, 2]
    assert before.mask.tolist() == [[True] * 3, [False] * 3, [False, True, True]]
    assert prompts._before(FOUND._replace(lengths=[], of=[-1]), "cpu").mask.shape == (1, 0)
    assert FOUND.roots() == [trees.Root(2, 0), trees.Root(3, 2)]


def keys_of(length: int) -> sharing.Keys:
    return [(torch.randn(1, 2, length, 4), torch.randn(1, 2, length, 4)) for _ in range(2)]


def test_a_cache_begins_with_each_rows_prompt() -> None:
    keys, before = [keys_of(2), keys_of(3)], prompts._before(FOUND, "cpu")
    cache = DynamicCache()
    prompts._fill(cache, FOUND, keys, before)
    assert cache.__dict__[prompts.KEY] is before
    for number, layer in enumerate(sharing.keys_of(cache)):
        for side, held in enumerate(layer):
            assert held.shape == (3, 2, 3, 4) and not held[1].any() and not held[2, :, 0].any()
            assert torch.equal(held[0], keys[1][number][side][0])
            assert torch.equal(held[2, :, 1:], keys[0][number][side][0])
    for of in ([0, 0], [0, -1]):
        cache, one = DynamicCache(), Prompts([2], of, [], [], [("a", 0)])
        prompts._fill(cache, one, keys[:1], prompts._before(one, "cpu"))
        for held, given in zip(sharing.keys_of(cache)[1], keys[0][1], strict=True):
            assert torch.equal(held[0], given[0]) and torch.equal(held[1], given[0] * (of[1] == 0))


def test_keys_in_a_row() -> None:
    keys = [keys_of(2), keys_of(3)]
    for number, layer in enumerate(prompts._in_a_row(keys, [1, 3])):
        for side, found in enumerate(layer):
            expected = torch.cat((keys[0][number][side][:, :, :1], keys[1][number][side]), 2)
            assert torch.equal(found, expected)


def test_it_is_told_in_words() -> None:
    tree = trees.grow(trees.find_rows(REAL == 1, None), REAL.shape)
    one, keyed = FOUND._replace(lengths=[2]), FOUND._replace(keys=[keys_of(2)])
    assert prompts._told(FOUND, tree, False) == "2 prompts, run once for all rows; 9 tokens run"
    assert prompts._told(one, tree, True) == "1 prompt, given as keys and values; 9 tokens run"
    assert prompts._told(keyed, tree, True).startswith("2 prefixes, given")
    assert prompts._told(keyed._replace(lengths=[2]), tree, True).startswith("1 prefix, given")


def two_prompts(method: str = "prompt tuning") -> Any:
    model = prompted(method, dtype=torch.float32)
    model.add_adapter("other", copy.copy(model.peft_config["default"]))
    if method == "multitask prompts":
        return model
    model.prompt_encoder["other"].embedding.weight.data.normal_()
    return model


def test_each_prompt_of_a_batch_once() -> None:
    model = two_prompts()
    encoder = model.prompt_encoder
    for names, of, found in (
        (None, [0, 0, 0], ["default"]),
        (["default"] * 3, [0, 0, 0], ["default"]),
        (["other", "__base__", "other"], [0, -1, 0], ["other"]),
        (["other", "default", "__base__"], [0, 1, -1], ["other", "default"]),
        (["__base__"] * 3, [-1] * 3, []),
    ):
        given = prompts.find_prompts(model, 3, names, None)
        assert given.of == of and given.names == [(name, 0) for name in found] and given.keys == []
        assert given.lengths == [P] * len(found)
        for name, embedded in zip(found, given.embedded, strict=True):
            assert torch.equal(embedded, encoder[name].embedding.weight)
    assert model.active_adapter == "default"


def test_each_task_of_a_batch_once() -> None:
    model = two_prompts("multitask prompts")
    names = ["default", "other", "default"]
    given = prompts.find_prompts(model, 3, names, torch.tensor([2, 2, 0]))
    assert given.names == [("default", 2), ("other", 2), ("default", 0)] and given.of == [0, 1, 2]
    given = prompts.find_prompts(model, 3, ["__base__", "default", "default"], torch.tensor([1, 2, 2]))
    assert given.names == [("default", 2)] and given.of == [-1, 0, 0]
    for tasks in (torch.tensor([0, 1]), torch.tensor([0, 1, 2, 0])):
        with pytest.raises(ValueError, match=r"^task_ids: got \d, expected one for each of 3 rows"):
            prompts.find_prompts(model, 3, None, tasks)
    with pytest.raises(ValueError, match=r"^task_ids: got None, expected the tasks .* adapter 'default' has many"):
        prompts.find_prompts(model, 3, None, None)
    prompts.find_prompts(model, 2, ["__base__"] * 2, None)  # nobody asks for one


def test_tasks_that_a_prompt_does_not_know_make_no_other() -> None:
    given = prompts.find_prompts(two_prompts(), 3, None, torch.tensor([0, 1, 2]))
    assert given.names == [("default", 0)] and given.of == [0, 0, 0]


@pytest.mark.parametrize("names", [["default"], ["default"] * 4])
def test_a_name_for_each_row(names: list[str]) -> None:
    with pytest.raises(ValueError, match=rf"^adapter_names: got {len(names)}, expected one for each of 3 rows"):
        prompts.find_prompts(two_prompts(), 3, names, None)
    with pytest.raises(
        ValueError, match=r"^adapter_names: got \['typo'\], expected some of \['__base__', 'default', 'o"
    ):
        prompts.find_prompts(two_prompts(), 2, ["typo", "__base__"], None)


def test_prompts_vote() -> None:
    """The mean of the probabilities, of rows that stand once under each prompt."""
    logits = {"a": torch.randn(2, 4, 7), "b": torch.randn(2, 4, 7)}

    def model(input_ids: Tensor, attention_mask: Tensor, adapter_names: list[str]) -> Any:
        assert adapter_names == ["a", "a", "b", "b"]
        assert torch.equal(input_ids, IDS[:2].repeat(2, 1)) and torch.equal(attention_mask, REAL[:2].repeat(2, 1))
        return SimpleNamespace(logits=torch.cat((logits["a"], logits["b"])))

    found = prompts.ensemble(model, ["a", "b"], input_ids=IDS[:2], attention_mask=REAL[:2])
    assert torch.allclose(found.exp(), (logits["a"].softmax(-1) + logits["b"].softmax(-1)) / 2)
    with pytest.raises(ValueError, match=r"^adapter_names: got \[\], expected at least one"):
        prompts.ensemble(model, [], input_ids=IDS)


CHANGES: dict[str, Any] = {
    "mode": lambda base: base.eval(),
    "a weight in place": lambda base: base.weight.mul_(2),
    "a weight by its data": lambda base: base.weight.data.mul_(2),
    "another weight": lambda base: setattr(base, "weight", nn.Parameter(base.weight.detach().clone(), False)),
    "a bias": lambda base: base.bias.add_(1),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_model_that_is_another(change: str) -> None:
    base = nn.Linear(64, 64).requires_grad_(False)
    before = prompts._stamp(base)
    assert prompts._stamp(base) == before
    CHANGES[change](base)
    assert prompts._stamp(base) != before


def test_autocast_makes_another_model_of_it() -> None:
    base = nn.Linear(4, 4)
    stamps = [prompts._stamp(base)]
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            stamps.append(prompts._stamp(base))
    assert stamps[0] == prompts._stamp(base) and len({str(one) for one in stamps}) == 3


def test_weights_that_no_fingerprint_is_taken_of(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.inference_mode():
        inferred = nn.Parameter(torch.ones(2, 2), False)
    assert prompts._version(inferred)[1] == -1
    seen: list[Tensor] = []
    monkeypatch.setattr(prompts, "_fingerprint", lambda weight: seen.append(weight) or 7)
    for weight in (
        nn.Parameter(torch.ones(2)),
        nn.Parameter(torch.ones(2, 2).double()),
        nn.Parameter(torch.ones(2, 2, device="meta")),
        torch.ones(2, 2),
    ):
        assert prompts._version(weight) == (weight.data_ptr(), weight._version, 0)
    weight = nn.Parameter(torch.ones(2, 2))
    assert prompts._version(weight)[2] == 7 and len(seen) == 1 and not seen[0].requires_grad
    monkeypatch.setattr(prompts, "_fingerprint", None)
    assert prompts._version(weight)[2] == 0


def test_prompts_that_are_the_same() -> None:
    one = torch.ones(2)
    assert prompts._same(one, one.clone()) and not prompts._same(one, one + 1)
    assert not prompts._same(one, one.double()) and not prompts._same(one, one.to("meta"))


def test_a_prompt_is_kept_until_it_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    model = two_prompts().eval()
    state, calls = prompts.State(), []
    base = model.base_model
    handle = base.register_forward_hook(lambda *_: calls.append(1))
    found = prompts.find_prompts(model, 2, ["default", "other"], None)
    first = prompts.kept_keys(model, state, found)
    assert len(calls) == 2 and [key.shape[2] for key, _ in first[0]] == [P] * 2
    assert all(map(lambda a, b: a is b, first, prompts.kept_keys(model, state, found))) and len(calls) == 2
    with torch.no_grad():
        model.prompt_encoder["other"].embedding.weight.add_(1)
    found = prompts.find_prompts(model, 2, ["default", "other"], None)
    second = prompts.kept_keys(model, state, found)
    assert len(calls) == 3 and second[0] is first[0] and second[1] is not first[1]
    base.train()
    prompts.kept_keys(model, state, found)
    assert len(calls) == 5
    keyed = found._replace(keys=[keys_of(2)])
    assert prompts.kept_keys(model, state, keyed) is keyed.keys and len(calls) == 5
    handle.remove()


def test_a_prompt_trains_though_a_cache_is_wanted() -> None:
    """What is kept of a prompt has no gradient."""
    model = fastlora.accelerate(prompted("prompt tuning", dtype=torch.float32))
    weight, grads = model.prompt_encoder["default"].embedding.weight, []
    for use_cache in (False, True):
        model.zero_grad()
        model(input_ids=IDS, labels=IDS, use_cache=use_cache).loss.backward()
        grads.append(weight.grad.clone())
    assert grads[0].abs().max() > 1e-3 and torch.allclose(*grads, atol=1e-5)


def apart(model: Any) -> Any:
    """The model, of which nothing is exact but each row by itself."""
    fastlora.accelerate(model)
    model.__dict__[prompts.KEY].ways = {False: [], True: []}
    return model


def test_a_model_that_knows_no_positions_is_told_none(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[set[str]] = []
    model = apart(prompted("prompt tuning", dtype=torch.float32).eval())
    model.base_model.register_forward_pre_hook(lambda _, args, given: told.append(set(given)), with_kwargs=True)
    model(input_ids=IDS)
    monkeypatch.setattr(prompts, "_parameters", lambda base: {})
    model(input_ids=IDS)
    assert told[0] - told[1] == {"position_ids"}


def test_a_loss_without_logits_stays_without() -> None:
    model = prompted("prompt tuning", dtype=torch.float32)
    expected = apart(copy.deepcopy(model))(input_ids=IDS, labels=IDS)
    fastlora.accelerate(model, loss=True)
    found = apart(model)(input_ids=IDS, labels=IDS)
    assert model.__dict__[prompts.KEY].last[0] == sharing.APART
    assert found.logits is None and torch.allclose(found.loss, expected.loss, atol=1e-4)


def test_a_model_without_its_state_generates_as_pefts_does(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(PeftModelForCausalLM, "generate", lambda model, *_, **given: asked.append(given))
    model = fastlora.accelerate(two_prompts())
    for names, index in ((["default", "__base__", "other"], [0, -1, 1]), (None, None)):
        asked.clear()
        model.generate(input_ids=IDS, adapter_names=names)
        assert "adapter_names" not in asked[0] and ("prompt_index" in asked[0]) is (index is not None)
        assert index is None or asked[0]["prompt_index"].tolist() == index
    del model.__dict__[prompts.KEY]
    model.generate(input_ids=IDS, adapter_names=["other"] * 3)
    assert asked[-1]["adapter_names"] == ["other"] * 3 and "prompt_index" not in asked[-1]


def test_what_is_prompted() -> None:
    model = prompted("prompt tuning")
    assert prompts.is_prompted(model) and prompts.is_prompted(prompted("prefix tuning"))
    assert not prompts.is_prompted(model.base_model) and not prompts.is_prompted(nn.Linear(1, 1))
