"""What a layer computes around the operator: DoRA's factors, and biases that are trained. A few more passes over the result, composed of operators.

    DoRA    y = c ∘ (W + s B A) x + b with c = m / ‖W + s B A‖ (operators/dora_factor.py, operators/scale_columns.py)

With dropout PEFT gives c's part what was kept, d(x), and the base all of x: y = (W x - W d(x)) + c ∘ (W + s B A) d(x) + b, whose first two
are one product, of x - d(x). d is torch's own dropout there, drawn as PEFT draws it.

In a mixed batch a row without a DoRA, be its adapter a plain LoRA or none, has c = 1, and for the base d(x) = x. Rows are put in the order of their
adapters for what each adapter does to its own, and back again: no row sees another's numbers, and autograd adds nothing up by chance.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora.gradients import rows_of, shaped
from fastlora.operators import dora_factor, lora_linear, scale_columns
from fastlora.operators.frozen_linear import frozen_linear
from fastlora.operators.lora_cross_entropy import lora_cross_entropy
from fastlora.operators.lora_linear import RowGroups
from fastlora.peft.obstacles import Added, Plan


def compute_dora(
    plans: Sequence[Plan], x: Tensor, cast: torch.dtype | None, rows: RowGroups | None = None
) -> list[Tensor]:
    """The results of layers that share x and have DoRA adapters, but for biases that are trained.

    cast: what autocast makes of x, or None. rows: of a mixed batch.
    """
    if any(plan.dropout_p[i] for plan in plans for i in plan.magnitude):
        return [_with_dropout(plan, x, cast, rows) for plan in plans]
    return [_scaled(plan, u, rows, plan.bias) for plan, u in zip(plans, _updated(plans, x, cast, rows), strict=True)]


@torch._disable_dynamo
def compute_mixed_dora(plans: Sequence[Plan], x: Tensor, cast: torch.dtype | None, rows: RowGroups) -> list[Tensor]:
    """`compute_dora` of a mixed batch. Between a compiler's graphs: in training it fails on the Functions here, after the break that names are."""
    return compute_dora(plans, x, cast, rows)


def _updated(plans: Sequence[Plan], x: Tensor, cast: torch.dtype | None, rows: RowGroups | None) -> Sequence[Tensor]:
    """(W + s B A) x of each; a plain LoRA's rows with its own dropout."""
    return lora_linear.compute(
        x,
        [plan.linear_weight for plan in plans],
        [None] * len(plans),
        [a for plan in plans for a in plan.lora_a],
        [b for plan in plans for b in plan.lora_b],
        [s for plan in plans for s in plan.scale],
        [0.0 if i in plan.magnitude else p for plan in plans for i, p in enumerate(plan.dropout_p)],
        rows,
        cast,
    )


def _scaled(plan: Plan, u: Tensor, rows: RowGroups | None, bias: Tensor | None) -> Tensor:
    """c ∘ u + b."""
    bias = None if bias is None else bias.to(u.dtype)
    if rows is None:
        return scale_columns.apply(u, _factor(plan, 0), bias)
    sizes = rows.apart(len(rows_of(u)))[2]
    factors = {i: _factor(plan, i) for i in plan.magnitude if sizes[i + 1]}  # a plan may have adapters without a row
    return scale_rows(u, factors, rows, bias)


def _factor(plan: Plan, place: int) -> Tensor:
    given = plan.magnitude[place], plan.linear_weight, plan.lora_a[place], plan.lora_b[place], plan.scale[place]
    return dora_factor.apply_kept(plan.norm[place], *given)


def _with_dropout(plan: Plan, x: Tensor, cast: torch.dtype | None, rows: RowGroups | None) -> Tensor:
    if rows is None:
        kept = F.dropout(x, plan.dropout_p[0])
    else:
        kept = _apart(x, rows, lambda own, i: F.dropout(own, plan.dropout_p[i]) if i in plan.magnitude else own)
    [u] = _updated([plan], kept, cast, rows)
    return frozen_linear(x - kept, plan.linear_weight, plan.bias) + _scaled(plan, u, rows, None)


def scale_rows(u: Tensor, factors: Mapping[int, Tensor], rows: RowGroups, bias: Tensor | None) -> Tensor:
    """c ∘ u + b of u [..., N], with the c [N] of each row's adapter, by that one's number; 1 for those that have none."""

    def change(own: Tensor, adapter: int) -> Tensor:
        if adapter in factors:
            return scale_columns.apply(own, factors[adapter], bias)
        return own if bias is None else own + bias

    return _apart(u, rows, change)


def _apart(x: Tensor, rows: RowGroups, change: Callable[[Tensor, int], Tensor]) -> Tensor:
    """x [..., N] with each adapter's rows changed as `change` does it, which is given them and the adapter's number, or -1 for none."""
    flat = rows_of(x)
    order, inverse, sizes = rows.apart(len(flat))
    parts = flat.index_select(0, order).split(sizes)
    return shaped(torch.cat([change(own, i - 1) for i, own in enumerate(parts)]).index_select(0, inverse), x)


def add_biases(y: Tensor, plan: Plan, rows: RowGroups | None) -> Tensor:
    """The result with the biases that may be trained; in place, but for those of a mixed batch's adapters. rows: of a mixed batch."""
    of_adapters = {} if rows is None else {one.place: one for one in plan.added if one.place is not None}
    for one in plan.added:
        if one.place not in of_adapters:
            y = y.add_(_scaled_bias(one))
    return _add_by_row(y, of_adapters, rows) if rows is not None and of_adapters else y


def _scaled_bias(one: Added) -> Tensor:
    return one.bias if one.scale == 1.0 else one.bias * one.scale


@torch._disable_dynamo
def _add_by_row(y: Tensor, of_adapters: Mapping[int, Added], rows: RowGroups) -> Tensor:
    """Each row with the bias of its own adapter."""

    def change(own: Tensor, adapter: int) -> Tensor:
        one = of_adapters.get(adapter)
        return own if one is None else (own + _scaled_bias(one)).to(own.dtype)

    return _apart(y, rows, change)


def head_obstacle(plan: Plan) -> str | None:
    """Why a head's loss is not computed without its logits, or None."""
    if plan.magnitude:
        return "the head has a DoRA adapter"
    if plan.added:
        return "the head has a bias that is trained, or B one"
    return None


def cross_entropy(plan: Plan, hidden: Tensor, labels: Tensor, losses: Tensor | None = None) -> Tensor:
    """The summed cross entropy of labels [n] under a head with adapters, of hidden [n, D]; dropout is torch's own.

    losses: [n]; out: the rows' own.
    """
    kept = F.dropout(hidden, plan.dropout_p[0]) if plan.dropout_p[0] else hidden
    xa = [F.linear(kept, a.to(kept.dtype)) * scale for a, scale in zip(plan.lora_a, plan.scale, strict=True)]
    lora_b = plan.lora_b
    both = (torch.cat(xa, 1), torch.cat(lora_b, 1)) if len(xa) > 1 else (xa[0], lora_b[0])
    return lora_cross_entropy(hidden, both[0], plan.linear_weight, plan.bias, both[1], labels, losses)
