"""The loss of a language model on its labelled tokens, with no [tokens, vocabulary] tensor where the model allows that."""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from fastlora import packing, trees
from fastlora.bounds import nearly_equal
from fastlora.checks import is_hooked
from fastlora.operators.linear_cross_entropy import (
    LOGITS_AT_ONCE,
    linear_cross_entropy,
    linear_cross_entropy_by_row,
)
from fastlora.packing import UNFIT


def cross_entropy(logits: Tensor, labels: Tensor, losses: Tensor | None = None) -> Tensor:
    """The summed cross entropy of labels [n] under logits [n, V], float32; only a few rows at a time are made float32.

    losses: [n]; out: the rows' own.
    """
    if losses is None:
        return torch.stack(_cross_entropies(logits, labels, "sum")).sum()
    rows = cross_entropy_by_row(logits, labels)
    losses.copy_(rows.detach())
    return rows.sum()


def cross_entropy_by_row(logits: Tensor, labels: Tensor) -> Tensor:
    """`cross_entropy` before its sum, [n]."""
    return torch.cat(_cross_entropies(logits, labels, "none"))


def _cross_entropies(logits: Tensor, labels: Tensor, reduction: str) -> list[Tensor]:
    rows = max(1, LOGITS_AT_ONCE.get(logits.device.type, LOGITS_AT_ONCE["cuda"]) // logits.shape[1])
    parts = zip(logits.split(rows), labels.split(rows), strict=True)
    return [
        checkpoint(_float32_cross_entropy, *part, reduction, use_reentrant=False, preserve_rng_state=False)
        for part in parts
    ]


def _float32_cross_entropy(logits: Tensor, labels: Tensor, reduction: str) -> Tensor:
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction=reduction)


IGNORE = -100  # cross entropy's ignore_index: a label that does not count
FUSED, LABELLED, ALL = "fused", "labelled", "all"
PROBE_TOKENS = 16
STRETCHED_LOGIT = 100.0  # beyond what a head gives in training; any soft cap shows there


class LanguageModelLoss:
    """The summed cross entropy of a batch's labelled tokens under any transformers model with a language model's head.

    Its path is chosen at the first call, by comparing a few positions' values with the model's own logits in eval mode:

        fused      the labelled positions' hidden states and the head's weight go to `linear_cross_entropy` (a model that scales its logits scales
                   the hidden states in their place)
        labelled   the model's own head, and what the model does after it, on the labelled positions only
        all        the model's own logits of all positions

    A padded batch is run without its padding where packing.py finds that the model gives the same then.

    Compile a model's layers, not the whole model: its forward must stay Python's, so that the head can be told its rows.

    In training mode a mixture of experts whose config has output_router_logits adds its routers' loss (Fedus et al. 2021, Switch Transformers,
    section 2.2), times router_aux_loss_coef and once a labelled token, as the model adds it to its own mean.

    Args:
        model: what is called; DistributedDataParallel may stand around it.

    Attributes:
        path: fused, labelled or all; None before the first call.
        reason: why no faster path was taken.
        packs: whether padding is left out.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.path: str | None = None
        self.reason = ""
        self.packs = False
        self._inner: Any = model.module if isinstance(model, DistributedDataParallel) else model

    def __call__(self, batch: Mapping[str, Tensor], losses: Tensor | None = None) -> Tensor:
        """The sum, a scalar in float32 (float64 for a float64 model).

        Args:
            batch: input_ids and labels [B, T] int64, with -100 for a token that does not count; what else the model takes. A causal model's labels
                are its input's own tokens; an encoder-decoder's are the decoder's tokens.
            losses: [n], float32; out: the labelled tokens' own, row after row, without a gradient.
        """
        if losses is None:
            return self._compute(batch, cross_entropy, head_cross_entropy)
        return self._compute(
            batch,
            functools.partial(cross_entropy, losses=losses),
            functools.partial(head_cross_entropy, losses=losses),
        )

    def by_token(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The labelled tokens' own losses [n], float32, row after row: whoever trains several adapters on a batch weighs them apart.

        Args:
            batch: as of the sum.

        Raises:
            ValueError: the head has an adapter, or is trained; the routers' loss is wanted, which is no token's.
        """
        if router_loss_coefficient(self._inner):
            raise ValueError(
                "model: its config has output_router_logits, whose loss is no single row's: expected false"
            )
        return self._compute(batch, cross_entropy_by_row, _head_cross_entropy_by_row)

    def choose(self, batch: Mapping[str, Tensor]) -> None:
        """Choose the path by a batch, as the first call does by its own."""
        self._require_path(output_embedding(self._inner), self._inputs(batch)[0])

    @property
    def leaves_padding(self) -> bool:
        """Whether a padded batch would run without its padding now; False before the first call."""
        return self.packs and self._inner.device.type == "cpu" and not packing.keeps_padding(self._inner)

    def packs_lines(self, words: int, by_bounds: bool) -> bool:
        """Whether the model gives rows that lie end to end the logits of the rows alone, told of them by their bounds, or by their positions.

        words: of its vocabulary.
        """
        packed_as = packing.pack_by_bounds if by_bounds else packing.pack_by_position
        with torch.no_grad(), undisturbed(self._inner):
            return packing.is_exact(lambda **given: self._inner(**given).logits, words, packed_as, self._inner.device)

    def _require_path(self, head: Any, inputs: Mapping[str, Any]) -> None:
        if self.path is None or (self.path == FUSED and head_obstacle(head)):
            self.path, self.reason = self._choose(head, inputs)

    def _compute(
        self, batch: Mapping[str, Tensor], of_logits: Callable[..., Tensor], of_head: Callable[..., Tensor]
    ) -> Tensor:
        inputs, counted, labels = self._inputs(batch)
        head = output_embedding(self._inner)
        self._require_path(head, inputs)
        real = packing.real_tokens(self._inner, inputs) if self.packs else None
        if real is not None and not bool((counted & ~real).any()):
            inputs, counted = packing.pack(inputs, real), counted[real][None]
        out: list[Any] = []

        def model(**given: Any) -> Any:
            out.append(self.model(**given))
            return out[0]

        if self.path == ALL:
            loss = of_logits(_own_logits(model, inputs, counted), labels)
        else:
            rows = _rows_of(model, head, inputs, counted, without_head=self.path == FUSED)
            loss = of_head(head, rows, labels) if self.path == FUSED else of_logits(rows, labels)
        of_routers, coefficient = getattr(out[0], "aux_loss", None), router_loss_coefficient(self._inner)
        if of_routers is None or not coefficient or not self._inner.training:
            return loss
        return loss + coefficient * len(labels) * of_routers.to(loss)

    def _inputs(self, batch: Mapping[str, Tensor]) -> tuple[dict[str, Any], Tensor, Tensor]:
        """What the model is called with; the positions that count, bool [B, T]; their labels [n]."""
        labels = batch["labels"]
        inputs: dict[str, Any] = {name: value for name, value in batch.items() if name != "labels"}
        inputs["use_cache"] = False
        if self._inner.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = self._inner.prepare_decoder_input_ids_from_labels(labels)
        else:
            labels = F.pad(labels[:, 1:], (0, 1), value=IGNORE)  # a position's label is the next token
        counted = labels != IGNORE
        return inputs, counted, labels[counted]

    @torch.no_grad()
    def _choose(self, head: Any, inputs: Mapping[str, Any]) -> tuple[str, str]:
        """(path, reason)"""
        if head is None:
            return ALL, "the model names no output embedding"
        before = head_obstacle(head)  # a sharded head is whole for a while after a forward
        probe, counted = _probe(inputs)
        with undisturbed(self._inner):
            own = _own_logits(self._inner, probe, counted)
            # A model whose rows share what they begin with leaves padding out itself.
            shares = any(trees.KEY in module.__dict__ for module in self._inner.modules())
            if not self._inner.config.is_encoder_decoder and not shares:
                self.packs = packing.is_exact(lambda **given: self._inner(**given).logits, own.shape[1])
            path, reason = choose_path(head, own, functools.partial(_rows_of, self._inner, head, probe, counted))
            return (LABELLED, before) if path == FUSED and before is not None else (path, reason)


def router_loss_coefficient(model: Any) -> float:
    """What a model's routers' loss is multiplied by before it is added to the tokens'; 0 where the model has none, or its config wants none of it."""
    config = model.config.get_text_config()
    wanted = getattr(config, "output_router_logits", False) is True
    return float(getattr(config, "router_aux_loss_coef", 0.0)) if wanted else 0.0


def _own_logits(model: Any, inputs: Mapping[str, Any], counted: Tensor) -> Tensor:
    """The logits [n, V] of the positions [B, T] that count; a soft prompt's, which stand in front of them, are none of those."""
    return model(**inputs).logits[:, -counted.shape[1] :][counted]


def choose_path(head: Any, own: Tensor, rows_of: Callable[..., Tensor]) -> tuple[str, str]:
    """(path, reason) by the logits of a few positions.

    own: [n, V], the model's own logits of these positions among others.
    rows_of: takes factor and without_head, as `_rows_of` does; what the model gives for these positions alone.
    """
    try:
        if not nearly_equal(rows_of(), own):
            return ALL, "the head's logits are not the model's position by position"
    except UNFIT as error:
        return ALL, f"the model cannot do with a part of its logits: {error}"
    obstacle = head_obstacle(head)
    if obstacle is not None:
        return LABELLED, obstacle
    for factor in (1.0, STRETCHED_LOGIT / max(own.abs().max().item(), 1e-3)):
        theirs = rows_of(factor=factor)
        try:
            rows = rows_of(factor=factor, without_head=True)
            ours = head(rows) if hasattr(head, LOSS) else F.linear(rows, head.weight, head.bias)
        except UNFIT as error:
            return LABELLED, f"the model changes the logits after its head: {error}"
        if not nearly_equal(ours, theirs):
            return LABELLED, "the model changes the logits after its head"
    return FUSED, ""


LOSS = "cross_entropy"
"""The method by which a head that is more than a product computes its own loss, of hidden states [n, D], labels [n] and losses, without logits; and
`cross_entropy_obstacle` says why it cannot, or None. A LoRA layer has them once it is accelerated (peft/layers.py).
"""


def head_cross_entropy(head: Any, hidden: Tensor, labels: Tensor, losses: Tensor | None = None) -> Tensor:
    """The summed cross entropy of labels [n] under the head's logits of hidden [n, D]; the head has no obstacle.

    losses: [n]; out: the rows' own.
    """
    if hasattr(head, LOSS):
        loss: Tensor = getattr(head, LOSS)(hidden, labels, losses)
        return loss
    return linear_cross_entropy(hidden, head.weight, head.bias, labels, losses)


def _head_cross_entropy_by_row(head: Any, hidden: Tensor, labels: Tensor) -> Tensor:
    if hasattr(head, LOSS):
        raise ValueError("the head has an adapter: its tokens' losses are not told apart")
    return linear_cross_entropy_by_row(hidden, head.weight, head.bias, labels)


def output_embedding(model: Any) -> Any:
    get = getattr(model, "get_output_embeddings", None)
    return get() if get else None


def head_obstacle(head: nn.Module) -> str | None:
    """Why the head is more than a product with its weight, or None as far as one can see without its values."""
    if hasattr(head, LOSS):
        obstacle: str | None = getattr(head, f"{LOSS}_obstacle")()
        return "the head carries a hook" if obstacle is None and is_hooked(head) else obstacle
    if not isinstance(head, nn.Linear) or next(head.children(), None) is not None:
        return f"the head is a {type(head).__name__}"
    if type(head.weight) not in (nn.Parameter, Tensor):
        return f"the head's weight is a {type(head.weight).__name__}"
    if is_hooked(head):
        return "the head carries a hook"
    return None


def _rows_of(
    model: Any,
    head: nn.Module,
    inputs: Mapping[str, Any],
    counted: Tensor,
    *,
    factor: float = 1.0,
    without_head: bool = False,
) -> Tensor:
    """The logits [n, V] of the positions that count when the head sees only them; without the head, their hidden states [n, D], times a factor."""

    def select(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]
        places = trees.look_up(counted)
        if places is not None:
            rows = hidden.flatten(0, 1)[places][None]
        elif hidden.shape[:-1] == counted.shape:
            rows = hidden[counted][None]
        else:
            raise ValueError(f"the head is given {list(hidden.shape)}, expected {[*counted.shape, hidden.shape[-1]]}")
        return (rows if factor == 1.0 else rows * factor, *args[1:])

    handle = head.register_forward_pre_hook(select, prepend=True)
    if without_head:
        head.forward = lambda hidden: hidden
    try:
        logits = model(**inputs).logits
    finally:
        handle.remove()
        if without_head:
            del head.forward
    if logits.shape[:-1] != (1, int(counted.sum())):
        raise ValueError(f"the model returns logits {list(logits.shape)}")
    return logits[0]


def _probe(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """A few tokens of the batch's first row, and every second position of them."""
    ids, mask = inputs["input_ids"][:1], inputs.get("attention_mask")
    if mask is not None and mask.dim() == 2:
        ids = ids[:, mask[0].bool()]
    probe = {"input_ids": ids[:, :PROBE_TOKENS], "use_cache": False}
    if "decoder_input_ids" in inputs:
        probe["decoder_input_ids"] = inputs["decoder_input_ids"][:1, :PROBE_TOKENS]
    counted = torch.zeros_like(probe.get("decoder_input_ids", probe["input_ids"]), dtype=torch.bool)
    counted[:, ::2] = True
    return probe, counted


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """`evaluating`, and uncompiled."""
    with evaluating(model), torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; afterwards every module's mode is as before."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
