"""`accelerate` itself: which models it takes, what counts as frozen, what it bounds, what it leaves to PEFT and says so."""

import warnings
from typing import Any

import peft
import pytest
import tiny
import torch
from peft_models import FAMILIES, llama
from quantised_weights import weight as quantised_weight
from test_bottleneck import adapted as with_bottlenecks
from torch import nn

import fastlora
from fastlora import fusion, memory, model_loss, ops, packing, sharing
from fastlora.bottleneck import BottleneckLayer
from fastlora.choice import trial
from fastlora.frozen import packed
from fastlora.peft import FrozenLinear, FusedLinear, embeddings, experts, mixed, prompts, quantised, siblings
from fastlora.peft.layers import FrozenQuantised

K, N = 8, 6


def lone(config: Any) -> Any:
    return peft.get_peft_model(nn.Sequential(nn.Linear(K, N)), config)


def test_what_has_nothing_to_make_faster_is_refused() -> None:
    with pytest.raises(ValueError, match="^model: has no PEFT LoRA layers, expected the result of peft.get_peft_model"):
        fastlora.accelerate(nn.Sequential(nn.Linear(K, N)))
    with pytest.raises(ValueError, match="^model: has no LoRA layers and no frozen nn.Linear, expected one"):
        fastlora.accelerate(nn.Sequential(nn.Linear(K, N)), frozen=True)
    model, _ = with_bottlenecks()
    with pytest.raises(ValueError, match="^model: has no PEFT LoRA layers"):
        fastlora.accelerate(model)  # a bottleneck adapter is nobody's LoRA


@pytest.mark.parametrize("option", ["loss", "fuse", "share_prefix"])
def test_a_model_without_adapters_may_have_any_of_the_rest(option: str) -> None:
    model = tiny.llama()
    assert fastlora.accelerate(model, **{option: True}) is model
    assert (model_loss.KEY in model.__dict__) == (option == "loss")
    assert fastlora.report(model)


def test_products_memory_is_bounded_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    bounded: list[bool] = []
    monkeypatch.setattr(memory, "bound_product_caches", lambda: bounded.append(True))
    fastlora.accelerate(lone(peft.LoraConfig(target_modules=["0"])))
    assert bounded == [True]


def test_a_frozen_layer_is_one_that_no_adapter_has_taken() -> None:
    base, _, _ = llama()
    model = fastlora.accelerate(peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"])), frozen=True)
    for name, module in model.named_modules():
        if type(module) is FrozenLinear:
            assert "q_proj" not in name
    assert type(model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")) is FrozenLinear
    assert type(model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj.base_layer")) is nn.Linear


def test_a_bottlenecks_own_products_are_its_own_and_its_sublayers_are_frozen() -> None:
    model, _ = with_bottlenecks()
    adapters = [one for one in model.modules() if isinstance(one, BottleneckLayer)]
    own = {part for adapter in adapters for part in fastlora.peft._parts(adapter)}
    inside = {part for adapter in adapters for part in adapter.modules()}
    assert own < inside and any(isinstance(part, nn.Linear) for part in inside - own)
    model.requires_grad_(False)
    fastlora.accelerate(model, frozen=True)
    frozen = {one for one in model.modules() if type(one) is FrozenLinear}
    assert frozen & inside and not frozen & own


class OwnParameter(nn.Parameter):
    pass


def test_a_quantised_layer_without_an_adapter_is_frozen_by_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(K, N)
    layer.weight = OwnParameter(layer.weight.detach(), requires_grad=False)
    assert not fastlora.peft._is_frozen_product(layer)
    found = quantised.Base(None, quantised_weight("int8", N, K, torch.float32).stored, "int8", None)  # type: ignore[arg-type]
    monkeypatch.setattr(quantised, "base_of", lambda one: found if one is layer else None)
    assert fastlora.peft._is_frozen_product(layer)


def said(model: Any, **options: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        exec(
            compile("accelerate(model, **options)", "caller.py", "exec"),
            {"accelerate": fastlora.accelerate, "model": model, "options": options},
        )
    assert all(one.filename == "caller.py" for one in found if "fastlora.accelerate" in str(one.message))
    return [str(one.message) for one in found if "fastlora.accelerate" in str(one.message)]


def test_what_is_left_to_peft_is_said_once_and_what_would_help() -> None:
    boft = peft.LNTuningConfig(target_modules=["1"])
    model = peft.get_peft_model(nn.Sequential(nn.Linear(K, N), nn.LayerNorm(N)), boft)
    (words,) = said(model)
    assert words.startswith("fastlora.accelerate left 1 layers to PEFT: ") and words.endswith(fastlora.peft.LEFT)
    (words,) = said(model, frozen=True)
    assert not words.endswith(fastlora.peft.LEFT)
    model = lone(peft.LoraConfig(target_modules=["0"], use_dora=False))
    assert said(model) == [] and type(model.base_model.model[0]) is FusedLinear
    trained = lone(peft.LoraConfig(target_modules=["0"]))
    trained.base_model.model[0].base_layer.weight.requires_grad_()
    assert said(trained) == ["fastlora.accelerate fused none of 1 LoRA layers: the base weight or bias is trained"]


def test_unloading_restores_first() -> None:
    for method in fastlora.peft.UNLOADING:
        model = fastlora.accelerate(lone(peft.LoraConfig(target_modules=["0"])))
        assert method in model.base_model.__dict__
        plain = getattr(model, method)()
        assert type(plain[0]) is nn.Linear and method not in model.base_model.__dict__
    model = fastlora.accelerate(lone(peft.LoraConfig(target_modules=["0"])))
    assert fastlora.restore(model) is model and not {*fastlora.peft.UNLOADING} & model.base_model.__dict__.keys()


class Derived(FrozenLinear):
    """As a hook of another library makes one."""


def test_what_is_a_frozen_product() -> None:
    plain = nn.Linear(K, N).requires_grad_(False)
    assert fastlora.peft._is_frozen_product(plain)
    for kind, frozen in ((FrozenLinear, True), (Derived, False), (FrozenQuantised, True)):
        layer = nn.Linear(K, N).requires_grad_(False)
        layer.__class__ = kind if kind is not FrozenQuantised else type("Both", (FrozenQuantised, nn.Linear), {})
        assert fastlora.peft._is_frozen_product(layer) is frozen
    assert not fastlora.peft._is_frozen_product(nn.LayerNorm(K))


def test_the_environment_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lone(peft.LoraConfig(target_modules=["0"]))
    for name in ("forced", "_environment"):
        monkeypatch.setattr(ops, name, getattr(ops, name))
    monkeypatch.setenv("FASTLORA_IMPL", "none of them")
    with pytest.raises(ops.ImplementationError, match="none of them"):
        fastlora.accelerate(model)
    assert type(model.base_model.model[0]) is not FusedLinear


PARTS = {
    "sharing.attach": (sharing, "attach"),
    "sharing.detach": (sharing, "detach"),
    "loss": (model_loss, "attach"),
    "fuse": (fusion, "attach"),
    "segments": (fusion, "attach_segments"),
    "prompt": (prompts, "attach"),
    "experts": (experts, "attach"),
}


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked to do its part, in turn."""
    asked: list[str] = []
    for name, (module, attribute) in PARTS.items():
        monkeypatch.setattr(module, attribute, lambda *_, name=name: asked[-1:] == [name] or asked.append(name))
    return asked


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["loss"], ["loss"]),
        (["fuse"], ["fuse"]),
        (["share_prefix"], ["sharing.attach", "segments"]),
        (["loss", "fuse", "share_prefix"], ["loss", "sharing.attach", "fuse", "segments"]),
    ],
    ids=str,
)
def test_each_part_has_its_place(parts: list[str], options: list[str], expected: list[str]) -> None:
    model = tiny.llama()
    fastlora.accelerate(model, **dict.fromkeys(options, True))
    assert parts == [*expected, "experts"]
    parts.clear()
    model.__dict__[sharing.KEY] = None  # has shared since an earlier call
    fastlora.accelerate(model, **dict.fromkeys(options, True))
    again = [one for one in expected if one in ("loss", "fuse")]
    again.insert(again.index("loss") + 1 if "loss" in again else 0, "sharing.attach")
    assert parts == ["sharing.detach", *again, "segments", "experts"]


@pytest.mark.parametrize(("family", "causal"), [("llama", True), ("t5", False)])
def test_a_causal_models_prompt_is_a_segment_of_its_own(parts: list[str], family: str, causal: bool) -> None:
    base, *_ = FAMILIES[family]()
    task = "CAUSAL_LM" if causal else "SEQ_2_SEQ_LM"
    fastlora.accelerate(peft.get_peft_model(base, peft.PromptTuningConfig(num_virtual_tokens=2, task_type=task)))
    assert parts == ["prompt", *(["segments"] if causal else []), "experts"]


def test_a_layer_that_got_its_adapter_since_is_no_frozen_one() -> None:
    base = nn.Sequential(nn.Linear(K, N)).requires_grad_(False)
    fastlora.accelerate(base, frozen=True)
    assert type(base[0]) is FrozenLinear
    model = fastlora.accelerate(peft.get_peft_model(base, peft.LoraConfig(target_modules=["0"])))
    layer = model.base_model.model[0]
    assert type(layer) is FusedLinear and type(layer.base_layer) is nn.Linear


def test_what_is_swapped_is_not_swapped_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fastlora.accelerate(lone(peft.LoraConfig(target_modules=["0"])))
    swapped: list[Any] = []
    monkeypatch.setattr(fastlora.peft, "become", lambda module, kind: swapped.append(module))
    monkeypatch.setattr(fastlora.peft.obstacles, "swap_obstacle", lambda layer: None)
    fastlora.accelerate(model)
    assert swapped == []


def test_every_base_of_four_bits_or_eight_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapted layer's, and a plain one's, which keeps its class when it has been swapped."""
    base = nn.Sequential(nn.Linear(K, N), nn.Linear(N, N))
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["0"]))
    stored = quantised_weight("int8", N, N, torch.float32).stored
    found = quantised.Base(None, stored, "int8", None)  # type: ignore[arg-type]
    plain, adapted = base[1], base[0]
    held: list[Any] = []
    monkeypatch.setattr(quantised, "base_of", lambda one: found if one is plain else None)
    monkeypatch.setattr(quantised, "hold", held.append)
    monkeypatch.setattr(fastlora.peft, "frozen_base", lambda one: None)
    monkeypatch.setattr(trial, "try_out", lambda weights: None)
    fastlora.accelerate(model, frozen=True)
    assert held == [adapted.base_layer, plain] and isinstance(plain, FrozenQuantised)
    kind = type(plain)
    held.clear()
    fastlora.accelerate(model, frozen=True)
    assert held == [plain] and type(plain) is kind


def test_a_weight_that_another_module_has_gets_no_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, _ = llama()
    model.lm_head.weight = model.model.embed_tokens.weight
    model.requires_grad_(False)
    copies: dict[str, list[Any]] = {"attach": [], "detach": []}
    monkeypatch.setattr(packed, "attach", lambda layer, budget: copies["attach"].append(layer))
    monkeypatch.setattr(packed, "detach", copies["detach"].append)
    fastlora.accelerate(model, frozen=True)
    linears = [one for one in model.modules() if isinstance(one, nn.Linear)]
    assert copies == {"attach": [one for one in linears if one is not model.lm_head], "detach": [model.lm_head]}


def test_groups_are_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what the model has become since: every module leaves its own before any is made, and every tuner knows of names."""
    model = lone(peft.LoraConfig(target_modules=["0"]))
    seen: list[tuple[str, Any]] = []
    monkeypatch.setattr(siblings, "leave", lambda module: seen.append(("leave", module)))
    monkeypatch.setattr(mixed, "attach", lambda module: seen.append(("names", module)))
    monkeypatch.setattr(siblings, "find_families", lambda *_: seen.append(("families", None)) or [])
    fastlora.accelerate(model)
    assert [module for what, module in seen if what == "leave"] == list(model.modules())
    assert [module for what, module in seen if what == "names"] == [model.base_model]
    assert seen[-1] == ("families", None)


def test_a_layer_whose_call_does_more_is_no_frozen_product() -> None:
    for hook in (lambda one: one.register_forward_hook(lambda *_: None), lambda one: vars(one).update(forward=print)):
        layer = nn.Linear(K, N).requires_grad_(False)
        hook(layer)
        assert not fastlora.peft._is_frozen_product(layer)


def test_plain_layers_stay_what_they_are_unless_they_are_asked_for() -> None:
    base = nn.Sequential(nn.Linear(K, N), nn.Linear(N, N))
    model = fastlora.accelerate(peft.get_peft_model(base, peft.LoraConfig(target_modules=["0"])))
    assert type(base[1]) is nn.Linear
    fastlora.accelerate(model, frozen=True)
    assert type(base[1]) is FrozenLinear


def test_every_lora_layer_may_be_an_embedding(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(embeddings, "attach", asked.append)
    base = nn.Sequential(nn.Embedding(K, N), nn.Linear(N, N))
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["0", "1"]))
    fastlora.accelerate(model)
    assert asked == [base[0], base[1]]


def test_one_swapped_embedding_is_a_fused_layer_enough() -> None:
    model = peft.get_peft_model(nn.Sequential(nn.Embedding(K, N)), peft.LoraConfig(target_modules=["0"]))
    assert said(model) == []


@pytest.mark.parametrize("option", ["frozen", "loss", "fuse"])
def test_what_would_help_is_not_said_to_who_has_it(option: str) -> None:
    model = peft.get_peft_model(tiny.llama(), peft.LNTuningConfig(target_modules=["norm"]))
    (words,) = said(model, **{option: True})
    assert words.startswith("fastlora.accelerate left") and not words.endswith(fastlora.peft.LEFT)


def test_who_leaves_some_layers_to_peft_but_not_all_does_not_say_so() -> None:
    """LoRA and norms in one model."""
    base = nn.Sequential(nn.Linear(K, N), nn.LayerNorm(N))
    inner = peft.get_peft_model(base, peft.LoraConfig(target_modules=["0"]))
    model = peft.get_peft_model(inner.base_model.model, peft.LNTuningConfig(target_modules=["1"]))
    assert said(model) == []


def test_what_is_measured_are_the_weights_that_each_operator_is_called_with(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[dict[str, Any]] = []
    monkeypatch.setattr(trial, "try_out", tried.append)
    monkeypatch.setattr(fusion, "weights", lambda model: {"rms_norm": ["a norm's"]})
    base, _, _ = llama()
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "o_proj"]))
    model.add_adapter("other", peft.LoraConfig(r=200, target_modules=["k_proj", "o_proj"]))
    fastlora.accelerate(model)
    of = {name: one for name, one in model.named_modules() if isinstance(one, FusedLinear)}
    q, k, o = ([one.base_layer.weight for name, one in of.items() if name.endswith(f"{x}_proj")] for x in "qko")
    qko = [weight for three in zip(q, k, o, strict=True) for weight in three]
    ko = [weight for two in zip(k, o, strict=True) for weight in two]
    qk = [weight for two in zip(q, k, strict=True) for weight in two]
    expected = {
        "frozen_linear": qko,
        "lora_linear_rank_16": qko,
        "lora_linear_rank_256": ko,
        "lora_linear": qko,
        "lora_linear_shared": qk,
        "multi_lora": ko,
        "multi_lora_shared": k,
    }
    found = tried[0]
    assert found.pop("rms_norm") == ["a norm's"] and found.keys() == expected.keys()
    for name, weights in expected.items():
        assert len(found[name]) == len(weights), name
        assert all(one is other for one, other in zip(found[name], weights, strict=True)), name


def test_restoring_asks_every_module_for_all_that_it_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fastlora.accelerate(lone(peft.LoraConfig(target_modules=["0"])))
    parts = ((siblings, "leave"), *((part, "detach") for part in (prompts, sharing, model_loss, fusion, embeddings)))
    parts = (*parts, (experts, "detach"), (fastlora.peft, "restore_layer"))
    asked: dict[Any, list[Any]] = {one: [] for one in parts}
    for one, modules in asked.items():
        monkeypatch.setattr(*one, modules.append)
    tuners: list[Any] = []
    monkeypatch.setattr(mixed, "detach", tuners.append)
    fastlora.restore(model)
    assert all(modules == list(model.modules()) for modules in asked.values()) and tuners == [model.base_model]


def test_who_knows_whose_the_rows_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a call with names is under way, and by what any module has been told; a sweep's names go with the rows."""
    model = nn.Sequential(nn.Linear(K, N), nn.Linear(N, N))
    rows = mixed.RowNames(["a"], [3])
    for under_way, names, mixes, knows in (
        (1, ["a"], True, True), (0, ["a"], False, False), (1, None, False, False), (2, rows, True, False),
    ):  # fmt: skip
        monkeypatch.setattr(mixed, "under_way", under_way)
        monkeypatch.setattr(mixed, "names_of", lambda one, names=names: names if one is model[1] else None)
        assert fastlora.peft._has_mixed_rows(model) is mixes and fastlora.peft._knows_examples(model) is knows
    assert fastlora.peft._has_mixed_rows in sharing.TELLERS and fastlora.peft._knows_examples in packing.TELLERS
