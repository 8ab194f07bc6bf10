"""The operators as torch.ops.fastlora.*: schemas, fake kernels, and the choice of implementation.

Implementations are called by name from one table. `csrc` registers its own through the dispatcher as `<op>_cpu` and `<op>_cuda`; Triton's are
put in by `implement`. An operator asks its `choose` which one runs. Nothing falls back in silence: an implementation that is asked for by
FASTLORA_IMPL and cannot run raises.
"""

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora import reference

IMPLEMENTATIONS = ("reference", "cpu", "triton", "cuda")

# M rows   K in-features   N out-features   R rank   S adapters   B batch rows   T tokens   P prompt length   W = T + longest prompt
SCHEMAS = {
    "lora_linear": "(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, float scale, float dropout_p, Tensor? seed)"
    " -> (Tensor y, Tensor xa)",
    "lora_linear_backward": "(Tensor dy, Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor xa, float scale, float dropout_p,"
    " Tensor? seed, bool need_dx, bool need_da, bool need_db) -> (Tensor dx, Tensor da, Tensor db)",
    "multi_lora": "(Tensor x, Tensor weight, Tensor? bias, Tensor[] lora_a, Tensor[] lora_b, float[] scale, float[] dropout_p, Tensor? seed,"
    " Tensor order, Tensor offsets) -> (Tensor y, Tensor xa)",
    "multi_lora_backward": "(Tensor dy, Tensor x, Tensor weight, Tensor[] lora_a, Tensor[] lora_b, Tensor xa, float[] scale,"
    " float[] dropout_p, Tensor? seed, Tensor order, Tensor offsets, bool need_dx, bool need_da, bool need_db)"
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


class ImplementationError(RuntimeError):
    """An implementation was asked for by name and is not here or cannot take these inputs."""


class Choice(NamedTuple):
    implementation: str  # one of IMPLEMENTATIONS
    reason: str


class Availability(NamedTuple):
    implementation: str
    present: bool
    reason: str  # what it is, or why it is missing and what that costs


_table: dict[tuple[str, str], Callable[..., Any]] = {(op, "reference"): getattr(reference, op) for op in SCHEMAS}
_missing: dict[str, str] = {}
_loaders: dict[str, Callable[[], None]] = {}


def implement(op: str, implementation: str, function: Callable[..., Any]) -> None:
    """Enter `function`, which takes what the schema of `op` takes, under the implementation's name."""
    _table[op, implementation] = function


def implement_natively(implementation: str) -> None:
    """Enter the operators that fastlora._C has registered with the dispatcher under `<op>_<implementation>`."""
    key = implementation.upper()
    for op in SCHEMAS:
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"fastlora::{op}_{implementation}", key):
            implement(op, implementation, getattr(torch.ops.fastlora, f"{op}_{implementation}").default)


def implement_later(implementation: str, load: Callable[[], None]) -> None:
    """Call `load`, which calls `implement`, when the implementation is first asked for; an ImportError then says that it is missing."""
    _loaders[implementation] = load


def mark_missing(implementation: str, reason: str) -> None:
    """Note why an implementation is not here; `availability` and errors quote it."""
    _missing[implementation] = reason


def _load(implementation: str) -> None:
    load = _loaders.get(implementation)
    if load is not None:
        try:
            load()
        except ImportError as error:
            mark_missing(implementation, f"cannot be imported: {error}")
        del _loaders[implementation]


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
        raise ImplementationError(
            f"{op} has no implementation {name!r} here: {_missing.get(name, 'not built')}"
        ) from None


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
        present = ("lora_linear", name) in _table
        if name == "reference":
            found.append(Availability(name, True, "plain PyTorch"))
        elif present:
            found.append(Availability(name, True, ", ".join(op for op in SCHEMAS if (op, name) in _table)))
        else:
            found.append(Availability(name, False, f"{_missing.get(name, 'not built')}; {costs[name]}"))
    return found


def _forced_by_environment() -> str | None:
    name = os.environ.get("FASTLORA_IMPL")
    if name and name not in IMPLEMENTATIONS:
        raise ImplementationError(f"FASTLORA_IMPL={name!r}: expected one of {', '.join(IMPLEMENTATIONS)}")
    return name or None


forced: str | None = _forced_by_environment()
"""FASTLORA_IMPL, read once: the implementation that every operator must use."""


KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the compiled implementations compute in; float64 is the reference's."""


def _obstacle(op: str, name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the implementation cannot run `op` on this device in this dtype, or None."""
    _load(name)
    if (op, name) not in _table:
        return f"{name} is {_missing.get(name, 'not built')}"
    if name == "reference":
        return None
    if dtype not in KERNEL_DTYPES:
        return f"{name} does not compute in {str(dtype).removeprefix('torch.')}"
    interpreted = name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != ("cpu" if name == "cpu" else "cuda") and not interpreted:
        return f"{name} does not run on {device.type} devices"
    return None


def _choose(op: str, device: torch.device, dtype: torch.dtype) -> Choice:
    """A fixed order, for now: the native extension on a CPU; plain PyTorch elsewhere, until a measurement says otherwise."""
    if forced is not None:
        obstacle = _obstacle(op, forced, device, dtype)
        if obstacle is not None:
            raise ImplementationError(f"FASTLORA_IMPL={forced}: {op} cannot run: {obstacle}")
        return Choice(forced, "FASTLORA_IMPL")
    if device.type == "cpu":
        obstacle = _obstacle(op, "cpu", device, dtype)
        return Choice("reference", obstacle) if obstacle else Choice("cpu", "native C++")
    if device.type == "cuda":
        return Choice(
            "reference", "no measurement for this GPU is shipped; FASTLORA_IMPL=triton runs the Triton kernels"
        )
    return Choice("reference", f"no kernels for {device.type} devices")


def choose_lora_linear(x: Tensor) -> Choice:
    """Which implementation runs `lora_linear` and its backward on inputs like x [M, K]."""
    return _choose("lora_linear", x.device, x.dtype)


def choose_multi_lora(x: Tensor) -> Choice:
    """Which implementation runs `multi_lora` and its backward on inputs like x [M, K]."""
    return _choose("multi_lora", x.device, x.dtype)


def choose_prefix_concat(embeds: Tensor) -> Choice:
    """Which implementation runs `prefix_concat` and its backward for embeddings like `embeds` ([V, D] or [B, T, D])."""
    return _choose("prefix_concat", embeds.device, embeds.dtype)


def _register(op: str, choice: Callable[..., Choice]) -> None:
    def run(*args: Any) -> Any:
        return implementation(op, choice(*args).implementation)(*args)

    library.impl(op, run, "CompositeExplicitAutograd")


_register("lora_linear", lambda x, *_: choose_lora_linear(x))
_register("lora_linear_backward", lambda dy, x, *_: choose_lora_linear(x))
_register("multi_lora", lambda x, *_: choose_multi_lora(x))
_register("multi_lora_backward", lambda dy, x, *_: choose_multi_lora(x))
_register(
    "prefix_concat",
    lambda prompts, starts, max_prompt, index, embeds, ids, embedding, *_: choose_prefix_concat(
        embedding if embeds is None else embeds
    ),
)
_register("prefix_concat_backward", lambda dout, *_: choose_prefix_concat(dout))

_fake = functools.partial(torch.library.register_fake, lib=library)


def _xa_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


@_fake("fastlora::lora_linear")
def _(x, weight, bias, lora_a, lora_b, scale, dropout_p, seed):
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], lora_a.shape[0], dtype=_xa_dtype(x))


@_fake("fastlora::lora_linear_backward")
def _(dy, x, weight, lora_a, lora_b, xa, scale, dropout_p, seed, need_dx, need_da, need_db):
    dx = x.new_empty(x.shape if need_dx else 0)
    da = lora_a.new_empty(lora_a.shape if need_da else 0)
    return dx, da, lora_b.new_empty(lora_b.shape if need_db else 0)


@_fake("fastlora::multi_lora")
def _(x, weight, bias, lora_a, lora_b, scale, dropout_p, seed, order, offsets):
    rank = max(a.shape[0] for a in lora_a)
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], rank, dtype=_xa_dtype(x))


@_fake("fastlora::multi_lora_backward")
def _(dy, x, weight, lora_a, lora_b, xa, scale, dropout_p, seed, order, offsets, need_dx, need_da, need_db):
    dx = x.new_empty(x.shape if need_dx else 0)
    da = lora_a[0].new_empty(sum(a.numel() for a in lora_a) if need_da else 0)
    return dx, da, lora_b[0].new_empty(sum(b.numel() for b in lora_b) if need_db else 0)


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
