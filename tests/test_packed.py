"""frozen/packed.py: which weights have copies, within which budget, seen by no module, shared by threads and forked processes."""

import copy
import multiprocessing
import pickle
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from packed_weights import (  # noqa: F401  (a fixture)
    FLOATS,
    NEEDS_COPIES,
    Special,
    always_packed,
    check_now,
    eagerly_packed,
    frozen,
    held_bytes,
    layer_with_copies,
)
from torch import Tensor, nn

from fastlora.frozen import packed, products
from fastlora.frozen.packed import Budget
from fastlora.functional import frozen_linear

pytestmark = NEEDS_COPIES


@FLOATS
def test_copies_are_made_when_a_product_wants_them(dtype: torch.dtype) -> None:
    if not always_packed(dtype):
        pytest.skip("oneDNN does not multiply this dtype here")
    weight, budget = frozen(12, 16, dtype), Budget()
    size = 12 * 16 * (2 if dtype == torch.bfloat16 else 4)
    assert packed.register(weight, budget)
    assert held_bytes() == budget.held == 0
    assert products.describe(weight, dtype, 5) == "oneDNN, packed when first called"
    x = torch.randn(5, 16).to(dtype).requires_grad_()
    y = frozen_linear(x, weight, None)
    assert held_bytes() == budget.held == size
    assert products.describe(weight, dtype, 5) == "oneDNN, packed, 0.0 MiB"
    y.backward(torch.ones_like(y))
    assert held_bytes() == budget.held == 2 * size
    packed.release(weight)
    assert held_bytes() == budget.held == 0
    check_now(weight)
    assert held_bytes() == 0


def test_another_tensor_over_the_same_memory_finds_the_copy() -> None:
    weight, conv, budget = frozen(12, 16), frozen(16, 12), Budget()
    packed.register(weight, budget)
    packed.register(conv, budget)
    for other in (
        weight,
        weight.detach(),
        weight.data,
        weight.view(12, 16),
        weight.t().t(),
        conv.t(),
        conv.detach().t(),
    ):
        check_now(other)
        with torch.inference_mode():
            check_rows = frozen_linear(torch.ones(3, 16), other, None)
        assert torch.allclose(check_rows[0], other.sum(1), atol=1e-5)
    assert budget.held == 2 * weight.nbytes + 2 * conv.nbytes
    for part in (weight[:6], weight[:, :8]):  # another matrix at the same address
        check_now(part)
    check_now(conv)  # whose forward is the other's backward
    assert budget.held == 2 * weight.nbytes + 2 * conv.nbytes
    conv.data = torch.randn(16, 12)
    check_now(conv.t())
    assert budget.held == 2 * weight.nbytes + 2 * conv.nbytes


def test_budget_is_spent_in_the_order_of_use() -> None:
    weights, budget = [frozen(12, 16) for _ in range(3)], Budget(2 * 12 * 16 * 4)
    for weight in weights:
        packed.register(weight, budget)
    with torch.no_grad():
        for weight in reversed(weights):
            frozen_linear(torch.ones(5, 16), weight, None)
    assert held_bytes() == budget.limit
    told = [products.describe(weight, torch.float32, 2**20) for weight in weights]
    assert told == ["torch, 0.0 MiB does not fit the pack_budget", *["oneDNN, packed, 0.0 MiB"] * 2]
    for weight in weights:
        check_now(weight)
    packed.release(weights[2])
    check_now(weights[0])
    assert products.describe(weights[0], torch.float32, 5) == "oneDNN, packed, 0.0 MiB" and budget.held == budget.limit


def test_default_budget_is_a_share_of_the_machine() -> None:
    assert Budget().limit == Budget().limit > 2**20


@pytest.mark.parametrize("limit", [-1, 1.5, "1"])
def test_wrong_budget(limit: object) -> None:
    with pytest.raises(ValueError, match="pack_budget: .*expected"):
        Budget(limit)


def test_what_cannot_have_a_copy_is_left_out() -> None:
    with torch.inference_mode():
        inferred = torch.randn(12, 16)
    others = [
        nn.Parameter(torch.randn(12, 16)),
        nn.Parameter(torch.randn(12, 16, device="meta"), requires_grad=False),
        Special(torch.randn(12, 16), requires_grad=False),
        frozen(12, 16, torch.float64),
        torch.randint(5, (12, 16)),
        torch.randn(12),
        torch.randn(12, 16).to_sparse(),
        torch.randn(12, 16).to_mkldnn(),
        inferred,
    ]
    for weight in others:
        assert not packed.register(weight, Budget())
    weight = frozen(12, 16)
    assert not packed.register(weight, Budget(0))
    assert not packed._by_key


def test_what_can_have_a_copy_no_more_is_released() -> None:
    weight, budget = frozen(12, 16), Budget()
    packed.register(weight, budget)
    check_now(weight)
    assert not packed.register(weight, Budget(0))
    assert budget.held == 0 and not packed._by_key


def test_parameters_over_one_memory_count_in_the_last_ones_budget() -> None:
    weight, first, last = frozen(12, 16), Budget(), Budget()
    twin, stranger = nn.Parameter(weight.data, requires_grad=False), weight.detach()
    packed.register(weight, first)
    check_now(weight)
    packed.register(twin, last)
    assert first.held == 0
    check_now(weight)
    assert first.held == 0 and last.held == 2 * weight.nbytes
    assert packed.release(stranger) is None
    assert last.held == 2 * weight.nbytes
    assert packed.release(weight) is last and last.held == 0
    check_now(weight)
    assert last.held == 2 * weight.nbytes, "the twin is registered still"


def test_a_weight_that_was_parametrised_leaves_its_budget() -> None:
    budget = Budget()
    layer = layer_with_copies(budget)
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", nn.ReLU())
    packed.attach(layer, Budget())
    assert budget.held == 0


def test_a_weight_released_while_a_copy_is_made() -> None:
    """By another thread: nobody would give the copy's bytes back."""
    weight, budget = frozen(12, 16), Budget()
    packed.register(weight, budget)
    found = packed.find(weight)
    packed.release(weight)
    assert found.pack(weight) is None and budget.held == 0


def test_a_weight_that_dies_while_another_thread_uses_what_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was released before: there is nothing to forget."""
    errors: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda error: errors.append(error.exc_value))
    weight = frozen(12, 16)
    packed.register(weight, Budget())
    found = packed.find(weight)
    packed.release(weight)
    del weight
    assert found.storage() is None and not errors


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap, torch.func.functionalize])
def test_what_a_transform_wraps_is_no_place(transform: Callable[..., Any]) -> None:
    """Of class Tensor, but without memory of its own: nothing is found, and nothing is lost."""
    layer, budget = layer_with_copies(Budget()), Budget()

    def see(weight: Tensor) -> Tensor:
        assert not packed.register(weight.detach(), budget) and packed.release(weight) is None
        assert packed.find(weight) is None and weight not in packed.Places([layer.weight, weight])
        packed.drop(weight)
        trained = weight.detach().clone()
        trained.grad = torch.zeros_like(trained)
        torch.optim.SGD([trained]).step()
        return weight.sum()

    transform(see)(layer.weight.detach()[None] if transform is torch.func.vmap else layer.weight.detach())
    assert held_bytes() == 2 * layer.weight.nbytes


def test_a_freed_storage_is_no_place() -> None:
    """As sharding leaves parameters between uses: all without memory, none mistaken for another."""
    budget, weights = Budget(), [frozen(12, 16) for _ in range(2)]
    values = [weight.clone() for weight in weights]
    for weight in weights:
        packed.register(weight, budget)
        check_now(weight)
        weight.untyped_storage().resize_(0)
        told = "torch, the fastest without a packed copy"
        assert products.describe(weight, weight.dtype, 5) == told  # and nothing is read
    assert held_bytes() == 0
    for weight, value in zip(weights, values, strict=True):
        weight.untyped_storage().resize_(value.nbytes)
        weight.copy_(value)
        check_now(weight)
    assert budget.held == 4 * weights[0].nbytes


@FLOATS
def test_a_storage_that_was_cut_is_no_place(dtype: torch.dtype) -> None:
    """By its last element, after which nothing is read beyond its end."""
    last = 3 + 11 * 40 + 15 * 2
    memory, budget = torch.randn(last + 1).to(dtype), Budget()
    weight = nn.Parameter(memory.as_strided((12, 16), (40, 2), 3), requires_grad=False)
    packed.register(weight, budget)
    if always_packed(dtype):
        check_now(weight)
        assert budget.held == 2 * packed.copy_bytes(weight)
    found = packed.find(weight)
    assert found is packed.find(weight.t()) and (found is not None) == always_packed(dtype)
    memory.untyped_storage().resize_(last * dtype.itemsize)
    assert packed.find(weight) is None and budget.held == 0


def test_copies_of_a_layer_know_nothing_of_packed_weights() -> None:
    budget = Budget()
    layer = layer_with_copies(budget)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.__dict__.keys() == nn.Linear(1, 1).__dict__.keys()
        other.weight.mul_(2)
        check_now(other.weight)
        check_now(layer.weight)
    assert list(layer.state_dict()) == ["weight"] and budget.held == 2 * layer.weight.nbytes


def test_threads_share_copies() -> None:
    """Many products at once, first uses among them: each copy is made once, and a writer in between is seen."""
    weights, budget, x = [frozen(64, 48) for _ in range(8)], Budget(), torch.randn(5, 48)
    for weight in weights:
        packed.register(weight, budget)

    def work(_: int) -> bool:
        with torch.no_grad():
            return all(torch.allclose(frozen_linear(x, w, None), F.linear(x, w), atol=1e-5) for w in weights)

    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            assert all(pool.map(work, range(16)))
            assert budget.held == held_bytes() == sum(weight.nbytes for weight in weights)
            for weight in weights:
                weight.mul_(-1)


class Products(torch.utils.data.Dataset):
    """Item i: whether a product in this process is right, with the weight multiplied by i first."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> bool:
        self.weight.mul_(i)
        x = torch.ones(3, self.weight.shape[1])
        return torch.allclose(frozen_linear(x, self.weight, None)[0], self.weight.sum(1), atol=1e-4)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="processes do not fork here")
def test_forked_workers() -> None:
    budget = Budget()
    layer = layer_with_copies(budget)
    loader = torch.utils.data.DataLoader(Products(layer.weight), num_workers=2, multiprocessing_context="fork")
    assert [bool(right) for right in loader] == [True] * 4
    check_now(layer.weight)
    assert budget.held == 2 * layer.weight.nbytes


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="processes do not fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
def test_a_process_that_begins_while_a_copy_is_made() -> None:
    """Another thread holds the lock just then, and no thread but the one that forks goes on in the child."""
    held = threading.Event()

    def hold() -> None:
        with packed._lock:
            held.set()
            time.sleep(0.2)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    child = multiprocessing.get_context("fork").Process(
        target=lambda: sys.exit(0 if packed._lock.acquire(timeout=5) else 1)
    )
    child.start()
    holder.join()
    child.join()
    assert child.exitcode == 0
    assert packed._lock.acquire(timeout=5)
    packed._lock.release()
