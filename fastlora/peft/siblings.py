"""Layers that share x: the query, key and value of attention, the gate and up of a gated MLP. One pass reads x for all of them.

Layers are siblings by name, under one parent module. While the parent runs, the first that is called computes the whole family; the others return
the stored result if they get the same, unmodified tensor and would compute it from the same weights. Unused results are dropped when the parent
returns. A family whose layers turn out not to share x is dissolved for good. Nothing is rewritten: a model of unknown names has no families.

What waits belongs to the thread that computed it: threads that run one model do not see each other's.
"""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastlora import checks
from fastlora.checks import is_hooked
from fastlora.frozen import products
from fastlora.operators import lora_linear
from fastlora.peft import known, obstacles
from fastlora.peft.known import AdapterNames
from fastlora.peft.obstacles import Plan

KEY = "_fastlora_family"
"""Under which a layer's `__dict__` has its family."""

NAMES = (
    ("q_proj", "k_proj", "v_proj"),  # Llama, Qwen, Mistral, Gemma, OPT, BART
    ("gate_proj", "up_proj"),
    ("q", "k", "v"),  # T5
    ("wi_0", "wi_1"),
    ("query", "key", "value"),  # BERT and its kin
    ("w1", "w3"),  # experts of Mixtral
)
CROSS_ATTENTION = ("EncDecAttention", "encoder_attn", "crossattention", "cross_attn")
"""Whose query reads something else."""

Compute = Callable[[Sequence[Plan], Tensor, Sequence[str], AdapterNames], Sequence[Tensor]]
"""The results of layers, by their plans, for the same x, with these adapters."""


@dataclass
class _Pending:
    """Results that wait for their layers."""

    x: Tensor
    version: int
    mode: tuple[Any, ...]  # what else a result depends on, beside its plan
    results: dict[int, tuple[Plan, Tensor]]  # by the layer's place in the family


class _OfThread(threading.local):
    """What a thread has under way in a family."""

    in_parent = False  # elsewhere nobody could tell whether weights were changed between two calls
    pending: _Pending | None = None


_hook_lock = threading.Lock()  # two threads may dissolve one family


@dataclass(eq=False)
class Family:
    """Some children of one module."""

    parent: nn.Module
    names: tuple[str, ...]
    layers: tuple[nn.Module, ...]
    compute: Compute
    dissolved: str | None = None  # why
    hooks: tuple[Any, ...] = ()
    _here: _OfThread = field(default_factory=_OfThread, repr=False)

    # A layer's copy or pickle leaves its family out (`FusedLinear`). A parent's has the family by its hooks, and that finds its layers again.

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_here"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _here=_OfThread())
        self.attach()

    def attach(self) -> None:
        """Let the layers know their family."""
        for layer in self.layers:
            layer.__dict__[KEY] = self

    def result_of(self, layer: nn.Module, x: Tensor, plan: Plan, names: AdapterNames) -> Tensor | None:
        """The layer's result for x by its plan, or None: then it computes alone."""
        here = self._here
        if self.dissolved is not None:
            here.pending = None  # what waits may be from before another thread dissolved the family
            return None
        if not here.in_parent or x.is_inference():  # an inference tensor tells no version
            return None
        place = next((i for i, member in enumerate(self.layers) if member is layer), None)
        if place is None:  # a copy that was made past pickle's protocol, as DataParallel's replicas are
            return None
        cast = checks.autocast_dtype(x) if torch._C._is_any_autocast_enabled() else None
        mode = names, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), cast
        pending = here.pending
        if pending is None:
            return self._compute_all(place, x, plan, mode)
        same_x = pending.x is x and pending.version == x._version
        found = pending.results.pop(place, None) if same_x and pending.mode == mode else None
        if found is None:
            how = "with another x" if not same_x else "in another mode" if pending.mode != mode else "twice"
        elif not plan.is_as(found[0]):
            how = "in another mode"
        else:
            if not pending.results:
                here.pending = None
            return found[1]
        self.dissolve(f"{self.names[place]} was called {how}")
        return None

    def _compute_all(self, place: int, x: Tensor, plan: Plan, mode: tuple[Any, ...]) -> Tensor | None:
        """The result of one layer, with its siblings' left to wait; None where they cannot run together just now: as one is hooked, does not run
        fused, or has other adapters; or where they are faster alone.
        """
        if not torch.is_grad_enabled() and are_few(x.shape, x.device):
            return None
        children = self.parent._modules
        if any(children.get(name) is not layer for name, layer in zip(self.names, self.layers, strict=True)):
            self.dissolve("a layer was wrapped or replaced")
            return None
        names, plans, first = mode[0], [], obstacles.used_adapters(self.layers[place], mode[0])
        for i, layer in enumerate(self.layers):
            used, own = (first, plan) if i == place else known.plan_call(layer, x, names)
            if is_hooked(layer) or (used != first if names is not None else len(used) != 1):
                return None
            if isinstance(own, str) or own.lora_a[0].dtype != plan.lora_a[0].dtype:
                return None
            if own.magnitude.keys() != plan.magnitude.keys():  # a DoRA beside a plain LoRA
                return None
            plans.append(own)
        if names is not None and not self._runs_mixed(plans, x, mode[-1] or x.dtype):
            return None  # one after the other is cheaper from here than within one operator
        ys = self.compute(plans, x, first, names)
        others = {i: (own, y) for i, (own, y) in enumerate(zip(plans, ys, strict=True)) if i != place}
        self._here.pending = _Pending(x, x._version, mode, others)
        return ys[place]

    @staticmethod
    def _runs_mixed(plans: Sequence[Plan], x: Tensor, dtype: torch.dtype) -> bool:
        weight = plans[0].linear_weight
        dropout = any(any(own.dropout_p) for own in plans)
        return lora_linear.choose_shared(like_rows(x.shape, weight, dtype), weight, dropout, mixed=True)[1]

    def dissolve(self, reason: str) -> None:
        """Let every layer compute alone from now on."""
        self.dissolved = reason
        self._here.pending = None
        self.remove_hooks()

    def remove_hooks(self) -> None:
        with _hook_lock:
            for hook in self.hooks:
                hook.remove()
            self.hooks = ()

    def describe(self, layer: nn.Module, few: bool, shared: bool, together: bool, compiled: bool) -> str:
        """For people: with whom the layer shares x and how that went, or why it no longer does.

        few: its last call had a few rows on a CPU; shared: the family computed that; together: in one pass over x; compiled: torch.compile runs the
        layer, and no family.
        """
        others = ", ".join(name for name, other in zip(self.names, self.layers, strict=True) if other is not layer)
        if self.dissolved is not None:
            return f"its group with {others} was dissolved: {self.dissolved}"
        if compiled:
            return f"not grouped with {others} where compiled"
        if not shared:
            return f"x read alone: its group with {others} could not run{', or is slower for a few rows' * few}"
        return f"x {'read once' if together else 'shared'} with {others}"


def _when_parent_begins(family: Family, parent: nn.Module, args: Any) -> None:
    if not torch.compiler.is_compiling():
        family._here.in_parent = True


def _when_parent_returns(family: Family, parent: nn.Module, args: Any, output: Any) -> None:
    if torch.compiler.is_compiling():
        return
    here = family._here
    here.in_parent = False
    if here.pending is None:
        return
    untaken = ", ".join(family.names[place] for place in here.pending.results)
    here.pending = None
    if output is not None:  # None: the parent raised, as when checkpointing recomputes no more than it needs
        family.dissolve(f"nobody asked for {untaken}")


def find_families(model: nn.Module, is_member: Callable[[nn.Module], bool], compute: Compute) -> Iterator[Family]:
    """The families of a model by the names of its modules, each hooked to its parent: members with one in_features, at least two."""
    for path, parent in model.named_modules():
        is_cross = path.rpartition(".")[2] in CROSS_ATTENTION
        for names in NAMES:
            candidates = names[1:] if is_cross else names
            members = {name: parent._modules.get(name) for name in candidates}
            found = {name: layer for name, layer in members.items() if layer is not None and is_member(layer)}
            if len(found) < 2 or len({layer.in_features for layer in found.values()}) > 1:
                continue
            family = Family(parent, tuple(found), tuple(found.values()), compute)
            family.hooks = (
                parent.register_forward_pre_hook(partial(_when_parent_begins, family)),
                parent.register_forward_hook(partial(_when_parent_returns, family), always_call=True),
            )
            yield family


def leave(layer: nn.Module) -> None:
    """Take a layer's family apart, if it has one."""
    family = layer.__dict__.pop(KEY, None)
    if family is not None:
        family.remove_hooks()


def are_few(shape: Sequence[int], device: torch.device) -> bool:
    """Whether an x of that shape has a few rows on a CPU. Without gradients its layers are faster alone: each is one call of csrc's, and reading x
    again costs less than the group's lists. With them the group saves a node of the graph for each layer.
    """
    return device.type == "cpu" and math.prod(shape[:-1]) <= products.FEW_ROWS


def like_rows(shape: Sequence[int], weight: Tensor, dtype: torch.dtype) -> Tensor:
    """What `choose` looks at in the place of x, as rows [M, K], where weight is; it has no memory of its own."""
    return weight.new_empty(1, 1, dtype=dtype).expand(math.prod(shape[:-1]), weight.shape[1])
