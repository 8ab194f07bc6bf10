"""frozen/packed.py: copies are never stale, whoever writes to the weight, and wherever its memory goes."""

import copy
import ctypes
import functools
import multiprocessing
import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from bounds import gapped, transposed
from packed_weights import (  # noqa: F401  (a fixture)
    FLOATS,
    NEEDS_COPIES,
    Special,
    check_now,
    eagerly_packed,
    frozen,
    held_bytes,
    layer_with_copies,
    unseen_element,
)
from torch import Tensor, nn

from fastlora.frozen import packed
from fastlora.frozen.packed import Budget
from fastlora.functional import frozen_linear

pytestmark = NEEDS_COPIES


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
    assert held_bytes() == budget.held == 0
    if layer.weight is not None:
        check_now(layer.weight)
        check_now(layer.weight)
    assert budget.held == held_bytes()
    if change not in MOVED:
        assert budget.held == 2 * layer.weight.nbytes, "not packed anew"


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
    others = nn.parameter.UninitializedParameter(), nn.Parameter(torch.eye(3).to_sparse())
    make([trained, *others], lr=1.0, weight_decay=0, fused=True).step()
    trained.requires_grad_(False)
    assert packed._fingerprint(weight) == seen, "the step must be one that only the optimiser's hook can tell"
    assert weight.view(-1)[untouched].item() != before
    assert budget.held == 2 * other.nbytes
    check_now(weight)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="processes do not fork here")
def test_shared_memory_that_another_process_writes_to() -> None:
    layer, budget = nn.Linear(16, 12, bias=False).requires_grad_(False).share_memory(), Budget()
    packed.register(layer.weight, budget)
    check_now(layer.weight)
    before = layer.weight.clone()
    write_by_another_process(layer)
    assert torch.equal(layer.weight, 2 * before) and held_bytes() == 0
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


def test_a_compiled_optimizer_of_another_parameter_over_the_memory() -> None:
    """Neither version nor fingerprint tell: the hook must."""
    torch.compiler.reset()
    weight, budget = frozen(96, 80), Budget()
    packed.register(weight, budget)
    check_now(weight)
    flat = nn.Parameter(weight.data.view(-1))
    flat.grad = torch.zeros_like(flat)
    flat.grad[unseen_element(weight)] = 100.0
    torch.compile(torch.optim.SGD([flat], lr=1.0).step, backend="eager")()
    assert budget.held == 0
    check_now(weight)
    del flat
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


def test_a_tensor_of_inference_mode_over_the_memory_has_no_copy() -> None:
    """Its writes are counted nowhere: the copies of the weight are dropped, too."""
    weight, budget, x = frozen(96, 80), Budget(), torch.randn(5, 80)
    packed.register(weight, budget)
    check_now(weight)
    place = unseen_element(weight)
    with torch.inference_mode():
        other = torch.empty(0).set_(weight.untyped_storage(), 0, (96, 80), (80, 1))
        other[0, place] += 100
        assert torch.allclose(frozen_linear(x, other, None), F.linear(x, other), atol=1e-4)
    assert budget.held == 0
    check_now(weight)


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
            assert held_bytes() == budget.held == 0
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
