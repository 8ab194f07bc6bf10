"""c = m / ‖W + s B A‖: what a DoRA layer multiplies each column of its result by. The norm counts as a constant in the backward.

The equation and its gradient are fastlora/reference.py::dora_factor and dora_factor_backward. W + s B A is never there as a whole: a few rows at a
time are added up, squared and summed in a cache. That reads W once, as the sum of ‖W‖², 2 s W Aᵀ Bᵀ and s² B A Aᵀ Bᵀ would, without its
cancellation where an adapter takes away what W has.

A layer that answers one token after the other asks for the same norms each time, and keeps them where it runs without gradients on a CPU. Before each
use W is looked at as frozen/packed.py looks at a weight that has a copy, and A and B, which are what training writes to, in every element.

Of a quantised W it is the norms of what the product multiplies by, in the dtype that it is computed in: a panel at a time is dequantised.
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from fastlora import checks, ops
from fastlora.checks import wrong
from fastlora.frozen import quantised
from fastlora.frozen.quantised import QuantisedWeight
from fastlora.gradients import differentiable_once, is_eager
from fastlora.ops import Choice

ELEMENTS_AT_ONCE = {"cpu": 2**19}  # of W + s B A: 2 MiB in float32, which stay in a cache
ELEMENTS_ELSEWHERE = 2**24


def choose(weight: Tensor) -> Choice:
    """Which implementation runs `dora_factor` on a weight like this [N, K]."""
    if ops.forced == "reference":
        return Choice("reference", "FASTLORA_IMPL")
    if type(weight) is QuantisedWeight:
        return Choice("panels", f"{weight.title} dequantised a panel at a time")
    if weight.stride(1) == 1 and ops.obstacle_of("dora_factor", "cpu", weight.device, weight.dtype) is None:
        return Choice("cpu", "native C++, a few rows of the weight at a time")
    return Choice("blocks", "a few rows of the weight at a time")


def run(magnitude: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """reference.py::dora_factor, by the implementation that was chosen."""
    return ops.implementations["dora_factor", choose(weight).implementation](magnitude, weight, *rest)


def run_backward(dfactor: Tensor, magnitude: Tensor, norm: Tensor) -> Tensor:
    """reference.py::dora_factor_backward."""
    return ops.implementations["dora_factor_backward", "reference"](dfactor, magnitude, norm)


def _fake(magnitude, weight, lora_a, lora_b, scale):
    factor = weight.new_empty(weight.shape[0], dtype=torch.promote_types(weight.dtype, torch.float32))
    return factor, torch.empty_like(factor)


def _fake_backward(dfactor, magnitude, norm):
    return torch.empty_like(magnitude)


ops.define(
    "dora_factor",
    "(Tensor magnitude, Tensor weight, Tensor lora_a, Tensor lora_b, float scale) -> (Tensor factor, Tensor norm)",
    run,
    _fake,
)
ops.define(
    "dora_factor_backward", "(Tensor dfactor, Tensor magnitude, Tensor norm) -> Tensor", run_backward, _fake_backward
)


class DoRAFactorFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, magnitude, weight, lora_a, lora_b, scale):  # -> factor [N]
        factor, norm = compute(magnitude, weight, lora_a, lora_b, scale)
        ctx.save_for_backward(magnitude, norm)
        return factor

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, dfactor):
        magnitude, norm = saved
        call = run_backward if is_eager(dfactor, magnitude, norm) else torch.ops.fastlora.dora_factor_backward
        return call(dfactor, magnitude, norm), None, None, None, None


def compute(magnitude: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """(factor, norm) without a gradient, past the dispatcher where nobody traces."""
    call = run if is_eager(magnitude, *rest[:3]) else torch.ops.fastlora.dora_factor
    return call(magnitude, *rest)


def apply(magnitude: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """The operator, differentiable, on arguments that its caller has checked."""
    with checks.without_autocast(weight.device):
        if torch.is_grad_enabled() and magnitude.requires_grad:
            return DoRAFactorFunction.apply(magnitude, weight, lora_a, lora_b, scale)
        with torch.no_grad():
            return compute(magnitude, weight, lora_a, lora_b, scale)[0]


SEEN_DTYPES = (*ops.KERNEL_DTYPES, torch.uint8, torch.int8)
_fingerprint = ops.native("fingerprint_cpu")
_steps = 0


@torch._disable_dynamo
def _count_step(*_: Any) -> None:
    """After every step of every optimiser: fused ones write what no version counts, and perhaps little of a weight."""
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)


class KeptNorm:
    """The norms of one layer's W + s B A as they were computed last, and what W, s, A and B were then."""

    def __init__(self) -> None:
        self.found: tuple[tuple[Any, ...], Tensor] | None = (
            None  # state, norm [N]: written and read in one piece, by any thread
        )


def _state_of(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> tuple[Any, ...] | None:
    """What shows that one of them was written to; None where nothing would."""
    if type(weight) is QuantisedWeight:
        parts = [one.view(1, -1) for one in weight.stored if isinstance(one, Tensor)]
    else:
        parts = [weight]
    tensors = *parts, lora_a, lora_b
    if _fingerprint is None or not is_eager(*tensors) or any(one.is_inference() for one in tensors):
        return None
    if any(one.device.type != "cpu" or one.dtype not in SEEN_DTYPES for one in tensors):
        return None
    seen = *((one.data_ptr(), one._version) for one in tensors), *(_fingerprint(one, True) for one in (lora_a, lora_b))
    return _steps, ops.forced, scale, weight.dtype, seen, tuple(map(_fingerprint, parts))


def apply_kept(
    kept: KeptNorm, magnitude: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float
) -> Tensor:
    """`apply`; without gradients the norms are kept until W, s, A or B change. What passes is a write to a part of W, as frozen/packed.py tells."""
    state = None if torch.is_grad_enabled() else _state_of(weight, lora_a, lora_b, scale)
    if state is None or not is_eager(magnitude, weight):
        return apply(magnitude, weight, lora_a, lora_b, scale)
    if kept.found is not None and kept.found[0] == state:
        norm = kept.found[1]
        return magnitude.to(norm.dtype) / norm
    factor, norm = compute(magnitude, weight, lora_a, lora_b, scale)
    kept.found = state, norm
    return factor


def dora_factor(
    magnitude: Tensor,  # [N]
    weight: Tensor,  # [N, K], frozen
    lora_a: Tensor,  # [R, K]
    lora_b: Tensor,  # [N, R]
    scale: float,
) -> Tensor:  # [N]
    """c = m / ‖W + scale · B A‖, row by row: the factors of a DoRA layer, for `scale_columns` (Liu et al. 2024, DoRA, equation 5).

    In float32, or float64 for a float64 weight. magnitude, lora_a and lora_b have the weight's dtype or float32. The gradient goes to
    magnitude alone: the norm counts as a constant, as the paper has it (section 4.3).

    Raises:
        TypeError: an argument is no tensor or no number.
        ValueError: a shape, dtype or device does not fit, or weight requires a gradient.
    """
    checks.check_floats(weight, "weight")
    if weight.dim() != 2:
        raise wrong("weight", weight, "shape [N, K]")
    (N, K), allowed = weight.shape, (weight.dtype, torch.float32)
    checks.check_floats(lora_a, "lora_a")
    R = lora_a.shape[0] if lora_a.dim() else 0
    for value, name, shape in ((magnitude, "magnitude", (N,)), (lora_a, "lora_a", (R, K)), (lora_b, "lora_b", (N, R))):
        checks.check_floats(value, name)
        if value.shape != shape or value.dtype not in allowed or value.device != weight.device:
            raise wrong(name, value, f"{weight.dtype} or float32 {list(shape)} on {weight.device}")
    checks.check_number(scale, "scale")
    checks.check_frozen(weight=weight)
    checks.check_transforms(magnitude, weight, lora_a, lora_b)
    return apply(magnitude, weight, lora_a, lora_b, float(scale))


def _in_blocks(
    magnitude: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(weight.dtype, torch.float32)
    N, K = weight.shape
    a, b, norm = lora_a.to(wide), lora_b.to(wide), weight.new_empty(N, dtype=wide)
    rows = max(1, ELEMENTS_AT_ONCE.get(weight.device.type, ELEMENTS_ELSEWHERE) // max(K, 1))
    room = a.new_empty(min(rows, N), K)
    for start in range(0, N, rows):
        w = weight[start : start + rows]
        torch.addmm(w.to(wide), b[start : start + rows], a, alpha=scale, out=room[: len(w)])
        torch.linalg.vector_norm(room[: len(w)], dim=1, out=norm[start : start + rows])
    return magnitude.to(wide) / norm, norm


def _in_panels(magnitude: Tensor, weight: Any, lora_a: Tensor, lora_b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(weight.compute, torch.float32)
    norm = magnitude.new_empty(weight.shape[0], dtype=wide)
    for first, count in quantised.panels(weight, 0):
        rows, panel = slice(first, first + count), weight.panel(first, count, 0, weight.shape[1])
        norm[rows] = run(magnitude[rows], panel, lora_a, lora_b[rows], scale)[1]
    return magnitude.to(wide) / norm, norm


_norm = ops.native("dora_norm_cpu")


def _by_native_code(
    magnitude: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    norm = _norm(weight, lora_a.float(), lora_b.float(), scale)
    return magnitude.float() / norm, norm


ops.implement("dora_factor", "blocks", _in_blocks)
ops.implement("dora_factor", "panels", _in_panels)
if _norm is not None:
    ops.implement("dora_factor", "cpu", _by_native_code)
