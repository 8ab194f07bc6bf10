"""Products with frozen weights on a CPU, and the packed copies of weights that they read: `frozen_linear` and its backward as `cpu`.

    y = x Wᵀ + b   dx = dy W

In float32 csrc multiplies, without a copy: oneDNN adds a long float32 product up in one chain of roundings and leaves our bound. For the other
dtypes a frozen weight, which never changes, may be laid out once the way oneDNN likes it, where that was measured to pay on this kind of
machine. The copies are found by the weight's place in its storage and stand outside every module: no state dict, pickle or deepcopy sees
them. `accelerate` registers the weights of a model under one `Budget`; a copy is made when a product first wants it, and the forward's and the
backward's are two. They are freed with the weight's memory.

A copy is never stale. Before each use the weight is looked at: its address, the versions that torch counts, and a fingerprint of 256
elements spread over all of it, since many a writer is not counted: fused optimisers, `.data`, numpy, another process. That costs 2 microseconds,
and 7 to 12 where the weight is in no cache (csrc/cpu/fingerprint.cpp; one core of an AMD Zen 5, 2026-11-28, 1536 x 576 and 4096 x 4096
in turn with 3 GiB of others). A weight that requires a gradient, or was in an optimiser's step, has its copies dropped. What passes is a write to
a part of a weight that torch does not count and that meets none of the 256: stand inside `rewriting` for those. Of a
weight that other modules have, too, as a tied embedding, whose rows are written to one by one, `accelerate` lets no copies be made.
"""

import functools
import os
import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from fastlora import ops, reference
from fastlora.choice import table

FEW_ROWS = 8  # what fastlora::few_rows_cpu takes
MEMORY_SHARE = 16  # the default budget is the machine's memory over this
WITHOUT_SYSCONF = 2**30  # the default budget in bytes where the system does not tell its memory

_linear_pointwise: Any = torch.ops.mkldnn._linear_pointwise.default if torch.backends.mkldnn.is_available() else None


def _native(name: str) -> Any:
    """The operator that csrc has registered for the CPU, or None."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(f"fastlora::{name}", "CPU")
    return getattr(torch.ops.fastlora, name).default if has_kernel else None


_few_rows, _product, _fingerprint = (_native(f"{name}_cpu") for name in ("few_rows", "product", "fingerprint"))
LEAST_PRODUCT = 2**21  # multiplications, M K N, from which on product_cpu is faster than torch
LEAST_PRODUCT_COLUMNS = 32  # of y: it computes 64 at a time
_has_avx = torch.backends.cpu.get_cpu_capability().startswith("AVX")  # elsewhere torch's product is faster

# One core of an AMD Zen 4, torch 2.13: from here on oneDNN multiplies float16 by way of float32 faster than torch does.
LEAST_FLOAT16_ROWS = 2
LEAST_FLOAT16 = 2**19  # multiplications, M K N


@functools.cache
def suits_onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies operands of this dtype here, and better than csrc does, or torch by itself."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    # By way of float32; where oneDNN computes float16 itself, torch's own product is fast.
    return dtype is torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported()


def packs(dtype: torch.dtype) -> bool:
    """Whether weights of this dtype may have copies here: the native extension must be there, which reads their fingerprints."""
    return _fingerprint is not None and suits_onednn(dtype)


def _takes_few_rows(rows: int, weight: Tensor) -> bool:
    """The rule: when few_rows_cpu multiplies. On a weight [N, K] that lies by column it beats torch in float16 only."""
    if _few_rows is None or not 1 <= rows <= FEW_ROWS or weight.dtype not in ops.KERNEL_DTYPES:
        return False
    return weight.stride(1) == 1 or (weight.stride(0) == 1 and weight.dtype is torch.float16)


def _takes_product(work: int, weight: Tensor) -> bool:
    """The rule: when product_cpu multiplies. In float32 it needs no copy to be as fast as oneDNN with one, and it rounds less than MKL."""
    if _product is None or not _has_avx or weight.dtype is not torch.float32:
        return False
    return work >= LEAST_PRODUCT and weight.shape[0] >= LEAST_PRODUCT_COLUMNS


def _takes_packed(dtype: torch.dtype, rows: int, elements: int, backward: bool) -> bool:
    """Whether a copy was measured to pay: the whole product, fingerprint included, took at most `measure.WORTH_A_COPY` of the time without."""
    if not packs(dtype) or not torch.backends.mkldnn.enabled:
        return False
    op = "frozen_linear_backward" if backward else "frozen_linear"
    return table.way("cpu", op, "cpu", dtype, rows, elements, False) == "packed"


def _takes_plain(dtype: torch.dtype, rows: int, work: int) -> bool:
    """The rule: when oneDNN multiplies by the weight as it lies. torch's bfloat16 product is that already."""
    if dtype is not torch.float16 or not suits_onednn(dtype) or not torch.backends.mkldnn.enabled:
        return False
    return rows >= LEAST_FLOAT16_ROWS and work >= LEAST_FLOAT16


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # [M, K], [N, K], [N] -> [M, N]
    """y = x Wᵀ + b (reference.py::frozen_linear), in the way that is fastest here."""
    _check("x", x, weight, 1)
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != x.dtype):
        raise ValueError(f"bias: got {bias.dtype} {list(bias.shape)}, expected {x.dtype} [{weight.shape[0]}]")
    return _multiply(x, weight, bias, backward=False)


def frozen_linear_backward(dy: Tensor, weight: Tensor) -> Tensor:  # [M, N], [N, K] -> [M, K]
    """dx = dy W (reference.py::frozen_linear_backward), in the way that is fastest here."""
    _check("dy", dy, weight, 0)
    return _multiply(dy, weight.t(), None, backward=True)


def _check(name: str, x: Tensor, weight: Tensor, dimension: int) -> None:
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[dimension]:
        raise ValueError(
            f"{name}: got shape {list(x.shape)} for a weight {list(weight.shape)}, expected two dimensions that fit"
        )
    if x.dtype != weight.dtype or x.device != weight.device:
        raise ValueError(f"weight: got {weight.dtype} on {weight.device}, expected {x.dtype} on {x.device}")


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, backward: bool) -> Tensor:
    """x [M, K] times the transpose of weight [N, K], which in the backward is the transpose of a layer's."""
    M, K = x.shape
    work = M * K * weight.shape[0]
    if work:
        if x.stride(1) != 1:
            x = x.contiguous()
        if bias is not None:
            bias = bias.contiguous()
        if _takes_few_rows(M, weight):
            return _few_rows(x, weight, bias)
        if _takes_product(work, weight) and (weight.stride(1) == 1 or weight.stride(0) == 1):
            return _product(x, weight, bias)
        x = reference.readable_rows(x)
        copy = _find_copy(weight) if _takes_packed(x.dtype, M, weight.numel(), backward) else None
        if copy is not None or _takes_plain(x.dtype, M, work):
            return _multiply_by_onednn(x, weight if copy is None else copy, bias)
    if torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return F.linear(x, weight, bias)
    return F.linear(x, weight, bias)


def _multiply_by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.dtype is not torch.float16:
        return _linear_pointwise(x, weight, bias, "none", [], "")
    wide = None if bias is None else bias.float()
    return _linear_pointwise(x.float(), weight.float(), wide, "none", [], "").half()


class Budget:
    """The bytes that copies of one model's weights may take, padding of oneDNN's aside.

    limit: in bytes; None: a sixteenth of the machine's memory, the same on every run.

    Raises:
        ValueError: limit is no whole number of bytes.
    """

    def __init__(self, limit: int | None = None) -> None:
        if limit is None:
            limit = _machine_memory() // MEMORY_SHARE
        if not isinstance(limit, int) or limit < 0:
            raise ValueError(f"pack_budget: got {limit!r}, expected a number of bytes, 0 for no copies, or None")
        self.limit = limit
        self.held = 0


def _machine_memory() -> int:
    if not hasattr(os, "sysconf"):
        return WITHOUT_SYSCONF * MEMORY_SHARE
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


Key = tuple[int, Any, int, int, int, int, torch.dtype]


def _key_of(weight: Tensor) -> Key:
    """Where a matrix lies: its storage, as long as that lives, and its place there. Whatever tensor looks at it has the same, its transpose too."""
    (n, k), (down, right) = weight.shape, weight.stride()
    if down < right:
        n, k, down, right = k, n, right, down
    return weight.untyped_storage()._cdata, weight.storage_offset(), n, k, down, right, weight.dtype


def _is_plain(tensor: Any) -> bool:
    """Whether it is a matrix in memory, and no quantised, sharded or other special tensor."""
    return type(tensor) in (nn.Parameter, Tensor) and tensor.layout == torch.strided and tensor.dim() == 2


class Places:
    """Where some matrices lie; `in` asks for a weight whether it is one of them, by whatever tensor."""

    def __init__(self, tensors: Iterable[Any]) -> None:
        self._keys = {_key_of(tensor) for tensor in tensors if _is_plain(tensor)}

    def __contains__(self, weight: Tensor) -> bool:
        return _is_plain(weight) and _key_of(weight) in self._keys


def _version_of(owner: Tensor) -> Tensor:
    """A tensor whose `_version` is the owner's, whatever becomes of that: it has no memory, and keeps none alive."""
    watch = owner.detach()
    watch.data = owner.detach().new_empty(0)
    return watch


class _Registered:
    """A frozen weight and its copies. All that writes to one holds `_lock`."""

    def __init__(self, weight: Tensor, budget: Budget) -> None:
        key = self.key = _key_of(weight)
        self.budget = budget
        # Of the storage, since torch.utils.swap_tensors refuses tensors with weak references. While it lives no other has its number.
        self.storage = weakref.ref(weight.untyped_storage(), lambda _: _forget(key))
        # By id, a `_version_of` each: parameters over one memory count their writes apart.
        self.owners: dict[int, Tensor] = {}
        # By the strides of what is multiplied by: the weight, its transpose.
        self.copies: dict[tuple[int, ...], Tensor] = {}
        self.bytes = 0
        self.state: tuple[int, ...] = ()

    def drop(self) -> None:
        self.copies = {}
        self.budget.held -= self.bytes
        self.bytes = 0

    def look(self, weight: Tensor) -> None:
        """Drop copies that are not of the weight as it is now."""
        state = weight.data_ptr(), *(owner._version for owner in self.owners.values()), _fingerprint(weight)
        if state != self.state:
            with _lock:
                self.drop()
                self.state = state

    def pack(self, weight: Tensor) -> Tensor | None:
        """Make a copy of the weight, or of its transpose, for a product, or None where it does not fit."""
        with _lock:
            way = weight.stride()
            if way not in self.copies and self.has_room(weight) and _by_key.get(self.key) is self:
                matrix = weight.detach()
                wide = matrix.float() if weight.dtype is torch.float16 else matrix
                self.copies[way] = torch.ops.mkldnn._reorder_linear_weight(wide)
                self.bytes += copy_bytes(weight)
                self.budget.held += copy_bytes(weight)
            return self.copies.get(way)

    def has_room(self, weight: Tensor) -> bool:
        return self.budget.held + copy_bytes(weight) <= self.budget.limit


_lock = threading.RLock()  # a weight may die, and be forgotten, inside
_by_key: dict[Key, _Registered] = {}

if hasattr(os, "register_at_fork"):  # no process begins in the middle of a change
    os.register_at_fork(
        before=lambda: _lock.acquire(), after_in_parent=lambda: _lock.release(), after_in_child=lambda: _lock.release()
    )


def register(owner: Tensor, budget: Budget) -> bool:
    """Let products with this weight, [N, K] or [K, N], have copies; whether it can have any.

    Left out are trained, quantised, meta, sharded and other special tensors, and all where the budget is 0. A weight that is registered
    already changes its budget.
    """
    release(owner)
    plain = _is_plain(owner) and owner.device.type == "cpu" and not owner.is_inference()
    if budget.limit == 0 or not plain or owner.requires_grad or not packs(owner.dtype):
        return False
    with _lock:
        registered = _by_key.setdefault(_key_of(owner), _Registered(owner, budget))
        registered.drop()
        registered.budget = budget
        registered.owners[id(owner)] = _version_of(owner)
    return True


def release(owner: Tensor) -> Budget | None:
    """Undo `register`, and free the copies; the budget that they counted in, None for a weight that is not registered."""
    registered = _by_key.get(_key_of(owner)) if _by_key and _is_plain(owner) else None
    if registered is None or id(owner) not in registered.owners:
        return None
    with _lock:
        registered.drop()
        registered.owners.pop(id(owner), None)
        if not registered.owners:
            _forget(registered.key)
    return registered.budget


def _forget(key: Key) -> None:
    with _lock:
        registered = _by_key.pop(key, None)
        if registered is not None:
            registered.drop()


_waiting: weakref.WeakKeyDictionary[nn.Module, Budget] = weakref.WeakKeyDictionary()
"""Layers whose weights are where, or what, no copy is made of: on a card, in float64. They may come back."""


def attach(layer: nn.Module, budget: Budget) -> None:
    """`register` the layer's weight, now or when `rewriting` has made something of it that can have copies."""
    detach(layer)
    weight: Any = layer.weight
    if not register(weight, budget):
        _waiting[layer] = budget


def detach(layer: nn.Module) -> Budget | None:
    """Undo `attach`; the budget, if there was one."""
    budget = _waiting.pop(layer, None)
    for parameter in layer.parameters():  # the weight among them, be it parametrised since or not
        budget = release(parameter) or budget
    return budget


@contextmanager
def rewriting(layer: nn.Module) -> Iterator[None]:
    """Around what writes to a layer's weight, moves or replaces it: its copies are freed at once, and made anew when wanted."""
    budget = detach(layer)
    try:
        yield
    finally:
        if budget is not None:
            attach(layer, budget)


def drop(weight: Tensor) -> None:
    """Free the copies of a weight, if it has any; they are made anew when wanted."""
    registered = _by_key.get(_key_of(weight)) if _by_key and _is_plain(weight) else None
    if registered is not None:
        with _lock:
            registered.drop()


def _drop_what_was_trained(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """After every step of every optimiser: fused ones write what no version counts, and perhaps little of a weight."""
    if torch.compiler.is_compiling() or not _by_key:
        return
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    # Of any shape and class: a flat one may lie over many weights.
    trained = {
        parameter.untyped_storage()._cdata
        for parameter in parameters
        if parameter.layout is torch.strided and not nn.parameter.is_lazy(parameter)
    }
    with _lock:
        for registered in _by_key.values():
            if registered.key[0] in trained:
                registered.drop()


register_optimizer_step_post_hook(_drop_what_was_trained)


def held_bytes() -> int:
    """The bytes in copies now, of weights that still are what they were."""
    with _lock:
        for registered in list(_by_key.values()):
            storage, (_, offset, *matrix, dtype) = registered.storage(), registered.key
            if storage is not None and _holds(storage, registered.key):
                registered.look(torch.empty(0, dtype=dtype).set_(storage, offset, matrix[:2], matrix[2:]))
            else:
                registered.drop()
        return sum(registered.bytes for registered in _by_key.values())


def _holds(storage: torch.UntypedStorage, key: Key) -> bool:
    """Whether the matrix lies within the storage, which may have been resized."""
    _, offset, n, k, down, right, dtype = key
    return storage.nbytes() >= (offset + (n - 1) * down + (k - 1) * right + 1) * dtype.itemsize


def copy_bytes(weight: Tensor) -> int:
    """The bytes of one copy of a weight."""
    return weight.numel() * (4 if weight.dtype is torch.float16 else weight.element_size())


def _find(weight: Tensor) -> _Registered | None:
    """What is registered for a weight, or for another tensor over the same elements, without copies that are not of what is there now."""
    registered = _by_key.get(_key_of(weight)) if _by_key else None
    if registered is None:
        return None
    if weight.requires_grad or weight.is_inference() or not _holds(weight.untyped_storage(), registered.key):
        with _lock:
            registered.drop()
        return None
    registered.look(weight)
    return registered


def _find_copy(weight: Tensor) -> Tensor | None:
    registered = _find(weight)
    if registered is None:
        return None
    copy = registered.copies.get(weight.stride())
    return registered.pack(weight) if copy is None else copy


def describe(weight: Tensor, dtype: torch.dtype, rows: int) -> str:
    """For people: what multiplies that many rows of that dtype by a frozen weight [N, K]."""
    work = rows * weight.numel()
    if _takes_few_rows(rows, weight):
        return "native C++, a few rows"
    if dtype == weight.dtype and _takes_product(work, weight):
        return "native C++"
    plain = "oneDNN" if _takes_plain(dtype, rows, work) else "torch"
    registered = _find(weight) if dtype == weight.dtype else None
    if registered is None or not _takes_packed(dtype, rows, weight.numel(), backward=False):
        return plain
    if registered.bytes:
        return f"oneDNN, packed, {_mebibytes(registered.bytes)}"
    if not registered.has_room(weight):
        return f"{plain}, {_mebibytes(copy_bytes(weight))} does not fit the pack_budget"
    return "oneDNN, packed when first called"


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


for _op, _function in (("frozen_linear", frozen_linear), ("frozen_linear_backward", frozen_linear_backward)):
    ops.implement(_op, "cpu", _function)
    ops.library.impl(f"{_op}_cpu", _function, "CPU")  # csrc calls it by this name
