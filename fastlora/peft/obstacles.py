"""What an accelerated layer is about to compute, or what stands in the way: one plan a layer and call.

nn.Module looks for parameters and children last. Reading `_parameters` and `_modules` directly skips its __getattr__, half the cost of a call.
"""

import operator
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners import lora
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module
from transformers.pytorch_utils import Conv1D

from fastlora import checks
from fastlora.checks import is_hooked
from fastlora.choice.table import name_of
from fastlora.frozen import packed
from fastlora.frozen.quantised import QuantisedWeight
from fastlora.operators.dora_factor import KeptNorm
from fastlora.peft import mixed, probing, quantised

GLOBAL_HOOKS = (
    nn_module._global_forward_hooks,
    nn_module._global_forward_pre_hooks,
    nn_module._global_backward_hooks,
    nn_module._global_backward_pre_hooks,
)
"""Torch's tables of them: they see the modules inside a layer, which a fused forward does not call."""


def parameter(module: nn.Module, name: str) -> Any:
    """The module's parameter of that name, or what stands in its place (a sharded or parametrised weight)."""
    return module._parameters[name] if name in module._parameters else getattr(module, name)


IN_PIECES = "the weight is a DTensor: tensor parallel, or sharded before it was accelerated"
"""What FSDP2 shards afterwards is one between calls alone: in a call the layer has its whole weight."""


def weight_obstacle(weight: Any, bias: Any) -> str | None:
    """Why the weight and bias of a linear layer are not ours to multiply by, or None."""
    if weight.requires_grad and not torch.compiler.is_compiling():
        packed.drop(weight)  # a step may change it in ways that leave no trace
    if type(weight) is not nn.Parameter and type(weight) is not Tensor:
        return IN_PIECES if checks.is_sharded(weight) else f"the weight is a {type(weight).__name__}"
    if weight.dim() < 2:  # experts have three
        kept = "DeepSpeed ZeRO-3 keeps it in pieces" if hasattr(weight, "ds_id") else "expected two dimensions or more"
        return f"the weight is {list(weight.shape)}: {kept}"
    if weight.dtype not in checks.FLOATS:
        return f"the weight is {name_of(weight.dtype)}"
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return "the base weight or bias is trained"
    return None


FROZEN_FORWARDS = [nn.Linear.forward, Conv1D.forward]
"""Of the layers whose product is ours to make; layers.py adds its own."""


def multiplied(base: Any, dtype: torch.dtype | None = None) -> Tensor:
    """The weight of a frozen layer as the operators take it. dtype: of x, which a quantised weight follows; None: that of the layer's own product."""
    found = quantised.base_of(base)
    return found.weight(dtype) if isinstance(found, quantised.Base) else parameter(base, "weight")


class Added(NamedTuple):
    """A bias that may be trained, and is added to the result."""

    bias: Tensor  # [N]
    scale: float  # what it is multiplied by before
    place: int | None  # of the adapter whose B has it, in the plan's lists; None: the base layer's own


class Plan(NamedTuple):
    """What the operator takes for one layer besides x; the lists have an entry an adapter."""

    weight: Tensor  # [N, K], or, as Conv1D has it, [K, N]
    bias: Tensor | None
    transposed: bool
    lora_a: list[Tensor]
    lora_b: list[Tensor]
    scale: list[float]
    dropout_p: list[float]
    magnitude: dict[int, Tensor]  # m [N] of each adapter that is a DoRA, by its place in the lists
    norm: dict[int, KeptNorm]  # of each of them: the layer's own, whatever plan it is in
    added: list["Added"]

    @property
    def linear_weight(self) -> Tensor:  # [N, K]
        return self.weight.t() if self.transposed else self.weight

    def is_as(self, other: "Plan") -> bool:
        """Whether another plan, for the same x, has the same result."""
        mine, its = (
            (
                plan.weight,
                plan.bias,
                *plan.lora_a,
                *plan.lora_b,
                *plan.magnitude.values(),
                *(one.bias for one in plan.added),
            )
            for plan in (self, other)
        )
        same_numbers = (self.scale, self.dropout_p) == (other.scale, other.dropout_p)
        return same_numbers and len(mine) == len(its) and all(map(operator.is_, mine, its))


def plan_of_base(layer: nn.Module) -> Plan | str:
    """The plan of the frozen layer under a LoRA layer, without adapters yet, or why it cannot be fused."""
    base: Any = layer._modules["base_layer"]
    plain = getattr(type(base), "forward", None) in FROZEN_FORWARDS
    weight: Any = parameter(base, "weight") if plain else None
    if (
        type(weight) is not nn.Parameter and not torch.compiler.is_compiling()
    ):  # compiled, quantised layers are left to their libraries
        found = quantised.base_of(base)
        if isinstance(found, str):
            return found
        if found is not None:
            hooked = is_hooked(base)
            plan = Plan(found.weight(), base.bias, False, [], [], [], [], {}, {}, [])
            return "the base layer carries a hook" if hooked else plan
    if not plain and not probing.is_linear(base):
        return f"the base layer is a {type(base).__name__}"
    weight, bias = parameter(base, "weight"), parameter(base, "bias")
    is_trained = bias is not None and bias.requires_grad  # LoraConfig's bias="lora_only" and "all"
    obstacle = weight_obstacle(weight, None)
    if obstacle is None and is_hooked(base):
        return "the base layer carries a hook"
    trained = [Added(bias, 1.0, None)] if is_trained else []
    return obstacle or Plan(
        weight, None if is_trained else bias, isinstance(base, Conv1D), [], [], [], [], {}, {}, trained
    )


def adapter_of(layer: nn.Module, adapter: str) -> tuple[Any, Any, Any]:
    """The modules (A, B, dropout) of one adapter of a LoRA layer."""
    children: Any = layer._modules
    return (
        children["lora_A"]._modules[adapter],
        children["lora_B"]._modules[adapter],
        children["lora_dropout"]._modules[adapter],
    )


def add_adapter(plan: Plan, layer: Any, adapter: str) -> str | None:
    """Take one adapter of a LoRA layer into the plan, or say why it cannot be fused."""
    variant = layer.lora_variant.get(adapter)
    if variant is not None and type(variant) is not DoraLinearVariant:
        return f"adapter {adapter!r} is a {type(variant).__name__.removesuffix('LinearVariant')} variant"
    lora_a, lora_b, dropout = adapter_of(layer, adapter)
    if type(lora_a) is not nn.Linear or type(lora_b) is not nn.Linear or type(dropout) not in (nn.Dropout, nn.Identity):
        return (
            f"adapter {adapter!r} is made of {type(lora_a).__name__}, {type(lora_b).__name__}, {type(dropout).__name__}"
        )
    a, b, scale = lora_a._parameters.get("weight"), lora_b._parameters.get("weight"), layer.scaling[adapter]
    if type(a) is not nn.Parameter or type(b) is not nn.Parameter:
        kinds = {type(parameter(one, "weight")).__name__ for one in (lora_a, lora_b)}
        return f"the weights of adapter {adapter!r} are {' and '.join(sorted(kinds))}"
    if not isinstance(scale, (int, float)):
        return f"the scaling of adapter {adapter!r} is a {type(scale).__name__}"
    if is_hooked(lora_a, lora_b, dropout):
        return f"adapter {adapter!r} carries a hook"
    drops = type(dropout) is nn.Dropout and dropout.training
    if variant is not None:
        magnitude: Any = layer._modules["lora_magnitude_vector"]._modules[adapter]
        if type(magnitude) is not DoraLinearLayer or is_hooked(magnitude):
            return f"adapter {adapter!r} has a {type(magnitude).__name__} for its magnitudes, or a hook there"
        own: Any = magnitude._parameters["weight"]
        plan.magnitude[len(plan.lora_a)] = own
        plan.norm[len(plan.lora_a)] = _norm_of(layer, adapter, (plan.weight, a, b))
        drops = drops and layer.training  # PEFT asks both
    plan.lora_a.append(a)
    plan.lora_b.append(b)
    plan.scale.append(float(scale))
    plan.dropout_p.append(dropout.p if drops else 0.0)
    bias = parameter(lora_b, "bias")
    if bias is not None:  # lora_bias
        plan.added.append(Added(bias, float(scale), len(plan.lora_a) - 1))
    return None


NORMS = "_fastlora_norms"
"""Under which a layer's `__dict__` has the norms of its DoRA adapters, by name, and of which tensors they are."""


def _norm_of(layer: Any, adapter: str, tensors: tuple[Tensor, Tensor, Tensor]) -> KeptNorm:
    """Where a DoRA's norms are kept from plan to plan, as long as its W, A and B are these."""
    if torch.compiler.is_compiling() or not isinstance(layer, mixed.ByRow):  # PEFT's own layers stay as they are
        return KeptNorm()
    norms: dict[str, tuple[tuple[weakref.ref[Tensor], ...], KeptNorm]] = layer.__dict__.setdefault(NORMS, {})
    found = norms.get(adapter)
    if found is None or any(seen() is not one for seen, one in zip(found[0], tensors, strict=True)):
        found = norms[adapter] = tuple(map(weakref.ref, tensors)), KeptNorm()
    return found[1]


def used_adapters(layer: Any, adapter_names: Sequence[str] | None) -> list[str]:
    """The adapters of the layer that a call uses: the active ones, or those that a mixed batch names."""
    wanted = layer.active_adapters if adapter_names is None else dict.fromkeys(adapter_names)
    mine = layer._modules["lora_A"]._modules
    return [adapter for adapter in wanted if adapter in mine]


def lasting_plan(layer: Any, used: Sequence[str]) -> Plan | str:
    """The plan of any call with these adapters just now, or why it runs PEFT's own forward."""
    if layer.disable_adapters:
        return "adapters are disabled"
    if layer.merged:
        return "the adapter is merged"
    if not used:
        return "no adapter is active"
    if any(GLOBAL_HOOKS):
        return "a global hook is set"
    plan = plan_of_base(layer)
    if isinstance(plan, str):
        return plan
    for adapter in used:
        obstacle = add_adapter(plan, layer, adapter)
        if obstacle is not None:
            return obstacle
    return plan


def input_obstacle(x: Any) -> str | None:
    """Why x, or what torch wants of it just now, is nothing for a fused operator, or None."""
    if not isinstance(x, Tensor) or x.is_nested or x.layout is not torch.strided or x.dim() == 0:
        return "x is not a tensor of rows"
    if type(x) is not Tensor and type(x) is not nn.Parameter and not torch.compiler.is_compiling():
        return f"x is a {type(x).__name__}"
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return checks.transform_obstacle()
    return None


def plan_call(layer: Any, x: Any, used: Sequence[str], is_mixed: bool) -> Plan | str:
    """The plan of a call of a LoRA layer with x and these adapters, or why it runs PEFT's own forward. is_mixed: each row has its own."""
    plan = lasting_plan(layer, used)
    if isinstance(plan, str):
        return plan
    obstacle = input_obstacle(x)
    if obstacle is not None:
        return obstacle
    cast = checks.autocast_dtype(x) if torch._C._is_any_autocast_enabled() else None
    if type(plan.weight) is QuantisedWeight:
        if cast not in (None, x.dtype):
            return f"autocast is on, the weight quantised, and x {name_of(x.dtype)}"
        plan = plan._replace(weight=multiplied(layer._modules["base_layer"], x.dtype))
    dtype, device, weight = cast or x.dtype, x.device, plan.weight
    K, N = weight.shape if plan.transposed else reversed(weight.shape)
    if x.shape[-1] != K or device != weight.device or (cast is None and dtype != weight.dtype):
        return f"x is {checks.shown(x)} and the weight {checks.shown(weight)}"
    for a, b in zip(plan.lora_a, plan.lora_b, strict=True):
        own, R = a.dtype, a.shape[0]
        if (own is not dtype and own is not torch.float32) or b.dtype is not own:
            return f"the adapter is {name_of(a.dtype)} and x is {name_of(dtype)}"
        if a.shape != (R, K) or b.shape != (N, R) or a.device != device or b.device != device:
            return f"an adapter is {checks.shown(a)} and {checks.shown(b)}, and x {checks.shown(x)}"
    for one in (*plan.magnitude.values(), *(added.bias for added in plan.added)):
        if one.shape != (N,) or one.device != device or one.dtype not in (weight.dtype, torch.float32):
            return f"a magnitude or bias is {checks.shown(one)}, and the weight {checks.shown(weight)}"
    if len(used) > 1:
        if plan.magnitude and not is_mixed:
            return "several adapters are active, and one is a DoRA"
        if any(a.dtype != plan.lora_a[0].dtype for a in plan.lora_a):
            return "the adapters have different dtypes"
        if not is_mixed and any(plan.dropout_p):
            return "several adapters are active with dropout"
    return plan


QUANTISED = (
    "peft.tuners.lora.bnb.Linear4bit",
    "peft.tuners.lora.bnb.Linear8bitLt",
    "peft.tuners.lora.torchao.TorchaoLoraLinear",
)
"""The layers of PEFT over quantised bases that can be fused; by name, since their modules need the libraries."""


def swap_obstacle(layer: Any) -> str | None:
    """Why the layer's class is not swapped, or None: nothing that it holds now could be fused."""
    if type(layer) is not lora.Linear and f"{type(layer).__module__}.{type(layer).__name__}" not in QUANTISED:
        return f"{type(layer).__module__}.{type(layer).__name__} is not fused"
    if "forward" in layer.__dict__:
        return "its forward was replaced on the object"  # which would go on calling the one it found
    if type(layer.base_layer).forward not in FROZEN_FORWARDS:
        probing.probe(layer.base_layer)
    plan = plan_of_base(layer)
    if isinstance(plan, str):
        return plan
    found = [add_adapter(plan, layer, adapter) for adapter in layer.lora_A]
    return found[0] if found and all(found) else None
