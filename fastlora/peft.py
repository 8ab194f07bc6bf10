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
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from transformers.pytorch_utils import Conv1D

from fastlora import functional, groups, ops
from fastlora.choice import trial
from fastlora.frozen import packed
from fastlora.functional import RowGroups
from fastlora.layers import is_hooked

ROWS_BEFORE_ANY_CALL = 512
NOT_OBSERVED = "compiled: not observed"
SEEN, OWN_FORWARD = "_fastlora_seen", "_fastlora_own_forward"
"""Under which a layer's `__dict__` has its last calls, for `report`."""


class LayerReport(NamedTuple):
    """One LoRA layer, or one frozen layer that was swapped: what computes it and why.

    implementation: one of `ops.IMPLEMENTATIONS`, that of the last call ("reference" where that was PEFT's own forward), or "peft" where the class
        was not swapped. Before any call it is a guess, for 512 rows. Calls that torch.compile has compiled are not observed.
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


GLOBAL_HOOKS = (
    nn_module._global_forward_hooks,
    nn_module._global_forward_pre_hooks,
    nn_module._global_backward_hooks,
    nn_module._global_backward_pre_hooks,
)
"""Torch's tables of them: they see the modules inside a layer, which a fused forward does not call."""


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
    if weight.requires_grad and not torch.compiler.is_compiling():
        packed.drop(weight)  # a step may change it in ways that leave no trace
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
    if not isinstance(layer.scaling[adapter], (int, float)):
        return f"the scaling of adapter {adapter!r} is a {type(layer.scaling[adapter]).__name__}"
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


def _input_obstacle(x: Any) -> str | None:
    """Why x, or what torch wants of it just now, is nothing for a fused operator, or None."""
    if not isinstance(x, Tensor) or x.is_nested or x.layout is not torch.strided or x.dim() == 0:
        return "x is not a tensor of rows"
    if type(x) is not Tensor and type(x) is not nn.Parameter and not torch.compiler.is_compiling():
        return f"x is a {type(x).__name__}"
    return functional.transform_obstacle()


def _columns(adapters: Sequence[_Arguments]) -> tuple[list[Any], ...]:
    return tuple(list(column) for column in zip(*adapters, strict=True))


class _Seen(NamedTuple):
    """What `report` needs to know of a layer's last fused call."""

    shape: Sequence[int]  # of x
    dtype: torch.dtype
    dropout: bool = False
    mixed: bool = False  # a mixed batch, that is multi_lora
    grouped: bool = False  # its group computed it


class _OwnForward(NamedTuple):
    """The last call that ran the forward of the layer's own class."""

    obstacle: str
    passing: bool  # the call stood in the way, not the layer
    before: _Seen | None  # the last fused call up to then


def _note_own_forward(layer: nn.Module, obstacle: str, passing: bool) -> None:
    if not torch.compiler.is_compiling():
        before = layer.__dict__.get(SEEN)
        layer.__dict__[OWN_FORWARD] = _OwnForward(obstacle, passing, before)


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
            y = super().forward(x, *args, **kwargs)
            _note_own_forward(self, obstacle, passing=obstacle != self._lasting_obstacle(used))
            return y
        adapters = [self._arguments(adapter) for adapter in used]
        names = None if adapter_names is None else tuple(adapter_names)
        if names is not None:
            self._check_forward_args(x, adapter_names=adapter_names)
        if torch.compiler.is_compiling():
            return self._compute(x, adapters, used, names)
        # Asked first, since most devices have none, and a group costs a layer of few rows a tenth of its time.
        shares = len(used) == 1 if names is None else bool(ops.candidates("multi_lora_shared", x.device, x.dtype))
        group = self.__dict__.get(groups.KEY) if shares else None
        shared = None if group is None else group.result_of(self, x, names)
        y = self._compute(x, adapters, used, names) if shared is None else shared
        dropout = any(each.dropout_p for each in adapters)
        dtype = functional._autocast_dtype(x) or x.dtype
        self.__dict__[SEEN] = _Seen(x.shape, dtype, dropout, names is not None, shared is not None)
        return y

    def _compute(self, x: Tensor, adapters: list[_Arguments], used: list[str], names: groups.AdapterNames) -> Tensor:
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

    def __getstate__(self) -> dict[str, Any]:
        # Or a copy of one layer would take its parent and the others of its group along.
        return {name: value for name, value in self.__dict__.items() if name != groups.KEY}

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

    def unload_and_optionally_merge_module(self, merge: bool, safe_merge: bool, adapter_names: Any) -> nn.Module:
        """What PEFT asks of a layer that is more than its class: its frozen layer, merged or not, without anything of ours."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        base = self.get_base_layer()
        _leave_group(self)
        _restore_layer(self)
        _restore_layer(base)
        return base

    def _obstacle(self, x: Tensor, used: list[str], args: tuple, kwargs: dict[str, Any]) -> str | None:
        """Why this call runs PEFT's own forward, or None."""
        if args or any(value is not None for name, value in kwargs.items() if name != "adapter_names"):
            return "the call has arguments besides x"
        obstacle = self._lasting_obstacle(used) or _input_obstacle(x)
        if obstacle is not None:
            return obstacle
        dtype = functional._autocast_dtype(x) or x.dtype
        dtypes = {_tensor(_Adapter.of(self, adapter).lora_a, "weight").dtype for adapter in used}
        for own in dtypes:
            if own not in (dtype, torch.float32):
                return f"the adapter is {str(own).removeprefix('torch.')} and x is {str(dtype).removeprefix('torch.')}"
        if len(used) > 1:
            if len(dtypes) > 1:
                return "the adapters have different dtypes"
            if kwargs.get("adapter_names") is None and any(_dropout_p(self.lora_dropout[adapter]) for adapter in used):
                return "several adapters are active with dropout"
        return None

    def _lasting_obstacle(self, used: list[str]) -> str | None:
        """Why any call with these adapters runs PEFT's own forward just now, or None."""
        if self.disable_adapters:
            return "adapters are disabled"
        if self.merged:
            return "the adapter is merged"
        if not used:
            return "no adapter is active"
        if any(GLOBAL_HOOKS):
            return "a global hook is set"
        obstacle = _base_obstacle(self)
        for adapter in used:
            obstacle = obstacle or _adapter_obstacle(self, adapter)
        return obstacle


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
        lasting = _weight_obstacle(self)
        obstacle = lasting or _input_obstacle(x)
        if obstacle is not None:
            y = super().forward(x)
            _note_own_forward(self, obstacle, passing=lasting is None)
            return y
        y = functional.frozen_linear(x, _tensor(self, "weight"), _tensor(self, "bias"))
        if not torch.compiler.is_compiling():
            self.__dict__[SEEN] = _Seen(x.shape, functional._autocast_dtype(x) or x.dtype)
        return y

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        with packed.rewriting(self):
            return super()._apply(*args, **kwargs)

    def unload_and_optionally_merge_module(self, merge: bool, safe_merge: bool, adapter_names: Any) -> nn.Module:
        """What PEFT asks of a layer that is more than its class, as it unloads a model: the nn.Linear."""
        _restore_layer(self)
        return self

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
    if "forward" in layer.__dict__:
        return "its forward was replaced on the object"  # which would go on calling the one it found
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
    a frozen weight is seen, by whatever hand (packed.py). A weight that another module has, too, such as a tied embedding, has no copies.

    On a kind of CPU or GPU that nobody has measured, it first measures, once: for a few seconds on a CPU, for a minute or two on a GPU, whose
    kernels are compiled meanwhile (`fastlora.choice.trial.try_out`; FASTLORA_TRIAL=0: never). A model that is on a CPU may yet be moved: where
    there is a card, that is measured as well.
    Under torch.distributed every process calls it, and all choose as rank 0 does.

    PEFT's `unload` and `merge_and_unload` restore the model first: what they return has nothing of fastlora's.

    Raises:
        ValueError: the model has nothing to accelerate, or pack_budget is no number of bytes.
        fastlora.ops.ImplementationError: FASTLORA_IMPL names nothing that this machine can run.
    Warns:
        UserWarning: not one of the LoRA layers could be fused.
    """
    ops.read_environment()
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
    bases = [base for base in map(_frozen_base, model.modules()) if base is not None]
    shared = _weights_of_others(model, bases)
    for base in bases:
        if base.weight in shared:
            packed.detach(base)
        else:
            packed.attach(base, budget)
    for module in model.modules():
        _leave_group(module)
        if isinstance(module, BaseTuner):
            for name in UNLOADING:
                module.__dict__[name] = functools.partial(_unload_restored, module, name)
    for group in groups.find_groups(model, lambda module: type(module) is FusedLinear, _compute_all):
        group.attach()
    if layers and not any(type(layer) is FusedLinear for _, layer in layers):
        warnings.warn(
            f"fastlora.accelerate fused none of {len(layers)} LoRA layers: {_swap_obstacle(layers[0][1])}", stacklevel=2
        )
    trial.try_out(_weights_by_operator(model))
    return model


def _weights_of_others(model: nn.Module, bases: Sequence[nn.Module]) -> packed.Places:
    """Where the weights of all modules but these lie. A tied embedding's is written to by others: PEFT merges a few of its rows through `.data`."""
    others = set(model.modules()).difference(bases)
    return packed.Places(weight for module in others for weight in module._parameters.values())


def _weights_by_operator(model: nn.Module) -> dict[str, list[Tensor]]:
    """For each operator, the frozen weights that the swapped layers call it with."""
    fused = [module for module in model.modules() if type(module) is FusedLinear]
    grouped = [layer for layer in fused if groups.KEY in layer.__dict__]
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
    return module if isinstance(module, FrozenLinear) else None


def _restore_layer(module: Any) -> None:
    base = _frozen_base(module)
    if base is not None:
        packed.detach(base)
        if type(module) in (FusedLinear, FrozenLinear):
            module.__class__ = lora.Linear if type(module) is FusedLinear else nn.Linear
        else:  # torch.nn.utils.parametrize has derived a class for this module since
            type(module).__bases__ = (nn.Linear,)
        for name in (SEEN, OWN_FORWARD):
            module.__dict__.pop(name, None)


def _leave_group(layer: nn.Module) -> None:
    """Take a layer's group apart, if it has one."""
    group = layer.__dict__.pop(groups.KEY, None)
    if group is not None:
        group.remove_hooks()


UNLOADING = ("unload", "merge_and_unload")
"""The methods of PEFT's tuners that hand out a plain model."""


def _unload_restored(tuner: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    """Stands before a tuner's own method. Layers are restored here since PEFT does not look at all: not into modules_to_save."""
    restore(tuner)
    return getattr(tuner, name)(*args, **kwargs)


def restore(model: nn.Module) -> nn.Module:
    """Undo `accelerate`, in place, and free the packed copies; returns the model."""
    for module in model.modules():
        _leave_group(module)
        _restore_layer(module)
        if isinstance(module, BaseTuner):
            for name in UNLOADING:
                module.__dict__.pop(name, None)
    return model


def report(model: nn.Module) -> Report:
    """What computes each LoRA layer of the model and each frozen layer that was swapped, and why; print it for a table.

    It tells of the last call that was not compiled, and what differs from it: calls before, and what stands in the way of the next.
    """
    prefixes = tuple(f"{name}." if name else "" for name, module in model.named_modules() if _is_compiled(module))
    return Report(
        LayerReport(name, *_explain(module, compiled=f"{name}.".startswith(prefixes)))
        for name, module in model.named_modules()
        if isinstance(module, (LoraLayer, FrozenLinear))
    )


def _is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile has wrapped the module, or Module.compile was called on it."""
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None


def _like_rows(shape: Sequence[int], weight: Tensor, dtype: torch.dtype) -> Tensor:
    """What `ops` chooses by in the place of x, as rows [M, K], where weight is; it has no memory of its own."""
    return weight.new_empty(1, 1, dtype=dtype).expand(math.prod(shape[:-1]), weight.shape[1])


def _explain(layer: Any, compiled: bool) -> tuple[str, str]:
    """(implementation, reason) of a layer; compiled: torch.compile may run it, which nobody observes."""
    base = _frozen_base(layer)
    if base is None:
        return "peft", _swap_obstacle(layer) or "not accelerated: call fastlora.accelerate(model)"
    plain = "nn.Linear's own forward" if base is layer else "PEFT's own forward"
    seen, own = layer.__dict__.get(SEEN), layer.__dict__.get(OWN_FORWARD)
    obstacle = _present_obstacle(layer, base, seen)
    if own is not None and own.before is seen:  # the last call
        gone = "" if own.passing or own.obstacle == obstacle else f", now {obstacle or 'no longer'}"
        reason = f"{plain}: {own.obstacle}{gone}"
        if seen is not None:
            before, why = _describe(layer, base, seen)
            reason += f"; before, {before}, {why}"
        return "reference", f"{NOT_OBSERVED}; in its last eager call {reason}" if compiled else reason
    if obstacle is not None and seen is None:
        return "reference", f"{NOT_OBSERVED if compiled else 'not called yet, unless compiled'}; {plain}: {obstacle}"
    implementation, reason = _describe(layer, base, seen or _before_any_call(layer, base, compiled), compiled)
    if own is not None:
        reason += f"; earlier also {plain}: {own.obstacle}"
    if obstacle is not None:
        reason += f"; from now on {plain}: {obstacle}"
    if compiled:
        reason = f"{NOT_OBSERVED}; {'a guess' if seen is None else 'its last eager call'}, {reason}"
    elif seen is None:
        reason = f"not called yet, unless compiled; {reason}"
    return implementation, reason


def _present_obstacle(layer: Any, base: Any, seen: _Seen | None) -> str | None:
    """Why the next call will run the forward of the layer's own class, as far as the layer tells, or None."""
    if base is layer:
        return _weight_obstacle(layer)
    mixed = seen is not None and seen.mixed
    return layer._lasting_obstacle(list(layer.lora_A) if mixed else layer._used_adapters(None))


def _describe(layer: Any, base: Any, seen: _Seen, compiled: bool = False) -> tuple[str, str]:
    """(implementation, reason) of a fused call."""
    weight = _weight_of(base)
    rows = math.prod(seen.shape[:-1])
    like_x = _like_rows(seen.shape, weight, seen.dtype)
    group = layer.__dict__.get(groups.KEY)
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

    try:
        (implementation, reason, _), together = chosen(backward=False)
    except ops.ImplementationError as error:
        return str(ops.forced), f"cannot run: {error}"
    reason = f"{rows} row{'s' * (rows != 1)}: {reason}"
    if implementation == "cpu":
        reason += f"; x Wᵀ by {packed.describe(weight, seen.dtype, rows)}"
    if group is not None and (seen.grouped or not seen.mixed):
        reason += f"; {group.describe(layer, seen.grouped, together, compiled)}"
    try:
        backward, _ = chosen(backward=True)
    except ops.ImplementationError as error:  # forced, and has the forward alone
        return implementation, f"{reason}; no backward: {error}"
    if backward.implementation != implementation:
        reason += f"; backward {backward.implementation}: {backward.reason}"
    return implementation, reason


def _before_any_call(layer: Any, base: Any, compiled: bool) -> _Seen:
    used = [] if base is layer else layer._used_adapters(None)
    dropout = any(_dropout_p(layer.lora_dropout[name]) for name in used)
    grouped = groups.KEY in layer.__dict__ and len(used) == 1 and not compiled
    return _Seen((ROWS_BEFORE_ANY_CALL, layer.in_features), base.weight.dtype, dropout, grouped=grouped)
