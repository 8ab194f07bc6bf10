"""A padded batch as one row of its real tokens, for models whose attention is fusion.py's: the rest of a block works token by token.

    input_ids [B, T], attention_mask [B, T]  ->  input_ids [1, n], position_ids [1, n], cu_seq_lens_q [B + 1]

Each row's tokens are a segment, which attends to itself alone; positions are those that the padded batch gives. A model that does more across tokens
than attention shows it in `is_exact`, which compares the logits of a small batch either way.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.bounds import nearly_equal

UNFIT = (IndexError, RuntimeError, TypeError, ValueError)
"""What a model raises that cannot do with what it is given."""
PER_TOKEN = ("input_ids", "position_ids", "labels", "shift_labels")
MAY_BE_GIVEN = (*PER_TOKEN, "attention_mask", "num_items_in_batch", "return_dict", "use_cache")
PROBE_TOKENS = (8, 5)  # of the rows of the small batch


TELLERS: list[Callable[[nn.Module], bool]] = []
"""What may tell a module, or those in it, of a batch's examples by their order: each says whether it does so just now."""


def real_tokens(model: nn.Module, given: Mapping[str, Any]) -> Tensor | None:
    """Where a causal model's batch has tokens, bool [B, T]; None where there is no padding to leave out, or it must stay.

    It must where more is given than is known here, where layers are told of a batch's examples, and where torch compiles a part of the model: what it
    traces runs the model's own attention.
    """
    ids, mask = given.get("input_ids"), given.get("attention_mask")
    known = all(value is None or name in MAY_BE_GIVEN for name, value in given.items()) and not given.get("use_cache")
    if not known or ids is None or mask is None or ids.device.type != "cpu" or mask.shape != ids.shape:
        return None
    real = mask != 0
    if real.all() or not real.any() or any(map(is_compiled, model.modules())) or any(tells(model) for tells in TELLERS):
        return None
    return real


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile has wrapped the module, or Module.compile was called on it."""
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None


def pack(given: Mapping[str, Any], real: Tensor) -> dict[str, Any]:
    """The arguments of a model's forward without the padding."""
    T = real.shape[1]
    positions = given.get("position_ids")
    positions = torch.arange(T) if positions is None else positions
    per_token = {name: given[name] for name in PER_TOKEN if given.get(name) is not None}
    per_token["position_ids"] = positions.expand(real.shape)
    lengths = real.sum(1)
    starts = torch.cat((lengths.new_zeros(1), lengths.cumsum(0))).int()
    longest = int(lengths.max())
    return {
        **given,
        **{name: value[real][None] for name, value in per_token.items()},
        # Of four dimensions transformers hands a mask on as it is. Whoever looks at this one computes NaN: our attention does not.
        "attention_mask": torch.full((1, 1, 1, 1), torch.nan),
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": longest,
        "max_length_k": longest,
        "use_cache": False,
    }


@torch.no_grad()
def is_exact(logits_of: Callable[..., Tensor], words: int) -> bool:
    """Whether a model in eval mode gives the same logits [.., .., V] to the tokens of a small batch without padding as with it.

    Rows must not know of one another, to the last bit: the second's logits are the same whatever the first row is. And the logits are the padded
    batch's, within a few times what the model itself makes of padding: in bfloat16, thirty layers turn a rounding into several per cent.
    """
    longest = max(PROBE_TOKENS)
    ids, other = torch.randint(words, (2, len(PROBE_TOKENS), longest), generator=torch.Generator().manual_seed(1))
    other[1] = ids[1]
    real = torch.arange(longest) < torch.tensor(PROBE_TOKENS)[:, None]

    def packed(tokens: Tensor) -> Tensor:
        return logits_of(**pack({"input_ids": tokens, "attention_mask": real.long()}, real))[0]

    try:
        found, found_by_other = packed(ids), packed(other)
        padded = logits_of(input_ids=ids, attention_mask=real.long(), use_cache=False)[real]
        alone = [
            logits_of(input_ids=row[None, :tokens], use_cache=False)[0]
            for row, tokens in zip(ids, PROBE_TOKENS, strict=True)
        ]
    except UNFIT:
        return False
    if found.shape != padded.shape or not torch.equal(found[PROBE_TOKENS[0] :], found_by_other[PROBE_TOKENS[0] :]):
        return False
    noise = (padded - torch.cat(alone)).abs().max()
    return nearly_equal(found, padded) or bool((found - padded).abs().max() <= 4 * noise)
