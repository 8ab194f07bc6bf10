"""Frozen weights with packed copies of every dtype that oneDNN multiplies, in whatever products: what the tests of fastlora/frozen share."""

import gc
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from bounds import Compared, assert_within_bound_over_inputs, dense, double, gradients
from torch import Tensor, nn

from fastlora import ops, reference
from fastlora.choice import table
from fastlora.frozen import packed, products
from fastlora.frozen.packed import Budget
from fastlora.functional import frozen_linear

FLOATS = pytest.mark.parametrize("dtype", ops.KERNEL_DTYPES, ids=["float32", "bfloat16", "float16"])
NEEDS_COPIES = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or packed._fingerprint is None,
    reason="weights have copies only where torch has oneDNN and the extension is built",
)
few_rows, packs_here, suits_here = products._few_rows, packed.packs, packed.suits_onednn


def always_packed(dtype: torch.dtype) -> bool:
    """Copies of float32, too: sums as short as these are within the bound."""
    return dtype is torch.float32 or packs_here(dtype)


@pytest.fixture(autouse=True)
def eagerly_packed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(packed, "packs", always_packed)
    monkeypatch.setattr(packed, "suits_onednn", lambda dtype: dtype is torch.float32 or suits_here(dtype))
    monkeypatch.setattr(table, "forced_way", "packed")
    monkeypatch.setattr(products, "_few_rows", None)  # with an adapter it has no copies
    yield
    if packed._by_key:
        gc.collect()
    assert not packed._by_key, "a weight outlived its test"


def frozen(N: int, K: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter((torch.randn(N, K) / K**0.5).to(dtype), requires_grad=False)


def check(draw: Callable[[], Tensor], weight: Tensor, bias: Tensor | None = None) -> None:
    """Both products are within the bound, with whatever copies there are, over the x that are drawn."""
    assert_within_bound_over_inputs(lambda: beside_eager(draw(), weight, bias))


def beside_eager(x: Tensor, weight: Tensor, bias: Tensor | None) -> dict[str, Compared]:
    x = x.detach().requires_grad_()
    dy = torch.randn(x.shape[0], weight.shape[0]).to(x.dtype)
    alone = dense(x)
    y, eager = frozen_linear(x, weight, bias), F.linear(alone, dense(weight), dense(bias))
    exact = reference.frozen_linear(double(x), double(weight), double(bias))
    (dx,), (eager_dx,) = gradients(y, [x], dy), gradients(eager, [alone], dy)
    exact_dx = reference.frozen_linear_backward(double(dy), double(weight))
    return {"y": (y.detach(), eager.detach(), exact), "dx": (dx, eager_dx, exact_dx)}


def check_now(weight: Tensor) -> None:
    check(lambda: torch.randn(5, weight.shape[1]).to(weight.dtype), weight)


def layer_with_copies(budget: Budget) -> nn.Linear:
    layer = nn.Linear(16, 12, bias=False).requires_grad_(False)
    packed.attach(layer, budget)
    check_now(layer.weight)
    assert budget.held == 2 * layer.weight.nbytes
    return layer


def held_bytes() -> int:
    """The bytes in copies, once every registered weight was looked at as before a product."""
    for registered in list(packed._by_key.values()):
        storage, (_, offset, *matrix, dtype) = registered.storage(), registered.key
        if packed._holds(storage, registered.key):
            packed.find(torch.empty(0, dtype=dtype).set_(storage, offset, matrix[:2], matrix[2:]))
    return sum(registered.bytes for registered in packed._by_key.values())


class Special(nn.Parameter):
    """A class of tensors that nobody here knows."""


def unseen_element(weight: Tensor) -> int:
    """The number of an element in the first half of the first row that the fingerprint does not read."""
    seen = packed._fingerprint(weight)
    for i in range(weight.shape[1] // 2):
        other = weight.detach().clone()
        other[0, i] += 1
        if packed._fingerprint(other) == seen:
            return i
    raise AssertionError("it reads every element")
