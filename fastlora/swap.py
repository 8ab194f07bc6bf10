"""Giving a module another forward by another class, which a copy, a pickle and transformers' own files do not notice."""

from collections.abc import Callable
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


def undo(module: nn.Module) -> None:
    """Give a module its class back, if it was derived."""
    if type(module) in _plain:
        module.__class__ = _plain[type(module)]


def plain_of(kind: type) -> type:
    """The class that a class was derived from, or itself."""
    return _plain.get(kind, kind)


def is_derived(module: nn.Module) -> bool:
    return type(module) in _plain
