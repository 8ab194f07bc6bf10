"""Whole models on packed copies: PEFT's results whatever is merged, moved, swapped or copied, and no copy left behind."""

import copy
import gc
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import implementations
from packed_weights import (  # noqa: F401  (a fixture)
    NEEDS_COPIES,
    always_packed,
    check_now,
    eagerly_packed,
    held_bytes,
    unseen_element,
)
from peft import LoraConfig, get_peft_model
from peft_models import assert_as_near_as, llama, logits, peft_model, q_proj, run
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import fastlora
from fastlora import ops
from fastlora.frozen import packed
from fastlora.peft import FrozenLinear, FusedLinear

pytestmark = NEEDS_COPIES
NATIVE = pytest.mark.skipif("cpu" not in implementations("lora_linear", "cpu"), reason="the extension is not built")


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> None:
    """No measurement sends a product to plain PyTorch; and no weight or layer of an earlier test is left, whatever the order."""
    monkeypatch.setattr(ops, "forced", "cpu")
    if packed._by_key or packed._waiting:
        gc.collect()


def pair(family: str = "llama", **options) -> tuple[nn.Module, nn.Module, dict]:
    """A model with all its copies made, its peer left to PEFT, and the labels that they take."""
    model, labels = peft_model(family, **options)
    peer = copy.deepcopy(model)
    fastlora.accelerate(model, frozen=True)
    run(model, labels)
    assert held_bytes() > 0
    return model, peer, labels


def copies(model: nn.Module) -> int:
    """The bytes that the model's copies for forward and backward would take."""
    seen = {}
    for module in model.modules():
        if isinstance(module, (FusedLinear, FrozenLinear)):
            weight = module.weight
            seen[weight.data_ptr()] = 2 * packed.copy_bytes(weight)
    return sum(seen.values())


@NATIVE
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bert"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_models_with_copies_equal_peft(family: str, dtype: torch.dtype, packs: None) -> None:
    model, labels = peft_model(family, dtype)
    exact = run(copy.deepcopy(model).double(), labels)
    eager = run(model, labels)
    names = set(model.state_dict())
    fastlora.accelerate(model, frozen=True)
    for _ in range(2):  # making the copies, and using them
        assert_as_near_as(run(model, labels), eager, exact)
    assert set(model.state_dict()) == names
    if family != "t5" and always_packed(dtype):  # whose encoder's first layers need no dx
        embedding = model.get_input_embeddings().weight
        entries = [entry for entry in fastlora.report(model) if "original_module" not in entry.name]
        own = [entry for entry in entries if model.get_submodule(entry.name).weight is not embedding]
        assert own and all("oneDNN, packed, 0.0 MiB" in entry.reason for entry in own)


@NATIVE
def test_frozen_layers_without_adapters(packs: None) -> None:
    """lm_head and, with adapters on two of seven, the other five; tied or not; PEFT's results and nothing else changed."""
    for tied in (False, True):
        model, labels = peft_model(target_modules=["q_proj", "v_proj"])
        if tied:
            model.base_model.model.lm_head.weight = model.base_model.model.model.embed_tokens.weight
        expected, classes = run(model, labels), [type(module) for module in model.modules()]
        fastlora.accelerate(model, frozen=True)
        names = [name for name, module in model.named_modules() if type(module) is FrozenLinear]
        assert len(names) == 11 and names[-1].endswith("lm_head")
        assert {entry.name for entry in fastlora.report(model)} >= set(names)
        for name, value in run(model, labels).items():
            assert torch.allclose(value, expected[name], atol=1e-5), name
        fastlora.restore(model)
        assert [type(module) for module in model.modules()] == classes and held_bytes() == 0
        assert not any("_fastlora_seen" in module.__dict__ for module in model.modules())
        assert all(torch.equal(value, expected[name]) for name, value in run(model, labels).items())


def test_a_model_without_lora_layers(packs: None) -> None:
    model, _, _ = llama()
    with pytest.raises(ValueError, match="model: .*requires_grad_"):
        fastlora.accelerate(model, frozen=True)
    expected = logits(model.requires_grad_(False))
    fastlora.accelerate(model, frozen=True)
    assert torch.allclose(logits(model), expected, atol=1e-5) and held_bytes() * 2 == copies(model)
    assert all(
        entry.implementation == "cpu" and entry.reason.endswith("oneDNN, packed, 0.0 MiB")
        for entry in fastlora.report(model)
    )


def test_only_plain_frozen_layers_are_swapped() -> None:
    class Own(nn.Linear):
        pass

    hooked = nn.Linear(4, 4)
    hooked.register_forward_hook(lambda *_: None)
    model = nn.Sequential(Own(4, 4), hooked, nn.Linear(4, 4), nn.Linear(4, 4, dtype=torch.float64), nn.Linear(4, 4))
    model.requires_grad_(False)[-1].bias.requires_grad_()
    fastlora.accelerate(model, frozen=True)
    assert [type(layer) for layer in model] == [Own, nn.Linear, FrozenLinear, FrozenLinear, nn.Linear]
    fastlora.restore(model)


def test_a_swapped_layer_that_is_unfrozen_trains() -> None:
    model = fastlora.accelerate(nn.Sequential(nn.Linear(8, 8)).requires_grad_(False), frozen=True)
    x = torch.randn(4, 8)
    model(x)
    model.requires_grad_()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        expected = F.linear(x, model[0].weight, model[0].bias)
        assert torch.equal(model(x), expected)
        model(x).sum().backward()
        optimizer.step()
    reason = fastlora.report(model)[0].reason
    assert reason.startswith("nn.Linear's own forward: the base weight or bias is trained; before, cpu, 4 rows: ")


@NATIVE
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_and_unmerge(family: str, safe_merge: bool, packs: None) -> None:
    model, peer, labels = pair(family)
    for do in (
        lambda m: m.merge_adapter(safe_merge=safe_merge),
        lambda m: m.unmerge_adapter(),
        lambda m: m.merge_adapter(safe_merge=safe_merge),
    ):
        do(model)
        do(peer)
        assert torch.allclose(logits(model), logits(peer), atol=1e-5)
    model.unmerge_adapter(), peer.unmerge_adapter()
    expected = run(peer, labels)
    for name, value in run(model, labels).items():
        assert torch.allclose(value, expected[name], atol=1e-5), name
    assert held_bytes() <= copies(model)
    merged = model.merge_and_unload()
    assert torch.allclose(logits(merged), logits(peer.merge_and_unload()), atol=1e-5)


@NATIVE
def test_an_adapter_that_changes_the_base_weight(packs: None) -> None:
    """OLoRA's adapter begins by subtracting itself from the weight, through `.data`."""
    model, peer, _ = pair()
    for each in (model, peer):
        torch.manual_seed(1)
        each.add_adapter("other", LoraConfig(r=3, target_modules="all-linear", init_lora_weights="olora"))
        for active in ("default", "other"):
            each.set_adapter(active)
        each.eval()
    assert torch.allclose(logits(model), logits(peer), atol=1e-5)


@NATIVE
def test_an_adapter_on_a_frozen_layer(packs: None) -> None:
    """It may be merged before `accelerate` is called again; after that call it is fused."""
    options = {"target_modules": ["q_proj"]}
    model, peer, _ = pair(**options)
    for each in (model, peer):
        torch.manual_seed(1)
        each.add_adapter("wide", LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
        each.set_adapter("wide")
    assert torch.allclose(logits(model), logits(peer), atol=1e-5)
    for do in (lambda m: m.merge_adapter(), lambda m: m.unmerge_adapter()):
        do(model), do(peer)
        assert torch.allclose(logits(model), logits(peer), atol=1e-5)
    fastlora.accelerate(model, frozen=True)
    v_proj = model.base_model.model.model.layers[0].self_attn.v_proj
    assert type(v_proj) is FusedLinear and type(v_proj.base_layer) is nn.Linear
    assert torch.allclose(logits(model), logits(peer), atol=1e-5)
    fastlora.restore(model)
    assert not any(type(module) in (FusedLinear, FrozenLinear) for module in model.modules())


@NATIVE
@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.load_state_dict({name: value * 0.5 for name, value in m.state_dict().items()}),
        lambda m: m.load_state_dict({name: value * 0.5 for name, value in m.state_dict().items()}, assign=True),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.share_memory(),
    ],
    ids=["load_state_dict", "load_state_dict, assigned", "to bfloat16", "share_memory"],
)
def test_models_that_change(change: Callable[[nn.Module], object], packs: None) -> None:
    model, peer, _ = pair()
    change(model), change(peer)
    assert held_bytes() == 0
    error = 1e-5 if peer.dtype == torch.float32 else 0.05
    assert torch.allclose(logits(model), logits(peer), atol=error, rtol=error)


@NATIVE
@pytest.mark.parametrize("there", [torch.float64, "meta"])
def test_moving_away_frees_the_copies(there: object, packs: None) -> None:
    """At once, though no product comes by to see it."""
    model, _, _ = pair()
    model.to(there)
    assert sum(registered.bytes for registered in packed._by_key.values()) == 0


@NATIVE
def test_merging_frees_the_copies(packs: None) -> None:
    """PEFT writes into the memory as it lies, and the version does not show it."""
    model, _, _ = pair()
    head = model.base_model.model.lm_head.weight
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    version = layer.base_layer.weight._version
    model.merge_adapter()
    assert held_bytes() == 2 * head.nbytes and layer.base_layer.weight._version == version
    check_now(layer.base_layer.weight)
    assert held_bytes() == 2 * (head.nbytes + layer.base_layer.weight.nbytes)
    model.unmerge_adapter()
    assert held_bytes() == 2 * head.nbytes
    check_now(layer.base_layer.weight)


@NATIVE
@pytest.mark.parametrize("targets", [["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_merging_into_a_weight_that_another_layer_reads(targets: list[str], packs: None) -> None:
    """The embedding and lm_head are one parameter: PEFT writes to it through `.data`, and tells lm_head nothing."""
    model = llama()[0].to(torch.bfloat16)
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    model = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=64, target_modules=targets, init_lora_weights=False)
    ).eval()
    peer = copy.deepcopy(model)
    fastlora.accelerate(model, frozen=True)
    for do in (lambda m: None, lambda m: m.merge_adapter(), lambda m: m.unmerge_adapter(), lambda m: m.merge_adapter()):
        do(model), do(peer)
        expected = logits(peer)
        assert (logits(model) - expected).abs().max() <= 0.02 * expected.abs().max()


@NATIVE
@pytest.mark.parametrize("rows", [3, 4095], ids=["a few rows", "all but one"])
def test_merging_rows_of_an_embedding_that_another_layer_reads(rows: int, packs: None) -> None:
    """Of tokens that training never saw nothing is merged, and a fingerprint may miss the others: such a weight has no copy."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=4096, **sizes, tie_word_embeddings=True)
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"])).eval()
    head, embedding = model.base_model.model.lm_head, model.base_model.model.model.embed_tokens
    torch.nn.init.normal_(embedding.lora_embedding_A["default"].data[:, 1 : 1 + rows])
    fastlora.accelerate(model, frozen=True)
    x = torch.randn(50, 64)
    before = head(x)
    for do in (embedding.merge, embedding.unmerge, model.merge_adapter):
        do()
        assert torch.allclose(head(x), F.linear(x, head.weight), atol=1e-4)
    assert not torch.allclose(head(x), before, atol=1e-2)


@NATIVE
@pytest.mark.parametrize("added", [False, True], ids=["", "added since"])
def test_merging_one_element(added: bool, packs: None) -> None:
    """PEFT writes it through `.data`, where no fingerprint reads."""
    model, _, _ = pair(target_modules=["q_proj"])
    if added:
        model.add_adapter("up", LoraConfig(r=2, target_modules=["up_proj"]))
        model.set_adapter("up")
    layer = model.base_model.model.model.layers[0].mlp.up_proj if added else q_proj(model)
    weight, (adapter,) = layer.get_base_layer().weight, layer.active_adapters
    check_now(weight)
    place = unseen_element(weight)
    with torch.no_grad():
        layer.lora_A[adapter].weight.zero_()[0, place] = 100
        layer.lora_B[adapter].weight.zero_()[0, 0] = 1
    for do in (model.merge_adapter, model.unmerge_adapter):
        seen, before = packed._fingerprint(weight), weight.clone()
        do()
        assert packed._fingerprint(weight) == seen and not torch.equal(weight, before)
        check_now(weight)


@NATIVE
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("how", ["unload", "merge_and_unload"])
def test_an_unloaded_model_has_no_copies(how: str, whole: bool, packs: None) -> None:
    model, labels = peft_model(target_modules=["q_proj", "up_proj"])
    expected = getattr(copy.deepcopy(model), how)()
    fastlora.accelerate(model if whole else model.base_model.model, frozen=True)
    run(model, labels)
    assert packed._by_key
    unloaded = getattr(model, how)()
    assert packed._by_key == {} and not packed._waiting
    assert torch.allclose(logits(unloaded), logits(expected), atol=1e-5)
    assert packed._by_key == {}


@NATIVE
def test_swapped_parameters(packs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.utils.swap_tensors takes no tensor that somebody holds weakly; modules may move by it."""
    model, peer, labels = pair()
    expected = run(peer, labels)
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
    model.double().float()
    for name, value in run(model, labels).items():
        assert torch.allclose(value, expected[name], atol=1e-5), name
    assert held_bytes() > 0, "moved layers are registered again"


@NATIVE
def test_copied_and_pickled_models(packs: None) -> None:
    model, peer, _ = pair()
    held = held_bytes()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.allclose(logits(other), logits(peer), atol=1e-5)
        for parameter in other.parameters():
            parameter.data.mul_(0.5)
        assert not torch.allclose(logits(other), logits(peer), atol=1e-5)
        assert torch.allclose(logits(model), logits(peer), atol=1e-5)
    assert held_bytes() == held


@NATIVE
def test_budgets_of_models(packs: None) -> None:
    model, labels = peft_model()
    for budget in (0, 10_000, None):
        fastlora.accelerate(model, pack_budget=budget)
        assert held_bytes() == 0
        run(model, labels)
        assert held_bytes() <= (copies(model) if budget is None else budget)
        refused = ["does not fit the pack_budget" in entry.reason for entry in fastlora.report(model)]
        assert any(refused) == (budget == 10_000) and not all(refused)
    assert held_bytes() > copies(model) / 2  # all but dx of the first layers, which nobody wants
    fastlora.restore(model)
    assert held_bytes() == 0


def test_wrong_pack_budget() -> None:
    with pytest.raises(ValueError, match="pack_budget"):
        fastlora.accelerate(peft_model()[0], pack_budget=-1)


@NATIVE
def test_float32_adapters_keep_no_float32_copy_of_x(packs: None) -> None:
    """PEFT casts x to the adapter's dtype and keeps that too."""
    model, labels = peft_model(dtype=torch.bfloat16, lora_dropout=0.1)
    q_proj = model.base_model.model.model.layers[0].self_attn.q_proj

    def kept(x: Tensor) -> list[tuple[torch.dtype, int]]:
        found: list[tuple[torch.dtype, int]] = []
        pack = lambda tensor: found.append((tensor.dtype, tensor.numel())) or tensor  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            q_proj(x)
        return found

    x = torch.randn(400, 32, dtype=torch.bfloat16, requires_grad=True)
    as_large = (torch.float32, x.numel())
    assert as_large in kept(x)
    fastlora.accelerate(model)
    found = kept(x)
    assert q_proj.lora_A["default"].weight.dtype == torch.float32
    assert (torch.bfloat16, x.numel()) in found and as_large not in found
