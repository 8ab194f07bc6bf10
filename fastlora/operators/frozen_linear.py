"""y = x Wᵀ + b, W and b frozen: a linear layer without an adapter. x is not kept for the backward; its gradient is the only one.

The equation is fastlora/reference.py::frozen_linear. Its "cpu" is frozen/products.py, which has several ways to multiply, torch's among them, and
goes the one that was measured to be the fastest; on other devices nothing beats torch's product.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fastlora import checks, ops
from fastlora.choice import problems, table
from fastlora.choice.problems import Call, Draw, Measured, linear_classes, tensors_of, weights_in_turn
from fastlora.frozen import products
from fastlora.gradients import differentiable_once, is_eager, rows_of, shaped
from fastlora.ops import Choice


def choose(x: Tensor, weight: Tensor, backward: bool = False) -> Choice:
    """Which implementation runs `frozen_linear`, or its backward, on inputs like x [M, K] and weight [N, K].

    "triton" and "cuda" have none of their own and, forced, leave it to torch.
    """
    if ops.forced in ("triton", "cuda"):
        return Choice("reference", "FASTLORA_IMPL")
    op = "frozen_linear_backward" if backward else "frozen_linear"
    if ops.forced is not None:
        return ops.choose(op, x, x.shape[0], weight.numel(), dropout=False)
    obstacle = ops.obstacle_of(op, "cpu", x.device, x.dtype)
    if obstacle is not None:
        return Choice("reference", f"plain PyTorch, since {obstacle}")
    return Choice("cpu", "the frozen product alone")


def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """reference.py::frozen_linear, by the implementation that was chosen."""
    return ops.implementations["frozen_linear", choose(x, weight).implementation](x, weight, bias)


def run_backward(dy: Tensor, weight: Tensor) -> Tensor:
    """reference.py::frozen_linear_backward, by the implementation that was chosen."""
    return ops.implementations["frozen_linear_backward", choose(dy, weight, backward=True).implementation](dy, weight)


def _fake(x, weight, bias):
    return x.new_empty(x.shape[0], weight.shape[0])


def _fake_backward(dy, weight):
    return dy.new_empty(dy.shape[0], weight.shape[1])


ops.define("frozen_linear", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor", run, _fake)
ops.define("frozen_linear_backward", "(Tensor dy, Tensor weight) -> Tensor", run_backward, _fake_backward)


class FrozenLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):  # x [..., K] -> y [..., N]
        ctx.save_for_backward(weight)
        return compute(x, weight, bias)

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, dy):
        (weight,) = saved
        rows = rows_of(dy)
        call = run_backward if is_eager(rows, weight) else torch.ops.fastlora.frozen_linear_backward
        with checks.without_autocast(dy.device):
            return shaped(call(rows, weight), dy), None, None


def compute(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y [..., N] without a gradient, past the dispatcher where nobody traces."""
    rows = rows_of(x)
    return shaped((run if is_eager(rows, weight, bias) else torch.ops.fastlora.frozen_linear)(rows, weight, bias), x)


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
    checks.check_floats(x, "x")
    cast = checks.autocast_dtype(x)
    checks.check_base(x, weight, bias, autocast=cast is not None)
    checks.check_transforms(x, weight, bias)
    if cast is not None:
        x, weight, bias = x.to(cast), weight.to(cast), None if bias is None else bias.to(cast)
    with checks.without_autocast(x.device):
        if torch.is_grad_enabled() and x.requires_grad:
            return FrozenLinearFunction.apply(x, weight, bias)
        return compute(x, weight, bias)


def calls(M: int, K: int, N: int, dtype: torch.dtype, device: torch.device, dropout: bool) -> dict[str, list[Call]]:
    """Arguments of the operator and of its backward (choice/problems.py)."""
    draw = Draw(dtype, device)
    x, weight, dy = draw.linear(M, K, N)
    bias = draw.normal(N) if dropout else None
    weights = weights_in_turn(weight, M)
    return {
        "frozen_linear": [(x, one, bias) for one in weights],
        "frozen_linear_backward": [(dy, one) for one in weights],
    }


def classes(device_type: str, dtype: torch.dtype, sizes: Sequence[str]) -> Iterable[tuple[int, str, bool]]:
    """Those where there is another way than torch's. What a layer drops, its product never sees."""
    if device_type != "cpu":
        return []
    others = [way for way in table.WAYS["cpu", "frozen_linear"] if way != "torch"]
    return [
        one
        for one in linear_classes(device_type, dtype, sizes)
        if not one[2] and any(products.offers("frozen_linear", way, dtype, one[0]) for way in others)
    ]


problems.operators["frozen_linear"] = Measured(calls, classes, tensors_of, offers=products.offers)
