"""What a model is called with, of the rows of a batch: padded, or packed where that was asked for.

    padded       as rows, each filled up to the longest
    unpadded     the same, of which LanguageModelLoss runs the rows' own tokens alone, as segments of one row (packing.py)
    positions    as lines in which rows lie end to end, and positions begin again with each: transformers masks them from one another
    bounds       as one line, whose rows' bounds are told: flash attention needs no mask

A packed batch is given in the first of the last three in which the model gives a few rows the logits that they have alone: one that carries more from
token to token than attention does (a state, a convolution, a position that is counted and not given) is found out, whatever it is called.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.utils.generic import is_flash_attention_requested

from fastlora import packing
from fastlora.config import PROMPTS, TrainConfig
from fastlora.course import Course
from fastlora.data.lines import collate_lines, lay
from fastlora.data.rows import Row, collate, count_tokens
from fastlora.language_model_loss import LanguageModelLoss

PADDED, UNPADDED, POSITIONS, BOUNDS = "padded", "unpadded", "positions", "bounds"


class Batching:
    """Rows in, a model's arguments out.

    Args:
        model: whose loss it is, without what DistributedDataParallel puts around it.
        pad: the token that fills up.

    Attributes:
        way: how a batch is given, as above; None where packing was asked for and no batch was given yet.
    """

    def __init__(
        self, config: TrainConfig, model: Any, loss: LanguageModelLoss, pad: int, device: torch.device
    ) -> None:
        self.config, self.model, self.loss = config, model, loss
        self.pad, self.device = pad, device
        self.length = min(config.max_length, config.max_tokens or config.max_length)  # of a line
        self.way: str | None = None if config.packing else PADDED

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """The arguments, and labels.

        Raises:
            ValueError: packing was asked for, and the model gives packed rows other logits than it gives them alone.
        """
        if self.way is None:
            self.way = self._find_way(rows)
        if self.way in (PADDED, UNPADDED):
            return self._there(collate(rows, self.pad))
        if self.way == POSITIONS:
            return self._there(collate_lines(lay(rows, self.length), self.pad))
        lengths = torch.tensor([len(row.input_ids) for row in rows])
        return self._there({**collate_lines([rows], self.pad), **packing.bounds(lengths)})

    def _there(self, given: dict[str, Any]) -> dict[str, Any]:
        """On the model's device."""
        return {name: value.to(self.device) if isinstance(value, Tensor) else value for name, value in given.items()}

    def _find_way(self, rows: Sequence[Row]) -> str:
        config = self.model.config
        if config.is_encoder_decoder:
            raise self._refusal("it has an encoder, whose rows cannot lie in one line")
        self.loss.choose(self._there(collate(rows, self.pad)))
        if self.loss.leaves_padding:
            return UNPADDED
        way = BOUNDS if is_flash_attention_requested(config) else POSITIONS
        words = config.get_text_config(decoder=True).vocab_size
        if self.loss.packs_lines(words, by_bounds=way == BOUNDS):
            return way
        reason = "it gives rows that lie in one line other logits than it gives them alone"
        if self.config.method in PROMPTS and not self.config.accelerate:
            reason += ", since PEFT puts one prompt before all of them: accelerate=True puts one before each"
        raise self._refusal(reason)

    def _refusal(self, reason: str) -> ValueError:
        model = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        return ValueError(f"packing=True: {type(model).__name__} cannot do it: {reason}")

    def plan(self, course: Course) -> str:
        """What an epoch's batches are, for people."""
        batches = list(_batches(course, course.steps_per_epoch))
        tokens, most = sum(map(count_tokens, batches)), sum(self._laid_out(batch) for batch in batches)
        largest = max(self._laid_out(batch) for batch in batches)
        return f"{len(batches):,} batches an epoch, of at most {largest:,} tokens, {100 * tokens / most:.3g} % of them rows'"

    def efficiency(self, course: Course, steps: int) -> float | None:
        """The part of the tokens that ran in so many steps which was the rows' own, over all processes; None without packing, or before a batch."""
        if self.way in (PADDED, None) or not steps:
            return None
        tokens = sum(count_tokens(course.step_rows(step)) for step in range(steps))
        return tokens / sum(self._run_tokens(batch) for batch in _batches(course, steps))

    def _run_tokens(self, rows: Sequence[Row]) -> int:
        return self._laid_out(rows) if self.way == POSITIONS else count_tokens(rows)

    def _laid_out(self, rows: Sequence[Row]) -> int:
        """Tokens of a batch's lines, each filled up to the longest."""
        lines = lay(rows, self.length)
        return len(lines) * max(map(count_tokens, lines))


def _batches(course: Course, steps: int) -> Iterator[Sequence[Row]]:
    """Those of the first steps, of all processes."""
    for step in range(steps):
        rows = course.step_rows(step)
        for process in range(course.processes):
            yield from course.batches(rows, process)
