"""Tokens as text while they come, up to a stop string. What is handed out stays: no half character, no beginning of a stop string."""

from collections.abc import Sequence
from typing import Any

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
MOST_BYTES = 4  # of a character in UTF-8, and so the most tokens of one


class Words:
    """The text of one answer.

    Args:
        stops: strings, none of them empty, at the first of which the text ends; it is not part of it.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        self.stopped = False
        self._tokens: list[int] = []
        self._before = self._done = 0  # where decoding starts, and where what is not yet text begins
        self._held = ""

    def push(self, token: int) -> str:
        """What another token adds to the text, as far as that is certain."""
        self._tokens.append(token)
        return self._hand_out(self._decode(last=False), last=False)

    def close(self) -> str:
        """What is left at the end of the answer."""
        return self._hand_out(self._decode(last=True), last=True)

    def _decode(self, last: bool) -> str:
        # Behind the last few tokens, not alone: a tokenizer may drop the space that a text begins with.
        end = len(self._tokens)
        known, whole = self._text(self._before, self._done), self._text(self._before, end)
        if whole.endswith(UNFINISHED) and not last:
            if end - self._done < MOST_BYTES:
                return ""
            end = self._done + 1  # what the first of them begins is no character, the others may yet become one
            whole = self._text(self._before, end)
        elif len(whole) <= len(known):
            return ""
        self._before, self._done = self._done, end
        return whole[len(known) :]

    def _text(self, start: int, end: int) -> str:
        tokens = self._tokens[start:end]
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return self.tokenizer.decode(tokens, **options) if tokens else ""

    def _hand_out(self, text: str, last: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        found = [start for stop in self.stops if (start := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        kept = 0 if last else self._beginning(text)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def _beginning(self, text: str) -> int:
        """How many characters at the text's end may be a stop string's first."""
        most = min(len(text), max(map(len, self.stops), default=1) - 1)
        lengths = range(most, 0, -1)
        return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in self.stops)), 0)
