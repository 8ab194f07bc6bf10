"""y = x Wᵀ + b + s d(x) Aᵀ Bᵀ, W and b frozen, of G layers that share x, where each row may have one of S adapters of its own.

One operator with four spellings, whose implementations are measured apart:

    lora_linear           one layer, one adapter
    lora_linear_shared    G layers: x is read once for the A of all
    multi_lora            S adapters
    multi_lora_shared     both

The equation and its gradients are fastlora/reference.py's.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora import checks, ops, reference
from fastlora.checks import wrong, wrong_type
from fastlora.choice import problems, table
from fastlora.choice.problems import (
    ADAPTERS,
    SIBLINGS,
    Call,
    Draw,
    Measured,
    linear_classes,
    mixed_rows,
    weights_in_turn,
)
from fastlora.frozen import composed, products
from fastlora.frozen.quantised import QuantisedWeight
from fastlora.gradients import differentiable_once, is_eager, rows_of, shaped, split
from fastlora.ops import Choice

# x [M, K], weight G of [N_g, K], bias G of [N_g] or no elements, lora_a and lora_b every adapter of the first layer, then of the second
SCHEMA = (
    "(Tensor x, Tensor[] weight, Tensor[] bias, Tensor[] lora_a, Tensor[] lora_b, float[] scale, float[] dropout_p, Tensor? seed,"
    " Tensor? order, Tensor? offsets) -> (Tensor[] y, Tensor xa, Tensor keep)"
)
BACKWARD_SCHEMA = (
    "(Tensor[] dy, Tensor x, Tensor[] weight, Tensor[] lora_a, Tensor[] lora_b, Tensor xa, Tensor keep, float[] scale, float[] dropout_p,"
    " Tensor? order, Tensor? offsets, bool need_dx, bool need_da, bool need_db) -> (Tensor dx, Tensor da, Tensor db)"
)
CASES = {
    (False, False): "lora_linear",
    (True, False): "lora_linear_shared",
    (False, True): "multi_lora",
    (True, True): "multi_lora_shared",
}
"""What is measured apart, by whether layers share x and whether rows have adapters of their own.

On a CPU also `table.rank_case` of several ranks: not whether to run, but by which products the adapter is added.
"""

CASE_OF = {case: which for which, case in CASES.items()}
RANK, SCALE, DROPOUT_P = 16, 2.0, 0.1  # of what is measured
NO_CONTEXT = nullcontext()


# ---- the choice


def choose(x: Tensor, weight: Tensor, dropout: bool = False, backward: bool = False, *, mixed: bool = False) -> Choice:
    """Which implementation runs a layer, or its backward, on inputs like x [M, K] and weight [N, K], with dropout or without.

    mixed: whether rows have adapters of their own.
    """
    case = CASES[False, mixed] + "_backward" * backward
    return ops.choose(case, x, x.shape[0], weight.numel(), dropout, weight)


def choose_shared(
    x: Tensor, weight: Tensor, dropout: bool = False, backward: bool = False, *, mixed: bool = False
) -> tuple[Choice, bool]:
    """What runs layers that share x [M, K], the first of which has weight [N, K], or their backward; and whether it runs them together.

    Together where the implementation that would run the first alone can do so, or where another gains more; else one after the other.
    """
    alone = choose(x, weight, dropout, backward, mixed=mixed)
    case = CASES[True, mixed] + "_backward" * backward
    if ops.forced is None or ops.has(case, ops.forced):
        together = ops.choose(case, x, x.shape[0], weight.numel(), dropout, weight)
        if together.implementation == alone.implementation or together.ratio < alone.ratio:
            return together, together.implementation != "reference"
    return alone, False


def _chosen(
    x: Tensor, weight: Sequence[Tensor], dropout: bool, mixed: bool, backward: bool
) -> tuple[Callable[..., Any], bool]:
    """What runs these layers, and whether together; `choose` and `choose_shared`, remembered."""
    first, several = weight[0], len(weight) > 1
    lies = first.stride() if x.is_cuda else None  # a card's choice looks at that
    key = (
        ops.forced,
        several,
        mixed,
        backward,
        x.device,
        x.dtype,
        x.shape[0].bit_length(),
        first.numel().bit_length(),
        dropout,
        lies,
    )
    found = table.choices.get(key)
    if found is None:
        if several:
            choice, together = choose_shared(x, first, dropout, backward, mixed=mixed)
        else:
            choice, together = choose(x, first, dropout, backward, mixed=mixed), True
        case = CASES[several and together, mixed] + "_backward" * backward
        found = table.choices[key] = case, choice.implementation, together
    return ops.implementations[found[:2]], found[2]


# ---- what torch.ops.fastlora.lora_linear runs


def run(
    x: Tensor, weight: Sequence[Tensor], bias: Sequence[Tensor | None], lora_a: Sequence[Tensor], lora_b: Sequence[Tensor],
    scale: Sequence[float], dropout_p: Sequence[float], seed: Tensor | None, order: Tensor | None, offsets: Tensor | None,
) -> tuple[list[Tensor], Tensor, Tensor]:  # fmt: skip
    """reference.py::lora_linear, by the implementation that was chosen."""
    function, together = _chosen(x, weight, seed is not None, order is not None, False)
    if together:
        return function(x, weight, bias, lora_a, lora_b, scale, dropout_p, seed, order, offsets)
    results = []
    for g, own in enumerate(_by_layer(len(weight), lora_a, lora_b, scale, dropout_p)):
        own_seed = None if seed is None else seed[g : g + 1]
        results.append(function(x, weight[g : g + 1], bias[g : g + 1], *own, own_seed, order, offsets))
    ys, xas, keeps = zip(*results, strict=True)
    R = max(xa.shape[2] for xa in xas)
    if any(keep.numel() for keep in keeps):  # of a layer that drops nothing nobody reads the bits
        unread = x.new_zeros(1, len(x), reference.keep_bytes(x.shape[1]), dtype=torch.uint8)
        keeps = tuple(keep if keep.numel() else unread for keep in keeps)
    return [y for [y] in ys], torch.cat([F.pad(xa, (0, R - xa.shape[2])) for xa in xas]), torch.cat(keeps)


def run_backward(
    dy: Sequence[Tensor], x: Tensor, weight: Sequence[Tensor], lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], xa: Tensor, keep: Tensor,
    scale: Sequence[float], dropout_p: Sequence[float], order: Tensor | None, offsets: Tensor | None, need_dx: bool, need_da: bool, need_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """reference.py::lora_linear_backward, by the implementation that was chosen."""
    need = need_dx, need_da, need_db
    function, together = _chosen(x, weight, bool(keep.numel()), order is not None, True)
    if together:
        return function(dy, x, weight, lora_a, lora_b, xa, keep, scale, dropout_p, order, offsets, *need)
    dx, das, dbs = x.new_empty(0), [], []
    for g, (a, b, s, p) in enumerate(_by_layer(len(weight), lora_a, lora_b, scale, dropout_p)):
        own_xa = xa[g : g + 1, :, : max(one.shape[0] for one in a)].contiguous()
        own = dy[g : g + 1], x, weight[g : g + 1], a, b, own_xa, keep[g : g + 1]  # keep may have no elements
        part, da, db = function(*own, s, p, order, offsets, *need)
        dx = dx + part if g else part
        das.append(da)
        dbs.append(db)
    return dx, torch.cat(das), torch.cat(dbs)


def _by_layer(layers: int, *columns: Sequence[Any]) -> list[list[Sequence[Any]]]:
    """What the adapters of all layers have, one layer after the other, as columns for each layer."""
    S = len(columns[0]) // layers
    return [[column[g * S : (g + 1) * S] for column in columns] for g in range(layers)]


def _without_elements(bias: Sequence[Tensor]) -> list[Tensor | None]:
    return [one if one.numel() else None for one in bias]


def _run_op(x: Tensor, weight: list[Tensor], bias: list[Tensor], *rest: Any) -> tuple[list[Tensor], Tensor, Tensor]:
    return run(x, weight, _without_elements(bias), *rest)


def _fake(x, weight, bias, lora_a, lora_b, scale, dropout_p, seed, order, offsets):
    G, M, R = len(weight), x.shape[0], max(a.shape[0] for a in lora_a)
    xa = x.new_empty(G, M, R, dtype=torch.promote_types(x.dtype, torch.float32))
    drops = reference.drops(dropout_p, seed)
    keep = x.new_empty((G, M, reference.keep_bytes(x.shape[1])) if drops else 0, dtype=torch.uint8)
    return [x.new_empty(M, w.shape[0]) for w in weight], xa, keep


def _fake_backward(
    dy, x, weight, lora_a, lora_b, xa, keep, scale, dropout_p, order, offsets, need_dx, need_da, need_db
):
    dx = x.new_empty(x.shape if need_dx else 0)
    da = lora_a[0].new_empty(sum(a.numel() for a in lora_a) if need_da else 0)
    return dx, da, lora_b[0].new_empty(sum(b.numel() for b in lora_b) if need_db else 0)


for _suffix, _schema, _run, _shapes in (
    ("", SCHEMA, _run_op, _fake),
    ("_backward", BACKWARD_SCHEMA, run_backward, _fake_backward),
):
    _cases = *CASES.values(), *map(table.rank_case, table.RANKS)
    ops.define(f"lora_linear{_suffix}", _schema, _run, _shapes, cases=[case + _suffix for case in _cases])
# Many backwards at once (torch.autograd.grad's is_grads_batched): torch has rules for what the reference calls, and none for lists.
ops.library.impl("lora_linear_backward", reference.lora_linear_backward, "Batched")


# ---- gradients


class LoRALinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, scale, dropout_p, seed, *rest):
        """x [..., K] -> G of y [..., N_g]; the rest: order, offsets, then every A, then every B.

        Where nothing requires a gradient torch's compiler leaves ctx out if the other arguments are as many as these parameters: there are more.
        """
        order, offsets, *adapters = rest
        half = len(adapters) // 2
        ys, xa, keep = _forward(
            x, weight, bias, adapters[:half], adapters[half:], scale, dropout_p, seed, order, offsets
        )
        ctx.save_for_backward(x, xa, keep, order, offsets, *weight, *adapters)
        ctx.scale, ctx.dropout_p = scale, dropout_p
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, *dy):
        x, xa, keep, order, offsets, *tensors = saved
        G = len(dy)
        weight, adapters = tensors[:G], tensors[G:]
        half = len(adapters) // 2
        lora_a, lora_b = adapters[:half], adapters[half:]
        each = half // G  # adapters of a layer
        # Of a layer whose result had no part in the loss A and B get no gradient, as if it stood alone.
        needs = ctx.needs_input_grad  # made anew each time it is asked for
        wanted = [wants and dy[i % half // each] is not None for i, wants in enumerate(needs[8:])]
        need = needs[0], any(wanted[:half]), any(wanted[half:])
        dys = [
            x.new_zeros(x.shape[:-1].numel(), w.shape[0]) if d is None else rows_of(d)
            for d, w in zip(dy, weight, strict=True)
        ]
        rows = rows_of(x)
        call = run_backward if is_eager(*dys, rows, *tensors) else torch.ops.fastlora.lora_linear_backward
        with checks.without_autocast(x.device) if torch._C._is_any_autocast_enabled() else NO_CONTEXT:
            dx, da, db = call(
                dys, rows, weight, lora_a, lora_b, xa, keep, ctx.scale, ctx.dropout_p, order, offsets, *need
            )
        grads = [*split(da, lora_a, wanted[:half]), *split(db, lora_b, wanted[half:])]
        return shaped(dx, x) if need[0] else None, None, None, None, None, None, None, None, *grads


def _forward(
    x: Tensor, weight: Sequence[Tensor], bias: Sequence[Tensor | None], lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], *rest: Any
) -> tuple[Sequence[Tensor], Tensor, Tensor]:  # fmt: skip
    """`run` on x [..., K], past the dispatcher where nobody traces: gradients.py's rows_of and shaped, without their calls."""
    rows = x if x.dim() == 2 else x[None] if x.dim() == 1 else x.flatten(0, -2)
    if is_eager(x, *weight, *bias, *lora_a, *lora_b):
        ys, xa, keep = run(rows, weight, bias, lora_a, lora_b, *rest)
    else:
        none = x.new_empty(0)
        biases = [none if one is None else one for one in bias]
        ys, xa, keep = torch.ops.fastlora.lora_linear(rows, list(weight), biases, list(lora_a), list(lora_b), *rest)
    if x.dim() != 2:
        ys = [torch.ops.aten._unsafe_view.default(y, [*x.shape[:-1], y.shape[1]]) for y in ys]
    return ys, xa, keep


def compute(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scale: Sequence[float],
    dropout_p: Sequence[float],
    rows: "RowGroups | None" = None,
    cast: torch.dtype | None = None,
) -> Sequence[Tensor]:  # G of y [..., N_g]
    """The operator, differentiable, on arguments that its caller has checked: those of `multi_lora_shared` with the adapters of all layers flat.

    rows: None where every row has the one adapter. cast: what autocast makes of x, weight and bias, or None.
    """
    if cast is not None:
        x, weight = x.to(cast), [w.to(cast) for w in weight]
        bias = [None if b is None else b.to(cast) for b in bias]
    order, offsets = (None, None) if rows is None else rows.for_rows(math.prod(x.shape[:-1]))
    seed = None
    if any(dropout_p):  # from torch's generator of x's device, so that checkpointing replays it; never read back
        seed = torch.randint(0, 2**63 - 1, (len(weight),), dtype=torch.int64, device=x.device)
    with checks.without_autocast(x.device) if torch._C._is_any_autocast_enabled() else NO_CONTEXT:
        if torch.is_grad_enabled():
            return LoRALinearFunction.apply(x, weight, bias, scale, dropout_p, seed, order, offsets, *lora_a, *lora_b)
        return _forward(x, weight, bias, lora_a, lora_b, scale, dropout_p, seed, order, offsets)[0]


_few_rows_now = ops.native("few_rows_now_cpu")


def compute_few(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scale: float
) -> Tensor | None:  # [..., N]
    """`compute` of one layer without dropout or gradients, in one call of csrc's; None where x has no few rows on a CPU, W is quantised, or somebody
    traces.
    """
    K = x.shape[-1]
    rows = x.numel() // K if K else 0
    if type(weight) is QuantisedWeight:
        return None
    if _few_rows_now is None or not 1 <= rows <= products.FEW_ROWS or not is_eager(x, weight, bias, lora_a, lora_b):
        return None
    key = "few rows", ops.forced, x.device.type, x.dtype, rows, weight.numel()
    native = table.choices.get(key)
    if native is None:
        native = x.dtype in ops.KERNEL_DTYPES and choose(x.reshape(rows, K), weight).implementation == "cpu"
        table.choices[key] = native
    if not native or weight.stride(1) != 1:  # one that lies by column is not in all dtypes csrc's (frozen/products.py)
        return None
    return _few_rows_now(x, weight, bias, lora_a, lora_b, scale)


# ---- what a caller may call


def lora_linear(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K], frozen
    bias: Tensor | None,  # [N], frozen
    lora_a: Tensor,  # [R, K]
    lora_b: Tensor,  # [N, R]
    scale: float,
    *,
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:  # [..., N]
    """y = x Wᵀ + b + scale · d(x) Aᵀ Bᵀ: a frozen linear layer and its LoRA update (Hu et al. 2021, LoRA, section 4.1).

    x, weight and bias have one dtype (float32, bfloat16, float16 or float64); lora_a and lora_b have that dtype or float32. Any strides.
    d is inverted dropout with probability `dropout_p` on the adapter's input only; its seed comes from torch's generator. Under autocast x,
    weight and bias are cast as `nn.Linear` would cast them. Gradients go to x, lora_a and lora_b.

    Raises:
        TypeError: an argument is no tensor or no number.
        ValueError: a shape, dtype, device, rank, scale or probability does not fit, or weight or bias requires a gradient.
        fastlora.ops.ImplementationError: FASTLORA_IMPL names an implementation that cannot run.
    """
    own = [[lora_a]], [[lora_b]], [[scale]], [[dropout_p]]
    return _compute_checked(x, [weight], [bias], own, training, lambda g, i: "")[0]


def lora_linear_shared(
    x: Tensor,  # [..., K]
    weight: Sequence[Tensor],  # G of [N_i, K], frozen
    bias: Sequence[Tensor | None],  # G of [N_i], frozen
    lora_a: Sequence[Tensor],  # G of [R_i, K]
    lora_b: Sequence[Tensor],  # G of [N_i, R_i]
    scale: Sequence[float],  # G
    *,
    dropout_p: Sequence[float] | float = 0.0,
    training: bool = True,
) -> list[Tensor]:  # G of [..., N_i]
    """`lora_linear` of G layers that have the same x: it is read once for all of them, and their dx is one tensor.

    Each layer has its own dropout mask. All lora_a and lora_b have one dtype, x's or float32.

    Raises:
        TypeError, ValueError: as `lora_linear`; the message names the layer, as in lora_a[2].
    """
    G = len(weight)
    p = [dropout_p] * G if isinstance(dropout_p, (int, float)) else list(dropout_p)
    _check_one_a_layer(G, weight=weight, bias=bias, lora_a=lora_a, lora_b=lora_b, scale=scale, dropout_p=p)
    own = [[[one] for one in column] for column in (lora_a, lora_b, scale, p)]
    return list(_compute_checked(x, weight, bias, own, training, lambda g, i: f"[{g}]"))


def multi_lora(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K], frozen
    bias: Tensor | None,  # [N], frozen
    lora_a: Sequence[Tensor],  # S of [R_i, K]
    lora_b: Sequence[Tensor],  # S of [N, R_i]
    scale: Sequence[float],  # S
    index: "Tensor | RowGroups",
    *,
    dropout_p: float | Sequence[float] = 0.0,
    training: bool = True,
) -> Tensor:  # [..., N]
    """Each row its own adapter: y = x Wᵀ + b + s_i · d_i(x) A_iᵀ B_iᵀ, and the base alone where i is -1.

    index: integer tensor, one an example (x.shape[0]) or one a row (x.shape[:-1]), or the `RowGroups` that `group_rows(index, S)` returns,
    made once per forward and passed to every layer. Ranks may differ; all adapters have one dtype, x's or float32. `dropout_p` is one
    probability for all or one an adapter. Gradients go to x and every lora_a and lora_b; an adapter without rows gets zeros.

    Raises:
        TypeError, ValueError: as `lora_linear`; the message names the adapter, as in lora_a[2].
        IndexError: an index is out of range (on a CUDA device raised by a later call; those rows become NaN).
    """
    own = [[column] for column in _adapter_lists(lora_a, lora_b, scale, dropout_p)]
    return _compute_checked(x, [weight], [bias], own, training, lambda g, i: f"[{i}]", index)[0]


def multi_lora_shared(
    x: Tensor,  # [..., K]
    weight: Sequence[Tensor],  # G of [N_g, K], frozen
    bias: Sequence[Tensor | None],  # G of [N_g], frozen
    lora_a: Sequence[Sequence[Tensor]],  # G of S of [R_gi, K]
    lora_b: Sequence[Sequence[Tensor]],  # G of S of [N_g, R_gi]
    scale: Sequence[Sequence[float]],  # G of S
    index: "Tensor | RowGroups",
    *,
    dropout_p: float | Sequence[float | Sequence[float]] = 0.0,
    training: bool = True,
) -> list[Tensor]:  # G of [..., N_g]
    """`multi_lora` of G layers that have the same x, where a row has the same adapter in all of them: x is read once for all layers' A.

    Every layer has S adapters, whose ranks may differ, and its own dropout masks. All lora_a and lora_b have one dtype, x's or float32.
    `dropout_p` is one probability for all, or for each layer one or a list with one an adapter.

    Raises:
        TypeError, ValueError, IndexError: as `multi_lora`; the message names the layer, then the adapter, as in lora_a[1][2].
    """
    G = len(weight)
    p = [dropout_p] * G if isinstance(dropout_p, (int, float)) else list(dropout_p)
    _check_one_a_layer(G, weight=weight, bias=bias, lora_a=lora_a, lora_b=lora_b, scale=scale, dropout_p=p)
    layers = zip(lora_a, lora_b, scale, p, strict=True)
    every = list(zip(*(_adapter_lists(*own, of=f"[{g}]") for g, own in enumerate(layers)), strict=True))
    for g in range(G):
        if len(lora_a[g]) != len(lora_a[0]):
            raise wrong(f"lora_a[{g}]", f"{len(lora_a[g])} adapters", f"{len(lora_a[0])}, as lora_a[0] has")
    return list(_compute_checked(x, weight, bias, every, training, lambda g, i: f"[{g}][{i}]", index))


def _check_one_a_layer(layers: int, **lists: Sequence[Any]) -> None:
    for name, values in lists.items():
        if len(values) != layers or not layers:
            raise wrong(name, f"{len(values)} entries", f"one for each of the {layers} weights, at least 1")


def _check_adapter(
    x: Tensor, dtype: torch.dtype, N: int, lora_a: Tensor, lora_b: Tensor, scale: float, which: str = ""
) -> None:
    """One adapter fits x and the weight; `dtype` is x's, after autocast."""
    checks.check_floats(lora_a, f"lora_a{which}")
    checks.check_floats(lora_b, f"lora_b{which}")
    if lora_a.dim() != 2 or lora_a.shape[1] != x.shape[-1]:
        raise wrong(f"lora_a{which}", lora_a, f"shape [R, {x.shape[-1]}]")
    if lora_a.shape[0] < 1:
        raise wrong(f"lora_a{which}", lora_a, "a rank of at least 1")
    if lora_b.dim() != 2 or lora_b.shape[0] != N or lora_b.shape[1] != lora_a.shape[0]:
        raise wrong(f"lora_b{which}", lora_b, f"shape [{N}, {lora_a.shape[0]}]")
    if lora_a.dtype != dtype and lora_a.dtype != torch.float32:
        raise wrong(f"lora_a{which}", lora_a, f"x's dtype {dtype} or float32")
    if lora_b.dtype != lora_a.dtype:
        raise wrong(f"lora_b{which}", lora_b, f"lora_a's dtype {lora_a.dtype}")
    for value, name in ((lora_a, "lora_a"), (lora_b, "lora_b")):
        if value.device != x.device:
            raise wrong(f"{name}{which}", value, f"x's device {x.device}")
    checks.check_number(scale, f"scale{which}")


def _adapter_lists(lora_a: Any, lora_b: Any, scale: Any, dropout_p: Any, of: str = "") -> tuple[Sequence[Any], ...]:
    """Lists with an entry an adapter of one layer. `of` stands behind the names: [1], a layer."""
    for name, values in (("lora_a", lora_a), ("lora_b", lora_b), ("scale", scale)):
        if not isinstance(values, Sequence):
            raise wrong_type(name + of, values, "a list with one entry an adapter")
    S = len(lora_a)
    if S < 1:
        raise wrong(f"lora_a{of}", list(lora_a), "at least one adapter")
    if len(lora_b) != S:
        raise wrong(f"lora_b{of}", f"{len(lora_b)} entries", f"{S}, one for each lora_a")
    if len(scale) != S:
        raise wrong(f"scale{of}", list(scale), f"{S} numbers, one for each lora_a")
    if isinstance(dropout_p, (int, float)):
        dropout_p = [dropout_p] * S
    if not isinstance(dropout_p, Sequence):
        raise wrong_type(f"dropout_p{of}", dropout_p, "a probability, or a list with one an adapter")
    if len(dropout_p) != S:
        raise wrong(f"dropout_p{of}", list(dropout_p), f"one probability, or {S}, one for each adapter")
    return lora_a, lora_b, scale, dropout_p


def _compute_checked(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    adapters: Sequence[Sequence[Sequence[Any]]],
    training: bool,
    of: Callable[[int, int], str],
    *index: Any,
) -> Sequence[Tensor]:
    """`compute`, after all arguments were found to fit.

    adapters: every A, B, scale and probability, by layer and adapter. of: what stands behind the names of a layer's adapter. index: of a mixed batch.
    """
    checks.check_floats(x, "x")
    cast = checks.autocast_dtype(x)
    every_a: list[Tensor] = []
    every_b: list[Tensor] = []
    scales, p = [], []
    for g, (w, c) in enumerate(zip(weight, bias, strict=True)):
        checks.check_base(x, w, c, autocast=cast is not None)
        for i, (a, b, s, q) in enumerate(zip(*(column[g] for column in adapters), strict=True)):
            _check_adapter(x, cast or x.dtype, w.shape[0], a, b, s, of(g, i))
            checks.check_probability(q, f"dropout_p{of(g, i)}")
            if every_a and a.dtype != every_a[0].dtype:
                raise wrong(f"lora_a{of(g, i)}", a, f"the dtype of lora_a{of(0, 0)}, {every_a[0].dtype}")
            every_a.append(a)
            every_b.append(b)
            scales.append(float(s))
            p.append(float(q) if training else 0.0)
    checks.check_transforms(x, *weight, *bias, *every_a, *every_b)
    rows = _rows_of_index(x, index[0], len(every_a) // len(weight)) if index else None
    return compute(x, list(weight), list(bias), every_a, every_b, scales, p, rows, cast)


# ---- whose rows are whose


class RowGroups:
    """The rows of a mixed batch sorted by adapter; made once per forward by `group_rows` and passed to every layer.

    index: int64 [B] or any shape, the adapter of each example or row, -1 for none. adapters: S.
    """

    def __init__(self, index: Tensor, adapters: int) -> None:
        self.index = index
        self.adapters = adapters
        self._by_rows: dict[int, tuple[Tensor, Tensor]] = {}
        self._apart: dict[int, tuple[Tensor, Tensor, list[int]]] = {}

    def for_rows(self, rows: int) -> tuple[Tensor, Tensor]:
        """(order [rows] int64, offsets [S + 3] int64) for an x of that many rows, a multiple of the index's elements."""
        found = self._by_rows.get(rows)  # kept here: another thread may clear them
        if found is None:
            if len(self._by_rows) >= 4:  # one that outlives a forward sees many row counts
                self._by_rows.clear()
            # Codes 0 (no adapter), 1 to S, and S + 1 for numbers that do not exist.
            beyond = self.adapters
            code = torch.where(self.index < -1, beyond, self.index.clamp(max=beyond)).flatten() + 1
            if rows != code.numel():
                code = code.repeat_interleave(rows // code.numel(), output_size=rows)
            ordered, order = torch.sort(code, stable=True)
            offsets = torch.searchsorted(ordered, torch.arange(self.adapters + 3, device=code.device))
            found = self._by_rows[rows] = order, offsets
        return found

    def apart(self, rows: int) -> tuple[Tensor, Tensor, list[int]]:
        """(order [rows], its inverse [rows], how many rows have no adapter and how many each adapter has [S + 1]) for an x of that many rows.

        Asks the device for the last, once.
        """
        found = self._apart.get(rows)
        if found is None:
            if len(self._apart) >= 4:
                self._apart.clear()
            order, offsets = self.for_rows(rows)
            found = self._apart[rows] = order, order.argsort(), offsets[:-1].diff().tolist()
        return found


def group_rows(index: Tensor, adapters: int) -> RowGroups:
    """Sort the rows of a mixed batch by adapter, on the index's device and without a sync.

    index: integer tensor, the adapter of each example ([B]) or of each row (x.shape[:-1]), from -1 (base only) to adapters - 1.

    Raises:
        TypeError, ValueError: index is no integer tensor, or there are no adapters.
        IndexError: an index is out of range. On a CUDA device it is raised by a later call instead, and those rows become NaN.
    """
    if not isinstance(index, Tensor):
        raise wrong_type("index", index, "an integer tensor")
    checks.check_integers(index, "index", index.shape, index.device)
    if not isinstance(adapters, int):
        raise wrong_type("adapters", adapters, "the number of adapters")
    if adapters < 1:
        raise wrong("adapters", adapters, "at least 1")
    index = index.to(torch.int64, copy=True)  # sorted later, whatever becomes of the caller's
    checks.check_in_range(
        index,
        -1,
        adapters - 1,
        f"index: expected numbers from -1 to {adapters - 1} (one for each adapter, -1: base only)",
    )
    return RowGroups(index, adapters)


def _rows_of_index(x: Tensor, index: Tensor | RowGroups, adapters: int) -> RowGroups:
    """The RowGroups of an index for x [..., K], checked against x's shape and device."""
    if isinstance(index, Tensor):
        if tuple(index.shape) not in (tuple(x.shape[:1]), tuple(x.shape[:-1])):
            raise wrong("index", index, f"shape {list(x.shape[:1])} (an example) or {list(x.shape[:-1])} (a row)")
        rows = group_rows(index, adapters)
    elif isinstance(index, RowGroups):
        rows = index
    else:
        raise wrong_type("index", index, "an integer tensor or the RowGroups of group_rows")
    if rows.adapters != adapters:
        raise ValueError(f"index: expected RowGroups for {adapters} adapters, got them for another number")
    if rows.index.device != x.device:
        raise wrong("index", rows.index, f"x's device {x.device}")
    given, count = rows.index.numel(), math.prod(x.shape[:-1])
    # Only a flattened x [M, K] leaves open how many rows an example has.
    fits = count % given == 0 if x.dim() == 2 and given else given in (x.shape[0], count)
    if not fits:
        raise wrong("index", rows.index, f"one number an example or a row of x {list(x.shape)}")
    return rows


# ---- what is measured of it


def calls(
    case: str, rank: int, M: int, K: int, N: int, dtype: torch.dtype, device: torch.device, dropout: bool
) -> dict[str, list[Call]]:
    """Arguments of a case and of its backward (choice/problems.py)."""
    shared, mixed = CASE_OF.get(case, (False, False))
    draw = Draw(dtype, device)
    G, S = SIBLINGS if shared else 1, ADAPTERS if mixed else 1
    x, weight, dy = draw.linear(M, K, N)
    # In float32, as PEFT has them.
    lora_a = [draw.normal(rank, K, scale=K**-0.5, dtype=torch.float32) for _ in range(G * S)]
    lora_b = [draw.normal(N, rank, scale=rank**-0.5, dtype=torch.float32) for _ in range(G * S)]
    seed = draw.integers(2**62, G) if dropout else None
    bias = [draw.normal(N) if dropout else None] * G
    numbers = [SCALE] * (G * S), [DROPOUT_P if dropout else 0.0] * (G * S)
    sorting = mixed_rows(M, device) if mixed else (None, None)
    weights = weights_in_turn(weight, M, G)
    layers = [weights[first : first + G] for first in range(0, len(weights), G)]
    _, xa, keep = reference.lora_linear(x, layers[0], bias, lora_a, lora_b, *numbers, seed, *sorting)
    return {
        case: [(x, own, bias, lora_a, lora_b, *numbers, seed, *sorting) for own in layers],
        f"{case}_backward": [
            ([dy] * G, x, own, lora_a, lora_b, xa, keep, *numbers, *sorting, True, True, True) for own in layers
        ],
    }


def comparable(results: Any, call: Call) -> list[Tensor]:
    """y of each layer, xa, and of keep the mask that a backward reads; or the three gradients."""
    first, second, keep = results
    if isinstance(first, Tensor):
        return [first, second, keep]
    order, offsets = call[-2:]
    mask = reference.read_keep(keep, call[0].shape[1])
    if order is not None and keep.numel():
        mask = mask[:, order[offsets[1] :]]  # the rows that have an adapter
    return [*first, second, mask]


def rank_classes(device_type: str, dtype: torch.dtype, sizes: Sequence[str]) -> Iterable[tuple[int, str, bool]]:
    """Those of `linear_classes` where the adapter can be added in several ways."""
    if device_type != "cpu":
        return []
    return [one for one in linear_classes(device_type, dtype, sizes) if one[0] >= composed.FEWEST_MEASURED]


for _rank in table.RANKS:  # before the rest, which adds the adapter in the way that was faster
    _case = table.rank_case(_rank)
    problems.operators[_case] = Measured(partial(calls, _case, _rank), rank_classes, comparable, offers=composed.offers)
for _case in CASE_OF:
    problems.operators[_case] = Measured(partial(calls, _case, RANK), linear_classes, comparable)
