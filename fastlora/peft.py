"""`accelerate`, `restore`, `report`: any PEFT LoRA model made faster in place by swapping the class of its LoRA layers.

Only the class changes. Parameters, submodules, state-dict keys and hooks on the layer stay where they are, so that saving, adding, switching,
disabling and merging adapters remain PEFT's own business. What the fused forward does not cover runs PEFT's forward, and `report` says why.
"""

import functools
import math
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple, Self

import torch
from peft.tuners import lora
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from transformers.pytorch_utils import Conv1D

from fastlora import functional, ops
from fastlora.functional import RowGroups

ROWS_BEFORE_ANY_CALL = 512


class LayerReport(NamedTuple):
    """One LoRA layer: what computes it and why.

    implementation: one of `ops.IMPLEMENTATIONS`, that of the last call (before any, the one for 512 rows), or "peft" where the class was not swapped.
    """

    name: str
    implementation: str
    reason: str


class Report(list[LayerReport]):
    """The LayerReports of a model; prints as a table."""

    def __str__(self) -> str:
        rows = [LayerReport._fields, *self]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )


def _is_hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward: the fused forward does not call it."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or "_hf_hook" in module.__dict__
    )


def _base_obstacle(layer: lora.Linear) -> str | None:
    """Why the frozen layer under a LoRA layer cannot be fused, or None."""
    base = layer.base_layer
    forward = getattr(type(base), "forward", None)
    if forward is not nn.Linear.forward and forward is not Conv1D.forward:
        return f"the base layer is a {type(base).__name__}"
    weight, bias = base.weight, base.bias
    if type(weight) not in (nn.Parameter, Tensor):
        return f"the weight is a {type(weight).__name__}"
    if weight.dtype not in functional.FLOATS:
        return f"the weight is {str(weight.dtype).removeprefix('torch.')}"
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return "the base weight or bias is trained"
    if _is_hooked(base):
        return "the base layer carries a hook"
    return None


def _adapter_obstacle(layer: lora.Linear, adapter: str) -> str | None:
    """Why one adapter of a LoRA layer cannot be fused, or None."""
    if adapter in layer.lora_variant:
        return f"adapter {adapter!r} is a {type(layer.lora_variant[adapter]).__name__.removesuffix('LinearVariant')} variant"
    lora_a, lora_b, dropout = layer.lora_A[adapter], layer.lora_B[adapter], layer.lora_dropout[adapter]
    if type(lora_a) is not nn.Linear or type(lora_b) is not nn.Linear or type(dropout) not in (nn.Dropout, nn.Identity):
        return (
            f"adapter {adapter!r} is made of {type(lora_a).__name__}, {type(lora_b).__name__}, {type(dropout).__name__}"
        )
    if lora_b.bias is not None:
        return f"adapter {adapter!r} has a bias (lora_bias)"
    if type(lora_a.weight) is not nn.Parameter or type(lora_b.weight) is not nn.Parameter:
        return f"the weights of adapter {adapter!r} are {type(lora_a.weight).__name__}"
    if isinstance(layer.scaling[adapter], Tensor):
        return f"the scaling of adapter {adapter!r} is a tensor"
    if _is_hooked(lora_a) or _is_hooked(lora_b) or _is_hooked(dropout):
        return f"adapter {adapter!r} carries a hook"
    return None


def _dropout_p(dropout: nn.Module) -> float:
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


class _Seen(NamedTuple):
    """What `report` needs to know of a layer's last call."""

    rows: int
    dtype: torch.dtype
    mixed: bool  # a mixed batch, that is multi_lora
    obstacle: str | None  # why PEFT's own forward ran

    @classmethod
    def call(cls, x: Tensor, obstacle: str | None, mixed: bool) -> Self:
        if obstacle is not None:
            return cls(0, torch.float32, mixed, obstacle)
        return cls(math.prod(x.shape[:-1]), functional._autocast_dtype(x) or x.dtype, mixed, None)


class FusedLinear(lora.Linear):
    """`peft.tuners.lora.Linear` whose forward is one fused operator, where the layer's state allows."""

    base_layer: Any  # PEFT's attributes, which nn.Module types as Tensor | Module
    lora_A: Any
    lora_B: Any

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter_names = kwargs.get("adapter_names")
        used = self._used_adapters(adapter_names)
        obstacle = self._obstacle(x, used, args, kwargs)
        if not torch.compiler.is_compiling():
            self.__dict__["_fastlora_seen"] = _Seen.call(x, obstacle, mixed=adapter_names is not None)
        if obstacle is not None:
            return super().forward(x, *args, **kwargs)
        base = self.base_layer
        weight = base.weight.t() if isinstance(base, Conv1D) else base.weight
        if adapter_names is not None:
            self._check_forward_args(x, adapter_names=adapter_names)
            return functional.multi_lora(
                x,
                weight,
                base.bias,
                [self.lora_A[adapter].weight for adapter in used],
                [self.lora_B[adapter].weight for adapter in used],
                [self.scaling[adapter] for adapter in used],
                _groups(tuple(adapter_names), tuple(used), x.device, torch.is_inference_mode_enabled()),
                dropout_p=[_dropout_p(self.lora_dropout[adapter]) for adapter in used],
            )
        if len(used) == 1:
            adapter = used[0]
            lora_a, lora_b, scale = self.lora_A[adapter].weight, self.lora_B[adapter].weight, self.scaling[adapter]
        else:  # a sum of adapters is one adapter of their concatenated rank
            lora_a = torch.cat([self.lora_A[adapter].weight for adapter in used])
            lora_b = torch.cat([self.lora_B[adapter].weight * self.scaling[adapter] for adapter in used], dim=1)
            scale = 1.0
        dropout_p = _dropout_p(self.lora_dropout[used[0]])
        return functional.lora_linear(x, weight, base.bias, lora_a, lora_b, scale, dropout_p=dropout_p)

    def _used_adapters(self, adapter_names: list[str] | None) -> list[str]:
        wanted = self.active_adapters if adapter_names is None else dict.fromkeys(adapter_names)
        return [adapter for adapter in wanted if adapter in self.lora_A]

    def _obstacle(self, x: Tensor, used: list[str], args: tuple, kwargs: dict[str, Any]) -> str | None:
        """Why this call runs PEFT's own forward, or None."""
        if args or any(value is not None for name, value in kwargs.items() if name != "adapter_names"):
            return "the call has arguments besides x"
        if self.disable_adapters:
            return "adapters are disabled"
        if self.merged:
            return "the adapter is merged"
        if not used:
            return "no adapter is active"
        if nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks:
            return "a global hook is set"
        if not isinstance(x, Tensor) or x.dim() == 0:
            return "x is not a tensor of rows"
        obstacle = _base_obstacle(self)
        if obstacle is not None:
            return obstacle
        dtype = functional._autocast_dtype(x) or x.dtype
        for adapter in used:
            obstacle = _adapter_obstacle(self, adapter)
            if obstacle is not None:
                return obstacle
            if self.lora_A[adapter].weight.dtype not in (dtype, torch.float32):
                return f"adapter {adapter!r} is {self.lora_A[adapter].weight.dtype} and x is {dtype}"
        if len(used) > 1:
            if len({self.lora_A[adapter].weight.dtype for adapter in used}) > 1:
                return "the adapters have different dtypes"
            if kwargs.get("adapter_names") is None and any(_dropout_p(self.lora_dropout[adapter]) for adapter in used):
                return "several adapters are active with dropout"
        return None


@functools.lru_cache(maxsize=4)
def _groups(adapter_names: tuple[str, ...], used: tuple[str, ...], device: torch.device, inference: bool) -> RowGroups:
    """The rows of a mixed batch, sorted once and shared by all layers and steps that have the same names.

    inference: whether inference mode is on; its tensors are kept apart, since autograd cannot take them.
    """
    number = {adapter: i for i, adapter in enumerate(used)}
    index = torch.tensor([number.get(name, -1) for name in adapter_names], device=device)
    return functional.group_rows(index, len(used))


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def _swap_obstacle(layer: LoraLayer) -> str | None:
    """Why the layer's class is not swapped, or None: nothing that it holds now could be fused."""
    if type(layer) is not lora.Linear:
        return f"{type(layer).__module__}.{type(layer).__name__} is not fused"
    obstacle = _base_obstacle(layer)
    if obstacle is not None:
        return obstacle
    obstacles = [_adapter_obstacle(layer, adapter) for adapter in layer.lora_A]
    return obstacles[0] if obstacles and all(obstacles) else None


def accelerate(model: nn.Module) -> nn.Module:
    """Make a PEFT LoRA model faster, in place, with the same results; returns the model.

    Swaps the class of every `peft.tuners.lora.Linear` that can be fused (nn.Linear or Conv1D underneath, frozen, plain LoRA) to a
    subclass whose forward and backward run as one operator. Call it again after new layers were added; `restore` undoes it.

    Raises:
        ValueError: the model has no LoRA layers of PEFT's.
    Warns:
        UserWarning: not one layer could be fused.
    """
    layers = list(_lora_layers(model))
    if not layers:
        raise ValueError("model: has no PEFT LoRA layers, expected the result of peft.get_peft_model with a LoraConfig")
    for _, layer in layers:
        if type(layer) is not FusedLinear and _swap_obstacle(layer) is None:
            layer.__class__ = FusedLinear
    if not any(type(layer) is FusedLinear for _, layer in layers):
        warnings.warn(
            f"fastlora.accelerate fused none of {len(layers)} LoRA layers: {_swap_obstacle(layers[0][1])}", stacklevel=2
        )
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo `accelerate`, in place; returns the model."""
    for _, layer in _lora_layers(model):
        if type(layer) is FusedLinear:
            layer.__class__ = lora.Linear  # type: ignore[assignment]
            layer.__dict__.pop("_fastlora_seen", None)
    return model


def report(model: nn.Module) -> Report:
    """What computes each LoRA layer of the model, and why; print it for a table."""
    return Report(LayerReport(name, *_explain(layer)) for name, layer in _lora_layers(model))


def _explain(layer: Any) -> tuple[str, str]:
    if type(layer) is not FusedLinear:
        return "peft", _swap_obstacle(layer) or "not accelerated: call fastlora.accelerate(model)"
    base = layer.base_layer
    seen = layer.__dict__.get("_fastlora_seen", _Seen(ROWS_BEFORE_ANY_CALL, base.weight.dtype, False, None))
    if seen.obstacle is not None:
        return "reference", f"PEFT's own forward: {seen.obstacle}"
    like_x = base.weight.new_empty(1, 1, dtype=seen.dtype).expand(seen.rows, layer.in_features)
    choice = ops.choose_multi_lora(like_x) if seen.mixed else ops.choose_lora_linear(like_x)
    return choice.implementation, choice.reason
