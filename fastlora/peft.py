"""`accelerate`, `restore`, `report`: any PEFT LoRA model made faster in place by swapping the class of its LoRA layers.

Only the class changes. Parameters, submodules, state-dict keys and hooks on the layer stay where they are, so that saving, adding, switching,
disabling and merging adapters remain PEFT's own business. What the fused forward does not cover runs PEFT's forward, and `report` says why.
Frozen layers without an adapter are swapped where that is asked for. On a CPU the frozen weights may have packed copies (packed.py).
"""

import functools
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Self

import torch
from peft.tuners import lora
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from transformers.pytorch_utils import Conv1D

from fastlora import functional, groups, ops, packed, tune
from fastlora.functional import RowGroups
from fastlora.layers import is_hooked

ROWS_BEFORE_ANY_CALL = 512


class LayerReport(NamedTuple):
    """One LoRA layer, or one frozen layer that was swapped: what computes it and why.

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


# nn.Module looks for parameters and children last: a layer that asks for them where they lie is called in half the time.


def _tensor(module: nn.Module, name: str) -> Any:
    """The module's parameter of that name, or what stands in its place (a sharded or parametrised weight)."""
    return module._parameters[name] if name in module._parameters else getattr(module, name)


class _Adapter(NamedTuple):
    """The modules of one adapter of a LoRA layer."""

    lora_a: Any
    lora_b: Any
    dropout: Any

    @classmethod
    def of(cls, layer: nn.Module, adapter: str) -> Self:
        children: dict[str, Any] = layer._modules
        return cls(*(children[name]._modules[adapter] for name in ("lora_A", "lora_B", "lora_dropout")))


def _weight_obstacle(base: nn.Module) -> str | None:
    """Why the weight and bias of a linear layer are not ours to multiply by, or None."""
    weight, bias = _tensor(base, "weight"), _tensor(base, "bias")
    if type(weight) not in (nn.Parameter, Tensor):
        return f"the weight is a {type(weight).__name__}"
    if weight.dtype not in functional.FLOATS:
        return f"the weight is {str(weight.dtype).removeprefix('torch.')}"
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return "the base weight or bias is trained"
    return None


def _base_obstacle(layer: lora.Linear) -> str | None:
    """Why the frozen layer under a LoRA layer cannot be fused, or None."""
    base: Any = layer._modules["base_layer"]
    forward = getattr(type(base), "forward", None)
    if forward not in (nn.Linear.forward, FrozenLinear.forward, Conv1D.forward):
        return f"the base layer is a {type(base).__name__}"
    obstacle = _weight_obstacle(base)
    if obstacle is None and is_hooked(base):
        return "the base layer carries a hook"
    return obstacle


def _weight_of(base: nn.Module) -> Tensor:  # [N, K]
    weight = _tensor(base, "weight")
    return weight.t() if isinstance(base, Conv1D) else weight


def _adapter_obstacle(layer: lora.Linear, adapter: str) -> str | None:
    """Why one adapter of a LoRA layer cannot be fused, or None."""
    if adapter in layer.lora_variant:
        return f"adapter {adapter!r} is a {type(layer.lora_variant[adapter]).__name__.removesuffix('LinearVariant')} variant"
    lora_a, lora_b, dropout = _Adapter.of(layer, adapter)
    if type(lora_a) is not nn.Linear or type(lora_b) is not nn.Linear or type(dropout) not in (nn.Dropout, nn.Identity):
        return (
            f"adapter {adapter!r} is made of {type(lora_a).__name__}, {type(lora_b).__name__}, {type(dropout).__name__}"
        )
    if _tensor(lora_b, "bias") is not None:
        return f"adapter {adapter!r} has a bias (lora_bias)"
    kinds = {type(_tensor(lora_a, "weight")), type(_tensor(lora_b, "weight"))}
    if kinds != {nn.Parameter}:
        return f"the weights of adapter {adapter!r} are {' and '.join(sorted(kind.__name__ for kind in kinds))}"
    if isinstance(layer.scaling[adapter], Tensor):
        return f"the scaling of adapter {adapter!r} is a tensor"
    if is_hooked(lora_a) or is_hooked(lora_b) or is_hooked(dropout):
        return f"adapter {adapter!r} carries a hook"
    return None


def _dropout_p(dropout: nn.Module) -> float:
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


class _Arguments(NamedTuple):
    """What `functional.lora_linear` takes besides x."""

    weight: Tensor  # [N, K]
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    scale: float
    dropout_p: float


def _columns(adapters: Sequence[_Arguments]) -> tuple[list[Any], ...]:
    return tuple(list(column) for column in zip(*adapters, strict=True))


class _Seen(NamedTuple):
    """What `report` needs to know of a layer's last call."""

    shape: Sequence[int]  # of x
    dtype: torch.dtype
    dropout: bool
    mixed: bool  # a mixed batch, that is multi_lora
    grouped: bool  # its group computed it
    obstacle: str | None  # why the layer's own forward ran; the rest means nothing then

    @classmethod
    def call(cls, x: Tensor, dropout: bool = False, mixed: bool = False, grouped: bool = False) -> Self:
        return cls(x.shape, functional._autocast_dtype(x) or x.dtype, dropout, mixed, grouped, None)

    @classmethod
    def own_forward(cls, obstacle: str) -> Self:
        return cls((), torch.float32, False, False, False, obstacle)


class FusedLinear(lora.Linear):
    """`peft.tuners.lora.Linear` whose forward is one fused operator, where the layer's state allows."""

    base_layer: Any  # PEFT's attributes, which nn.Module types as Tensor | Module
    lora_A: Any
    lora_B: Any

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter_names = kwargs.get("adapter_names")
        used = self._used_adapters(adapter_names)
        obstacle = self._obstacle(x, used, args, kwargs)
        if obstacle is not None:
            if not torch.compiler.is_compiling():
                self.__dict__["_fastlora_seen"] = _Seen.own_forward(obstacle)
            return super().forward(x, *args, **kwargs)
        adapters = [self._arguments(adapter) for adapter in used]
        names = None if adapter_names is None else tuple(adapter_names)
        if names is not None:
            self._check_forward_args(x, adapter_names=adapter_names)
        if not torch.compiler.is_compiling():
            dropout = any(each.dropout_p for each in adapters)
            # Asked first, since most devices have none, and a group costs a layer of few rows a tenth of its time.
            shares = len(used) == 1 if names is None else bool(ops.candidates("multi_lora_shared", x.device, x.dtype))
            group = self.__dict__.get("_fastlora_group") if shares else None
            y = None if group is None else group.result_of(self, x, names)
            self.__dict__["_fastlora_seen"] = _Seen.call(x, dropout, names is not None, grouped=y is not None)
            if y is not None:
                return y
        one = adapters[0]
        if names is not None:
            _, _, every_a, every_b, scale, dropout_p = _columns(adapters)
            index = _row_groups(names, tuple(used), x.device, torch.is_inference_mode_enabled())
            return functional.multi_lora(x, one.weight, one.bias, every_a, every_b, scale, index, dropout_p=dropout_p)
        if len(used) == 1:
            return functional.lora_linear(
                x, one.weight, one.bias, one.lora_a, one.lora_b, one.scale, dropout_p=one.dropout_p
            )
        # A sum of adapters is one adapter of their concatenated rank. With dropout there is an obstacle.
        lora_a = torch.cat([each.lora_a for each in adapters])
        lora_b = torch.cat([each.lora_b * each.scale for each in adapters], dim=1)
        return functional.lora_linear(x, one.weight, one.bias, lora_a, lora_b, 1.0)

    def _arguments(self, adapter: str) -> _Arguments:
        base: Any = self._modules["base_layer"]
        lora_a, lora_b, dropout = _Adapter.of(self, adapter)
        return _Arguments(
            _weight_of(base),
            _tensor(base, "bias"),
            _tensor(lora_a, "weight"),
            _tensor(lora_b, "weight"),
            self.scaling[adapter],
            _dropout_p(dropout),
        )

    # PEFT writes into the base weight through `.data`.

    def merge(self, *args: Any, **kwargs: Any) -> None:
        with packed.rewriting(self.base_layer):
            super().merge(*args, **kwargs)

    def unmerge(self) -> None:
        with packed.rewriting(self.base_layer):
            super().unmerge()

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        with packed.rewriting(self.base_layer):  # OLoRA begins by changing it
            super().update_layer(*args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        with packed.rewriting(self.base_layer):  # moved: the copies are of no use, wherever it goes
            return super()._apply(*args, **kwargs)

    def _used_adapters(self, adapter_names: Sequence[str] | None) -> list[str]:
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
        dtypes = set()
        for adapter in used:
            obstacle = _adapter_obstacle(self, adapter)
            if obstacle is not None:
                return obstacle
            own = _tensor(_Adapter.of(self, adapter).lora_a, "weight").dtype
            if own not in (dtype, torch.float32):
                return f"adapter {adapter!r} is {own} and x is {dtype}"
            dtypes.add(own)
        if len(used) > 1:
            if len(dtypes) > 1:
                return "the adapters have different dtypes"
            if kwargs.get("adapter_names") is None and any(_dropout_p(self.lora_dropout[adapter]) for adapter in used):
                return "several adapters are active with dropout"
        return None


def _compute_all(layers: Sequence[FusedLinear], x: Tensor, names: groups.AdapterNames) -> list[Tensor] | None:
    """The results of layers that share x, or None: they run alone this time, as one is hooked, does not run fused, or has other adapters."""
    used = [layer._used_adapters(names) for layer in layers]
    if any(own != used[0] for own in used) if names is not None else any(len(own) != 1 for own in used):
        return None
    kwargs = {} if names is None else {"adapter_names": names}
    for layer, own in zip(layers, used, strict=True):
        if is_hooked(layer) or layer._obstacle(x, own, (), kwargs) is not None:
            return None
    adapters = [[layer._arguments(adapter) for adapter in own] for layer, own in zip(layers, used, strict=True)]
    if len({own[0].lora_a.dtype for own in adapters}) > 1:
        return None
    weight, bias, *own_columns = _columns([own[0] for own in adapters])
    if names is None:
        lora_a, lora_b, scale, dropout_p = own_columns
        return functional.lora_linear_shared(x, weight, bias, lora_a, lora_b, scale, dropout_p=dropout_p)
    _, _, lora_a, lora_b, scale, dropout_p = (list(column) for column in zip(*map(_columns, adapters), strict=True))
    like_x, dropout = _like_rows(x.shape, weight[0], functional._autocast_dtype(x) or x.dtype), any(map(any, dropout_p))
    if not ops.choose_multi_lora_shared(like_x, weight[0], dropout)[1]:
        return None  # one after the other is cheaper from here than within one operator
    index = _row_groups(names, tuple(used[0]), x.device, torch.is_inference_mode_enabled())
    return functional.multi_lora_shared(x, weight, bias, lora_a, lora_b, scale, index, dropout_p=dropout_p)


class FrozenLinear(nn.Linear):
    """A frozen `nn.Linear` whose forward is `functional.frozen_linear`, as long as it stays frozen."""

    def forward(self, x: Tensor) -> Tensor:
        obstacle = _weight_obstacle(self)
        if not torch.compiler.is_compiling():
            self.__dict__["_fastlora_seen"] = _Seen.call(x) if obstacle is None else _Seen.own_forward(obstacle)
        if obstacle is not None:
            return super().forward(x)
        return functional.frozen_linear(x, _tensor(self, "weight"), _tensor(self, "bias"))

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        with packed.rewriting(self):
            return super()._apply(*args, **kwargs)

    @property
    def base_layer(self) -> Any:
        """PEFT asks a layer for this when it wraps it and before it merges into its weight through `.data`; there is none."""
        packed.drop(self.weight)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute 'base_layer'")


@functools.lru_cache(maxsize=4)
def _row_groups(
    adapter_names: tuple[str, ...], used: tuple[str, ...], device: torch.device, inference: bool
) -> RowGroups:
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


def _frozen_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that are, or may become, a FrozenLinear: frozen, plain, and not part of an adapter."""
    adapters = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    inside = {part for adapter in adapters for part in adapter.modules()}
    layers = [module for module in model.modules() if type(module) in (nn.Linear, FrozenLinear)]
    return [
        layer
        for layer in layers
        if layer not in inside
        and (type(layer) is FrozenLinear or (_weight_obstacle(layer) is None and not is_hooked(layer)))
    ]


def accelerate(model: nn.Module, *, frozen: bool = False, pack_budget: int | None = None) -> nn.Module:
    """Make a PEFT LoRA model faster, in place, with the same results; returns the model.

    Swaps the class of every `peft.tuners.lora.Linear` that can be fused (nn.Linear or Conv1D underneath, frozen, plain LoRA) to a
    subclass whose forward and backward run as one operator. Layers that share x, as query, key and value do, become groups that read it
    once (groups.py). Call it again after new layers were added; `restore` undoes it.

    frozen: also swap every plain frozen nn.Linear without an adapter, such as lm_head; the model then needs no LoRA layers.
    pack_budget: bytes that packed copies of frozen weights may take on a CPU, 0 for none; None: a sixteenth of the machine's memory. A
    copy is made by the first product for which it was measured to pay on this kind of machine; `report` names those that did not fit. A write to
    a frozen weight is seen, by whatever hand (packed.py).

    On a kind of CPU or GPU that nobody has measured, it first measures, once: for a few seconds on a CPU, for a minute or two on a GPU, whose
    kernels are compiled meanwhile (`fastlora.tune.try_out`; FASTLORA_TRIAL=0: never). A model that is on a CPU may yet be moved: where
    there is a card, that is measured as well.
    Under torch.distributed every process calls it, and all choose as rank 0 does.

    Raises:
        ValueError: the model has nothing to accelerate, or pack_budget is no number of bytes.
    Warns:
        UserWarning: not one of the LoRA layers could be fused.
    """
    budget = packed.Budget(pack_budget)
    layers = list(_lora_layers(model))
    plain = _frozen_layers(model) if frozen else []
    if not layers and not frozen:
        raise ValueError("model: has no PEFT LoRA layers, expected the result of peft.get_peft_model with a LoraConfig")
    if not layers and not plain:
        raise ValueError(
            "model: has no LoRA layers and no frozen nn.Linear, expected one (model.requires_grad_(False) freezes)"
        )
    for _, layer in layers:
        _restore_layer(layer.base_layer)  # of a layer that got its adapter since the last call
        if type(layer) is not FusedLinear and _swap_obstacle(layer) is None:
            layer.__class__ = FusedLinear
    for linear in plain:
        linear.__class__ = FrozenLinear
    for module in model.modules():
        base = _frozen_base(module)
        if base is not None:
            packed.attach(base, budget)
    _dissolve_groups(model)
    for group in groups.find_groups(model, lambda module: type(module) is FusedLinear, _compute_all):
        for member in group.layers:
            member.__dict__["_fastlora_group"] = group
    if layers and not any(type(layer) is FusedLinear for _, layer in layers):
        warnings.warn(
            f"fastlora.accelerate fused none of {len(layers)} LoRA layers: {_swap_obstacle(layers[0][1])}", stacklevel=2
        )
    tune.try_out(_weights_by_operator(model))
    return model


def _weights_by_operator(model: nn.Module) -> dict[str, list[Tensor]]:
    """For each operator, the frozen weights that the swapped layers call it with."""
    fused = [module for module in model.modules() if type(module) is FusedLinear]
    grouped = [layer for layer in fused if "_fastlora_group" in layer.__dict__]
    swapped = [base for base in map(_frozen_base, model.modules()) if base is not None]
    return {
        "frozen_linear": [base.weight for base in swapped],
        "lora_linear": [layer.base_layer.weight for layer in fused],
        "lora_linear_shared": [layer.base_layer.weight for layer in grouped],
        "multi_lora": [layer.base_layer.weight for layer in fused if len(layer.lora_A) > 1],
        "multi_lora_shared": [layer.base_layer.weight for layer in grouped if len(layer.lora_A) > 1],
    }


def _frozen_base(module: Any) -> Any:
    """The layer whose weight a swapped layer multiplies by, or None for other modules."""
    if type(module) is FusedLinear:
        return module.base_layer
    return module if type(module) is FrozenLinear else None


def _restore_layer(module: Any) -> None:
    base = _frozen_base(module)
    if base is not None:
        packed.detach(base)
        module.__class__ = lora.Linear if type(module) is FusedLinear else nn.Linear
        module.__dict__.pop("_fastlora_seen", None)


def _dissolve_groups(model: nn.Module) -> None:
    for module in model.modules():
        group = module.__dict__.pop("_fastlora_group", None)
        if group is not None:
            group.remove_hook()


def restore(model: nn.Module) -> nn.Module:
    """Undo `accelerate`, in place, and free the packed copies; returns the model."""
    _dissolve_groups(model)
    for module in model.modules():
        _restore_layer(module)
    return model


def report(model: nn.Module) -> Report:
    """What computes each LoRA layer of the model and each frozen layer that was swapped, and why; print it for a table."""
    return Report(
        LayerReport(name, *_explain(module))
        for name, module in model.named_modules()
        if isinstance(module, (LoraLayer, FrozenLinear))
    )


def _like_rows(shape: Sequence[int], weight: Tensor, dtype: torch.dtype) -> Tensor:
    """What `ops` chooses by in the place of x, as rows [M, K], where weight is; it has no memory of its own."""
    return weight.new_empty(1, 1, dtype=dtype).expand(math.prod(shape[:-1]), weight.shape[1])


def _explain(layer: Any) -> tuple[str, str]:
    base = _frozen_base(layer)
    if base is None:
        return "peft", _swap_obstacle(layer) or "not accelerated: call fastlora.accelerate(model)"
    seen = layer.__dict__.get("_fastlora_seen") or _before_any_call(layer, base)
    if seen.obstacle is not None:
        return "reference", f"{'PEFT' if base is not layer else 'nn.Linear'}'s own forward: {seen.obstacle}"
    weight = _weight_of(base)
    rows = math.prod(seen.shape[:-1])
    like_x = _like_rows(seen.shape, weight, seen.dtype)
    group = layer.__dict__.get("_fastlora_group")
    grouped = seen.grouped and group is not None and group.dissolved is None

    def chosen(backward: bool) -> tuple[ops.Choice, bool]:
        """The choice, and whether it runs the layer's group together."""
        if grouped:
            first = _weight_of(_frozen_base(group.layers[0]))
            choose_all = ops.choose_multi_lora_shared if seen.mixed else ops.choose_lora_linear_shared
            return choose_all(like_x, first, seen.dropout, backward)
        if base is layer:
            return ops.choose_frozen_linear(like_x, weight, backward), False
        choose = ops.choose_multi_lora if seen.mixed else ops.choose_lora_linear
        return choose(like_x, weight, seen.dropout, backward), False

    (implementation, reason, _), together = chosen(backward=False)
    if implementation == "cpu":
        reason += f"; x Wᵀ by {packed.describe(weight, seen.dtype, rows)}"
    if group is not None and (seen.grouped or not seen.mixed):
        reason += f"; {group.describe(layer, seen.grouped, together)}"
    try:
        backward, _ = chosen(backward=True)
    except ops.ImplementationError as error:  # forced, and has the forward alone
        return implementation, f"{reason}; no backward: {error}"
    if backward.implementation != implementation:
        reason += f"; backward {backward.implementation}: {backward.reason}"
    return implementation, reason


def _before_any_call(layer: Any, base: Any) -> _Seen:
    used = [] if base is layer else layer._used_adapters(None)
    dropout = any(_dropout_p(layer.lora_dropout[name]) for name in used)
    grouped = "_fastlora_group" in layer.__dict__ and len(used) == 1
    return _Seen((ROWS_BEFORE_ANY_CALL, layer.in_features), base.weight.dtype, dropout, False, grouped, None)
