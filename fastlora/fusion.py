"""What stands between the linear layers of a Llama-like model, in fewer passes: what `accelerate(model, fuse=True)` puts in.

    norm         x w / sqrt(mean(x²) + eps)           operators/rms_norm.py
    mlp          down(silu(gate(x)) up(x))            operators/swiglu.py, between the layers
    attention    rotary embeddings, and attention     operators/rotary.py and attention.py, where transformers would call torch's

A module's class is swapped where what it computes, on a few random numbers, is what the operator computes: names prove nothing, since Gemma's
norm adds one to its weight. Attention runs the model's own forward, as it is, but for two names in it. What an operator does not cover in some
call (a trained norm, another dtype, dropout, a mask, a cache) runs the module's own forward; so does what torch.compile traces, which fuses too.
"""

import functools
import types
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fastlora import checks, ops, packing, reference
from fastlora.bounds import nearly_equal
from fastlora.operators.attention import check_segments, within
from fastlora.operators.rms_norm import rms_norm
from fastlora.operators.rotary import rotary
from fastlora.operators.swiglu import swiglu
from fastlora.swap import become, derive, is_derived, put_in, undo

ROTARY, INTERFACES = "apply_rotary_pos_emb", "ALL_ATTENTION_FUNCTIONS"
"""How the attentions of transformers call what turns their queries and keys, and the table of what attends."""

ROWS, WIDTH = 3, 8  # of the random numbers
SEEN = "_fastlora_fused"
"""Under which a part's `__dict__` has its last call, for `report`."""


class Seen(NamedTuple):
    """The last call of a part."""

    rows: int  # tokens
    elements: int  # of x, of the gate, or of the queries
    dtype: torch.dtype
    device: torch.device
    obstacle: str | None  # why it ran the module's own forward


def _note(module: nn.Module, x: Tensor, width: int, obstacle: str | None) -> None:
    """width: elements of a token."""
    module.__dict__[SEEN] = Seen(x.numel() // max(width, 1), x.numel(), x.dtype, x.device, obstacle)


def _obstacle(op: str, width: int, *tensors: Any) -> str | None:
    """Why the operator may not run on these, or None: they are alike, nobody transforms, and something is faster there than the model's own forward.

    width: elements of a token in the first.
    """
    first = tensors[0]
    if not all(isinstance(one, Tensor) and one.dtype == first.dtype and one.device == first.device for one in tensors):
        return f"it is given {' and '.join(map(checks.shown, tensors))}"
    if any(map(checks.is_sharded, tensors)):
        return "it is given a DTensor"
    choice = ops.choose(op, first, first.numel() // max(width, 1), first.numel(), dropout=False)
    if choice.implementation == "reference" and ops.forced is None:
        return choice.reason
    return checks.transform_obstacle()


_forwards: dict[Any, Any] = {}
"""The forward of each class that another was derived from, as it was then; None where that was not its own."""


def _own_forward(plain: Any) -> Any:
    return _forwards.setdefault(plain, None if put_in(plain) else plain.forward)


def _is_overtaken(module: nn.Module) -> bool:
    """Whether the class of a swapped part has another forward since."""
    plain: Any = next((one for one in type(module).__mro__ if one in _forwards), None)
    return is_derived(module) and plain is not None and plain.forward is not _forwards[plain]


OVERTAKEN = "another forward was put into its class"


def _drawn(*shape: int, like: Tensor | None = None) -> Tensor:
    """Random numbers, the same each time."""
    numbers = torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))
    return numbers if like is None else numbers.to(like)


@functools.cache
def with_norm(plain: Any) -> type:
    """The class derived from a root mean square norm's."""
    own = _own_forward(plain)

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        weight = self._parameters["weight"]
        if torch.compiler.is_compiling():
            return plain.forward(self, hidden_states)
        trained = "its weight is trained" if weight.requires_grad else None
        overtaken = None if plain.forward is own else OVERTAKEN
        obstacle = overtaken or trained or _obstacle("rms_norm", len(weight), hidden_states, weight)
        _note(self, hidden_states, len(weight), obstacle)
        if obstacle is not None:
            return plain.forward(self, hidden_states)
        return rms_norm(hidden_states, weight, _eps(self))

    return derive(plain, with_norm, forward=forward)


def _eps(norm: Any) -> Any:
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


def _is_norm(module: Any) -> bool:
    weight = module._parameters.get("weight")
    if len(module._parameters) != 1 or module._modules or weight is None or weight.dim() != 1 or not _eps(module):
        return False
    if checks.is_sharded(weight):
        return False
    x = _drawn(ROWS, len(weight), like=weight)
    return nearly_equal(type(module).forward(module, x), reference.rms_norm(x, weight, _eps(module))[0])


@functools.cache
def with_mlp(plain: Any) -> type:
    """The class derived from a gated MLP's."""
    own = _own_forward(plain)

    def forward(self: Any, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return plain.forward(self, x)
        if plain.forward is not own:
            _note(self, x, x.shape[-1], OVERTAKEN)
            return plain.forward(self, x)
        gate, up = self.gate_proj(x), self.up_proj(x)
        obstacle = _obstacle("swiglu", gate.shape[-1], gate, up)
        _note(self, gate, gate.shape[-1], obstacle)
        return self.down_proj(swiglu(gate, up) if obstacle is None else self.act_fn(gate) * up)

    return derive(plain, with_mlp, forward=forward)


def _is_mlp(module: Any) -> bool:
    if {"gate_proj", "up_proj", "down_proj", "act_fn"} != module._modules.keys() or module._parameters:
        return False
    gate, up = _drawn(ROWS, WIDTH) * 4, _drawn(ROWS, WIDTH) + 1
    layers = {"gate_proj": lambda _: gate, "up_proj": lambda _: up, "down_proj": lambda y: y}
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__, _modules={**module._modules, **layers})
    return nearly_equal(type(module).forward(twin, gate), reference.swiglu(gate, up))


@functools.cache
def with_attention(plain: Any) -> type:
    """The class derived from an attention's: its own forward, in which two names mean something else."""
    names = plain.forward.__globals__
    return _renaming(
        plain,
        with_attention,
        {ROTARY: _Rotary(names[ROTARY], names), INTERFACES: _Interfaces(names[INTERFACES], attend)},
    )


@functools.cache
def with_segments(plain: Any) -> type:
    """The class derived from an attention's that attends by our operator where it is told of segments and their parents, and else as it is."""
    interfaces = plain.forward.__globals__[INTERFACES]
    derived = _renaming(plain, with_segments, {INTERFACES: _Interfaces(interfaces, attend_segments)})
    _segmented.add(derived)
    return derived


_segmented: set[type] = set()
"""What `with_segments` has derived."""


def _renaming(plain: Any, make: Callable[[Any], type], meanings: dict[str, Any]) -> type:
    """The class derived from an attention's, in whose forward these names mean something else."""
    own, still = plain.forward, _own_forward(plain)
    ours = types.FunctionType(
        own.__code__, {**own.__globals__, **meanings}, own.__name__, own.__defaults__, own.__closure__
    )
    ours.__kwdefaults__ = own.__kwdefaults__

    @functools.wraps(own)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if plain.forward is still and not torch.compiler.is_compiling():
            return ours(self, *args, **kwargs)
        if kwargs.get("segment_parents") is not None:
            raise ValueError(
                "segment_parents: got them in a compiled model, or one whose attention's class was given another forward, expected neither: "
                "its own attention runs"
            )
        return plain.forward(self, *args, **kwargs)

    return derive(plain, make, forward=forward)


def _is_attention(module: Any) -> bool:
    if not _names(module, ROTARY, INTERFACES):
        return False
    own = type(module).forward
    if getattr(module, "sliding_window", None) is not None:
        return False
    q, k, cos, sin = (
        _drawn(2, 3, ROWS, WIDTH),
        _drawn(2, 1, ROWS, WIDTH),
        _drawn(2, ROWS, WIDTH),
        _drawn(2, ROWS, WIDTH),
    )
    turned = own.__globals__[ROTARY](q, k, cos, sin)
    return all(map(nearly_equal, turned, reference.rotary(q, k, cos, sin)))


def _names(module: Any, *names: str) -> bool:
    """Whether a module's forward is a function that reads these of its file's names."""
    own = type(module).forward
    return isinstance(own, types.FunctionType) and set(names) <= set(own.__code__.co_names)


class _Rotary:
    """In the place of a model's `apply_rotary_pos_emb`."""

    def __init__(self, own: Callable[..., Any], names: Mapping[str, Any] = types.MappingProxyType({})) -> None:
        """names: the model's file's, where somebody may put another by and by."""
        self.own, self.names = own, names

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *more: Any, **options: Any) -> Any:
        now = self.names.get(ROTARY, self.own)
        if now is not self.own:
            return now(q, k, cos, sin, *more, **options)
        fits = not more and not options and q.dim() == 4 and cos.dim() == 3 and cos.shape[-1] == q.shape[-1]
        fits = fits and not cos.requires_grad and not sin.requires_grad
        if not fits or _obstacle("rotary", q.shape[1] * q.shape[3], q, k, cos, sin) is not None:
            return self.own(q, k, cos, sin, *more, **options)
        return rotary(q, k, cos, sin)


class _Interfaces:
    """In the place of transformers' table of attentions: in torch's place there stands another."""

    def __init__(self, own: Any, other: Callable[..., Any]) -> None:
        self.own, self.other = own, other

    def get_interface(self, name: str, default: Any) -> Any:
        found = self.own.get_interface(name, default)
        return self.other if found is sdpa_attention_forward else found


def attend_segments(module: Any, *args: Any, **options: Any) -> tuple[Tensor, None]:
    """As transformers' sdpa_attention_forward, and where there are segments with parents, `attend`: sharing.py gives none that a window cuts."""
    there = options.get("segment_parents") is not None
    if there:
        options.pop("sliding_window", None)
    found: tuple[Tensor, None] = (attend if there else sdpa_attention_forward)(module, *args, **options)
    return found


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """As transformers' sdpa_attention_forward, of q [B, H, T, D], k and v: by our operator where nothing is masked but what comes later.

    options: cu_seq_lens_q [segments + 1] says which of a batch's one row of tokens see one another; the mask then says nothing else. segment_parents
    [segments] says whose keys they see before their own (operators/attention.py), which lie as cu_seq_lens_k has it. key_roots has for each layer the
    keys and values [1, key heads, their rows, D] that lie before all others, of segments without queries.

    Raises:
        ValueError: there is a cu_seq_lens_q, no mask that says the same, and more that the operator has not; segment_parents is no tree, or without a
            cu_seq_lens_q.
    """
    starts, parents = options.get("cu_seq_lens_q"), options.get("segment_parents")
    key_starts = None if parents is None else options.get("cu_seq_lens_k")
    before = options.pop("key_roots", None)
    if before is not None:
        key, value = (torch.cat(pair, 2) for pair in zip(before[module.layer_idx], (key, value), strict=True))
    if parents is not None and starts is None:
        raise ValueError("segment_parents: got no cu_seq_lens_q beside it, expected where its segments begin")
    obstacle = _attention_obstacle(query, key, value, None if starts is not None else attention_mask, options)
    if obstacle is None and starts is None:
        obstacle = _obstacle("attention", query.shape[1] * query.shape[3], query, key, value)
    _note(module, query, query.shape[1] * query.shape[3], obstacle)
    if obstacle is not None:
        if starts is not None and (parents is not None or not _says(attention_mask)):
            raise ValueError(f"cu_seq_lens_q: rows without padding cannot be attended to: {obstacle}")
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    B, H, T, D = query.shape
    causal, scale = options.get("is_causal"), options.get("scaling")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    scale = D**-0.5 if scale is None else scale
    starts = torch.arange(B + 1) * T if starts is None else starts.to("cpu", torch.int64)
    parents, key_starts = (None if one is None else one.to("cpu", torch.int64) for one in (parents, key_starts))
    q, k, v = (one.transpose(1, 2).flatten(0, 1) for one in (query, key, value))
    if parents is not None:
        check_segments(starts, len(q), parents, key_starts, len(k))
    return within(q, k, v, starts, scale, causal, parents, key_starts).view(B, T, H, D), None


def _says(mask: Tensor | None) -> bool:
    """Whether a mask tells what is seen: that of a batch without padding (packing.py) is NaN."""
    return mask is not None and not bool(mask.isnan().any())


PLAIN_OPTIONS = (
    "scaling",
    "is_causal",
    "dropout",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
    "segment_parents",
)
IGNORED_OPTIONS = (
    "position_ids",
    "use_cache",
    "num_items_in_batch",  # this and the next two are the loss's: transformers hands every part all that a model was given
    "shift_labels",
    "ignore_index",
    "output_attentions",
    "output_hidden_states",
    "seq_idx",  # of texts packed in a row, as cu_seq_lens_q has them
)


def _attention_obstacle(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> str | None:
    """Why torch attends in the operator's place, or None."""
    if options.get("dropout"):
        return "attention has dropout"
    if mask is not None:
        return "there is a mask"
    more = [
        name
        for name, one in options.items()
        if one is not None and one is not False and name not in (*PLAIN_OPTIONS, *IGNORED_OPTIONS)
    ]
    if more:
        return f"it is given {', '.join(more)}"
    if query.device.type != "cpu":
        return f"torch has its own on {query.device.type} devices"
    more_keys = query.shape[2] != key.shape[2] and options.get("segment_parents") is None
    if more_keys or query.shape[3] != value.shape[3] or query.shape[0] != key.shape[0]:
        return "there are other keys than queries"
    return None


class Part(NamedTuple):
    fits: Callable[[Any], bool]  # whether a module is what its class's name says
    derived: Callable[[Any], type]  # the class that it is swapped to
    ops: tuple[str, ...]  # that its forward calls; the first gives its name to what is told


PARTS = {
    "RMSNorm": Part(_is_norm, with_norm, ("rms_norm",)),
    "MLP": Part(_is_mlp, with_mlp, ("swiglu",)),
    packing.ATTENTION: Part(_is_attention, with_attention, ("attention", "rotary")),
}
"""By how transformers' names of their classes end."""


def _parts(model: nn.Module) -> Iterator[tuple[Part, nn.Module]]:
    for module in model.modules():
        for ending, part in PARTS.items():
            if type(module).__name__.endswith(ending):
                yield part, module


@torch.no_grad()
def attach(model: nn.Module) -> None:
    """Swap the classes of the model's parts, as far as they are what we think they are."""
    for part, module in _parts(model):
        if type(module) in _segmented:
            undo(module)
        if not is_derived(module) and _fits(part, module):
            become(module, part.derived(type(module)))


def _fits(part: Part, module: nn.Module) -> bool:
    """Whether a part is what its class's name says; who can be tried on no few numbers, as what runs on a card alone, is not."""
    if put_in(type(module)) or any(one.is_meta for one in module.parameters(recurse=False)):
        return False
    try:
        return part.fits(module)
    except packing.UNFIT:
        return False


def attach_segments(model: nn.Module) -> None:
    """Swap the classes of attentions that `attach` has not swapped, for segments with parents alone."""
    for part, module in _parts(model):
        if part is PARTS[packing.ATTENTION] and not is_derived(module) and _names(module, INTERFACES):
            kind: Any = type(module)
            become(module, with_segments(kind))


def detach(module: nn.Module) -> None:
    """Give a part its class back, if it was swapped."""
    if any(type(module).__name__.endswith(ending) for ending in PARTS):
        undo(module)
        module.__dict__.pop(SEEN, None)


def weights(model: nn.Module) -> dict[str, list[Tensor]]:
    """For each operator that the swapped parts call, tensors of their dtype and device (choice/trial.py)."""
    found: dict[str, list[Tensor]] = defaultdict(list)
    for part, module in _parts(model):
        if is_derived(module):
            for op in part.ops[:1] if type(module) in _segmented else part.ops:
                found[op].append(next(module.parameters()))
    return found


def describe(model: nn.Module) -> list[tuple[str, str, str]]:
    """(which parts, implementation, reason), for people, where some part of the model was swapped: of their last calls, alike ones together."""
    alike: dict[tuple[str, str, str], int] = defaultdict(int)
    parts = list(_parts(model))
    for part, module in parts if any(_is_fused(module) for _, module in parts) else []:
        alike[type(module).__name__, *_explain(part, module)] += 1
    return [(f"{count} x {name}", implementation, reason) for (name, implementation, reason), count in alike.items()]


def _is_fused(module: nn.Module) -> bool:
    return is_derived(module) and type(module) not in _segmented


def attends(model: nn.Module) -> bool:
    """Whether all of a model's attention is swapped for ours."""
    found = [_is_fused(module) for part, module in _parts(model) if part is PARTS[packing.ATTENTION]]
    return bool(found) and all(found)


def _attends_otherwise(model: nn.Module) -> bool:
    """Whether an attention's class has another forward since, which needs the mask."""
    return any(_is_overtaken(module) for part, module in _parts(model) if part is PARTS[packing.ATTENTION])


packing.TELLERS.append(_attends_otherwise)


def _explain(part: Part, module: nn.Module) -> tuple[str, str]:
    if put_in(type(module)) or _is_overtaken(module):
        return "transformers", f"its own forward: {OVERTAKEN}"
    if not _is_fused(module):
        return "transformers", f"its own forward: it computes something else than {part.ops[0]}"
    seen: Seen | None = module.__dict__.get(SEEN)
    if seen is None:
        return "transformers", "not called yet, unless compiled"
    if seen.obstacle is not None:
        return "transformers", f"its own forward: {seen.obstacle}"
    try:
        like = torch.empty(0, dtype=seen.dtype, device=seen.device)
        implementation, reason, _ = ops.choose(part.ops[0], like, seen.rows, seen.elements, dropout=False)
    except ops.ImplementationError as error:
        return str(ops.forced), f"cannot run: {error}"
    return implementation, f"{part.ops[0]}, {seen.rows} rows: {reason}"
