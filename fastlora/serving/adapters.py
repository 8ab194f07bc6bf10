"""Which names may be asked for, and what a step of the model needs to run their rows. What a client asks for is looked up here, never on a disk."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from fastlora.bank import AdapterBank
from fastlora.layers import BASE
from fastlora.peft import mixed, prompts
from fastlora.peft.layers import Fused
from fastlora.sharing import Keys

SPARE = 8  # adapters that a step may name beyond twice those of its rows


class _Rows(mixed.RowNames):
    """Each row's adapter, beside others that have no row just now: a layer's plan is of all of them, and holds when rows come and go."""

    def __new__(cls, names: Sequence[str], rows: Sequence[str], since: object = None) -> "_Rows":
        self = tuple.__new__(cls, names)
        self.examples, self.lengths, self.since, self._groups = rows, [1] * len(rows), since, {}
        return self


class NoRoom(Exception):
    """An adapter does not fit beside those that are kept: when one of them is released, it may."""


class Adapters:
    """Adapters by the names that they are asked for by: all in the model from the start, or, with a bank, in it while they are kept and as long as
    there is room. `find` may be called from any thread, the rest from the one that runs the model.

    Args:
        base: the base model's own name.
        inner: the model's name of each adapter, or the bank's, by the name that it is asked for by.
        model: the PeftModel, accelerated; None where there are no adapters. Between two changes of the bank's nobody changes it.
        bank: where those are registered that the model need not have.
        tokens: how many tokens' places a soft prompt takes before a row, by the same names.
    """

    def __init__(
        self,
        base: str,
        inner: Mapping[str, str],
        model: Any = None,
        bank: AdapterBank | None = None,
        tokens: Mapping[str, int] | None = None,
    ) -> None:
        self.base, self.model, self.bank = base, model, bank
        self._inner = {BASE: BASE, **inner}
        self._tokens = tokens or {}
        self._since: tuple[int, object] = 0, object()
        self._kept: Counter[str] = Counter()
        self._coming: dict[str, Future[None]] = {}  # of those kept
        self._alone: set[str] = set()  # of those, beside whose coming no other was kept
        self._named: tuple[str, ...] = ()  # by the last step
        self._prompted = model is not None and prompts.is_prompted(model)
        self._fused = model is not None and not self._prompted and self._are_all(Fused)

    @property
    def are_by_row(self) -> bool:
        """Whether rows of IA³ and DoRA can share a batch, of which PEFT's own forward knows nothing."""
        return self._are_all(mixed.ByRow)

    @property
    def names(self) -> list[str]:
        """All that can be asked for, the base first."""
        return [self.base, *(name for name in self._inner if name != BASE)]

    def find(self, name: str) -> str | None:
        """What a step calls the rows of who asks for that name; None: there is no such adapter."""
        if name == self.base:
            return BASE
        return name if name in self._inner and name != BASE else None

    def tokens_before(self, name: str) -> int:
        """How many places a soft prompt takes before a row. name: as `find` gives it. May be called from any thread."""
        return self._tokens.get(name, 0)

    def prompt_of(self, name: str) -> Keys:
        """What the soft prompt of an adapter that is there leaves in each layer: its keys and values, each [1, heads, P, D]."""
        inner = self._inner[name]
        with self._held([inner]):
            found = prompts.find_prompts(self.model, 1, [inner], None)
            return prompts.kept_keys(self.model, self.model.__dict__[prompts.KEY], found)[0]

    def keep(self, name: str) -> None:
        """Have an adapter in the model from when it is there until it is released as often as it was kept. name: as `find` gives it."""
        if self.bank is not None and name != BASE:
            if not self._kept[name]:
                alone = not self._coming
                self._alone = {one for one in self._alone if self._coming[one].done()}
                self._coming[name] = self.bank.pin(self._inner[name])
                if alone:
                    self._alone.add(name)
            self._kept[name] += 1

    def is_there(self, name: str) -> bool:
        """Whether an adapter that is kept is in the model yet, and not about to be swapped once those have ended who have begun with it.

        Raises:
            NoRoom: it did not fit beside others that were kept: once released, it may be kept again.
            ValueError, AdapterError, OSError: it does not fit, or its files cannot be used.
        """
        coming = self._coming.get(name)
        if coming is None:
            return True
        if not coming.done() or (self.bank is not None and self.bank.swap_waits(self._inner[name])):
            return False
        error = coming.exception()
        # Not an AdapterError: the bank's, of its budget. Who was in the way then, may have been released since.
        if type(error) is ValueError and name not in self._alone:
            raise NoRoom(str(error)) from error
        if error is not None:
            raise error
        return True

    @property
    def keeps_any(self) -> bool:
        return bool(self._coming)

    def release(self, name: str) -> None:
        if self.bank is not None and name != BASE:
            self._kept[name] -= 1
            if not self._kept[name]:
                del self._coming[name]
                self._alone.discard(name)
                self.bank.unpin(self._inner[name])

    def hold(self, name: str) -> None:
        """No swap changes an adapter that a row has begun with, until `let_go`."""
        if self.bank is not None and name != BASE:
            self.bank.hold(self._inner[name])

    def let_go(self, name: str) -> None:
        if self.bank is not None and name != BASE:
            self.bank.let_go(self._inner[name])

    def _are_all(self, layer_class: type) -> bool:
        """Whether every adapted layer is one of ours: else PEFT hands out the names, a hook a layer, to modules that were saved whole, too."""
        try:
            mixed.training(self.model.base_model, layer_class, _Rows((), ()))
        except ValueError:
            return False
        return True

    def _held(self, rows: Sequence[str]) -> AbstractContextManager[Any]:
        return nullcontext() if self.bank is None else self.bank.use(rows)

    @contextmanager
    def use(self, names: Sequence[str]) -> Iterator[dict[str, Any]]:
        """For a step: the arguments with which the model runs these rows' adapters, one a row, which stay as they are until it ends."""
        rows = [self._inner[name] for name in names]
        with self._held(rows):
            if self.model is None or self._prompted:  # what a prompt does has been done, as its row began
                yield {}
            elif self._fused and any(row != BASE for row in rows):
                with mixed.training(self.model.base_model, Fused, _Rows(self._among(rows), rows, self._unchanged())):
                    yield {}
            else:
                yield {"adapter_names": rows}

    def _unchanged(self) -> object:
        """The same object as long as the bank has changed nothing."""
        changes = 0 if self.bank is None else self.bank.changes
        if changes != self._since[0]:
            self._since = changes, object()
        return self._since[1]

    def _among(self, rows: Sequence[str]) -> tuple[str, ...]:
        """These rows' adapters, or the last step's where it had all of them and not many more: then no layer needs another plan."""
        wanted, before = set(rows) - {BASE}, self.model.peft_config.keys() & self._named
        if not wanted <= before or len(before) > 2 * len(wanted) + SPARE or len(before) < len(self._named):
            kept = wanted | before if len(before) <= len(wanted) + SPARE else wanted
            self._named = tuple(sorted(kept))
        return self._named
