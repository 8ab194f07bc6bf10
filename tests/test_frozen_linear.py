"""frozen_linear: y = x Wᵀ + b, every implementation by its name; its ways on a CPU are test_frozen_products.py's, its copies test_packed.py's."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from bounds import INPUTS, assert_within_bound_over_inputs, dense, double, gapped, gradients, make_layer, transposed
from torch import Tensor

from fastlora.functional import frozen_linear

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
    runs = []
    for _ in range(INPUTS):
        layer = make_layer(M, K, N, 1, dtype, bias=bias, device=device)
        x, weight, dy = (LAYOUTS[layout](one) for one in (layer.x, layer.weight, layer.dy))
        results = []
        for copied, function in ((lambda tensor: tensor, frozen_linear), (dense, F.linear), (double, F.linear)):
            given = copied(x.detach()).requires_grad_()
            y = function(given, copied(weight), copied(layer.bias))
            results.append([y.detach(), *gradients(y, [given], copied(dy))])
        runs.append(zip(*results, strict=True))
    for name, *found in zip(("y", "dx"), *runs, strict=True):
        assert_within_bound_over_inputs(name, found)


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
