"""Layers that share x: the query, key and value of attention, the gate and up of a gated MLP. One pass reads x for all of them.

Who shares is told by names, under one parent module. The first of a group to be called computes the others' results as well; each is handed
out for the very same tensor object, unchanged, and what nobody took is dropped when the parent returns. A group whose layers turn out not
to share x is dissolved for good. Nothing is rewritten: a model of unknown names has no groups.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

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
    adapter_names: AdapterNames
    grad_enabled: bool
    results: dict[int, Tensor]  # by the layer's place in the group


@dataclass(eq=False)
class Group:
    """Some children of one module."""

    parent: nn.Module
    names: tuple[str, ...]
    layers: tuple[nn.Module, ...]
    compute_all: ComputeAll
    dissolved: str | None = None  # why
    hook: Any = None
    _pending: _Pending | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pending": None}  # results belong to one forward

    def result_of(self, layer: nn.Module, x: Tensor, adapter_names: AdapterNames) -> Tensor | None:
        """The layer's result for x, or None: then it computes alone."""
        if self.dissolved is not None or x.is_inference():  # an inference tensor tells no version
            return None
        place = self.layers.index(layer)
        pending = self._pending
        if pending is None:
            return self._compute(place, x, adapter_names)
        fits = pending.x is x and pending.version == x._version and pending.adapter_names == adapter_names
        fits = fits and pending.grad_enabled == torch.is_grad_enabled()
        result = pending.results.pop(place, None) if fits else None
        if result is None:
            self.dissolve(f"{self.names[place]} was called with another x")
        elif not pending.results:
            self._pending = None
        return result

    def _compute(self, place: int, x: Tensor, adapter_names: AdapterNames) -> Tensor | None:
        if any(
            self.parent._modules.get(name) is not layer for name, layer in zip(self.names, self.layers, strict=True)
        ):
            self.dissolve("a layer was wrapped or replaced")
            return None
        ys = self.compute_all(self.layers, x, adapter_names)
        if ys is None:
            return None
        others = {i: y for i, y in enumerate(ys) if i != place}
        self._pending = _Pending(x, x._version, adapter_names, torch.is_grad_enabled(), others)
        return ys[place]

    def dissolve(self, reason: str) -> None:
        """Let every layer compute alone from now on."""
        self.dissolved = reason
        self._pending = None
        self.remove_hook()

    def remove_hook(self) -> None:
        if self.hook is not None:
            self.hook.remove()
            self.hook = None

    def describe(self, layer: nn.Module, grouped: bool, together: bool) -> str:
        """For people: with whom the layer shares x and how that went, or why it no longer does.

        grouped: the group computed its last call; together: in one pass over x.
        """
        others = ", ".join(name for name, other in zip(self.names, self.layers, strict=True) if other is not layer)
        if self.dissolved is not None:
            return f"its group with {others} was dissolved: {self.dissolved}"
        if not grouped:
            return f"x read alone: its group with {others} could not run"
        return f"x {'read once' if together else 'shared'} with {others}"


def _when_parent_returns(group: Group, parent: nn.Module, args: Any, output: Any) -> None:
    if group._pending is None:
        return
    untaken = ", ".join(group.names[place] for place in group._pending.results)
    group._pending = None
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
            group.hook = parent.register_forward_hook(partial(_when_parent_returns, group), always_call=True)
            yield group
