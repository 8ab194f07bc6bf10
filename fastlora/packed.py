"""Products with frozen weights on a CPU, and the packed copies of weights that they read: `frozen_linear` and its backward as `cpu`.

    y = x Wᵀ + b   dx = dy W

In float32 csrc multiplies, without a copy: oneDNN adds a long float32 product up in one chain of roundings and leaves our bound. For the other
dtypes a frozen weight, which never changes, may be laid out once the way oneDNN likes it. The copies are found by the weight's place in memory
and stand outside every module: no state dict, pickle or deepcopy sees them. `accelerate` registers the weights of a model under one `Budget`; a
copy is made when a product first wants it, and the forward's and the backward's are two. Before each use the registered tensor is looked at:
one that died, moved or was written to has its copies dropped. Writes through `.data` leave no trace: stand inside `rewriting` for those.
"""

import functools
import math
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from fastlora import ops

FEW_ROWS = 8  # what fastlora::few_rows_cpu takes
MEMORY_SHARE = 16  # the default budget is the machine's memory over this
WITHOUT_SYSCONF = 2**30  # the default budget in bytes where the system does not tell its memory

_linear_pointwise: Any = torch.ops.mkldnn._linear_pointwise.default if torch.backends.mkldnn.is_available() else None


def _native(name: str) -> Any:
    """The operator that csrc has registered for the CPU, or None."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(f"fastlora::{name}", "CPU")
    return getattr(torch.ops.fastlora, name).default if has_kernel else None


_few_rows, _product = _native("few_rows_cpu"), _native("product_cpu")
LEAST_PRODUCT = 2**21  # multiplications, M K N, from which on product_cpu is faster than torch
LEAST_PRODUCT_COLUMNS = 32  # of y: it computes 64 at a time
_has_avx = torch.backends.cpu.get_cpu_capability().startswith("AVX")  # elsewhere torch's product is faster


class Least(NamedTuple):
    """From how many rows and multiplications on a product is faster by oneDNN than by torch."""

    rows: int
    packed: float  # multiplications, M K N, where a packed copy is at hand
    plain: float  # the same on the weight as it lies


# One core of an AMD Zen 4, torch 2.13: torch's bfloat16 product is oneDNN's on the plain weight already; its float16 is slow.
LEAST = {
    torch.bfloat16: Least(1, 2**16, math.inf),
    torch.float16: Least(2, 2**19, 2**19),  # by way of float32
}


@functools.cache
def _least(dtype: torch.dtype) -> Least | None:
    """The rule: when oneDNN multiplies operands of this dtype here; None: never."""
    if not torch.backends.mkldnn.is_available():
        return None
    if dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    if dtype is torch.float16 and torch.ops.mkldnn._is_mkldnn_fp16_supported():
        return None  # torch's own product is fast there
    return LEAST.get(dtype)


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


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # [M, K], [N, K], [N] -> [M, N]
    """y = x Wᵀ + b (reference.py::frozen_linear), in the way that is fastest here."""
    _check("x", x, weight, 1)
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != x.dtype):
        raise ValueError(f"bias: got {bias.dtype} {list(bias.shape)}, expected {x.dtype} [{weight.shape[0]}]")
    return _multiply(x, weight, bias, weight, backward=False)


def frozen_linear_backward(dy: Tensor, weight: Tensor) -> Tensor:  # [M, N], [N, K] -> [M, K]
    """dx = dy W (reference.py::frozen_linear_backward), in the way that is fastest here."""
    _check("dy", dy, weight, 0)
    return _multiply(dy, weight.t(), None, weight, backward=True)


def _check(name: str, x: Tensor, weight: Tensor, dimension: int) -> None:
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[dimension]:
        raise ValueError(
            f"{name}: got shape {list(x.shape)} for a weight {list(weight.shape)}, expected two dimensions that fit"
        )
    if x.dtype != weight.dtype or x.device != weight.device:
        raise ValueError(f"weight: got {weight.dtype} on {weight.device}, expected {x.dtype} on {x.device}")


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, frozen: Tensor, backward: bool) -> Tensor:
    """x [M, K] times the transpose of weight [N, K], which is `frozen`, or its transpose in the backward."""
    M, K = x.shape
    work = M * K * weight.shape[0]
    least = _least(x.dtype)
    if work:
        if x.stride(1) != 1:
            x = x.contiguous()
        if bias is not None:
            bias = bias.contiguous()
        if _takes_few_rows(M, weight):
            return _few_rows(x, weight, bias)
        if _takes_product(work, weight) and (weight.stride(1) == 1 or weight.stride(0) == 1):
            return _product(x, weight, bias)
        if least is not None and M >= least.rows and torch.backends.mkldnn.enabled:
            copy = _find_copy(frozen, backward) if work >= least.packed else None
            if copy is not None or work >= least.plain:
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


Place = tuple[int, torch.Size, tuple[int, ...], torch.dtype]


def _place_of(weight: Tensor) -> Place:
    return weight.data_ptr(), weight.shape, weight.stride(), weight.dtype


class _Registered:
    """A frozen weight and its copies. All that writes to one holds `_lock`."""

    def __init__(self, owner: Tensor, budget: Budget, transposed: bool) -> None:
        number = id(owner)
        self.owner = weakref.ref(owner, lambda _: _forget(number))
        self.budget = budget
        self.transposed = transposed  # the owner is [K, N], as in a Conv1D
        self.copies: list[Tensor | None] = [None, None]  # the forward's, the backward's
        self.bytes = 0
        self.follow(owner)

    def follow(self, owner: Tensor) -> None:
        """Drop the copies, and take the owner as it is now."""
        self.drop()
        self.is_shared = False
        self.version = owner._version
        self.pointer = owner.data_ptr()
        # Held weakly: while it is, no later storage can pass for this one, though its memory may come to the same place.
        self.storage = StorageWeakRef(owner.untyped_storage())
        self.place = _place_of(owner.t() if self.transposed else owner)
        other = _by_place.setdefault(self.place, self)
        if other is not self:
            # Two parameters over one memory: a write through one does not show in the other's version.
            other.is_shared = self.is_shared = True
            other.drop()

    def drop(self) -> None:
        self.copies = [None, None]
        self.budget.held -= self.bytes
        self.bytes = 0

    def leave(self) -> None:
        """Drop the copies, and be found no more."""
        self.drop()
        if _by_place.get(self.place) is self:
            del _by_place[self.place]

    def is_current(self, owner: Tensor) -> bool:
        return (
            owner._version == self.version
            and owner.data_ptr() == self.pointer
            and owner.untyped_storage()._cdata == self.storage.cdata
        )

    def pack(self, weight: Tensor, backward: bool) -> Tensor | None:
        """Make a copy of weight [N, K] for one of the products, or None where it does not fit."""
        with _lock:
            if self.copies[backward] is None and self.has_room(weight) and _by_place.get(self.place) is self:
                matrix = weight.detach().t() if backward else weight.detach()
                wide = matrix.float() if weight.dtype is torch.float16 else matrix
                self.copies[backward] = torch.ops.mkldnn._reorder_linear_weight(wide)
                self.bytes += copy_bytes(weight)
                self.budget.held += copy_bytes(weight)
            return self.copies[backward]

    def has_room(self, weight: Tensor) -> bool:
        return not self.is_shared and self.budget.held + copy_bytes(weight) <= self.budget.limit


_lock = threading.RLock()  # a weight may die, and be forgotten, inside
_by_owner: dict[int, _Registered] = {}  # by the id of the registered tensor
_by_place: dict[Place, _Registered] = {}

if hasattr(os, "register_at_fork"):  # no process begins in the middle of a change
    os.register_at_fork(
        before=lambda: _lock.acquire(), after_in_parent=lambda: _lock.release(), after_in_child=lambda: _lock.release()
    )


def register(owner: Tensor, budget: Budget, transposed: bool = False) -> None:
    """Let products with this weight [N, K] (transposed: [K, N]) have copies; a weight that cannot have any is left out.

    Left out are trained, quantised, meta, sharded and other special tensors, and all where the budget is 0. A weight that is registered
    already changes its budget.
    """
    release(owner)
    if budget.limit == 0:
        return
    plain = type(owner) in (nn.Parameter, Tensor) and owner.layout == torch.strided and not owner.is_inference()
    if not plain or owner.is_meta or owner.requires_grad or owner.dim() != 2 or owner.dtype not in ops.KERNEL_DTYPES:
        return
    with _lock:
        _by_owner[id(owner)] = _Registered(owner, budget, transposed)


def release(owner: Tensor) -> None:
    """Undo `register`; the copies are freed."""
    _forget(id(owner))


def _forget(number: int) -> None:
    with _lock:
        registered = _by_owner.pop(number, None)
        if registered is not None:
            registered.leave()


@contextmanager
def rewriting(owner: Tensor) -> Iterator[None]:
    """Around a write to a weight that its version does not show, as through `.data`: its copies are dropped, and made anew when wanted."""
    try:
        yield
    finally:
        drop(owner)


def drop(owner: Tensor) -> None:
    """Free the copies of a weight, if it has any; they are made anew when wanted."""
    registered = _by_owner.get(id(owner))
    if registered is not None:
        with _lock:
            registered.drop()


def held_bytes() -> int:
    """The bytes in copies now, of weights that still are what they were."""
    with _lock:
        for registered in list(_by_owner.values()):
            _keep_current(registered)
        return sum(registered.bytes for registered in _by_owner.values())


def copy_bytes(weight: Tensor) -> int:
    """The bytes of one copy of a weight."""
    return weight.numel() * (4 if weight.dtype is torch.float16 else weight.element_size())


def _keep_current(registered: _Registered) -> Tensor | None:
    """The owner, if it is alive; its copies are dropped if it moved or was written to."""
    owner = registered.owner()
    if owner is not None and not registered.is_current(owner):
        with _lock:
            registered.leave()
            registered.follow(owner)
    return owner


def _find(weight: Tensor) -> _Registered | None:
    """What is registered for a weight [N, K], or for another tensor object over the same memory."""
    if not _by_owner:
        return None
    place = _place_of(weight)
    registered = _by_place.get(place)
    if registered is None:  # it may have moved since: known by the object itself then, or by the one it is a view of
        base = weight if weight._base is None else weight._base
        registered = _by_owner.get(id(base))
        if registered is None:
            return None
    owner = _keep_current(registered)
    if owner is None or owner.requires_grad or registered.place != place:
        return None
    if owner.is_inference():  # writes to it would leave no trace
        return None
    return registered


def _find_copy(weight: Tensor, backward: bool) -> Tensor | None:
    registered = _find(weight)
    if registered is None:
        return None
    copy = registered.copies[backward]
    return registered.pack(weight, backward) if copy is None else copy


def describe(weight: Tensor, dtype: torch.dtype, rows: int) -> str:
    """For people: what multiplies that many rows of that dtype by a frozen weight [N, K]."""
    work, least = rows * weight.numel(), _least(dtype)
    if _takes_few_rows(rows, weight):
        return "native C++, a few rows"
    if dtype == weight.dtype and _takes_product(work, weight):
        return "native C++"
    if least is None or rows < least.rows or not torch.backends.mkldnn.enabled:
        return "torch"
    plain = "oneDNN" if work >= least.plain else "torch"
    registered = _find(weight) if dtype == weight.dtype else None
    if registered is None or work < least.packed:
        return plain
    if registered.bytes:
        return f"oneDNN, packed, {_mebibytes(registered.bytes)}"
    if registered.is_shared:
        return f"{plain}, its memory has two parameters"
    if not registered.has_room(weight):
        return f"{plain}, {_mebibytes(copy_bytes(weight))} does not fit the pack_budget"
    return "oneDNN, packed when first called"


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


for _op, _function in (("frozen_linear", frozen_linear), ("frozen_linear_backward", frozen_linear_backward)):
    ops.implement(_op, "cpu", _function)
    ops.library.impl(f"{_op}_cpu", _function, "CPU")  # csrc calls it by this name
