"""What torch can ask of an operator beside a backward: a second derivative, forward mode, torch.func. Never a wrong answer: the operators' functions
refuse, and a model's layers run PEFT's own forward where that is known beforehand."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from packed_weights import NEEDS_COPIES
from peft_models import IDS, peft_model
from torch import Tensor, nn
from torch.autograd import forward_ad

import fastlora
from fastlora import functional
from fastlora.frozen import packed

TWICE = "fastlora: .*cannot be differentiated twice .*fastlora.restore"
TRANSFORMED = "fastlora: a transform of torch.func is at work .*fastlora.restore"
FORWARD_MODE = "fastlora: forward-mode differentiation is on.*fastlora.restore"

M, K, N, R = 4, 6, 5, 2
weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0))


def _lora_linear(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return functional.lora_linear(x, weight, None, a, b, 0.5)


def _shared(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    one, other = functional.lora_linear_shared(x, [weight] * 2, [None] * 2, [a, a * 2], [b, b], [0.5, 1.0])
    return one + other


def _multi_lora(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return functional.multi_lora(x, weight, None, [a, a * 2], [b, b], [0.5, 1.0], torch.arange(M) % 3 - 1)


def _multi_lora_shared(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    adapters = [[a, a * 2], [a * 3, a]], [[b, b], [b, b]], [[0.5, 1.0]] * 2
    one, other = functional.multi_lora_shared(x, [weight] * 2, [None] * 2, *adapters, torch.arange(M) % 3 - 1)
    return one * other.detach()


def _frozen_linear(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return functional.frozen_linear(x, weight, None)


def _prefix_concat(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return functional.prefix_concat(a[None], x[None], torch.ones(1, M)).embeds


def _cross_entropy(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return functional.linear_cross_entropy(x, weight, None, torch.arange(M))


def _rms_norm(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return functional.rms_norm(x, weight[0], 1e-6)


def _lora_cross_entropy(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return functional.lora_cross_entropy(x, x[:, :R], weight, None, weight[:, :R], torch.arange(M))


def _scale_columns(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return functional.scale_columns(x, x[0], None)


def _swiglu(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return functional.swiglu(x, weight[:M])


def _rotary(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    cos, sin = (one.expand(1, M, K) for one in weight[:2])
    return functional.rotary(x[None, None], x[None, None], cos, sin)[0][0, 0]


def _attention(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return functional.attention(x[:, None], x[:, None], weight[:M, None], torch.tensor([0, M]))[:, 0]


WITHOUT_ADAPTER = [_cross_entropy, _lora_cross_entropy, _rms_norm, _scale_columns, _swiglu, _attention]
LINEAR = [_frozen_linear, _prefix_concat, _rotary]  # in x: dx does not depend on x, nor on anything that is trained
FUNCTIONS = [_lora_linear, _shared, _multi_lora, _multi_lora_shared, *WITHOUT_ADAPTER, *LINEAR]
Function = Callable[[Tensor, Tensor, Tensor], Tensor]


def leaves() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(M, K).requires_grad_(), torch.randn(R, K).requires_grad_(), torch.randn(N, R).requires_grad_()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_second_derivative_is_refused(function: Function) -> None:
    """By every way to it: where the loss is not linear, and where it is and the gradient depends on A, B or x alone."""
    x, a, b = leaves()
    (dx,) = torch.autograd.grad(function(x, a, b).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=TWICE):
        dx.square().sum().backward()
    (dx,) = torch.autograd.grad(function(x, a, b).sum(), x, create_graph=True)
    if function in LINEAR:
        assert not dx.requires_grad
        return
    with pytest.raises(NotImplementedError, match=TWICE):
        dx.square().sum().backward()
    y = function(x, a, b).sum()
    (dx,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(NotImplementedError, match=TWICE):
        torch.autograd.grad(y + dx.square().sum(), [x] if function in WITHOUT_ADAPTER else [a, b], allow_unused=True)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_graph_of_the_backward_that_nobody_uses_changes_nothing(function: Function) -> None:
    inputs = leaves()
    found, expected = (
        torch.autograd.grad(function(*inputs).square().sum(), inputs, allow_unused=True, create_graph=graph)
        for graph in (True, False)
    )
    for one, other in zip(found, expected, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_transforms_are_refused(function: Function) -> None:
    x, a, b = (leaf.detach() for leaf in leaves())
    for transform in (
        lambda: torch.func.grad(lambda x: function(x, a, b).sum())(x),
        lambda: torch.func.jvp(lambda x: function(x, a, b), (x,), (x,)),
        lambda: torch.func.vmap(lambda x: function(x, a, b))(x[None]),
    ):
        with pytest.raises(NotImplementedError, match=TRANSFORMED):
            transform()


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_tangent_is_refused(function: Function, gradients: bool) -> None:
    """Without gradients an operator would drop it; what carries none is computed."""
    x, a, b = (leaf.detach() for leaf in leaves())
    expected = function(x, a, b)
    with forward_ad.dual_level(), torch.set_grad_enabled(gradients):
        assert torch.equal(function(x, a, b), expected)
        with pytest.raises(NotImplementedError, match=FORWARD_MODE):
            function(forward_ad.make_dual(x, torch.ones_like(x)), a, b)


def accelerated_and_plain(**options: Any) -> tuple[Any, Any]:
    plain, accelerated = (peft_model(**options)[0] for _ in range(2))
    for model in (plain, accelerated):
        model.base_model.model.set_attn_implementation("eager")  # torch's own attention has no forward mode
    return fastlora.accelerate(accelerated, frozen=True), plain


def test_a_gradient_penalty_on_a_model_is_refused() -> None:
    model, _ = accelerated_and_plain()
    embeds = torch.randn(1, 3, 32, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(inputs_embeds=embeds).logits.sum(), embeds, create_graph=True)
    with pytest.raises(NotImplementedError, match=TWICE):
        gradient.square().sum().backward()
    fastlora.restore(model)
    (gradient,) = torch.autograd.grad(model(inputs_embeds=embeds).logits.sum(), embeds, create_graph=True)
    gradient.square().sum().backward()


@pytest.mark.parametrize("copies", [False, pytest.param(True, marks=NEEDS_COPIES)], ids=["", "copies"])
def test_torch_func_on_an_accelerated_model_is_pefts(copies: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """functional_call with a gradient, jvp over all parameters, and vmap over layers; where weights may have copies, too."""
    gc.collect()  # an earlier test's model may have copies for as long as it is there
    monkeypatch.setattr(packed, "packs", lambda dtype: copies)
    ours, plain = accelerated_and_plain()
    assert bool(packed._by_key) == copies

    def results(model: Any) -> list[Tensor]:
        def loss(parameters: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(model, parameters, (), {"input_ids": IDS}).logits.square().mean()

        parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
        tangents = {name: torch.ones_like(value) for name, value in parameters.items()}
        gradients = torch.func.grad(loss)(parameters)
        layer, head = model.base_model.model.model.layers[0].self_attn.q_proj, model.base_model.model.lm_head
        x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(1))
        mapped = [torch.func.vmap(module)(x) for module in (layer, head)]
        with torch.no_grad(), forward_ad.dual_level():
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            duals = [forward_ad.unpack_dual(module(dual)).tangent for module in (layer, head)]
        trained = {name: value.clone().requires_grad_() for name, value in parameters.items() if "lora_" in name}
        by_backward = torch.autograd.grad(loss({**parameters, **trained}), list(trained.values()))
        return [
            *gradients.values(),
            *torch.func.jvp(loss, (parameters,), (tangents,)),
            *mapped,
            *duals,
            *by_backward,
        ]

    for found, expected in zip(results(ours), results(plain), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        ours(input_ids=IDS)
    assert all("earlier also " in layer.reason for layer in fastlora.report(ours))


def test_jacobians_by_many_backwards_at_once_are_right() -> None:
    """vmap over the backward alone, which is an operator without a rule for it: torch calls it row by row."""
    torch.manual_seed(0)
    layer = fastlora.LoRALinear(K, N, r=R, lora_dropout=0.0)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(2, K)
    jacobian = torch.autograd.functional.jacobian
    torch.testing.assert_close(jacobian(layer, x, vectorize=True), jacobian(layer, x))


@pytest.mark.parametrize("mixed", [False, True])
def test_a_layer_whose_result_is_not_used_gets_no_gradient(mixed: bool) -> None:
    """None and not zeros, which an optimizer with weight decay or momentum would act on; as if the layers had run alone."""
    (x, *_), (_, a, b), (_, unused_a, unused_b) = leaves(), leaves(), leaves()
    index = torch.arange(M) % 2
    if mixed:
        adapters = [[unused_a, unused_a], [a, a]], [[unused_b, unused_b], [b, b]], [[0.5, 1.0]] * 2
        _, y = functional.multi_lora_shared(x, [weight] * 2, [None] * 2, *adapters, index)
        alone = functional.multi_lora(x, weight, None, [a, a], [b, b], [0.5, 1.0], index)
    else:
        _, y = functional.lora_linear_shared(x, [weight] * 2, [None] * 2, [unused_a, a], [unused_b, b], [0.5, 1.0])
        alone = functional.lora_linear(x, weight, None, a, b, 1.0)
    inputs = [x, a, b, unused_a, unused_b]
    *found, no_a, no_b = torch.autograd.grad(y.square().sum(), inputs, allow_unused=True)
    assert no_a is None and no_b is None
    for one, other in zip(found, torch.autograd.grad(alone.square().sum(), inputs[:3]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
