"""The names of a mixed batch, `model(..., adapter_names=[...])`, handed to all layers at once.

PEFT hooks every layer anew in each forward, which costs a small model's token as much as a layer or two, and a hooked layer has no siblings. So
`accelerate` puts `enable` before the context in which a tuner does so. Where every adapted module is one of our layers, the names wait in a context
variable, by layer: each asks for its own. They are seen by the thread, or task, that gave them, as long as its context lasts, and by no other model.

Most of PEFT's tuners have no such context: they ignore the names, and each row has the active adapter. IA³'s layers get theirs here as LoRA's do;
where a model's layers cannot, names are an error.

So are names in training, which PEFT refuses. Where a block's activations are checkpointed, its layers are called again in the backward, behind that
context: what checkpoints a transformers block then remembers the names along with the block's inputs. A loop that trains several adapters at once
hands them out itself, by `training`: with `RowNames`, which also know a batch whose padding was left out.
"""

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Self

import torch
from peft.tuners.lora import LoraModel
from peft.tuners.lora.model import _get_encoder
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from fastlora.layers import BASE
from fastlora.operators.lora_linear import RowGroups, group_rows

METHOD = "_enable_peft_forward_hooks"
"""Of a tuner: the context of a forward, with the arguments of the model's."""

CHECKPOINT = "_gradient_checkpointing_func"
"""Of a transformers block that is checkpointed: (forward, *its inputs)."""

under_way = 0
"""How many contexts are open, in all threads: a layer asks for no names where there are none, and a compiler knows by it when to trace anew."""


class ByRow:
    """What our layers that ask for their names have in common."""


class RowNames(tuple[str, ...]):
    """The adapters of a batch, each once; which example has which stays the same in all layers, and in a batch without its padding.

    As plain names do, it equals another of the same adapters: a layer's plan hangs on nothing else.
    """

    lengths: Sequence[int]
    examples: Sequence[str]
    since: object | None = (
        None  # by who hands them out: as long as it is the same object, nobody has changed a layer or its adapters
    )
    _groups: dict[Any, RowGroups]

    def __new__(cls, examples: Sequence[str], lengths: Sequence[int]) -> Self:
        """examples: the adapter of each; lengths: its tokens."""
        self = super().__new__(cls, dict.fromkeys(examples))
        self.examples, self.lengths, self._groups = examples, lengths, {}
        return self

    def fit(self, x: Tensor) -> bool:
        """Whether x [B, T, K] has an entry an example, or x [1, n, K] a row a token."""
        return len(x) == len(self.examples) or x.shape[:-1].numel() == sum(self.lengths)

    def groups(self, used: tuple[str, ...], x: Tensor) -> RowGroups:
        """The rows of x, sorted once for all layers that have these adapters; they fit."""
        by_token = len(x) != len(self.examples)
        key = used, by_token, x.device, torch.is_inference_mode_enabled()
        found = self._groups.get(key)
        if found is None:
            number = {adapter: i for i, adapter in enumerate(used)}
            index = torch.tensor([number.get(name, -1) for name in self.examples])
            if by_token:
                index = index.repeat_interleave(torch.tensor(self.lengths))
            found = self._groups[key] = group_rows(index.to(x.device), len(used))
        return found


_names: ContextVar[dict[nn.Module, tuple[str, ...]] | None] = ContextVar("fastlora_adapter_names", default=None)
_lock = threading.Lock()


def names_of(layer: nn.Module) -> tuple[str, ...] | None:
    """The names that are handed to a layer just now."""
    given = _names.get()
    return None if given is None else given.get(layer)


def groups_of(names: Sequence[str], used: Sequence[str], x: Tensor) -> RowGroups:
    """The rows of x, sorted by those of their adapters that a layer has."""
    if isinstance(names, RowNames):
        return names.groups(tuple(used), x)
    return _sorted(tuple(names), tuple(used), x.device, torch.is_inference_mode_enabled())


@functools.lru_cache(maxsize=4)
def _sorted(names: tuple[str, ...], used: tuple[str, ...], device: torch.device, inference: bool) -> RowGroups:
    """The rows of a mixed batch, sorted once and shared by all layers and steps that have the same names.

    inference: whether inference mode is on; its tensors are kept apart, since autograd cannot take them.
    """
    number = {adapter: i for i, adapter in enumerate(used)}
    index = torch.tensor([number.get(name, -1) for name in names], device=device)
    return group_rows(index, len(used))


def attach(tuner: nn.Module) -> None:
    """Put `enable` before a tuner's context, or in the place of the one that it lacks; a tuner that has another than LoRA's keeps it."""
    if getattr(type(tuner), METHOD, None) in (None, LoraModel._enable_peft_forward_hooks):
        tuner.__dict__[METHOD] = functools.partial(enable, tuner)


def detach(tuner: nn.Module) -> None:
    tuner.__dict__.pop(METHOD, None)


def enable(tuner: Any, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
    """The context of a forward, or of a generation: ours where it has names to hand out and nothing else to do; else PEFT's own, which knows what to
    raise.

    Raises:
        ValueError: a name is no adapter's, or PEFT would ignore the names.
    """
    names, own = kwargs.get("adapter_names"), getattr(type(tuner), METHOD, None)
    if names is not None and own is None and not isinstance(names, (list, tuple)):
        raise TypeError(f"adapter_names: expected a list with an adapter for each row, got {type(names).__name__}")
    if names is not None and not torch.compiler.is_compiling() and kwargs.get("alora_offsets") is None:
        unknown = sorted(set(names) - {BASE, *tuner.peft_config}) if isinstance(names, (list, tuple)) else []
        if unknown:
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}; loaded are"
                f" {', '.join(tuner.peft_config)}, and {BASE} is none"
            )
        layers = _layers(tuner.model, ByRow)
        if isinstance(names, (list, tuple)) and _are_known(names, layers):
            given = _given(tuner.model, layers, tuple(names), _times(kwargs))
            return _remembering(tuner.model, given) if tuner.training else _handing_out(given)
        if tuner.training and own is LoraModel._enable_peft_forward_hooks and isinstance(names, (list, tuple)):
            return _hooked(tuner, *args, **kwargs)
    if own is None:
        return nullcontext() if names is None else _refuse(tuner)
    context: AbstractContextManager[None] = own(tuner, *args, **kwargs)
    return context


def _refuse(tuner: Any) -> AbstractContextManager[None]:
    """
    Raises:
        ValueError: always. It names the method, and what has no rows of its own.
    """
    methods = ", ".join(dict.fromkeys(str(config.peft_type.value) for config in tuner.peft_config.values()))
    if torch.compiler.is_compiling():
        why = "the model is compiled as a whole"
    else:
        others = (
            f"{name} is a {type(one).__name__}" for name, one in tuner.model.named_modules() if _is_other(one, ByRow)
        )
        why = next(others, "no layer has an adapter of that name")
    raise ValueError(
        f"adapter_names: PEFT ignores them with {methods}, and {why}; rows with adapters of their own are for LoRA, DoRA, IA³ and soft prompts"
    )


def _times(kwargs: dict[str, Any]) -> int:
    """How many rows a generation makes of each of its batch: beams, or answers that are drawn."""
    config = kwargs.get("generation_config")
    found = [kwargs.get(name, getattr(config, name, None)) for name in ("num_beams", "num_return_sequences")]
    return max((one for one in found if isinstance(one, int)), default=1)


def _given(
    model: nn.Module, layers: Sequence[nn.Module], names: tuple[str, ...], times: int
) -> dict[nn.Module, tuple[str, ...]]:
    """The names for each layer. An encoder sees each row once, whatever a generation makes of it."""
    if times <= 1:
        return dict.fromkeys(layers, names)
    given = dict.fromkeys(layers, tuple(name for name in names for _ in range(times)))
    encoder = _get_encoder(model)
    once = set() if encoder is None else set(encoder.modules())
    return {layer: names if layer in once else many for layer, many in given.items()}


def training(tuner: Any, layer_class: type, names: RowNames) -> AbstractContextManager[None]:
    """A context in which the tuner's layers, of that class, run each example by its own adapter, in training, too: forward and backward.

    Raises:
        ValueError: a name is no adapter's, or the model has other modules whose adapter goes by name.
    """
    layers = _layers(tuner.model, layer_class)
    if not layers:
        raise ValueError(
            "model: expected LoRA layers of linear layers alone, each fused (`fastlora.report` says why one is not)"
        )
    if not _are_known(names, layers):
        raise ValueError(f"names={tuple(names)!r}: expected adapters of the model")
    return _handing_out(dict.fromkeys(layers, names))


def _layers(model: nn.Module, layer_class: type) -> list[Any]:
    """The model's layers of that class; none where it has other modules whose adapter goes by name, or may run on other threads."""
    found, left = [], [model]
    while left:
        module = left.pop()
        if isinstance(module, layer_class):
            found.append(module)
        elif _is_other(module, layer_class):
            return []
        else:
            left += [child for child in module._modules.values() if child is not None]
    return found


def _is_other(module: nn.Module, layer_class: type) -> bool:
    """Whether a module's adapter goes by name, and it does not ask for its names; or whether it may run on other threads."""
    others = BaseTunerLayer, AuxiliaryTrainingWrapper, nn.DataParallel
    return isinstance(module, others) and not isinstance(module, layer_class)


def _are_known(names: Sequence[str], layers: Sequence[Any]) -> bool:
    """Whether each name is an adapter's of some layer; a layer may lack it."""
    wanted = set(names) - {BASE}
    for layer in layers:
        wanted -= set(getattr(layer, layer.adapter_layer_names[0]))
        if not wanted:
            return True
    return False


@contextmanager
def _hooked(tuner: Any, *args: Any, **kwargs: Any) -> Iterator[None]:
    """PEFT's own context in training, which it refuses though its modules take names there, as they do in evaluation: embeddings, modules that are
    saved whole, tokens that are trained, and layers left to PEFT.

    Raises:
        ValueError: a block is checkpointed, which would be computed again without its names; or as PEFT's own.
    """
    if any(getattr(block, "gradient_checkpointing", False) for block in tuner.model.modules()):
        other = next(name for name, one in tuner.model.named_modules() if _is_other(one, ByRow))
        raise ValueError(
            f"adapter_names: {other} has no names once a block is computed again; in training they go without gradient checkpointing here"
        )
    with ExitStack() as stack:
        tuner.training = False  # as PEFT asks of the tuner alone
        try:
            stack.enter_context(LoraModel._enable_peft_forward_hooks(tuner, *args, **kwargs))
        finally:
            tuner.training = True
        yield


@contextmanager
def _remembering(model: nn.Module, given: dict[nn.Module, tuple[str, ...]]) -> Iterator[None]:
    """`_handing_out`, again where a checkpointed block is computed again."""
    blocks = [block for block in model.modules() if getattr(block, "gradient_checkpointing", False)]
    own = {block: block.__dict__[CHECKPOINT] for block in blocks if CHECKPOINT in block.__dict__}
    for block, checkpoint in own.items():
        block.__dict__[CHECKPOINT] = functools.partial(_checkpoint, checkpoint, given)
    try:
        with _handing_out(given):
            yield
    finally:
        for block, checkpoint in own.items():
            block.__dict__[CHECKPOINT] = checkpoint


def _checkpoint(
    checkpoint: Callable[..., Any], given: dict[nn.Module, tuple[str, ...]], forward: Callable[..., Any], *args: Any
) -> Any:
    def with_names(*inputs: Any) -> Any:
        with _handing_out(given):
            return forward(*inputs)

    return checkpoint(with_names, *args)


def require_names(seen_mixed: bool) -> None:
    """
    Raises:
        RuntimeError: a layer is called without names in a backward, and its last call had some: somebody checkpoints it in a way of his own.
    """
    if seen_mixed and torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "adapter_names: a layer is computed again in the backward, without the names that it was given; a mixed batch is"
            " checkpointed by model.gradient_checkpointing_enable(), or not at all"
        )


@contextmanager
def _handing_out(given: dict[nn.Module, tuple[str, ...]]) -> Iterator[None]:
    global under_way
    before = _names.set({**(_names.get() or {}), **given})
    with _lock:
        under_way += 1
    try:
        yield
    finally:
        with _lock:
            under_way -= 1
        _names.reset(before)
