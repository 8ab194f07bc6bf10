"""out = softmax(scale q kᵀ) v within segments of tokens that lie one after the other: attention of rows of any length, without padding.

The equation and its gradients are fastlora/reference.py::attention and attention_backward.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora import checks, ops, reference
from fastlora.checks import wrong
from fastlora.choice import problems
from fastlora.choice.problems import Call, Draw, Measured, row_classes, tensors_of
from fastlora.gradients import differentiable_once, is_eager
from fastlora.ops import Choice

HEADS, KEY_HEADS, HEAD = 6, 2, 64  # where it is measured: heads, and their columns
SEGMENT, SEGMENTS = 256, 4  # tokens that see one another: so many, or so great a part of all, whichever is more


def choose(q: Tensor, backward: bool = False) -> Choice:
    """Which implementation runs `attention`, or its backward, on q [T, H, D]."""
    return ops.choose("attention_backward" if backward else "attention", q, q.shape[0], q.numel(), dropout=False)


def run(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """reference.py::attention, by the implementation that was chosen."""
    return ops.implementations["attention", choose(q).implementation](q, k, v, starts, scale, causal)


def run_backward(dout: Tensor, q: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    """reference.py::attention_backward, by the implementation that was chosen."""
    return ops.implementations["attention_backward", choose(q, backward=True).implementation](dout, q, *rest)


def _fake(q, k, v, starts, scale, causal):
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))


def _fake_backward(dout, q, k, v, out, lse, starts, scale, causal):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


ops.define(
    "attention",
    "(Tensor q, Tensor k, Tensor v, Tensor starts, float scale, bool causal) -> (Tensor out, Tensor lse)",
    run,
    _fake,
)
ops.define(
    "attention_backward",
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor starts, float scale, bool causal)"
    " -> (Tensor dq, Tensor dk, Tensor dv)",
    run_backward,
    _fake_backward,
)


class AttentionFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, starts, scale, causal):
        out, lse = compute(q, k, v, starts, scale, causal)
        ctx.save_for_backward(q, k, v, out, lse, starts)
        ctx.options = scale, causal
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, dout):
        call = run_backward if is_eager(dout, *saved) else torch.ops.fastlora.attention_backward
        return *call(dout, *saved, *ctx.options), None, None, None


def compute(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """out and lse without a gradient, past the dispatcher where nobody traces."""
    return (run if is_eager(q, k, v, starts) else torch.ops.fastlora.attention)(q, k, v, starts, scale, causal)


def attention(
    q: Tensor,  # [T, H, D]: all tokens, one segment after the other
    k: Tensor,  # [T, a divisor of H, D]: as many heads of q in a row share one of k and v
    v: Tensor,  # as k
    starts: Tensor,  # [segments + 1] int64 on the CPU: tokens starts[i] : starts[i + 1] see one another, and no others
    *,
    scale: float | None = None,
    causal: bool = True,
) -> Tensor:  # [T, H, D]
    """softmax(scale q kᵀ) v within each segment, in float32 and rounded once (Vaswani et al. 2017, Attention Is All You Need, section 3.2.1).

    scale: None: 1 / sqrt(D). causal: no token sees a later one.

    Raises:
        TypeError: an argument is no tensor, or scale no number.
        ValueError: a shape, dtype or device does not fit, or starts does not ascend from 0 to T.
        fastlora.ops.ImplementationError: FASTLORA_IMPL names an implementation that cannot run.
    """
    for value, name in ((q, "q"), (k, "k"), (v, "v")):
        checks.check_floats(value, name)
        if value.dtype != q.dtype or value.device != q.device:
            raise wrong(name, value, f"q's dtype {q.dtype} and device {q.device}")
    if q.dim() != 3 or q.shape[2] == 0:
        raise wrong("q", q, "shape [T, H, D]")
    T, H, D = q.shape
    for value, name in ((k, "k"), (v, "v")):
        heads = value.shape[1] if value.dim() == 3 else 0
        if heads == 0 or H % heads or value.shape != (T, k.shape[1], D):
            raise wrong(name, value, f"shape [{T}, a divisor of {H}, {D}], the same for both")
    checks.check_integers(starts, "starts", (starts.numel() if isinstance(starts, Tensor) else 0,), torch.device("cpu"))
    if not torch.compiler.is_compiling():
        bounds = starts.tolist()
        if not bounds or bounds[0] != 0 or bounds[-1] != T or sorted(bounds) != bounds:
            raise ValueError(f"starts: got {bounds}, expected ascending numbers from 0 to the {T} tokens of q")
    scale = D**-0.5 if scale is None else scale
    checks.check_number(scale, "scale")
    checks.check_transforms(q, k, v)
    return within(q, k, v, starts.long(), scale, causal)


def within(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float, causal: bool) -> Tensor:
    """`attention`, unchecked."""
    measured = ops.forced is None and q.dtype in ops.KERNEL_DTYPES and is_eager(q, k, v, starts)
    if measured and choose(q).implementation == "reference":
        return by_torch(q, k, v, starts, scale, causal)
    if torch.is_grad_enabled() and any(one.requires_grad for one in (q, k, v)):
        return AttentionFunction.apply(q, k, v, starts, scale, causal)
    return compute(q, k, v, starts, scale, causal)[0]


def calls(M: int, K: int, _: int, dtype: torch.dtype, device: torch.device, dropout: bool) -> dict[str, list[Call]]:
    """Arguments of the operator and of its backward (choice/problems.py)."""
    draw = Draw(dtype, device)
    q, dout = (draw.normal(M, HEADS, HEAD) for _ in range(2))
    k, v = (draw.normal(M, KEY_HEADS, HEAD) for _ in range(2))
    starts = torch.tensor([*range(0, M, max(SEGMENT, M // SEGMENTS)), M])
    rest = starts, HEAD**-0.5, True
    out, lse = reference.attention(q, k, v, *rest)
    return {"attention": [(q, k, v, *rest)], "attention_backward": [(dout, q, k, v, out, lse, *rest)]}


def _segments(starts: Tensor, q: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Of each segment what torch's attention takes, [1, H, tokens, D] or [1, H, tokens], with a head of keys for each of queries."""
    lengths = starts.diff().tolist()
    whole = (q, *(one.repeat_interleave(q.shape[1] // one.shape[1], 1) for one in others))
    return zip(*(one.transpose(0, 1)[None].split(lengths, 2) for one in whole), strict=True)


def by_torch(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float, causal: bool) -> Tensor:
    """reference.py::attention's out by torch's own attention, a segment at a time; differentiable."""
    outs = [
        F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scale)[0].transpose(0, 1)
        for query, key, value in _segments(starts, q, k, v)
    ]
    return torch.cat(outs)


def by_torch_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts: Tensor, scale: float, causal: bool
) -> list[Tensor]:
    """What autograd runs for it on a CPU."""
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    found = [backward(*rows, 0.0, causal, scale=scale) for rows in _segments(starts, dout, q, k, v, out, lse)]
    dq, dk, dv = (torch.cat(one, 2)[0].transpose(0, 1) for one in zip(*found, strict=True))
    return [dq, *(one.unflatten(1, (k.shape[1], -1)).sum(2) for one in (dk, dv))]


problems.operators["attention"] = Measured(
    calls, row_classes, tensors_of, {"attention": by_torch, "attention_backward": by_torch_backward}
)
