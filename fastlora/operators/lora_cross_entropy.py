"""The loss of a language model's head that has an adapter, on given labels, with no [tokens, vocabulary] tensor.

    z = h Wᵀ + b + xa Bᵀ,  xa = s d(h) Aᵀ

`linear_cross_entropy` with B as a trained weight beside W: the gradients of h and xa come along with the loss, B's takes the logits once more. A's is
left to autograd, by xa. The equations are fastlora/reference.py::lora_cross_entropy and lora_cross_entropy_backward.
"""

import torch
from torch import Tensor

from fastlora import checks, ops
from fastlora.gradients import differentiable_once, is_eager
from fastlora.operators import linear_cross_entropy as plain
from fastlora.operators.linear_cross_entropy import Update, choose, in_blocks, logit_gradients


def run(*args: object) -> tuple[Tensor, ...]:
    """reference.py::lora_cross_entropy, by the implementation that was chosen: `linear_cross_entropy`'s choice."""
    return ops.implementations["lora_cross_entropy", choose().implementation](*args)


def run_backward(*args: object) -> Tensor:
    """reference.py::lora_cross_entropy_backward, by the implementation that was chosen."""
    return ops.implementations["lora_cross_entropy_backward", choose().implementation](*args)


def _fake(hidden, xa, weight, bias, lora_b, labels, need_dhidden):
    wide = torch.promote_types(hidden.dtype, torch.float32)
    loss, column = hidden.new_empty((), dtype=wide), hidden.new_empty(hidden.shape[0], 1, dtype=wide)
    dhidden, dxa = (hidden.new_empty(one.shape if need_dhidden else 0, dtype=wide) for one in (hidden, xa))
    return loss, column, torch.empty_like(column), dhidden, dxa


def _fake_backward(dloss, hidden, xa, weight, bias, lora_b, labels, highest, total):
    return lora_b.new_empty(lora_b.shape)


ops.define(
    "lora_cross_entropy",
    "(Tensor hidden, Tensor xa, Tensor weight, Tensor? bias, Tensor lora_b, Tensor labels, bool need_dhidden)"
    " -> (Tensor loss, Tensor highest, Tensor total, Tensor dhidden, Tensor dxa)",
    run,
    _fake,
)
ops.define(
    "lora_cross_entropy_backward",
    "(Tensor dloss, Tensor hidden, Tensor xa, Tensor weight, Tensor? bias, Tensor lora_b, Tensor labels, Tensor highest, Tensor total) -> Tensor",
    run_backward,
    _fake_backward,
)


class LoRACrossEntropyFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, xa, weight, bias, lora_b, labels, losses=None):  # -> sum of losses, scalar
        need, eager = any(ctx.needs_input_grad[:2]), is_eager(hidden, xa, weight, bias, lora_b, labels)
        call = run if eager else torch.ops.fastlora.lora_cross_entropy
        loss, highest, total, dhidden, dxa = call(hidden, xa, weight, bias, lora_b, labels, need)
        ctx.save_for_backward(hidden, xa, weight, bias, lora_b, labels, highest, total, dhidden, dxa)
        if losses is not None:
            picked = plain.label_logits(hidden, weight, bias, labels) + plain.label_logits(xa, lora_b, None, labels)
            losses.copy_(plain.row_losses(highest, total, picked, hidden.dtype))
        return loss

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, dloss):
        *given, highest, total, dhidden, dxa = saved
        hidden, xa, need = given[0], given[1], ctx.needs_input_grad
        dx = (dhidden * dloss).to(hidden.dtype) if need[0] else None
        dxa = (dxa * dloss).to(xa.dtype) if need[1] else None
        db = None
        if need[4]:
            call = run_backward if is_eager(dloss, *given) else torch.ops.fastlora.lora_cross_entropy_backward
            with checks.without_autocast(hidden.device):
                db = call(dloss, *given, highest, total)
        return dx, dxa, None, None, db, None, None


def lora_cross_entropy(
    hidden: Tensor,  # [n, D]
    xa: Tensor,  # [n, R]
    weight: Tensor,  # [V, D], frozen
    bias: Tensor | None,  # [V], frozen
    lora_b: Tensor,  # [V, R]
    labels: Tensor,  # [n] int64, each from 0 to V - 1
    losses: Tensor | None = None,  # [n]; out: each row's own
) -> Tensor:
    """The summed cross entropy of labels under logits = hidden weightᵀ + bias + xa lora_bᵀ, with no logits kept: a head's that has an adapter.

    xa is scale · d(hidden) Aᵀ, which its caller computes, so that A's gradient and dropout's mask are autograd's. Roundings and dtypes are
    `linear_cross_entropy`'s; xa is cast to hidden's dtype, lora_b block by block. Gradients go to hidden, xa and lora_b. Returns a scalar in float32
    or float64.

    Raises:
        TypeError, ValueError: an argument has another shape or dtype, is on another device, or weight or bias requires a gradient.
        IndexError: a label is out of range.
    """
    dtype = checks.autocast_dtype(hidden)
    plain._check(hidden, weight, bias, labels, autocast=dtype is not None)
    checks.check_floats(xa, "xa")
    checks.check_floats(lora_b, "lora_b")
    if xa.dim() != 2 or xa.shape[0] != hidden.shape[0] or xa.device != hidden.device:
        raise checks.wrong("xa", xa, f"shape [{hidden.shape[0]}, R] on {hidden.device}")
    if lora_b.shape != (weight.shape[0], xa.shape[1]) or lora_b.device != hidden.device:
        raise checks.wrong("lora_b", lora_b, f"shape [{weight.shape[0]}, {xa.shape[1]}] on {hidden.device}")
    plain.check_losses(losses, hidden)
    checks.check_frozen(weight=weight, bias=bias)
    checks.check_transforms(hidden, xa, weight, bias, lora_b)
    hidden = hidden.to(dtype or hidden.dtype)
    with checks.without_autocast(hidden.device):
        return LoRACrossEntropyFunction.apply(hidden, xa.to(hidden.dtype), weight, bias, lora_b, labels, losses)


# ---- in blocks


def _in_blocks(
    hidden: Tensor,
    xa: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_b: Tensor,
    labels: Tensor,
    need_dhidden: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    dxa = xa.new_zeros(xa.shape, dtype=wide)
    found = in_blocks(hidden, weight, bias, labels, need_dhidden, Update(xa, lora_b, dxa))
    return *found, dxa if need_dhidden else dxa.new_empty(0)


def _b_gradient(
    dloss: Tensor,
    hidden: Tensor,
    xa: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_b: Tensor,
    labels: Tensor,
    highest: Tensor,
    total: Tensor,
) -> Tensor:
    """dB [V, R], summed over the rows in float32."""
    db = lora_b.new_empty(lora_b.shape)
    update = Update(xa, lora_b, xa.new_empty(0))
    for columns, parts in logit_gradients(dloss, hidden, weight, bias, labels, highest, total, update):
        sums = total.new_zeros(db[columns].shape)
        for rows, dlogits in parts:
            sums.add_(dlogits.to(xa.dtype).t() @ xa[rows])
        db[columns] = sums
    return db


ops.implement("lora_cross_entropy", "blocks", _in_blocks)
ops.implement("lora_cross_entropy_backward", "blocks", _b_gradient)
