"""peft/layers.py, one call with adapters by row: names from a context or from PEFT, what is asked of them, and what a layer has that has none."""

from typing import Any

import peft
import pytest
import torch
from peft.tuners import lora
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora.peft import FusedLinear, known, mixed
from fastlora.peft.layers import SEEN, fused_class
from fastlora.peft.mixed import RowNames

K, N = 8, 6
X = torch.linspace(-1, 1, 3 * K).view(3, K)
NAMES = ["default", "__base__", "other"]


def layer_of(**options: Any) -> Any:
    """A swapped layer with the adapters `default` and, of these options, `other`, in eval mode."""
    torch.manual_seed(0)
    given = {"r": 2, "target_modules": ["0"], "init_lora_weights": False}
    model = peft.get_peft_model(nn.Sequential(nn.Linear(K, N)), peft.LoraConfig(**given))
    model.add_adapter("other", peft.LoraConfig(**given, **options))
    layer = fastlora.accelerate(model).base_model.model[0].eval()
    assert type(layer) is FusedLinear
    return layer


def alone(layer: Any, name: str, x: torch.Tensor) -> torch.Tensor:
    if name == "__base__":
        return layer.base_layer(x)
    before = layer.active_adapters
    layer.set_adapter(name)
    y = layer(x)
    layer.set_adapter(before)
    return y


def test_a_layer_asks_for_no_names_where_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, asked = layer_of(), []
    names_of = mixed.names_of
    monkeypatch.setattr(mixed, "names_of", lambda one: asked.append(one) or names_of(one))
    layer(X)
    assert asked == []
    with mixed._handing_out({layer: tuple(NAMES)}):
        y = layer(X)
    assert asked == [layer] and layer.__dict__[SEEN].mixed
    torch.testing.assert_close(y, torch.stack([alone(layer, name, X[i]) for i, name in enumerate(NAMES)]))


def test_pefts_own_forward_gets_the_names_of_a_context(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, given = layer_of(), []
    monkeypatch.setattr(lora.Linear, "forward", lambda self, x, **kwargs: given.append(kwargs))
    with mixed._handing_out({layer: tuple(NAMES)}):
        layer(X, more=1)
    assert given == [{"more": 1, "adapter_names": tuple(NAMES)}]


def test_names_that_come_again_in_a_backward_are_enough() -> None:
    layer = layer_of()
    x = X.clone().requires_grad_()
    y = checkpoint(lambda one: layer(one, adapter_names=NAMES), x, use_reentrant=False)
    y.sum().backward()
    found, x.grad = x.grad, None
    layer(x, adapter_names=NAMES).sum().backward()
    assert torch.equal(found, x.grad)


def test_names_that_do_not_come_again_in_a_backward_are_missed() -> None:
    layer, calls = layer_of(), []

    def forward(one: torch.Tensor) -> torch.Tensor:
        calls.append(one)
        return layer(one, **({"adapter_names": NAMES} if len(calls) == 1 else {}))

    y = checkpoint(forward, X.clone().requires_grad_(), use_reentrant=False)
    with pytest.raises(RuntimeError, match="without the names that it was given"):
        y.sum().backward()


def test_pefts_check_is_asked_of_a_list_of_another_length_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of()
    with pytest.raises(ValueError, match="Length of `adapter_names` should be the same"):
        layer(X, adapter_names=NAMES[:2])
    monkeypatch.setattr(FusedLinear, "_check_forward_args", None)
    layer(X)
    layer(X, adapter_names=NAMES)
    with mixed._handing_out({layer: RowNames(["other", "default"], [2, 1])}):  # two examples, of three tokens in all
        y = layer(X[None])
    expected = torch.cat([alone(layer, "other", X[:2]), alone(layer, "default", X[2:])])
    torch.testing.assert_close(y[0], expected)


def test_a_layer_without_a_batchs_adapters_gives_its_base() -> None:
    layer = layer_of()
    for x in (X, X[:, None].expand(-1, 2, -1), X[:2]):  # of whatever shape
        with mixed._handing_out({layer: RowNames(["elsewhere", "__base__"], [2, 1])}):
            assert torch.equal(layer(x), layer.base_layer(x))


def test_what_cannot_run_a_batch_of_several_adapters_says_why() -> None:
    layer = layer_of()
    with mixed._handing_out({layer: RowNames(["default", "other"], [2, 1])}):
        with pytest.raises(
            ValueError, match="several adapters: x is float32 .4, 8. on cpu, and the names are of another"
        ):
            layer(X.new_zeros(4, K))
        with pytest.raises(ValueError, match="a batch of several adapters: the call has arguments besides x"):
            layer(X, 1)
        layer.merge(adapter_names=["default"])
        with pytest.raises(ValueError, match="a batch of several adapters: the adapter is merged"):
            layer(X)


def test_a_dora_among_the_names_is_not_left_to_peft_which_would_run_it_as_plain() -> None:
    layer = layer_of(use_dora=True)
    with pytest.raises(ValueError, match="adapter 'other' is a DoRA, and the call has arguments besides x"):
        layer(X, None, adapter_names=NAMES)
    with pytest.raises(TypeError):
        layer(X, None, adapter_names=["default"] * 3)  # by PEFT, whose layer has no more arguments
    layer.set_adapter("other")
    with pytest.raises(TypeError):
        layer(X, None)  # of a DoRA in all rows it knows
    y = layer(X, adapter_names=NAMES)
    torch.testing.assert_close(y[2], alone(layer, "other", X)[2])


@pytest.mark.parametrize("change", ["merge", "update_layer"])
def test_what_changes_a_weight_is_forgotten_at_once(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, forgotten = layer_of(), []
    monkeypatch.setattr(known, "forget", lambda one, *more: forgotten.append(one))
    if change == "merge":
        layer.merge()
        assert forgotten == [layer]
        layer.unmerge()
        assert forgotten == [layer] * 2
    else:
        layer.update_layer("third", 2, 2, config=peft.LoraConfig(r=2))
        assert forgotten == [layer]


def test_a_class_of_its_own_stays() -> None:
    class Own(lora.Linear):
        pass

    assert fused_class(lora.Linear) is FusedLinear
    assert fused_class(Own) is not FusedLinear and issubclass(fused_class(Own), Own)
