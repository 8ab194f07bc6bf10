"""Many adapters on one base: thousands registered from their folders, as many of them in the model as a budget of bytes holds.

A thread reads and checks files and builds an adapter's layers beside the model; what changes the model is a few insertions into its layers' tables,
between two forwards. So nobody waits for a file but who asked for that adapter, and an adapter is there in all layers or in none.
"""

import copy
import itertools
import json
import logging
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.ia3 import IA3Layer
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fastlora import adapters, peft, receipts
from fastlora.adapters import Adapter, AdapterError, Expected
from fastlora.checks import is_hooked, wrong
from fastlora.layers import BASE
from fastlora.peft import known, prompts
from fastlora.peft.layers import Fused
from fastlora.typed import listed, shown

logger = logging.getLogger("fastlora")

TEMPLATE = "default"
"""The name of the adapter on the model without memory that an adapter's layers are copied from."""

LAYERS: dict[str, type[Any]] = {"LORA": LoraLayer, "IA3": IA3Layer}
"""The methods whose adapters stand in layers of PEFT's, by its names."""

METHODS = (*LAYERS, *(one.value for one in (*prompts.EMBEDDED, *prompts.KEYED)))
"""Those that a bank has; the others' are soft prompts, which stand in the PeftModel itself."""

TOLD = f"{', '.join(METHODS[:-1])} or {METHODS[-1]}"

REFUSED = (
    *("modules_to_save", "trainable_token_indices", "target_parameters", "alora_invocation_tokens"),
    *("arrow_config", "monteclora_config", "velora_config"),
)
"""What a config may not have in a bank: what PEFT keeps outside of its layers, or what looks at the model as it is added."""


@dataclass(frozen=True)
class BankStats:
    registered: int
    resident: int
    pinned: int
    bytes: int  # of the resident adapters
    budget_bytes: int | None
    hits: int  # names in `use` that were resident
    misses: int  # and that had to be read
    loads: int  # insertions into the model, swaps among them
    swaps: int
    evictions: int
    failures: int  # files that could not be used


Tables = dict[str, dict[str, Any]]
"""An adapter's part of a model: by layer, by the layer's table of adapters, what belongs there. Of a prompt, the PeftModel is the layer, ""."""


class Layers(NamedTuple):
    """An adapter's part of a model, with its values."""

    tables: Tables
    bytes: int


class Template(NamedTuple):
    """An adapter's layers on a model without memory, for all adapters of one config."""

    expected: Expected
    keys: list[
        tuple[str, slice]
    ]  # PEFT's, of the parameters in the order of `_slots`, and which rows of what a file has under it
    tables: Tables
    spare: list[
        Tables
    ]  # of adapters that have gone, without their values: making them anew costs more than reading a file


SPARE = 8  # of each template, at most


@dataclass(eq=False)
class Job:
    """A folder that is to be read, and put into the model."""

    folder: Path
    config: Any
    template: Template
    is_swap: bool
    future: "Future[None]" = field(default_factory=Future)
    layers: Layers | None = None
    source: receipts.Source | None = None


@dataclass(eq=False)
class Entry:
    """A registered adapter."""

    folder: Path
    config: Any
    template: Template
    pinned: bool = False
    holds: int = 0  # who wants its weights as they are
    resident: Layers | None = None
    jobs: list[Job] = field(default_factory=list)
    used: int = 0  # when last


class AdapterBank:
    """Adapters by name for one model: registered from folders, read when wanted, evicted when the budget is full, least recently used first.

        bank = AdapterBank(model, budget_bytes=2**30)
        bank.register("anna", "adapters/anna")
        bank.load("anna")                                  # in the background
        with bank.use(["anna", "__base__"]) as adapter_names:
            model.generate(**batch, adapter_names=adapter_names)

    While a bank is used every forward of the model runs inside `use`: between them, and never within one, adapters come and go. All methods may be
    called from any thread; a context of `use` is left by the thread that has entered it. Adapters of one config share what is known of their layers.
    """

    def __init__(
        self,
        model: Any,
        *,
        budget_bytes: int | None = None,
        autocast_adapter_dtype: bool = True,
        allow_noop: bool = False,
    ) -> None:
        """
        Args:
            model: a PeftModel with LoRA, IA³ or soft prompts, accelerated or not. The adapters that it has are its own: they stay, and are not
                counted; those of the bank are of their method, as PEFT has but one in a model.
            budget_bytes: what the resident adapters may take together; None: as much as there is.
            autocast_adapter_dtype: 16-bit values become float32, as PEFT loads them; False: they have the dtype of the layers' weights.
            allow_noop: take also adapters that change nothing.

        Raises:
            TypeError: the model is no PeftModel with adapters of one of METHODS.
            ValueError: budget_bytes is no number of bytes.
        """
        configs: dict[str, Any] = dict(model.peft_config) if isinstance(model, PeftModel) else {}
        found = {one.peft_type.value for one in configs.values()}
        if len(found) != 1 or not found <= {*METHODS}:
            got = f"{type(model).__name__}{' with ' * bool(found)}{' and '.join(sorted(found))}"
            raise TypeError(f"model: got a {got}, expected a PeftModel with {TOLD}")
        if budget_bytes is not None and (not isinstance(budget_bytes, int) or budget_bytes < 0):
            raise wrong("budget_bytes", budget_bytes, "a number of bytes, or None")
        self.model: Any = model
        self.budget_bytes = budget_bytes
        self._autocast = autocast_adapter_dtype
        self._allow_noop = allow_noop
        [self.method] = found
        bare: Any = peft.restore(adapters.without_memory(model))
        self._skeleton: nn.Module = bare.unload() if self.method in LAYERS else bare.get_base_model()
        weights = model.get_base_model().named_parameters(remove_duplicate=False)
        self._own = {adapters.WRAPPERS.sub("", name): weight for name, weight in weights}
        self._layers: dict[str, Any] = {}
        self._find_layers()
        self._templates: dict[str, Template] = {}
        self._entries: dict[str, Entry] = {}
        self._ready: list[tuple[str, Job]] = []
        self._wanted: frozenset[str] = frozenset()  # what the one `use` that waits for files must not lose again
        self._running = 0  # contexts of `use`
        self._exclusive = 0  # who waits for them to end
        self._ticks = itertools.count(1)
        self._counts = dict.fromkeys(("hits", "misses", "loads", "swaps", "evictions", "failures"), 0)
        self._removals = 0
        self._changed = threading.Condition()
        self._line = threading.Lock()
        self._mine = threading.local()
        self._reader = ThreadPoolExecutor(1, "fastlora-adapters")

    # ---- what is there

    @property
    def registered(self) -> tuple[str, ...]:
        """The adapters' names, in the order they were registered."""
        with self._changed:
            return tuple(self._entries)

    @property
    def resident(self) -> tuple[str, ...]:
        """The names of those in the model, least recently used first."""
        with self._changed:
            return tuple(self._by_age())

    @property
    def stats(self) -> BankStats:
        with self._changed:
            return BankStats(
                registered=len(self._entries),
                resident=len(self._by_age()),
                pinned=sum(entry.pinned for entry in self._entries.values()),
                bytes=self._bytes(),
                budget_bytes=self.budget_bytes,
                **self._counts,
            )

    @property
    def changes(self) -> int:
        """How often an adapter came into the model, or left it: within a `use` it stays the same, and so do the model's layers."""
        return self._counts["loads"] + self._removals

    # ---- what may be used

    def register(self, name: str, folder: str | Path) -> None:
        """Make an adapter known. Its config is checked, and the layers that no adapter has had yet are made; its tensors are not read.

        The first adapter with a config takes as long as PEFT takes for one; after new layers, `accelerate` the model again.

        Raises:
            ValueError: the name is taken, or cannot be one.
            FileNotFoundError: there is no adapter in the folder.
            AdapterError: the config is damaged, does not fit the model, or is of another method or kind than a bank has.
        """
        adapters.require_name(name)
        with self._changed:
            if name in self._entries or name in self.model.peft_config:
                raise ValueError(f"name={name!r}: is registered already, expected another; swap() exchanges its files")
        config, template = self._prepare(Path(folder))
        with self._changed:
            if name in self._entries:
                raise ValueError(f"name={name!r}: is registered already, expected another; swap() exchanges its files")
            self._entries[name] = Entry(Path(folder), config, template)

    def unregister(self, name: str) -> None:
        """Forget an adapter; a resident one leaves the model once no forward runs.

        Raises:
            ValueError: there is none of that name.
        """
        with self._alone():
            entry = self._entry(name)
            if entry.resident is not None:
                self._evict(name)
            del self._entries[name]
            for job in entry.jobs:
                job.future.cancel()

    def load(self, name: str) -> "Future[None]":
        """Have an adapter read in the background. The future ends when it is in the model, or with the error of its files.

        Raises:
            ValueError: there is none of that name; those there are, are listed.
        """
        with self._changed:
            entry = self._entry(name)
            entry.used = next(self._ticks)
            under_way = [job for job in entry.jobs if not job.is_swap]
            if under_way:
                return under_way[0].future
            job = Job(entry.folder, entry.config, entry.template, is_swap=False)
            if entry.resident is not None:
                job.future.set_result(None)
            else:
                self._begin(name, job)
            return job.future

    def swap(self, name: str, folder: str | Path) -> "Future[None]":
        """Have another folder's weights take the place of an adapter's, in all layers between two forwards, and not before all have ended who
        `hold` it. Until then, and if the new files cannot be used, the old ones serve.

        Raises:
            ValueError, FileNotFoundError, AdapterError: as `register`'s; there is none of that name.
        """
        with self._changed:
            self._entry(name)
        config, template = self._prepare(Path(folder))
        with self._changed:
            self._entry(name)
            job = Job(Path(folder), config, template, is_swap=True)
            self._begin(name, job)
            return job.future

    def pin(self, name: str) -> "Future[None]":
        """Load an adapter, and never evict it. Raises and returns as `load`."""
        with self._changed:
            future = self.load(name)
            self._entries[name].pinned = True
        return future

    def unpin(self, name: str) -> None:
        with self._changed:
            self._entry(name).pinned = False

    def hold(self, name: str) -> None:
        """Have no swap change an adapter until it is let go as often as it was held: an answer of many forwards is of the same weights throughout.

        Raises:
            ValueError: there is none of that name.
        """
        with self._changed:
            self._entry(name).holds += 1

    def let_go(self, name: str) -> None:
        """Undo a `hold`; nothing where the adapter was unregistered since."""
        with self._changed:
            if name in self._entries:
                self._entries[name].holds -= 1
                self._insert_when_idle()
                self._changed.notify_all()

    def swap_waits(self, name: str) -> bool:
        """Whether a swap is ready, and waits for those who hold the adapter: who begins now would be one more."""
        with self._changed:
            return any(one == name and self._is_held(one, job) for one, job in self._ready)

    @contextmanager
    def use(self, adapter_names: Iterable[str]) -> Iterator[list[str]]:
        """Hold the adapters of a batch in the model while its forward runs; waits for those that are not there yet.

        Args:
            adapter_names: one name a row, "__base__" for none; the model's own adapters may be among them. An empty list: the base alone.

        Yields:
            The names, as the model takes them.

        Raises:
            ValueError: there is no adapter of a name; those there are, are listed. Or the budget does not hold them all.
            AdapterError, OSError: a file cannot be used.
            CancelledError: an adapter is unregistered meanwhile, or the bank closed.
            RuntimeError: inside another `use` of this thread, an adapter is not resident.
        """
        names = list(adapter_names)
        with self._changed:
            own = {name for name in self.model.peft_config if name not in self._entries}
            wanted = frozenset(names) - {BASE} - own
            entries = [self._entry(name) for name in sorted(wanted)]
            missing = sum(entry.resident is None for entry in entries)
            self._counts["misses"] += missing
            self._counts["hits"] += len(entries) - missing
        self._enter(wanted)
        try:
            yield names
        finally:
            self._leave(wanted)

    def close(self) -> None:
        """End the reading thread; what is in the model stays, and what is under way is cancelled."""
        self._reader.shutdown(cancel_futures=True)
        with self._changed:
            for entry in self._entries.values():
                for job in entry.jobs:
                    job.future.cancel()
                entry.jobs.clear()
            self._ready.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    # ---- forwards, and what happens between them

    def _enter(self, wanted: frozenset[str]) -> None:
        depth = getattr(self._mine, "depth", 0)
        with self._changed:
            self._touch(wanted)
            # What is ready goes first, or a model that is never idle would never get it.
            while not depth and self._running and (self._exclusive or self._insertable()):
                self._changed.wait()
            self._insert_when_idle()
            if self._hold(wanted):
                return
        if depth:
            raise RuntimeError(
                f"adapter_names: {listed(sorted(wanted))} are not all resident, as inside another `use` they must be"
            )
        with self._line:  # one at a time, so that two do not take turns in evicting what the other waits for
            try:
                with self._changed:
                    self._wanted = wanted
                while True:
                    for future in [self.load(name) for name in sorted(wanted)]:
                        future.result()
                    with self._changed:
                        if self._hold(wanted):
                            return
            finally:
                with self._changed:
                    self._wanted = frozenset()
                    self._insert_when_idle()
                    self._changed.notify_all()

    def _hold(self, wanted: frozenset[str]) -> bool:
        """Hold the adapters if all are resident; the lock is held."""
        if any(self._entry(name).resident is None for name in wanted):
            return False
        self._running += 1
        self._mine.depth = getattr(self._mine, "depth", 0) + 1
        return True

    def _leave(self, wanted: frozenset[str]) -> None:
        with self._changed:
            self._touch(wanted)
            self._running -= 1
            self._mine.depth = getattr(self._mine, "depth", 1) - 1
            self._insert_when_idle()
            self._changed.notify_all()

    def _touch(self, names: Iterable[str]) -> None:
        for name in names:
            self._entry(name).used = next(self._ticks)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """While no forward runs, and none begins."""
        if getattr(self._mine, "depth", 0):
            raise RuntimeError("expected to be called outside of `use`, which holds the model as it is")
        with self._changed:
            self._exclusive += 1
            try:
                while self._running:
                    self._changed.wait()
                yield
            finally:
                self._exclusive -= 1
                self._changed.notify_all()

    def _insertable(self) -> bool:
        """Whether what is ready could go into the model if no forward ran."""
        return any(self._has_room(name, job) and not self._is_held(name, job) for name, job in self._ready)

    def _is_held(self, name: str, job: Job) -> bool:
        return job.is_swap and name in self._entries and self._entries[name].holds > 0

    def _has_room(self, name: str, job: Job) -> bool:
        assert job.layers is not None
        kept = sum(
            entry.resident.bytes
            for other, entry in self._entries.items()
            if other != name and entry.resident is not None and not self._is_evictable(other)
        )
        return self.budget_bytes is None or kept + job.layers.bytes <= self.budget_bytes

    def _is_evictable(self, name: str) -> bool:
        """Whether an adapter may go once no forward runs: those that run now have it till then, and none that begins later may keep it from going."""
        free = not self._entries[name].pinned and name not in self._wanted
        return free and name not in self.model.active_adapters

    def _insert_when_idle(self) -> None:
        """Put what is ready into the model, if no forward runs; the lock is held."""
        if self._running:
            return
        left = []
        for name, job in self._ready:
            entry = self._entries.get(name)
            if entry is None or job not in entry.jobs:
                continue  # unregistered meanwhile
            if entry.resident is not None and not job.is_swap:
                self._end(name, job)  # a swap has come before it
            elif self._is_held(name, job):
                left.append((name, job))
            elif self._has_room(name, job):
                self._insert(name, job)
                self._end(name, job)
            elif self._wanted and name not in self._wanted:
                left.append((name, job))  # until the `use` that waits has had its turn
            else:
                takes = job.layers.bytes if job.layers else 0
                problem = f"adapter {name!r} takes {takes:,}, more than those leave that are pinned or wanted with it"
                self._end(name, job, ValueError(f"budget_bytes={self.budget_bytes}: {problem}"))
        self._ready = left

    def _insert(self, name: str, job: Job) -> None:
        entry, layers = self._entries[name], job.layers
        assert layers is not None
        if entry.resident is not None:
            self._remove(name)
        if self.budget_bytes is not None:
            for other in [one for one in self._by_age() if one != name and self._is_evictable(one)]:
                if self._bytes() + layers.bytes <= self.budget_bytes:
                    break
                self._evict(other)
        for path, tables in layers.tables.items():
            layer = self._layers[path]
            for table, value in tables.items():
                if isinstance(value, nn.Module):
                    value.train(layer.training)
                _table(layer, table)[name] = value
        entry.folder, entry.config, entry.template, entry.resident = job.folder, job.config, job.template, layers
        self.model.peft_config[name] = copy.copy(job.config)
        receipts.note(self.model, name, job.source)
        self._counts["loads"] += 1
        self._counts["swaps"] += job.is_swap

    def _evict(self, name: str) -> None:
        self._remove(name)
        self._counts["evictions"] += 1

    def _remove(self, name: str) -> None:
        entry = self._entries[name]
        for path in entry.resident.tables if entry.resident else ():
            layer = self._layers[path]
            for table in entry.resident.tables[path] if entry.resident else ():
                del _table(layer, table)[name]
            known.forget(layer, name)  # or its plan would keep the weights
            prompts.forget(layer, name)
        if entry.resident is not None and len(entry.template.spare) < SPARE:
            tables = entry.resident.tables
            held = [value for own in tables.values() for value in own.values() if isinstance(value, nn.Module)]
            # What somebody else has added to a module (a hook, DoRA's cached norm) goes with it.
            if not is_hooked(*held) and not any(getattr(module, "_dora_cache", None) for module in held):
                for (_, owner, slot), (_, other, _) in zip(_slots(tables), _slots(entry.template.tables), strict=True):
                    owner[slot] = other[slot]
                entry.template.spare.append(tables)
        entry.resident = None
        self._removals += 1
        self.model.peft_config.pop(name, None)
        receipts.note(self.model, name, None)

    def _end(self, name: str, job: Job, error: BaseException | None = None) -> None:
        """Tell who waits for a job; the lock is held."""
        entry = self._entries.get(name)
        if entry is not None and job in entry.jobs:
            entry.jobs.remove(job)
        self._counts["failures"] += error is not None
        if not job.future.set_running_or_notify_cancel():
            return
        if error is None:
            job.future.set_result(None)
        else:
            job.future.set_exception(error)

    def _entry(self, name: str) -> Entry:
        entry = self._entries.get(name)
        if entry is None:
            have = [*self._entries, *(own for own in self.model.peft_config if own not in self._entries)]
            raise ValueError(f"adapter {shown(name)}: there is none of that name, expected one of {listed(have)}")
        return entry

    def _by_age(self) -> list[str]:
        there = [name for name, entry in self._entries.items() if entry.resident is not None]
        return sorted(there, key=lambda name: self._entries[name].used)

    def _bytes(self) -> int:
        return sum(entry.resident.bytes for entry in self._entries.values() if entry.resident is not None)

    # ---- files

    def _begin(self, name: str, job: Job) -> None:
        """Have a folder read; the lock is held."""
        self._reader.submit(self._read, name, job)
        self._entries[name].jobs.append(job)

    def _read(self, name: str, job: Job) -> None:
        """Read and check a folder, and build its layers: in the thread of its own."""
        error: BaseException | None = None
        with self._changed:
            entry = self._entries.get(name)
            if entry is not None and not job.is_swap:  # a swap may have come before it
                job.folder, job.config, job.template = entry.folder, entry.config, entry.template
        try:
            job.layers, job.source = self._build(job)
        except BaseException as caught:  # told to who waits
            error = caught
        with self._changed:
            if error is not None:
                self._end(name, job, error)
            else:
                self._ready.append((name, job))
                self._insert_when_idle()
            self._changed.notify_all()

    def _build(self, job: Job) -> tuple[Layers, receipts.Source]:
        read = adapters.read(job.folder)
        if _signature(read.config) != _signature(job.config):
            raise AdapterError(
                job.folder / adapters.CONFIG, None, "it has changed since it was registered: swap() takes it"
            )
        given = adapters.fitting(read, job.template.expected, self._own)
        if not self._allow_noop:
            adapters.require_a_change(read, given, self._own)
        with self._changed:
            spare = job.template.spare.pop() if job.template.spare else None
        tables = copy.deepcopy(job.template.tables) if spare is None else spare
        total = 0 if self.method in LAYERS else prompts.kept_bytes(self.model, job.config)
        for (path, owner, slot), (key, rows) in zip(_slots(tables), job.template.keys, strict=True):
            values = self._placed(given[key][rows], path)
            owner[slot] = nn.Parameter(values, requires_grad=False)
            total += values.nbytes
        for own in tables.values():
            if "prompt_tokens" in own:
                own["prompt_tokens"] = torch.arange(len(own["prompt_tokens"]))
        source = receipts.Source(str(job.folder), read.hashes, tuple(sorted(read.tensors.keys() - given.keys())), ())
        return Layers(tables, total), source

    def _placed(self, values: Tensor, path: str) -> Tensor:
        """Values as the layer has them."""
        if self.method not in LAYERS:
            return _as(values, torch.float32).to(self.model.device)
        weight = self._layers[path].get_base_layer().weight
        return _as(values, self._dtype_beside(weight)).to(weight.device)

    def _dtype_beside(self, weight: Tensor) -> torch.dtype:
        """Of an adapter's values beside a weight, as PEFT has them."""
        if (
            not weight.is_floating_point()
            or weight.dtype.itemsize < 2
            or (weight.dtype.itemsize == 2 and self._autocast)
        ):
            return torch.float32
        return weight.dtype

    def _prepare(self, folder: Path) -> tuple[Any, Template]:
        """The config in a folder, and the layers it asks for, which the model has from now on."""
        if not adapters.is_adapter(folder):
            raise FileNotFoundError(
                f"folder={folder}: expected an adapter in PEFT's format, there is no {adapters.CONFIG}"
            )
        config = adapters.read_config(folder / adapters.CONFIG)
        empty = Adapter(folder, config, {}, {})
        if config.peft_type != self.method:
            problem = f"expected {self.method}, as the model has, got {config.peft_type.value}; banks are for {TOLD}"
            raise AdapterError(folder / adapters.CONFIG, "peft_type", problem)
        adapters.require_an_untouched_base(empty)
        for key in REFUSED:
            if getattr(config, key, None):
                raise AdapterError(folder / adapters.CONFIG, key, "expected none in an adapter of a bank")
        config.inference_mode = True
        signature = _signature(config)
        template = self._templates.get(signature)
        if template is None:
            template = self._make_template(empty)
            if new := template.tables.keys() - self._layers.keys():
                self._make_layers(config, sorted(new))
            self._templates[signature] = template
        return config, template

    def _make_template(self, empty: Adapter) -> Template:
        expected = adapters.expect(empty, self._skeleton)
        model = expected.model
        state = model.state_dict(keep_vars=True)
        parameters = get_peft_model_state_dict(model, state, TEMPLATE, save_embedding_layers=False)
        tables: Tables = {}
        for path, module in self._holders(model).items():
            own = self._layers.get(path)
            if own is not None and getattr(module, "is_feedforward", None) != getattr(own, "is_feedforward", None):
                problem = f"{path} is one on one side alone, here or in the model's adapters: IA³ scales its x, or y"
                raise AdapterError(empty.folder / adapters.CONFIG, "feedforward_modules", problem)
            everything = {**module.__dict__, **module._modules}
            tables[path] = {
                table: held[TEMPLATE]
                for table, held in everything.items()
                if isinstance(held, (dict, nn.ModuleDict, nn.ParameterDict))
                and TEMPLATE in held
                and table != "peft_config"
            }
        found = [owner[slot] for _, owner, slot in _slots(tables)]
        return Template(expected, self._keys(empty, parameters, found), tables, [])

    def _keys(
        self, empty: Adapter, saved: Mapping[str, Tensor], parameters: Sequence[Tensor]
    ) -> list[tuple[str, slice]]:
        """Where a file has each parameter's values."""
        if self.method == "CARTRIDGE":  # its frozen rows and the trained ones, one behind the other
            ends = list(itertools.accumulate(map(len, parameters)))
            return [("prompt_embeddings", slice(*one)) for one in zip([0, *ends], ends, strict=False)]
        key_of = {id(parameter): key for key, parameter in saved.items()}
        if any(id(one) not in key_of for one in parameters):
            raise AdapterError(empty.folder / adapters.CONFIG, None, "PEFT saves its values in another form")
        return [(key_of[id(one)], slice(None)) for one in parameters]

    def _make_layers(self, config: Any, new: list[str]) -> None:
        """Have PEFT wrap the modules that no adapter has had yet."""
        name = "fastlora_bank"
        with self._alone():
            was_fused = any(isinstance(layer, Fused) for layer in self._layers.values())
            self.model.add_adapter(name, copy.copy(config), low_cpu_mem_usage=True)
            self.model.delete_adapter(name)
            self._find_layers()
            for path in new:
                layer = self._layers[path]
                layer.train(layer.get_base_layer().training)
        if was_fused:
            logger.warning("adapters: %d layers are new (%s): call fastlora.accelerate(model) again", len(new), new[0])

    def _find_layers(self) -> None:
        self._layers |= self._holders(self.model)

    def _holders(self, model: Any) -> dict[str, Any]:
        """What has tables of adapters in a model, by path."""
        if self.method not in LAYERS:
            return {"": model}
        named = model.get_base_model().named_modules()
        return {path: module for path, module in named if isinstance(module, LAYERS[self.method])}


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The values in a dtype, converted by the calling thread alone."""
    if tensor.dtype is dtype:
        return tensor
    made = torch.empty(tensor.shape, dtype=dtype)
    for piece, source in zip(adapters.pieces(made), adapters.pieces(tensor), strict=True):
        piece.copy_(source)
    return made


def _slots(tables: Tables) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Where an adapter's parameters are kept, and in which layer, in an order that is the same for every copy."""
    for path, own in tables.items():
        for table, value in own.items():
            if isinstance(value, nn.Parameter):
                yield path, own, table
            for module in value.modules() if isinstance(value, nn.Module) else ():
                for slot, parameter in module._parameters.items():
                    if parameter is not None:
                        yield path, module._parameters, slot


def _table(layer: Any, name: str) -> Any:
    return layer._modules[name] if name in layer._modules else layer.__dict__[name]


def _signature(config: Any) -> str:
    """What of a config decides its layers: all but where it came from."""
    values = {one.name: getattr(config, one.name) for one in fields(config)}
    for name in (
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "auto_mapping",
        "runtime_config",
        "peft_version",
    ):
        values.pop(name, None)
    return json.dumps(
        values, default=lambda value: sorted(value) if isinstance(value, set) else str(value), sort_keys=True
    )
