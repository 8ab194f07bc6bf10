"""y = silu(gate) up: what a gated MLP, as Llama's, does between its products, in one pass over gate and up, which is all that is kept.

The equation and its gradients are fastlora/reference.py::swiglu and swiglu_backward.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora import checks, ops
from fastlora.checks import wrong
from fastlora.choice import problems
from fastlora.choice.problems import Call, Draw, Measured, row_classes, tensors_of
from fastlora.gradients import differentiable_once, is_eager, rows_of, shaped


def run(gate: Tensor, up: Tensor) -> Tensor:
    """reference.py::swiglu, by the implementation that was chosen."""
    choice = ops.choose("swiglu", gate, gate.shape[0], gate.numel(), dropout=False)
    return ops.implementations["swiglu", choice.implementation](gate, up)


def run_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """reference.py::swiglu_backward, by the implementation that was chosen."""
    choice = ops.choose("swiglu_backward", gate, gate.shape[0], gate.numel(), dropout=False)
    return ops.implementations["swiglu_backward", choice.implementation](dy, gate, up)


def _fake(gate, up):
    return gate.new_empty(gate.shape)


def _fake_backward(dy, gate, up):
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


ops.define("swiglu", "(Tensor gate, Tensor up) -> Tensor", run, _fake)
ops.define(
    "swiglu_backward", "(Tensor dy, Tensor gate, Tensor up) -> (Tensor dgate, Tensor dup)", run_backward, _fake_backward
)


class SwiGLUFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):  # [..., F] each -> y [..., F]
        ctx.save_for_backward(gate, up)
        return compute(gate, up)

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, dy):
        gate, up = saved
        call = run_backward if is_eager(dy, gate, up) else torch.ops.fastlora.swiglu_backward
        dgate, dup = call(rows_of(dy), rows_of(gate), rows_of(up))
        return shaped(dgate, gate), shaped(dup, up)


def compute(gate: Tensor, up: Tensor) -> Tensor:
    """y [..., F] without a gradient, past the dispatcher where nobody traces."""
    call = run if is_eager(gate, up) else torch.ops.fastlora.swiglu
    return shaped(call(rows_of(gate), rows_of(up)), gate)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:  # [..., F] each -> [..., F]
    """y = silu(gate) up (Shazeer 2020, GLU Variants Improve Transformer), computed in float32 and rounded once.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: a shape, dtype or device does not fit.
        fastlora.ops.ImplementationError: FASTLORA_IMPL names an implementation that cannot run.
    """
    checks.check_floats(gate, "gate")
    checks.check_floats(up, "up")
    if gate.dim() == 0:
        raise wrong("gate", gate, "at least one dimension")
    if up.shape != gate.shape or up.dtype != gate.dtype or up.device != gate.device:
        raise wrong("up", up, f"gate's shape, dtype and device, {checks.shown(gate)}")
    checks.check_transforms(gate, up)
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return SwiGLUFunction.apply(gate, up)
    return compute(gate, up)


def calls(M: int, F: int, _: int, dtype: torch.dtype, device: torch.device, dropout: bool) -> dict[str, list[Call]]:
    """Arguments of the operator and of its backward (choice/problems.py)."""
    draw = Draw(dtype, device)
    gate, up, dy = (draw.normal(M, F) for _ in range(3))
    return {"swiglu": [(gate, up)], "swiglu_backward": [(dy, gate, up)]}


def plain(gate: Tensor, up: Tensor) -> Tensor:
    """As transformers' models write it."""
    return F.silu(gate) * up


def plain_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """As autograd goes through that."""
    return torch.ops.aten.silu_backward.default(dy * up, gate), dy * F.silu(gate)


problems.operators["swiglu"] = Measured(
    calls, row_classes, tensors_of, {"swiglu": plain, "swiglu_backward": plain_backward}
)
