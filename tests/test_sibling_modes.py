"""What a family's waiting results depend on beside x: the mode, the plan, the thread's parent; and by which names siblings are found."""

import copy
from typing import Any

import peft
import pytest
import torch
from test_siblings import (
    WIDTH,
    Attention,
    assert_near,
    attention_of,
    count_shared,
    make_mixed_model,
    make_model,
    outcome,
    reasons,
)
from torch import Tensor, nn

import fastlora
from fastlora import ops
from fastlora.peft import siblings
from fastlora.peft.siblings import KEY, are_few, find_families, like_rows

X = torch.arange(7.0 * WIDTH).view(7, WIDTH) / 100


def family_of(model: Any) -> Any:
    return attention_of(model).q_proj.__dict__[KEY]


def test_each_layer_keeps_the_adapter_that_is_active_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    model.add_adapter(
        "other", peft.LoraConfig(r=3, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False)
    )
    attention_of(model).k_proj.set_adapter("other")
    expected = outcome(model, X)
    calls = count_shared(fastlora.accelerate(model) and monkeypatch)
    assert_near(outcome(model, X), expected)
    assert calls == [3] and family_of(model).dissolved is None


def test_a_few_rows_without_gradients_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to 8 on a CPU: the group would take longer. It lasts, and runs where there are more, or gradients."""
    model = make_model()
    few, more = torch.randn(8, WIDTH), torch.randn(9, WIDTH)
    with torch.no_grad():
        expected = [model(few), model(more)]
    calls = count_shared(fastlora.accelerate(model) and monkeypatch)
    with torch.no_grad():
        assert_near([model(few)], expected[:1])
        assert calls == []
        assert sum("could not run, or is slower for a few rows" in reason for reason in reasons(model)) == 3
        assert_near([model(more)], expected[1:])
    assert calls == [3] and all("a few rows" not in reason for reason in reasons(model))
    assert_near([model(few)], expected[:1])
    assert calls == [3, 3] and family_of(model).dissolved is None
    for device, expected in ((torch.device("cpu"), [True, False]), (torch.device("cuda"), [False, False])):
        assert [are_few((3, rows, WIDTH), device) for rows in (2, 3)] == expected


def test_a_layer_with_two_adapters_or_with_none_keeps_the_family_from_running(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    model.add_adapter(
        "other", peft.LoraConfig(r=3, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False)
    )
    fastlora.accelerate(model)
    calls = count_shared(monkeypatch)
    for names in (["default", "other"], []):
        attention_of(model).v_proj.set_adapter(names)
        model(X)
    assert calls == [] and family_of(model).dissolved is None
    attention_of(model).v_proj.set_adapter(["other"])
    model(X)
    assert calls == [3]


def test_adapters_of_other_dtypes_keep_the_family_from_running(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model().bfloat16()
    for part in ("lora_A", "lora_B"):
        getattr(attention_of(model).v_proj, part).float()
    fastlora.accelerate(model)
    calls = count_shared(monkeypatch)
    model(X.bfloat16())
    assert calls == [] and family_of(model).dissolved is None


def test_one_adapter_for_all_rows_does_not_ask_what_runs_mixed_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fastlora.accelerate(make_model())
    monkeypatch.setattr(siblings.Family, "_runs_mixed", staticmethod(lambda *_: False))
    calls = count_shared(monkeypatch)
    model(X)
    assert calls == [3]


def test_a_mixed_batch_of_adapters_that_one_layer_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, attention = make_mixed_model()
    fastlora.accelerate(model)
    asked: list[Any] = []
    monkeypatch.setattr(siblings.Family, "_runs_mixed", staticmethod(lambda *case: asked.append(case) or True))
    calls = count_shared(monkeypatch)
    for names, together in (["other", "default"], [3]), (["query", "default"], [3]), (["other", "other"], [3, 3]):
        expected = [
            layer(X[:2], adapter_names=names) for layer in (attention.q_proj, attention.k_proj, attention.v_proj)
        ]
        found = attention(X[:2], adapter_names=names)
        torch.testing.assert_close(found, torch.cat(expected, -1))
        assert calls == together
    assert family_of(model).dissolved is None
    assert all("x read once with " in reason or "x shared with " in reason for reason in reasons(model))
    with torch.autocast("cpu", torch.bfloat16):
        attention(X[:2], adapter_names=["other", "default"])
    assert asked.pop()[2] is torch.bfloat16
    assert [(len(plans), len(x), dtype) for plans, x, dtype in asked] == [(3, 2, torch.float32)] * 2


def test_dropout_does_not_keep_a_mixed_batch_from_running_together(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(dropout=0.5)
    model.add_adapter("other", model.peft_config["default"])
    fastlora.accelerate(model)
    monkeypatch.setattr(siblings.Family, "_runs_mixed", staticmethod(lambda *_: True))
    calls = count_shared(monkeypatch)
    attention_of(model)(X[:2], adapter_names=["other", "default"])
    assert calls == [3]


@pytest.mark.parametrize("change", ["weight", "scaling"])
def test_what_changed_between_two_layers_is_not_taken_from_before(change: str) -> None:
    model = make_model()
    attention = attention_of(model)

    def between() -> None:
        if change == "weight":
            attention.k_proj.lora_B["default"].weight = nn.Parameter(torch.ones(8, 4))
        else:
            attention.k_proj.scaling["default"] = 5.0

    between()
    expected = model(X)
    fastlora.accelerate(model)
    attention.k_proj.scaling["default"] = 2.0
    attention.between = between
    torch.testing.assert_close(model(X), expected)
    assert family_of(model).dissolved == "k_proj was called in another mode"


class Sees(Attention):
    """Tells what its family holds as its layers are called."""

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        here = self.q_proj.__dict__[KEY]._here
        self.waiting = []
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(self, name)(x)
            self.waiting.append(None if here.pending is None else sorted(here.pending.results))
        self.inside = here.in_parent
        return x


class MissesLast(Attention):
    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return self.q_proj(x).sum() + self.k_proj(x).sum() + self.v_proj(x.clone()).sum()


def test_a_miss_of_the_last_layer_is_told_as_that() -> None:
    model = make_model()
    attention_of(model).__class__ = MissesLast
    fastlora.accelerate(model)(X)
    assert family_of(model).dissolved == "v_proj was called with another x"
    assert family_of(model)._here.pending is None  # x is free


def test_the_first_layer_tells_what_runs_a_mixed_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, attention = make_mixed_model()
    fastlora.accelerate(model)
    asked: list[Any] = []
    monkeypatch.setattr(
        siblings.lora_linear, "choose_shared", lambda *case, **mode: asked.append((case, mode)) or (None, False)
    )
    attention(X, adapter_names=["other"] * 7)
    (rows, weight, dropout), mode = asked[0]
    assert rows.shape == X.shape and weight is attention.q_proj.base_layer.weight
    assert dropout is False and mode == {"mixed": True}


def seeing_model() -> Any:
    model = make_model()
    attention_of(model).__class__ = Sees
    return fastlora.accelerate(model)


def test_each_result_is_given_out_once() -> None:
    model = seeing_model()
    for _ in range(2):
        model(X)
        assert attention_of(model).waiting == [[1, 2], [2], None] and attention_of(model).inside
        assert not family_of(model)._here.in_parent and family_of(model)._here.pending is None


def test_an_inference_tensor_is_computed_alone() -> None:
    model = seeing_model()
    with torch.inference_mode():
        model(torch.randn(9, WIDTH))  # not few, which run alone anyhow
    assert attention_of(model).waiting == [None] * 3
    with torch.no_grad():
        model(torch.randn(9, WIDTH))
    assert attention_of(model).waiting == [[1, 2], [2], None]


def test_a_family_that_was_dissolved_stays_so() -> None:
    model = seeing_model()
    hooks = len(attention_of(model)._forward_hooks), len(attention_of(model)._forward_pre_hooks)
    family_of(model).dissolve("for a test")
    assert hooks == (1, 1) and not attention_of(model)._forward_hooks and not attention_of(model)._forward_pre_hooks
    assert family_of(model).hooks == ()
    model(X)
    assert attention_of(model).waiting == [None] * 3
    assert all("its group with" in reason and "was dissolved: for a test" in reason for reason in reasons(model))


def test_a_copied_parent_has_a_family_of_its_copied_layers() -> None:
    model = seeing_model()
    twin = copy.deepcopy(model)
    assert family_of(twin) is not family_of(model) and family_of(twin).parent is attention_of(twin)
    assert all(layer.__dict__[KEY] is family_of(twin) for layer in family_of(twin).layers)
    twin(X)
    assert attention_of(twin).waiting == [[1, 2], [2], None]


def test_hooks_that_a_compiler_traces_leave_the_family_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fastlora.accelerate(make_model())
    family, attention = family_of(model), attention_of(model)
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        siblings._when_parent_begins(family, attention, ())
        assert not family._here.in_parent
    siblings._when_parent_begins(family, attention, ())
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        siblings._when_parent_returns(family, attention, (), X)
        assert family._here.in_parent
    siblings._when_parent_returns(family, attention, (), X)
    assert not family._here.in_parent and family.dissolved is None


def test_leaving_takes_a_family_apart() -> None:
    model = seeing_model()
    siblings.leave(attention_of(model).k_proj)
    siblings.leave(attention_of(model).k_proj)
    assert KEY not in attention_of(model).k_proj.__dict__ and not attention_of(model)._forward_hooks


def test_a_forced_reference_is_told_as_shared_but_not_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fastlora.accelerate(make_model())
    monkeypatch.setattr(ops, "forced", "reference")
    model(X)
    assert all("x shared with" in reason and "read once" not in reason for reason in reasons(model))


def parent(**widths: int) -> nn.Module:
    found = nn.Module()
    for name, width in widths.items():
        found.add_module(name, nn.Linear(width, 4))
    return found


@pytest.mark.parametrize(
    ("path", "widths", "expected"),
    [
        ("self_attn", {"q_proj": 8, "k_proj": 8, "v_proj": 8}, [("q_proj", "k_proj", "v_proj")]),
        ("self_attn", {"q_proj": 8, "v_proj": 8, "o_proj": 8}, [("q_proj", "v_proj")]),
        ("encoder_attn", {"q_proj": 8, "k_proj": 8, "v_proj": 8}, [("k_proj", "v_proj")]),
        ("cross_attn", {"q_proj": 8, "k_proj": 8}, []),
        ("self_attn", {"q_proj": 8}, []),
        ("self_attn", {"q_proj": 8, "k_proj": 6, "v_proj": 8}, []),
        ("mlp", {"gate_proj": 8, "up_proj": 8, "q": 8, "k": 8}, [("gate_proj", "up_proj"), ("q", "k")]),
    ],
)
def test_siblings_are_found_by_name(path: str, widths: dict[str, int], expected: list[tuple[str, ...]]) -> None:
    model = nn.Module()
    model.add_module("layers", nn.ModuleList([nn.Module()]))
    model.layers[0].add_module(path, parent(**widths))
    found = list(find_families(model, lambda layer: isinstance(layer, nn.Linear), lambda *_: []))
    assert [family.names for family in found] == expected
    for family in found:
        assert family.layers == tuple(getattr(family.parent, name) for name in family.names)
        assert len(family.hooks) == 2


def test_members_alone_are_found() -> None:
    model = parent(q=8, k=8, v=8)
    [family] = find_families(model, lambda layer: layer is not model.k, lambda *_: [])
    assert family.names == ("q", "v")


def test_rows_without_memory() -> None:
    rows = like_rows((2, 3, WIDTH), torch.ones(4, WIDTH, dtype=torch.float64), torch.bfloat16)
    assert rows.shape == (6, WIDTH) and rows.dtype is torch.bfloat16
    assert rows.untyped_storage().nbytes() == 2
    assert like_rows((WIDTH,), torch.ones(4, WIDTH), torch.float32).shape == (1, WIDTH)
