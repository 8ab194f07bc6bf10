"""Layers that share x: the query, key and value of attention, the gate and up of a gated MLP. One pass reads x for all of them.

Who shares is told by names, under one parent module. While the parent runs, the first of a group to be called computes the others' results as
well; each is handed out for the very same tensor object, unchanged, and what nobody took is dropped when the parent returns. A group whose
layers turn out not to share x is dissolved for good. Nothing is rewritten: a model of unknown names has no groups.

What waits belongs to the thread that computed it: threads that run one model do not see each other's.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastlora import functional

KEY = "_fastlora_group"
"""Under which a layer's `__dict__` has its group."""

NAMES = (
    ("q_proj", "k_proj", "v_proj"),  # Llama, Qwen, Mistral, Gemma, OPT, BART
    ("gate_proj", "up_proj"),
    ("q", "k", "v"),  # T5
    ("wi_0", "wi_1"),
    ("query", "key", "value"),  # BERT and its kin
    ("w1", "w3"),  # experts of Mixtral
)
CROSS_ATTENTION = (
    "EncDecAttention",
    "encoder_attn",
    "crossattention",
    "cross_attn",
)  # whose query reads something else


AdapterNames = tuple[str, ...] | None
"""Of a mixed batch, one name an example; None: every row has the active adapter."""

ComputeAll = Callable[[Sequence[Any], Tensor, AdapterNames], list[Tensor] | None]
"""The results of some layers for the same x, or None where they cannot run together just now."""


@dataclass
class _Pending:
    """Results that wait for their layers."""

    x: Tensor
    version: int
    mode: tuple[Any, ...]  # what else a result depends on, of which layers may differ
    results: dict[int, Tensor]  # by the layer's place in the group


class _OfThread(threading.local):
    """What a thread has under way in a group."""

    in_parent = False  # elsewhere nobody could tell whether weights were changed between two calls
    pending: _Pending | None = None


_hook_lock = threading.Lock()  # two threads may dissolve one group


@dataclass(eq=False)
class Group:
    """Some children of one module."""

    parent: nn.Module
    names: tuple[str, ...]
    layers: tuple[nn.Module, ...]
    compute_all: ComputeAll
    dissolved: str | None = None  # why
    hooks: tuple[Any, ...] = ()
    _here: _OfThread = field(default_factory=_OfThread, repr=False)

    # A layer's copy or pickle leaves its group out (`FusedLinear`). A parent's has the group by its hooks, and the group finds its layers again.

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_here"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _here=_OfThread())
        self.attach()

    def attach(self) -> None:
        """Let the layers know their group."""
        for layer in self.layers:
            layer.__dict__[KEY] = self

    def result_of(self, layer: nn.Module, x: Tensor, adapter_names: AdapterNames) -> Tensor | None:
        """The layer's result for x, or None: then it computes alone."""
        here = self._here
        if self.dissolved is not None:
            here.pending = None  # what waits may be from before another thread dissolved the group
            return None
        if not here.in_parent or x.is_inference():  # an inference tensor tells no version
            return None
        place = next((i for i, member in enumerate(self.layers) if member is layer), None)
        if place is None:  # a copy that was made past pickle's protocol, as DataParallel's replicas are
            return None
        mode = (
            adapter_names,
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            functional._autocast_dtype(x),
        )
        pending = here.pending
        if pending is None:
            return self._compute(place, x, mode)
        same_x = pending.x is x and pending.version == x._version
        result = pending.results.pop(place, None) if same_x and pending.mode == mode else None
        if result is None:
            how = "with another x" if not same_x else "in another mode" if pending.mode != mode else "twice"
            self.dissolve(f"{self.names[place]} was called {how}")
        elif not pending.results:
            here.pending = None
        return result

    def _compute(self, place: int, x: Tensor, mode: tuple[Any, ...]) -> Tensor | None:
        if any(
            self.parent._modules.get(name) is not layer for name, layer in zip(self.names, self.layers, strict=True)
        ):
            self.dissolve("a layer was wrapped or replaced")
            return None
        ys = self.compute_all(self.layers, x, mode[0])
        if ys is None:
            return None
        others = {i: y for i, y in enumerate(ys) if i != place}
        self._here.pending = _Pending(x, x._version, mode, others)
        return ys[place]

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

    def describe(self, layer: nn.Module, grouped: bool, together: bool, compiled: bool) -> str:
        """For people: with whom the layer shares x and how that went, or why it no longer does.

        grouped: the group computed its last call; together: in one pass over x; compiled: torch.compile runs the layer, and no group.
        """
        others = ", ".join(name for name, other in zip(self.names, self.layers, strict=True) if other is not layer)
        if self.dissolved is not None:
            return f"its group with {others} was dissolved: {self.dissolved}"
        if compiled:
            return f"not grouped with {others} where compiled"
        if not grouped:
            return f"x read alone: its group with {others} could not run"
        return f"x {'read once' if together else 'shared'} with {others}"


def _when_parent_begins(group: Group, parent: nn.Module, args: Any) -> None:
    if not torch.compiler.is_compiling():
        group._here.in_parent = True


def _when_parent_returns(group: Group, parent: nn.Module, args: Any, output: Any) -> None:
    if torch.compiler.is_compiling():
        return
    here = group._here
    here.in_parent = False
    if here.pending is None:
        return
    untaken = ", ".join(group.names[place] for place in here.pending.results)
    here.pending = None
    if output is not None:  # None: the parent raised, as when checkpointing recomputes no more than it needs
        group.dissolve(f"nobody asked for {untaken}")


def find_groups(
    model: nn.Module,
    is_member: Callable[[nn.Module], bool],
    compute_all: ComputeAll,
) -> Iterator[Group]:
    """The groups of a model by the names of its modules, each hooked to its parent: members with one in_features, at least two."""
    for path, parent in model.named_modules():
        is_cross = path.rpartition(".")[2] in CROSS_ATTENTION
        for names in NAMES:
            candidates = names[1:] if is_cross else names
            members = {name: parent._modules.get(name) for name in candidates}
            found = {name: layer for name, layer in members.items() if layer is not None and is_member(layer)}
            if len(found) < 2 or len({layer.in_features for layer in found.values()}) > 1:
                continue
            group = Group(parent, tuple(found), tuple(found.values()), compute_all)
            group.hooks = (
                parent.register_forward_pre_hook(partial(_when_parent_begins, group)),
                parent.register_forward_hook(partial(_when_parent_returns, group), always_call=True),
            )
            yield group
