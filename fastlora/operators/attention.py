"""out = softmax(scale q kᵀ) v within segments of tokens that lie one after the other: attention of rows of any length, without padding.

Rows that begin alike are a tree of segments: what they share lies there once, and each row's own tokens name it as their parent.

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


def run(q: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    """reference.py::attention, by the implementation that was chosen."""
    return ops.implementations["attention", choose(q).implementation](q, *rest)


def run_backward(dout: Tensor, q: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    """reference.py::attention_backward, by the implementation that was chosen."""
    return ops.implementations["attention_backward", choose(q, backward=True).implementation](dout, q, *rest)


def _fake(q, k, v, starts, scale, causal, segment_parents=None, key_starts=None):
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))


def _fake_backward(dout, q, k, v, out, lse, starts, scale, causal, segment_parents=None, key_starts=None):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


ops.define(
    "attention",
    "(Tensor q, Tensor k, Tensor v, Tensor starts, float scale, bool causal, Tensor? segment_parents=None, Tensor? key_starts=None)"
    " -> (Tensor out, Tensor lse)",
    run,
    _fake,
)
ops.define(
    "attention_backward",
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor starts, float scale, bool causal, Tensor? segment_parents=None,"
    " Tensor? key_starts=None) -> (Tensor dq, Tensor dk, Tensor dv)",
    run_backward,
    _fake_backward,
)


class AttentionFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, starts, scale, causal, segment_parents, key_starts):
        out, lse = compute(q, k, v, starts, scale, causal, segment_parents, key_starts)
        ctx.save_for_backward(q, k, v, out, lse, starts, segment_parents, key_starts)
        ctx.options = scale, causal
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, dout):
        call = run_backward if is_eager(dout, *saved) else torch.ops.fastlora.attention_backward
        *tensors, segment_parents, key_starts = saved
        return *call(dout, *tensors, *ctx.options, segment_parents, key_starts), None, None, None, None, None


def compute(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    """out and lse without a gradient, past the dispatcher where nobody traces."""
    return (run if is_eager(q, k, v, starts) else torch.ops.fastlora.attention)(q, k, v, starts, *rest)


def attention(
    q: Tensor,  # [T, H, D]: all tokens, one segment after the other
    k: Tensor,  # [N, a divisor of H, D]: as many heads of q in a row share one of k and v; N = T without key_starts
    v: Tensor,  # as k
    starts: Tensor,  # [segments + 1] integers on the CPU: tokens starts[i] : starts[i + 1] see one another
    *,
    scale: float | None = None,
    causal: bool = True,
    segment_parents: Tensor | None = None,  # [segments] integers on the CPU: an earlier segment, or -1
    key_starts: Tensor | None = None,  # [segments + 1] integers on the CPU
) -> Tensor:  # [T, H, D]
    """softmax(scale q kᵀ) v within each segment, in float32 and rounded once (Vaswani et al. 2017, Attention Is All You Need, section 3.2.1).

    scale: None: 1 / sqrt(D). causal: no token sees a later one of its segment.

    segment_parents: before their own, the tokens of segment i see all those of segment segment_parents[i], of that one's parent, and so on; -1: none.
    Two rows that begin with the same 200 tokens are segments of [200, n0, n1] tokens with parents [-1, 0, 0]. The gradients of what is shared are
    sums over all who see it, in a fixed order.

    key_starts: the keys of segment i are k[key_starts[i] : key_starts[i + 1]]; None: they lie as the queries. A segment has a key for each query; or
    keys alone, for others to see: of a prefix of P keys before rows of n0 and n1 tokens, starts are [0, 0, n0, n0 + n1], key_starts [0, P, P + n0,
    P + n0 + n1], and parents [-1, 0, 0].

    Raises:
        TypeError: an argument is no tensor, or scale no number.
        ValueError: a shape, dtype or device does not fit; starts does not ascend from 0 to T, or key_starts to N; a parent is no earlier segment; a
            segment has queries, and not as many keys.
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
        N = T if key_starts is None else k.shape[0]
        if heads == 0 or H % heads or value.shape != (N, k.shape[1], D):
            raise wrong(name, value, f"shape [{N}, a divisor of {H}, {D}], the same for both")
    check_segments(starts, T, segment_parents, key_starts, k.shape[0])
    scale = D**-0.5 if scale is None else scale
    checks.check_number(scale, "scale")
    checks.check_transforms(q, k, v)
    segment_parents, key_starts = (None if one is None else one.long() for one in (segment_parents, key_starts))
    return within(q, k, v, starts.long(), scale, causal, segment_parents, key_starts)


def check_segments(
    starts: Tensor, queries: int, segment_parents: Tensor | None, key_starts: Tensor | None, keys: int
) -> None:
    """That they are of one tree, of as many queries and keys; what compilers trace has no numbers to look at."""
    cpu = torch.device("cpu")
    checks.check_integers(starts, "starts", (starts.numel() if isinstance(starts, Tensor) else 0,), cpu)
    if segment_parents is not None:
        checks.check_integers(segment_parents, "segment_parents", (starts.numel() - 1,), cpu)
    if key_starts is not None:
        checks.check_integers(key_starts, "key_starts", (starts.numel(),), cpu)
    if torch.compiler.is_compiling():
        return
    _check_ascent(starts, "starts", queries, "tokens of q")
    if key_starts is not None:
        _check_ascent(key_starts, "key_starts", keys, "rows of k")
        asking, there = starts.diff(), key_starts.diff()
        if not bool(((asking == 0) | (asking == there)).all()):
            raise ValueError(
                f"key_starts: got segments of {there.tolist()} keys, expected {asking.tolist()} as of queries, or any number where these are none"
            )
    if segment_parents is not None:
        parents = segment_parents.tolist()
        if not all(-1 <= parent < i for i, parent in enumerate(parents)):
            raise ValueError(f"segment_parents: got {parents}, expected for each an earlier segment's number, or -1")


def _check_ascent(starts: Tensor, name: str, count: int, what: str) -> None:
    bounds = starts.tolist()
    if not bounds or bounds[0] != 0 or bounds[-1] != count or sorted(bounds) != bounds:
        raise ValueError(f"{name}: got {bounds}, expected ascending numbers from 0 to the {count} {what}")


def within(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    scale: float,
    causal: bool,
    segment_parents: Tensor | None = None,
    key_starts: Tensor | None = None,
) -> Tensor:
    """`attention`, unchecked."""
    given = q, k, v, starts, scale, causal, segment_parents, key_starts
    measured = ops.forced is None and q.dtype in ops.KERNEL_DTYPES and is_eager(q, k, v, starts)
    if measured and choose(q).implementation == "reference":
        return by_torch(*given)
    if torch.is_grad_enabled() and any(one.requires_grad for one in (q, k, v)):
        return AttentionFunction.apply(*given)
    return compute(*given)[0]


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


def by_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    scale: float,
    causal: bool,
    segment_parents: Tensor | None = None,
    key_starts: Tensor | None = None,
) -> Tensor:
    """reference.py::attention's out by torch's own attention, a segment at a time; differentiable."""
    heads = (q, *(one.repeat_interleave(q.shape[1] // one.shape[1], 1) for one in (k, v)))
    query, *both = (one.transpose(0, 1)[None] for one in heads)
    outs = []
    for own, seen in reference.visible(starts, segment_parents, key_starts):
        key, value = (torch.cat([one[:, :, place] for place in seen], 2) for one in both)
        mask = None
        if causal and seen[1:]:
            n, count = own.stop - own.start, key.shape[2]
            mask = torch.ones(n, count, dtype=torch.bool, device=q.device).tril(count - n)
        outs.append(
            F.scaled_dot_product_attention(
                query[:, :, own], key, value, attn_mask=mask, is_causal=causal and mask is None, scale=scale
            )
        )
    return torch.cat(outs, 2)[0].transpose(0, 1)


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
