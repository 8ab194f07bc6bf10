"""The loss of a language model's head on given labels, with no [tokens, vocabulary] tensor.

    loss = sum over rows of  logsumexp(h Wᵀ + b) - (h Wᵀ + b)[label]
    dh   = softmax(h Wᵀ + b) W - W[label]

The equations are fastlora/reference.py::linear_cross_entropy and linear_cross_entropy_backward.

Seen as attention, dh's first term has the hidden states for queries and W for keys and values. Hence it is computed like flash attention (Dao et
al., 2022, arXiv:2205.14135): block after block of the vocabulary, each weighed by the largest logit so far, in one pass over W. Only a trained W
takes the product of the logits once more.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora import checks, ops
from fastlora.gradients import differentiable_once, is_eager
from fastlora.operators import frozen_linear
from fastlora.ops import Choice

# n rows   D width   V vocabulary
SCHEMA = (
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, bool need_dhidden)"
    " -> (Tensor loss, Tensor highest, Tensor total, Tensor dhidden)"
)
BACKWARD_SCHEMA = (
    "(Tensor dloss, Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor highest, Tensor total)"
    " -> (Tensor dweight, Tensor dbias)"
)
ROWS_AT_ONCE = 1024
LOGITS_AT_ONCE = {"cpu": 2**21, "cuda": 2**26}  # on a CPU 8 MiB in float32, which stay in the last-level cache


def choose() -> Choice:
    """Which implementation runs `linear_cross_entropy` and its backward: the one in blocks, unless plain PyTorch is forced."""
    if ops.forced == "reference":
        return Choice("reference", "FASTLORA_IMPL")
    return Choice("blocks", "a block of the vocabulary at a time, by the frozen products")


def run(*args: Any) -> tuple[Tensor, ...]:
    """reference.py::linear_cross_entropy, by the implementation that was chosen."""
    return ops.implementations["linear_cross_entropy", choose().implementation](*args)


def run_backward(*args: Any) -> tuple[Tensor, Tensor]:
    """reference.py::linear_cross_entropy_backward, by the implementation that was chosen."""
    return ops.implementations["linear_cross_entropy_backward", choose().implementation](*args)


def _fake(hidden, weight, bias, labels, need_dhidden):
    wide = torch.promote_types(hidden.dtype, torch.float32)
    loss, column = hidden.new_empty((), dtype=wide), hidden.new_empty(hidden.shape[0], 1, dtype=wide)
    return loss, column, torch.empty_like(column), hidden.new_empty(hidden.shape if need_dhidden else 0, dtype=wide)


def _fake_backward(dloss, hidden, weight, bias, labels, highest, total):
    return torch.empty_like(weight), weight.new_empty(0) if bias is None else torch.empty_like(bias)


ops.define("linear_cross_entropy", SCHEMA, run, _fake)
ops.define("linear_cross_entropy_backward", BACKWARD_SCHEMA, run_backward, _fake_backward)


class LinearCrossEntropyFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight, bias, labels, losses=None
    ):  # [n, D], [V, D], [V], [n], [n] -> sum of losses, scalar
        call = run if is_eager(hidden, weight, bias, labels) else torch.ops.fastlora.linear_cross_entropy
        loss, highest, total, dhidden = call(hidden, weight, bias, labels, ctx.needs_input_grad[0])
        ctx.save_for_backward(hidden, weight, bias, labels, highest, total, dhidden)
        if losses is not None:
            losses.copy_(row_losses(highest, total, label_logits(hidden, weight, bias, labels), hidden.dtype))
        return loss

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, dloss):
        hidden, weight, bias, labels, highest, total, dhidden = saved
        need_hidden, *need_head = ctx.needs_input_grad[:3]
        dx = (dhidden * dloss).to(hidden.dtype) if need_hidden else None
        if not any(need_head):
            return dx, None, None, None, None
        traced = torch.ops.fastlora.linear_cross_entropy_backward
        call = run_backward if is_eager(dloss, hidden, weight, bias, labels) else traced
        with checks.without_autocast(hidden.device):
            dweight, dbias = call(dloss, hidden, weight, bias, labels, highest, total)
        return dx, dweight, None if bias is None else dbias, None, None


def label_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """[n], each row's label's own, a product of two rows: before logits are rounded."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    picked = torch.linalg.vecdot(hidden.to(wide), weight[labels].to(hidden.dtype).to(wide))
    return picked if bias is None else picked + bias[labels].to(hidden.dtype).to(wide)


def row_losses(highest: Tensor, total: Tensor, picked: Tensor, dtype: torch.dtype) -> Tensor:
    """[n], of what the forward leaves ([n, 1] each) and the labels' logits, which the head rounds to a dtype."""
    return (highest + total.log()).squeeze(1) - picked.to(dtype)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, losses: Tensor | None = None
) -> Tensor:
    """The summed cross entropy of labels under logits = hidden weightᵀ + bias, whose gradients need no logits kept.

    The logits are rounded to hidden's dtype, as a language model's head does it; softmax and all sums are in float32 (float64 for float64). The
    gradient of hidden is computed along with the loss; a trained weight's or bias's takes the product of the logits once more.

    Torch's own F.linear_cross_entropy (2.13) keeps a float32 copy of a bfloat16 weight on a CPU, rounds the sum of the losses to bfloat16, and takes
    1.3 to 13 times this one's time there (2 cores of an AMD Zen 4, 512 x 576 rows, vocabulary 49,152), hence this one.

    Args:
        hidden: [n, D]. Under autocast it is cast to autocast's dtype.
        weight: [V, D], of hidden's dtype; under autocast it is cast block by block.
        bias: [V] or None.
        labels: [n] int64, each from 0 to V - 1.
        losses: [n], or None; out: each row's own, without a gradient. A label's logit is taken once more for it, as a product of two rows: of a
            16-bit logit the last bit may be another than the sum's. The sum and the gradients are the same bits with it and without.

    Returns:
        A scalar, float32 or float64.

    Raises:
        TypeError, ValueError: an argument has another shape or dtype, or is on another device.
        IndexError: a label is out of range.
    """
    dtype = checks.autocast_dtype(hidden)
    _check(hidden, weight, bias, labels, autocast=dtype is not None)
    check_losses(losses, hidden)
    checks.check_transforms(hidden, weight, bias)
    hidden = hidden.to(dtype or hidden.dtype)
    with checks.without_autocast(hidden.device):
        return LinearCrossEntropyFunction.apply(hidden, weight, bias, labels, losses)


class ByRowFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels):  # [n, D], [V, D], [V], [n] -> [n]
        call = run if is_eager(hidden, weight, bias, labels) else torch.ops.fastlora.linear_cross_entropy
        _, highest, total, dhidden = call(hidden, weight, bias, labels, ctx.needs_input_grad[0])
        ctx.save_for_backward(hidden, dhidden)
        return row_losses(highest, total, label_logits(hidden, weight, bias, labels), hidden.dtype)

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, dlosses):
        hidden, dhidden = saved
        return (dhidden * dlosses[:, None]).to(hidden.dtype), None, None, None


def linear_cross_entropy_by_row(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """`linear_cross_entropy` before its sum, [n], for a frozen weight and bias: whoever weighs rows apart takes the loss of several batches at once.

    A label's own logit is taken once more, as a product of two rows rounded as the logits are: of a 16-bit logit the last bit may be another.

    Args, Raises: as `linear_cross_entropy`; also ValueError, where weight or bias is trained.
    """
    dtype = checks.autocast_dtype(hidden)
    _check(hidden, weight, bias, labels, autocast=dtype is not None)
    checks.check_transforms(hidden, weight, bias)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.requires_grad:
            raise ValueError(f"{name}: requires a gradient, expected it frozen")
    hidden = hidden.to(dtype or hidden.dtype)
    with checks.without_autocast(hidden.device):
        return ByRowFunction.apply(hidden, weight, bias, labels)


def _check(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, autocast: bool) -> None:
    checks.check_floats(hidden, "hidden")
    if hidden.dim() != 2:
        raise checks.wrong("hidden", hidden, "shape [n, D]")
    _check_like(weight, "weight", 2, hidden, autocast)
    if weight.shape[1] != hidden.shape[1]:
        raise checks.wrong("weight", weight, f"shape [V, {hidden.shape[1]}]")
    if bias is not None:
        _check_like(bias, "bias", 1, hidden, autocast)
        if bias.shape != weight.shape[:1]:
            raise checks.wrong("bias", bias, f"shape [{weight.shape[0]}]")
    checks.check_integers(labels, "labels", hidden.shape[:1], hidden.device)
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < weight.shape[0]:
        raise IndexError(f"labels: expected numbers from 0 to {weight.shape[0] - 1}")


def check_losses(losses: Any, hidden: Tensor) -> None:
    """Where the rows' own losses are written to."""
    if losses is None:
        return
    checks.check_floats(losses, "losses")
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if (
        losses.shape != hidden.shape[:1]
        or losses.device != hidden.device
        or losses.dtype != wide
        or losses.requires_grad
    ):
        raise checks.wrong(
            "losses", losses, f"shape {list(hidden.shape[:1])}, dtype {wide}, on {hidden.device}, without a gradient"
        )


def _check_like(value: Any, name: str, dimensions: int, hidden: Tensor, autocast: bool) -> None:
    checks.check_floats(value, name)
    if value.dim() != dimensions or value.device != hidden.device or not (autocast or value.dtype == hidden.dtype):
        expected = f"{dimensions} dimensions, dtype {hidden.dtype} and device {hidden.device} as hidden has"
        raise checks.wrong(name, value, expected)


# ---- in blocks


def _accumulator(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    return like.new_empty(shape, dtype=torch.promote_types(like.dtype, torch.float32))


def _slices(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def _vocabulary_blocks(rows: int, weight: Tensor) -> Iterator[slice]:
    at_once = LOGITS_AT_ONCE.get(weight.device.type, LOGITS_AT_ONCE["cuda"])
    return _slices(weight.shape[0], max(1, at_once // max(rows, 1)))


class Update(NamedTuple):
    """What an adapter adds to the logits: xa Bᵀ (lora_cross_entropy.py)."""

    xa: Tensor  # [n, R]
    lora_b: Tensor  # [V, R]
    dxa: Tensor  # [n, R], zeros; out: the gradient; or no elements

    def of(self, rows: slice) -> "Update":
        return Update(self.xa[rows], self.lora_b, self.dxa[rows])


class _Block(NamedTuple):
    """A block of the vocabulary: its part of W, and of B if there is an adapter, and what its labels are there."""

    weight: Tensor  # [v, D]
    lora_b: Tensor | None  # [v, R]
    logits: Tensor  # [n, v], of which the caller may make what it likes
    here: Tensor  # [n, 1], whether the row's label is in this block
    label: Tensor  # [n, 1], the label counted from the block's start; 0 where it is in another


def _block(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    columns: slice,
    scratch: Tensor,
    update: Update | None = None,
) -> _Block:
    w = weight[columns].to(x.dtype)
    c = None if bias is None else bias[columns].to(x.dtype)
    b = None
    logits = frozen_linear.run(x, w, c)
    if update is not None:
        b = update.lora_b[columns].to(x.dtype)
        logits.addmm_(update.xa, b.t())
    if logits.dtype != scratch.dtype:  # a new tensor for each block would cost more in page faults than the copy
        logits = scratch[: logits.numel()].view_as(logits).copy_(logits)
    here = ((labels >= columns.start) & (labels < columns.stop))[:, None]
    return _Block(w, b, logits, here, (labels[:, None] - columns.start) * here)


def _scratch(x: Tensor, weight: Tensor) -> Tensor:
    """Room for a block's logits in float32, empty where they are that already."""
    columns = next(_vocabulary_blocks(x.shape[0], weight))
    is_wide = x.dtype in (torch.float32, torch.float64)
    return _accumulator(x, (0 if is_wide else x.shape[0] * columns.stop,))


def _pass_over_vocabulary(
    x: Tensor,  # [n, D]
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,  # [n]
    highest: Tensor,  # [n, 1], out: the largest logit
    total: Tensor,  # [n, 1], out: the sum of exp(logit - highest)
    picked: Tensor,  # [n, 1], out: the labels' logits
    dx: Tensor | None,  # [n, D], zeros; out: the gradient
    update: Update | None = None,
) -> None:
    scratch = _scratch(x, weight)
    highest.fill_(torch.finfo(highest.dtype).min)
    total.zero_()
    for columns in _vocabulary_blocks(x.shape[0], weight):
        block = _block(x, weight, bias, labels, columns, scratch, update)
        picked.copy_(torch.where(block.here, block.logits.gather(1, block.label), picked))
        higher = torch.maximum(highest, block.logits.amax(1, keepdim=True))
        weights = block.logits.sub_(higher).exp_()
        shrink = (highest - higher).exp_()
        total.mul_(shrink).add_(weights.sum(1, keepdim=True))
        if dx is not None:
            narrow = weights.to(x.dtype)
            dx.mul_(shrink).add_(frozen_linear.run_backward(narrow, block.weight))
            if update is not None and block.lora_b is not None:
                update.dxa.mul_(shrink).add_(narrow @ block.lora_b)
        highest.copy_(higher)
    if dx is not None:
        dx.div_(total).sub_(weight[labels])
        if update is not None:
            update.dxa.div_(total).sub_(update.lora_b[labels])


def _weight_gradients(
    dloss: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, highest: Tensor, total: Tensor
) -> tuple[Tensor, Tensor]:
    """(dW [V, D], db [V]): the logits once more, and softmax - one-hot summed over the rows in float32.

    The largest logit goes first, then the division: one rounded logarithm of the sum would stand in every softmax, with an error of its own size.
    """
    dweight, dbias = torch.empty_like(weight), weight.new_empty(0) if bias is None else torch.empty_like(bias)
    for columns, parts in logit_gradients(dloss, hidden, weight, bias, labels, highest, total):
        dw = _accumulator(hidden, dweight[columns].shape).zero_()
        db = dw.new_zeros(dw.shape[0])
        for rows, dlogits in parts:
            x = hidden[rows]
            dw.add_(dlogits.to(x.dtype).t() @ x)
            db.add_(dlogits.sum(0))
        dweight[columns] = dw
        if bias is not None:
            dbias[columns] = db
    return dweight, dbias


def logit_gradients(
    dloss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    highest: Tensor,
    total: Tensor,
    update: Update | None = None,
) -> Iterator[tuple[slice, Iterator[tuple[slice, Tensor]]]]:
    """For each block of the vocabulary, a slice of it: for some rows at a time, a slice of those, their dz [n, v], which the next overwrites."""
    rows_at_once = min(hidden.shape[0], ROWS_AT_ONCE)
    scratch = _scratch(hidden[:rows_at_once], weight)

    def parts(columns: slice) -> Iterator[tuple[slice, Tensor]]:
        for rows in _slices(hidden.shape[0], ROWS_AT_ONCE):
            own = None if update is None else update.of(rows)
            block = _block(hidden[rows], weight, bias, labels[rows], columns, scratch, own)
            dlogits = block.logits.sub_(highest[rows]).exp_().mul_(dloss / total[rows])
            yield rows, dlogits.scatter_add_(1, block.label, -block.here.to(dlogits.dtype) * dloss)

    for columns in _vocabulary_blocks(rows_at_once, weight):
        yield columns, parts(columns)


def in_blocks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    need_dhidden: bool,
    update: Update | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """reference.py::linear_cross_entropy, a block of the vocabulary at a time; with an update, of the logits that it adds to."""
    dhidden = _accumulator(hidden, hidden.shape if need_dhidden else (0,)).zero_()  # [n, D]
    highest, total, picked = (_accumulator(hidden, (hidden.shape[0], 1)) for _ in range(3))  # [n, 1]
    for rows in _slices(hidden.shape[0], ROWS_AT_ONCE):
        found = highest[rows], total[rows], picked[rows]
        dx, own = dhidden[rows] if need_dhidden else None, None if update is None else update.of(rows)
        _pass_over_vocabulary(hidden[rows], weight, bias, labels[rows], *found, dx, own)
    return (highest - picked + total.log()).sum(), highest, total, dhidden


ops.implement("linear_cross_entropy", "blocks", in_blocks)
ops.implement("linear_cross_entropy_backward", "blocks", _weight_gradients)
