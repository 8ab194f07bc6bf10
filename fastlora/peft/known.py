"""A layer's last plan, and whether it still holds: making it anew looks at some fifty objects, which takes a small layer longer than its work.

A plan holds as long as all that it was read from is as it was: the same modules, parameters and numbers in the same places, still without hooks,
still frozen and of the same dtypes and shapes. csrc looks at all that again before each call (`unchanged.h`), in a tenth of the time; where anything
has changed, the plan is made anew. Nothing tells the layer of a change, so that none can be missed; but who hands out a batch's names, and has the
model to himself as a server has, may vouch that there was none since the last (`mixed.RowNames.since`). Without the native extension every call
makes its plan.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fastlora import checks
from fastlora.frozen.quantised import QuantisedWeight
from fastlora.peft import mixed, obstacles
from fastlora.peft.obstacles import Plan

try:
    from fastlora._C import unchanged
except ImportError:
    unchanged: Callable[..., bool] | None = None  # type: ignore[no-redef]

ACTIVE, MIXED = "_fastlora_known", "_fastlora_known_mixed"
"""Under which a layer's `__dict__` has what it knows of calls with the active adapters, and of mixed batches."""

MISSING = type(None)
"""What csrc takes for an item that a dictionary does not have."""

AdapterNames = tuple[str, ...] | None
"""Of a mixed batch, one name an example; None: every row has the active adapter."""


class Known(NamedTuple):
    """The plan of a layer's last call, and what it followed from."""

    layer: nn.Module  # a replica has its original's `__dict__`
    names: AdapterNames
    dtype: torch.dtype  # of x
    device: torch.device
    columns: int
    cast: torch.dtype | None
    state: tuple[tuple[Any, ...], ...]
    used: Sequence[str]
    plan: Plan
    since: object | None  # of the names, when all that was looked at last


class _State:
    """What `unchanged` compares, as it is now."""

    def __init__(self) -> None:
        self.items: list[Any] = []  # dictionary, key, value
        self.types: list[Any] = []  # object, type
        self.empty: list[Any] = []  # dictionaries and lists
        self.lists: list[Any] = []  # list, its items
        self.attributes: list[Any] = []  # object, name, value

    def item(self, owner: dict[str, Any], key: str) -> Any:
        value = owner.get(key, MISSING)
        self.items += (owner, key, value)
        return value

    def plain(self, module: nn.Module) -> dict[str, Any]:
        """The `__dict__` of a module of this type that carries no hook (checks.py::is_hooked)."""
        state = module.__dict__
        self.types += (module, type(module))
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            self.empty.append(self.item(state, hooks))
        for name in ("forward", "_hf_hook"):
            self.item(state, name)
        return state

    def matrix(self, tensor: Tensor) -> None:
        self.types += (tensor, type(tensor))
        self.attributes += (
            tensor,
            "dtype",
            tensor.dtype,
            tensor,
            "shape",
            tensor.shape,
            tensor,
            "device",
            tensor.device,
        )

    def frozen(self, tensor: Tensor) -> None:
        self.attributes += (tensor, "requires_grad", False)

    def bias(self, tensor: Any) -> None:
        """Of the base layer, trained or not, or of B; None where there is none."""
        if tensor is not None:
            self.attributes += (tensor, "requires_grad", tensor.requires_grad)
            if tensor.requires_grad:
                self.matrix(tensor)

    def all(self) -> tuple[tuple[Any, ...], ...]:
        return tuple(map(tuple, (self.items, self.types, self.empty, self.lists, self.attributes)))


def _state_of(layer: Any, names: AdapterNames, used: Sequence[str]) -> tuple[tuple[Any, ...], ...] | None:
    """What `obstacles.lasting_plan` and `used_adapters` have read of a layer; None where a weight or bias is no item of its module's."""
    state, own = _State(), layer.__dict__
    state.empty += obstacles.GLOBAL_HOOKS
    state.item(own, "_disable_adapters")
    state.empty.append(state.item(own, "merged_adapters"))
    wanted: Any = names
    if names is None:
        active = state.item(own, "_active_adapter")
        wanted = [active] if isinstance(active, str) else active
        if isinstance(active, list):
            state.lists += (active, tuple(active))
    children = state.item(own, "_modules")
    base = state.item(children, "base_layer")
    parameters = state.item(state.plain(base), "_parameters")
    state.attributes += (type(base), "forward", type(base).forward)
    weight, bias = state.item(parameters, "weight"), state.item(parameters, "bias")
    if weight is MISSING or bias is MISSING:
        return None
    state.matrix(weight)
    state.frozen(weight)
    state.bias(bias)
    variants, scaling = state.item(own, "lora_variant"), state.item(own, "scaling")
    parts = [
        state.item(state.item(children, part).__dict__, "_modules") for part in ("lora_A", "lora_B", "lora_dropout")
    ]
    for adapter in dict.fromkeys(wanted):
        if adapter not in used:
            state.item(parts[0], adapter)
            continue
        state.item(variants, adapter)
        state.item(scaling, adapter)
        *matrices, dropout = [state.item(part, adapter) for part in parts]
        for linear in matrices:
            parameters = state.item(state.plain(linear), "_parameters")
            state.matrix(state.item(parameters, "weight"))
            bias = state.item(parameters, "bias")
            if bias is MISSING:
                return None
            state.bias(bias)
        for name in ("p", "training"):
            state.item(state.plain(dropout), name)
        if layer.lora_variant.get(adapter) is not None:  # DoRA's
            state.item(own, "training")
            magnitudes = state.item(state.item(children, "lora_magnitude_vector").__dict__, "_modules")
            parameters = state.item(state.plain(state.item(magnitudes, adapter)), "_parameters")
            state.matrix(state.item(parameters, "weight"))
    return state.all()


def find(layer: nn.Module, x: Any, names: AdapterNames) -> Known | None:
    """What the layer knows of a call with x, if it still holds."""
    known: Known | None = layer.__dict__.get(ACTIVE if names is None else MIXED)
    if known is None or known.layer is not layer or type(x) is not Tensor or x.dtype is not known.dtype:
        return None
    if x.is_nested or x.layout is not torch.strided or not x.dim() or x.shape[-1] != known.columns:
        return None
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0 or x.device != known.device:
        return None
    cast = checks.autocast_dtype(x) if torch._C._is_any_autocast_enabled() else None
    if cast is not known.cast or (names is not known.names and names != known.names):
        return None
    since = _since(names)
    if since is not None and since is known.since:
        return known
    if unchanged is None or not unchanged(*known.state):
        return None
    if since is not None:
        known = layer.__dict__[MIXED] = known._replace(since=since)
    return known


def _since(names: AdapterNames) -> object | None:
    return names.since if isinstance(names, mixed.RowNames) else None


def plan_call(layer: Any, x: Any, names: AdapterNames) -> tuple[Sequence[str], Plan | str]:
    """The adapters that a call uses and its plan, or why it runs PEFT's own forward: `obstacles.plan_call`, remembered."""
    tracing = torch.compiler.is_compiling()
    known = None if tracing else find(layer, x, names)
    if known is not None:
        return known.used, known.plan
    used = obstacles.used_adapters(layer, names)
    plan = obstacles.plan_call(layer, x, used, names is not None)
    # A quantised weight hangs on more than that, and looks at it in every call (quantised.py).
    if not tracing and unchanged is not None and isinstance(plan, Plan) and type(plan.weight) is not QuantisedWeight:
        state = _state_of(layer, names, used)
        cast = checks.autocast_dtype(x) if torch._C._is_any_autocast_enabled() else None
        if state is not None:
            known = Known(layer, names, x.dtype, x.device, x.shape[-1], cast, state, used, plan, _since(names))
            layer.__dict__[ACTIVE if names is None else MIXED] = known
    return used, plan


def forget(layer: nn.Module, adapter: str | None = None) -> None:
    """Let go of what the layer knows, and of the weights in it. adapter: the one that goes; None: of all, their norms, too."""
    for name in (ACTIVE, MIXED):
        layer.__dict__.pop(name, None)
    if adapter is None:
        layer.__dict__.pop(obstacles.NORMS, None)
    else:
        layer.__dict__.get(obstacles.NORMS, {}).pop(adapter, None)
