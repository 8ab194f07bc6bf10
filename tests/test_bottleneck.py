"""Bottleneck adapters: unchanged at first, the equations' numbers and gradients, PEFT's files, and what is refused."""

import copy
import json
import re
import warnings
from functools import partial
from pathlib import Path
from typing import Any, get_args

import peft
import peft_models
import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional

import fastlora
from fastlora import adapters, merge, trainable
from fastlora.adapters import AdapterError
from fastlora.bottleneck import NON_LINEARITIES, PARALLEL_SCALING, BottleneckConfig, BottleneckLayer
from fastlora.config import NonLinearity, TrainConfig
from fastlora.fusion import is_derived
from fastlora.peft import FrozenLinear

BOTH = pytest.mark.parametrize("is_parallel", [False, True])
NAMES = {
    ("llama", False): ["self_attn", "mlp"],
    ("llama", True): ["mlp"],
    ("gpt2", False): ["attn", "mlp"],
    ("gpt2", True): ["mlp"],
    ("t5", False): ["SelfAttention", "EncDecAttention", "DenseReluDense"],
    ("t5", True): ["DenseReluDense"],
    ("bert", False): ["output.dense"],
}


def adapted(make: str = "llama", dtype: torch.dtype = torch.float32, begun: bool = False, **options: Any) -> Any:
    """A PeftModel with adapters, of random numbers unless they are as they began; and what it is given besides its tokens."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base, labels, _ = getattr(peft_models, make)()
        model = peft.get_peft_model(base.to(dtype), BottleneckConfig(**{"reduction_factor": 4, **options}))
    for parameter in model.parameters():
        if parameter.requires_grad and not begun:
            nn.init.normal_(parameter.data, std=0.2)
    return model.eval(), labels


def logits(model: Any, labels: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(input_ids=peft_models.IDS, **labels).logits


@pytest.mark.parametrize(("make", "is_parallel"), NAMES)
def test_sublayers_are_found_and_nothing_changes_at_first(make: str, is_parallel: bool) -> None:
    model, labels = adapted(make, begun=True, is_parallel=is_parallel)
    assert model.peft_config["default"].target_modules == NAMES[make, is_parallel]
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all(".bottleneck_" in name for name in trained)
    begun = logits(model, labels)
    with model.disable_adapter():
        assert torch.equal(logits(model, labels), begun)
    for name, parameter in model.named_parameters():
        if name in trained:
            nn.init.normal_(parameter.data, std=0.2)
    changed = logits(model, labels)
    assert not torch.allclose(changed, begun, atol=1e-3)
    model(input_ids=peft_models.IDS, **labels).loss.backward()
    assert all(bool(p.grad.count_nonzero()) for p in model.parameters() if p.requires_grad)
    assert torch.equal(logits(model.unload(), labels), begun)


class Sublayer(nn.Module):
    """Something with an output of two, as attention has."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6).double()

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:
        return torch.sin(self.inner(hidden_states)), None


def formula(layer: Any, x: Tensor, f: Any, scaling: float, is_parallel: bool, parts: dict[str, Tensor]) -> Tensor:
    y, _ = layer.base_layer(x)
    h = x if is_parallel else y
    inner = f(h @ parts["down.weight"].T + parts["down.bias"])
    return y + scaling * (inner @ parts["up.weight"].T + parts["up.bias"])


@BOTH
@pytest.mark.parametrize("non_linearity", NON_LINEARITIES)
@pytest.mark.parametrize("scaling", [None, 0.7])
def test_it_is_the_equation_in_float64(is_parallel: bool, non_linearity: str, scaling: float | None) -> None:
    torch.manual_seed(0)
    config = BottleneckConfig(reduction_factor=2, non_linearity=non_linearity, is_parallel=is_parallel, scaling=scaling)
    layer = BottleneckLayer(Sublayer(), "default", config, 6).double()
    layer.base_layer.requires_grad_(False)
    parts = {name.replace("bottleneck_", "").replace("default.", ""): p for name, p in layer.named_parameters()}
    parts = {name: p for name, p in parts.items() if p.requires_grad}
    assert [*parts] == ["down.weight", "down.bias", "up.weight", "up.bias"]
    for parameter in parts.values():
        nn.init.normal_(parameter.data)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    f = {"relu": torch.relu, "gelu": functional.gelu, "swish": lambda v: v * v.sigmoid(), "tanh": torch.tanh}
    default = PARALLEL_SCALING if is_parallel else 1.0
    expected = formula(layer, x, f[non_linearity], default if scaling is None else scaling, is_parallel, parts)
    for found, rest in (layer(x), layer(hidden_states=x)):
        assert rest is None
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)
    weights = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weights).sum(), [x, *parts.values()])
    got = torch.autograd.grad((layer(x)[0] * weights).sum(), [x, *parts.values()])
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x)[0], (x, *parts.values()))


@BOTH
def test_several_active_adapters_add_up_and_switching_is_pefts(is_parallel: bool) -> None:
    model, labels = adapted(is_parallel=is_parallel)
    first = logits(model, labels)
    model.add_adapter("other", BottleneckConfig(reduction_factor=2, non_linearity="relu", is_parallel=is_parallel))
    assert torch.equal(logits(model, labels), first)
    layer = next(module for module in model.modules() if isinstance(module, BottleneckLayer))
    x = torch.randn(2, 5, 32)
    plain: Any = nn.Identity()  # in the sublayer's place: x is what is given, and what comes out
    layer.base_layer = plain
    nn.init.normal_(layer.bottleneck_up["other"].weight)
    with torch.no_grad():
        alone = {}
        for name in ("default", "other"):
            layer.set_adapter([name])
            alone[name] = layer(x) - x
            assert all(p.requires_grad == (f".{name}." in key) for key, p in layer.named_parameters())
        layer.set_adapter(["default", "other"])
        torch.testing.assert_close(layer(x), x + alone["default"] + alone["other"])
        layer.set_adapter([])
        assert torch.equal(layer(x), x)
    layer.delete_adapter("other")
    assert "other" not in layer.bottleneck_up and "other" not in layer.configs


@BOTH
@pytest.mark.parametrize("options", [{}, {"loss": True}], ids=["logits", "loss"])
def test_what_stands_around_it_is_accelerated(is_parallel: bool, options: dict[str, Any]) -> None:
    model, labels = adapted(is_parallel=is_parallel)
    peer = copy.deepcopy(model).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastlora.accelerate(model.train(), frozen=True, fuse=True, **options)
    kinds = [type(module) for module in model.modules()]
    assert sum(kind is FrozenLinear for kind in kinds) == 15  # of two blocks, and the head
    assert sum(is_derived(module) for module in model.modules()) >= 9  # norms, MLPs, attentions
    for one in (model, peer):
        one(input_ids=peft_models.IDS, **labels).loss.backward()
    theirs = dict(peer.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-3, atol=1e-6)
    told = [entry for entry in fastlora.report(model) if "bottleneck" in entry.reason]
    assert len(told) == (2 if is_parallel else 4) and {entry.implementation for entry in told} == {"reference"}
    fastlora.restore(model)
    assert not any(type(module) is FrozenLinear or is_derived(module) for module in model.modules())
    assert torch.equal(logits(model.eval(), labels), logits(peer.eval(), labels))


def test_checkpointing_has_the_same_gradients() -> None:
    model, labels = adapted()
    peer = copy.deepcopy(model)
    model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for one in (model, peer.train()):
        one(input_ids=peft_models.IDS, **labels).loss.backward()
    theirs = dict(peer.named_parameters())
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(torch.equal(grad, theirs[name].grad) for name, grad in trained.items())


@BOTH
def test_a_bfloat16_base_has_float32_adapters_and_rounds_once(is_parallel: bool) -> None:
    model, labels = adapted(dtype=torch.bfloat16, is_parallel=is_parallel)
    layer = next(module for module in model.modules() if isinstance(module, BottleneckLayer))
    assert layer.bottleneck_down["default"].weight.dtype is torch.float32
    seen: dict[str, Tensor] = {}
    layer.base_layer.register_forward_hook(
        lambda _, args, kwargs, y: seen.update(x=args[0] if args else kwargs["hidden_states"], y=y), with_kwargs=True
    )
    layer.register_forward_hook(lambda _, args, out: seen.update(out=out))
    logits(model, labels)
    y, out = (one[0] if isinstance(one, tuple) else one for one in (seen["y"], seen["out"]))
    h = (seen["x"] if is_parallel else y).float()
    part = layer.bottleneck_up["default"](functional.silu(layer.bottleneck_down["default"](h)))
    assert out.dtype is torch.bfloat16
    assert torch.equal(out, (y + (PARALLEL_SCALING * part if is_parallel else part)).bfloat16())


def test_rows_with_adapters_of_their_own_are_refused() -> None:
    model, labels = adapted()
    fastlora.accelerate(model, frozen=True)
    with pytest.raises(
        ValueError, match="adapter_names: PEFT ignores them with BOTTLENECK, and .* is a BottleneckLayer"
    ):
        model(input_ids=peft_models.IDS, adapter_names=["default"] * 3)
    assert torch.isfinite(logits(model, labels)).all()


@BOTH
def test_files_are_pefts_and_are_checked(is_parallel: bool, tmp_path: Path) -> None:
    model, labels = adapted(is_parallel=is_parallel, scaling=0.5)
    model.save_pretrained(str(tmp_path))
    expected, base = logits(model, labels), model.unload()
    plain = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
    assert torch.equal(logits(plain, labels), expected)
    read = adapters.read(tmp_path)
    two = adapters.load(copy.deepcopy(base), {"one": read, "two": read})
    for name in ("one", "two"):
        two.set_adapter(name)
        assert torch.equal(logits(two.eval(), labels), expected)
    assert not any(parameter.requires_grad for parameter in adapters.load(base, {"a": read}).parameters())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("reduction_factor", 0, "reduction_factor: expected a number from 1 to 65,536, got 0"),
        ("reduction_factor", 8, "was it trained on another base"),
        ("scaling", 1e39, "scaling: expected a number that float32 holds"),
        ("non_linearity", "sine", "non_linearity='sine': expected one of relu, gelu, swish, tanh"),
        ("is_parallel", 1, "is_parallel: expected bool, got 1"),
        ("target_modules", ["mlp"], "keys that are none of this adapter's on this model"),
        ("target_modules", ["q_proj", "k_proj"], "k_proj is a Linear of 32 to 16 features, expected the model's width"),
        ("target_modules", ["rotary_emb"], "rotary_emb is a LlamaRotaryEmbedding, which has no weights"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(key: str, value: Any, message: str, tmp_path: Path) -> None:
    model, _ = adapted()
    model.save_pretrained(str(tmp_path))
    base = model.unload()
    path = tmp_path / adapters.CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    before = {name: parameter.clone() for name, parameter in base.named_parameters()}
    with pytest.raises(AdapterError, match=re.escape(message)):
        adapters.load(base, {"default": adapters.read(tmp_path)})
    assert all(torch.equal(parameter, before[name]) for name, parameter in base.named_parameters())
    assert not any(isinstance(module, BottleneckLayer) for module in base.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction_factor": 0}, "reduction_factor=0: expected at least 1"),
        ({"non_linearity": "sine"}, "non_linearity='sine': expected one of relu"),
        ({"scaling": float("nan")}, "scaling=nan: expected a finite number"),
    ],
)
def test_an_option_out_of_range_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        BottleneckConfig(**options)


def test_a_model_of_unknown_names_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^target_modules: BertForSeq.* has no MLP of a name.*attention.*output"):
        adapted("bert", is_parallel=True)
    plain: Any = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"^target_modules: Sequential has no attention, or no MLP,"):
        peft.get_peft_model(plain, BottleneckConfig())


def test_a_sublayer_of_another_width_is_refused() -> None:
    layer = BottleneckLayer(Sublayer(), "default", BottleneckConfig(), 8)
    with pytest.raises(ValueError, match=r"^a Sublayer gives \[2, 6\], expected a tensor \[\.\.\., 8\]"):
        layer(torch.zeros(2, 6, dtype=torch.float64))
    layer = BottleneckLayer(Sublayer(), "default", BottleneckConfig(is_parallel=True), 8)
    with pytest.raises(ValueError, match=r"^a Sublayer is given \[2, 6\], expected"):
        layer(torch.zeros(2, 6, dtype=torch.float64))
    layer.base_layer.forward = partial(lambda **_: torch.zeros(2, 8))
    with pytest.raises(ValueError, match=r"^a Sublayer is given NoneType"):
        layer(other=torch.zeros(2, 8))


def test_it_cannot_be_merged(tmp_path: Path) -> None:
    model, _ = adapted()
    for call in (model.merge_and_unload, model.merge_adapter, lambda: merge.fold(model)):
        with pytest.raises(TypeError, match="^a bottleneck adapter cannot be merged"):
            call()
    layer = next(module for module in model.modules() if isinstance(module, BottleneckLayer))
    with pytest.raises(TypeError, match="^a bottleneck adapter cannot be merged"):
        layer.merge()
    base, _, _ = peft_models.llama()
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(TypeError, match="^adapter: a soft prompt cannot be merged"):
        merge.fold(peft.get_peft_model(base, prompt))


def test_the_command_lines_names_are_the_tables() -> None:
    assert get_args(NonLinearity) == (*NON_LINEARITIES,)


def test_target_modules_of_a_training(tmp_path: Path) -> None:
    base = tiny.save_model(tmp_path / "base")
    device = torch.device("cpu")

    def built(**options: Any) -> Any:
        config = TrainConfig(model=base, data="d", output="o", method="adapter", **options)
        return trainable.build(config, torch.float32, device, None)

    names = {name.rpartition(".")[2] for name, one in built().named_modules() if isinstance(one, BottleneckLayer)}
    assert names == {"self_attn", "mlp"}
    found = built(target_modules=["o_proj"], reduction_factor=16, is_parallel=True, accelerate=False)
    layers = [one for one in found.modules() if isinstance(one, BottleneckLayer)]
    assert len(layers) == 2 and all(one.bottleneck_down["default"].weight.shape == (2, 32) for one in layers)
    with pytest.raises(ValueError, match=r"^target_modules=\['k_proj'\]: .*k_proj is a Linear of 32 to 16 features"):
        built(target_modules=["k_proj"])
