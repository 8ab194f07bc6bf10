"""The names of a mixed batch, `model(..., adapter_names=[...])`, handed to all layers at once.

PEFT hooks every layer anew in each forward, which costs a small model's token as much as a layer or two, and a hooked layer has no siblings. So
`accelerate` puts `enable` before the context in which a tuner does so. Where every adapted module is one of our layers, the names wait in a context
variable, by layer: each asks for its own. They are seen by the thread, or task, that gave them, as long as its context lasts, and by no other model.
"""

import functools
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

METHOD = "_enable_peft_forward_hooks"
"""Of a tuner: the context of a forward, with the arguments of the model's."""

BASE = "__base__"
"""PEFT's name for an example without an adapter."""

under_way = 0
"""How many contexts are open, in all threads: a layer asks for no names where there are none, and a compiler knows by it when to trace anew."""

_names: ContextVar[dict[nn.Module, tuple[str, ...]] | None] = ContextVar("fastlora_adapter_names", default=None)
_lock = threading.Lock()


def names_of(layer: nn.Module) -> tuple[str, ...] | None:
    """The names that are handed to a layer just now."""
    given = _names.get()
    return None if given is None else given.get(layer)


def attach(tuner: nn.Module, layer_class: type) -> None:
    """Put `enable` before a tuner's own context, if it has PEFT's. layer_class: of the layers that ask for their names."""
    if getattr(type(tuner), METHOD, None) is LoraModel._enable_peft_forward_hooks:
        tuner.__dict__[METHOD] = functools.partial(enable, tuner, layer_class)


def detach(tuner: nn.Module) -> None:
    tuner.__dict__.pop(METHOD, None)


def enable(tuner: Any, layer_class: type, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
    """The context of a forward: ours where it has names to hand out and nothing else to do; else PEFT's own, which knows what to raise."""
    names = kwargs.get("adapter_names")
    if names is not None and not torch.compiler.is_compiling() and kwargs.get("alora_offsets") is None:
        beams = kwargs.get("num_beams")  # of which an encoder has one
        layers = [] if tuner.training or (isinstance(beams, int) and beams > 1) else _layers(tuner.model, layer_class)
        if isinstance(names, (list, tuple)) and _are_known(names, layers):
            return _handing_out(dict.fromkeys(layers, tuple(names)))
    return type(tuner)._enable_peft_forward_hooks(tuner, *args, **kwargs)


def _layers(model: nn.Module, layer_class: type) -> list[Any]:
    """The model's layers of that class; none where it has other modules whose adapter goes by name, or may run on other threads."""
    found, left = [], [model]
    while left:
        module = left.pop()
        if isinstance(module, layer_class):
            found.append(module)
        elif isinstance(module, (LoraLayer, AuxiliaryTrainingWrapper, nn.DataParallel)):
            return []
        else:
            left += [child for child in module._modules.values() if child is not None]
    return found


def _are_known(names: Sequence[str], layers: Sequence[Any]) -> bool:
    """Whether each name is an adapter's of some layer; a layer may lack it."""
    wanted = set(names) - {BASE}
    for layer in layers:
        wanted -= layer._modules["lora_A"]._modules.keys()
        if not wanted:
            return True
    return False


@contextmanager
def _handing_out(given: dict[nn.Module, tuple[str, ...]]) -> Iterator[None]:
    global under_way
    before = _names.set({**(_names.get() or {}), **given})
    with _lock:
        under_way += 1
    try:
        yield
    finally:
        with _lock:
            under_way -= 1
        _names.reset(before)
