"""A batch an adapter at a time, for prompts that cannot stand beside one another: prefixes of T5 and BERT, prompts with a half before the decoder.

Each adapter's rows, and those of the base model, are a batch of their own, through the model's plain forward; what comes back is put together
in the batch's order. That is exact, whatever the prompts' lengths, and costs a forward an adapter. A classifier's head is its adapter's as well.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from fastlora.layers import BASE
from fastlora.trees import IGNORE

Run = Callable[[str, dict[str, Any]], Any]
"""An adapter's rows through the model: its name, and what they are given."""
OF_ONE_BATCH = (
    "output_attentions",
    "output_hidden_states",
    "return_dict_in_generate",
    "prefix_allowed_tokens_fn",
    "streamer",
)
"""What is of the whole batch, or tells its rows by number."""


def wholes(base: nn.Module) -> list[Any]:
    """PEFT's modules of which each adapter has its own copy, as of a classifier's head."""
    return [module for module in base.modules() if isinstance(module, AuxiliaryTrainingWrapper)]


def takes_names(base: nn.Module) -> bool:
    """Whether each row of a batch may have another adapter's copies of them."""
    return all(isinstance(module.original_module, nn.Linear) for module in wholes(base))


@contextmanager
def wholes_of(base: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """A context in which each row meets its own adapter's copy, where `takes_names`; or all rows that of their one adapter.

    names: of each row its adapter's.
    """
    modules, one = wholes(base), names[0] if len({*names}) == 1 else None
    before = [(module._active_adapter, module._disable_adapters) for module in modules]
    hooks = []
    try:
        for module in modules:
            if one is None:
                hooks.append(module.register_forward_pre_hook(_naming(names), with_kwargs=True))
            else:
                module._disable_adapters, module._active_adapter = one == BASE, [one]
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, (active, disabled) in zip(modules, before, strict=True):
            module._active_adapter, module._disable_adapters = active, disabled


def _naming(names: Sequence[str]) -> Any:
    return lambda module, args, kwargs: (args, {**kwargs, "adapter_names": [*names]})


def _parts(given: Mapping[str, Any], names: Sequence[str]) -> Iterator[tuple[str, list[int], dict[str, Any]]]:
    """Each adapter with its rows' numbers and what they are given.

    Raises:
        ValueError: something is wanted that is not of rows.
    """
    asked = [name for name in OF_ONE_BATCH if given.get(name)]
    if asked:
        raise ValueError(
            f"{asked[0]}: expected none where rows have prompts of their own, which run an adapter at a time"
        )
    for name in dict.fromkeys(names):
        rows = [row for row, own in enumerate(names) if own == name]
        yield name, rows, {what: _of(value, rows, len(names)) for what, value in given.items()}


def _of(value: Any, rows: list[int], count: int) -> Any:
    return value[rows] if isinstance(value, Tensor) and value.dim() and value.shape[0] == count else value


def forward(run: Run, given: Mapping[str, Any], names: Sequence[str]) -> Any:
    """A batch's output: what is of rows, and as wide for each, in the batch's order, the loss the mean over all labels, and no cache.

    names: of each row its adapter's.

    Raises:
        ValueError: attentions or hidden states are wanted.
    """
    parts, order, losses, labels = [], list[int](), list[Tensor](), list[int]()
    for name, rows, own in _parts(given, names):
        out = run(name, own)
        order += rows
        parts.append(out)
        count = _labels(own.get("labels"))
        if count:
            losses.append(out.loss * count)
            labels.append(count)
    back = torch.tensor(order).argsort()
    together = {
        what: torch.cat([part[what] for part in parts])[back.to(value.device)]
        for what, value in out.items()
        if isinstance(value, Tensor) and value.dim() and len({part[what].shape[1:] for part in parts}) == 1
    }
    if "loss" in out:
        # A batch without a label has the loss that the model gives it.
        together = {"loss": torch.stack(losses).sum() / sum(labels) if labels else out.loss, **together}
    return type(out)(**together)


def _labels(labels: Tensor | None) -> int:
    """Over how many values a loss is the mean."""
    if labels is None:
        return 0
    return labels.numel() if labels.is_floating_point() else int((labels != IGNORE).sum())


def generate(run: Run, given: Mapping[str, Any], names: Sequence[str], pad: int) -> Tensor:  # [B * returned, L]
    """The rows' answers in the batch's order, `num_return_sequences` of each, the shorter ones padded at the right.

    names: of each row its adapter's; pad: the token.

    Raises:
        ValueError: more than the answers is wanted, or what tells rows by their number is given.
    """
    answers: list[list[Tensor]] = [[] for _ in names]
    for name, rows, own in _parts(given, names):
        for row, found in zip(rows, run(name, own).unflatten(0, (len(rows), -1)), strict=True):
            answers[row] = [*found]
    return torch.nn.utils.rnn.pad_sequence([one for row in answers for one in row], batch_first=True, padding_value=pad)
