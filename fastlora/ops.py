"""The operators as torch.ops.fastlora.*: schemas, fake kernels, and the choice of implementation.

Implementations are called by name from one table. `csrc` registers its own through the dispatcher as `<op>_cpu` and `<op>_cuda`; Triton's are
put in by `implement`. An operator asks its `choose` which one runs. Nothing falls back in silence: an implementation that is asked for by
FASTLORA_IMPL and cannot run raises.
"""

import functools
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora import reference
from fastlora.choice import table

IMPLEMENTATIONS = ("reference", "cpu", "triton", "cuda")
TITLES = {"cpu": "native C++", "triton": "Triton", "cuda": "CUDA C++"}
WORTH_IT = 0.98  # of plain PyTorch's time: a smaller gain may be noise

# M rows   K in-features   N out-features   R rank   S adapters   B batch rows   T tokens   P prompt length   W = T + longest prompt
SCHEMAS = {
    "lora_linear": "(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, float scale, float dropout_p, Tensor? seed)"
    " -> (Tensor y, Tensor xa, Tensor keep)",
    "lora_linear_backward": "(Tensor dy, Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor xa, Tensor keep, float scale,"
    " float dropout_p, bool need_dx, bool need_da, bool need_db) -> (Tensor dx, Tensor da, Tensor db)",
    "lora_linear_shared": "(Tensor x, Tensor[] weight, Tensor[] bias, Tensor[] lora_a, Tensor[] lora_b, float[] scale, float[] dropout_p,"
    " Tensor? seed) -> (Tensor[] y, Tensor xa, Tensor keep)",
    "lora_linear_shared_backward": "(Tensor[] dy, Tensor x, Tensor[] weight, Tensor[] lora_a, Tensor[] lora_b, Tensor xa, Tensor keep,"
    " float[] scale, float[] dropout_p, bool need_dx, bool need_da, bool need_db) -> (Tensor dx, Tensor da, Tensor db)",
    "frozen_linear": "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    "frozen_linear_backward": "(Tensor dy, Tensor weight) -> Tensor",
    "multi_lora": "(Tensor x, Tensor weight, Tensor? bias, Tensor[] lora_a, Tensor[] lora_b, float[] scale, float[] dropout_p, Tensor? seed,"
    " Tensor order, Tensor offsets) -> (Tensor y, Tensor xa, Tensor keep)",
    "multi_lora_backward": "(Tensor dy, Tensor x, Tensor weight, Tensor[] lora_a, Tensor[] lora_b, Tensor xa, Tensor keep, float[] scale,"
    " float[] dropout_p, Tensor order, Tensor offsets, bool need_dx, bool need_da, bool need_db)"
    " -> (Tensor dx, Tensor da, Tensor db)",
    "multi_lora_shared": "(Tensor x, Tensor[] weight, Tensor[] bias, Tensor[] lora_a, Tensor[] lora_b, float[] scale, float[] dropout_p,"
    " Tensor? seed, Tensor order, Tensor offsets) -> (Tensor[] y, Tensor xa, Tensor keep)",
    "multi_lora_shared_backward": "(Tensor[] dy, Tensor x, Tensor[] weight, Tensor[] lora_a, Tensor[] lora_b, Tensor xa, Tensor keep,"
    " float[] scale, float[] dropout_p, Tensor order, Tensor offsets, bool need_dx, bool need_da, bool need_db)"
    " -> (Tensor dx, Tensor da, Tensor db)",
    "prefix_concat": "(Tensor prompts, Tensor starts, SymInt max_prompt, Tensor prompt_index, Tensor? embeds, Tensor? input_ids,"
    " Tensor? embedding, Tensor attention_mask, Tensor? position_ids, Tensor? labels)"
    " -> (Tensor embeds, Tensor attention_mask, Tensor position_ids, Tensor labels, Tensor source)",
    "prefix_concat_backward": "(Tensor dout, Tensor source, SymInt prompt_rows, SymInt tokens, bool need_prompts, bool need_embeds)"
    " -> (Tensor dprompts, Tensor dembeds)",
}

library = torch.library.Library("fastlora", "DEF")
for _name, _signature in SCHEMAS.items():
    for _suffix in ("", "_cpu", "_cuda"):
        library.define(_name + _suffix + _signature)
# y = x Wᵀ + b for 1 to 8 rows, bound by reading W once: csrc has it, packed.py calls it.
library.define("few_rows_cpu(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
# The same for many rows, in float32.
library.define("product_cpu(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
# A number that changes with the elements of a weight: by it packed.py sees that one was written to.
library.define("fingerprint_cpu(Tensor weight) -> int")


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


_table: dict[tuple[str, str], Callable[..., Any]] = {(op, "reference"): getattr(reference, op) for op in SCHEMAS}
_missing: dict[str, str] = {}
_notes: dict[str, str] = {}
_loaders: dict[str, Callable[[], None]] = {}


def implement(op: str, implementation: str, function: Callable[..., Any]) -> None:
    """Enter `function`, which takes what the schema of `op` takes, under the implementation's name."""
    _table[op, implementation] = function
    table.choices.clear()


def implement_natively(implementation: str, note: str = "") -> None:
    """Enter the operators that fastlora._C has registered with the dispatcher under `<op>_<implementation>`; `availability` tells the note."""
    key = implementation.upper()
    _notes[implementation] = note
    for op in SCHEMAS:
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"fastlora::{op}_{implementation}", key):
            implement(op, implementation, getattr(torch.ops.fastlora, f"{op}_{implementation}").default)


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
    """The function behind `op` (a key of SCHEMAS) in the implementation called `name`.

    Raises:
        ImplementationError: the name is unknown, or the implementation is not on this machine; the message says why.
    """
    if name not in IMPLEMENTATIONS:
        raise ImplementationError(f"unknown implementation {name!r}: expected one of {', '.join(IMPLEMENTATIONS)}")
    _load(name)
    try:
        return _table[op, name]
    except KeyError:
        raise ImplementationError(f"{op} has no implementation {name!r} here: {_absence(op, name)}") from None


def _implemented(name: str) -> list[str]:
    """The operators that an implementation has, none where it is noted as missing (packed.py alone makes no "cpu")."""
    return [] if name in _missing else [op for op in SCHEMAS if (op, name) in _table]


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
        _check_forced()
        obstacle = None if torch.cuda.is_available() else _device_obstacle(forced, torch.device("cpu"))
        if obstacle is None:
            _load(forced)
            obstacle = None if _implemented(forced) else _absence("anything", forced)
        if obstacle is not None:
            raise ImplementationError(f"FASTLORA_IMPL={forced}: {obstacle}")


def _check_forced() -> None:
    if forced not in IMPLEMENTATIONS:
        raise ImplementationError(f"FASTLORA_IMPL={forced!r}: expected one of {', '.join(IMPLEMENTATIONS)}")


EMULATORS = {"triton": "TRITON_INTERPRET", "cuda": "FASTLORA_EMULATED"}
"""Set to 1 where tests run a GPU's kernels on a CPU."""

OLDEST_CARD = (8, 0)
"""The least compute capability that CUDA C++ is compiled for (setup.py)."""

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the compiled implementations compute in; float64 is the reference's."""

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


def _obstacle(op: str, name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the implementation cannot run `op` on this device in this dtype, or None: what nothing mends comes first."""
    obstacle = _device_obstacle(name, device)
    if obstacle is not None:
        return obstacle
    _load(name)
    if (op, name) not in _table:
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
    return [name for name in names if _obstacle(op, name, device, dtype) is None]


def _choose(op: str, like: Tensor, rows: int, elements: int, dropout: bool, weight: Tensor | None = None) -> Choice:
    """What runs `op` on that many rows, with a weight (or a result) of that many elements, in `like`'s dtype and on its device.

    Measured are weights that lie by row, as nn.Linear's. The figures stand for those that lie by column, too, but not for any that would be copied.
    """
    if forced is not None:
        _check_forced()
        obstacle = _obstacle(op, forced, like.device, like.dtype)
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
    """The fastest of plain PyTorch and the candidates that were measured; where none was, the native extension on a CPU."""
    if device.type not in ("cpu", "cuda"):
        return Choice("reference", f"plain PyTorch, since there are no kernels for {device.type} devices")
    obstacle = _obstacle(op, "cpu", device, dtype) if device.type == "cpu" else None
    if obstacle is not None:
        return Choice("reference", f"plain PyTorch, since {obstacle}")
    known = table.lookup(device.type, op, dtype, rows, elements, dropout)
    found = [known[name] for name in candidates(op, device, dtype) if name in known] if known else []
    if not found:
        if device.type == "cpu":
            return Choice("cpu", "native C++, not measured on this kind of CPU")
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


def choose_lora_linear(x: Tensor, weight: Tensor, dropout: bool = False, backward: bool = False) -> Choice:
    """Which implementation runs `lora_linear`, or its backward, on inputs like x [M, K] and weight [N, K], with dropout or without."""
    op = "lora_linear_backward" if backward else "lora_linear"
    return _choose(op, x, x.shape[0], weight.numel(), dropout, weight)


def choose_lora_linear_shared(
    x: Tensor, weight: Tensor, dropout: bool = False, backward: bool = False
) -> tuple[Choice, bool]:
    """What runs layers that share x [M, K], the first of which has weight [N, K], or their backward; and whether it runs them together.

    Together where the implementation that would run the first alone can do so, or where another gains more; else one after the other.
    """
    op = "lora_linear_shared_backward" if backward else "lora_linear_shared"
    return _choose_shared(op, choose_lora_linear(x, weight, dropout, backward), x, weight, dropout)


def choose_multi_lora_shared(
    x: Tensor, weight: Tensor, dropout: bool = False, backward: bool = False
) -> tuple[Choice, bool]:
    """`choose_lora_linear_shared` for layers whose rows have adapters of their own."""
    op = "multi_lora_shared_backward" if backward else "multi_lora_shared"
    return _choose_shared(op, choose_multi_lora(x, weight, dropout, backward), x, weight, dropout)


def _choose_shared(op: str, alone: Choice, x: Tensor, weight: Tensor, dropout: bool) -> tuple[Choice, bool]:
    if forced is None or (op, forced) in _table:
        together = _choose(op, x, x.shape[0], weight.numel(), dropout, weight)
        if together.implementation == alone.implementation or together.ratio < alone.ratio:
            return together, together.implementation != "reference"
    return alone, False


def choose_frozen_linear(x: Tensor, weight: Tensor, backward: bool = False) -> Choice:
    """Which implementation runs `frozen_linear`, or its backward, on inputs like x [M, K] and weight [N, K].

    "cpu" is packed.py, which has its own rule of when oneDNN beats torch. On other devices nothing beats torch's product: "triton" and "cuda"
    have none of their own and, forced, leave it to torch.
    """
    if forced is not None:
        _check_forced()
    if forced in ("triton", "cuda"):
        return Choice("reference", "FASTLORA_IMPL")
    obstacle = _obstacle("frozen_linear", forced or "cpu", x.device, x.dtype)
    if forced is not None and obstacle is not None:
        raise ImplementationError(f"FASTLORA_IMPL={forced}: frozen_linear cannot run: {obstacle}")
    if forced is not None:
        return Choice(forced, "FASTLORA_IMPL")
    if obstacle is not None:
        return Choice("reference", f"plain PyTorch, since {obstacle}")
    return Choice("cpu", "the frozen product alone")


def choose_multi_lora(x: Tensor, weight: Tensor, dropout: bool = False, backward: bool = False) -> Choice:
    """Which implementation runs `multi_lora`, or its backward, on inputs like x [M, K] and weight [N, K], with dropout or without."""
    op = "multi_lora_backward" if backward else "multi_lora"
    return _choose(op, x, x.shape[0], weight.numel(), dropout, weight)


def choose_prefix_concat(embeds: Tensor, rows: int, backward: bool = False) -> Choice:
    """Which implementation runs `prefix_concat`, or its backward, for that many tokens B T with embeddings [..., D] like `embeds`."""
    op = "prefix_concat_backward" if backward else "prefix_concat"
    return _choose(op, embeds, rows, rows * embeds.shape[-1], dropout=False)


def _register(op: str, choice: Callable[..., Choice]) -> None:
    def run(*args: Any) -> Any:
        return implementation(op, choice(*args).implementation)(*args)

    library.impl(op, run, "CompositeExplicitAutograd")


for _stem, _choose_stem in (("lora_linear", choose_lora_linear), ("multi_lora", choose_multi_lora)):
    _register(
        _stem,
        lambda x, weight, bias, a, b, scale, p, seed, *_, choose=_choose_stem: choose(x, weight, seed is not None),
    )
    _register(
        f"{_stem}_backward",
        lambda dy, x, weight, a, b, xa, keep, *_, choose=_choose_stem: choose(x, weight, keep.numel() > 0, True),
    )


def _register_shared(stem: str, choose: Callable[..., tuple[Choice, bool]]) -> None:
    """`stem`_shared and its backward: together, or layer after layer by what runs `stem`."""

    def run(op: str, single: str, like: Tensor, weight: list[Tensor], dropout: bool, args: tuple[Any, ...]) -> Any:
        choice, together = choose(like, weight[0], dropout, backward=single.endswith("_backward"))
        if together:
            return _table[op, choice.implementation](*args)
        return getattr(reference, op)(*args, layer=implementation(single, choice.implementation))

    def forward(*args: Any) -> Any:
        x, weight, _, _, _, _, _, seed, *_ = args
        return run(f"{stem}_shared", stem, x, weight, seed is not None, args)

    def backward(*args: Any) -> Any:
        _, x, weight, _, _, _, keep, *_ = args
        return run(f"{stem}_shared_backward", f"{stem}_backward", x, weight, keep.numel() > 0, args)

    library.impl(f"{stem}_shared", forward, "CompositeExplicitAutograd")
    library.impl(f"{stem}_shared_backward", backward, "CompositeExplicitAutograd")


_register_shared("lora_linear", choose_lora_linear_shared)
_register_shared("multi_lora", choose_multi_lora_shared)
_register("frozen_linear", lambda x, weight, bias: choose_frozen_linear(x, weight))
_register("frozen_linear_backward", lambda dy, weight: choose_frozen_linear(dy, weight, backward=True))
_register(
    "prefix_concat",
    lambda prompts, starts, max_prompt, index, embeds, ids, embedding, mask, *_: choose_prefix_concat(
        embedding if embeds is None else embeds, mask.numel()
    ),
)
_register(
    "prefix_concat_backward",
    lambda dout, *_: choose_prefix_concat(dout, dout.shape[0] * dout.shape[1], backward=True),
)

_fake = functools.partial(torch.library.register_fake, lib=library)


def _xa_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _keep(x: Tensor, dropout_p: list[float], seed: Tensor | None, *layers: int) -> Tensor:
    shape = *layers, x.shape[0], reference.keep_bytes(x.shape[1])
    return x.new_empty(shape if reference.drops(dropout_p, seed) else 0, dtype=torch.uint8)


def _gradients(
    x: Tensor, lora_a: list[Tensor], lora_b: list[Tensor], need_dx: bool, need_da: bool, need_db: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, and every dA and every dB one after the other; without elements where not needed."""
    dx = x.new_empty(x.shape if need_dx else 0)
    da = lora_a[0].new_empty(sum(a.numel() for a in lora_a) if need_da else 0)
    return dx, da, lora_b[0].new_empty(sum(b.numel() for b in lora_b) if need_db else 0)


@_fake("fastlora::lora_linear")
def _(x, weight, bias, lora_a, lora_b, scale, dropout_p, seed):
    xa = x.new_empty(x.shape[0], lora_a.shape[0], dtype=_xa_dtype(x))
    return x.new_empty(x.shape[0], weight.shape[0]), xa, _keep(x, [dropout_p], seed)


@_fake("fastlora::lora_linear_backward")
def _(dy, x, weight, lora_a, lora_b, xa, keep, scale, dropout_p, need_dx, need_da, need_db):
    dx = x.new_empty(x.shape if need_dx else 0)
    da = lora_a.new_empty(lora_a.shape if need_da else 0)
    return dx, da, lora_b.new_empty(lora_b.shape if need_db else 0)


@_fake("fastlora::lora_linear_shared")
def _(x, weight, bias, lora_a, lora_b, scale, dropout_p, seed):
    xa = x.new_empty(x.shape[0], sum(a.shape[0] for a in lora_a), dtype=_xa_dtype(x))
    return [x.new_empty(x.shape[0], w.shape[0]) for w in weight], xa, _keep(x, dropout_p, seed, len(weight))


@_fake("fastlora::lora_linear_shared_backward")
def _(dy, x, weight, lora_a, lora_b, xa, keep, scale, dropout_p, need_dx, need_da, need_db):
    return _gradients(x, lora_a, lora_b, need_dx, need_da, need_db)


@_fake("fastlora::frozen_linear")
def _(x, weight, bias):
    return x.new_empty(x.shape[0], weight.shape[0])


@_fake("fastlora::frozen_linear_backward")
def _(dy, weight):
    return dy.new_empty(dy.shape[0], weight.shape[1])


@_fake("fastlora::multi_lora")
def _(x, weight, bias, lora_a, lora_b, scale, dropout_p, seed, order, offsets):
    xa = x.new_empty(x.shape[0], max(a.shape[0] for a in lora_a), dtype=_xa_dtype(x))
    return x.new_empty(x.shape[0], weight.shape[0]), xa, _keep(x, dropout_p, seed)


@_fake("fastlora::multi_lora_backward")
def _(dy, x, weight, lora_a, lora_b, xa, keep, scale, dropout_p, order, offsets, need_dx, need_da, need_db):
    return _gradients(x, lora_a, lora_b, need_dx, need_da, need_db)


@_fake("fastlora::multi_lora_shared")
def _(x, weight, bias, lora_a, lora_b, scale, dropout_p, seed, order, offsets):
    xa = x.new_empty(len(weight), x.shape[0], max(a.shape[0] for a in lora_a), dtype=_xa_dtype(x))
    return [x.new_empty(x.shape[0], w.shape[0]) for w in weight], xa, _keep(x, dropout_p, seed, len(weight))


@_fake("fastlora::multi_lora_shared_backward")
def _(dy, x, weight, lora_a, lora_b, xa, keep, scale, dropout_p, order, offsets, need_dx, need_da, need_db):
    return _gradients(x, lora_a, lora_b, need_dx, need_da, need_db)


@_fake("fastlora::prefix_concat")
def _(prompts, starts, max_prompt, prompt_index, embeds, input_ids, embedding, attention_mask, position_ids, labels):
    batch, width = attention_mask.shape[0], attention_mask.shape[1] + max_prompt
    out = (embedding if embeds is None else embeds).new_empty(batch, width, prompts.shape[1])
    mask = attention_mask.new_empty(batch, width)
    positions, source = (starts.new_empty(batch, width) for _ in range(2))
    return out, mask, positions, starts.new_empty(0) if labels is None else labels.new_empty(batch, width), source


@_fake("fastlora::prefix_concat_backward")
def _(dout, source, prompt_rows, tokens, need_prompts, need_embeds):
    D = dout.shape[2]
    dprompts = dout.new_empty((prompt_rows, D) if need_prompts else 0, dtype=_xa_dtype(dout))
    return dprompts, dout.new_empty((dout.shape[0], tokens, D) if need_embeds else 0)
