"""What was measured: each implementation's time over plain PyTorch's, by kind of machine and class of sizes. `ops` chooses by it.

Measurements of a kind of machine are shipped in fastlora/assets/tuned/<kind>.json (`fastlora tune --output`). Those of this very machine lie in
its cache folder (`fastlora tune`, or the trial in `accelerate`) and go before the shipped ones. A state that was loaded (a checkpoint's, or
rank 0's) stands in the place of both: a resumed run chooses as the run before did, and all processes choose alike.
What was shipped for another number of threads or another instruction set than this process has holds only until a trial here.

    FASTLORA_CACHE   the folder of the cache; without it $XDG_CACHE_HOME/fastlora or ~/.cache/fastlora
    FASTLORA_TABLE   a file made by `fastlora tune --output`, in the place of both: it must be right, and nothing is added to it
"""

import datetime
import functools
import json
import math
import os
import platform
import re
import warnings
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock

from fastlora import reading, writing
from fastlora.distribution import __version__
from fastlora.typed import check_fields, shown

SCHEMA = 1
SHIPPED = Path(__file__).parent.parent / "assets" / "tuned"
ROWS = (1, 8, 64, 512, 4096)
LARGE = 2**21  # elements of a weight, or elements moved
ZEN = {0x17: "zen2", 0x19: "zen3", 0x1A: "zen5"}  # AMD's families; Zen 4 is the Zen 3 family with AVX-512


class Measurement(NamedTuple):
    """One implementation of one operator beside plain PyTorch, in one class of sizes."""

    op: str
    dtype: str  # as torch spells it: bfloat16
    rows: int  # M, or the tokens of a batch: one of ROWS
    size: str  # of the weight, or of what is moved: small | large
    dropout: bool
    implementation: str
    checked: bool  # against the float64 reference; False: it failed, and is refused for this operator and dtype
    ratio: float | None  # its time over plain PyTorch's; None: it failed its check and was not timed
    origin: str  # who measured it and when, for people
    way: str = ""  # the fastest one, where the implementation has several: one of WAYS
    without_copy: str = ""  # the fastest of the others, where that one takes memory which a weight may not get


RANKS = (16, 64, 256)  # for which the adapter's part is measured on a CPU


@functools.cache
def rank_case(rank: int) -> str:
    """What the measurements of the adapter's part go by that are nearest to this rank, in powers."""
    return f"lora_linear_rank_{next((one for one in RANKS if rank < 2 * one), RANKS[-1])}"


WAYS = {
    ("triton", "lora_linear"): ("fused", "library"),
    ("triton", "multi_lora"): ("fused", "library"),
    ("cpu", "frozen_linear"): ("torch", "plain", "packed", "product", "few_rows"),
    **{("cpu", rank_case(rank)): ("passes", "composed", "blocked") for rank in RANKS},
}
"""How an implementation may compute an operator, its backward and the one for layers that share x: Triton in kernels of its own, or with the
product left to torch's library; the CPU's frozen product by torch, by oneDNN on the weight as it lies or on a packed copy, or by
csrc's kernels for many rows and for few; the CPU's adapter by csrc's passes, by torch's
products, or by csrc's."""

forced_way = ""
"""The way that must be taken by whatever has it, whatever was measured: for those who measure it."""

Table = dict[tuple[Hashable, ...], Measurement]  # by every field before `checked`

choices: dict[Hashable, Any] = {}
"""What `ops` has chosen so far, emptied whenever the measurements change."""

_tables: dict[str, Table] = {}  # by device type
_borrowed: dict[
    str, Table
] = {}  # the same, shipped for such a machine in another `_setting`: for the classes that are not in _tables
_loaded = False  # whether the tables came from `load_state`


def instruction_set() -> str:
    """What native C++ runs with, which puts its own in this place where it is built: FASTLORA_ISA may name another, whose times are others."""
    return "none"


def class_of(rows: int, elements: int) -> tuple[int, str]:
    """(rows, size) of a Measurement: the power of eight that is nearest to the rows, and whether there are LARGE elements."""
    return ROWS[min(rows.bit_length() // 3, len(ROWS) - 1)], "large" if elements >= LARGE else "small"


def lookup(
    device_type: str, op: str, dtype: torch.dtype, rows: int, elements: int, dropout: bool
) -> dict[str, Measurement]:
    """What is known of each implementation, by its name: the measurement of the nearest class, or that it failed its check."""
    wanted, size = class_of(rows, elements)

    def distance(one: Measurement) -> tuple[bool, bool, bool, int]:
        apart = abs(one.rows.bit_length() - wanted.bit_length())
        return one.checked, one.dropout is not dropout, one.size != size, apart

    ours = [one for one in _known(device_type).values() if (one.op, one.dtype) == (op, name_of(dtype))]
    return {one.implementation: one for one in sorted(ours, key=distance, reverse=True)}


def ways_of(implementation: str, op: str) -> tuple[str, ...]:
    """The implementation's WAYS to compute an operator or its backward, if it has several."""
    return WAYS.get((implementation, op.removesuffix("_backward").removesuffix("_shared")), ())


def way(
    implementation: str,
    op: str,
    device_type: str,
    dtype: torch.dtype,
    rows: int,
    elements: int,
    dropout: bool,
    without_copy: bool = False,
) -> str:
    """The fastest of the implementation's WAYS where it was measured, else nothing; `forced_way` goes before.

    without_copy: the fastest of the others instead, where that one takes a copy of the weight.
    """
    if forced_way and forced_way in ways_of(implementation, op):
        return "" if without_copy else forced_way
    key = implementation, op, device_type, dtype, rows.bit_length(), elements.bit_length(), dropout, without_copy
    found = choices.get(key)
    if found is None:
        known = lookup(device_type, op, dtype, rows, elements, dropout).get(implementation)
        found = choices[key] = (known.without_copy if without_copy else known.way) if known else ""
    return found


def has(device_type: str, op: str, dtype: torch.dtype, rows: int, size: str, dropout: bool) -> bool:
    """Whether exactly this class was measured in this setting."""
    wanted = (op, name_of(dtype), rows, size, dropout)
    return any(key[: len(wanted)] == wanted for key in _table(device_type))


def entries(device_type: str) -> list[Measurement]:
    """All that holds for this machine."""
    return list(_known(device_type).values())


def record(
    op: str,
    dtype: torch.dtype,
    rows: int,
    size: str,
    dropout: bool,
    implementation: str,
    ratio: float | None,
    way: str = "",
    without_copy: str = "",
) -> Measurement:
    """A Measurement made on this machine, today. ratio: None where the implementation failed its check."""
    ratio = None if ratio is None else max(round(ratio, 3), 0.001)
    what = op, name_of(dtype), rows, size, dropout, implementation
    return Measurement(*what, ratio is not None, ratio, _origin("this machine", _today()), way, without_copy)


def learn(device_type: str, found: Iterable[Measurement]) -> None:
    """Use these measurements from now on, in this process."""
    _tables[device_type] = _table(device_type) | _by_class(found)
    choices.clear()


def keep(device_type: str, found: Iterable[Measurement], command: str) -> Path | None:
    """Use these measurements from now on, and add them to this machine's cache; returns its path, None where it cannot be written."""
    learn(device_type, found)
    try:
        path = cache_path(device_type)
        write(path, device_type, (_read_cache(device_type) | _by_class(found)).values(), command)
    except OSError as error:
        warnings.warn(f"fastlora: the measurements of this machine cannot be kept: {error}", stacklevel=2)
        return None
    return path


@contextmanager
def alone(device_type: str) -> Iterator[None]:
    """One process of this machine at a time; one that had to wait finds what the one before has kept. Without a folder for that each is alone."""
    try:
        path = cache_path(device_type)
    except FileNotFoundError:
        yield
        return
    lock = FileLock(path.with_suffix(".lock"))
    try:
        lock.acquire()  # makes the folder, too
    except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
        warnings.warn(
            f"fastlora: other processes may measure at the same time: no lock on {path}: {error}", stacklevel=2
        )
    try:
        _tables[device_type] = _table(device_type) | _read_cache(device_type)
        choices.clear()
        yield
    finally:
        lock.release()


def write(path: Path, device_type: str, found: Iterable[Measurement], command: str) -> None:
    """Write a table of this machine's measurements, whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    head = {**_identity(device_type), "machine": machine_name(device_type), "date": _today(), "command": command}
    entries = [
        json.dumps({name: value for name, value in one._asdict().items() if name != "origin" and value != ""})
        for one in found
    ]
    text = json.dumps(head, indent=2).removesuffix("\n}") + ',\n  "entries": [\n    ' + ",\n    ".join(entries)
    path.parent.mkdir(parents=True, exist_ok=True)
    writing.whole(path, (text + "\n  ]\n}\n").encode())


def state() -> dict[str, list[list[Any]]]:
    """What the choices follow from, in plain types: for a checkpoint, or for other processes."""
    device_types = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return {device_type: [list(one) for one in _known(device_type).values()] for device_type in device_types}


def load_state(state: Mapping[str, Iterable[Iterable[Any]]] | None) -> None:
    """Choose as the process chose whose `state` this is: nothing else counts, and there are no trials. None: as this machine's files say."""
    global _loaded
    _loaded = state is not None
    _tables.clear()
    _borrowed.clear()
    for device_type, entries in (state or {}).items():
        _tables[device_type] = _by_class(checked(Measurement(*entry)) for entry in entries)
    choices.clear()


def is_fixed() -> bool:
    """Whether nothing may be added: a state was loaded, or FASTLORA_TABLE names a table."""
    return _loaded or bool(os.environ.get("FASTLORA_TABLE"))


def name_of(dtype: torch.dtype) -> str:
    """As a Measurement has it."""
    return str(dtype).removeprefix("torch.")


def _by_class(found: Iterable[Measurement]) -> Table:
    return {one[: Measurement._fields.index("checked")]: one for one in found}


def _known(device_type: str) -> Table:
    own = _table(device_type)  # fills _borrowed, too
    return _borrowed.get(device_type, {}) | own


def _table(device_type: str) -> Table:
    if device_type not in _tables:
        _tables[device_type] = {} if _loaded else _read_files(device_type)
    return _tables[device_type]


def _read_files(device_type: str) -> Table:
    named = os.environ.get("FASTLORA_TABLE")
    if named:
        try:
            return _read(Path(named), {"schema": SCHEMA})
        except OSError as error:
            raise type(error)(
                f"FASTLORA_TABLE={named}: expected a file made by `fastlora tune --output`: {error}"
            ) from None
        except ValueError as error:
            raise ValueError(f"FASTLORA_TABLE: {error}") from None
    kind = kind_of(device_type)
    path = SHIPPED / f"{kind}.json"
    shipped = _read(path, {"schema": SCHEMA, "kind": kind}) if path.is_file() else {}
    if shipped:
        of_shipped = reading.json_file(path)
        if any(of_shipped.get(name) != value for name, value in _setting(device_type).items()):
            _borrowed[device_type], shipped = shipped, {}
    return shipped | _read_cache(device_type)


def _read_cache(device_type: str) -> Table:
    try:
        return _read(cache_path(device_type), _identity(device_type), "this machine")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(
            f"fastlora: a cache is ignored until a trial or `fastlora tune` replaces it: {error}", stacklevel=1
        )
        return {}


def _read(path: Path, expected: Mapping[str, Any], whose: str | None = None) -> Table:
    """The table in a file.

    whose: the machine that it is of, for people; None: the kind in the file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no table, or not the expected one; the message says which part.
    """
    try:
        content = reading.json_file(path)
        for name, value in expected.items():
            if content.get(name) != value:
                raise ValueError(f"{name} is {content.get(name)!r}, expected {value!r}")
        origin = _origin(whose or content.get("kind"), content.get("date"))
        entries = content.get("entries")
        if not isinstance(entries, list):
            raise ValueError(f"entries: expected a list, got {shown(entries)}")
        return _by_class(_entry(entry, f"entries[{i}]", origin) for i, entry in enumerate(entries))
    except ValueError as error:
        raise ValueError(f"{path} is no table for this machine: {error}") from None


def _entry(entry: Any, where: str, origin: str) -> Measurement:
    try:
        return checked(Measurement(**entry, origin=origin))
    except (TypeError, ValueError) as error:  # the former: no object, or other fields
        raise ValueError(f"{where}: {str(error).removeprefix('fastlora.choice.table.')}, got {shown(entry)}") from None


def checked(one: Measurement) -> Measurement:
    """The measurement, if it can be one.

    Raises:
        TypeError, ValueError: a field has a wrong type or value; the message names it.
    """
    check_fields(one)
    timed = one.ratio is not None and 0 < one.ratio < math.inf
    right = {
        "rows": one.rows in ROWS,
        "size": one.size in ("small", "large"),
        "ratio": timed if one.checked else one.ratio is None,
        "way": one.way == "" or any(one.way in ways for ways in WAYS.values()),
        "without_copy": one.without_copy == "" or any(one.without_copy in ways for ways in WAYS.values()),
    }
    for name, is_right in right.items():
        if not is_right:
            raise ValueError(f"{name}={shown(getattr(one, name))}: no measurement has that")
    return one


def _origin(whose: Any, date: Any) -> str:
    return f"measured on {whose}, {date}"


def _today() -> str:
    return datetime.date.today().isoformat()


def _identity(device_type: str) -> dict[str, Any]:
    """What a cache must have in common with the process that reads it.

    Raises:
        RuntimeError: FASTLORA_ISA names an instruction set that there is not, here or at all.
    """
    return {
        "schema": SCHEMA,
        "kind": kind_of(device_type),
        "torch": torch.__version__,
        "fastlora": __version__,
        **_setting(device_type),
    }


def _setting(device_type: str) -> dict[str, Any]:
    """What the user may change about a machine of one kind, and its times with it.

    Raises:
        RuntimeError: FASTLORA_ISA names an instruction set that there is not, here or at all.
    """
    return {"isa": instruction_set(), "threads": torch.get_num_threads()} if device_type == "cpu" else {}


def cache_folder() -> Path:
    """Where the caches lie.

    Raises:
        FileNotFoundError: nowhere: no variable names a folder, and the user has no home, as in a container under a number without a name.
    """
    named = os.environ.get("FASTLORA_CACHE")
    if named:
        return Path(named)
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if folder.startswith("~"):  # else it would lie in the working directory, whose owner may be another
        raise FileNotFoundError("the user has no home folder, and FASTLORA_CACHE names none")
    return Path(folder, "fastlora")


def cache_path(device_type: str) -> Path:
    """The cache of this machine for this version of torch and of fastlora, this instruction set and this number of threads.

    Raises:
        FileNotFoundError: there is no folder for it.
    """
    _, kind, *versions = _identity(device_type).items()
    return Path(cache_folder(), "-".join([kind[1], *(f"{name}{value}" for name, value in versions)]) + ".json")


def kind_of(device_type: str) -> str:
    """The kind of machine that a table is for: amd-zen4-avx512bf16, nvidia-h100-80gb-hbm3-sm90."""
    if device_type == "cuda":
        card = torch.cuda.get_device_properties(torch.cuda.current_device())
        return _slug(f"{card.name} sm{card.major}{card.minor}")
    facts = cpu_facts()
    # What torch may use, also where an emulator shows its host's /proc.
    level = torch.backends.cpu.get_cpu_capability().lower()
    if "vendor_id" not in facts:
        part = [facts[name] for name in ("CPU implementer", "CPU part") if name in facts]
        return _slug(" ".join([platform.system(), platform.machine(), *part, level]))
    vendor = {"AuthenticAMD": "amd", "GenuineIntel": "intel"}.get(facts["vendor_id"], facts["vendor_id"])
    family, flags = int(facts["cpu family"]), facts.get("flags", "").split()
    core = f"{family} {facts['model']}"
    if vendor == "amd" and family in ZEN:
        core = "zen4" if (family, level) == (0x19, "avx512") else ZEN[family]
    if level == "avx512":
        level = "amx" if "amx_bf16" in flags else "avx512bf16" if "avx512_bf16" in flags else level
    return _slug(f"{vendor} {core} {level}")


def machine_name(device_type: str) -> str:
    """The CPU's or card's own name."""
    if device_type == "cuda":
        return torch.cuda.get_device_name()
    return cpu_facts().get("model name") or f"{platform.system()} {platform.machine()}"


def cpu_facts() -> dict[str, str]:
    """What /proc/cpuinfo says of the first processor; nothing where there is no such file."""
    try:
        with open("/proc/cpuinfo") as lines:
            return dict(_facts(lines))
    except OSError:
        return {}


def _facts(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    for line in lines:
        if not line.strip():
            return
        name, _, value = line.partition(":")
        yield name.strip(), value.strip()


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
