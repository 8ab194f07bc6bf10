"""y = c ∘ u + b: one factor a column, in one pass over u, with its gradient for c: the epilogue of DoRA's layers and of IA³'s.

The equation and its gradients are fastlora/reference.py::scale_columns and scale_columns_backward.
"""

import torch
from torch import Tensor

from fastlora import checks, ops
from fastlora.checks import wrong
from fastlora.gradients import differentiable_once, is_eager, rows_of, shaped
from fastlora.ops import Choice


def choose(u: Tensor, backward: bool = False) -> Choice:
    """Which implementation runs `scale_columns`, or its backward, on inputs like u [M, N]. "triton" and "cuda" have none of their own and, forced,
    leave it to torch.
    """
    if ops.forced in ("triton", "cuda"):
        return Choice("reference", "FASTLORA_IMPL")
    return ops.choose("scale_columns" + "_backward" * backward, u, u.shape[0], u.numel(), dropout=False)


def run(u: Tensor, factor: Tensor, bias: Tensor | None) -> Tensor:
    """reference.py::scale_columns, by the implementation that was chosen."""
    return ops.implementations["scale_columns", choose(u).implementation](u, factor, bias)


def run_backward(dy: Tensor, u: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """reference.py::scale_columns_backward, by the implementation that was chosen."""
    return ops.implementations["scale_columns_backward", choose(u, backward=True).implementation](dy, u, factor)


def _fake(u, factor, bias):
    return u.new_empty(u.shape)


def _fake_backward(dy, u, factor):
    return u.new_empty(u.shape), torch.empty_like(factor)


ops.define("scale_columns", "(Tensor u, Tensor factor, Tensor? bias) -> Tensor", run, _fake)
ops.define(
    "scale_columns_backward",
    "(Tensor dy, Tensor u, Tensor factor) -> (Tensor du, Tensor dfactor)",
    run_backward,
    _fake_backward,
)


class ScaleColumnsFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, factor, bias):  # u [..., N] -> y [..., N]
        ctx.save_for_backward(u, factor)
        return compute(u, factor, bias)

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, dy):
        u, factor = saved
        call = run_backward if is_eager(dy, u, factor) else torch.ops.fastlora.scale_columns_backward
        du, dfactor = call(rows_of(dy), rows_of(u), factor)
        return shaped(du, u), dfactor, None


def compute(u: Tensor, factor: Tensor, bias: Tensor | None) -> Tensor:
    """y [..., N] without a gradient, past the dispatcher where nobody traces."""
    call = run if is_eager(u, factor, bias) else torch.ops.fastlora.scale_columns
    return shaped(call(rows_of(u), factor, bias), u)


def apply(u: Tensor, factor: Tensor, bias: Tensor | None) -> Tensor:
    """The operator, differentiable, on arguments that its caller has checked."""
    if torch.is_grad_enabled() and (u.requires_grad or factor.requires_grad):
        return ScaleColumnsFunction.apply(u, factor, bias)
    return compute(u, factor, bias)


def scale_columns(
    u: Tensor,  # [..., N]
    factor: Tensor,  # [N]
    bias: Tensor | None = None,  # [N], frozen
) -> Tensor:  # [..., N]
    """y = c ∘ u + b: one factor a column, computed in float32 and rounded once.

    u and bias have one dtype (float32, bfloat16, float16 or float64); factor is float32, or float64 beside a float64 u. Gradients go to u and
    factor.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: a shape, dtype or device does not fit, or bias requires a gradient.
        fastlora.ops.ImplementationError: FASTLORA_IMPL names an implementation that cannot run.
    """
    checks.check_floats(u, "u")
    checks.check_floats(factor, "factor")
    if u.dim() == 0:
        raise wrong("u", u, "at least one dimension, the last of size N")
    wide = torch.promote_types(u.dtype, torch.float32)
    if factor.shape != u.shape[-1:] or factor.dtype != wide or factor.device != u.device:
        raise wrong("factor", factor, f"{wide} [{u.shape[-1]}] on {u.device}")
    if bias is not None:
        checks.check_floats(bias, "bias")
        if bias.shape != u.shape[-1:] or bias.dtype != u.dtype or bias.device != u.device:
            raise wrong("bias", bias, f"{u.dtype} [{u.shape[-1]}] on {u.device}")
    checks.check_frozen(bias=bias)
    checks.check_transforms(u, factor, bias)
    return apply(u, factor, bias)
