"""A step of the model for rows of any length, each with its adapter: new rows' prompts, or the next token of those under way.

Each row has positions of its own, from 0, and sees its own tokens alone, so that nothing depends on who else is there. A step's tokens are padded on
the left, its last column is every row's last token, and only there are logits computed.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlora.bounds import nearly_equal
from fastlora.layers import BASE
from fastlora.serving.adapters import Adapters
from fastlora.serving.slots import Aim, Slots

FULL, SLIDING = "full_attention", "sliding_attention"
"""transformers' names of the kinds of attention that a step has masks for."""
MOST_NOISE = 0.1
"""Of the largest logit: what a batch may differ by from a row alone, however rough the model's own cache is."""


class Batch:
    """A causal model and the slots of its rows.

    Args:
        model: transformers', or PEFT's with the adapters.
        slots: rows that can be under way.
        length: tokens that one can have.

    Raises:
        ValueError: the model is of a kind whose rows cannot join and leave; `require_rows_alone` finds out.
    """

    def __init__(self, model: Any, adapters: Adapters, slots: int, length: int) -> None:
        self.model, self.adapters = model, adapters
        self.cache = Slots(slots, length)
        self.windows = _windows(model.config.get_text_config())

    @torch.inference_mode()
    def step(
        self, first: int, tokens: Sequence[Sequence[int]], starts: Sequence[int], names: Sequence[str]
    ) -> Tensor:  # [rows, V], float32
        """The logits behind each row's last token.

        Args:
            first: the slot of the first row; the others have the next ones.
            tokens: each row's new tokens, at least one.
            starts: how many tokens of each row are in its slot already.
            names: each row's adapter.
        """
        device, width = self.model.device, max(map(len, tokens))
        ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in tokens], device=device)
        begin = torch.tensor(starts, device=device)[:, None]
        end = torch.tensor([start + len(row) for start, row in zip(starts, tokens, strict=True)], device=device)[
            :, None
        ]
        places = end - width + torch.arange(width, device=device)  # [rows, T]
        is_token = places >= begin
        slots = first + torch.arange(len(tokens), device=device)[:, None].expand_as(places)
        reach = max(start + len(row) for start, row in zip(starts, tokens, strict=True))
        whole = all(len(row) == width for row in tokens)
        aim = (slots.flatten(), places.flatten(), None) if whole else (slots[is_token], places[is_token], is_token)
        self.cache.aim = Aim(first, len(tokens), reach, *aim)
        places = places.clamp(min=0)  # padding sees something, too, or attention would give it NaN
        with self.adapters.use(names) as options:
            found = self.model(
                input_ids=ids,
                attention_mask=self._mask(places, reach),
                position_ids=places,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
                **options,
            )
        return found.logits[:, -1].float()

    @torch.inference_mode()
    def begin(self, slot: int, name: str) -> int:
        """Let a row's slot begin with its adapter's soft prompt; returns how many places that takes, 0 where there is none."""
        count = self.adapters.tokens_before(name)
        if count:
            self.cache.fill(slot, self.adapters.prompt_of(name))
        return count

    def _mask(self, places: Tensor, reach: int) -> Any:
        """What each token sees, to be added to its scores: [rows, 1, T, reach], or that by the kind of layer."""
        keys = torch.arange(reach, device=places.device)
        queries = places[:, None, :, None]
        masks: dict[str, Tensor] = {}
        for kind, window in self.windows.items():
            hidden = keys > queries
            if window is not None:
                hidden |= keys <= queries - window
            mask = torch.zeros(hidden.shape, dtype=self.model.dtype, device=places.device)
            masks[kind] = mask.masked_fill_(hidden, torch.finfo(mask.dtype).min)
        return masks if len(masks) > 1 else next(iter(masks.values()))

    @torch.inference_mode()
    def require_rows_alone(self) -> None:
        """Raise ValueError unless two rows of a batch, of unlike lengths, get the logits of each alone, by the model's own forward without a cache.

        But for rounding, of which its own cache shows how much there is.
        """
        size = self.model.config.get_text_config().vocab_size
        drawn = torch.randint(size, (2, 6), generator=torch.Generator().manual_seed(0)).tolist()
        rows, names = [drawn[0][:5], drawn[1][:3]], [BASE, BASE]
        try:
            found = [self.step(0, rows, [0, 0], names)]
            found.append(self.step(0, [drawn[0][5:], drawn[1][3:4]], [5, 3], names))
            for i, lengths in enumerate(((5, 3), (6, 4))):
                for row, length in enumerate(lengths):
                    alone, noise = self._alone(drawn[row][:length])
                    within = (found[i][row] - alone).abs().max() <= min(4 * noise, MOST_NOISE * alone.abs().max())
                    if not within and not nearly_equal(found[i][row], alone):
                        raise ValueError("a row of a batch has other logits than alone")
        except (
            TypeError,
            ValueError,
            IndexError,
            KeyError,
            RuntimeError,
            AttributeError,
        ) as error:
            kind = self.model.config.model_type
            raise ValueError(f"model: {kind} cannot be served in batches whose rows join and leave: {error}") from error

    def _alone(self, row: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The logits [V] behind a row by the model's own forward, in float32, and by how much they differ at most where the last token comes by its
        own cache: in bfloat16, thirty layers turn another order of the same sums into several per cent."""
        ids = torch.tensor([row], device=self.model.device)
        with self.adapters.use([BASE]) as options:
            alone = self.model(input_ids=ids, use_cache=False, **options).logits[0, -1].float()
            begun = self.model(input_ids=ids[:, :-1], use_cache=True, **options).past_key_values
            after = self.model(input_ids=ids[:, -1:], past_key_values=begun, use_cache=True, **options)
        return alone, (after.logits[0, -1].float() - alone).abs().max()


def _windows(config: Any) -> dict[str, int | None]:
    """How many tokens back a layer of each kind sees, itself counted; None: all of them.

    Raises:
        ValueError: the model has layers of another kind.
    """
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or [FULL if window is None else SLIDING])
    if unknown := sorted(kinds - {FULL, SLIDING}):
        raise ValueError(f"model: {config.model_type} has layers of {', '.join(unknown)}, expected {FULL} or {SLIDING}")
    return {kind: window if kind == SLIDING else None for kind in sorted(kinds)}
