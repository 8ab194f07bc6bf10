"""The classes that `accelerate` swaps layers to. Only the class changes: what the fused forward does not cover runs the forward of PEFT's class."""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from peft.tuners import ia3, lora
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from fastlora import checks, swap
from fastlora.choice.table import name_of
from fastlora.frozen import packed
from fastlora.operators import frozen_linear, lora_linear
from fastlora.peft import composed, known, mixed, obstacles, probing, quantised, siblings
from fastlora.peft.obstacles import Plan

SEEN, OWN_FORWARD = "_fastlora_seen", "_fastlora_own_forward"
"""Under which a layer's `__dict__` has its last calls, for `report`."""


NOT_COPIED = (siblings.KEY, known.ACTIVE, known.MIXED, obstacles.NORMS)
"""What a copy or a pickle of a layer leaves out of its `__dict__`."""


ROWS_BEFORE_ANY_CALL = 512  # of which `report` tells then
NOT_CALLED = "not called yet, unless compiled"


class Seen(NamedTuple):
    """What `report` needs to know of a layer's last fused call."""

    shape: Sequence[int]  # of x
    dtype: torch.dtype
    dropout: bool = False
    mixed: bool = False  # a mixed batch
    shared: bool = False  # computed with its siblings; experts: all at once


class OwnForward(NamedTuple):
    """The last call that ran the forward of the layer's own class."""

    obstacle: str
    passing: bool  # the call stood in the way, not the layer
    before: Seen | None  # the last fused call up to then


def last_fused_call(layer: nn.Module, plan: object) -> Seen | str:
    """A layer's last call, if that was fused and the next one may be; else what people are told.

    plan: how the layer's state lets it run; a string: why not.
    """
    seen: Seen | None = layer.__dict__.get(SEEN)
    own: OwnForward | None = layer.__dict__.get(OWN_FORWARD)
    if own is not None and own.before is seen:
        return f"PEFT's own forward: {own.obstacle}"
    if plan == obstacles.IN_PIECES and seen is not None:
        return "fused in its last call, sharded between calls"
    if isinstance(plan, str):
        return f"PEFT's own forward from now on: {plan}"
    return NOT_CALLED if seen is None else seen


if TYPE_CHECKING:
    _Layer = lora.Linear
else:
    _Layer = object


def note_own_forward(layer: nn.Module, obstacle: str, passing: bool) -> None:
    if not torch.compiler.is_compiling():
        layer.__dict__[OWN_FORWARD] = OwnForward(obstacle, passing, layer.__dict__.get(SEEN))


class Fused(mixed.ByRow, _Layer):
    """What a LoRA layer of PEFT becomes, by going before its class: its forward is one fused operator, where the layer's state allows."""

    base_layer: Any  # PEFT's attributes, which nn.Module types as Tensor | Module
    lora_A: Any
    lora_B: Any

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter_names = mixed.names_of(self) if mixed.under_way else None
        if adapter_names is None:
            adapter_names = kwargs.get("adapter_names")
            if adapter_names is None and SEEN in self.__dict__:
                mixed.require_names(self.__dict__[SEEN].mixed)
        else:
            kwargs["adapter_names"] = adapter_names
        of_rows = adapter_names if isinstance(adapter_names, mixed.RowNames) else None
        names = of_rows if adapter_names is None or of_rows is not None else tuple(adapter_names)
        if args or len(kwargs) > (names is not None) and _has_more(kwargs):
            plan: Plan | str = "the call has arguments besides x"
            used: Sequence[str] = obstacles.used_adapters(self, names)
        else:
            used, plan = known.plan_call(self, x, names)
        if of_rows is not None and (isinstance(plan, str) or not of_rows.fit(x)):
            return self._without_own(x, used, plan)
        if isinstance(plan, str):
            if names is not None:
                self._require_no_dora(used, plan)
            own = super().forward(x, *args, **kwargs)
            note_own_forward(self, plan, passing=plan != obstacles.lasting_plan(self, used))
            return own
        if names is not None and of_rows is None and len(names) != len(x):
            self._check_forward_args(x, adapter_names=names)  # raises, as of all that it checks the rest are obstacles
        if torch.compiler.is_compiling():
            return compute([plan], x, used, names)[0]
        family = self.__dict__.get(siblings.KEY)
        shared = (
            None if family is None or (names is None and len(used) != 1) else family.result_of(self, x, plan, names)
        )
        y = compute([plan], x, used, names)[0] if shared is None else shared
        self.__dict__[SEEN] = Seen(x.shape, y.dtype, any(plan.dropout_p), names is not None, shared is not None)
        return y

    def _without_own(self, x: Tensor, used: Sequence[str], plan: Plan | str) -> Tensor:
        """What a layer gives that has none of a batch's adapters; PEFT's own forward does not know `RowNames`."""
        if used:
            told = plan if isinstance(plan, str) else f"x is {checks.shown(x)}, and the names are of another batch"
            raise ValueError(f"a batch of several adapters: {told}")
        y: Tensor = self.base_layer(x)
        return y

    def _require_no_dora(self, used: Sequence[str], obstacle: str) -> None:
        """
        Raises:
            ValueError: a row has a DoRA adapter, which PEFT's own forward of a mixed batch does not know.
        """
        for name in used:
            if self.use_dora.get(name):
                raise ValueError(f"adapter_names: adapter {name!r} is a DoRA, and {obstacle}")

    def cross_entropy_obstacle(self) -> str | None:
        """Why `cross_entropy` cannot be asked just now, or None: for a language model's head (language_model_loss.py)."""
        used = obstacles.used_adapters(self, None)
        if len(used) > 1 and any(type(obstacles.adapter_of(self, name)[2]) is nn.Dropout for name in used):
            return "several adapters are active with dropout"  # in training, and asked in eval mode as well
        plan = obstacles.lasting_plan(self, used)
        return plan if isinstance(plan, str) else composed.head_obstacle(plan)

    def cross_entropy(self, hidden: Tensor, labels: Tensor, losses: Tensor | None = None) -> Tensor:
        """The summed cross entropy of labels [n] under the layer's result for hidden [n, D], without that result.

        losses: [n]; out: the rows' own.
        """
        used = obstacles.used_adapters(self, None)
        plan = obstacles.plan_call(self, hidden, used, is_mixed=False)
        if isinstance(plan, str):
            raise ValueError(f"hidden: {plan}")
        loss = composed.cross_entropy(plan, hidden, labels, losses)
        self.__dict__[SEEN] = Seen(hidden.shape, hidden.dtype, any(plan.dropout_p))
        return loss

    def __getstate__(self) -> dict[str, Any]:
        # Or a copy of one layer would take its parent and its siblings along, or weights that it has no more.
        return {name: value for name, value in self.__dict__.items() if name not in NOT_COPIED}

    # What a layer knows would keep the weights alive that PEFT replaces or moves. It writes into the base weight through `.data`.

    def merge(self, *args: Any, **kwargs: Any) -> None:
        known.forget(self)
        with packed.rewriting(self.base_layer):
            super().merge(*args, **kwargs)

    def unmerge(self) -> None:
        known.forget(self)
        with packed.rewriting(self.base_layer):
            super().unmerge()

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        known.forget(self)
        with packed.rewriting(self.base_layer):  # OLoRA begins by changing it
            super().update_layer(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        known.forget(self)  # with assign=True the base gets another weight
        super()._load_from_state_dict(*args, **kwargs)

    def delete_adapter(self, *args: Any, **kwargs: Any) -> None:
        known.forget(self)
        super().delete_adapter(*args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        known.forget(self)
        with packed.rewriting(self.base_layer):  # moved: the copies are of no use, wherever it goes
            return super()._apply(*args, **kwargs)

    def unload_and_optionally_merge_module(self, merge: bool, safe_merge: bool, adapter_names: Any) -> nn.Module:
        """What PEFT asks of a layer that is more than its class: its frozen layer, merged or not, without anything of ours."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        base = self.get_base_layer()
        siblings.leave(self)
        restore_layer(self)
        restore_layer(base)
        return base


class FusedLinear(Fused, lora.Linear):
    """`peft.tuners.lora.Linear` as it is swapped."""


@functools.cache
def fused_class(plain: Any) -> type:
    """What a layer of that class is swapped to: those of quantised bases have classes of their own."""
    return FusedLinear if plain is lora.Linear else swap.derive(plain, fused_class, Fused)


def _has_more(kwargs: dict[str, Any]) -> bool:
    return any(value is not None for name, value in kwargs.items() if name != "adapter_names")


def compute(plans: Sequence[Plan], x: Tensor, used: Sequence[str], names: known.AdapterNames) -> Sequence[Tensor]:
    """The results of layers that share x and, in a mixed batch, the adapters of its rows."""
    ys = _compute_updates(plans, x, used, names)
    if any(plan.added for plan in plans):
        rows = None if names is None else mixed.groups_of(names, used, x)
        return [composed.add_biases(y, plan, rows) for y, plan in zip(ys, plans, strict=True)]
    return ys


def _compute_updates(
    plans: Sequence[Plan], x: Tensor, used: Sequence[str], names: known.AdapterNames
) -> Sequence[Tensor]:
    """The same without biases that are trained."""
    weight, bias, transposed, lora_a, lora_b, scale, dropout_p, magnitude, *_ = plans[0]
    cast = checks.autocast_dtype(x) if torch._C._is_any_autocast_enabled() else None
    if magnitude:
        if names is None:
            return composed.compute_dora(plans, x, cast)
        return composed.compute_mixed_dora(plans, x, cast, mixed.groups_of(names, used, x))
    alone = len(lora_a) == 1 and names is None and len(plans) == 1 and cast is None and not transposed
    if alone and not dropout_p[0] and not torch.is_grad_enabled():
        y = lora_linear.compute_few(x, weight, bias, lora_a[0], lora_b[0], scale[0])
        if y is not None:
            return [y]
    rows = None if names is None else mixed.groups_of(names, used, x)
    if len(plans) > 1:
        lora_a, lora_b = [a for one in plans for a in one.lora_a], [b for one in plans for b in one.lora_b]
        scale, dropout_p = [s for one in plans for s in one.scale], [p for one in plans for p in one.dropout_p]
        weights, biases = [one.linear_weight for one in plans], [one.bias for one in plans]
        return lora_linear.compute(x, weights, biases, lora_a, lora_b, scale, dropout_p, rows, cast)
    if names is None and len(used) > 1:
        # A sum of adapters is one adapter of their concatenated rank. With dropout there is an obstacle.
        lora_b = [torch.cat([b * s for b, s in zip(lora_b, scale, strict=True)], dim=1)]
        lora_a, scale, dropout_p = [torch.cat(lora_a)], [1.0], [0.0]
    return lora_linear.compute(
        x, [weight.t() if transposed else weight], [bias], lora_a, lora_b, scale, dropout_p, rows, cast
    )


class FrozenLinear(nn.Linear):
    """A frozen `nn.Linear` whose forward is `functional.frozen_linear`, as long as it stays frozen."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = obstacles.parameter(self, "weight"), obstacles.parameter(self, "bias")
        lasting = obstacles.weight_obstacle(weight, bias)
        obstacle = lasting or obstacles.input_obstacle(x)
        if obstacle is not None:
            y = super().forward(x)
            note_own_forward(self, obstacle, passing=lasting is None)
            return y
        y = frozen_linear.frozen_linear(x, weight, bias)
        if not torch.compiler.is_compiling():
            self.__dict__[SEEN] = Seen(x.shape, y.dtype)
        return y

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        with packed.rewriting(self):
            return super()._apply(*args, **kwargs)

    def unload_and_optionally_merge_module(self, merge: bool, safe_merge: bool, adapter_names: Any) -> nn.Module:
        """What PEFT asks of a layer that is more than its class, as it unloads a model: the nn.Linear."""
        restore_layer(self)
        return self

    @property
    def base_layer(self) -> Any:
        """PEFT asks a layer for this when it wraps it and before it merges into its weight through `.data`; there is none."""
        packed.drop(self.weight)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute 'base_layer'")


obstacles.FROZEN_FORWARDS.append(FrozenLinear.forward)


class FrozenQuantised(_Layer):
    """What a quantised layer without an adapter becomes, by going before its class: its product is `functional.frozen_linear`."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        weight = "the call has arguments besides x" if args or kwargs else self._weight_for(x)
        if isinstance(weight, str):
            own = super().forward(x, *args, **kwargs)
            note_own_forward(self, weight, passing=not isinstance(quantised.base_of(self), str))
            return own
        y = frozen_linear.frozen_linear(x, weight, obstacles.parameter(self, "bias"))
        self.__dict__[SEEN] = Seen(x.shape, y.dtype)
        return y

    def _weight_for(self, x: Any) -> Tensor | str:
        """The weight that a call with x multiplies by, or why the layer's own library does."""
        if torch.compiler.is_compiling():
            return "compiled"
        found = quantised.base_of(self)
        if not isinstance(found, quantised.Base):
            return found or "the weight is not quantised any more"
        obstacle = obstacles.input_obstacle(x)
        if obstacle is not None:
            return obstacle
        if checks.autocast_dtype(x) not in (None, x.dtype):
            return f"autocast is on, the weight quantised, and x {name_of(x.dtype)}"
        if x.dtype not in checks.FLOATS or x.device.type != "cpu" or x.shape[-1] != self.in_features:
            return f"x is {checks.shown(x)}, and the weight [{self.out_features}, {self.in_features}]"
        return found.weight(x.dtype)

    def unload_and_optionally_merge_module(self, merge: bool, safe_merge: bool, adapter_names: Any) -> nn.Module:
        """What PEFT asks of a layer that is more than its class, as it unloads a model: the plain one."""
        restore_layer(self)
        return self


@functools.cache
def frozen_class(plain: Any) -> type:
    """What a quantised layer of that class is swapped to."""
    return swap.derive(plain, frozen_class, FrozenQuantised)


def frozen_base(module: Any) -> Any:
    """The layer whose weight a swapped layer multiplies by, or None for other modules."""
    if isinstance(module, Fused) or (swap.is_derived(module) and isinstance(module, ia3.IA3Layer)):  # scaled.py
        return module.base_layer
    return module if isinstance(module, (FrozenLinear, FrozenQuantised)) else None


def restore_layer(module: Any) -> None:
    """Give a swapped layer its class back, and free its packed copies."""
    base = frozen_base(module)
    if base is not None:
        packed.detach(base)
        known.forget(module)
        base.__dict__.pop(probing.KEY, None)
        quantised.release(base)
        if swap.is_derived(module):
            swap.undo(module)
        elif type(module) in (FusedLinear, FrozenLinear):
            swap.become(module, lora.Linear if type(module) is FusedLinear else nn.Linear)
        elif is_parametrized(module):  # by a class of its own, derived since
            type(module).__bases__ = (nn.Linear,)
        else:  # fully_shard has derived one since
            swap.rebase(module, {FrozenLinear: nn.Linear})
        for name in (SEEN, OWN_FORWARD):
            module.__dict__.pop(name, None)
