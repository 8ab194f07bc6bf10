"""Receipts: what each adapter on a model changes, layer by layer, held against W + s B A made in full; and adapters that change nothing."""

import copy
import json
import shutil
import warnings

import pytest
import quantised_models
import tiny
import torch
from adapter_folders import LAYER, A, B, change, save, tensors
from peft import (
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    TrainableTokensConfig,
    get_peft_model,
)
from peft_models import peft_model
from quantised_models import EACH_KIND, NATIVE, a_folder  # noqa: F401  (a fixture)
from torch import nn

import fastlora
from fastlora import adapters, merge, receipts
from fastlora.adapters import AdapterError
from fastlora.models import load_model


@pytest.fixture(scope="module", autouse=True)
def on_cpu():
    with tiny.on_cpu():
        yield


def wrapped(config, make=tiny.llama, dtype=torch.float32):
    """A PeftModel with random values in all that the config trains."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(make().to(dtype), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter.data, std=0.3)
    return model.eval()


def weights(model):
    """Each adapted layer's weight, in float64, by the name that receipts give it."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "get_base_layer") and hasattr(module, "merge"):
            base = module.get_param() if hasattr(module, "get_param") else module.get_base_layer().weight
            found[name.removeprefix("base_model.model.")] = base.detach().double().clone()
    return found


LORA = {"r": 4, "lora_alpha": 6}
KINDS = {
    "linear": (LoraConfig(**LORA, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 3}), tiny.llama),
    "rslora": (LoraConfig(**LORA, target_modules="all-linear", use_rslora=True), tiny.llama),
    "by column": (LoraConfig(**LORA, target_modules=["c_attn"], fan_in_fan_out=True), tiny.gpt2),
    "an embedding": (LoraConfig(**LORA, target_modules=["embed_tokens"]), tiny.llama),
    "dora": (LoraConfig(**LORA, target_modules=["q_proj"], use_dora=True), tiny.llama),
    "dora by column": (LoraConfig(**LORA, target_modules=["c_attn"], fan_in_fan_out=True, use_dora=True), tiny.gpt2),
    "ia3": (IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]), tiny.llama),
    "ia3 by column": (
        IA3Config(target_modules=["c_attn"], feedforward_modules=[], fan_in_fan_out=True),
        tiny.gpt2,
    ),
}


@pytest.mark.parametrize("accelerated", [False, True], ids=["plain", "accelerated"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_change_is_that_of_the_weight_in_full(kind, accelerated):
    model = wrapped(*KINDS[kind])
    if accelerated:
        fastlora.accelerate(model)
    before = weights(model)
    (found,) = fastlora.receipt(model).adapters
    model.double().merge_adapter()
    after = weights(model)
    assert [one.name for one in found.layers] == list(before) and not found.changes_nothing
    for one in found.layers:
        norm = (after[one.name] - before[one.name]).norm().item()
        assert one.changes and one.norm == pytest.approx(norm, rel=1e-5)
        assert one.weight_norm == pytest.approx(before[one.name].norm().item(), rel=1e-9)
        assert one.change == pytest.approx(norm / one.weight_norm, rel=1e-5) and one.merge_error is None
    whole = sum(one.norm**2 for one in found.layers) / sum(one.weight_norm**2 for one in found.layers)
    assert found.change == pytest.approx(whole**0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["linear", "by column", "dora", "ia3", "an embedding"])
def test_the_merge_error_is_what_rounding_loses(kind, dtype, monkeypatch):
    monkeypatch.setattr(receipts, "BLOCK", 100)  # several blocks, the last one short
    config, make = KINDS[kind]
    model = wrapped(config, make, dtype)
    exact = copy.deepcopy(model).double()
    before = weights(model)
    (found,) = fastlora.receipt(model).adapters
    exact.merge_adapter()
    after = weights(exact)
    for one in found.layers:
        wanted = after[one.name]
        lost = (wanted.to(dtype).double() - wanted).norm() / (wanted - before[one.name]).norm()
        assert one.merge_error == pytest.approx(lost.item(), rel=1e-2)
    assert 0 < found.merge_error < 1


def test_merge_reports_the_same_error(tmp_path):
    base = tiny.save_model(tmp_path / "base", dtype="bfloat16")
    folder = save(tmp_path / "adapter", lambda: load_model(str(base), dtype="bfloat16")[0], target_modules=["q_proj"])
    model, _ = load_model(str(base), {"default": folder}, dtype="bfloat16")
    report = merge.merge(str(base), folder, tmp_path / "merged", dtype="bfloat16")
    assert fastlora.receipt(model).adapters[0].merge_error == pytest.approx(report.update_relative_error, rel=1e-3)


def test_whole_modules_norms_tokens_and_prompts_have_their_norms():
    config = LoraConfig(**LORA, target_modules=["q_proj"], modules_to_save=["lm_head"], trainable_token_indices=[1, 5])
    model = wrapped(config, lambda: tiny.llama(tie_word_embeddings=False))
    by_method = {one.method: one for one in fastlora.receipt(model).adapters[0].layers}
    head, tokens = model.base_model.model.lm_head, model.base_model.model.model.embed_tokens.token_adapter
    copied = head.modules_to_save["default"].weight - head.original_module.weight
    assert by_method["copy"].norm == pytest.approx(copied.norm().item(), rel=1e-5)
    rows = tokens.trainable_tokens_delta["default"] - tokens.base_layer.weight[[1, 5]]
    assert by_method["tokens"].norm == pytest.approx(rows.norm().item(), rel=1e-5)
    assert by_method["tokens"].name == "model.embed_tokens" and by_method["tokens"].note == "2 tokens"

    norms = wrapped(LNTuningConfig(target_modules=["input_layernorm"]))
    assert [one.method for one in fastlora.receipt(norms).adapters[0].layers] == ["norm"] * 2

    prompted = wrapped(PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    (prompt,) = fastlora.receipt(prompted).adapters[0].layers
    own = prompted.prompt_encoder["default"].embedding.weight
    assert prompt.norm == pytest.approx(own.norm().item(), rel=1e-5) and prompt.changes and prompt.change is None
    assert "norm" in str(fastlora.receipt(prompted)) and "3 tokens" in str(fastlora.receipt(prompted))


def test_several_adapters_each_have_their_own():
    model, _ = peft_model()
    model.add_adapter("other", LoraConfig(r=3, target_modules=["q_proj"]))
    first, other = fastlora.receipt(fastlora.accelerate(model)).adapters
    assert (first.name, other.name) == ("default", "other") and len(other.layers) == 2 < len(first.layers)
    assert other.changes_nothing and other.change == 0 and not first.changes_nothing
    assert "adapter 'other': LORA, float32: changes nothing" in str(fastlora.receipt(model))


def test_what_cannot_be_measured_says_why():
    model = wrapped(LoraConfig(**LORA, target_modules=["q_proj", "v_proj"]))
    layer = model.base_model.model.model.layers[0].self_attn
    layer.q_proj.base_layer.weight = nn.Parameter(torch.empty(32, 32, device="meta"), False)
    layer.v_proj.base_layer.weight = nn.Parameter(torch.zeros(16, 32, dtype=torch.int8), False)
    q, v, *rest = fastlora.receipt(model).adapters[0].layers
    assert "meta" in q.note and "quantised (int8)" in v.note
    assert all(one.norm and one.changes and one.change is None for one in (q, v)) and all(one.change for one in rest)
    with pytest.raises(ValueError, match="model: has no adapters"):
        fastlora.receipt(tiny.llama())
    with pytest.raises(ValueError, match="folders: got 'x', expected the model's adapters default"):
        fastlora.receipt(model, {"x": "somewhere"})


@NATIVE
@EACH_KIND
@pytest.mark.parametrize("accelerated", [False, True], ids=["plain", "accelerated"])
@pytest.mark.parametrize("method", ["LoRA", "DoRA", "IA3"])
def test_over_a_quantised_weight_the_share_is_of_what_it_stands_for(kind, accelerated, method, folder):
    """And what merging would lose is not known: the library quantises the sum anew."""
    targets = {"target_modules": r".*proj", "feedforward_modules": r".*down_proj"}
    config = IA3Config(**targets, init_ia3_weights=False) if method == "IA3" else None
    model = quantised_models.load(folder, kind, method=config, **({} if config else {"use_dora": method == "DoRA"}))
    whole = quantised_models.unquantised(model)
    if accelerated:
        fastlora.accelerate(model)
    (found,), (expected,) = (fastlora.receipt(one).adapters for one in (model, whole))
    assert len(found.layers) == 14 and not found.changes_nothing and found.merge_error is None
    assert found.change == pytest.approx(expected.change, rel=1e-4)
    for one, other in zip(found.layers, expected.layers, strict=True):
        assert one.changes and one.merge_error is None and one.norm == pytest.approx(other.norm, rel=1e-4)
        assert one.change == pytest.approx(other.change, rel=1e-4)
    if method == "IA3":
        return
    with pytest.raises(TypeError, match="expected one weight of 16 bits or more"), fastlora.merged(model):
        pass


@NATIVE
@EACH_KIND
def test_a_fresh_dora_over_a_quantised_weight_changes_nothing(kind, folder):
    model = quantised_models.load(folder, kind, torch.bfloat16, use_dora=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    layers = [one for one in model.modules() if hasattr(one, "lora_magnitude_vector")]
    for layer in layers:  # as PEFT begins it where B is zero
        given = {one: getattr(layer, one)["default"].weight for one in ("lora_A", "lora_B")}
        given |= {"base_layer": layer.base_layer, "scaling": layer.scaling["default"]}
        layer.lora_magnitude_vector["default"].update_layer(**given)
    (found,) = fastlora.receipt(model).adapters
    assert found.changes_nothing
    layers[3].lora_magnitude_vector["default"].weight.data.mul_(1.1)
    (found,) = fastlora.receipt(model).adapters
    assert [one.changes for one in found.layers].count(True) == 1


def test_names_that_match_nothing_are_told():
    config = LoraConfig(
        **LORA,
        target_modules=["q_proj", "query"],
        rank_pattern={"q_proj": 2, "layers.7.q_proj": 3},
        alpha_pattern={"k_proj": 3},
        layers_to_transform=[1, 9],
    )
    (found,) = fastlora.receipt(wrapped(config)).adapters
    assert found.absent == (
        "target_modules 'query' matches no layer",
        "rank_pattern 'layers.7.q_proj' matches no layer",
        "alpha_pattern 'k_proj' matches no layer",
        "layers_to_transform 9 matches no layer",
    )
    assert [one.r for one in found.layers] == [2]


def test_files_are_known_by_their_hashes(tmp_path):
    folder = save(tmp_path / "adapter", target_modules=["q_proj"])
    model = adapters.load(tiny.llama(), {"default": adapters.read(folder)})
    source = fastlora.receipt(model).adapters[0].source
    assert source.folder == str(folder) and source.unmatched == source.missing == ()
    assert source.hashes == {name: receipts.file_hash(folder / name) for name in (adapters.CONFIG, adapters.WEIGHTS)}
    tensors(lambda found: found.update({A: found[A] + 1}))(folder)
    assert source.hashes[adapters.WEIGHTS] != receipts.file_hash(folder / adapters.WEIGHTS)

    # What PEFT has loaded, and what it has said nothing of.
    tensors(lambda found: found.update({f"{LAYER}.lora_C.weight": found.pop(B)}))(folder)
    theirs = PeftModel.from_pretrained(tiny.llama(), folder)
    assert fastlora.receipt(theirs).adapters[0].source is None and "not known" in str(fastlora.receipt(theirs))
    source = fastlora.receipt(theirs, {"default": folder}).adapters[0].source
    assert source.unmatched == (f"{LAYER}.lora_C.weight",) and source.missing == (B,)
    assert f"keys not matched: {LAYER}.lora_C.weight" in str(fastlora.receipt(theirs, {"default": folder}))
    folder_of = fastlora.receipt(copy.deepcopy(model)).adapters[0].source
    assert folder_of is None, "a copy is another model, which may be changed"


NOOPS = {
    "fresh": {"target_modules": ["q_proj"]},
    "alpha 0": {"target_modules": ["q_proj"], "lora_alpha": 0, "init_lora_weights": False},
    "dora": {"target_modules": ["q_proj"], "use_dora": True},
    "a head as it was": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "tokens as they were": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5]},
    "a bias of B": {"target_modules": ["c_attn"], "lora_bias": True, "fan_in_fan_out": True},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NOOPS)
def test_an_adapter_that_changes_nothing_is_refused(name, tmp_path):
    make = tiny.gpt2 if name == "a bias of B" else lambda: tiny.llama(tie_word_embeddings=False)
    model = get_peft_model(make(), LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", **NOOPS[name]}))
    model.save_pretrained(tmp_path)
    base, read = make(), adapters.read(tmp_path)
    with pytest.raises(AdapterError, match=r"changes nothing: .* \(allow_noop=True takes it\)"):
        adapters.load(base, {"default": read})
    assert not any("lora" in key for key in base.state_dict()), "the model is as it was"
    assert fastlora.receipt(adapters.load(base, {"default": read}, allow_noop=True)).adapters[0].changes_nothing
    adapters.load(make(), {"default": read}, is_trainable=True)

    for key, parameter in model.named_parameters():
        if parameter.requires_grad and not key.endswith("lora_A.default.weight"):
            parameter.data.view(-1)[-1] += 0.5
    if name != "alpha 0":
        model.save_pretrained(tmp_path)
        loaded = adapters.load(make(), {"default": adapters.read(tmp_path)})
        assert not fastlora.receipt(loaded).adapters[0].changes_nothing


@pytest.mark.filterwarnings("ignore")
def test_the_smallest_change_of_other_methods_is_one(tmp_path):
    for config in (
        IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
        LNTuningConfig(target_modules=["input_layernorm"]),
        TrainableTokensConfig(token_indices=[1, 5], target_modules=["embed_tokens"]),
    ):
        model = get_peft_model(tiny.llama(), config)
        model.save_pretrained(tmp_path)
        with pytest.raises(AdapterError, match="changes nothing"):
            adapters.load(tiny.llama(), {"default": adapters.read(tmp_path)})
        next(p for p in model.parameters() if p.requires_grad).data.view(-1)[0] += 1e-3
        model.save_pretrained(tmp_path)
        assert (
            not fastlora.receipt(adapters.load(tiny.llama(), {"default": adapters.read(tmp_path)}))
            .adapters[0]
            .changes_nothing
        )


def test_a_fresh_adapter_is_accelerated_and_every_loader_refuses_it(tmp_path):
    base = tiny.save_model(tmp_path / "base")
    model = get_peft_model(load_model(str(base))[0], LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter")
    fastlora.accelerate(model)
    for load in (
        lambda **more: load_model(str(base), {"default": tmp_path / "adapter"}, **more),
        lambda **more: merge.merge(str(base), tmp_path / "adapter", tmp_path / "out", **more),
    ):
        with pytest.raises(AdapterError, match="changes nothing"):
            load()
        load(allow_noop=True)


def test_the_config_decides_whether_a_file_changes_anything(tmp_path):
    """The values of a file say it, not its name or size."""
    folder = save(tmp_path / "adapter", target_modules=["q_proj"])
    other = shutil.copytree(folder, tmp_path / "other")
    change(other, lora_alpha=0)
    adapters.load(tiny.llama(), {"default": adapters.read(folder)})
    with pytest.raises(AdapterError, match="changes nothing"):
        adapters.load(tiny.llama(), {"default": adapters.read(other)})
    assert json.loads((other / adapters.CONFIG).read_text())["lora_alpha"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["linear", "rslora", "by column", "an embedding"])
def test_what_is_merged_has_the_change_that_it_had(kind, dtype):
    """W is told as it was, whichever adapter is asked for; what rounding lost is not known any more."""
    config, make = KINDS[kind]
    model = wrapped(config, make, dtype)
    model.add_adapter("other", copy.deepcopy(config))
    for name, parameter in model.named_parameters():
        if ".other" in name:
            nn.init.normal_(parameter.data, std=0.2)
    before = fastlora.receipt(model)
    model.merge_adapter(["default"])
    after = fastlora.receipt(model)
    for old, new in zip(before.adapters, after.adapters, strict=True):
        for one, other in zip(old.layers, new.layers, strict=True):
            assert other.changes and other.norm == one.norm and other.merge_error is None
            assert other.weight_norm == pytest.approx(one.weight_norm, rel=1e-4 if dtype is torch.float32 else 5e-2)
            assert other.note == "merged: W holds default; what rounding lost is not known any more"
    assert "changes nothing" not in str(after)
    model.unmerge_adapter()
    assert [one.changes_nothing for one in fastlora.receipt(model).adapters] == [False, False]


@pytest.mark.parametrize("kind", ["dora", "ia3"])
def test_what_is_merged_otherwise_is_not_measured(kind):
    model = wrapped(*KINDS[kind])
    model.merge_adapter()
    (found,) = fastlora.receipt(model).adapters
    assert all(one.norm is None and one.weight_norm is None and "not measured" in one.note for one in found.layers)
    assert not found.changes_nothing


def test_merged_norms_and_tokens_are_told_as_they_were():
    config = LoraConfig(**LORA, target_modules=["q_proj"], trainable_token_indices=[1, 5])
    for model in (wrapped(config), wrapped(LNTuningConfig(target_modules=["input_layernorm"], task_type="CAUSAL_LM"))):
        before = {
            one.name: one for one in fastlora.receipt(model).adapters[0].layers if one.method in ("norm", "tokens")
        }
        model.merge_adapter()
        after = {one.name: one for one in fastlora.receipt(model).adapters[0].layers if one.name in before}
        assert before and after.keys() == before.keys()
        for name, one in before.items():
            assert after[name].changes and after[name].norm == pytest.approx(one.norm, rel=1e-5)


def test_an_adapter_for_inference_that_changes_nothing_is_told_of(tmp_path):
    """As PEFT loads it: of a fresh adapter's file, or one whose keys match nothing. One that is trained begins so."""
    fresh = get_peft_model(tiny.llama(), LoraConfig(**LORA, target_modules=["q_proj"]))
    fresh.save_pretrained(tmp_path / "fresh")
    wrapped(LoraConfig(**LORA, target_modules=["q_proj"])).save_pretrained(tmp_path / "good")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fastlora.accelerate(fresh)
        fastlora.accelerate(PeftModel.from_pretrained(tiny.llama(), tmp_path / "good"))
        fastlora.accelerate(PeftModel.from_pretrained(tiny.llama(), tmp_path / "fresh", is_trainable=True))
    with pytest.warns(UserWarning, match="adapter 'default' is loaded for inference and changes nothing"):
        fastlora.accelerate(PeftModel.from_pretrained(tiny.llama(), tmp_path / "fresh"))
