"""The registry of operators, torch.ops.fastlora.*, and of their implementations; and the choice between them.

operators/ defines them. Implementations are called by name from one table: `csrc` registers its own through the dispatcher, Triton's are put in by
`implement`. An operator asks `choose` which one runs. Nothing falls back in silence: an implementation that is asked for by FASTLORA_IMPL and
cannot run raises.
"""

import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora import reference
from fastlora.choice import table

IMPLEMENTATIONS = ("reference", "cpu", "triton", "cuda")
TITLES = {"cpu": "native C++", "triton": "Triton", "cuda": "CUDA C++"}
WORTH_IT = 0.98  # of plain PyTorch's time: a smaller gain may be noise

SCHEMAS: dict[str, str] = {}
"""Of every operator and its backward, as operators/ defines them."""

CASES: dict[str, str] = {}
"""What is implemented and measured under a name of its own, with its operator: most have one case, of their own name."""

library = torch.library.Library("fastlora", "DEF")
for _schema in (
    # y = x Wᵀ + b for 1 to 8 rows, bound by reading W once; with an adapter; with one for each row.
    "few_rows_cpu(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    "few_rows_lora_cpu(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, float scale) -> (Tensor y, Tensor xa)",
    # Of x [..., K], where nobody asks for xa.
    "few_rows_now_cpu(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, float scale) -> Tensor",
    "few_rows_mixed_cpu(Tensor x, Tensor weight, Tensor? bias, Tensor[] lora_a, Tensor[] lora_b, float[] scale, Tensor? order, Tensor? offsets)"
    " -> (Tensor y, Tensor xa)",
    # The same for many rows, in float32.
    "product_cpu(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    "add_product_cpu(Tensor(a!) y, Tensor x, Tensor weight) -> ()",
    # Some rows and columns of a weight in 4 bits or 8; and a few rows' product with one.
    "dequantise_cpu(Tensor(a!) to, Tensor packed, Tensor? code, Tensor factor, Tensor? factor_codes, Tensor? factor_code, float factor_offset,"
    " int block, int factor_block, int rows, int columns, int row, int column) -> ()",
    "few_rows_quantised_cpu(Tensor x, Tensor packed, Tensor? code, Tensor factor, Tensor? factor_codes, Tensor? factor_code, float factor_offset,"
    " int block, int factor_block, int rows, int columns, Tensor? bias) -> Tensor",
    # What lora_linear adds to products with frozen weights: to y, and to dx.
    "lora_update_cpu(Tensor(a!)[] y, Tensor x, Tensor[] lora_a, Tensor[] lora_b, float[] scale, float[] dropout_p, Tensor? seed, Tensor? order,"
    " Tensor? offsets) -> (Tensor xa, Tensor keep)",
    "lora_update_backward_cpu(Tensor(a!)? dx, Tensor[] dy, Tensor x, Tensor[] lora_a, Tensor[] lora_b, Tensor xa, Tensor keep, float[] scale,"
    " float[] dropout_p, Tensor? order, Tensor? offsets, bool need_da, bool need_db) -> (Tensor da, Tensor db)",
    # Dropout alone, where torch multiplies what it leaves: keep [M, keep_bytes] is drawn, or read; the last adds to y.
    "draw_dropout_cpu(Tensor x, float p, Tensor seed) -> (Tensor y, Tensor keep)",
    "dropout_cpu(Tensor x, float p, Tensor keep) -> Tensor",
    "add_dropout_cpu(Tensor(a!) y, Tensor x, float p, Tensor keep) -> ()",
    # The norms of the rows of W + s B A, for dora_factor.
    "dora_norm_cpu(Tensor weight, Tensor lora_a, Tensor lora_b, float scale) -> Tensor",
    # prefix_concat for a call that nobody traces: plain numbers for what is no data; missing: whether a token's number does not exist (1), or a
    # prompt's (2).
    "prefix_concat_now_cpu(Tensor prompts, int[] starts, int max_prompt, Tensor? prompt_index, Tensor? embeds, Tensor? input_ids, Tensor? embedding,"
    " Tensor attention_mask, Tensor? position_ids, Tensor? labels)"
    " -> (Tensor embeds, Tensor attention_mask, Tensor position_ids, Tensor labels, Tensor source, int missing)",
    "prefix_concat_backward_now_cpu(Tensor dout, Tensor source, int[] prompts, int tokens, bool need_prompts, bool need_embeds)"
    " -> (Tensor dprompts, Tensor dembeds)",
    # A number that changes with the elements of a weight, with 256 of them or with all: by it frozen/packed.py and operators/dora_factor.py see
    # that one was written to.
    "fingerprint_cpu(Tensor weight, bool whole=False) -> int",
):
    library.define(_schema)


class ImplementationError(RuntimeError):
    """An implementation was asked for by name and is not here or cannot take these inputs."""


class Choice(NamedTuple):
    implementation: str  # one of IMPLEMENTATIONS
    reason: str
    ratio: float = 1.0  # its time over plain PyTorch's, as far as that was measured


class Availability(NamedTuple):
    implementation: str
    present: bool
    reason: str  # what it is, or why it is missing and what that costs


implementations: dict[tuple[str, str], Callable[..., Any]] = {}
"""By case and name: functions that take what the operator's schema says, with None for a bias without elements in a list."""

_missing: dict[str, str] = {}
_notes: dict[str, str] = {}
_loaders: dict[str, Callable[[], None]] = {}


def define(
    name: str, schema: str, run: Callable[..., Any], shapes: Callable[..., Any], cases: Sequence[str] = ()
) -> None:
    """Define torch.ops.fastlora.<name>, run by `run`, which asks for a case's implementation; reference.py's is the first of each.

    shapes: the fake kernel. cases: what is implemented and measured apart, if not the operator as a whole. csrc registers what it has of the
    same schema as <name>_cpu and <name>_cuda.
    """
    SCHEMAS[name] = schema
    for suffix in ("", "_cpu", "_cuda"):
        library.define(name + suffix + schema)
    library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastlora::{name}", shapes, lib=library)
    for case in cases or (name,):
        CASES[case] = name
        implementations[case, "reference"] = getattr(reference, name)


def native(name: str, key: str = "CPU") -> Any:
    """The operator that csrc has registered, or None."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(f"fastlora::{name}", key)
    return getattr(torch.ops.fastlora, name).default if has_kernel else None


def implement(case: str, implementation: str, function: Callable[..., Any]) -> None:
    """Enter `function`, which takes what the schema of the case's operator takes, under the implementation's name."""
    implementations[case, implementation] = function
    table.choices.clear()


def note(implementation: str, text: str) -> None:
    """Let `availability` add this to what it says of an implementation."""
    _notes[implementation] = text


def implement_later(implementation: str, load: Callable[[], None]) -> None:
    """Call `load`, which calls `implement`, when the implementation is first asked for; an ImportError then says that it is missing."""
    _loaders[implementation] = load


def mark_missing(implementation: str, reason: str) -> None:
    """Note why an implementation is not here; `availability` and errors quote it."""
    _missing[implementation] = reason
    table.choices.clear()


def _load(implementation: str) -> None:
    load = _loaders.get(implementation)
    if load is not None:
        try:
            load()
        except ImportError as error:
            mark_missing(implementation, f"cannot be imported: {error}")
        _loaders.pop(implementation, None)  # another thread may have come as early


def implementation(op: str, name: str) -> Callable[..., Any]:
    """The function behind `op` (a key of CASES) in the implementation called `name`.

    Raises:
        ImplementationError: the name is unknown, or the implementation is not on this machine; the message says why.
    """
    if name not in IMPLEMENTATIONS:
        raise ImplementationError(f"unknown implementation {name!r}: expected one of {', '.join(IMPLEMENTATIONS)}")
    _load(name)
    try:
        return implementations[op, name]
    except KeyError:
        raise ImplementationError(f"{op} has no implementation {name!r} here: {_absence(op, name)}") from None


def _implemented(name: str) -> list[str]:
    """What an implementation has, nothing where it is noted as missing (frozen/products.py alone makes no "cpu")."""
    return [] if name in _missing else [case for case in CASES if has(case, name)]


def has(case: str, name: str) -> bool:
    """Whether an implementation that is loaded has a case."""
    return (case, name) in implementations


def _absence(op: str, name: str) -> str:
    """Why the implementation does not have `op`: some have only some operators."""
    return f"{name} has no {op}" if _implemented(name) else f"{name} is {_missing.get(name, 'not built')}"


def availability() -> list[Availability]:
    """Which implementations this machine has, and what a missing one costs."""
    costs = {
        "cpu": "without it every operator on a CPU runs as plain PyTorch (reference)",
        "triton": "without it there is no Triton path on a GPU; CPUs lose nothing",
        "cuda": "without it there is no CUDA C++ path on a GPU; CPUs lose nothing",
    }
    found = []
    for name in IMPLEMENTATIONS:
        _load(name)
        has = _implemented(name)
        if name == "reference":
            found.append(Availability(name, True, "plain PyTorch"))
        elif has:
            found.append(Availability(name, True, ", ".join(has) + _notes.get(name, "")))
        else:
            found.append(Availability(name, False, f"{_missing.get(name, 'not built')}; {costs[name]}"))
    return found


_environment: str | None = os.environ.get("FASTLORA_IMPL") or None  # as it was last read
forced: str | None = _environment
"""The implementation that every operator must use: FASTLORA_IMPL, as fastlora was imported or at the last `read_environment`."""


def read_environment() -> None:
    """Follow FASTLORA_IMPL if it was changed, and make sure that it can be followed at all. `accelerate` does this; a choice has no time to.

    Raises:
        ImplementationError: it names no implementation, or one that this machine cannot run, whatever it is given.
    """
    global _environment, forced
    now = os.environ.get("FASTLORA_IMPL") or None
    if now != _environment:
        _environment = forced = now
    if forced is not None:
        check_forced()
        obstacle = None if torch.cuda.is_available() else _device_obstacle(forced, torch.device("cpu"))
        if obstacle is None:
            _load(forced)
            obstacle = None if _implemented(forced) else _absence("anything", forced)
        if obstacle is not None:
            raise ImplementationError(f"FASTLORA_IMPL={forced}: {obstacle}")


def check_forced() -> None:
    """Raise ImplementationError where FASTLORA_IMPL names none."""
    if forced not in IMPLEMENTATIONS:
        raise ImplementationError(f"FASTLORA_IMPL={forced!r}: expected one of {', '.join(IMPLEMENTATIONS)}")


EMULATORS = {"triton": "TRITON_INTERPRET", "cuda": "FASTLORA_EMULATED"}
"""Set to 1 where tests run a GPU's kernels on a CPU."""

OLDEST_CARD = (8, 0)
"""The least compute capability that CUDA C++ is compiled for (setup.py)."""

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the compiled implementations compute in; float64 is the reference's."""

HOPPER = (9, 0)
"""The compute capability on which CUDA C++ has been checked and timed (benchmarks/results), and runs where nothing was measured."""

SIXTEEN_BITS = {
    (op, "cuda") for stem in ("lora_linear", "lora_linear_shared", "multi_lora") for op in (stem, f"{stem}_backward")
}
"""What runs on tensor cores alone: bfloat16 and float16."""


def _device_obstacle(name: str, device: torch.device) -> str | None:
    """Why the implementation cannot run on this device, be it built or not, or None."""
    emulated = name in EMULATORS and os.environ.get(EMULATORS[name]) == "1"
    if name == "reference" or emulated or device.type == ("cpu" if name == "cpu" else "cuda"):
        return None
    no_card = ": torch sees no CUDA card here" if name != "cpu" and not torch.cuda.is_available() else ""
    return f"{name} does not run on {device.type} devices{no_card}"


def obstacle_of(op: str, name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the implementation cannot run `op` on this device in this dtype, or None: what nothing mends comes first."""
    obstacle = _device_obstacle(name, device)
    if obstacle is not None:
        return obstacle
    _load(name)
    if not has(op, name):
        return _absence(op, name)
    if name == "reference":
        return None
    if name == "cuda" and device.type == "cuda" and torch.cuda.get_device_capability(device) < OLDEST_CARD:
        return f"{name} is compiled for compute capability {'.'.join(map(str, OLDEST_CARD))} and later"
    if dtype not in KERNEL_DTYPES or (dtype is torch.float32 and (op, name) in SIXTEEN_BITS):
        return f"{name} does not compute in {str(dtype).removeprefix('torch.')}"
    return None


def candidates(op: str, device: torch.device, dtype: torch.dtype) -> list[str]:
    """The compiled implementations of `op` that could run here, instead of plain PyTorch."""
    names = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}.get(device.type, ())
    return [name for name in names if obstacle_of(op, name, device, dtype) is None]


def choose(op: str, like: Tensor, rows: int, elements: int, dropout: bool, weight: Tensor | None = None) -> Choice:
    """What runs `op` on that many rows, with a weight (or a result) of that many elements, in `like`'s dtype and on its device.

    Measured are weights that lie by row, as nn.Linear's. The figures stand for those that lie by column, too, but not for any that would be copied.
    """
    if forced is not None:
        check_forced()
        obstacle = obstacle_of(op, forced, like.device, like.dtype)
        if obstacle is not None:
            raise ImplementationError(f"FASTLORA_IMPL={forced}: {op} cannot run: {obstacle}")
        return Choice(forced, "FASTLORA_IMPL")
    key = op, like.device, like.dtype, rows.bit_length(), elements.bit_length(), dropout
    choice = table.choices.get(key)
    if choice is None:
        choice = table.choices[key] = _decide(op, like.device, like.dtype, rows, elements, dropout)
    if choice.implementation == "cuda" and weight is not None and _is_copied(weight):
        return Choice(
            "reference",
            f"CUDA C++ would copy the weight {list(weight.shape)} in every call: neither its rows nor its columns lie at multiples of 16 bytes",
        )
    return choice


def _is_copied(weight: Tensor) -> bool:
    """Whether CUDA C++ cannot read the weight where it is: neither its rows nor its columns lie at multiples of 16 bytes."""
    return not any(weight.stride(along) <= 1 and weight.stride(across) % 8 == 0 for across, along in ((0, 1), (1, 0)))


def _decide(op: str, device: torch.device, dtype: torch.dtype, rows: int, elements: int, dropout: bool) -> Choice:
    """The fastest of plain PyTorch and the candidates that were measured; where none was, the native extension on a CPU, CUDA C++ on Hopper."""
    if device.type not in ("cpu", "cuda"):
        return Choice("reference", f"plain PyTorch, since there are no kernels for {device.type} devices")
    obstacle = obstacle_of(op, "cpu", device, dtype) if device.type == "cpu" else None
    if obstacle is not None:
        return Choice("reference", f"plain PyTorch, since {obstacle}")
    known = table.lookup(device.type, op, dtype, rows, elements, dropout)
    found = [known[name] for name in candidates(op, device, dtype) if name in known] if known else []
    if not found:
        if device.type == "cpu":
            return Choice("cpu", "native C++, not measured on this kind of CPU")
        if (op, "cuda") in SIXTEEN_BITS and "cuda" in candidates(op, device, dtype):
            if torch.cuda.get_device_capability(device) == HOPPER:
                return Choice("cuda", "CUDA C++, not measured on this kind of GPU")
        return Choice(
            "reference", "plain PyTorch, not measured on this kind of GPU: `fastlora tune --device cuda` does it"
        )
    best = min(found, key=lambda one: math.inf if one.ratio is None else one.ratio)
    title = TITLES[best.implementation]
    if best.ratio is None:
        return Choice("reference", f"plain PyTorch, since {title} failed its check ({best.origin})")
    times = f"{best.ratio:.2f}x"
    if best.ratio > WORTH_IT:
        return Choice("reference", f"plain PyTorch, since {title} would take {times} of its time ({best.origin})")
    reason = f"{title}, {times} of plain PyTorch's time ({best.origin})"
    return Choice(best.implementation, reason, best.ratio)
