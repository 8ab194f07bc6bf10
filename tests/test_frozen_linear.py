"""frozen_linear: y = x Wᵀ + b, every implementation by its name; its ways on a CPU are test_frozen_products.py's, its copies test_packed.py's."""

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from bounds import Compared, assert_within_bound_over_inputs, dense, double, gapped, gradients, make_layer, transposed
from torch import Tensor

from fastlora import ops
from fastlora.functional import frozen_linear
from fastlora.operators import frozen_linear as operator

OPERATOR = "frozen_linear"


class Case(NamedTuple):
    M: int
    K: int
    N: int
    dtype: torch.dtype = torch.float32
    bias: bool = True


CASES = {
    "no rows": Case(0, 65, 48),
    "one row": Case(1, 65, 48),
    "few rows, bfloat16": Case(7, 65, 48, torch.bfloat16),
    "one column": Case(5, 1, 1),
    "odd": Case(37, 65, 33, bias=False),
    "many": Case(130, 300, 201),
    "many, bfloat16": Case(130, 300, 201, torch.bfloat16),
    "many, float16": Case(130, 300, 201, torch.float16, bias=False),
}
LAYOUTS = {"dense": lambda tensor: tensor, "gaps": gapped, "transposed": transposed}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_bound(device: str, implementation: str, case: Case, layout: str) -> None:
    M, K, N, dtype, bias = case

    def compute() -> dict[str, Compared]:
        layer = make_layer(M, K, N, 1, dtype, bias=bias, device=device)
        x, weight, dy = (LAYOUTS[layout](one) for one in (layer.x, layer.weight, layer.dy))
        results = []
        for copied, function in ((lambda tensor: tensor, frozen_linear), (dense, F.linear), (double, F.linear)):
            given = copied(x.detach()).requires_grad_()
            y = function(given, copied(weight), copied(layer.bias))
            results.append([y.detach(), *gradients(y, [given], copied(dy))])
        return dict(zip(("y", "dx"), zip(*results, strict=True), strict=True))

    assert_within_bound_over_inputs(compute)


@pytest.mark.parametrize("shape", [(3,), (2, 3)], ids=str)
def test_no_features(device: str, implementation: str, shape: tuple[int, ...]) -> None:
    """K = 0: the bias alone, as nn.Linear gives it."""
    bias = torch.arange(4.0, device=device)
    y = frozen_linear(torch.ones(*shape, 0, device=device), torch.ones(4, 0, device=device), bias)
    assert torch.equal(y, bias.expand(*shape, 4))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_gradcheck(device: str, bias: bool) -> None:
    layer = make_layer(3, 9, 5, 1, torch.float64, bias=bias, device=device)
    assert torch.autograd.gradcheck(lambda x: frozen_linear(x, layer.weight, layer.bias), [layer.x])


def test_on_meta() -> None:
    """Shapes and dtypes without memory, the gradient too."""
    layer = make_layer(6, 16, 12, 1, torch.bfloat16, device="meta")
    y = frozen_linear(layer.x.view(2, 3, 16), layer.weight, layer.bias)
    assert y.is_meta and y.shape == (2, 3, 12) and y.dtype == torch.bfloat16
    (dx,) = gradients(y, [layer.x], layer.dy.view_as(y))
    assert dx.is_meta and dx.shape == layer.x.shape and dx.dtype == torch.bfloat16


def test_two_runs_are_equal(device: str, implementation: str) -> None:
    torch.use_deterministic_algorithms(False)  # the tests' own setting must not be what makes it so
    layer = make_layer(130, 96, 64, 1, device=device)

    def run() -> list[Tensor]:
        y = frozen_linear(layer.x, layer.weight, layer.bias)
        return [y, *gradients(y, [layer.x], layer.dy)]

    assert all(torch.equal(first, second) for first, second in zip(run(), run(), strict=True))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("x", {"x": [1.0]}),
        ("x", {"x": torch.ones(3, 8, dtype=torch.int64)}),
        ("weight", {"weight": torch.ones(8, 5)}),
        ("weight", {"weight": torch.ones(5, 8, requires_grad=True)}),
        ("bias", {"bias": torch.ones(4)}),
    ],
)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_wrong_argument_is_named(name: str, changes: dict[str, Any], autocast: bool) -> None:
    right = {"x": torch.ones(3, 8), "weight": torch.ones(5, 8), "bias": torch.ones(5)}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert frozen_linear(**right).shape == (3, 5)
        with pytest.raises((TypeError, ValueError), match=f"^{name}: .*expected"):
            frozen_linear(**{**right, **changes})


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_autocast(device: str, implementation: str, bias: bool) -> None:
    """As on tensors cast by hand, whatever dtypes they have; without it, all have one."""
    layer = make_layer(13, 24, 16, 1, bias=bias, device=device)
    weight = layer.weight.to(torch.float16)
    with torch.autocast(device, torch.bfloat16):
        y = frozen_linear(layer.x, weight, layer.bias)
    x = layer.x.detach().bfloat16().requires_grad_()
    expected = frozen_linear(x, weight.bfloat16(), None if layer.bias is None else layer.bias.bfloat16())
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)
    (got,), (wanted,) = (gradients(of, [leaf], layer.dy.bfloat16()) for of, leaf in ((y, layer.x), (expected, x)))
    assert got.dtype == torch.float32 and torch.equal(got, wanted.float())
    with pytest.raises(ValueError, match="^weight: .*x's dtype"):
        frozen_linear(layer.x, weight, layer.bias)


def test_without_gradients(device: str, implementation: str) -> None:
    layer = make_layer(13, 24, 16, 1, device=device)
    expected = frozen_linear(layer.x, layer.weight, layer.bias)
    assert expected.requires_grad and not frozen_linear(layer.x.detach(), layer.weight, layer.bias).requires_grad
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = frozen_linear(layer.x, layer.weight, layer.bias)
        assert not y.requires_grad and torch.equal(y, expected)


def test_opcheck(device: str) -> None:
    layer = make_layer(5, 16, 12, 1, device=device)
    torch.library.opcheck(torch.ops.fastlora.frozen_linear.default, (layer.x.detach(), layer.weight, layer.bias))
    torch.library.opcheck(torch.ops.fastlora.frozen_linear_backward.default, (layer.dy, layer.weight))


def test_the_backward_is_chosen_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an implementation has one of the two alone, the other is plain PyTorch's."""
    plain = {key: function for key, function in ops.implementations.items() if key[1] == "reference"}
    monkeypatch.setattr(ops, "forced", None)
    x = torch.ones(3, 3)
    for had, backward in (("frozen_linear", False), ("frozen_linear_backward", True)):
        monkeypatch.setattr(ops, "implementations", {**plain, (had, "cpu"): lambda *_: "ours"})
        runs = operator.run(x, x, None), operator.run_backward(x, x)
        assert [isinstance(one, str) for one in runs] == [not backward, backward]
        for forced in (None, "cpu"):
            monkeypatch.setattr(ops, "forced", forced)
            assert operator.choose(x, x, backward).implementation == "cpu"
        with pytest.raises(
            ops.ImplementationError, match="^FASTLORA_IMPL=cpu: frozen_linear.* cannot run: cpu has no "
        ):
            operator.choose(x, x, not backward)
        monkeypatch.setattr(ops, "forced", None)


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_cards_leave_it_to_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "forced", name)
    for backward in (False, True):
        assert operator.choose(torch.ones(2, 2), torch.ones(2, 2), backward) == ops.Choice("reference", "FASTLORA_IMPL")


def test_a_name_that_is_none_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "forced", "nonsense")
    with pytest.raises(ops.ImplementationError, match="FASTLORA_IMPL='nonsense': expected one of"):
        operator.choose(torch.ones(2, 2), torch.ones(2, 2))
