"""What people do to a model before or after it is accelerated whole: the logits and one step's gradients stay PEFT's."""

import copy
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate as hooks
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from test_fusion import SIZES, adapted, batch, build, told
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

import fastlora
from fastlora import fusion
from fastlora.peft import FusedLinear

ALL = {"frozen": True, "loss": True, "fuse": True}
CLOSE = {torch.float32: 1e-5, torch.float64: 1e-6, torch.float16: 0.02, torch.bfloat16: 0.1}  # of the largest number
OVERTAKEN = ["transformers", "its own forward: another forward was put into its class"]
LAYERS = 14

Do = Callable[[Any], Any]


def values(model: Any) -> dict[str, Tensor]:
    """The logits in eval mode, and the loss and every gradient of a training step."""
    given = batch()
    model.zero_grad()
    with torch.no_grad():
        logits = model.eval()(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).logits
    loss = model.train()(**given).loss
    found = {"logits": logits, "loss": loss.detach()}
    if loss.requires_grad:
        loss.backward()
        found.update({name: one.grad for name, one in model.named_parameters() if one.grad is not None})
    return {name: value.clone() for name, value in found.items()}


def assert_same(ours: Any, plain: Any) -> None:
    found, expected = values(ours), values(plain)
    assert found.keys() == expected.keys() and len(found) >= 2
    for name, value in expected.items():
        # transformers computes its loss in float32 whatever the logits are; ours is not less exact
        assert found[name].dtype == value.dtype or name == "loss", name
        error = (found[name].double() - value.double()).abs().max()
        assert error <= CLOSE[expected["logits"].dtype] * max(1e-2, value.double().abs().max().item()), (name, error)


def accelerated(model: Any) -> Any:
    return fastlora.accelerate(model, **ALL)


def used(model: Any) -> Any:
    """After a step: what a layer, a copy or the loss remembers of one is there."""
    values(model)
    model.zero_grad()
    return model


def ran_fused(model: Any) -> bool:
    """Whether every layer's last call was an operator's."""
    report = list(fastlora.report(model))
    return sum(isinstance(one, FusedLinear) for one in model.modules()) == LAYERS and not {"peft", "transformers"} & {
        entry.implementation for entry in report
    }


def trains_adapters(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model


def with_other(model: Any) -> Any:
    torch.manual_seed(3)
    model.add_adapter("other", LoraConfig(r=3, lora_alpha=1, target_modules="all-linear", init_lora_weights=False))
    return model


def after(*steps: str) -> Do:
    """These methods of the model, or of its tuner, called in turn."""

    def do(model: Any) -> Any:
        for step in steps:
            getattr(model if hasattr(type(model), step) else model.base_model, step)()
        return model

    return do


def checkpointed(reentrant: bool) -> Do:
    def do(model: Any) -> Any:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        return model

    return do


def mixed_of(kind: str) -> Do:
    def do(model: Any) -> Any:
        with_other(model)
        more = {"density": 0.5} if kind == "ties" else {}
        model.add_weighted_adapter(["default", "other"], [0.5, 0.7], "mixture", combination_type=kind, **more)
        model.set_adapter("mixture")
        return model

    return do


def loaded_state(assign: bool) -> Do:
    def do(model: Any) -> Any:
        drawn = torch.Generator().manual_seed(8)
        state = {
            key: value + 0.05 * torch.randn(value.shape, generator=drawn).to(value)
            for key, value in model.state_dict().items()
        }
        assert str(model.load_state_dict(state, strict=True, assign=assign)) == "<All keys matched successfully>"
        return trains_adapters(model)

    return do


def resized(model: Any) -> Any:
    torch.manual_seed(5)
    model.resize_token_embeddings(100, mean_resizing=False)
    return trains_adapters(model)


def set_other(model: Any) -> Any:
    with_other(model).set_adapter("other")
    return model


def set_both(model: Any) -> Any:
    with_other(model).base_model.set_adapter(["default", "other"])
    return model


def saved_whole(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


FUSED_AFTER: dict[str, Do] = {
    "eval and train": after("eval", "train", "eval"),
    "frozen and thawed": lambda model: trains_adapters(model.requires_grad_(False)),
    "merged and unmerged": after("merge_adapter", "unmerge_adapter"),
    "disabled and enabled": after("disable_adapter_layers", "enable_adapter_layers"),
    "checkpointed": checkpointed(False),
    "checkpointed, reentrant": checkpointed(True),
    "another adapter": set_other,
    "two adapters": set_both,
    "state loaded": loaded_state(False),
    "state assigned": loaded_state(True),
    "copied": copy.deepcopy,
    "pickled": lambda model: pickle.loads(pickle.dumps(model)),
    "saved whole": saved_whole,
    **{f"mixture, {kind}": mixed_of(kind) for kind in ("linear", "cat", "svd", "ties")},
}
PLAIN_AFTER: dict[str, Do] = {
    "frozen": lambda model: model.requires_grad_(False),
    "all trained": lambda model: model.requires_grad_(True),
    "merged": after("merge_adapter"),
    "disabled": after("disable_adapter_layers"),
    "resized": resized,
    "unloaded": lambda model: model.unload().requires_grad_(True),
    "merged and unloaded": lambda model: model.merge_and_unload().requires_grad_(True),
}


@pytest.mark.filterwarnings("ignore")  # PEFT's, of merged adapters and the like
@pytest.mark.parametrize("do", [*FUSED_AFTER, *PLAIN_AFTER])
def test_what_is_done_to_an_accelerated_model(do: str) -> None:
    how = {**FUSED_AFTER, **PLAIN_AFTER}[do]
    ours = how(used(accelerated(adapted())))
    assert_same(ours, how(adapted()))
    assert do in PLAIN_AFTER or ran_fused(ours)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "do", ["merged and unmerged", "checkpointed, reentrant", "two adapters", "state assigned", "mixture, cat"]
)
def test_what_is_done_in_bfloat16(do: str) -> None:
    ours = FUSED_AFTER[do](used(accelerated(adapted(dtype=torch.bfloat16))))
    assert_same(ours, FUSED_AFTER[do](adapted(dtype=torch.bfloat16)))
    assert ran_fused(ours)


CASTS: dict[str, Do] = {
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "to": lambda model: model.to(torch.bfloat16),
    "half and float": lambda model: used(model.half()).float(),
    "double": lambda model: model.double(),
}


@pytest.mark.parametrize("cast", CASTS)
def test_another_dtype_before_or_after(cast: str) -> None:
    plain, before = CASTS[cast](adapted()), accelerated(CASTS[cast](adapted()))
    later = CASTS[cast](used(accelerated(adapted())))
    for ours in (before, later):
        assert_same(ours, plain)
        assert cast == "double" or ran_fused(ours)
    for name, value in values(before).items():
        assert torch.equal(values(later)[name], value), name


@pytest.mark.parametrize("trained", [True, False])
def test_a_model_from_disk(trained: bool, tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    plain, ours = (PeftModel.from_pretrained(build(), tmp_path, is_trainable=trained) for _ in range(2))
    assert_same(accelerated(ours), plain)
    assert ran_fused(ours)
    assert any(parameter.requires_grad for parameter in ours.parameters()) == trained


SCRIPT = """
import sys
import torch
model = torch.load(sys.argv[1], weights_only=False)
given = torch.load(sys.argv[2])
model.train()(**given).loss.backward()
grads = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
kinds = {type(module).__module__ + "." + type(module).__name__ for module in model.modules()}
import fastlora
torch.save({"grads": grads, "kinds": sorted(kinds), "ran": [entry.implementation for entry in fastlora.report(model)]}, sys.argv[3])
"""


def test_a_whole_model_in_another_process(tmp_path: Path) -> None:
    """It comes back accelerated, without anybody's having imported fastlora."""
    ours, plain = accelerated(adapted()), adapted()
    torch.save(ours, tmp_path / "model")
    torch.save(batch(), tmp_path / "batch")
    where = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    names = [str(tmp_path / name) for name in ("model", "batch", "result")]
    subprocess.run([sys.executable, "-c", SCRIPT, *names], check=True, env=where, timeout=120)
    found = torch.load(tmp_path / "result")
    expected = values(plain)
    for name, grad in found["grads"].items():
        assert (grad - expected[name]).abs().max() <= CLOSE[torch.float32] * expected[name].abs().max(), name
    assert len(found["grads"]) == len(expected) - 2
    assert "fastlora.peft.layers.FusedLinear" in found["kinds"]
    assert not {"peft", "transformers"} & set(found["ran"])


def everywhere(model: Any) -> Any:
    """As device_map leaves it: a hook on the model and on each of its modules."""
    return hooks.dispatch_model(model, {"": "cpu"}, force_hooks=True)


def by_block(model: Any) -> Any:
    parts = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
    hooks.dispatch_model(
        model.get_base_model(), dict.fromkeys(parts, "cpu"), main_device=torch.device("cpu"), force_hooks=True
    )
    return model


def offloaded(model: Any) -> Any:
    """Its weights are there in a call alone."""
    return hooks.cpu_offload(model, execution_device=torch.device("cpu"))


HOOKS: dict[str, Do] = {"everywhere": everywhere, "by block": by_block, "offloaded": offloaded}


@pytest.mark.filterwarnings("ignore:fastlora.accelerate fused none")
@pytest.mark.parametrize("how", HOOKS)
def test_hooks_of_a_device_map(how: str) -> None:
    """Before: PEFT's forward calls the hooked layers, and ours are the parts between and the loss. After: the hooks call our forwards."""
    plain = HOOKS[how](adapted())
    before, later = accelerated(HOOKS[how](adapted())), HOOKS[how](accelerated(adapted()))
    for ours in (before, later):
        assert_same(ours, plain)
        assert told(ours)["LlamaMLP"][0] == "cpu"
    assert sum(isinstance(one, FusedLinear) for one in before.modules()) == 0
    for ours in (before, later):
        fastlora.restore(ours)
        for name, value in values(ours).items():
            assert torch.equal(value, values(plain)[name]), name
        assert not [one for one in ours.modules() if "forward" in one.__dict__ and holds_another(one)]


def holds_another(module: nn.Module) -> bool:
    held = getattr(module.__dict__.get("_old_forward"), "__func__", None)
    return held is not None and held is not type(module).forward


def test_hooks_that_are_removed() -> None:
    """accelerate then leaves the forward that it found on the object."""
    plain, ours = adapted(), offloaded(accelerated(adapted()))
    hooks.hooks.remove_hook_from_module(ours, recurse=True)
    assert_same(fastlora.restore(ours), plain)
    assert all(
        getattr(one.__dict__.get("forward"), "__func__", type(one).forward) is type(one).forward
        for one in ours.modules()
    )


def liger_mlp(self: Any, x: Tensor) -> Tensor:
    """Computes something else, or nobody could tell who ran."""
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * 2


def liger_norm(self: Any, hidden_states: Tensor) -> Tensor:
    return nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon) * 2


def of_a_card(self: Any, *args: Any) -> Tensor:
    raise ValueError("Pointer argument (at 0) cannot be accessed from Triton (cpu tensor?)")


PATCHES = {"LlamaMLP": liger_mlp, "LlamaRMSNorm": liger_norm}


@pytest.fixture
def patch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    def put(name: str, forward: Any) -> None:
        monkeypatch.setattr(getattr(modeling_llama, name), "forward", forward)

    yield put


@pytest.mark.parametrize("name", PATCHES)
@pytest.mark.parametrize("when", ["before", "after", "after a step"])
def test_a_forward_put_into_a_class(name: str, when: str, patch: Callable[..., None]) -> None:
    """As Liger does: what was put there runs, and the other parts stay ours. Taken out again, ours runs again."""
    unpatched = values(adapted())
    model = adapted()
    if when != "before":
        accelerated(model)
    if when == "after a step":
        used(model)
    own = getattr(modeling_llama, name).forward
    patch(name, PATCHES[name])
    if when == "before":
        accelerated(model)
    assert_same(model, adapted())
    assert told(model).pop(name) == OVERTAKEN
    assert all(entry[0] == "cpu" for part, entry in told(model).items() if part != name)
    assert (values(model)["loss"] - unpatched["loss"]).abs() > 1e-4
    patch(name, own)
    assert_same(model, adapted())
    assert when == "before" or told(model)[name][0] == "cpu"


@pytest.mark.parametrize("name", PATCHES)
def test_a_forward_for_a_card_alone(name: str, patch: Callable[..., None]) -> None:
    own = getattr(modeling_llama, name).forward
    patch(name, of_a_card)
    model = accelerated(adapted())
    assert told(model)[name] == OVERTAKEN
    patch(name, own)
    assert_same(model, adapted())


def test_a_class_whose_forward_cannot_be_tried() -> None:
    class CardsMLP(modeling_llama.LlamaMLP):
        forward = of_a_card

    model = adapted()
    for layer in model.get_base_model().model.layers:
        layer.mlp.__class__ = CardsMLP
    accelerated(model)
    assert not any(fusion.is_derived(layer.mlp) for layer in model.get_base_model().model.layers)
    with pytest.raises(ValueError, match="Triton"):
        model(**batch())


def test_another_attention_put_into_the_class(patch: Callable[..., None]) -> None:
    """Which needs its padding and mask, even where that was left out before."""
    own = modeling_llama.LlamaAttention.forward

    def doubled(self: Any, *args: Any, **kwargs: Any) -> Any:
        out, weights = own(self, *args, **kwargs)
        return out * 2, weights

    model = used(accelerated(adapted()))
    patch("LlamaAttention", doubled)
    assert_same(model, adapted())
    assert told(model)["LlamaAttention"] == OVERTAKEN
    with pytest.raises(ValueError, match="segment_parents: .*another forward"):
        model.get_base_model().model.layers[0].self_attn(None, segment_parents=torch.zeros(1))


def test_another_rotary_embedding(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Liger puts its own into the model's file; attention stays ours."""
    own = modeling_llama.apply_rotary_pos_emb

    def doubled(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        q, k = own(*args, **kwargs)
        return q * 2, k

    model, before = used(accelerated(adapted())), values(adapted())["loss"]
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", doubled)
    assert_same(model, adapted())
    assert (values(model)["loss"] - before).abs() > 1e-5
    assert told(model)["LlamaAttention"][0] == "cpu"


def test_compiled_blocks() -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    config = LlamaConfig(**{**SIZES, "num_hidden_layers": 1})
    base = LlamaForCausalLM(config)
    plain = get_peft_model(base, LoraConfig(target_modules="all-linear", init_lora_weights=False)).train()
    ours = used(accelerated(copy.deepcopy(plain)))
    block = ours.get_base_model().model.layers
    block[0] = torch.compile(block[0], backend="aot_eager")
    expected = values(plain)
    found = {name.replace("_orig_mod.", ""): value for name, value in values(ours).items()}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= 1e-5 * max(1e-2, value.abs().max().item()), name
    torch.compiler.reset()
