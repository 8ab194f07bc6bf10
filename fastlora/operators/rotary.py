"""y = x cos + (-x2, x1) sin: queries and keys turned by the angles of their positions, both in one call; the gradient is turned back.

The equation and its gradient are fastlora/reference.py::rotary and rotary_backward.
"""

import torch
from torch import Tensor

from fastlora import checks, ops
from fastlora.checks import wrong
from fastlora.choice import problems
from fastlora.choice.problems import Call, Draw, Measured, row_classes, tensors_of
from fastlora.gradients import differentiable_once, is_eager

HEAD = 64  # columns of a head, where it is measured


def run(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """reference.py::rotary, by the implementation that was chosen."""
    choice = ops.choose("rotary", q, q.shape[0] * q.shape[2], q.numel(), dropout=False)
    return ops.implementations["rotary", choice.implementation](q, k, cos, sin)


def run_backward(dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """reference.py::rotary_backward, by the implementation that was chosen."""
    choice = ops.choose("rotary_backward", dq, dq.shape[0] * dq.shape[2], dq.numel(), dropout=False)
    return ops.implementations["rotary_backward", choice.implementation](dq, dk, cos, sin)


def _fake(q, k, cos, sin):
    return tuple(x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (q, k))


ops.define("rotary", "(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor, Tensor)", run, _fake)
ops.define("rotary_backward", "(Tensor dq, Tensor dk, Tensor cos, Tensor sin) -> (Tensor, Tensor)", run_backward, _fake)


class RotaryFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        return compute(q, k, cos, sin)

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, dq, dk):
        cos, sin = saved
        call = run_backward if is_eager(dq, dk, cos, sin) else torch.ops.fastlora.rotary_backward
        return *call(dq, dk, cos, sin), None, None


def compute(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Without a gradient, past the dispatcher where nobody traces."""
    return (run if is_eager(q, k, cos, sin) else torch.ops.fastlora.rotary)(q, k, cos, sin)


def rotary(
    q: Tensor,  # [B, H, T, D], D even
    k: Tensor,  # [B, its own H, T, D]
    cos: Tensor,  # [B or 1, T, D], q's dtype
    sin: Tensor,
) -> tuple[Tensor, Tensor]:  # as q and k
    """x cos + (-x2, x1) sin for every head x = (x1, x2) of q and k (Su et al. 2021, RoFormer, section 3.4.2), in float32 and rounded once.

    No gradient goes to cos and sin. In memory a token's heads lie together in the result, as attention likes them.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: a shape, dtype or device does not fit, or cos or sin requires a gradient.
        fastlora.ops.ImplementationError: FASTLORA_IMPL names an implementation that cannot run.
    """
    for value, name in ((q, "q"), (k, "k"), (cos, "cos"), (sin, "sin")):
        checks.check_floats(value, name)
        if value.dtype != q.dtype or value.device != q.device:
            raise wrong(name, value, f"q's dtype {q.dtype} and device {q.device}")
    if q.dim() != 4 or q.shape[3] % 2:
        raise wrong("q", q, "shape [B, H, T, D] with an even D")
    B, _, T, D = q.shape
    if k.shape[:1] + k.shape[2:] != (B, T, D):
        raise wrong("k", k, f"shape [{B}, H, {T}, {D}]")
    for value, name in ((cos, "cos"), (sin, "sin")):
        if tuple(value.shape) not in ((B, T, D), (1, T, D)) or value.shape != cos.shape:
            raise wrong(name, value, f"shape [{B} or 1, {T}, {D}], the same for both")
    checks.check_frozen(cos=cos, sin=sin)
    checks.check_transforms(q, k, cos, sin)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        return RotaryFunction.apply(q, k, cos, sin)
    return compute(q, k, cos, sin)


def calls(M: int, K: int, _: int, dtype: torch.dtype, device: torch.device, dropout: bool) -> dict[str, list[Call]]:
    """Arguments of the operator and of its backward (choice/problems.py)."""
    draw = Draw(dtype, device)
    q, k = (draw.normal(1, M, K // HEAD, HEAD).transpose(1, 2) for _ in range(2))
    cos, sin = draw.normal(1, M, HEAD), draw.normal(1, M, HEAD)
    return {"rotary": [(q, k, cos, sin)], "rotary_backward": [(q, k, cos, sin)]}


def plain(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """As transformers' models write it."""
    halves = ((x, x.chunk(2, -1)) for x in (q, k))
    return tuple(x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None] for x, (first, second) in halves)


def plain_backward(dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """As autograd goes through that."""
    halves = ((dx, (dx * sin[:, None]).chunk(2, -1)) for dx in (dq, dk))
    return tuple(dx * cos[:, None] + torch.cat((second, -first), -1) for dx, (first, second) in halves)


problems.operators["rotary"] = Measured(
    calls, row_classes, tensors_of, {"rotary": plain, "rotary_backward": plain_backward}
)
