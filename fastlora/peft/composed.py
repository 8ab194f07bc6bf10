"""What a layer computes around the operator: DoRA's factors, and biases that are trained. A few more passes over the result, composed of operators.

    DoRA    y = c ∘ (W + s B A) x + b with c = m / ‖W + s B A‖ (operators/dora_factor.py, operators/scale_columns.py)

With dropout PEFT gives c's part what was kept, d(x), and the base all of x: y = (W x - W d(x)) + c ∘ (W + s B A) d(x) + b, whose first two
are one product, of x - d(x). d is torch's own dropout there, drawn as PEFT draws it.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora.operators import dora_factor, lora_linear, scale_columns
from fastlora.operators.frozen_linear import frozen_linear
from fastlora.operators.lora_cross_entropy import lora_cross_entropy
from fastlora.peft.obstacles import Plan


def compute_dora(plans: Sequence[Plan], x: Tensor, cast: torch.dtype | None) -> list[Tensor]:
    """The results of DoRA layers that share x, but for biases that are trained. cast: what autocast makes of x, or None."""
    if any(any(plan.dropout_p) for plan in plans):
        return [_with_dropout(plan, x, cast) for plan in plans]
    return [
        scale_columns.apply(u, _factor(plan), None if plan.bias is None else plan.bias.to(u.dtype))
        for plan, u in zip(plans, _updated(plans, x, cast), strict=True)
    ]


def _updated(plans: Sequence[Plan], x: Tensor, cast: torch.dtype | None) -> Sequence[Tensor]:
    """(W + s B A) x of each."""
    return lora_linear.compute(
        x,
        [plan.linear_weight for plan in plans],
        [None] * len(plans),
        [a for plan in plans for a in plan.lora_a],
        [b for plan in plans for b in plan.lora_b],
        [s for plan in plans for s in plan.scale],
        [0.0] * len(plans),
        None,
        cast,
    )


def _factor(plan: Plan) -> Tensor:
    given = plan.magnitude[0], plan.linear_weight, plan.lora_a[0], plan.lora_b[0], plan.scale[0]
    return dora_factor.apply_kept(plan.norm, *given)


def _with_dropout(plan: Plan, x: Tensor, cast: torch.dtype | None) -> Tensor:
    kept = F.dropout(x, plan.dropout_p[0])
    [u] = _updated([plan], kept, cast)
    return frozen_linear(x - kept, plan.linear_weight, plan.bias) + scale_columns.apply(u, _factor(plan), None)


def add_biases(y: Tensor, plan: Plan) -> Tensor:
    """The result with the biases that may be trained; in place."""
    for bias, scale in plan.added:
        y = y.add_(bias if scale == 1.0 else bias * scale)
    return y


def head_obstacle(plan: Plan) -> str | None:
    """Why a head's loss is not computed without its logits, or None."""
    if plan.magnitude:
        return "the head has a DoRA adapter"
    if plan.added:
        return "the head has a bias that is trained, or B one"
    return None


def cross_entropy(plan: Plan, hidden: Tensor, labels: Tensor) -> Tensor:
    """The summed cross entropy of labels [n] under a head with adapters, of hidden [n, D]; dropout is torch's own."""
    kept = F.dropout(hidden, plan.dropout_p[0]) if plan.dropout_p[0] else hidden
    xa = [F.linear(kept, a.to(kept.dtype)) * scale for a, scale in zip(plan.lora_a, plan.scale, strict=True)]
    lora_b = plan.lora_b
    both = (torch.cat(xa, 1), torch.cat(lora_b, 1)) if len(xa) > 1 else (xa[0], lora_b[0])
    return lora_cross_entropy(hidden, both[0], plan.linear_weight, plan.bias, both[1], labels)
