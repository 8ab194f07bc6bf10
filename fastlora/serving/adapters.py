"""Which names may be asked for, and what a step of the model needs to run their rows. Names are looked up here, and nowhere on a disk."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from fastlora.layers import BASE


class Adapters:
    """Adapters that were loaded at the start, and stay.

    Args:
        base: the base model's own name.
        loaded: PEFT's name of each adapter, by the name that it is asked for by.
    """

    def __init__(self, base: str, loaded: Mapping[str, str]) -> None:
        self.base = base
        self._inner = {BASE: BASE, **loaded}
        self._named = bool(loaded)

    @property
    def names(self) -> list[str]:
        """All that can be asked for, the base first."""
        return [self.base, *(name for name in self._inner if name != BASE)]

    def find(self, name: str) -> str | None:
        """What a step calls the rows of who asks for that name; None: there is no such adapter."""
        if name == self.base:
            return BASE
        return name if name in self._inner and name != BASE else None

    @contextmanager
    def use(self, names: Sequence[str]) -> Iterator[dict[str, Any]]:
        """For a step: the arguments with which the model runs these rows' adapters, one a row, which stay as they are until it ends."""
        yield {"adapter_names": [self._inner[name] for name in names]} if self._named else {}
