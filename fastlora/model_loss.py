"""A transformers model's own `loss`, from the logits of its labelled tokens only: what `accelerate(model, loss=True)` puts in.

The model whose forward takes labels gets a class derived from its own, of the same name. That class's forward runs the model's own forward, as it
is, on a stand-in: an object with the model's attributes and submodules, but for the head, which looks at the labelled positions only, and the loss
function, which expects that. What else the model computes, the balance of its experts among it, is its own. Nothing is written into the
model while it runs: threads may share it, and an error leaves nothing behind.
"""

import functools
import inspect
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils import ModelOutput

from fastlora import packing
from fastlora.bounds import nearly_equal
from fastlora.checks import transform_obstacle
from fastlora.language_model_loss import (
    ALL,
    FUSED,
    IGNORE,
    choose_path,
    cross_entropy,
    head_cross_entropy,
    head_obstacle,
    output_embedding,
    undisturbed,
)
from fastlora.packing import UNFIT
from fastlora.swap import become, derive, undo

KEY = "_fastlora_loss"
"""Under which a model's `__dict__` has its State."""
PROBE_TOKENS = 8


@dataclass
class State:
    """What a model is known to allow, and what its last call with labels did."""

    path: str | None = None  # language_model_loss.py's; None before the first call
    reason: str = ""  # why no faster path
    packs: bool = False  # whether padding is left out
    own: str | None = None  # why the last call ran the model's own forward, where the path is another

    def describe(self, replaced: bool) -> tuple[str, str]:
        """(path, reason), for people. replaced: somebody has put another forward before the model's, as TRL and Liger do."""
        last = "" if self.own is None else f"; its last call was the model's own: {self.own}"
        if self.path is None:
            never = f"not called yet, unless compiled{', or by the forward that was put before it' * replaced}"
            return ALL, last.removeprefix("; ") or never
        if self.path == ALL:
            return ALL, f"the model's own loss: {self.reason}{last}"
        how = "a block of the vocabulary at a time" if self.path == FUSED else self.reason
        return self.path, f"logits of labelled tokens only, {how}{last}"


class _Labelled:
    """Stands in the head's place, and has the loss function's, for one call."""

    def __init__(self, head: Any, labels: Tensor, targets: Tensor, *, fused: bool, factor: float = 1.0) -> None:
        """labels: what the model's forward is given; targets [B, T]: each position's own label."""
        self._head, self._labels, self._fused, self._factor = head, labels, fused, factor
        self._counted = targets != IGNORE
        self._targets = targets[self._counted]  # [n]

    def __getattr__(self, name: str) -> Any:  # a model may ask its head for weight or dtype
        return getattr(self._head, name)

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[1, n, V] of hidden [B, T, D]; where it is fused, [1, n, D]."""
        if hidden.shape[:-1] != self._counted.shape:
            expected = [*self._counted.shape, hidden.shape[-1]]
            raise UnfitError(f"the head is given {list(hidden.shape)}, expected {expected}")
        rows = hidden[self._counted.to(hidden.device)][None]
        rows = rows if self._factor == 1.0 else rows * self._factor
        return rows if self._fused else self._head(rows, *args, **kwargs)

    def loss(self, logits: Tensor, labels: Tensor, *_: Any, num_items_in_batch: Any = None, **__: Any) -> Tensor:
        """What transformers' ForCausalLMLoss gives for all positions' logits."""
        targets = self._targets.to(logits.device)
        if labels is not self._labels or logits.shape[:-1] != (1, len(targets)):
            raise UnfitError("the model changes its labels, or what its head gives, before its loss")
        if self._fused:
            total = head_cross_entropy(self._head, logits[0], targets)
        else:
            total = cross_entropy(logits[0], targets)
        if num_items_in_batch is None:
            return total / len(targets)  # nan without a label, as the mean of nothing is
        return total / torch.as_tensor(num_items_in_batch, device=total.device)

    def stand_in(self, model: Any) -> Any:
        """The model, but for its head and its loss function."""
        name = next((name for name, child in model._modules.items() if child is self._head), None)
        if name is None:
            raise UnfitError("the head is not the model's own child")
        twin = object.__new__(type(model))
        twin.__dict__.update(model.__dict__, _modules={**model._modules, name: self}, _loss_function=self.loss)
        return twin


class UnfitError(ValueError):
    """A model does not use its head or its loss function as expected."""


def attach(model: nn.Module) -> None:
    """Swap the class of the outermost transformers model with a language model's head; its path is chosen at the next call.

    Raises:
        ValueError: there is none.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and output_embedding(module) is not None:
            if KEY not in module.__dict__:
                kind: Any = type(module)
                become(module, with_loss(kind))
            module.__dict__[KEY] = State()
            return
    raise ValueError(f"loss=True: {type(model).__name__} has no transformers model with a language model's head in it")


def detach(module: nn.Module) -> None:
    """Give a module its class back, if it was swapped."""
    if module.__dict__.pop(KEY, None) is not None:
        undo(module)


@functools.cache
def with_loss(plain: Any) -> type:
    """The class derived from a transformers model's."""
    parameters = list(inspect.signature(plain.forward).parameters.values())[1:]
    names = [one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD]

    @functools.wraps(plain.forward)  # Trainer reads the signature
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # There is no state where somebody has kept this method over `restore`, as accelerate's wrapper does.
        state = self.__dict__.get(KEY)
        if state is None or torch.compiler.is_compiling() or len(args) > len(names):
            return plain.forward(self, *args, **kwargs)
        return _forward(self, plain, state, {**dict(zip(names, args, strict=False)), **kwargs})

    return derive(plain, with_loss, forward=forward)


def _forward(model: Any, plain: Any, state: State, given: dict[str, Any]) -> Any:
    labels = given.get("labels")
    if labels is None:
        return plain.forward(model, **given)
    state.own = _call_obstacle(model, given)
    if state.own is None:
        head = output_embedding(model)
        if state.path is None or (state.path == FUSED and head_obstacle(head)):
            state.path, state.reason = _choose(model, plain, head, labels)
            state.packs = state.path != ALL and _packs(model, plain)
        if state.path != ALL:
            try:
                return _run(model, plain, head, given, fused=state.path == FUSED, packs=state.packs)
            except UnfitError as error:
                state.path, state.reason = ALL, str(error)
    return plain.forward(model, **given)


def _call_obstacle(model: Any, given: dict[str, Any]) -> str | None:
    """Why a call is the model's own, or None."""
    if not model.training:
        return "the model was in eval mode"
    if not torch.is_grad_enabled():
        return "gradients were off"
    if any(tells(output_embedding(model)) for tells in packing.TELLERS):
        return "the head's rows have adapters of their own"
    kept = given.get("logits_to_keep")
    if isinstance(kept, Tensor) or kept:
        return "logits_to_keep was given"
    if given.get("past_key_values") is not None:  # which a second try would lengthen twice
        return "past_key_values was given"
    if given.get("ignore_index", IGNORE) != IGNORE:
        return f"ignore_index was not {IGNORE}"
    if not (model.config.return_dict if given.get("return_dict") is None else given["return_dict"]):
        return "return_dict was False"
    trainer = sys.modules.get("trl.trainer.sft_trainer")
    if trainer is not None and not hasattr(trainer, "add_fused_lm_head"):
        return "this version of TRL reads the logits"
    return transform_obstacle()


def _run(model: Any, plain: Any, head: Any, given: dict[str, Any], *, fused: bool, packs: bool = False) -> Any:
    """The model's own output, without logits."""
    labels, shifted = given["labels"], given.get("shift_labels")
    if model.config.is_encoder_decoder:
        rows = _Labelled(head, labels, labels, fused=fused)
        out = plain.forward(rows.stand_in(model), **_decoded(model, given))
        loss = rows.loss(out.logits, labels)
        return type(out)(**{**out, "loss": loss, "logits": None})
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE) if shifted is None else shifted
    real = packing.real_tokens(model, given) if packs else None
    if real is not None and not bool((targets[~real] != IGNORE).any()):
        given, targets = packing.pack(given, real), targets[real][None]
        labels = given["labels"]
    rows = _Labelled(head, labels, targets, fused=fused)
    out = plain.forward(rows.stand_in(model), **given)
    return type(out)(**{**out, "logits": None})


def _decoded(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """For an encoder-decoder, which computes its loss itself: what makes the decoder's input of the labels, no loss, and no cache unless asked."""
    rest = {"use_cache": False, **given, "labels": None}
    if rest.get("decoder_input_ids") is None and rest.get("decoder_inputs_embeds") is None:
        rest["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(given["labels"])
    return rest


def _packs(model: Any, plain: Any) -> bool:
    """Whether padding may be left out: nobody sees the places of tokens, since there are no logits."""
    config = model.config
    if config.is_encoder_decoder or config.output_hidden_states or getattr(config, "output_router_logits", False):
        return False
    with undisturbed(model):
        words = config.get_text_config(decoder=True).vocab_size
        return packing.is_exact(lambda **given: plain.forward(model, **given).logits, words)


@torch.no_grad()
def _choose(model: Any, plain: Any, head: Any, like: Tensor) -> tuple[str, str]:
    """(path, reason), by a few tokens for each row of the batch: some adapters have been told of its rows, as aLoRA's are."""
    if model.loss_function is not ForCausalLMLoss:
        return ALL, f"its loss function is {getattr(model.loss_function, '__name__', model.loss_function)}"
    drawn = torch.Generator().manual_seed(0)
    words = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(words, (len(like), PROBE_TOKENS), generator=drawn).to(like.device)
    labels = ids.clone()
    labels[:, ::2] = IGNORE
    given: dict[str, Any] = {"input_ids": ids, "labels": labels}
    without_loss = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        without_loss = _decoded(model, given)

    def rows_of(factor: float = 1.0, without_head: bool = False) -> Tensor:
        rows = _Labelled(head, labels, labels, fused=without_head, factor=factor)
        return plain.forward(rows.stand_in(model), **without_loss).logits[0]

    try:
        with undisturbed(model):
            own = plain.forward(model, **given)
            if not issubclass(type(own), ModelOutput):
                return ALL, f"the model returns a {type(own).__name__}"
            path, reason = choose_path(head, own.logits[labels != IGNORE], rows_of)
            if path == ALL:
                return path, reason
            ours = _run(model, plain, head, given, fused=path == FUSED)
    except UNFIT as error:
        return ALL, f"the model cannot do with a part of its logits: {error}"
    if ours.loss is None or not nearly_equal(ours.loss, own.loss):
        return ALL, "the model's loss is not its labelled tokens' cross entropy"
    return path, reason
