"""frozen_linear and packed.py: products within the bound by every way, and copies that are never stale, seen by no module, and given back."""

import copy
import ctypes
import functools
import gc
import multiprocessing
import operator
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from bounds import (
    INPUTS,
    assert_within_bound,
    assert_within_bound_over_inputs,
    dense,
    double,
    gapped,
    gradients,
    transposed,
)
from conftest import implementations
from peft import LoraConfig, get_peft_model
from test_peft import assert_as_near_as, llama, logits, peft_model, q_proj, run
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import fastlora
from fastlora import ops, reference
from fastlora.choice import table
from fastlora.frozen import packed, products
from fastlora.frozen.packed import Budget
from fastlora.functional import frozen_linear
from fastlora.peft import FrozenLinear, FusedLinear

OPERATOR = "frozen_linear"
FLOATS = pytest.mark.parametrize("dtype", ops.KERNEL_DTYPES, ids=["float32", "bfloat16", "float16"])

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or packed._fingerprint is None,
    reason="weights have copies only where torch has oneDNN and the extension is built",
)
NATIVE = pytest.mark.skipif("cpu" not in implementations("lora_linear", "cpu"), reason="the extension is not built")

few_rows, product, packs_here = products._few_rows, products._product, packed.packs


def always_packed(dtype: torch.dtype) -> bool:
    """Copies of float32, too: its products are large enough at any size."""
    return dtype is torch.float32 or packs_here(dtype)


def large(dtype: torch.dtype, rows: int, work: int) -> bool:
    """A rule by which a large product is oneDNN's without a copy, too."""
    return work >= 2**23 and always_packed(dtype)


@pytest.fixture(autouse=True)
def eagerly_packed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(packed, "packs", always_packed)
    monkeypatch.setattr(products, "_takes_plain", large)
    monkeypatch.setattr(table, "forced_way", "packed")
    monkeypatch.setattr(products, "_few_rows", None)  # the native products have no copies
    monkeypatch.setattr(products, "_product", None)
    yield
    if packed._by_key:
        gc.collect()
    assert not packed._by_key, "a weight outlived its test"


def frozen(N: int, K: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter((torch.randn(N, K) / K**0.5).to(dtype), requires_grad=False)


def check(x: Tensor, weight: Tensor, bias: Tensor | None = None, more: Sequence[Tensor] = ()) -> None:
    """Both products are within the bound, with whatever copies there are. more: further x, over which errors are taken, too."""
    forward, backward = zip(*(beside_eager(one, weight, bias) for one in (x, *more)), strict=True)
    assert_within_bound_over_inputs("y", forward)
    assert_within_bound_over_inputs("dx", backward)


def beside_eager(x: Tensor, weight: Tensor, bias: Tensor | None) -> list[tuple[Tensor, Tensor, Tensor]]:
    """y, and dx: each with eager's and the exact one."""
    x = x.detach().requires_grad_()
    dy = torch.randn(x.shape[0], weight.shape[0]).to(x.dtype)
    alone = dense(x)
    y, eager = frozen_linear(x, weight, bias), F.linear(alone, dense(weight), dense(bias))
    exact = reference.frozen_linear(double(x), double(weight), double(bias))
    (dx,), (eager_dx,) = gradients(y, [x], dy), gradients(eager, [alone], dy)
    exact_dx = reference.frozen_linear_backward(double(dy), double(weight))
    return [(y.detach(), eager.detach(), exact), (dx, eager_dx, exact_dx)]


def check_now(weight: Tensor) -> None:
    check(torch.randn(5, weight.shape[1]).to(weight.dtype), weight)


# Products


def by_native_product(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(products, "_product", product)
    patch.setattr(products, "LEAST_PRODUCT", 1)
    patch.setattr(products, "LEAST_PRODUCT_COLUMNS", 1)


def by_plain_onednn(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(table, "forced_way", "plain")
    patch.setattr(products, "_takes_plain", lambda dtype, rows, work: always_packed(dtype))


WAYS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "torch": lambda patch: patch.setattr(packed, "packs", lambda dtype: False),
    "plain": by_plain_onednn,
    "packed": lambda patch: None,
    "few rows": lambda patch: patch.setattr(products, "_few_rows", few_rows),
    "native": by_native_product,
}
EACH_WAY = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


@EACH_WAY
@FLOATS
def test_bound(way: Callable[[pytest.MonkeyPatch], None], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    way(monkeypatch)
    shapes = [(37, 65, 48), (8, 33, 65), (1, 64, 48), (1, 1, 1), (0, 12, 7), (5, 0, 7), (5, 12, 0), (130, 300, 201)]
    for number, (M, K, N) in enumerate(shapes):
        weight = nn.Parameter((torch.randn(N, K) / max(K, 1) ** 0.5).to(dtype), requires_grad=False)
        packed.register(weight, Budget())
        x, *more = (torch.randn(M, K).to(dtype) for _ in range(INPUTS))
        check(x, weight, None if number % 2 else torch.randn(N).to(dtype), more)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "gaps": gapped,
    "transposed": transposed,
    "every other": lambda tensor: tensor.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2],
    "expanded": lambda tensor: tensor[:1, :1].expand_as(tensor),
    "one row, expanded": lambda tensor: tensor[:1].expand_as(tensor),
}


@EACH_WAY
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(
    way: Callable[[pytest.MonkeyPatch], None], layout: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    way(monkeypatch)
    for dtype in ops.KERNEL_DTYPES:
        x, weight = torch.randn(7, 33).to(dtype), (torch.randn(24, 33) / 6).to(dtype)
        for left, right in ((layout(x), weight), (x, layout(weight)), (layout(x), layout(weight))):
            packed.register(right, Budget())
            check(left, right, torch.randn(48).to(dtype)[::2])


def test_dy_of_any_layout() -> None:
    weight = frozen(24, 33)
    packed.register(weight, Budget())
    for dy in (torch.ones(()).expand(7, 24), transposed(torch.randn(7, 24)), gapped(torch.randn(7, 24))):
        x = torch.randn(7, 33, requires_grad=True)
        (dx,) = gradients(frozen_linear(x, weight, None), [x], dy)
        assert_within_bound("dx", dx, dense(dy) @ weight, double(dy) @ double(weight))


def test_the_ways_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the other tests take for granted: each way is taken."""
    calls = []

    def multiply(x: Tensor, weight: Tensor, *rest: object) -> Tensor:
        calls.append("packed" if weight.is_mkldnn else "plain")
        return onednn(x, weight, *rest)

    onednn = products._linear_pointwise
    monkeypatch.setattr(products, "_linear_pointwise", multiply)
    weight, x = frozen(24, 33), torch.randn(7, 33)
    packed.register(weight, Budget())
    taken = {}
    for name, way in WAYS.items():
        with monkeypatch.context() as patch:
            way(patch)
            calls.clear()
            frozen_linear(x, weight, None)
            taken[name] = calls.copy()
    assert taken == {
        "torch": [],
        "plain": ["plain"],
        "packed": ["packed"],
        "few rows": ["packed"] if few_rows is None else [],
        "native": ["packed"] if product is None else [],
    }
    with torch.backends.mkldnn.flags(enabled=False):
        calls.clear()
        check(x, weight)
        assert not calls and products.describe(weight, torch.float32, 7) == "torch"


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (2, 0), (2, 1, 3)], ids=str)
def test_leading_dimensions(device: str, implementation: str, shape: tuple[int, ...]) -> None:
    weight, bias = frozen(12, 20).to(device), torch.randn(12, device=device)
    x = torch.randn(*shape, 20, device=device, requires_grad=True)
    y = frozen_linear(x, weight, bias)
    assert y.shape == (*shape, 12) and torch.allclose(y, F.linear(x, weight, bias), atol=1e-5)
    assert gradients(y, [x], torch.ones_like(y))[0].shape == x.shape


def test_float64_is_the_references() -> None:
    weight, bias = frozen(5, 9, torch.float64), torch.randn(5, dtype=torch.float64)
    x = torch.randn(3, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: frozen_linear(x, weight, bias), (x,))


@FLOATS
def test_opcheck(dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(5, 16).to(dtype), torch.randn(12, 16).to(dtype), torch.randn(12).to(dtype)
    torch.library.opcheck(torch.ops.fastlora.frozen_linear.default, (x, weight, bias))
    torch.library.opcheck(torch.ops.fastlora.frozen_linear_backward.default, (torch.randn(5, 12).to(dtype), weight))


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_autocast(base: torch.dtype) -> None:
    weight, bias, x = frozen(12, 16, base), torch.randn(12).to(base), torch.randn(2, 5, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, eager = frozen_linear(x, weight, bias), F.linear(x, weight, bias)
    assert y.dtype == eager.dtype == torch.bfloat16 and torch.allclose(y, eager, atol=0.02)
    (dx,), (eager_dx,) = (gradients(out, [x], torch.ones_like(out)) for out in (y, eager))
    assert dx.dtype == eager_dx.dtype and torch.allclose(dx, eager_dx, atol=0.05)


@EACH_WAY
def test_the_operator_itself_ignores_autocast(
    way: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is called past the dispatcher, whatever is on around it."""
    way(monkeypatch)
    x, weight = torch.randn(5, 16), torch.randn(12, 16)
    with torch.no_grad():
        expected = products.frozen_linear(x, weight, None)
        with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
            assert torch.equal(products.frozen_linear(x, weight, None), expected)
            assert products.frozen_linear_backward(expected, weight).dtype == torch.float32


def test_nothing_of_x_is_kept() -> None:
    kept: list[Tensor] = []
    weight = frozen(12, 16)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        frozen_linear(torch.randn(5, 16, requires_grad=True), weight, None)
    assert [tensor.data_ptr() for tensor in kept] == [weight.data_ptr()]


def test_compiles_whole() -> None:
    torch.compiler.reset()
    weight, bias = frozen(12, 24), torch.randn(12)
    packed.register(weight, Budget())
    compiled = torch.compile(frozen_linear, fullgraph=True, backend="aot_eager", dynamic=True)
    for M in (6, 11):
        x, dy = torch.randn(M, 24, requires_grad=True), torch.randn(M, 12)
        y, expected = (function(x, weight, bias) for function in (compiled, frozen_linear))
        assert torch.equal(y, expected)
        assert torch.equal(*(gradients(out, [x], dy)[0] for out in (y, expected)))
    assert packed.held_bytes() == 2 * weight.nbytes
    torch.compiler.reset()


X, WEIGHT, BIAS = torch.ones(6, 16), torch.ones(12, 16), torch.ones(12)


@pytest.mark.parametrize(
    ("name", "error", "arguments"),
    [
        ("x", TypeError, (None, WEIGHT, BIAS)),
        ("x", ValueError, (torch.ones(()), WEIGHT, BIAS)),
        ("x", ValueError, (X.int(), WEIGHT, BIAS)),
        ("weight", TypeError, (X, None, BIAS)),
        ("weight", ValueError, (X, WEIGHT.T, BIAS)),
        ("weight", ValueError, (X, WEIGHT.bfloat16(), BIAS)),
        ("weight", ValueError, (X, WEIGHT.to("meta"), BIAS)),
        ("weight", ValueError, (X, nn.Parameter(WEIGHT), BIAS)),
        ("bias", ValueError, (X, WEIGHT, torch.ones(11))),
        ("bias", ValueError, (X, WEIGHT, BIAS.bfloat16())),
        ("bias", ValueError, (X, WEIGHT, nn.Parameter(BIAS))),
    ],
)
def test_wrong_arguments(name: str, error: type[Exception], arguments: tuple) -> None:
    with pytest.raises(error, match=rf"^{name}: .*expected"):
        frozen_linear(*arguments)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("x", (torch.ones(16), WEIGHT, BIAS)),
        ("x", (torch.ones(6, 15), WEIGHT, BIAS)),
        ("weight", (X.bfloat16(), WEIGHT, BIAS.bfloat16())),
        ("bias", (X, WEIGHT, torch.ones(13))),
        ("bias", (X, WEIGHT, BIAS.half())),
        ("dy", (torch.ones(6, 16), WEIGHT)),
        ("weight", (torch.ones(6, 12).half(), WEIGHT)),
    ],
)
def test_wrong_arguments_to_the_operators_themselves(name: str, arguments: tuple) -> None:
    op = products.frozen_linear if len(arguments) == 3 else products.frozen_linear_backward
    with pytest.raises(ValueError, match=rf"^{name}: .*expected"):
        op(*arguments)


# Copies


@FLOATS
def test_copies_are_made_when_a_product_wants_them(dtype: torch.dtype) -> None:
    if not always_packed(dtype):
        pytest.skip("oneDNN does not multiply this dtype here")
    weight, budget = frozen(12, 16, dtype), Budget()
    size = 12 * 16 * (2 if dtype == torch.bfloat16 else 4)
    packed.register(weight, budget)
    assert packed.held_bytes() == budget.held == 0
    assert products.describe(weight, dtype, 5) == "oneDNN, packed when first called"
    x = torch.randn(5, 16).to(dtype).requires_grad_()
    y = frozen_linear(x, weight, None)
    assert packed.held_bytes() == budget.held == size
    assert products.describe(weight, dtype, 5) == "oneDNN, packed, 0.0 MiB"
    y.backward(torch.ones_like(y))
    assert packed.held_bytes() == budget.held == 2 * size
    packed.release(weight)
    assert packed.held_bytes() == budget.held == 0
    check_now(weight)
    assert packed.held_bytes() == 0


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
    assert packed.held_bytes() == budget.limit
    told = [products.describe(weight, torch.float32, 2**20) for weight in weights]
    assert told == ["oneDNN, 0.0 MiB does not fit the pack_budget", *["oneDNN, packed, 0.0 MiB"] * 2]
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


def layer_with_copies(budget: Budget) -> nn.Linear:
    layer = nn.Linear(16, 12, bias=False).requires_grad_(False)
    packed.attach(layer, budget)
    check_now(layer.weight)
    assert budget.held == 2 * layer.weight.nbytes
    return layer


def merge_through_data(layer: nn.Linear) -> None:
    with packed.rewriting(layer):
        layer.weight.data += 1


def write_in_inference_mode(layer: nn.Linear) -> None:
    with torch.inference_mode():
        layer.weight.mul_(2)


def train(make: Callable[..., torch.optim.Optimizer], one_element: bool = False) -> Callable[[nn.Linear], None]:
    def step(layer: nn.Linear) -> None:
        layer.weight.requires_grad_()
        layer.weight.grad = torch.zeros_like(layer.weight)
        layer.weight.grad[7 if one_element else slice(None), 3 if one_element else slice(None)] = 1.0
        make([layer.weight], lr=0.5).step()
        layer.weight.grad = None
        layer.weight.requires_grad_(False)

    return step


def fused(make: type[torch.optim.Optimizer], **options: object) -> Callable[..., torch.optim.Optimizer]:
    return functools.partial(make, fused=True, **options)


def average(layer: nn.Linear) -> None:
    """As an exponential moving average is kept, and put into the model."""
    mean = torch.optim.swa_utils.AveragedModel(layer, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    other = copy.deepcopy(layer)
    other.weight.data.mul_(3)
    mean.update_parameters(other)
    layer.weight.data = layer.weight.data  # the same memory
    torch._foreach_copy_([layer.weight.data], [mean.module.weight.data + other.weight.data])


def write_by_ctypes(layer: nn.Linear) -> None:
    memory = (ctypes.c_float * layer.weight.numel()).from_address(layer.weight.data_ptr())
    memory[:] = [2 * value for value in memory]


def empty_and_fill(layer: nn.Linear) -> None:
    storage, values = layer.weight.untyped_storage(), layer.weight.tolist()
    storage.resize_(0)
    storage.resize_(4 * layer.weight.numel())
    layer.weight.data.copy_(torch.tensor(values)).neg_()


def write_by_another_process(layer: nn.Linear) -> None:
    """The weight is shared from before its copies were made."""
    writer = multiprocessing.get_context("fork").Process(target=lambda: layer.weight.data.mul_(2))
    writer.start()
    writer.join()
    assert writer.exitcode == 0


CHANGES: dict[str, Callable[[nn.Linear], object]] = {
    "written to": lambda layer: layer.weight.mul_(2),
    "written to through detach": lambda layer: layer.weight.detach().mul_(2),
    "written to in inference mode": write_in_inference_mode,
    "written to through .data": merge_through_data,
    "loaded": lambda layer: layer.load_state_dict({"weight": torch.randn(12, 16)}),
    "assigned": lambda layer: layer.load_state_dict({"weight": torch.randn(12, 16)}, assign=True),
    "other data": lambda layer: setattr(layer.weight, "data", torch.randn(12, 16)),
    "other data of another shape": lambda layer: setattr(layer.weight, "data", torch.randn(10, 16)),
    "to bfloat16": lambda layer: layer.bfloat16(),
    "to float64 and back": lambda layer: layer.double().float(),
    "to float16": lambda layer: layer.half(),
    "shared": lambda layer: layer.share_memory(),
    "averaged": average,
    "written to by numpy": lambda layer: operator.imul(layer.weight.numpy(), 2),
    "written to through dlpack": lambda layer: torch.from_dlpack(layer.weight.data).mul_(2),
    "written to by ctypes": write_by_ctypes,
    "storage copied": lambda layer: layer.weight.untyped_storage().copy_(torch.randn(12, 16).untyped_storage()),
    "storage filled": lambda layer: layer.weight.untyped_storage().fill_(1),
    "emptied and filled": empty_and_fill,
    "trained by SGD": train(torch.optim.SGD),
    "trained by fused SGD": train(fused(torch.optim.SGD)),
    "trained by fused Adam": train(fused(torch.optim.Adam)),
    "trained by fused AdamW": train(fused(torch.optim.AdamW, weight_decay=0.1)),
    "trained by fused Adagrad": train(fused(torch.optim.Adagrad)),
    "one element trained by fused SGD": train(fused(torch.optim.SGD), one_element=True),
    "swapped": lambda layer: torch.utils.swap_tensors(layer.weight, frozen(12, 16)),
    "replaced": lambda layer: setattr(layer, "weight", frozen(12, 16)),
    "deleted": lambda layer: setattr(layer, "weight", None),
}
MOVED = {
    "assigned",
    "other data",
    "other data of another shape",
    "to bfloat16",
    "to float64 and back",
    "to float16",
    "swapped",
    "replaced",
    "deleted",
}
"""The weight is in other memory afterwards, which nobody has registered: `accelerate`'s layers do."""


@pytest.mark.parametrize("change", CHANGES)
def test_never_stale(change: str) -> None:
    """After any change of the weight: the old copies' bytes are back, and products are those of the weight as it is now."""
    budget = Budget()
    layer = layer_with_copies(budget)
    CHANGES[change](layer)
    assert packed.held_bytes() == budget.held == 0
    if layer.weight is not None:
        check_now(layer.weight)
        check_now(layer.weight)
    assert budget.held == packed.held_bytes()
    if change not in MOVED:
        assert budget.held == 2 * layer.weight.nbytes, "not packed anew"


class Special(nn.Parameter):
    """A class of tensors that nobody here knows."""


TRAINED: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda weight: weight,
    "flat": lambda weight: nn.Parameter(weight.data.view(-1), requires_grad=False),
    "part": lambda weight: nn.Parameter(weight.data[:, :40], requires_grad=False),
    "special": lambda weight: Special(weight.data, requires_grad=False),
}
"""What an optimiser may have, over the memory of a weight [96, 80]."""


@pytest.mark.parametrize("whose", TRAINED)
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_any_weight_that_was_trained_has_no_copy(make: type[torch.optim.Optimizer], whose: str) -> None:
    """Of a large one a fingerprint sees but some elements, and a fused step may change few; others' copies stay."""
    budget, weight, other = Budget(), frozen(96, 80), frozen(12, 16)
    for one in (weight, other):
        packed.register(one, budget)
        check_now(one)
    trained = TRAINED[whose](weight)
    seen = packed._fingerprint(weight)
    untouched = unseen_element(weight)
    before = weight.view(-1)[untouched].item()
    trained.requires_grad_()
    trained.grad = torch.zeros_like(trained)
    trained.grad.view(-1)[untouched] = 100.0
    make([trained, nn.parameter.UninitializedParameter()], lr=1.0, weight_decay=0, fused=True).step()
    trained.requires_grad_(False)
    assert packed._fingerprint(weight) == seen, "the step must be one that only the optimiser's hook can tell"
    assert weight.view(-1)[untouched].item() != before
    assert budget.held == 2 * other.nbytes
    check_now(weight)


def unseen_element(weight: Tensor) -> int:
    """The number of an element in the first half of the first row that the fingerprint does not read."""
    seen = packed._fingerprint(weight)
    for i in range(weight.shape[1] // 2):
        other = weight.detach().clone()
        other[0, i] += 1
        if packed._fingerprint(other) == seen:
            return i
    raise AssertionError("it reads every element")


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="processes do not fork here")
def test_shared_memory_that_another_process_writes_to() -> None:
    layer, budget = nn.Linear(16, 12, bias=False).requires_grad_(False).share_memory(), Budget()
    packed.register(layer.weight, budget)
    check_now(layer.weight)
    before = layer.weight.clone()
    write_by_another_process(layer)
    assert torch.equal(layer.weight, 2 * before) and packed.held_bytes() == 0
    check_now(layer.weight)


def test_a_compiled_optimizer() -> None:
    """The hook is no obstacle to compiling a step, and the step is seen."""
    torch.compiler.reset()
    layer, budget = layer_with_copies(Budget()), Budget()
    packed.register(layer.weight, budget)
    check_now(layer.weight)
    layer.weight.requires_grad_()
    layer.weight.grad = torch.ones_like(layer.weight)
    torch.compile(torch.optim.SGD([layer.weight], lr=0.1).step, backend="eager")()
    layer.weight.requires_grad_(False)
    check_now(layer.weight)
    del layer
    torch.compiler.reset()


FINGERPRINTED = {
    "one": (1, 1),
    "small": (12, 16),
    "as many as are read": (16, 16),
    "a few more": (19, 14),
    "a row": (1, 5000),
    "a column": (5000, 1),
    "narrow": (3000, 7),
    "large": (640, 512),
}


@FLOATS
@pytest.mark.parametrize("layout", [lambda tensor: tensor, transposed, gapped], ids=["dense", "transposed", "gaps"])
@pytest.mark.parametrize("shape", FINGERPRINTED.values(), ids=FINGERPRINTED)
def test_fingerprint(shape: tuple[int, int], layout: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    """It sees every write to a whole weight, to any eighth of its rows, to any eighth of its columns, and to any element of a small one."""
    weight = layout(torch.randn(shape).to(dtype))
    first = packed._fingerprint(weight)
    assert packed._fingerprint(weight.t()) == first == packed._fingerprint(weight.detach())
    parts = [weight, *weight.chunk(8, 0), *weight.chunk(8, 1)]
    if weight.numel() <= 256:
        parts += [weight[n : n + 1, k : k + 1] for n in range(shape[0]) for k in range(shape[1])]
    for part in parts:
        before = part.clone()
        part.data.mul_(2)
        assert packed._fingerprint(weight) != first
        part.data.copy_(before)
        assert packed._fingerprint(weight) == first
    if weight.numel() > 256:
        weight.data.copy_(weight.roll(1, 1) if shape[1] > 1 else weight.roll(1, 0))
        assert packed._fingerprint(weight) != first, "values that only change their places"


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(3), "weight: .*expected shape"),
        (torch.ones(3, 3, dtype=torch.float64), "weight: .*expected"),
        (torch.ones(3, 3, device="meta"), "Meta tensors"),
    ],
)
def test_fingerprint_of_a_wrong_argument(weight: Tensor, message: str) -> None:
    with pytest.raises((RuntimeError, NotImplementedError), match=message):
        torch.ops.fastlora.fingerprint_cpu(weight)


def test_a_weight_made_in_inference_mode_has_no_copy() -> None:
    """Its version does not show when it is written to."""
    budget = Budget()
    layer = layer_with_copies(budget)
    with torch.inference_mode():
        layer.double().float()
        for _ in range(2):
            y = frozen_linear(torch.ones(3, 16), layer.weight, None)
            assert torch.allclose(y[0], layer.weight.sum(1), atol=1e-5) and budget.held == 0
            layer.weight.mul_(2)


def test_reused_memory() -> None:
    """A parameter that dies, and another one in the very same place; the copies live as long as the memory."""
    memory, budget = torch.randn(12, 16), Budget()
    weight = nn.Parameter(memory, requires_grad=False)
    packed.register(weight, budget)
    check_now(weight)
    del weight
    memory.normal_()
    again = nn.Parameter(memory, requires_grad=False)
    check_now(again)
    assert budget.held == 2 * memory.nbytes
    del memory, again
    assert budget.held == 0 and not packed._by_key
    check_now(frozen(12, 16))
    assert budget.held == 0


def test_other_data_in_the_same_place() -> None:
    """A parameter whose memory was freed, and whose new memory lies where the old one lay, with a version that looks unchanged."""
    memory = bytearray(12 * 16 * 4)

    def storage_over_it(value: Tensor) -> Tensor:
        return torch.frombuffer(memory, dtype=torch.float32).view(12, 16).copy_(value)

    layer = layer_with_copies(Budget())
    layer.weight.data = storage_over_it(torch.randn(12, 16))
    check_now(layer.weight)
    before = layer.weight.data_ptr(), layer.weight._version
    layer.weight.data = storage_over_it(torch.randn(12, 16))
    assert (layer.weight.data_ptr(), layer.weight._version) == before
    check_now(layer.weight)


def test_two_parameters_over_one_memory() -> None:
    """A write through one does not show in the other's version: both are looked at, also after one has left."""
    weight = frozen(96, 80)
    twin, budget = nn.Parameter(weight.data, requires_grad=False), Budget()
    packed.register(weight, budget)
    packed.register(twin, budget)
    check_now(weight)
    place = unseen_element(weight)
    for _ in range(2):
        for writer in (weight, twin):
            writer.view(-1)[place] += 2
            assert packed.held_bytes() == budget.held == 0
            check_now(weight)
            check_now(twin)
            assert budget.held == 2 * weight.nbytes
    packed.release(weight)
    assert budget.held == 0
    check_now(weight)
    twin.view(-1)[place] += 1
    check_now(weight)
    packed.release(twin)
    assert budget.held == 0 and not packed._by_key


def test_a_weight_that_begins_to_train_has_no_copy() -> None:
    """Whoever writes to it then, it may be where neither version nor fingerprint tell: not used, and none left from before."""
    budget, weight, x = Budget(), frozen(96, 80), torch.randn(5, 80)
    packed.register(weight, budget)
    check_now(weight)
    weight.requires_grad_()
    with torch.no_grad():
        assert torch.allclose(frozen_linear(x, weight, None), F.linear(x, weight), atol=1e-4)
    assert budget.held == 0
    weight.data.view(-1)[unseen_element(weight)] += 100
    weight.requires_grad_(False)
    check_now(weight)
    assert budget.held == 2 * weight.nbytes


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
        packed.register(weight, Budget())
    assert not packed._by_key


def test_a_freed_storage_is_no_place() -> None:
    """As sharding leaves parameters between uses: all without memory, none mistaken for another."""
    budget, weights = Budget(), [frozen(12, 16) for _ in range(2)]
    values = [weight.clone() for weight in weights]
    for weight in weights:
        packed.register(weight, budget)
        check_now(weight)
        weight.untyped_storage().resize_(0)
        assert products.describe(weight, weight.dtype, 5) == "torch"  # and nothing is read
    assert packed.held_bytes() == 0
    for weight, value in zip(weights, values, strict=True):
        weight.untyped_storage().resize_(value.nbytes)
        weight.copy_(value)
        check_now(weight)
    assert budget.held == 4 * weights[0].nbytes


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
            assert budget.held == packed.held_bytes() == sum(weight.nbytes for weight in weights)
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


# Whole models


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> None:
    """No measurement sends a product to plain PyTorch."""
    monkeypatch.setattr(ops, "forced", "cpu")


def pair(family: str = "llama", **options) -> tuple[nn.Module, nn.Module, dict]:
    """A model with all its copies made, its peer left to PEFT, and the labels that they take."""
    model, labels = peft_model(family, **options)
    peer = copy.deepcopy(model)
    fastlora.accelerate(model, frozen=True)
    run(model, labels)
    assert packed.held_bytes() > 0
    return model, peer, labels


def copies(model: nn.Module) -> int:
    """The bytes that the model's copies for forward and backward would take."""
    seen = {}
    for module in model.modules():
        if isinstance(module, (FusedLinear, FrozenLinear)):
            weight = module.weight
            seen[weight.data_ptr()] = 2 * packed.copy_bytes(weight)
    return sum(seen.values())


@NATIVE
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bert"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_models_with_copies_equal_peft(family: str, dtype: torch.dtype, packs: None) -> None:
    model, labels = peft_model(family, dtype)
    exact = run(copy.deepcopy(model).double(), labels)
    eager = run(model, labels)
    names = set(model.state_dict())
    fastlora.accelerate(model, frozen=True)
    for _ in range(2):  # making the copies, and using them
        assert_as_near_as(run(model, labels), eager, exact)
    assert set(model.state_dict()) == names
    if family != "t5" and always_packed(dtype):  # whose encoder's first layers need no dx
        embedding = model.get_input_embeddings().weight
        entries = [entry for entry in fastlora.report(model) if "original_module" not in entry.name]
        own = [entry for entry in entries if model.get_submodule(entry.name).weight is not embedding]
        assert own and all("oneDNN, packed, 0.0 MiB" in entry.reason for entry in own)


@NATIVE
def test_frozen_layers_without_adapters(packs: None) -> None:
    """lm_head and, with adapters on two of seven, the other five; tied or not; PEFT's results and nothing else changed."""
    for tied in (False, True):
        model, labels = peft_model(target_modules=["q_proj", "v_proj"])
        if tied:
            model.base_model.model.lm_head.weight = model.base_model.model.model.embed_tokens.weight
        expected, classes = run(model, labels), [type(module) for module in model.modules()]
        fastlora.accelerate(model, frozen=True)
        names = [name for name, module in model.named_modules() if type(module) is FrozenLinear]
        assert len(names) == 11 and names[-1].endswith("lm_head")
        assert {entry.name for entry in fastlora.report(model)} >= set(names)
        for name, value in run(model, labels).items():
            assert torch.allclose(value, expected[name], atol=1e-5), name
        fastlora.restore(model)
        assert [type(module) for module in model.modules()] == classes and packed.held_bytes() == 0
        assert not any("_fastlora_seen" in module.__dict__ for module in model.modules())
        assert all(torch.equal(value, expected[name]) for name, value in run(model, labels).items())


def test_a_model_without_lora_layers(packs: None) -> None:
    model, _, _ = llama()
    with pytest.raises(ValueError, match="model: .*requires_grad_"):
        fastlora.accelerate(model, frozen=True)
    expected = logits(model.requires_grad_(False))
    fastlora.accelerate(model, frozen=True)
    assert torch.allclose(logits(model), expected, atol=1e-5) and packed.held_bytes() * 2 == copies(model)
    assert all(
        entry.implementation == "cpu" and entry.reason.endswith("oneDNN, packed, 0.0 MiB")
        for entry in fastlora.report(model)
    )


def test_only_plain_frozen_layers_are_swapped() -> None:
    class Own(nn.Linear):
        pass

    hooked = nn.Linear(4, 4)
    hooked.register_forward_hook(lambda *_: None)
    model = nn.Sequential(Own(4, 4), hooked, nn.Linear(4, 4), nn.Linear(4, 4, dtype=torch.float64), nn.Linear(4, 4))
    model.requires_grad_(False)[-1].bias.requires_grad_()
    fastlora.accelerate(model, frozen=True)
    assert [type(layer) for layer in model] == [Own, nn.Linear, FrozenLinear, FrozenLinear, nn.Linear]
    fastlora.restore(model)


def test_a_swapped_layer_that_is_unfrozen_trains() -> None:
    model = fastlora.accelerate(nn.Sequential(nn.Linear(8, 8)).requires_grad_(False), frozen=True)
    x = torch.randn(4, 8)
    model(x)
    model.requires_grad_()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        expected = F.linear(x, model[0].weight, model[0].bias)
        assert torch.equal(model(x), expected)
        model(x).sum().backward()
        optimizer.step()
    reason = fastlora.report(model)[0].reason
    assert reason.startswith("nn.Linear's own forward: the base weight or bias is trained; before, cpu, 4 rows: ")


@NATIVE
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_and_unmerge(family: str, safe_merge: bool, packs: None) -> None:
    model, peer, labels = pair(family)
    for do in (
        lambda m: m.merge_adapter(safe_merge=safe_merge),
        lambda m: m.unmerge_adapter(),
        lambda m: m.merge_adapter(safe_merge=safe_merge),
    ):
        do(model)
        do(peer)
        assert torch.allclose(logits(model), logits(peer), atol=1e-5)
    model.unmerge_adapter(), peer.unmerge_adapter()
    expected = run(peer, labels)
    for name, value in run(model, labels).items():
        assert torch.allclose(value, expected[name], atol=1e-5), name
    assert packed.held_bytes() <= copies(model)
    merged = model.merge_and_unload()
    assert torch.allclose(logits(merged), logits(peer.merge_and_unload()), atol=1e-5)


@NATIVE
def test_an_adapter_that_changes_the_base_weight(packs: None) -> None:
    """OLoRA's adapter begins by subtracting itself from the weight, through `.data`."""
    model, peer, _ = pair()
    for each in (model, peer):
        torch.manual_seed(1)
        each.add_adapter("other", LoraConfig(r=3, target_modules="all-linear", init_lora_weights="olora"))
        for active in ("default", "other"):
            each.set_adapter(active)
        each.eval()
    assert torch.allclose(logits(model), logits(peer), atol=1e-5)


@NATIVE
def test_an_adapter_on_a_frozen_layer(packs: None) -> None:
    """It may be merged before `accelerate` is called again; after that call it is fused."""
    options = {"target_modules": ["q_proj"]}
    model, peer, _ = pair(**options)
    for each in (model, peer):
        torch.manual_seed(1)
        each.add_adapter("wide", LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
        each.set_adapter("wide")
    assert torch.allclose(logits(model), logits(peer), atol=1e-5)
    for do in (lambda m: m.merge_adapter(), lambda m: m.unmerge_adapter()):
        do(model), do(peer)
        assert torch.allclose(logits(model), logits(peer), atol=1e-5)
    fastlora.accelerate(model, frozen=True)
    v_proj = model.base_model.model.model.layers[0].self_attn.v_proj
    assert type(v_proj) is FusedLinear and type(v_proj.base_layer) is nn.Linear
    assert torch.allclose(logits(model), logits(peer), atol=1e-5)
    fastlora.restore(model)
    assert not any(type(module) in (FusedLinear, FrozenLinear) for module in model.modules())


@NATIVE
@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.load_state_dict({name: value * 0.5 for name, value in m.state_dict().items()}),
        lambda m: m.load_state_dict({name: value * 0.5 for name, value in m.state_dict().items()}, assign=True),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.share_memory(),
    ],
    ids=["load_state_dict", "load_state_dict, assigned", "to bfloat16", "share_memory"],
)
def test_models_that_change(change: Callable[[nn.Module], object], packs: None) -> None:
    model, peer, _ = pair()
    change(model), change(peer)
    assert packed.held_bytes() == 0
    error = 1e-5 if peer.dtype == torch.float32 else 0.05
    assert torch.allclose(logits(model), logits(peer), atol=error, rtol=error)


@NATIVE
@pytest.mark.parametrize("there", [torch.float64, "meta"])
def test_moving_away_frees_the_copies(there: object, packs: None) -> None:
    """At once, though no product comes by to see it."""
    model, _, _ = pair()
    model.to(there)
    assert sum(registered.bytes for registered in packed._by_key.values()) == 0


@NATIVE
def test_merging_frees_the_copies(packs: None) -> None:
    """PEFT writes into the memory as it lies, and the version does not show it."""
    model, _, _ = pair()
    head = model.base_model.model.lm_head.weight
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    version = layer.base_layer.weight._version
    model.merge_adapter()
    assert packed.held_bytes() == 2 * head.nbytes and layer.base_layer.weight._version == version
    check_now(layer.base_layer.weight)
    assert packed.held_bytes() == 2 * (head.nbytes + layer.base_layer.weight.nbytes)
    model.unmerge_adapter()
    assert packed.held_bytes() == 2 * head.nbytes
    check_now(layer.base_layer.weight)


@NATIVE
@pytest.mark.parametrize("targets", [["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_merging_into_a_weight_that_another_layer_reads(targets: list[str], packs: None) -> None:
    """The embedding and lm_head are one parameter: PEFT writes to it through `.data`, and tells lm_head nothing."""
    model = llama()[0].to(torch.bfloat16)
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    model = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=64, target_modules=targets, init_lora_weights=False)
    ).eval()
    peer = copy.deepcopy(model)
    fastlora.accelerate(model, frozen=True)
    for do in (lambda m: None, lambda m: m.merge_adapter(), lambda m: m.unmerge_adapter(), lambda m: m.merge_adapter()):
        do(model), do(peer)
        expected = logits(peer)
        assert (logits(model) - expected).abs().max() <= 0.02 * expected.abs().max()


@NATIVE
@pytest.mark.parametrize("rows", [3, 4095], ids=["a few rows", "all but one"])
def test_merging_rows_of_an_embedding_that_another_layer_reads(rows: int, packs: None) -> None:
    """Of tokens that training never saw nothing is merged, and a fingerprint may miss the others: such a weight has no copy."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=4096, **sizes, tie_word_embeddings=True)
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"])).eval()
    head, embedding = model.base_model.model.lm_head, model.base_model.model.model.embed_tokens
    torch.nn.init.normal_(embedding.lora_embedding_A["default"].data[:, 1 : 1 + rows])
    fastlora.accelerate(model, frozen=True)
    x = torch.randn(50, 64)
    before = head(x)
    for do in (embedding.merge, embedding.unmerge, model.merge_adapter):
        do()
        assert torch.allclose(head(x), F.linear(x, head.weight), atol=1e-4)
    assert not torch.allclose(head(x), before, atol=1e-2)


@NATIVE
@pytest.mark.parametrize("added", [False, True], ids=["", "added since"])
def test_merging_one_element(added: bool, packs: None) -> None:
    """PEFT writes it through `.data`, where no fingerprint reads."""
    model, _, _ = pair(target_modules=["q_proj"])
    if added:
        model.add_adapter("up", LoraConfig(r=2, target_modules=["up_proj"]))
        model.set_adapter("up")
    layer = model.base_model.model.model.layers[0].mlp.up_proj if added else q_proj(model)
    weight, (adapter,) = layer.get_base_layer().weight, layer.active_adapters
    check_now(weight)
    place = unseen_element(weight)
    with torch.no_grad():
        layer.lora_A[adapter].weight.zero_()[0, place] = 100
        layer.lora_B[adapter].weight.zero_()[0, 0] = 1
    for do in (model.merge_adapter, model.unmerge_adapter):
        seen, before = packed._fingerprint(weight), weight.clone()
        do()
        assert packed._fingerprint(weight) == seen and not torch.equal(weight, before)
        check_now(weight)


@NATIVE
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("how", ["unload", "merge_and_unload"])
def test_an_unloaded_model_has_no_copies(how: str, whole: bool, packs: None) -> None:
    model, labels = peft_model(target_modules=["q_proj", "up_proj"])
    expected = getattr(copy.deepcopy(model), how)()
    fastlora.accelerate(model if whole else model.base_model.model, frozen=True)
    run(model, labels)
    assert packed._by_key
    unloaded = getattr(model, how)()
    assert packed._by_key == {} and not packed._waiting
    assert torch.allclose(logits(unloaded), logits(expected), atol=1e-5)
    assert packed._by_key == {}


@NATIVE
def test_swapped_parameters(packs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.utils.swap_tensors takes no tensor that somebody holds weakly; modules may move by it."""
    model, peer, labels = pair()
    expected = run(peer, labels)
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
    model.double().float()
    for name, value in run(model, labels).items():
        assert torch.allclose(value, expected[name], atol=1e-5), name
    assert packed.held_bytes() > 0, "moved layers are registered again"


@NATIVE
def test_copied_and_pickled_models(packs: None) -> None:
    model, peer, _ = pair()
    held = packed.held_bytes()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.allclose(logits(other), logits(peer), atol=1e-5)
        for parameter in other.parameters():
            parameter.data.mul_(0.5)
        assert not torch.allclose(logits(other), logits(peer), atol=1e-5)
        assert torch.allclose(logits(model), logits(peer), atol=1e-5)
    assert packed.held_bytes() == held


@NATIVE
def test_budgets_of_models(packs: None) -> None:
    model, labels = peft_model()
    for budget in (0, 10_000, None):
        fastlora.accelerate(model, pack_budget=budget)
        assert packed.held_bytes() == 0
        run(model, labels)
        assert packed.held_bytes() <= (copies(model) if budget is None else budget)
        refused = ["does not fit the pack_budget" in entry.reason for entry in fastlora.report(model)]
        assert any(refused) == (budget == 10_000) and not all(refused)
    assert packed.held_bytes() > copies(model) / 2  # all but dx of the first layers, which nobody wants
    fastlora.restore(model)
    assert packed.held_bytes() == 0


def test_wrong_pack_budget() -> None:
    with pytest.raises(ValueError, match="pack_budget"):
        fastlora.accelerate(peft_model()[0], pack_budget=-1)


@NATIVE
def test_float32_adapters_keep_no_float32_copy_of_x(packs: None) -> None:
    """PEFT casts x to the adapter's dtype and keeps that too."""
    model, labels = peft_model(dtype=torch.bfloat16, lora_dropout=0.1)
    q_proj = model.base_model.model.model.layers[0].self_attn.q_proj

    def kept(x: Tensor) -> list[tuple[torch.dtype, int]]:
        found: list[tuple[torch.dtype, int]] = []
        pack = lambda tensor: found.append((tensor.dtype, tensor.numel())) or tensor  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            q_proj(x)
        return found

    x = torch.randn(400, 32, dtype=torch.bfloat16, requires_grad=True)
    as_large = (torch.float32, x.numel())
    assert as_large in kept(x)
    fastlora.accelerate(model)
    found = kept(x)
    assert q_proj.lora_A["default"].weight.dtype == torch.float32
    assert (torch.bfloat16, x.numel()) in found and as_large not in found
