"""Giving a module another forward by another class, which a copy, a pickle and transformers' own files do not notice."""

import types
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

_plain: dict[type, type] = {}
"""The class that each derived class was derived from."""


def derive(plain: Any, make: Callable[[Any], type], *before: type, **methods: Any) -> type:
    """The class derived from a module's, with these methods. Its name is the same: transformers writes it into a saved model's config.

    make: the module-level function that returns this class for `plain` again, cached: by it a copy or pickle finds the class. before: classes
    whose methods go before the plain one's.
    """

    def reduce(self: Any, protocol: Any) -> Any:
        made, args, *rest = plain.__reduce_ex__(self, protocol)
        return (_new, (make, plain), *rest) if type(self) is derived else (made, args, *rest)

    own = {name: vars(plain)[name] for name in ("__doc__", "__module__", "__qualname__") if name in vars(plain)}
    derived: type = type(plain.__name__, (*before, plain), {**own, **methods, "__reduce_ex__": reduce})
    _plain[derived] = plain
    return derived


def _new(make: Callable[[Any], type], plain: type) -> Any:
    return object.__new__(make(plain))


HELD = ("_old_forward", "forward")
"""Under which a module's `__dict__` has the forward that accelerate's hooks found, while they are there and after they were removed."""


def become(module: nn.Module, kind: Any) -> None:
    """Give a module another class, and the forward of that class to who holds its own."""
    for name in HELD:
        if getattr(module.__dict__.get(name), "__func__", None) is type(module).forward:
            module.__dict__[name] = types.MethodType(kind.forward, module)
    module.__class__ = kind


def undo(module: nn.Module) -> None:
    """Give a module its class back, if it was derived."""
    if type(module) in _plain:
        become(module, _plain[type(module)])
    elif is_derived(module):
        rebase(module, _plain)


def _before_sharding(kind: type) -> type:
    """The class that fully_shard has derived its own from, or the class itself."""
    first, *rest = kind.__bases__
    return rest[0] if first.__name__ == "FSDPModule" else kind


def rebase(module: nn.Module, instead: Mapping[type, type]) -> None:
    """Give a module whose class another has derived since, as fully_shard and parametrize do, one like that on other bases."""
    kind = type(module)
    own = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    # A new one: fully_shard's is that of every module of its kind.
    become(module, type(kind.__name__, tuple(instead.get(base, base) for base in kind.__bases__), own))


def put_in(kind: type) -> str | None:
    """The Python module of a forward that somebody has put into a class of another, as Liger does; or None: its forward is its own."""
    owner = next(one for one in kind.__mro__ if "forward" in vars(one) and one not in _plain)
    home = getattr(vars(owner)["forward"], "__module__", None)
    return None if home in (None, owner.__module__) else home


def plain_of(kind: type) -> type:
    """The class that a class was derived from, or itself."""
    return _plain.get(kind, kind)


def is_derived(module: nn.Module) -> bool:
    """Whether its class was derived, be it that fully_shard has derived another from that since."""
    return _before_sharding(type(module)) in _plain
