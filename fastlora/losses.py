"""The loss of a language model on its labelled tokens, with no [tokens, vocabulary] tensor where the model allows that.

    loss = sum over labelled rows of  logsumexp(h Wᵀ + b) - (h Wᵀ + b)[label]
    dh   = softmax(h Wᵀ + b) W - W[label]

Seen as attention, dh's first term has the hidden states for queries and W for keys and values. Hence it is computed like flash attention (Dao et
al., 2022, arXiv:2205.14135): block after block of the vocabulary, each weighed by the largest logit so far, in one pass over W.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from fastlora import functional
from fastlora.data.rows import IGNORE
from fastlora.layers import is_hooked

ROWS_AT_ONCE = 1024
LOGITS_AT_ONCE = {"cpu": 2**21, "cuda": 2**26}  # on a CPU 8 MiB in float32, which stay in the last-level cache


class LinearCrossEntropyFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels):  # [n, D], [V, D], [V], [n] -> sum of losses, scalar
        dhidden = _accumulator(hidden, hidden.shape).zero_() if ctx.needs_input_grad[0] else None  # [n, D]
        highest, total, picked = (_accumulator(hidden, (hidden.shape[0], 1)) for _ in range(3))  # [n, 1]
        for rows in _slices(hidden.shape[0], ROWS_AT_ONCE):
            gradient = None if dhidden is None else dhidden[rows]
            found = highest[rows], total[rows], picked[rows]
            _pass_over_vocabulary(hidden[rows], weight, bias, labels[rows], *found, gradient)
        ctx.save_for_backward(hidden, weight, bias, labels, highest, total, dhidden)
        return (highest - picked + total.log()).sum()

    @staticmethod
    @functional.differentiable_once
    def backward(ctx, saved, dloss):
        hidden, weight, bias, labels, highest, total, dhidden = saved
        dx = None if dhidden is None else (dhidden * dloss).to(hidden.dtype)
        if not any(ctx.needs_input_grad[1:3]):
            return dx, None, None, None
        with functional._without_autocast(hidden.device):
            dweight, dbias = _weight_gradients(hidden, weight, bias, labels, highest, total, dloss)
        return dx, dweight, dbias, None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """The summed cross entropy of labels under logits = hidden weightᵀ + bias, whose gradients need no logits kept.

    The logits are rounded to hidden's dtype, as a language model's head does it; softmax and all sums are in float32 (float64 for float64). The
    gradient of hidden is computed along with the loss; a trained weight's or bias's takes the product of the logits once more.

    Torch's own F.linear_cross_entropy (2.13) keeps a float32 copy of a bfloat16 weight on a CPU, rounds the sum of the losses to bfloat16, and takes
    1.3 to 13 times this one's time there (2 cores of an AMD Zen 4, 512 x 576 rows, vocabulary 49,152), hence this one.

    Args:
        hidden: [n, D]. Under autocast it is cast to autocast's dtype.
        weight: [V, D], of hidden's dtype; under autocast it is cast block by block.
        bias: [V] or None.
        labels: [n] int64, each from 0 to V - 1.

    Returns:
        A scalar, float32 or float64.

    Raises:
        TypeError, ValueError: an argument has another shape or dtype, or is on another device.
        IndexError: a label is out of range.
    """
    dtype = functional._autocast_dtype(hidden)
    _check(hidden, weight, bias, labels, autocast=dtype is not None)
    functional.check_transforms(hidden, weight, bias)
    hidden = hidden.to(dtype or hidden.dtype)
    with functional._without_autocast(hidden.device):
        return LinearCrossEntropyFunction.apply(hidden, weight, bias, labels)


def _check(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, autocast: bool) -> None:
    functional._check_floats(hidden, "hidden")
    if hidden.dim() != 2:
        raise functional._wrong("hidden", hidden, "shape [n, D]")
    _check_like(weight, "weight", 2, hidden, autocast)
    if weight.shape[1] != hidden.shape[1]:
        raise functional._wrong("weight", weight, f"shape [V, {hidden.shape[1]}]")
    if bias is not None:
        _check_like(bias, "bias", 1, hidden, autocast)
        if bias.shape != weight.shape[:1]:
            raise functional._wrong("bias", bias, f"shape [{weight.shape[0]}]")
    functional._check_integers(labels, "labels", hidden.shape[:1], hidden.device)
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < weight.shape[0]:
        raise IndexError(f"labels: expected numbers from 0 to {weight.shape[0] - 1}")


def _check_like(value: Any, name: str, dimensions: int, hidden: Tensor, autocast: bool) -> None:
    functional._check_floats(value, name)
    if value.dim() != dimensions or value.device != hidden.device or not (autocast or value.dtype == hidden.dtype):
        expected = f"{dimensions} dimensions, dtype {hidden.dtype} and device {hidden.device} as hidden has"
        raise functional._wrong(name, value, expected)


def _accumulator(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    return like.new_empty(shape, dtype=torch.promote_types(like.dtype, torch.float32))


def _slices(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def _vocabulary_blocks(rows: int, weight: Tensor) -> Iterator[slice]:
    at_once = LOGITS_AT_ONCE.get(weight.device.type, LOGITS_AT_ONCE["cuda"])
    return _slices(weight.shape[0], max(1, at_once // max(rows, 1)))


class _Block(NamedTuple):
    """A block of the vocabulary: its part of W, and what its labels are there."""

    weight: Tensor  # [v, D]
    logits: Tensor  # [n, v], of which the caller may make what it likes
    here: Tensor  # [n, 1], whether the row's label is in this block
    label: Tensor  # [n, 1], the label counted from the block's start; 0 where it is in another


def _block(x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, columns: slice, scratch: Tensor) -> _Block:
    w = weight[columns].to(x.dtype)
    b = None if bias is None else bias[columns].to(x.dtype)
    logits = torch.ops.fastlora.frozen_linear(x, w, b)
    if logits.dtype != scratch.dtype:  # a new tensor for each block would cost more in page faults than the copy
        logits = scratch[: logits.numel()].view_as(logits).copy_(logits)
    here = ((labels >= columns.start) & (labels < columns.stop))[:, None]
    return _Block(w, logits, here, (labels[:, None] - columns.start) * here)


def _scratch(x: Tensor, weight: Tensor) -> Tensor:
    """Room for a block's logits in float32, empty where they are that already."""
    columns = next(_vocabulary_blocks(x.shape[0], weight))
    is_wide = x.dtype in (torch.float32, torch.float64)
    return _accumulator(x, (0 if is_wide else x.shape[0] * columns.stop,))


def _pass_over_vocabulary(
    x: Tensor,  # [n, D]
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,  # [n]
    highest: Tensor,  # [n, 1], out: the largest logit
    total: Tensor,  # [n, 1], out: the sum of exp(logit - highest)
    picked: Tensor,  # [n, 1], out: the labels' logits
    dx: Tensor | None,  # [n, D], zeros; out: the gradient
) -> None:
    scratch = _scratch(x, weight)
    highest.fill_(torch.finfo(highest.dtype).min)
    total.zero_()
    for columns in _vocabulary_blocks(x.shape[0], weight):
        block = _block(x, weight, bias, labels, columns, scratch)
        picked.copy_(torch.where(block.here, block.logits.gather(1, block.label), picked))
        higher = torch.maximum(highest, block.logits.amax(1, keepdim=True))
        weights = block.logits.sub_(higher).exp_()
        shrink = (highest - higher).exp_()
        total.mul_(shrink).add_(weights.sum(1, keepdim=True))
        if dx is not None:
            dx.mul_(shrink).add_(torch.ops.fastlora.frozen_linear_backward(weights.to(x.dtype), block.weight))
        highest.copy_(higher)
    if dx is not None:
        dx.div_(total).sub_(weight[labels])


def _weight_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, highest: Tensor, total: Tensor, dloss: Tensor
) -> tuple[Tensor, Tensor | None]:
    """(dW [V, D], db [V]): the logits once more, and softmax - one-hot summed over the rows in float32.

    The largest logit goes first, then the division: one rounded logarithm of the sum would stand in every softmax, with an error of its own size.
    """
    dweight, dbias = torch.empty_like(weight), None if bias is None else torch.empty_like(bias)
    rows_at_once = min(hidden.shape[0], ROWS_AT_ONCE)
    scratch = _scratch(hidden[:rows_at_once], weight)
    for columns in _vocabulary_blocks(rows_at_once, weight):
        dw = _accumulator(hidden, dweight[columns].shape).zero_()
        db = dw.new_zeros(dw.shape[0])
        for rows in _slices(hidden.shape[0], ROWS_AT_ONCE):
            x = hidden[rows]
            block = _block(x, weight, bias, labels[rows], columns, scratch)
            dlogits = block.logits.sub_(highest[rows]).exp_().mul_(dloss / total[rows])
            dlogits.scatter_add_(1, block.label, -block.here.to(dlogits.dtype) * dloss)
            dw.add_(dlogits.to(x.dtype).t() @ x)
            db.add_(dlogits.sum(0))
        dweight[columns] = dw
        if dbias is not None:
            dbias[columns] = db
    return dweight, dbias


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The summed cross entropy of labels [n] under logits [n, V], float32; only a few rows at a time are made float32."""
    rows = max(1, LOGITS_AT_ONCE.get(logits.device.type, LOGITS_AT_ONCE["cuda"]) // logits.shape[1])
    parts = zip(logits.split(rows), labels.split(rows), strict=True)
    losses = [
        checkpoint(_float32_cross_entropy, *part, use_reentrant=False, preserve_rng_state=False) for part in parts
    ]
    return torch.stack(losses).sum()


def _float32_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="sum")


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

    Compile a model's layers, not the whole model: its forward must stay Python's, so that the head can be told its rows.

    Args:
        model: what is called; DistributedDataParallel may stand around it.

    Attributes:
        path: fused, labelled or all; None before the first call.
        reason: why no faster path was taken.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.path: str | None = None
        self.reason = ""
        self._inner: Any = model.module if isinstance(model, DistributedDataParallel) else model

    def __call__(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The sum, a scalar in float32 (float64 for a float64 model).

        Args:
            batch: input_ids and labels [B, T] int64, with -100 for a token that does not count; what else the model takes. A causal model's labels
                are its input's own tokens; an encoder-decoder's are the decoder's tokens.
        """
        inputs, counted, labels = self._inputs(batch)
        head = _output_embedding(self._inner)
        if self.path is None or (self.path == FUSED and _obstacle(head)):
            self.path, self.reason = self._choose(head, inputs)
        if self.path == ALL:
            return cross_entropy(self.model(**inputs).logits[counted], labels)
        rows = _rows_of(self.model, head, inputs, counted, without_head=self.path == FUSED)
        if self.path == FUSED:
            return linear_cross_entropy(rows, head.weight, head.bias, labels)
        return cross_entropy(rows, labels)

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
        probe, counted = _probe(inputs)
        with _undisturbed(self._inner):
            own = self._inner(**probe).logits[counted]  # [n, V]
            try:
                if not _equal(_rows_of(self._inner, head, probe, counted), own):
                    return ALL, "the head's logits are not the model's position by position"
            except (IndexError, RuntimeError, TypeError, ValueError) as error:
                return ALL, f"the model cannot do with a part of its logits: {error}"
            obstacle = _obstacle(head)
            if obstacle is not None:
                return LABELLED, obstacle
            for factor in (1.0, STRETCHED_LOGIT / max(own.abs().max().item(), 1e-3)):
                theirs = _rows_of(self._inner, head, probe, counted, factor=factor)
                try:
                    hidden = _rows_of(self._inner, head, probe, counted, factor=factor, without_head=True)
                    ours = F.linear(hidden, head.weight, head.bias)
                except (IndexError, RuntimeError, TypeError, ValueError) as error:
                    return LABELLED, f"the model changes the logits after its head: {error}"
                if not _equal(ours, theirs):
                    return LABELLED, "the model changes the logits after its head"
        return FUSED, ""


def _output_embedding(model: Any) -> Any:
    get = getattr(model, "get_output_embeddings", None)
    return get() if get else None


def _obstacle(head: nn.Module) -> str | None:
    """Why the head is more than a product with its weight, or None as far as one can see without its values."""
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
        if hidden.shape[:-1] != counted.shape:
            raise ValueError(f"the head is given {list(hidden.shape)}, expected {[*counted.shape, hidden.shape[-1]]}")
        rows = hidden[counted][None]
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


def _equal(logits: Tensor, expected: Tensor) -> bool:
    """Whether logits are the same but for rounding; NaN is not."""
    bound = max(4 * torch.finfo(expected.dtype).eps, 1e-3) * expected.abs().max()
    return logits.shape == expected.shape and bool((logits - expected).abs().max() <= bound)


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """The model in eval mode and uncompiled; afterwards every module's mode is as before."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, training in modes.items():
            module.training = training
