"""A padded batch as one row of its real tokens, for models whose attention is fusion.py's: the rest of a block works token by token.

    input_ids [B, T], attention_mask [B, T]  ->  input_ids [1, n], position_ids [1, n], cu_seq_lens_q [B + 1]

Each row's tokens are a segment, which attends to itself alone; positions are those that the padded batch gives. A model that does more across tokens
than attention shows it in `is_exact`, which compares the logits of a small batch either way. Other attentions are transformers' to mask: it tells the
rows apart by positions that begin again (`pack_by_position`), and flash attention is told their bounds (`pack_by_bounds`).
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

    It must where more is given than is known here, where layers are told of a batch's examples, where attention has dropout, and where torch compiles
    a part of the model: what it traces runs the model's own attention.
    """
    ids, mask = given.get("input_ids"), given.get("attention_mask")
    known = all(value is None or name in MAY_BE_GIVEN for name, value in given.items()) and not given.get("use_cache")
    if not known or ids is None or mask is None or ids.device.type != "cpu" or mask.shape != ids.shape:
        return None
    real = mask != 0
    return None if real.all() or not real.any() or keeps_padding(model) else real


def keeps_padding(model: nn.Module) -> bool:
    """Whether a model runs padding now, whatever it gives without."""
    return attention_drops(model) or any(map(is_compiled, model.modules())) or any(tells(model) for tells in TELLERS)


ATTENTION = "Attention"
"""How transformers' names of attentions' classes end."""
DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
"""How an attention's configuration calls its dropout. Most attentions keep it, a number or a module, under this name or another of these."""
KEPT_DROPOUTS = (*DROPOUTS, "attn_dropout", "attn_dropout_p", "attn_drop", "dropout", "dropout_p", "dropout_prob")


def attention_drops(model: nn.Module) -> bool:
    """Whether some attention of the model has dropout now: torch's has that, and ours has not."""
    return any(
        module.training and type(module).__name__.endswith(ATTENTION) and _drops(module) for module in model.modules()
    )


def _drops(attention: nn.Module) -> bool:
    """Whether an attention that is trained drops. Some keep what is dropped of their results under the same names: these count, too."""
    kept = {**vars(attention), **attention._modules}
    found = [kept.get(name) for name in KEPT_DROPOUTS]
    found += [getattr(kept.get("config"), name, None) for name in DROPOUTS]
    rates = (one.p if isinstance(one, nn.Dropout) else one for one in found)
    return any(isinstance(rate, int | float) and rate > 0 for rate in rates)


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile has wrapped the module, or Module.compile was called on it."""
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None


def pack(given: Mapping[str, Any], real: Tensor) -> dict[str, Any]:
    """The arguments of a model's forward without the padding."""
    T = real.shape[1]
    positions = given.get("position_ids")
    positions = torch.arange(T, device=real.device) if positions is None else positions
    per_token = {name: given[name] for name in PER_TOKEN if given.get(name) is not None}
    per_token["position_ids"] = positions.expand(real.shape)
    return {
        **given,
        **{name: value[real][None] for name, value in per_token.items()},
        # Of four dimensions transformers hands a mask on as it is. Whoever looks at this one computes NaN: our attention does not.
        "attention_mask": torch.full((1, 1, 1, 1), torch.nan),
        **bounds(real.sum(1)),
        "use_cache": False,
    }


def bounds(lengths: Tensor) -> dict[str, Any]:
    """Where rows of so many tokens, [rows], begin and end in one, by transformers' names."""
    starts = torch.cat((lengths.new_zeros(1), lengths.cumsum(0))).int()
    longest = int(lengths.max())
    return {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}


def pack_by_bounds(given: Mapping[str, Any], real: Tensor) -> dict[str, Any]:
    """`pack`, for an attention that needs no mask where it is told the rows' bounds."""
    packed = pack(given, real)
    del packed["attention_mask"]
    return packed


def pack_by_position(given: Mapping[str, Any], real: Tensor) -> dict[str, Any]:
    """`pack`, for a model that makes masks of its own from the positions."""
    packed = pack_by_bounds(given, real)
    for name in bounds(real.sum(1)):
        del packed[name]
    return packed


@torch.no_grad()
def is_exact(
    logits_of: Callable[..., Tensor],
    words: int,
    packed_as: Callable[[Mapping[str, Any], Tensor], dict[str, Any]] = pack,
    device: torch.device | None = None,
) -> bool:
    """Whether a model in eval mode gives the same logits [.., .., V] to the tokens of a small batch without padding as with it.

    Rows must not know of one another, to the last bit: the second's logits are the same whatever the first row is. And the logits are the padded
    batch's, within a few times what the model itself makes of padding: in bfloat16, thirty layers turn a rounding into several per cent.

    packed_as: `pack`, or in another way. device: the model's; None: the CPU.
    """
    longest, drawn = max(PROBE_TOKENS), torch.Generator().manual_seed(1)
    ids, other = torch.randint(words, (2, len(PROBE_TOKENS), longest), generator=drawn).to(device)
    other[1] = ids[1]
    real = (torch.arange(longest) < torch.tensor(PROBE_TOKENS)[:, None]).to(device)

    def packed(tokens: Tensor) -> Tensor:
        return logits_of(**packed_as({"input_ids": tokens, "attention_mask": real.long()}, real))[0]

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
