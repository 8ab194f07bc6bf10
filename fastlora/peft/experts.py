"""LoRA on a mixture's experts (PEFT's `target_parameters`): every expert's rows meet its own weight and its own A and B, as they are.

    h = g(x Wᵀ_e + b_e + s (x A_eᵀ) B_eᵀ)      y = h Vᵀ_e + c_e + s' (h A'_eᵀ) B'_eᵀ      out_t = sum over token t's experts of w_te y_te

PEFT makes W_e + s B_e A_e of every expert, whether it has rows or not, in each forward, and in each backward the gradient of that: as large as the
experts themselves. Here the rows are sorted by expert once, and a group of rows is one call of `lora_linear`. In PEFT's A [E r, K] an expert's
rows lie together; in its B [N, r E] an expert has every E-th column.

What is wrapped is a module of three-dimensional parameters, one wrapper around the other for several. The outermost one's class is swapped, where
what its module computes on a few random numbers is the equation above.
"""

import functools
import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.integrations import moe

from fastlora import checks, ops
from fastlora.bounds import nearly_equal
from fastlora.choice.table import name_of
from fastlora.gradients import differentiable_once
from fastlora.operators import frozen_linear, lora_linear, swiglu
from fastlora.packing import UNFIT
from fastlora.peft import obstacles
from fastlora.peft.layers import OWN_FORWARD, SEEN, Seen, note_own_forward
from fastlora.swap import become, derive, is_derived, undo

IMPLEMENTATIONS = (None, "eager", "grouped_mm", "batched_mm")
"""Of transformers' experts, those that compute what their modules say; others may be a card's own kernels."""

DESCRIPTION = ("config", "num_experts", "has_gate", "has_bias", "is_transposed")
"""What transformers' `use_experts_implementation` says of a module of experts."""

GROUPED = ("cuda",)
"""The devices on which all experts are one product of torch's: to loop over them would wait for the card to say how many rows each has."""

SILU = nn.SiLU, type(ACT2FN["silu"])
DEFAULT_GATE = getattr(moe, "_default_apply_gate", object())
"""Transformers' gate: the activation of the first half of the columns, times the second. With SiLU it is `swiglu`."""

TOKENS, WIDTH, EACH = 5, 8, 2  # of the random numbers; experts of a token


class Projection(NamedTuple):
    """One of the two linear layers of all experts, and the adapters on it; the lists have an entry an adapter."""

    weight: Tensor  # [E, N, K], frozen
    bias: Tensor | None  # [E, N], frozen
    lora_a: list[Tensor]  # [E r, K]
    lora_b: list[Tensor]  # [N, r E]
    scale: list[float]


class Plan(NamedTuple):
    """What a call computes besides its arguments."""

    experts: Any  # the module
    up: Projection
    down: Projection
    is_swiglu: bool = False  # whether g(h) is silu(first half of the columns) second half

    def gate(self, h: Tensor) -> Tensor:
        if self.is_swiglu:
            choice = ops.choose("swiglu", h, len(h), h.numel() // 2, dropout=False)
            if choice.implementation != "reference":  # else the module's own is as fast
                return swiglu.swiglu(*h.chunk(2, dim=-1))
        return self.experts._apply_gate(h) if self.experts.has_gate else self.experts.act_fn(h)


# ---- what is computed


def compute(plan: Plan, x: Tensor, index: Tensor, weights: Tensor) -> Tensor | None:
    """out [T, D] for x [T, D] and the experts of each token, index and weights [T, k]; None where an expert does not exist.

    Each product of y and w is rounded to their dtype before the sum, as in transformers' grouped_mm.
    """
    T, k = index.shape
    dtype, x = x.dtype, x.to(plan.up.weight.dtype)  # which differ under autocast alone
    owner, order = torch.sort(index.flatten(), stable=True)  # [T k]: rows of one expert lie together
    place = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))
    rows = _Dispatch.apply(x, order, place, k)  # [T k, D]
    with checks.without_autocast(x.device):
        y = _all_at_once(plan, rows, owner) if _is_grouped(plan, x) else _in_turn(plan, rows, owner)
    return (
        None
        if y is None
        else (_Dispatch.apply(y, place, order, 1).view(T, k, -1) * weights[..., None]).sum(1).to(dtype)
    )


class _Dispatch(torch.autograd.Function):
    """Row order[i] // k of x as row i. place undoes order: the backward gathers, where index_select's own would add row by row."""

    @staticmethod
    def forward(ctx, x, order, place, k):  # [T, D], [T k], [T k] -> [T k, D]
        ctx.save_for_backward(place)
        ctx.k = k
        return x.index_select(0, order if k == 1 else order.div(k, rounding_mode="floor"))

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, drows):
        (place,) = saved
        dx = drows.index_select(0, place)
        return dx if ctx.k == 1 else dx.view(-1, ctx.k, dx.shape[1]).sum(1), None, None, None


def _in_turn(plan: Plan, rows: Tensor, owner: Tensor) -> Tensor | None:  # [M, D], [M] int64 ascending -> y [M, D]
    """One expert after the other, of those that have rows."""
    up, down = _adapters_of(plan.up), _adapters_of(plan.down)
    counts = torch.bincount(owner, minlength=len(plan.up.weight)).tolist()
    if len(counts) > len(plan.up.weight):
        return None
    present = [e for e, count in enumerate(counts) if count]
    groups = rows.split([counts[e] for e in present])
    return torch.cat(
        [
            _linear(plan.down, down, e, plan.gate(_linear(plan.up, up, e, own)))
            for e, own in zip(present, groups, strict=True)
        ]
    )


def _linear(projection: Projection, adapters: "_Adapters | None", e: int, rows: Tensor) -> Tensor:
    weight, bias = projection.weight[e], None if projection.bias is None else projection.bias[e]
    if adapters is None:
        return frozen_linear.frozen_linear(rows, weight, bias)
    own = [adapters.lora_a[e]], [adapters.lora_b[e]], [adapters.scale], [0.0]
    return lora_linear.compute(rows, [weight], [bias], *own)[0]


class _Adapters(NamedTuple):
    """The active adapters on a projection as one, an expert at a time."""

    lora_a: Sequence[Tensor]  # E of [R, K]
    lora_b: Sequence[Tensor]  # E of [N, R]
    scale: float


def _adapters_of(projection: Projection) -> _Adapters | None:
    """None where there are none. A is seen as it lies, B is copied: its elements of one expert lie E apart."""
    if not projection.lora_a:
        return None
    a, b, scale = _stacked(projection)
    return _Adapters(a.unbind(), b.contiguous().unbind(), scale)  # each with a backward that stacks


def _stacked(projection: Projection) -> tuple[Tensor, Tensor, float]:  # [E, R, K], [E, N, R]
    """PEFT's A and B by expert, and s. Several adapters are one of their concatenated rank."""
    E, N, K = projection.weight.shape
    lora_a, lora_b, scale = [a.reshape(E, -1, K) for a in projection.lora_a], projection.lora_b, projection.scale
    own_b = [b.reshape(N, -1, E).permute(2, 0, 1) for b in lora_b]
    if len(lora_a) == 1:
        return lora_a[0], own_b[0], scale[0]
    return torch.cat(lora_a, dim=1), torch.cat([b * s for b, s in zip(own_b, scale, strict=True)], dim=2), 1.0


def _all_at_once(plan: Plan, rows: Tensor, owner: Tensor) -> Tensor:
    """By torch's grouped products, which read on the card itself whose rows are whose."""
    ends = torch.searchsorted(owner, torch.arange(len(plan.up.weight), device=owner.device), right=True, out_int32=True)
    return _grouped_linear(plan.down, plan.gate(_grouped_linear(plan.up, rows, owner, ends)), owner, ends)


def _grouped_linear(projection: Projection, rows: Tensor, owner: Tensor, ends: Tensor) -> Tensor:
    y = F.grouped_mm(rows, projection.weight.transpose(1, 2), offs=ends)
    if projection.bias is not None:
        y = y + projection.bias[owner]
    if not projection.lora_a:
        return y
    a, b, scale = _stacked(projection)
    xa = F.grouped_mm(rows, a.to(rows.dtype).transpose(1, 2), offs=ends)
    return torch.add(y, F.grouped_mm(xa, b.to(rows.dtype).contiguous().transpose(1, 2), offs=ends), alpha=scale)


def _is_grouped(plan: Plan, x: Tensor) -> bool:
    """Whether torch's grouped products take the rows: everything in them begins at multiples of 16 bytes."""
    ranks = [a.shape[0] // len(one.weight) for one in (plan.up, plan.down) for a in one.lora_a]
    sizes = *ranks, *plan.up.weight.shape[1:], *plan.down.weight.shape[1:]
    fits = x.device.type in GROUPED and x.dtype in ops.KERNEL_DTYPES
    return fits and all(size * x.element_size() % 16 == 0 for size in sizes)


# ---- what stands in the way


def wrappers_of(outer: Any) -> tuple[list[Any], Any]:
    """The wrappers around a module's parameters, from the outermost, and the module."""
    found = []
    while isinstance(outer, ParamWrapper):
        found.append(outer)
        outer = outer._modules["base_layer"]
    return found, outer


def _projection(experts: Any, name: str) -> Projection | str:
    """One projection of a module of experts without adapters yet, or why it is not ours to multiply by."""
    weight = obstacles.parameter(experts, name)
    bias = obstacles.parameter(experts, f"{name}_bias") if experts.has_bias else None
    obstacle = obstacles.weight_obstacle(weight, bias)
    if obstacle is not None:
        return obstacle
    return Projection(weight if not experts.is_transposed else weight.transpose(1, 2), bias, [], [], [])


def _plain_plan(experts: Any) -> Plan | str:
    """The plan of a module of experts without adapters, or why it cannot be made."""
    if not all(hasattr(experts, name) for name in DESCRIPTION):
        return f"{type(experts).__name__} is no module of experts as transformers describes them"
    if getattr(experts, "has_post_expert_norm", False):  # which, like the next, not every transformers knows
        return "the experts' results are normed"
    if getattr(experts, "_is_expert_parallel", False):
        return "the experts are spread over devices"
    up = _projection(experts, _names(experts)[0])
    down = _projection(experts, _names(experts)[1])
    if isinstance(up, str) or isinstance(down, str):
        return up if isinstance(up, str) else str(down)
    return Plan(experts, up, down, _is_swiglu(experts))


def _is_swiglu(experts: Any) -> bool:
    own = experts.has_gate and getattr(type(experts), "_apply_gate", None) is DEFAULT_GATE
    return own and type(experts.act_fn) in SILU and not checks.is_hooked(experts.act_fn)


def _names(experts: Any) -> tuple[str, str]:
    """The parameters that the two projections multiply by."""
    return "gate_up_proj" if experts.has_gate else "up_proj", "down_proj"


def lasting_plan(outer: Any) -> Plan | str:
    """The plan of any call just now, or why it runs PEFT's own forward."""
    wrappers, experts = wrappers_of(outer)
    if any(wrapper.disable_adapters for wrapper in wrappers):
        return "adapters are disabled"
    if any(wrapper.merged for wrapper in wrappers):
        return "the adapter is merged"
    if any(obstacles.GLOBAL_HOOKS):
        return "a global hook is set"
    if checks.is_hooked(experts, *wrappers[1:]):
        return f"{type(experts).__name__}, or a wrapper around it, carries a hook"
    plan = _plain_plan(experts)
    if isinstance(plan, str):
        return plan
    own = dict(zip(_names(experts), (plan.up, plan.down), strict=True))
    for wrapper in wrappers:
        used = obstacles.used_adapters(wrapper, None)
        if used and wrapper.parameter_name not in own:
            return f"{wrapper.parameter_name} has an adapter"
        for adapter in used:
            obstacle = _add_adapter(own[wrapper.parameter_name], wrapper, adapter)
            if obstacle is not None:
                return obstacle
    if not plan.up.lora_a and not plan.down.lora_a:
        return "no adapter is active"
    return plan


def _add_adapter(projection: Projection, wrapper: Any, adapter: str) -> str | None:
    """Take one adapter of a wrapper into the plan, or say why it cannot be fused."""
    lora_a, lora_b, _ = obstacles.adapter_of(wrapper, adapter)
    a, b, scale = lora_a._parameters.get("weight"), lora_b._parameters.get("weight"), wrapper.scaling[adapter]
    if type(a) is not nn.Parameter or type(b) is not nn.Parameter:
        return f"the weights of adapter {adapter!r} are no parameters"
    if not isinstance(scale, (int, float)):
        return f"the scaling of adapter {adapter!r} is a {type(scale).__name__}"
    if checks.is_hooked(lora_a, lora_b):
        return f"adapter {adapter!r} carries a hook"
    projection.lora_a.append(a)
    projection.lora_b.append(b)
    projection.scale.append(float(scale))
    return None


def plan_call(outer: Any, x: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Plan | str:
    """The plan of a call, or why it runs PEFT's own forward."""
    plan = lasting_plan(outer)
    if isinstance(plan, str):
        return plan
    if len(args) != 2 or kwargs or not all(isinstance(one, Tensor) for one in args):
        return "the call has other arguments than x, index and weights"
    index, weights = args
    obstacle = obstacles.input_obstacle(x)
    if obstacle is not None:
        return obstacle
    if x.dim() != 2 or index.dim() != 2 or len(index) != len(x) or index.dtype != torch.int64 or not index.numel():
        return f"x is {checks.shown(x)} and the index {checks.shown(index)}"
    if weights.shape != index.shape or not weights.is_floating_point():
        return f"the index is {checks.shown(index)} and its weights {checks.shown(weights)}"
    return _dtype_obstacle(plan, x) or plan


def _dtype_obstacle(plan: Plan, x: Tensor) -> str | None:
    """Why x does not go with the weights, or the weights not with their adapters, or None."""
    up, down = plan.up.weight, plan.down.weight
    implementation = plan.experts.config._experts_implementation
    if implementation not in IMPLEMENTATIONS:
        return f"the experts are {implementation}'s"
    autocast = checks.autocast_dtype(x) is not None
    if autocast and implementation != "grouped_mm":  # which alone computes in the weights' dtype even then
        return f"autocast is on, and the experts are {implementation or 'eager'}'s"
    same = up.dtype == down.dtype and {up.device, down.device} == {x.device}
    if not same or x.shape[1] != up.shape[2] or (x.dtype != up.dtype and not autocast):
        return f"x is {checks.shown(x)} and the weights {checks.shown(up)} and {checks.shown(down)}"
    for weight, lora_a, lora_b, bias in (
        (one.weight, one.lora_a, one.lora_b, one.bias) for one in (plan.up, plan.down)
    ):
        E, N, K = weight.shape
        if bias is not None and (bias.dtype != up.dtype or bias.shape != (E, N) or bias.device != x.device):
            return f"the bias is {checks.shown(bias)} and the weight {checks.shown(weight)}"
        for a, b in zip(lora_a, lora_b, strict=True):
            if a.dtype not in (up.dtype, torch.float32) or {a.dtype, b.dtype} != {lora_a[0].dtype}:
                return f"an adapter is {name_of(a.dtype)} and {name_of(b.dtype)}, and the weight {name_of(up.dtype)}"
            if a.shape[0] % E or a.shape[1] != K or b.shape != (N, a.shape[0]) or {a.device, b.device} != {x.device}:
                return f"an adapter is {checks.shown(a)} and {checks.shown(b)}, and the weight {checks.shown(weight)}"
    return None


# ---- the class that the outermost wrapper is swapped to


@functools.cache
def with_experts(plain: Any) -> type:
    """The class derived from a wrapper's. Its name stays: PEFT looks for it."""

    def forward(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return plain.forward(self, x, *args, **kwargs)
        plan = plan_call(self, x, args, kwargs)
        if isinstance(plan, Plan):
            y = compute(plan, x, *args)
            if y is not None:
                share = max(args[0].numel() // len(plan.up.weight), 1)  # of an expert
                self.__dict__[SEEN] = Seen((share, x.shape[1]), plan.up.weight.dtype, shared=_is_grouped(plan, x))
                return y
        obstacle = plan if isinstance(plan, str) else "a token is sent to an expert that there is not"
        own = plain.forward(self, x, *args, **kwargs)
        note_own_forward(self, obstacle, passing=obstacle != lasting_plan(self))
        return own

    return derive(plain, with_experts, forward=forward)


def obstacle_of(layer: Any) -> str | None:
    """Why the class of a LoRA layer, or of the outermost of such wrappers, is not swapped, or None."""
    if not isinstance(layer, ParamWrapper):
        return obstacles.swap_obstacle(layer)
    if "forward" in layer.__dict__:
        return "its forward was replaced on the object"
    experts = wrappers_of(layer)[1]
    plan = _plain_plan(experts)
    return plan if isinstance(plan, str) else _probe_obstacle(experts)


@torch.no_grad()
def _probe_obstacle(experts: Any) -> str | None:
    """Why what a module of experts computes is not what is computed here, or None: by a twin of it with random weights, small ones.

    The forward that is tried is that of the model's own file, of which transformers' grouped and batched ones are others' spellings.
    """
    draw = torch.Generator().manual_seed(0)  # on the CPU
    E, (up, down) = experts.num_experts, _names(experts)
    inner = 2 * WIDTH if experts.has_gate else WIDTH
    sizes = {up: (E, inner, WIDTH), down: (E, WIDTH, WIDTH)}
    drawn = {name: torch.randn(size, generator=draw).div_(2) for name, size in sizes.items()}
    if experts.is_transposed:
        drawn = {name: weight.transpose(1, 2).contiguous() for name, weight in drawn.items()}
    if experts.has_bias:
        drawn |= {
            f"{up}_bias": torch.randn(E, inner, generator=draw),
            f"{down}_bias": torch.randn(E, WIDTH, generator=draw),
        }
    if drawn.keys() != experts._parameters.keys():
        return f"{type(experts).__name__} has the parameters {', '.join(experts._parameters)}"
    twin = object.__new__(type(experts))
    twin.__dict__.update(experts.__dict__, _parameters={name: nn.Parameter(one, False) for name, one in drawn.items()})
    x, weights = torch.randn(TOKENS, WIDTH, generator=draw), torch.rand(TOKENS, min(EACH, E), generator=draw)
    index = torch.rand(TOKENS, E, generator=draw).argsort(1)[:, : weights.shape[1]]
    plan = _plain_plan(twin)
    try:
        expected = inspect.unwrap(type(experts).forward)(twin, x, index, weights)
    except (*UNFIT, AttributeError) as error:
        return f"{type(experts).__name__} cannot be tried on a few numbers: {error}"
    found = compute(plan, x, index, weights) if isinstance(plan, Plan) else None
    if found is None or not isinstance(expected, Tensor) or not nearly_equal(found, expected):
        return f"{type(experts).__name__} computes something else"
    return None


def _outermost(model: nn.Module) -> list[Any]:
    wrappers = [module for module in model.modules() if isinstance(module, ParamWrapper)]
    inner = {id(wrapper._modules["base_layer"]) for wrapper in wrappers}
    return [wrapper for wrapper in wrappers if id(wrapper) not in inner]


def attach(model: nn.Module) -> None:
    """Swap the class of each outermost wrapper whose module computes what is computed here."""
    for wrapper in _outermost(model):
        for inner in wrappers_of(wrapper)[0][1:]:  # of one that was wrapped again since the last call
            detach(inner)
        if not is_derived(wrapper) and obstacle_of(wrapper) is None:
            plain: Any = type(wrapper)
            become(wrapper, with_experts(plain))


def detach(module: nn.Module) -> None:
    """Give a wrapper its class back, if it was swapped."""
    if isinstance(module, ParamWrapper):
        undo(module)
        for name in (SEEN, OWN_FORWARD):
            module.__dict__.pop(name, None)


def weights(model: nn.Module) -> list[tuple[Tensor, list[int]]]:
    """Of each swapped wrapper's module, one expert's weights, and the ranks of their adapters: what is multiplied by (choice/trial.py)."""
    found = []
    for wrapper in _outermost(model):
        wrappers, experts = wrappers_of(wrapper)
        plan = _plain_plan(experts)
        if is_derived(wrapper) and isinstance(plan, Plan):
            ranks = [rank for one in wrappers for rank in one.r.values()]
            found += [(plan.up.weight[0], ranks), (plan.down.weight[0], ranks)]
    return found


def swapped_base(layer: Any) -> Any:
    """The module of experts that a swapped wrapper multiplies by, or None for other modules."""
    return wrappers_of(layer)[1] if isinstance(layer, ParamWrapper) and is_derived(layer) else None


def weight_of(experts: Any) -> Tensor:
    """One expert's weight [N, K] of the first projection, for reports."""
    weight = obstacles.parameter(experts, _names(experts)[0])[0]
    return weight.t() if experts.is_transposed else weight
