"""The operators as differentiable functions: what a caller may call. This file alone knows gradients.

    lora_linear     y = x Wᵀ + b + s d(x) Aᵀ Bᵀ
    frozen_linear   y = x Wᵀ + b
    multi_lora      the same, where each row of x has its own adapter
    prefix_concat   rows [P ; x] with mask, positions and labels

Arguments are checked here, before any memory is touched; every error names the argument, what it is, and what was expected.

A backward is all that an operator has. NotImplementedError is raised inside torch.func's transforms, for tensors with a forward-mode tangent, and
where a backward is differentiated again.
"""

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"
    return repr(value)


def _wrong(name: str, value: Any, expected: str) -> ValueError:
    return ValueError(f"{name}: got {_describe(value)}, expected {expected}")


def _wrong_type(name: str, value: Any, expected: str) -> TypeError:
    return TypeError(f"{name}: got {type(value).__name__}, expected {expected}")


def _check_floats(value: Any, name: str) -> None:
    if not isinstance(value, Tensor):
        raise _wrong_type(name, value, "a torch.Tensor")
    if value.dtype not in FLOATS:
        raise _wrong(name, value, "float32, bfloat16, float16 or float64")


def _check_base(x: Tensor, weight: Tensor, bias: Tensor | None, autocast: bool) -> None:
    """x, weight and bias fit together; under autocast their dtypes may differ, since all three are cast."""
    _check_floats(weight, "weight")
    if x.dim() == 0:
        raise _wrong("x", x, "at least one dimension, the last of size K")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise _wrong("weight", weight, f"shape [N, {x.shape[-1]}] to match the last dimension of x {list(x.shape)}")
    if weight.dtype != x.dtype and not autocast:
        raise _wrong("weight", weight, f"x's dtype {x.dtype}")
    if weight.device != x.device:
        raise _wrong("weight", weight, f"x's device {x.device}")
    if bias is not None:
        _check_floats(bias, "bias")
        if bias.dim() != 1 or bias.shape[0] != weight.shape[0]:
            raise _wrong("bias", bias, f"shape [{weight.shape[0]}]")
        if bias.dtype != x.dtype and not autocast:
            raise _wrong("bias", bias, f"x's dtype {x.dtype}")
        if bias.device != x.device:
            raise _wrong("bias", bias, f"x's device {x.device}")
    if torch.is_grad_enabled():
        for value, name in ((weight, "weight"), (bias, "bias")):
            if value is not None and value.requires_grad:
                raise ValueError(
                    f"{name}: requires a gradient, expected a frozen tensor (call {name}.requires_grad_(False))"
                )


def _check_adapter(
    x: Tensor, dtype: torch.dtype, N: int, lora_a: Tensor, lora_b: Tensor, scale: float, which: str = ""
) -> None:
    """One adapter fits x and the weight; `dtype` is x's, after autocast."""
    _check_floats(lora_a, f"lora_a{which}")
    _check_floats(lora_b, f"lora_b{which}")
    if lora_a.dim() != 2 or lora_a.shape[1] != x.shape[-1]:
        raise _wrong(f"lora_a{which}", lora_a, f"shape [R, {x.shape[-1]}]")
    if lora_a.shape[0] < 1:
        raise _wrong(f"lora_a{which}", lora_a, "a rank of at least 1")
    if lora_b.dim() != 2 or lora_b.shape[0] != N or lora_b.shape[1] != lora_a.shape[0]:
        raise _wrong(f"lora_b{which}", lora_b, f"shape [{N}, {lora_a.shape[0]}]")
    if lora_a.dtype != dtype and lora_a.dtype != torch.float32:
        raise _wrong(f"lora_a{which}", lora_a, f"x's dtype {dtype} or float32")
    if lora_b.dtype != lora_a.dtype:
        raise _wrong(f"lora_b{which}", lora_b, f"lora_a's dtype {lora_a.dtype}")
    for value, name in ((lora_a, "lora_a"), (lora_b, "lora_b")):
        if value.device != x.device:
            raise _wrong(f"{name}{which}", value, f"x's device {x.device}")
    _check_number(scale, f"scale{which}")


def _check_number(value: Any, name: str) -> None:
    if isinstance(value, Tensor) or not isinstance(value, (int, float)):
        raise _wrong_type(name, value, "a float")
    if not -math.inf < value < math.inf:
        raise _wrong(name, value, "a finite number")


def _check_probability(value: Any, name: str) -> None:
    _check_number(value, name)
    if not 0 <= value <= 1:
        raise _wrong(name, value, "a probability between 0 and 1")


def _check_integers(value: Any, name: str, shape: Sequence[int], device: torch.device) -> None:
    if not isinstance(value, Tensor):
        raise _wrong_type(name, value, "an integer tensor")
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise _wrong(name, value, "an integer tensor")
    if tuple(value.shape) != tuple(shape):
        raise _wrong(name, value, f"shape {list(shape)}")
    if value.device != device:
        raise _wrong(name, value, f"device {device}")


class _Pending(NamedTuple):
    flag: Tensor  # one bool in pinned memory, written by the device
    event: "torch.cuda.Event"
    message: str


_pending: list[_Pending] = []
"""Values that a GPU found out of range and that no one has read back yet."""


def _check_in_range(numbers: Tensor, least: int, most: int, message: str, where: Tensor | None = None) -> None:
    """Raise IndexError where one of the numbers, or of those where `where` is not 0, is not among `least` to `most`: at once on a CPU; on a GPU
    at the first check after the device has got there.
    """
    if torch.compiler.is_compiling() or not numbers.numel():
        return
    if numbers.device.type == "cpu":
        lowest, highest = torch.aminmax(numbers)
        if lowest >= least and highest <= most:
            return
    bad = (numbers < least) | (numbers > most)
    if where is not None:
        bad &= where != 0
    if bad.device.type == "cpu":
        if bool(bad.any()):
            raise IndexError(message)
    elif bad.device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        raise_pending()
        flag = torch.empty(1, dtype=torch.bool, pin_memory=True)
        flag.copy_(bad.any().reshape(1), non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        _pending.append(_Pending(flag, event, message))


def raise_pending() -> None:
    """Raise the IndexError of an earlier call whose index was out of range on a GPU, if the device has found one. Never waits."""
    while _pending and _pending[0].event.query():
        found = _pending.pop(0)
        if bool(found.flag):
            raise IndexError(f"{found.message} (found on the GPU by an earlier call, whose rows are NaN)")


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast would give x Wᵀ here, or None where autocast is off or leaves x alone."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def _without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Autocast off, where it is on: the operators are told their dtypes."""
    on = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


def _draw_seed(dropout_p: float, training: bool, x: Tensor, *shape: int) -> Tensor | None:
    """A new dropout seed from torch's generator of x's device (so that checkpointing replays it), or None where nothing is dropped.

    shape: of the seed, one number unless told.
    """
    if not training or dropout_p == 0.0:
        return None
    return torch.randint(0, 2**63 - 1, shape, dtype=torch.int64, device=x.device)


PLAIN = "fastlora.restore(model), or plain PyTorch's operations, can do it"


def transform_obstacle() -> str | None:
    """Why an operator might leave out what torch wants beside the values, or None: all that it has is a backward."""
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func is at work (vmap, jvp, grad, ...)"
    return "forward-mode differentiation is on" if forward_ad._current_level >= 0 else None


def check_transforms(*tensors: Tensor | None) -> None:
    """Raise NotImplementedError where torch wants more of an operator on these tensors than it has."""
    obstacle = transform_obstacle()
    if obstacle is None:
        return
    plain = [tensor for tensor in tensors if tensor is not None]
    if torch._C._are_functorch_transforms_active() or any(
        forward_ad.unpack_dual(one).tangent is not None for one in plain
    ):
        raise NotImplementedError(f"fastlora: {obstacle}, for which the operators have no rule; {PLAIN}")


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


# The functions flatten x and dy themselves: as operations of their own, the views would cost autograd as much again as a small layer.


def _rows(x: Tensor) -> Tensor:  # [..., K] -> [M, K]
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _shaped(rows: Tensor, like: Tensor) -> Tensor:  # [M, N] and [..., K] -> [..., N]
    """Not a view in autograd's eyes, which would forbid to write into a function's result."""
    return rows if like.dim() == 2 else torch.ops.aten._unsafe_view.default(rows, [*like.shape[:-1], rows.shape[1]])


class LoRALinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, lora_a, lora_b, scale, dropout_p, seed):  # x [..., K] -> y [..., N]
        rows = _rows(x)
        y, xa, keep = torch.ops.fastlora.lora_linear(rows, weight, bias, lora_a, lora_b, scale, dropout_p, seed)
        ctx.save_for_backward(x, weight, lora_a, lora_b, xa, keep)
        ctx.scale, ctx.dropout_p = scale, dropout_p
        return _shaped(y, x)

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, dy):
        x, weight, lora_a, lora_b, xa, keep = saved
        need = ctx.needs_input_grad[0], ctx.needs_input_grad[3], ctx.needs_input_grad[4]
        with _without_autocast(dy.device):
            dx, da, db = torch.ops.fastlora.lora_linear_backward(
                _rows(dy), _rows(x), weight, lora_a, lora_b, xa, keep, ctx.scale, ctx.dropout_p, *need
            )
        dx = _shaped(dx, x) if need[0] else None
        return dx, None, None, da if need[1] else None, db if need[2] else None, None, None, None


def lora_linear(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K], frozen
    bias: Tensor | None,  # [N], frozen
    lora_a: Tensor,  # [R, K]
    lora_b: Tensor,  # [N, R]
    scale: float,
    *,
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:  # [..., N]
    """y = x Wᵀ + b + scale · d(x) Aᵀ Bᵀ: a frozen linear layer and its LoRA update (Hu et al. 2021, LoRA, section 4.1).

    x, weight and bias have one dtype (float32, bfloat16, float16 or float64); lora_a and lora_b have that dtype or float32. Any strides.
    d is inverted dropout with probability `dropout_p` on the adapter's input only; its seed comes from torch's generator. Under autocast x,
    weight and bias are cast as `nn.Linear` would cast them. Gradients go to x, lora_a and lora_b.

    Raises:
        TypeError: an argument is no tensor or no number.
        ValueError: a shape, dtype, device, rank, scale or probability does not fit, or weight or bias requires a gradient.
        fastlora.ops.ImplementationError: FASTLORA_IMPL names an implementation that cannot run.
    """
    _check_floats(x, "x")
    cast = _autocast_dtype(x)
    _check_base(x, weight, bias, autocast=cast is not None)
    _check_adapter(x, cast or x.dtype, weight.shape[0], lora_a, lora_b, scale)
    _check_probability(dropout_p, "dropout_p")
    check_transforms(x, weight, bias, lora_a, lora_b)
    if cast is not None:
        x, weight, bias = x.to(cast), weight.to(cast), None if bias is None else bias.to(cast)
    seed = _draw_seed(dropout_p, training, x)
    with _without_autocast(x.device):
        if torch.is_grad_enabled():
            return LoRALinearFunction.apply(x, weight, bias, lora_a, lora_b, float(scale), float(dropout_p), seed)
        y, _, _ = torch.ops.fastlora.lora_linear(
            _rows(x), weight, bias, lora_a, lora_b, float(scale), float(dropout_p), seed
        )
        return _shaped(y, x)


class LoRALinearSharedFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, scale, dropout_p, seed, *adapters):  # adapters: every A, then every B
        G = len(weight)
        lora_a, lora_b = list(adapters[:G]), list(adapters[G:])
        rows = _rows(x)
        ys, xa, keep = torch.ops.fastlora.lora_linear_shared(rows, weight, bias, lora_a, lora_b, scale, dropout_p, seed)
        ctx.save_for_backward(x, xa, keep, *weight, *adapters)
        ctx.scale, ctx.dropout_p = scale, dropout_p
        ctx.set_materialize_grads(False)
        return tuple(_shaped(y, x) for y in ys)

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, *dy):
        x, xa, keep, *tensors = saved
        G = len(dy)
        weight, lora_a, lora_b = tensors[:G], tensors[G : 2 * G], tensors[2 * G :]
        wanted = [wants and dy[i % G] is not None for i, wants in enumerate(ctx.needs_input_grad[6:])]
        dy = _with_zeros(dy, x, weight)
        need = ctx.needs_input_grad[0], any(wanted[:G]), any(wanted[G:])
        with _without_autocast(x.device):
            dx, da, db = torch.ops.fastlora.lora_linear_shared_backward(
                [_rows(d) for d in dy], _rows(x), weight, lora_a, lora_b, xa, keep, ctx.scale, ctx.dropout_p, *need
            )
        grads = [*_split(da, lora_a, wanted[:G]), *_split(db, lora_b, wanted[G:])]
        return _shaped(dx, x) if need[0] else None, None, None, None, None, None, *grads


def _with_zeros(dy: Sequence[Tensor | None], x: Tensor, weight: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of layers that share x, zeros for a layer whose result had no part in the loss: its A and B get no gradient, as if alone."""
    return [
        x.new_zeros(*x.shape[:-1], w.shape[0]) if gradient is None else gradient
        for gradient, w in zip(dy, weight, strict=True)
    ]


def _split(flat: Tensor, like: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    """Gradients that lie one after the other, each in its tensor's shape; None where none is wanted."""
    if not any(wanted):
        return [None] * len(like)
    parts = flat.split([one.numel() for one in like])
    return [part.view_as(one) if wants else None for part, one, wants in zip(parts, like, wanted, strict=True)]


def _check_one_a_layer(layers: int, **lists: Sequence[Any]) -> None:
    for name, values in lists.items():
        if len(values) != layers or not layers:
            raise _wrong(name, f"{len(values)} entries", f"one for each of the {layers} weights, at least 1")


def _cast_shared(
    x: Tensor, weight: Sequence[Tensor], bias: Sequence[Tensor | None], cast: torch.dtype | None
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """x, every weight and every bias as autocast has them; a layer without a bias has one without elements."""
    none = x.new_empty(0)
    weights, biases = list(weight), [none if b is None else b for b in bias]
    if cast is None:
        return x, weights, biases
    return x.to(cast), [w.to(cast) for w in weights], [b.to(cast) for b in biases]


def lora_linear_shared(
    x: Tensor,  # [..., K]
    weight: Sequence[Tensor],  # G of [N_i, K], frozen
    bias: Sequence[Tensor | None],  # G of [N_i], frozen
    lora_a: Sequence[Tensor],  # G of [R_i, K]
    lora_b: Sequence[Tensor],  # G of [N_i, R_i]
    scale: Sequence[float],  # G
    *,
    dropout_p: Sequence[float] | float = 0.0,
    training: bool = True,
) -> list[Tensor]:  # G of [..., N_i]
    """`lora_linear` of G layers that have the same x: it is read once for all of them, and their dx is one tensor.

    Each layer has its own dropout mask. All lora_a and lora_b have one dtype, x's or float32.

    Raises:
        TypeError, ValueError: as `lora_linear`; the message names the layer, as in lora_a[2].
    """
    _check_floats(x, "x")
    cast = _autocast_dtype(x)
    G = len(weight)
    probabilities = [dropout_p] * G if isinstance(dropout_p, (int, float)) else list(dropout_p)
    _check_one_a_layer(G, weight=weight, bias=bias, lora_a=lora_a, lora_b=lora_b, scale=scale, dropout_p=probabilities)
    for i in range(G):
        _check_base(x, weight[i], bias[i], autocast=cast is not None)
        _check_adapter(x, cast or x.dtype, weight[i].shape[0], lora_a[i], lora_b[i], scale[i], f"[{i}]")
        _check_probability(probabilities[i], f"dropout_p[{i}]")
        if lora_a[i].dtype != lora_a[0].dtype:
            raise _wrong(f"lora_a[{i}]", lora_a[i], f"the dtype of lora_a[0], {lora_a[0].dtype}")
    check_transforms(x, *weight, *bias, *lora_a, *lora_b)
    x, weights, biases = _cast_shared(x, weight, bias, cast)
    seed = _draw_seed(max(probabilities), training, x, G)
    scales, p = [float(s) for s in scale], [float(q) for q in probabilities]
    with _without_autocast(x.device):
        if torch.is_grad_enabled():
            return list(LoRALinearSharedFunction.apply(x, weights, biases, scales, p, seed, *lora_a, *lora_b))
        ys, _, _ = torch.ops.fastlora.lora_linear_shared(
            _rows(x), weights, biases, list(lora_a), list(lora_b), scales, p, seed
        )
        return [_shaped(y, x) for y in ys]


class FrozenLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):  # x [..., K] -> y [..., N]
        ctx.save_for_backward(weight)
        return _shaped(torch.ops.fastlora.frozen_linear(_rows(x), weight, bias), x)

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, dy):
        (weight,) = saved
        with _without_autocast(dy.device):
            return _shaped(torch.ops.fastlora.frozen_linear_backward(_rows(dy), weight), dy), None, None


def frozen_linear(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K], frozen
    bias: Tensor | None,  # [N], frozen
) -> Tensor:  # [..., N]
    """y = x Wᵀ + b: a frozen linear layer without an adapter. x is not kept for the backward; its gradient is the only one.

    dtypes, strides and autocast as in `lora_linear`.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: a shape, dtype or device does not fit, or weight or bias requires a gradient.
        fastlora.ops.ImplementationError: FASTLORA_IMPL names an implementation that cannot run.
    """
    _check_floats(x, "x")
    cast = _autocast_dtype(x)
    _check_base(x, weight, bias, autocast=cast is not None)
    check_transforms(x, weight, bias)
    if cast is not None:
        x, weight, bias = x.to(cast), weight.to(cast), None if bias is None else bias.to(cast)
    with _without_autocast(x.device):
        if torch.is_grad_enabled() and x.requires_grad:
            return FrozenLinearFunction.apply(x, weight, bias)
        return _shaped(torch.ops.fastlora.frozen_linear(_rows(x), weight, bias), x)


class RowGroups:
    """The rows of a mixed batch sorted by adapter; made once per forward by `group_rows` and passed to every layer.

    index: int64 [B] or any shape, the adapter of each example or row, -1 for none. adapters: S.
    """

    def __init__(self, index: Tensor, adapters: int) -> None:
        self.index = index
        self.adapters = adapters
        self._by_rows: dict[int, tuple[Tensor, Tensor]] = {}

    def for_rows(self, rows: int) -> tuple[Tensor, Tensor]:
        """(order [rows] int64, offsets [S + 3] int64) for an x of that many rows, a multiple of the index's elements."""
        found = self._by_rows.get(rows)  # kept here: another thread may clear them
        if found is None:
            if len(self._by_rows) >= 4:  # groups that outlive a forward see many row counts
                self._by_rows.clear()
            # Codes 0 (no adapter), 1 to S, and S + 1 for numbers that do not exist.
            code = torch.where(
                (self.index >= -1) & (self.index < self.adapters), self.index + 1, self.adapters + 1
            ).flatten()
            if code.numel() and rows != code.numel():
                code = code.repeat_interleave(rows // code.numel(), output_size=rows)
            ordered, order = torch.sort(code, stable=True)
            offsets = torch.searchsorted(ordered, torch.arange(self.adapters + 3, device=code.device))
            found = self._by_rows[rows] = order, offsets
        return found


def group_rows(index: Tensor, adapters: int) -> RowGroups:
    """Sort the rows of a mixed batch by adapter, on the index's device and without a sync.

    index: integer tensor, the adapter of each example ([B]) or of each row (x.shape[:-1]), from -1 (base only) to adapters - 1.

    Raises:
        TypeError, ValueError: index is no integer tensor, or there are no adapters.
        IndexError: an index is out of range. On a CUDA device it is raised by a later call instead, and those rows become NaN.
    """
    if not isinstance(index, Tensor):
        raise _wrong_type("index", index, "an integer tensor")
    _check_integers(index, "index", index.shape, index.device)
    if not isinstance(adapters, int):
        raise _wrong_type("adapters", adapters, "the number of adapters")
    if adapters < 1:
        raise _wrong("adapters", adapters, "at least 1")
    index = index.to(torch.int64, copy=True)  # sorted later, whatever becomes of the caller's
    _check_in_range(
        index,
        -1,
        adapters - 1,
        f"index: expected numbers from -1 to {adapters - 1} (one for each adapter, -1: base only)",
    )
    return RowGroups(index, adapters)


class MultiLoRAFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x, weight, bias, scale, dropout_p, seed, order, offsets, *adapters
    ):  # adapters: every A, then every B
        S = len(adapters) // 2
        lora_a, lora_b = list(adapters[:S]), list(adapters[S:])
        y, xa, keep = torch.ops.fastlora.multi_lora(
            _rows(x), weight, bias, lora_a, lora_b, scale, dropout_p, seed, order, offsets
        )
        ctx.save_for_backward(x, weight, xa, keep, order, offsets, *adapters)
        ctx.scale, ctx.dropout_p = scale, dropout_p
        return _shaped(y, x)

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, dy):
        x, weight, xa, keep, order, offsets, *adapters = saved
        S = len(adapters) // 2
        lora_a, lora_b = adapters[:S], adapters[S:]
        wanted = ctx.needs_input_grad[8:]
        need = ctx.needs_input_grad[0], any(wanted[:S]), any(wanted[S:])
        with _without_autocast(dy.device):
            dx, da, db = torch.ops.fastlora.multi_lora_backward(
                _rows(dy), _rows(x), weight, lora_a, lora_b, xa, keep, ctx.scale, ctx.dropout_p, order, offsets, *need
            )
        grads = [*_split(da, lora_a, wanted[:S]), *_split(db, lora_b, wanted[S:])]
        return _shaped(dx, x) if need[0] else None, None, None, None, None, None, None, None, *grads


def multi_lora(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K], frozen
    bias: Tensor | None,  # [N], frozen
    lora_a: Sequence[Tensor],  # S of [R_i, K]
    lora_b: Sequence[Tensor],  # S of [N, R_i]
    scale: Sequence[float],  # S
    index: Tensor | RowGroups,
    *,
    dropout_p: float | Sequence[float] = 0.0,
    training: bool = True,
) -> Tensor:  # [..., N]
    """Each row its own adapter: y = x Wᵀ + b + s_i · d_i(x) A_iᵀ B_iᵀ, and the base alone where i is -1.

    index: integer tensor, one an example (x.shape[0]) or one a row (x.shape[:-1]), or the `RowGroups` that `group_rows(index, S)` returns,
    made once per forward and passed to every layer. Ranks may differ; all adapters have one dtype, x's or float32. `dropout_p` is one
    probability for all or one an adapter. Gradients go to x and every lora_a and lora_b; an adapter without rows gets zeros.

    Raises:
        TypeError, ValueError: as `lora_linear`; the message names the adapter, as in lora_a[2].
        IndexError: an index is out of range (on a CUDA device raised by a later call; those rows become NaN).
    """
    _check_floats(x, "x")
    cast = _autocast_dtype(x)
    _check_base(x, weight, bias, autocast=cast is not None)
    scales, probabilities = _check_adapters(x, cast or x.dtype, weight.shape[0], lora_a, lora_b, scale, dropout_p)
    check_transforms(x, weight, bias, *lora_a, *lora_b)
    groups = _groups_of(x, index, len(lora_a))
    if cast is not None:
        x, weight, bias = x.to(cast), weight.to(cast), None if bias is None else bias.to(cast)

    order, offsets = groups.for_rows(math.prod(x.shape[:-1]))
    seed = _draw_seed(max(probabilities), training, x)
    with _without_autocast(x.device):
        if torch.is_grad_enabled():
            return MultiLoRAFunction.apply(
                x, weight, bias, scales, probabilities, seed, order, offsets, *lora_a, *lora_b
            )
        y, _, _ = torch.ops.fastlora.multi_lora(
            _rows(x), weight, bias, list(lora_a), list(lora_b), scales, probabilities, seed, order, offsets
        )
        return _shaped(y, x)


def _check_adapters(
    x: Tensor, dtype: torch.dtype, N: int, lora_a: Any, lora_b: Any, scale: Any, dropout_p: Any, of: str = ""
) -> tuple[list[float], list[float]]:
    """Raise unless S adapters fit x, as dtype, and N; returns their scales and probabilities. `of` stands behind the names: [1], a layer."""
    for name, values in (("lora_a", lora_a), ("lora_b", lora_b), ("scale", scale)):
        if isinstance(values, Tensor) or not isinstance(values, Sequence):
            raise _wrong_type(name + of, values, "a list with one entry an adapter")
    S = len(lora_a)
    if S < 1:
        raise _wrong(f"lora_a{of}", list(lora_a), "at least one adapter")
    if len(lora_b) != S:
        raise _wrong(f"lora_b{of}", f"{len(lora_b)} entries", f"{S}, one for each lora_a")
    if len(scale) != S:
        raise _wrong(f"scale{of}", list(scale), f"{S} numbers, one for each lora_a")
    for i in range(S):
        _check_adapter(x, dtype, N, lora_a[i], lora_b[i], scale[i], f"{of}[{i}]")
        if lora_a[i].dtype != lora_a[0].dtype:
            raise _wrong(f"lora_a{of}[{i}]", lora_a[i], f"the dtype of lora_a{of}[0], {lora_a[0].dtype}")
    if isinstance(dropout_p, (int, float)):
        dropout_p = [dropout_p] * S
    if isinstance(dropout_p, Tensor) or not isinstance(dropout_p, Sequence):
        raise _wrong_type(f"dropout_p{of}", dropout_p, "a probability, or a list with one an adapter")
    if len(dropout_p) != S:
        raise _wrong(f"dropout_p{of}", list(dropout_p), f"one probability, or {S}, one for each adapter")
    for i, p in enumerate(dropout_p):
        _check_probability(p, f"dropout_p{of}[{i}]")
    return [float(s) for s in scale], [float(p) for p in dropout_p]


class MultiLoRASharedFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x, weight, bias, scale, dropout_p, seed, order, offsets, *adapters
    ):  # adapters: every A of every layer, then every B
        half = len(adapters) // 2
        lora_a, lora_b = list(adapters[:half]), list(adapters[half:])
        ys, xa, keep = torch.ops.fastlora.multi_lora_shared(
            _rows(x), weight, bias, lora_a, lora_b, scale, dropout_p, seed, order, offsets
        )
        ctx.save_for_backward(x, xa, keep, order, offsets, *weight, *adapters)
        ctx.scale, ctx.dropout_p = scale, dropout_p
        ctx.set_materialize_grads(False)
        return tuple(_shaped(y, x) for y in ys)

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, *dy):
        x, xa, keep, order, offsets, *tensors = saved
        weight, adapters = tensors[: len(dy)], tensors[len(dy) :]
        half = len(adapters) // 2
        lora_a, lora_b = adapters[:half], adapters[half:]
        each = half // len(dy)  # adapters of a layer
        wanted = [wants and dy[i % half // each] is not None for i, wants in enumerate(ctx.needs_input_grad[8:])]
        dy = _with_zeros(dy, x, weight)
        need = ctx.needs_input_grad[0], any(wanted[:half]), any(wanted[half:])
        with _without_autocast(x.device):
            dx, da, db = torch.ops.fastlora.multi_lora_shared_backward(
                [_rows(d) for d in dy], _rows(x), weight, lora_a, lora_b, xa, keep, ctx.scale, ctx.dropout_p, order, offsets, *need
            )  # fmt: skip
        grads = [*_split(da, lora_a, wanted[:half]), *_split(db, lora_b, wanted[half:])]
        return _shaped(dx, x) if need[0] else None, None, None, None, None, None, None, None, *grads


def multi_lora_shared(
    x: Tensor,  # [..., K]
    weight: Sequence[Tensor],  # G of [N_g, K], frozen
    bias: Sequence[Tensor | None],  # G of [N_g], frozen
    lora_a: Sequence[Sequence[Tensor]],  # G of S of [R_gi, K]
    lora_b: Sequence[Sequence[Tensor]],  # G of S of [N_g, R_gi]
    scale: Sequence[Sequence[float]],  # G of S
    index: Tensor | RowGroups,
    *,
    dropout_p: float | Sequence[float | Sequence[float]] = 0.0,
    training: bool = True,
) -> list[Tensor]:  # G of [..., N_g]
    """`multi_lora` of G layers that have the same x, where a row has the same adapter in all of them: x is read once for all layers' A.

    Every layer has S adapters, whose ranks may differ, and its own dropout masks. All lora_a and lora_b have one dtype, x's or float32.
    `dropout_p` is one probability for all, or for each layer one or a list with one an adapter.

    Raises:
        TypeError, ValueError, IndexError: as `multi_lora`; the message names the layer, then the adapter, as in lora_a[1][2].
    """
    _check_floats(x, "x")
    cast = _autocast_dtype(x)
    G = len(weight)
    probabilities = [dropout_p] * G if isinstance(dropout_p, (int, float)) else list(dropout_p)
    _check_one_a_layer(G, weight=weight, bias=bias, lora_a=lora_a, lora_b=lora_b, scale=scale, dropout_p=probabilities)
    checked = []
    for g in range(G):
        _check_base(x, weight[g], bias[g], autocast=cast is not None)
        own = lora_a[g], lora_b[g], scale[g], probabilities[g]
        checked.append(_check_adapters(x, cast or x.dtype, weight[g].shape[0], *own, of=f"[{g}]"))
        if len(lora_a[g]) != len(lora_a[0]):
            raise _wrong(f"lora_a[{g}]", f"{len(lora_a[g])} adapters", f"{len(lora_a[0])}, as lora_a[0] has")
        if lora_a[g][0].dtype != lora_a[0][0].dtype:
            raise _wrong(f"lora_a[{g}][0]", lora_a[g][0], f"the dtype of lora_a[0][0], {lora_a[0][0].dtype}")
    every_a, every_b = ([one for own in column for one in own] for column in (lora_a, lora_b))
    check_transforms(x, *weight, *bias, *every_a, *every_b)
    groups = _groups_of(x, index, len(lora_a[0]))
    x, weights, biases = _cast_shared(x, weight, bias, cast)
    order, offsets = groups.for_rows(math.prod(x.shape[:-1]))
    scales, p = ([number for own in column for number in own] for column in zip(*checked, strict=True))
    seed = _draw_seed(max(p), training, x, G)
    with _without_autocast(x.device):
        if torch.is_grad_enabled():
            return list(
                MultiLoRASharedFunction.apply(x, weights, biases, scales, p, seed, order, offsets, *every_a, *every_b)
            )
        ys, _, _ = torch.ops.fastlora.multi_lora_shared(
            _rows(x), weights, biases, every_a, every_b, scales, p, seed, order, offsets
        )
        return [_shaped(y, x) for y in ys]


def _groups_of(x: Tensor, index: Tensor | RowGroups, adapters: int) -> RowGroups:
    """The RowGroups of an index for x [..., K], checked against x's shape and device."""
    if isinstance(index, Tensor):
        if tuple(index.shape) not in (tuple(x.shape[:1]), tuple(x.shape[:-1])):
            raise _wrong("index", index, f"shape {list(x.shape[:1])} (an example) or {list(x.shape[:-1])} (a row)")
        groups = group_rows(index, adapters)
    elif isinstance(index, RowGroups):
        groups = index
    else:
        raise _wrong_type("index", index, "an integer tensor or the RowGroups of group_rows")
    if groups.adapters != adapters:
        raise ValueError(f"index: expected RowGroups for {adapters} adapters, got them for another number")
    if groups.index.device != x.device:
        raise _wrong("index", groups.index, f"x's device {x.device}")
    given, rows = groups.index.numel(), math.prod(x.shape[:-1])
    # Only a flattened x [M, K] leaves open how many rows an example has.
    fits = rows % given == 0 if x.dim() == 2 and given else given in (x.shape[0], rows)
    if not fits:
        raise _wrong("index", groups.index, f"one number an example or a row of x {list(x.shape)}")
    return groups


class Prefixed(NamedTuple):
    """A batch with its prompts in front, W = T + longest prompt columns wide; ready for `model(inputs_embeds=...)`."""

    embeds: Tensor  # [B, W, D], zeros at padding
    attention_mask: Tensor  # [B, W], the given mask's dtype
    position_ids: Tensor  # [B, W] int64, 0 at padding
    labels: Tensor | None  # [B, W] int64, -100 at prompts and padding


class PrefixConcatFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        prompts,
        starts,
        max_prompt,
        prompt_index,
        embeds,
        input_ids,
        embedding,
        attention_mask,
        position_ids,
        labels,
    ):
        flat = _rows(prompts)  # [sum P_i, D]
        out, mask, positions, new_labels, source = torch.ops.fastlora.prefix_concat(
            flat,
            starts,
            max_prompt,
            prompt_index,
            embeds,
            input_ids,
            embedding,
            attention_mask,
            position_ids,
            labels,
        )
        ctx.save_for_backward(source)
        ctx.prompts, ctx.prompt_rows, ctx.tokens, ctx.dtype = (
            prompts.shape,
            flat.shape[0],
            attention_mask.shape[1],
            prompts.dtype,
        )
        ctx.mark_non_differentiable(mask, positions, new_labels)
        ctx.set_materialize_grads(False)  # or zeros would be made for these three
        return out, mask, positions, new_labels

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, dout, *_):
        grads: list[Tensor | None] = [None] * 10
        if dout is None:
            return tuple(grads)
        (source,) = saved
        need = ctx.needs_input_grad[0], ctx.needs_input_grad[4]
        dprompts, dembeds = torch.ops.fastlora.prefix_concat_backward(dout, source, ctx.prompt_rows, ctx.tokens, *need)
        if need[0]:
            grads[0] = dprompts.to(ctx.dtype).view(ctx.prompts)
        if need[1]:
            grads[4] = dembeds
        return tuple(grads)


def prefix_concat(
    prompts: Tensor | Sequence[Tensor],  # [S, P, D] or S of [P_i, D]
    embeds: Tensor | None,  # [B, T, D], or None with input_ids and embedding
    attention_mask: Tensor,  # [B, T]: not 0 at real tokens
    *,
    input_ids: Tensor | None = None,  # [B, T]
    embedding: Tensor | None = None,  # [V, D], frozen
    prompt_index: Tensor | None = None,  # [B]; None where there is one prompt
    labels: Tensor | None = None,  # [B, T]
    position_ids: Tensor | None = None,  # [B, T]
) -> Prefixed:
    """Soft prompts in front of a batch, right in any padding: each row equals that row run alone (Lester et al. 2021, section 2).

    A row is its prompt, then its real tokens, with the padding kept on the row's side; a row without padding goes where the batch's
    padded rows put theirs. Real tokens need not be adjacent: a mask with holes closes up. The width is T + the longest prompt.
    Positions count within the row; given ones move by the prompt's length. Gradients go to prompts and embeds, never to embedding.

    Raises:
        TypeError: an argument is no tensor (or no list of tensors, for prompts).
        ValueError: a shape, dtype or device does not fit, prompts is empty, or embedding requires a gradient.
        IndexError: a prompt or token number is out of range (on a CUDA device raised by a later call; those rows become NaN).
    """
    prompts, starts, lengths = _line_up(prompts)
    check_transforms(prompts, embeds, embedding)
    S, D, device = len(lengths), prompts.shape[-1], prompts.device
    if not isinstance(attention_mask, Tensor):
        raise _wrong_type("attention_mask", attention_mask, "a torch.Tensor")
    if attention_mask.dim() != 2 or attention_mask.is_complex():
        raise _wrong("attention_mask", attention_mask, "booleans or numbers of shape [B, T]")
    if attention_mask.device != device:
        raise _wrong("attention_mask", attention_mask, f"the prompts' device {device}")
    B, T = attention_mask.shape
    if embeds is None:
        if input_ids is None or embedding is None:
            raise ValueError(
                "embeds: got None, expected a tensor [B, T, D], or None together with input_ids and embedding"
            )
        _check_integers(input_ids, "input_ids", (B, T), device)
        _check_floats(embedding, "embedding")
        if embedding.dim() != 2 or embedding.shape[0] < 1 or embedding.shape[1] != D:
            raise _wrong("embedding", embedding, f"shape [V, {D}]")
        if embedding.device != device:
            raise _wrong("embedding", embedding, f"the prompts' device {device}")
        if torch.is_grad_enabled() and embedding.requires_grad:
            raise ValueError(
                "embedding: requires a gradient, expected a frozen tensor; look the tokens up yourself and pass embeds"
            )
        V = embedding.shape[0]
        input_ids = input_ids.long()
        expected = f"input_ids: expected numbers from 0 to {V - 1} (embedding [{V}, {D}])"
        _check_in_range(input_ids, 0, V - 1, expected, attention_mask)
    else:
        if input_ids is not None or embedding is not None:
            raise ValueError("embeds: got a tensor, expected None where input_ids or embedding is given")
        _check_floats(embeds, "embeds")
        if tuple(embeds.shape) != (B, T, D):
            raise _wrong("embeds", embeds, f"shape {[B, T, D]}")
        if embeds.device != device:
            raise _wrong("embeds", embeds, f"the prompts' device {device}")
    if prompt_index is None:
        if S != 1:
            raise ValueError(
                f"prompt_index: got None, expected a tensor [{B}] that says which of the {S} prompts each row has"
            )
        prompt_index = torch.zeros(B, dtype=torch.int64, device=device)
    else:
        _check_integers(prompt_index, "prompt_index", (B,), device)
        prompt_index = prompt_index.long()
        _check_in_range(prompt_index, 0, S - 1, f"prompt_index: expected numbers from 0 to {S - 1} ({S} prompts)")
    for value, name in ((labels, "labels"), (position_ids, "position_ids")):
        if value is not None:
            _check_integers(value, name, (B, T), device)
    if labels is input_ids and labels is not None:
        labels = labels.view_as(labels)  # the same tensor twice is more than torch.compile takes
    out, mask, positions, new_labels = PrefixConcatFunction.apply(
        prompts,
        starts,
        max(lengths),
        prompt_index,
        embeds,
        input_ids,
        embedding,
        attention_mask,
        None if position_ids is None else position_ids.long(),
        None if labels is None else labels.long(),
    )
    return Prefixed(out, mask, positions, None if labels is None else new_labels)


def _line_up(prompts: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor, list[int]]:
    """All prompts one after the other, [sum P_i, D] or as given [S, P, D]; where each begins [S + 1] int64, and their lengths."""
    if isinstance(prompts, Tensor):
        _check_floats(prompts, "prompts")
        if prompts.dim() != 3 or prompts.shape[0] < 1:
            raise _wrong("prompts", prompts, "shape [S, P, D] with at least one prompt")
        S, length, _ = prompts.shape
        starts = torch.arange(S + 1, device=prompts.device).mul_(length)
        return prompts, starts, [length] * S
    if not isinstance(prompts, Sequence):
        raise _wrong_type("prompts", prompts, "a tensor [S, P, D] or a list of [P_i, D]")
    if len(prompts) < 1:
        raise _wrong("prompts", list(prompts), "at least one prompt")
    for i, prompt in enumerate(prompts):
        _check_floats(prompt, f"prompts[{i}]")
        if prompt.dim() != 2:
            raise _wrong(f"prompts[{i}]", prompt, "shape [P, D]")
        first = prompts[0]
        if prompt.shape[1] != first.shape[1] or prompt.dtype != first.dtype or prompt.device != first.device:
            raise _wrong(f"prompts[{i}]", prompt, f"width, dtype and device of prompts[0], {_describe(first)}")
    lengths = [prompt.shape[0] for prompt in prompts]
    flat = torch.cat(list(prompts))
    return flat, torch.tensor([0, *lengths], device=flat.device).cumsum(0), lengths
