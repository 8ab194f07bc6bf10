"""LoRA on embeddings, call by call: each obstacle by itself, in which order they are told, and what a call leaves on the layer."""

import copy

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn

import fastlora
from fastlora import reference
from fastlora.peft import FusedLinear, embeddings
from fastlora.peft.layers import OWN_FORWARD, SEEN
from fastlora.swap import is_derived

IDS = torch.arange(20).view(4, 5) % 9


def lone(dtype=torch.float32):
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["0", "1"], init_lora_weights=False)
    model = get_peft_model(nn.Sequential(nn.Embedding(9, 6, dtype=dtype), nn.Linear(6, 4, dtype=dtype)), config)
    return model, model.base_model.model[0], model.base_model.model[1]


class OwnParameter(nn.Parameter):
    pass


def with_weight(value):
    def change(layer):
        layer.base_layer.weight = nn.Parameter(value(layer.base_layer.weight.detach()), requires_grad=False)

    return change


def with_adapter(value, *names):
    def change(layer):
        for name in names:
            adapters = getattr(layer, f"lora_embedding_{name}")
            adapters["default"] = value(adapters["default"].detach())

    return change


def with_function(name):
    def change(layer):
        getattr(layer, name)["default"] = lambda *given: given[-1]

    return change


OBSTACLES = {
    "float8": (with_weight(lambda w: w.to(torch.float8_e4m3fn)), "the weight is float8_e4m3fn"),
    "clipped": (lambda layer: setattr(layer.base_layer, "max_norm", 1.0), "max_norm, sparse or scale_grad_by_freq"),
    "input sharded": (with_function("input_fns"), "adapter 'default' is sharded"),
    "output sharded": (with_function("output_fns"), "adapter 'default' is sharded"),
    "A of a class": (with_adapter(OwnParameter, "A"), "adapter 'default' is "),
    "B of a class": (with_adapter(OwnParameter, "B"), "adapter 'default' is "),
    "A of a dtype": (
        with_adapter(lambda a: nn.Parameter(a.bfloat16()), "A"),
        "is bfloat16 [2, 9] on cpu and float32 [6, 2] on cpu",
    ),
    "adapter narrower": (with_adapter(lambda a: nn.Parameter(a.bfloat16()), "A", "B"), "and the weight float32 [9, 6]"),
    "adapter elsewhere": (
        with_adapter(lambda a: nn.Parameter(a.to("meta")), "A", "B"),
        "and the weight float32 [9, 6]",
    ),
}


@pytest.mark.parametrize("kind", OBSTACLES)
def test_what_stands_in_the_way_of_a_call_and_of_the_swap(kind):
    change, words = OBSTACLES[kind]
    _, layer, _ = lone()
    assert embeddings.swap_obstacle(layer) is None and isinstance(embeddings.lasting_plan(layer), embeddings.Plan)
    change(layer)
    for found in (embeddings.lasting_plan(layer), embeddings.swap_obstacle(layer)):
        assert isinstance(found, str) and words in found
    embeddings.attach(layer)
    assert not is_derived(layer)


def test_one_adapter_that_can_be_added_is_enough_for_the_swap_and_not_for_a_call():
    model, layer, _ = lone()
    model.add_adapter("other", LoraConfig(r=3, target_modules=["0"], init_lora_weights=False))
    with_function("input_fns")(layer)
    assert embeddings.swap_obstacle(layer) is None
    model.base_model.set_adapter(["default", "other"])
    assert embeddings.lasting_plan(layer) == "adapter 'default' is sharded"
    model.base_model.set_adapter("other")
    assert [a.shape for a, _, _ in embeddings.lasting_plan(layer).adapters] == [(3, 9)]
    layer.input_fns["other"] = layer.input_fns["default"]
    assert embeddings.swap_obstacle(layer) == "adapter 'default' is sharded"


def test_a_layer_without_adapters_is_swapped_and_one_of_another_class_is_not():
    model, layer, linear = lone()
    fastlora.accelerate(model)
    assert type(linear) is FusedLinear
    embeddings.detach(linear)
    assert type(linear) is FusedLinear
    fastlora.restore(model)
    model.delete_adapter("default")
    assert embeddings.swap_obstacle(layer) is None
    assert embeddings.swap_obstacle(linear) == "peft.tuners.lora.layer.Linear is not fused"
    embeddings.attach(linear)
    assert not is_derived(linear)


def test_layers_of_other_methods_are_not_restored_here():
    model = get_peft_model(nn.Sequential(nn.Linear(6, 4)), IA3Config(target_modules=["0"], feedforward_modules=[]))
    fastlora.accelerate(model)
    layer = model.base_model.model[0]
    embeddings.detach(layer)
    assert is_derived(layer)


def test_active_names_that_the_layer_has_not_are_passed_by():
    model, layer, _ = lone()
    fastlora.accelerate(model)
    layer._active_adapter = ["elsewhere"]
    assert embeddings.lasting_plan(layer) == "no adapter is active"
    assert torch.equal(layer(IDS), layer.base_layer(IDS))
    layer._active_adapter = ["elsewhere", "default"]
    assert len(embeddings.lasting_plan(layer).adapters) == 1


def test_what_lasts_is_told_before_what_passes():
    model, layer, _ = lone()
    fastlora.accelerate(model)
    assert embeddings.describe(layer)[1] == "not called yet, unless compiled"
    with torch.autocast("cpu", torch.bfloat16):
        layer(IDS)
    assert layer.__dict__[OWN_FORWARD].passing
    assert embeddings.describe(layer)[1] == "PEFT's own forward: autocast is on"
    layer(IDS)
    words = "of an embedding: the adapter is added by one product, in plain PyTorch"
    assert embeddings.describe(layer)[1] == f"20 rows {words}"
    layer(IDS[0, :1])
    assert embeddings.describe(layer)[1] == f"1 row {words}"
    with model.disable_adapter(), torch.autocast("cpu", torch.bfloat16):
        layer(IDS)
        assert not layer.__dict__[OWN_FORWARD].passing
        assert embeddings.describe(layer)[1] == "PEFT's own forward: adapters are disabled"
    fastlora.restore(model)
    assert not {SEEN, OWN_FORWARD} & set(layer.__dict__)


def test_more_arguments_are_pefts():
    model, layer, _ = lone()
    peer = copy.deepcopy(layer)
    fastlora.accelerate(model)
    for one in (peer, layer):
        with pytest.raises(TypeError):
            one(IDS, 1)
    assert torch.equal(layer(IDS, adapter_names=["default"] * 4), peer(IDS, adapter_names=["default"] * 4))
    assert "the call has arguments besides x" in embeddings.describe(layer)[1]
    layer(IDS, adapter_names=None)
    assert "by one product" in embeddings.describe(layer)[1]


def test_rows_are_widened_where_a_sum_is_rounded_more_than_once(monkeypatch):
    model, layer, _ = lone(torch.bfloat16)
    fastlora.accelerate(model)
    add, dtypes = reference.lora_embedding, []

    def noted(rows, *rest):
        dtypes.append(rows.dtype)
        return add(rows, *rest)

    monkeypatch.setattr(reference, "lora_embedding", noted)
    layer(IDS)
    assert dtypes == [torch.bfloat16]
    model.add_adapter("other", LoraConfig(r=3, target_modules=["0"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    layer(IDS)
    assert dtypes[1:] == [torch.float32] * 2
