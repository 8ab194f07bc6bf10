"""LoRA on embeddings: PEFT's class gets one derived from it, whose forward adds all to the rows of W in one product.

    y = W[ids] + s (B A[:, ids])ᵀ   dA[:, i] = s Bᵀ Σ dy   dB = s dyᵀ A[:, ids]ᵀ

PEFT multiplies, scales and adds in three passes over [tokens, D], reads A by columns, and makes its gradient by rows, to be copied into columns.
There is no dropout: PEFT has none on an embedding's adapter.
"""

import functools
import math
from typing import Any, NamedTuple

import torch
from peft.tuners import lora
from torch import Tensor, nn

from fastlora import checks, reference
from fastlora.choice.table import name_of
from fastlora.gradients import differentiable_once
from fastlora.peft import obstacles
from fastlora.peft.layers import OWN_FORWARD, SEEN, Seen, last_fused_call, note_own_forward
from fastlora.swap import become, derive, is_derived, undo


class Plan(NamedTuple):
    """What a call adds to the rows of W."""

    adapters: list[tuple[Tensor, Tensor, float]]  # A [R, V], B [D, R], s
    padding_idx: int | None


def _base_obstacle(base: Any) -> str | None:
    """Why the rows of a frozen or trained embedding are not ours to add to, or None."""
    if type(base).forward is not nn.Embedding.forward:
        return f"the base layer is a {type(base).__name__}"
    if base.max_norm is not None or base.sparse or base.scale_grad_by_freq:
        return "the base layer has max_norm, sparse or scale_grad_by_freq"
    return None if base.weight.dtype in checks.FLOATS else f"the weight is {name_of(base.weight.dtype)}"


def _add_adapter(plan: Plan, layer: Any, name: str) -> str | None:
    """Take one adapter into the plan, or say why it cannot be."""
    if name in layer.lora_variant:
        variant = type(layer.lora_variant[name]).__name__.removesuffix("EmbeddingVariant")
        return f"adapter {name!r} is a {variant} variant"
    if layer.input_fns.get(name) is not None or layer.output_fns.get(name) is not None:
        return f"adapter {name!r} is sharded"
    a, b, weight = layer.lora_embedding_A[name], layer.lora_embedding_B[name], layer.base_layer.weight
    if type(a) is not nn.Parameter or type(b) is not nn.Parameter or a.dtype is not b.dtype:
        return f"adapter {name!r} is {checks.shown(a)} and {checks.shown(b)}"
    if a.dtype not in (weight.dtype, torch.float32) or a.device != weight.device:
        return f"adapter {name!r} is {checks.shown(a)} and the weight {checks.shown(weight)}"
    plan.adapters.append((a, b, float(layer.scaling[name])))
    return None


def lasting_plan(layer: Any) -> Plan | str:
    """The plan of any call just now, or why it runs PEFT's own forward."""
    if layer.disable_adapters:
        return "adapters are disabled"
    if layer.merged:
        return "the adapter is merged"
    used = [name for name in layer.active_adapters if name in layer.lora_embedding_A]
    if not used:
        return "no adapter is active"
    obstacle, plan = _base_obstacle(layer.base_layer), Plan([], layer.base_layer.padding_idx)
    for name in used:
        obstacle = obstacle or _add_adapter(plan, layer, name)
    return obstacle or plan


def _plan_call(layer: Any, ids: Any) -> Plan | str:
    plan = lasting_plan(layer)
    if isinstance(plan, str):
        return plan
    if torch.compiler.is_compiling():
        return "compiled"
    if checks.autocast_dtype(layer.base_layer.weight) is not None:
        return "autocast is on"
    return obstacles.input_obstacle(ids) or plan


class LoRAEmbeddingFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, ids, lora_a, lora_b, scale, padding_idx):
        y, a = reference.lora_embedding(rows, ids, lora_a, lora_b, scale)
        ctx.scale, ctx.padding_idx = scale, padding_idx
        ctx.save_for_backward(ids, a, lora_a, lora_b)
        return y

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, dy):
        da, db = reference.lora_embedding_backward(dy, *saved, ctx.scale, ctx.padding_idx)
        return dy, None, da, db, None, None


@functools.cache
def with_addition(plain: Any) -> type:
    """The class derived from `peft.tuners.lora.Embedding`."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        more = args or any(value is not None for value in kwargs.values())
        plan = "the call has arguments besides x" if more else _plan_call(self, x)
        if isinstance(plan, str):
            note_own_forward(self, plan, passing=plan != lasting_plan(self))
            own: Tensor = plain.forward(self, x, *args, **kwargs)
            return own
        rows, ids = self.base_layer(x), x.flatten()
        y = rows.reshape(-1, rows.shape[-1])
        wide = torch.promote_types(y.dtype, torch.float32) if len(plan.adapters) > 1 else y.dtype
        for a, b, scale in plan.adapters:
            y = LoRAEmbeddingFunction.apply(y.to(wide), ids, a, b, scale, plan.padding_idx)
        self.__dict__[SEEN] = Seen(rows.shape, rows.dtype)
        return y.to(rows.dtype).view(rows.shape)

    return derive(plain, with_addition, forward=forward)


def swap_obstacle(layer: Any) -> str | None:
    """Why the layer's class is not swapped, or None: nothing that it holds now could be added so."""
    if type(layer) is not lora.Embedding:
        return f"{type(layer).__module__}.{type(layer).__name__} is not fused"
    if "forward" in layer.__dict__:
        return "its forward was replaced on the object"
    obstacle = _base_obstacle(layer.base_layer)
    if obstacle is not None:
        return obstacle
    found = [_add_adapter(Plan([], None), layer, name) for name in layer.lora_embedding_A]
    return found[0] if found and all(found) else None


def attach(layer: nn.Module) -> None:
    """Swap the class of a LoRA layer over an embedding, if it can be."""
    if swap_obstacle(layer) is None:
        become(layer, with_addition(lora.Embedding))


def detach(layer: nn.Module) -> None:
    """Give it its class back."""
    if isinstance(layer, lora.Embedding):
        undo(layer)
        for name in (SEEN, OWN_FORWARD):
            layer.__dict__.pop(name, None)


def describe(layer: Any) -> tuple[str, str]:
    """(implementation, reason), for people, of the layer's last call that nobody compiled."""
    if not is_derived(layer):
        return "peft", swap_obstacle(layer) or "not accelerated: call fastlora.accelerate(model)"
    obstacle = lasting_plan(layer)
    seen = last_fused_call(layer, obstacle)
    if isinstance(seen, str):
        return "reference", seen
    rows = math.prod(seen.shape[:-1])
    return (
        "reference",
        f"{rows} row{'s' * (rows != 1)} of an embedding: the adapter is added by one product, in plain PyTorch",
    )
