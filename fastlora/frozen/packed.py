"""Packed copies of frozen weights, which never change: laid out once the way oneDNN likes them, where that was measured to pay on this kind of
machine (products.py). They are found by the weight's place in its storage and stand outside every module: no state dict, pickle or deepcopy sees
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
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from fastlora import ops

MEMORY_SHARE = 16  # the default budget is the machine's memory over this
WITHOUT_SYSCONF = 2**30  # the default budget in bytes where the system does not tell its memory

_fingerprint = ops.native("fingerprint_cpu")


@functools.cache
def suits_onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies operands of this dtype here as exactly as torch: not float32 (products.py), and float16 by way of float32."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype is torch.float16 or (dtype is torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


@functools.cache
def has_library(dtype: torch.dtype) -> bool:
    """Whether torch leaves products of this dtype to a library here. Else it loops itself, at a twentieth of float32's rate, and where the second
    operand lies by column at a hundredth and less (AMD Zen 3, torch 2.13, 2026-11-30)."""
    asked = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    return asked is None or (torch.backends.mkldnn.is_available() and bool(getattr(torch.ops.mkldnn, asked)()))


def packs(dtype: torch.dtype) -> bool:
    """Whether weights of this dtype may have copies here: the native extension must be there, which reads their fingerprints."""
    return _fingerprint is not None and suits_onednn(dtype)


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


# A transform of torch.func makes such tensors: of class Tensor, without memory.
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


def _is_plain(tensor: Any) -> bool:
    """Whether it is a matrix in memory, and no quantised, sharded or other special tensor."""
    plain = type(tensor) in (nn.Parameter, Tensor) and tensor.layout == torch.strided and tensor.dim() == 2
    return plain and not _is_wrapped(tensor)


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


class Registered:
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

    def keep(self, ways: set[tuple[int, ...]]) -> None:
        """Free the copies of other strides than these."""
        for way in self.copies.keys() - ways:
            share = self.bytes // len(self.copies)  # one is as large as the other
            del self.copies[way]
            self.bytes -= share
            self.budget.held -= share

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
_by_key: dict[Key, Registered] = {}

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
        registered = _by_key.setdefault(_key_of(owner), Registered(owner, budget))
        registered.drop()
        registered.budget = budget
        registered.owners[id(owner)] = _version_of(owner)
    return True


def release(owner: Tensor) -> Budget | None:
    """Undo `register`, and free the copies; the budget that they counted in, None for a weight that is not registered."""
    registered = _by_key.get(_key_of(owner)) if _is_plain(owner) else None
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


@contextmanager
def as_found() -> Iterator[None]:
    """Copies that are made inside are freed at its end: what a model is asked for between two steps of its training takes none of the budget."""
    before = {key: set(registered.copies) for key, registered in _by_key.items()}
    try:
        yield
    finally:
        with _lock:
            for key, registered in _by_key.items():
                registered.keep(before.get(key, set()))


def drop(weight: Tensor) -> None:
    """Free the copies of a weight, if it has any; they are made anew when wanted."""
    registered = _by_key.get(_key_of(weight)) if _by_key and _is_plain(weight) else None
    if registered is not None:
        with _lock:
            registered.drop()


@torch._disable_dynamo  # after a compiled step, too; torch breaks its graph there anyway
def _drop_what_was_trained(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """After every step of every optimiser: fused ones write what no version counts, and perhaps little of a weight."""
    if not _by_key:
        return
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    # Of any shape and class: a flat one may lie over many weights.
    trained = {
        parameter.untyped_storage()._cdata
        for parameter in parameters
        if parameter.layout is torch.strided and not nn.parameter.is_lazy(parameter) and not _is_wrapped(parameter)
    }
    with _lock:
        for registered in _by_key.values():
            if registered.key[0] in trained:
                registered.drop()


register_optimizer_step_post_hook(_drop_what_was_trained)


def _holds(storage: torch.UntypedStorage, key: Key) -> bool:
    """Whether the matrix lies within the storage, which may have been resized."""
    _, offset, n, k, down, right, dtype = key
    return storage.nbytes() >= (offset + (n - 1) * down + (k - 1) * right + 1) * dtype.itemsize


def copy_bytes(weight: Tensor) -> int:
    """The bytes of one copy of a weight."""
    return weight.numel() * (4 if weight.dtype is torch.float16 else weight.element_size())


def find(weight: Tensor) -> Registered | None:
    """What is registered for a weight, or for another tensor over the same elements, without copies that are not of what is there now."""
    registered = _by_key.get(_key_of(weight)) if _by_key and _is_plain(weight) else None
    if registered is None:
        return None
    if weight.requires_grad or weight.is_inference() or not _holds(weight.untyped_storage(), registered.key):
        with _lock:
            registered.drop()
        return None
    registered.look(weight)
    return registered


def find_copy(weight: Tensor) -> Tensor | None:
    """A copy of the weight as it is now, made if it has room; None where there can be none."""
    registered = find(weight)
    if registered is None:
        return None
    copy = registered.copies.get(weight.stride())
    return registered.pack(weight) if copy is None else copy
