"""y = x rstd w with rstd = 1 / sqrt(mean(x²) + eps): a frozen root mean square norm, as Llama's, in one pass over x.

The equation and its gradient are fastlora/reference.py::rms_norm and rms_norm_backward.
"""

import torch
from torch import Tensor

from fastlora import checks, ops
from fastlora.checks import wrong
from fastlora.choice import problems
from fastlora.choice.problems import Call, Draw, Measured, row_classes, tensors_of
from fastlora.gradients import differentiable_once, is_eager, rows_of, shaped


def run(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """reference.py::rms_norm, by the implementation that was chosen."""
    choice = ops.choose("rms_norm", x, x.shape[0], x.numel(), dropout=False)
    return ops.implementations["rms_norm", choice.implementation](x, weight, eps)


def run_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """reference.py::rms_norm_backward, by the implementation that was chosen."""
    choice = ops.choose("rms_norm_backward", x, x.shape[0], x.numel(), dropout=False)
    return ops.implementations["rms_norm_backward", choice.implementation](dy, x, weight, rstd)


def _fake(x, weight, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))


def _fake_backward(dy, x, weight, rstd):
    return x.new_empty(x.shape)


ops.define("rms_norm", "(Tensor x, Tensor weight, float eps) -> (Tensor y, Tensor rstd)", run, _fake)
ops.define(
    "rms_norm_backward", "(Tensor dy, Tensor x, Tensor weight, Tensor rstd) -> Tensor", run_backward, _fake_backward
)


class RMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):  # x [..., D] -> y [..., D]
        y, rstd = compute(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, dy):
        x, weight, rstd = saved
        call = run_backward if is_eager(dy, x, weight, rstd) else torch.ops.fastlora.rms_norm_backward
        return shaped(call(rows_of(dy), rows_of(x), weight, rstd), x), None, None


def compute(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y [..., D] and rstd without a gradient, past the dispatcher where nobody traces."""
    y, rstd = (run if is_eager(x, weight) else torch.ops.fastlora.rms_norm)(rows_of(x), weight, eps)
    return shaped(y, x), rstd


def rms_norm(
    x: Tensor,  # [..., D]
    weight: Tensor,  # [D], x's dtype, frozen
    eps: float,
) -> Tensor:  # [..., D]
    """y = x w / sqrt(mean(x²) + eps) along the last dimension, summed and scaled in float32 and rounded once (Zhang and Sennrich 2019).

    Raises:
        TypeError: an argument is no tensor, or eps no number.
        ValueError: a shape, dtype or device does not fit, or weight requires a gradient.
        fastlora.ops.ImplementationError: FASTLORA_IMPL names an implementation that cannot run.
    """
    checks.check_floats(x, "x")
    checks.check_floats(weight, "weight")
    checks.check_number(eps, "eps")
    if x.dim() == 0 or weight.shape != x.shape[-1:]:
        raise wrong("weight", weight, f"shape [D], the last dimension of x {list(x.shape)}")
    if weight.dtype != x.dtype or weight.device != x.device:
        raise wrong("weight", weight, f"x's dtype {x.dtype} and device {x.device}")
    checks.check_frozen(weight=weight)
    checks.check_transforms(x, weight)
    if torch.is_grad_enabled() and x.requires_grad:
        return RMSNormFunction.apply(x, weight, eps)
    return compute(x, weight, eps)[0]


def calls(M: int, D: int, _: int, dtype: torch.dtype, device: torch.device, dropout: bool) -> dict[str, list[Call]]:
    """Arguments of the operator and of its backward (choice/problems.py)."""
    draw = Draw(dtype, device)
    x, weight, dy = draw.normal(M, D), draw.normal(D), draw.normal(M, D)
    return {"rms_norm": [(x, weight, 1e-6)], "rms_norm_backward": [(dy, x, weight, x.float().square().mean(1).rsqrt())]}


problems.operators["rms_norm"] = Measured(calls, row_classes, tensors_of)
