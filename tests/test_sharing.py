"""sharing.py's parts: what a model is told of a tree, what stands in the way, and which logits come back. Whole models are test_share_prefix.py's."""

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft_models import t5
from prompted_models import llama
from torch import Tensor, nn
from transformers import DynamicCache, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from fastlora import sharing, trees
from fastlora.sharing import APART, MASK, TREE, State
from fastlora.trees import KEY, Root

REAL = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
IDS = torch.arange(5, 13).view(2, 4)
VOCABULARY = 7


def a_tree(keys_only: bool = False) -> trees.Tree:
    return trees.grow(trees.find_rows(REAL, None), REAL.shape, [Root(3, 0)], [0, 0], keys_only=keys_only)


def test_the_state_says_what_the_last_call_did() -> None:
    assert State().describe() == (APART, "not called yet, unless compiled")
    assert State().describe(replaced=True) == (
        APART,
        "not called yet, unless compiled, or by the forward that was put before it",
    )
    assert State(last=(TREE, "why")).describe() == State(last=(TREE, "why")).describe(replaced=True) == (TREE, "why")


KEYS = [(torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4)) for _ in range(2)]


@pytest.mark.parametrize("keys", [None, KEYS], ids=["tokens", "keys"])
def test_what_a_model_is_told(keys: Any) -> None:
    tree = a_tree(keys is not None)
    by_mask, by_tree = (sharing.arguments(tree, way, torch.float64, keys) for way in (MASK, TREE))
    for told in (by_mask, by_tree):
        assert told["use_cache"] is False and torch.equal(told["position_ids"], tree.position_ids[None])
    assert torch.equal(by_mask["attention_mask"], tree.mask(torch.float64))
    assert by_mask.keys() - {"past_key_values"} == {"position_ids", "use_cache", "attention_mask"}
    unread = by_tree["attention_mask"]
    assert unread.shape == (1, 1, 1, 1) and unread.isnan().all()
    for name, starts in (("q", tree.starts), ("k", tree.key_starts)):
        assert by_tree[f"cu_seq_lens_{name}"].tolist() == starts.tolist()
        assert by_tree[f"cu_seq_lens_{name}"].dtype is torch.int32
    assert (by_tree["max_length_q"], by_tree["max_length_k"]) == (4, 4) and by_tree["segment_parents"] is tree.parents
    assert "past_key_values" not in by_tree
    if keys is None:
        assert "past_key_values" not in by_mask and "key_roots" not in by_tree
    else:
        assert by_tree["key_roots"] is keys
        for found, given in zip(sharing.keys_of(by_mask["past_key_values"]), keys, strict=True):
            assert all(map(torch.equal, found, given))


def test_a_cache_has_the_same_for_each_row() -> None:
    for found, given in zip(sharing.keys_of(sharing.cache_of(KEYS, 3)), KEYS, strict=True):
        assert all(torch.equal(one, other.expand(3, -1, -1, -1)) for one, other in zip(found, given, strict=True))


def test_prompts_take_their_places() -> None:
    tree = trees.grow(trees.find_rows(REAL, None), REAL.shape, [Root(1, 0), Root(2, 1)], [1, 0])
    embedded, prompts = torch.zeros(1, len(tree.source), 2), torch.arange(1, 7).view(3, 2).double()
    found = sharing.with_prompts(tree, embedded, prompts)
    assert found.dtype is torch.float32 and found.shape == embedded.shape
    assert found[0, :3].tolist() == prompts.tolist() and not found[0, 3:].any()


class Head:
    """A model whose logits of a token are its number, and which notes what it was given."""

    def __init__(self, look_up: bool = False, logits: bool = True) -> None:
        self.look_up, self.logits = look_up, logits

    def __call__(self, input_ids: Tensor, logits_to_keep: Any = None, **rest: Any) -> CausalLMOutput:
        self.kept = logits_to_keep
        if self.look_up:
            assert trees.look_up(REAL) is not None
        kept = input_ids if logits_to_keep is None else input_ids[:, logits_to_keep]
        logits = kept[..., None].expand(*kept.shape, VOCABULARY) if self.logits else None
        return CausalLMOutput(loss=torch.ones(()), logits=logits)


@pytest.mark.parametrize("takes_kept", [True, False])
@pytest.mark.parametrize(
    ("kept", "columns"), [(0, [0, 1, 2, 3]), (1, [3]), (2, [2, 3]), (torch.tensor([1, 3]), [1, 3])], ids=str
)
def test_logits_come_back_where_the_batch_has_its_tokens(kept: Any, columns: list[int], takes_kept: bool) -> None:
    """Of the wanted columns; the model computes no others, where it can be told so and they are fewer."""
    tree, model = a_tree(), Head()
    row = tree.gather(IDS, 0)
    out = sharing.run(model, {"input_ids": row}, tree, kept, takes_kept)
    expected = IDS.where(REAL, row[0, 0])  # padding: whatever stands first
    assert out.logits.shape == (2, len(columns), VOCABULARY) and out.loss == 1
    assert torch.equal(out.logits[..., 0], expected[:, columns])
    few = takes_kept and not (isinstance(kept, int) and kept == 0)
    assert (model.kept is not None) is few
    if few:
        assert torch.equal(model.kept, tree.places[:, columns].flatten())


def test_logits_that_the_loss_wants_are_all_computed() -> None:
    """Of every token; nor are some chosen where there would be more of them than tokens."""
    tree, model = a_tree(), Head()
    row = {"input_ids": tree.gather(IDS, 0)}
    sharing.run(model, {**row, "labels": tree.labels(IDS)}, tree, 1, True)
    assert model.kept is None
    sharing.run(model, {**row, "labels": None}, tree, torch.arange(4).repeat(2), True)
    assert model.kept is None and tree.places[:, [0, 1, 2, 3] * 2].numel() >= len(tree.source)


def test_logits_that_somebody_has_looked_up_are_theirs() -> None:
    tree = a_tree()
    out = sharing.run(Head(look_up=True), {"input_ids": tree.gather(IDS, 0)}, tree, 0, False)
    assert out.logits.shape[1] == len(tree.source)
    assert sharing.run(Head(logits=False), {"input_ids": tree.gather(IDS, 0)}, tree, 0, False).logits is None


def test_labels_as_the_tree_has_them() -> None:
    tree = a_tree()
    assert sharing.labelled({}, tree) == sharing.labelled({"labels": None, "shift_labels": None}, tree) == {}
    found = sharing.labelled({"labels": IDS, "shift_labels": IDS + 20}, tree)
    assert found["labels"].tolist() == [[-100, -100, -100, -100, 6, 7, 8, -100, 10]]
    assert found["shift_labels"].tolist() == [[-100, -100, -100, 25, 26, 27, 28, 29, 30]]
    assert sharing.targets_of({}) is None
    assert sharing.targets_of({"labels": IDS}).tolist() == [[6, 7, 8, -100], [10, 11, 12, -100]]
    assert sharing.targets_of({"labels": IDS, "shift_labels": REAL}) is REAL


def test_checkpointing_as_a_model_has_it_now() -> None:
    model: Any = nn.Sequential(nn.Linear(1, 1))
    assert not sharing.checkpoints(model)
    model[0].gradient_checkpointing = True
    assert sharing.checkpoints(model.train()) and not sharing.checkpoints(model.eval())


def with_config(**values: Any) -> Any:
    config = SimpleNamespace(**values)
    config.get_text_config = lambda decoder: config if decoder else None
    return SimpleNamespace(config=config)


def test_how_far_layers_see() -> None:
    for model, window in (
        (with_config(), None),
        (with_config(sliding_window=None), None),
        (with_config(sliding_window=0), None),
        (with_config(sliding_window=6), 6),
        (with_config(sliding_window=6, use_sliding_window=True), 6),
        (with_config(sliding_window=6, use_sliding_window=False), None),
    ):
        assert sharing.window_of(model) == window
        assert sharing.too_long(model, a_tree()) is (window is not None)
    assert int(a_tree().position_ids.max()) == 6
    assert not sharing.too_long(with_config(sliding_window=7), a_tree())


def test_the_first_way_that_is_exact_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    exact = {False: [TREE, MASK], True: [MASK]}
    monkeypatch.setattr(sharing, "_probe", lambda model, call, embed, kind: asked.append(kind) or exact[kind])
    state, model = State(), llama(attention_dropout=0.1).train()
    find = functools.partial(sharing.find_way, state, model, None, None)
    assert find() == MASK and find(keys_only=True) == MASK  # dropout is torch's attention's
    model.eval()
    assert find() == TREE and find(keys_only=True) == MASK
    state.ways[True] = [TREE]
    assert find(keys_only=True) == TREE
    model.train()
    assert find(keys_only=True) == APART
    assert asked == [False, True]


def test_no_way_is_exact_where_the_model_takes_none_of_it() -> None:
    """It takes no embeddings, or no cache."""
    model = llama().eval()
    embed, config = model.get_input_embeddings(), model.config
    config.get_text_config = lambda decoder=False: {True: config}[decoder]  # as of a model with more than one
    assert sharing._probe(model, model.forward, embed, False) == [MASK]  # its attention is its own
    assert sharing._probe(model, model.forward, embed, True) == [MASK]

    def without(*names: str) -> Any:
        def forward(**given: Any) -> Any:
            if names & given.keys():
                raise TypeError(f"unexpected {names}")
            return model(**given)

        names = set(names)
        return forward

    assert sharing._probe(model, without("inputs_embeds"), embed, False) == []
    assert sharing._probe(model, without("past_key_values"), embed, False) == [MASK]
    assert sharing._probe(model, without("past_key_values"), embed, True) == []
    assert sharing._probe(model, without("position_ids"), embed, False) == []


def probe_of(change: Any) -> sharing.Probe:
    """Of a model whose logits [1, n, V] are changed, where it is told of a tree."""
    model = llama().eval()

    def call(**given: Any) -> Any:
        out = model(**given)
        if "position_ids" in given:
            out.logits = change(out.logits)
        return out

    with torch.no_grad():
        return sharing.Probe(call, model.get_input_embeddings(), 90, model.device)


def test_logits_that_are_not_the_rows_own_are_refused() -> None:
    def allows(probe: sharing.Probe) -> bool:
        with torch.no_grad():
            return probe.allows(MASK, None)

    assert allows(probe_of(lambda logits: logits))
    assert not allows(probe_of(lambda logits: logits[..., :-1]))
    assert not allows(probe_of(lambda logits: logits + 0.1))
    assert not allows(probe_of(lambda logits: logits * torch.nan))
    # What the first row has told the second, however little.
    assert not allows(probe_of(lambda logits: logits + 1e-6 * logits.mean(1, keepdim=True)))
    # As much as the model itself makes of padding.
    noisy = probe_of(lambda logits: logits + 0.1)
    noisy.noise = torch.tensor(0.1 / 3.9)
    assert allows(noisy)
    noisy.noise = torch.tensor(0.1 / 4.5)
    assert not allows(noisy)
    rounding = probe_of(lambda logits: logits * (1 + 1e-5))
    rounding.noise = torch.zeros(())
    assert allows(rounding)


def test_a_probes_noise_is_what_padding_does() -> None:
    model = llama().eval()

    def call(**given: Any) -> Any:
        out = model(**given)
        if "attention_mask" in given and given["attention_mask"].dim() == 2:
            out.logits = out.logits + 0.5
        return out

    with torch.no_grad():
        probe = sharing.Probe(call, model.get_input_embeddings(), 90, model.device)
    assert abs(float(probe.noise) - 0.5) < 0.01
    assert torch.equal(probe.other[1], probe.ids[1]) and not torch.equal(probe.other[0], probe.ids[0])


def test_what_stands_in_a_calls_way(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = nn.Sequential(nn.Linear(1, 1))
    model.config = SimpleNamespace()
    obstacle = functools.partial(sharing.call_obstacle, model)
    given = {"input_ids": IDS, "labels": IDS, "num_items_in_batch": 3, "logits_to_keep": 1, "use_cache": False}
    assert obstacle({}) is None and obstacle({**given, "ignore_index": -100, "cu_seq_lens_q": IDS, "x": None}) is None
    assert obstacle({**given, "x": 0, "y": False}) == "x, y was given"
    assert obstacle({**given, "use_cache": True}) == "use_cache was given"
    with torch.autograd.forward_ad.dual_level():
        assert "forward" in obstacle(given)
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert "torch.compile" in obstacle(given)
    model.config.output_router_logits = True
    assert "experts" in obstacle(given)
    model.config.output_router_logits = False
    assert obstacle(given) is None
    model[0].compile()
    assert "torch.compile" in obstacle(given)


def test_what_tells_layers_of_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(1, 1))
    model[0].register_forward_pre_hook(lambda *_: None)
    model[0].register_forward_pre_hook(functools.partial(lambda *_: None))
    assert sharing._row_obstacle(model) is None
    handle = model[0].register_forward_pre_hook(functools.partial(lambda *_, names: None, names=["a"]))
    assert "by a hook" in sharing._row_obstacle(model)
    handle.remove()
    monkeypatch.setattr(sharing, "TELLERS", [lambda one: False, lambda one: one is model])
    assert sharing._row_obstacle(model) == "the rows have adapters of their own"
    assert sharing._row_obstacle(model[0]) is None


ALIKE = torch.arange(5, 25).repeat(2, 1)
ALIKE[1, 15:] += 50


def test_the_tree_of_a_batch_or_why_there_is_none() -> None:
    model = with_config(return_dict=True)
    none, given = torch.full_like(ALIKE, -100), {"input_ids": ALIKE}
    tree = sharing._tree_of(model, given)
    assert isinstance(tree, trees.Tree) and len(tree.source) == 15 + 5 + 5
    assert len(sharing._tree_of(model, {**given, "attention_mask": torch.ones_like(ALIKE)}).source) == 25
    mask = torch.ones_like(ALIKE)
    mask[1, 12:] = 0
    assert len(sharing._tree_of(model, {**given, "attention_mask": mask}).source) == 20
    assert sharing._told(tree, given) == "40 tokens of rows, 25 run"
    labels = none.clone()
    labels[:, 13:] = 1
    assert len(sharing._tree_of(model, {**given, "labels": labels}).source) == 12 + 8 + 8
    padded = none.clone()
    padded[1, 12] = 1  # of the first token that is not there: its predictor is
    assert isinstance(sharing._tree_of(model, {**given, "attention_mask": mask, "labels": padded}), trees.Tree)
    padded[1, 13] = 1
    reasons = {
        "no input_ids were given": [{"input_ids": None}, {"inputs_embeds": torch.ones(2, 20, 3)}],
        "return_dict was False": [{"return_dict": False}],
        "the mask has 4 dimensions": [{"attention_mask": torch.ones(2, 1, 20, 20)}],
        "the mask has 2 dimensions": [{"attention_mask": torch.ones(2, 19)}],
        "a label is predicted by padding": [{"attention_mask": mask, "labels": padded}],
        "a row has several texts": [{"position_ids": torch.arange(20).remainder(10).expand(2, 20)}],
        "no rows begin with the same 8 tokens before what they predict": [{"labels": ALIKE}, {"input_ids": ALIKE[:1]}],
    }
    for reason, changes in reasons.items():
        for change in changes:
            assert sharing._tree_of(model, {**given, **change}) == reason
    model.config.return_dict = False
    assert sharing._tree_of(model, given) == "return_dict was False"
    assert isinstance(sharing._tree_of(model, {**given, "return_dict": True}), trees.Tree)
    assert sharing._tree_of(with_config(return_dict=True, sliding_window=12), given) == "it sees 12 tokens"


class Model(LlamaForCausalLM):
    """Notes its calls."""

    calls: list[dict[str, Any]]

    def forward(self, input_ids: Any = None, attention_mask: Any = None, logits_to_keep: Any = 0, **rest: Any) -> Any:
        self.calls.append(
            {"input_ids": input_ids, "attention_mask": attention_mask, "logits_to_keep": logits_to_keep, **rest}
        )
        return super().forward(
            input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=logits_to_keep, **rest
        )


class Without(Model):
    """It computes all logits, whatever is wanted."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, **rest: Any) -> Any:
        assert "logits_to_keep" not in rest
        return super().forward(input_ids, attention_mask, **rest)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Shared, in whatever way; its attention takes a mask."""
    torch.manual_seed(0)
    one = Model(llama().config).eval()
    one.calls = []
    sharing.attach(one)
    assert type(one) is not Model and type(one).__name__ == "Model"
    return one


def test_a_forward_takes_its_arguments_by_place_or_name(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        expected = Model.forward(model, ALIKE).logits
        for args, kwargs in (((ALIKE,), {}), ((ALIKE, torch.ones_like(ALIKE)), {}), ((), {"input_ids": ALIKE})):
            model.calls.clear()
            assert torch.allclose(model(*args, **kwargs).logits, expected, atol=1e-4)
            assert model.__dict__[KEY].last == (MASK, "40 tokens of rows, 25 run")
            assert model.calls[-1]["input_ids"].shape == (1, 25)
        with pytest.raises(TypeError):
            model(ALIKE, None, 0, None)  # PEFT, or whoever else calls it, is told by the model itself
        for name in ("num_items_in_batch", "ignore_index"):
            model(ALIKE, **{name: 3, "output_attentions": None})
            assert model.calls[-1][name] == 3 and model.calls[-1]["input_ids"].shape == (1, 25)
            assert "output_attentions" not in model.calls[-1]
        known = model.__dict__[KEY].last
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        model(ALIKE)
        assert torch.equal(model.calls[-1]["input_ids"], ALIKE) and model.__dict__[KEY].last is known


@pytest.mark.parametrize("kind", [Model, Without])
def test_the_model_is_told_which_logits_are_wanted(kind: Any, model: Any) -> None:
    sharing.detach(model)
    model.__class__ = kind
    with torch.no_grad():
        expected = model(ALIKE).logits[:, -2:]
        sharing.attach(model)
        found = model(ALIKE, logits_to_keep=2).logits
    assert torch.allclose(found, expected, atol=1e-4)
    kept = model.calls[-1]["logits_to_keep"]
    assert kept == 0 if kind is Without else sorted(kept.tolist()) == [18, 19, 23, 24]


def test_a_call_that_shares_nothing_is_the_models_own(model: Any) -> None:
    """With what it was given, once; and the reason is kept."""
    state = model.__dict__[KEY]
    cases: dict[str, dict[str, Any]] = {
        "use_cache was given": {"input_ids": ALIKE, "use_cache": True},
        "no rows begin with the same 8 tokens before what they predict": {"input_ids": ALIKE[:1]},
        "no input_ids were given": {"inputs_embeds": torch.ones(2, 20, 32)},
    }
    with torch.no_grad():
        model(ALIKE)  # finds out which ways are exact
        for reason, given in cases.items():
            model.calls.clear()
            assert isinstance(model(**given).logits, Tensor)
            assert state.last == (APART, reason) and len(model.calls) == 1
            assert all(model.calls[0][name] is value for name, value in given.items())
        state.ways[False] = []
        model(ALIKE)
        assert state.last == (APART, "the model's logits are others where rows have tokens in common")
        model(ALIKE[:1])
        assert state.last == (APART, list(cases)[1])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sharing, "TELLERS", [lambda one: True])
            model(ALIKE)
        assert state.last == (APART, "the rows have adapters of their own")


def test_a_model_without_its_state_is_its_own(model: Any) -> None:
    with torch.no_grad():
        del model.__dict__[KEY]
        model(ALIKE)
    assert torch.equal(model.calls[-1]["input_ids"], ALIKE)


def test_attaching_and_detaching(model: Any) -> None:
    kind, state = type(model), model.__dict__[KEY]
    outer = nn.Sequential(model)
    sharing.attach(outer)  # again, and within another
    assert type(model) is kind and model.__dict__[KEY] is not state
    sharing.detach(model)
    assert type(model) is Model and KEY not in model.__dict__
    sharing.detach(model)
    assert type(model) is Model
    with pytest.raises(ValueError, match="share_prefix=True: Linear has no causal transformers model in it"):
        sharing.attach(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="share_prefix=True"):
        sharing.attach(model.model)  # it has no head
    with pytest.raises(ValueError, match="share_prefix=True"):
        sharing.attach(t5()[0])
    with pytest.raises(ValueError, match="share_prefix=True: Headed"):
        sharing.attach(Headed())


class Headed(nn.Module):
    """No transformers model, though it has a head."""

    def __init__(self) -> None:
        super().__init__()
        self.config, self.head = SimpleNamespace(is_encoder_decoder=False), nn.Linear(4, 9)

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def test_a_cache_of_a_models_layers_is_read() -> None:
    cache = DynamicCache()
    for layer, (key, value) in enumerate(KEYS):
        cache.update(key, value, layer)
    assert all(
        torch.equal(a, b)
        for found, given in zip(sharing.keys_of(cache), KEYS, strict=True)
        for a, b in zip(found, given, strict=True)
    )
