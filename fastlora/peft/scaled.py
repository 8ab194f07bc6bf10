"""IA³'s layers (Liu et al. 2022): a frozen product, with one factor a column before it (`feedforward_modules`) or after it. PEFT's class gets one
derived from it, whose forward is two operators: `frozen_linear` and `scale_columns`. In a mixed batch each row has its own adapter's factor.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners import ia3
from torch import Tensor, nn

from fastlora import checks, ops
from fastlora.choice.table import name_of
from fastlora.frozen import packed
from fastlora.frozen.quantised import QuantisedWeight
from fastlora.operators import frozen_linear, scale_columns
from fastlora.operators.lora_linear import RowGroups
from fastlora.peft import composed, mixed, obstacles, probing, quantised
from fastlora.peft.layers import (
    NOT_CALLED,
    ROWS_BEFORE_ANY_CALL,
    SEEN,
    Seen,
    last_fused_call,
    note_own_forward,
    restore_layer,
)
from fastlora.swap import become, derive, is_derived


class Scaling(NamedTuple):
    """What a call computes."""

    weight: Tensor  # [N, K]
    bias: Tensor | None
    factors: list[
        Tensor
    ]  # of each active adapter, [1, K] or [N, 1]: their product scales x or the result; of a mixed batch, of each in it


def lasting_plan(layer: Any, names: Sequence[str] | None = None) -> Scaling | str:
    """The plan of any call just now, or why it runs PEFT's own forward. names: of a mixed batch's adapters."""
    if layer.disable_adapters:
        return "adapters are disabled"
    if layer.merged:
        return "the adapter is merged"
    own = layer._modules["ia3_l"]
    factors = [own[name] for name in (layer.active_adapters if names is None else names) if name in own]
    if not factors:
        return "no adapter is active"
    if any(obstacles.GLOBAL_HOOKS):
        return "a global hook is set"
    plan = obstacles.plan_of_base(layer)
    if isinstance(plan, str):
        return plan
    if plan.added:
        return "the base weight or bias is trained"
    weight = plan.linear_weight
    columns = weight.shape[1 if layer.is_feedforward else 0]
    for one in factors:
        if type(one) is not nn.Parameter or one.numel() != columns or one.device != weight.device:
            return f"a factor is {checks.shown(one)}, and the weight {checks.shown(weight)}"
        if one.dtype not in (weight.dtype, torch.float32):
            return f"a factor is {name_of(one.dtype)} and the weight {name_of(weight.dtype)}"
    return Scaling(weight, plan.bias, factors)


def _plan_call(layer: Any, x: Any, names: Sequence[str] | None = None) -> Scaling | str:
    plan = lasting_plan(layer, names)
    if isinstance(plan, str):
        return plan
    obstacle = obstacles.input_obstacle(x)
    if obstacle is not None:
        return obstacle
    cast, weight = checks.autocast_dtype(x), plan.weight
    if type(weight) is QuantisedWeight:
        if cast not in (None, x.dtype):
            return f"autocast is on, the weight quantised, and x {name_of(x.dtype)}"
        weight = obstacles.multiplied(layer._modules["base_layer"], x.dtype)
        plan = plan._replace(weight=weight)
    if x.shape[-1] != weight.shape[1] or x.device != weight.device or (cast is None and x.dtype != weight.dtype):
        return f"x is {checks.shown(x)} and the weight {checks.shown(weight)}"
    return plan


def _scale(rows: Tensor, factors: list[Tensor], groups: RowGroups | None) -> Tensor:
    wide = torch.promote_types(rows.dtype, torch.float32)
    if groups is not None:
        return composed.scale_rows(rows, {i: one.flatten().to(wide) for i, one in enumerate(factors)}, groups, None)
    factor = factors[0].flatten().to(wide)
    for one in factors[1:]:
        factor = factor * one.flatten()
    return scale_columns.apply(rows, factor, None)


def _compute(layer: Any, x: Tensor, plan: Scaling, groups: RowGroups | None) -> Tensor:
    if layer.is_feedforward:
        y = frozen_linear.frozen_linear(_scale(x, plan.factors, groups), plan.weight, plan.bias)
    else:
        y = _scale(frozen_linear.frozen_linear(x, plan.weight, plan.bias), plan.factors, groups)
    if not torch.compiler.is_compiling():
        layer.__dict__[SEEN] = Seen(x.shape, y.dtype, mixed=groups is not None)
    return y


def _compute_mixed(layer: Any, x: Tensor, names: tuple[str, ...]) -> Tensor:
    """A mixed batch's result. PEFT's own forward would give each row the active adapter, so there is none to fall back on.

    Raises:
        ValueError: there are more or fewer names than rows, or something stands in the way.
    """
    if len(names) != len(x):
        raise ValueError(f"adapter_names: got {len(names)}, expected one for each of {len(x)} rows")
    used = [name for name in dict.fromkeys(names) if name in layer._modules["ia3_l"]]
    if layer.disable_adapters or not (used or layer.merged):
        y: Tensor = layer.base_layer(x)
        return y
    plan = _plan_call(layer, x, used)
    if isinstance(plan, str):
        raise ValueError(f"adapter_names: an IA³ layer cannot give each row its own: {plan}")
    return _compute(layer, x, plan, mixed.groups_of(names, used, x))


@functools.cache
def with_scaling(plain: Any) -> type:
    """The class derived from `peft.tuners.ia3.Linear`."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = mixed.names_of(self) if mixed.under_way else None
        if names is not None:
            return _compute_mixed(self, x, names)
        if SEEN in self.__dict__:
            mixed.require_names(self.__dict__[SEEN].mixed)
        plan = "the call has arguments besides x" if args or kwargs else _plan_call(self, x)
        if isinstance(plan, str):
            note_own_forward(self, plan, passing=plan != lasting_plan(self))
            return plain.forward(self, x, *args, **kwargs)
        return _compute(self, x, plan, None)

    # PEFT writes into the base weight through `.data`.

    def merge(self: Any, *args: Any, **kwargs: Any) -> None:
        with packed.rewriting(self.base_layer):
            plain.merge(self, *args, **kwargs)

    def unmerge(self: Any) -> None:
        with packed.rewriting(self.base_layer):
            plain.unmerge(self)

    def _apply(self: Any, *args: Any, **kwargs: Any) -> Any:
        with packed.rewriting(self.base_layer):
            return plain._apply(self, *args, **kwargs)

    return derive(plain, with_scaling, mixed.ByRow, forward=forward, merge=merge, unmerge=unmerge, _apply=_apply)


def is_swapped(layer: nn.Module) -> bool:
    return isinstance(layer, ia3.IA3Layer) and is_derived(layer)


QUANTISED = ("peft.tuners.ia3.bnb.Linear4bit", "peft.tuners.ia3.bnb.Linear8bitLt")
"""PEFT's layers over bitsandbytes'; by name, since their module needs it."""


def _can_be_swapped(layer: nn.Module) -> bool:
    return type(layer) is ia3.Linear or _name_of(layer) in QUANTISED


def _name_of(layer: nn.Module) -> str:
    return f"{type(layer).__module__}.{type(layer).__name__}"


def swap_obstacle(layer: Any) -> str | None:
    """Why the layer's class is not swapped, or None."""
    if not _can_be_swapped(layer):
        return f"{_name_of(layer)} is not fused"
    if "forward" in layer.__dict__:
        return "its forward was replaced on the object"
    if type(layer.base_layer).forward not in obstacles.FROZEN_FORWARDS:
        probing.probe(layer.base_layer)
    plan = obstacles.plan_of_base(layer)
    return plan if isinstance(plan, str) else "the base weight or bias is trained" if plan.added else None


def attach(layer: Any) -> str | None:
    """Swap the class of an IA³ layer; why not, or None."""
    if is_swapped(layer):
        return None
    if _can_be_swapped(layer):
        restore_layer(layer.base_layer)  # of a layer that got its adapter since the last call
    obstacle = swap_obstacle(layer)
    if obstacle is None:
        kind: Any = type(layer)
        become(layer, with_scaling(kind))
        quantised.hold(layer.base_layer)
    return obstacle


def describe(layer: Any) -> tuple[str, str]:
    """(implementation, reason), for people, of the layer's last call that nobody compiled; before any a guess, for as many rows as others' is."""
    if not is_swapped(layer):
        return "peft", swap_obstacle(layer) or "not accelerated: call fastlora.accelerate(model)"
    obstacle = lasting_plan(layer)
    seen = last_fused_call(layer, obstacle)
    if isinstance(obstacle, str):  # which the former says
        return "reference", str(seen)
    weight = obstacle.weight
    called = seen != NOT_CALLED
    if not called:
        seen = Seen((ROWS_BEFORE_ANY_CALL, weight.shape[1]), weight.dtype)
    if isinstance(seen, str):
        return "reference", seen
    rows = math.prod(seen.shape[:-1])
    like = weight.new_empty(1, 1, dtype=seen.dtype).expand(rows, weight.shape[1])
    try:
        choice, how = scale_columns.choose(like), frozen_linear.choose(like, weight)
    except ops.ImplementationError as error:
        return str(ops.forced), f"cannot run: {error}"
    where = "before" if layer.is_feedforward else "after"
    reason = f"{rows} row{'s' * (rows != 1)}: {how.reason}; one factor a column {where} it: {choice.reason}"
    reason = reason if called else f"{NOT_CALLED}; {reason}"
    return choice.implementation, reason
