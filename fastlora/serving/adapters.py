"""Which names may be asked for, and what a step of the model needs to run their rows. Names are looked up here, and nowhere on a disk."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from fastlora.layers import BASE
from fastlora.peft import mixed
from fastlora.peft.layers import Fused

SPARE = 8  # adapters that a step may name beyond twice those of its rows


class _Rows(mixed.RowNames):
    """Each row's adapter, beside others that have no row just now: a layer's plan is of all of them, and holds when rows come and go."""

    def __new__(cls, names: Sequence[str], rows: Sequence[str]) -> "_Rows":
        self = tuple.__new__(cls, names)
        self.examples, self.lengths, self._groups = rows, [1] * len(rows), {}
        return self


class Adapters:
    """Adapters that were loaded at the start, and stay.

    Args:
        base: the base model's own name.
        loaded: PEFT's name of each adapter, by the name that it is asked for by.
        model: the PeftModel that has them, accelerated; None where there are none.
    """

    def __init__(self, base: str, loaded: Mapping[str, str], model: Any = None) -> None:
        self.base, self.model = base, model
        self._inner = {BASE: BASE, **loaded}
        self._named: tuple[str, ...] = ()  # by the last step
        self._fused = bool(loaded) and self._are_fused()

    @property
    def names(self) -> list[str]:
        """All that can be asked for, the base first."""
        return [self.base, *(name for name in self._inner if name != BASE)]

    def find(self, name: str) -> str | None:
        """What a step calls the rows of who asks for that name; None: there is no such adapter."""
        if name == self.base:
            return BASE
        return name if name in self._inner and name != BASE else None

    def _are_fused(self) -> bool:
        """Whether every adapted layer is one of ours: else PEFT hands out the names, a hook a layer, to modules that were saved whole, too."""
        loaded = [name for name in self._inner.values() if name != BASE]
        try:
            mixed.training(self.model.base_model, Fused, _Rows(loaded, loaded))
        except ValueError:
            return False
        return True

    @contextmanager
    def use(self, names: Sequence[str]) -> Iterator[dict[str, Any]]:
        """For a step: the arguments with which the model runs these rows' adapters, one a row, which stay as they are until it ends."""
        rows = [self._inner[name] for name in names]
        if self._fused and any(row != BASE for row in rows):
            with mixed.training(self.model.base_model, Fused, _Rows(self._among(rows), rows)):
                yield {}
        elif self.model is not None:
            yield {"adapter_names": rows}
        else:
            yield {}

    def _among(self, rows: Sequence[str]) -> tuple[str, ...]:
        """These rows' adapters, or the last step's where it had all of them and not many more: then no layer needs another plan."""
        wanted = set(rows) - {BASE}
        if not wanted <= set(self._named) or len(self._named) > 2 * len(wanted) + SPARE:
            kept = wanted | set(self._named) if len(self._named) <= len(wanted) + SPARE else wanted
            self._named = tuple(sorted(kept))
        return self._named
