"""What the autograd Functions of all operators have in common: a backward, and no derivative of it."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastlora.checks import PLAIN


class _DifferentiatedTwice(torch.autograd.Function):
    """Gradients, and what they depend on: whoever differentiates them by it is told that this cannot be done."""

    @staticmethod
    def forward(ctx, function, sources, *tensors):  # tensors: that many sources, then the gradients
        ctx.function = function
        return tuple(gradient.detach() for gradient in tensors[sources:])

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(
            f"fastlora: {ctx.function} cannot be differentiated twice (create_graph=True); {PLAIN}"
        )


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A Function's backward, given (ctx, saved tensors, *dy), without a graph of its own; differentiating its results raises.

    Torch's once_differentiable raises only where dy requires a gradient, and is not reached on the way to x, A and B, on which dx depends as well:
    a penalty on dx would train nothing, in silence.
    """

    @functools.wraps(backward)
    def run(ctx, *dy):
        saved = ctx.saved_tensors  # asked for once: more is too often for checkpointing
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return backward(ctx, saved, *dy)
        with torch.no_grad():
            grads = backward(ctx, saved, *dy)
        grads = grads if isinstance(grads, tuple) else (grads,)
        sources = [tensor for tensor in (*saved, *dy) if tensor is not None and tensor.requires_grad]
        present = [gradient for gradient in grads if gradient is not None]
        if not sources:
            return grads
        wrapped = iter(_DifferentiatedTwice.apply(ctx.name(), len(sources), *sources, *present))
        return tuple(None if gradient is None else next(wrapped) for gradient in grads)

    return run


# Functions flatten x and dy themselves: as operations of their own, the views would cost autograd as much again as a small layer.


def rows_of(x: Tensor) -> Tensor:  # [..., K] -> [M, K]
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def shaped(rows: Tensor, like: Tensor) -> Tensor:  # [M, N] and [..., K] -> [..., N]
    """By _unsafe_view: autograd forbids in-place writes to a Function's result that is a view."""
    return rows if like.dim() == 2 else torch.ops.aten._unsafe_view.default(rows, [*like.shape[:-1], rows.shape[1]])


def split(flat: Tensor, like: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    """Gradients that lie one after the other, each in its tensor's shape; None where none is wanted."""
    if not any(wanted):
        return [None] * len(like)
    if len(like) == 1:
        return [flat.view_as(like[0])]
    parts = flat.split_with_sizes([one.numel() for one in like])  # Tensor.split is Python
    return [part.view_as(one) if wants else None for part, one, wants in zip(parts, like, wanted, strict=True)]


PLAIN_TYPES = {Tensor, torch.nn.Parameter, type(None)}
"""Of what an operator takes without a tracer; frozen/quantised.py adds its own."""
_SELECT, _VIEWS = (
    torch._C.DispatchKeySet(key) for key in (torch._C.DispatchKey.BackendSelect, torch._C.DispatchKey.ADInplaceOrView)
)
PLAIN_KEYS = frozenset(((_SELECT | _VIEWS).raw_repr(), _SELECT.raw_repr()))
"""What a thread adds to the tensors' own keys in the dispatcher, the latter in inference mode; modes, tracers and vmap would show there."""

_thread_keys = torch._C._dispatch_tls_local_include_set


def is_eager(x: Tensor, *others: Tensor | None) -> bool:
    """Whether an operator may be called past torch's dispatcher, which saves a small layer a tenth of its time: nobody traces, all are plain.

    All are on x's device; on meta there is nothing to compute with.
    """
    return (
        not torch.compiler.is_compiling()
        and not x.is_meta
        and type(x) in PLAIN_TYPES
        and PLAIN_TYPES.issuperset(map(type, others))
        and _thread_keys().raw_repr() in PLAIN_KEYS
    )
