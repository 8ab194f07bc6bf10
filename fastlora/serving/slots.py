"""Keys and values of the rows under way: a slot each, with room for a whole row, in which its token t lies at place t.

A row that joins or leaves moves no other's, and no step copies what earlier ones have left (transformers' DynamicCache concatenates anew in each).
A step reads neighbouring slots up to the longest row's end; a mask hides what lies behind the end of the others.
"""

import math
import mmap
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from fastlora.sharing import Keys


@dataclass(frozen=True)
class Aim:
    """Where a step's tokens go, and what its queries read."""

    first: int  # of the slots that are read
    count: int
    reach: int  # places of each that are read
    slots: Tensor  # [new tokens]
    places: Tensor  # [new tokens]
    is_token: Tensor | None  # [count, T]: which of the step's tokens are new ones and no padding; None: all


class Slots(Cache):
    """A cache of transformers' kind, whose layers get their memory in the first step. `aim` it before every step."""

    def __init__(self, count: int, length: int) -> None:
        super().__init__(layer_class_to_replicate=self._layer)  # type: ignore[arg-type]  # called without arguments
        self.count, self.length = count, length
        self.aim: Aim

    def _layer(self) -> "_Layer":
        return _Layer(self)

    def _parts(self) -> list[Any]:
        """The keys and the values of every layer that has run, each [slots, heads, length, D]."""
        layers: list[Any] = self.layers
        return [part for layer in layers if layer.is_initialized for part in (layer.keys, layer.values)]

    @torch.inference_mode()
    def move(self, source: int, target: int, places: int) -> None:
        """Copy a row's first places to another slot."""
        for part in self._parts():
            part[target, :, :places] = part[source, :, :places]

    @torch.inference_mode()
    def fill(self, slot: int, keys: Keys) -> None:
        """Write the first places of a row: of each layer a key and a value [1, heads, places, D]."""
        sides = [side for layer in keys for side in layer]
        for part, side in zip(self._parts(), sides, strict=True):
            part[slot, :, : side.shape[2]] = side[0]

    @torch.inference_mode()
    def clear(self, slot: int) -> None:
        """Forget what a row has left. Finite values need not be forgotten, the mask hides them; a NaN it does not hide."""
        for part in self._parts():
            part[slot].zero_()


class _Layer(CacheLayerMixin):
    def __init__(self, slots: Slots) -> None:
        super().__init__()
        self.slots = slots

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        count, length = self.slots.count, self.slots.length
        self.keys, self.values = (
            _zeros((count, new.shape[1], length, new.shape[3]), new) for new in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Put a step's keys and values, [count, heads, T, D], where they belong; returns all that its queries read, [count, heads, reach, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        aim, found = self.slots.aim, []
        parts: tuple[Any, Any] = (self.keys, self.values)
        for part, new in zip(parts, (key_states, value_states), strict=True):
            tokens = new.transpose(1, 2)
            part[aim.slots, :, aim.places] = tokens.flatten(0, 1) if aim.is_token is None else tokens[aim.is_token]
            found.append(part[aim.first : aim.first + aim.count, :, : aim.reach])
        return found[0], found[1]

    def get_seq_length(self) -> int:
        return self.slots.aim.reach

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.slots.aim.reach, 0

    def get_max_length(self) -> int:
        return self.slots.length


def _zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Zeros of a tensor's dtype, on its device. On a CPU a page takes memory once it is written to, which torch.zeros does at once."""
    if like.device.type != "cpu":
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
    return torch.frombuffer(mmap.mmap(-1, math.prod(shape) * like.element_size()), dtype=like.dtype).view(shape)
