"""A prompt's tokens, in training as in generation, and which of them stay where there is no room for all.

What the tokenizer opens every text with stays, and of the prompt itself the latest tokens. Of messages more stays: what the chat template writes
before the words of the first message that is no system's, that message and its header, say. What follows begins with the words of a later message
of the same role, the first from which on there is room: a row is as if the conversation had begun with that. Where there is room for none, the
last one's words lose their oldest tokens.
"""

from bisect import bisect_left
from os.path import commonprefix
from typing import Any

from jinja2 import TemplateError

from fastlora.data import pairs
from fastlora.data.examples import BadLine, Message, Prompt

INSTRUCTING = ("system", "developer")  # roles whose messages stand before the conversation


def encode_prompt(
    tokenizer: Any, prompt: Prompt, encoder_decoder: bool = False, tools: list[dict[str, Any]] | None = None
) -> list[int]:
    """The tokens before the completion, or an encoder's, in training as in generation.

    Text gets the tokenizer's own first tokens; messages go through the chat template, which opens the assistant's turn. A
    tokenizer that closes every text, with the end token or another, does not close a prompt, but of an encoder.
    """
    if encoder_decoder:
        return pairs.encode_prompt(tokenizer, prompt)
    if isinstance(prompt, str):
        return opening_of(tokenizer) + tokens_of(tokenizer, prompt)
    return tokens_of(tokenizer, render(tokenizer, prompt, tools, add_generation_prompt=True))


def cut_prompt(
    tokenizer: Any, ids: list[int], length: int, prompt: Prompt = "", tools: list[dict[str, Any]] | None = None
) -> list[int]:
    """A prompt's tokens without the oldest of those beyond `length`, as `encode` cuts a row's.

    Args:
        ids: the prompt's tokens, all of them.
        prompt, tools: what they are of.
    """
    first, start = stays(tokenizer, ids, length, prompt, tools)
    return ids[:first] + ids[start:]


def stays(
    tokenizer: Any, ids: list[int], length: int, prompt: Prompt, tools: list[dict[str, Any]] | None = None
) -> tuple[int, int]:
    """How many of a prompt's first tokens stay, and where its last ones begin, at most `length` in all."""
    if len(ids) <= length:
        return len(ids), len(ids)
    first = min(kept_first(ids, tokenizer, opening_of(tokenizer)), length - 1)
    if not isinstance(prompt, str):
        try:
            in_turns = _stays_of_messages(tokenizer, ids, length, prompt, tools)
        except (TemplateError, BadLine):  # a template may refuse the words that it is asked for
            in_turns = None
        if in_turns is not None:
            return in_turns
    return first, len(ids) - (length - first)


def _stays_of_messages(
    tokenizer: Any, ids: list[int], length: int, messages: list[Message], tools: list[dict[str, Any]] | None
) -> tuple[int, int] | None:
    """None where the template's own words alone would fill it."""
    spoken = [place for place, message in enumerate(messages) if message["role"] not in INSTRUCTING]
    if not spoken:
        return None
    role = messages[spoken[0]]["role"]
    begins = [place for place in spoken if messages[place]["role"] == role]

    def around(place: int) -> tuple[int, int]:
        """How many tokens stand before a message's words, and how many behind: those that do not change with the words."""
        words = (messages[place].get("content") or "").lstrip()
        other = {**messages[place], "content": "a" if words.startswith("0") else "0"}
        changed = [*messages[:place], other, *messages[place + 1 :]]
        tokens = tokens_of(tokenizer, render(tokenizer, changed, tools, add_generation_prompt=True))
        return len(commonprefix((ids, tokens))), len(commonprefix((ids[::-1], tokens[::-1])))

    first = around(begins[0])[0]
    if first + around(len(messages) - 1)[1] >= length:
        return None
    later = begins[1:]
    found = bisect_left(later, True, key=lambda place: first + len(ids) - around(place)[0] <= length)
    return first, around(later[found])[0] if found < len(later) else len(ids) - (length - first)


def kept_first(ids: list[int], tokenizer: Any, opening: list[int]) -> int:
    """How many tokens at the start are not the prompt's own: a chat template may write the begin token itself, or not."""
    if opening and ids[: len(opening)] == opening:
        return len(opening)
    return int(bool(ids) and ids[0] == tokenizer.bos_token_id)


def opening_of(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer puts before every text."""
    plain, framed = tokens_of(tokenizer, "a"), tokenizer("a", verbose=False)["input_ids"]
    for start in range(len(framed) - len(plain) + 1):
        if plain and framed[start : start + len(plain)] == plain:
            return framed[:start]
    return [token for token in framed if token == tokenizer.bos_token_id][:1]


def tokens_of(tokenizer: Any, text: str) -> list[int]:
    try:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    except TypeError:
        text.encode("utf-8")  # names half of a surrogate pair, which is no character
        raise


def decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def render(
    tokenizer: Any,
    messages: list[Message],
    tools: list[dict[str, Any]] | None = None,
    add_generation_prompt: bool = False,
) -> str:
    template_of(tokenizer, tools)
    for position, message in enumerate(messages):
        # A template renders what is not there as nothing; who calls a tool need not say anything.
        names = ("role",) if isinstance(message, dict) and message.get("tool_calls") else ("role", "content")
        if not isinstance(message, dict) or not all(isinstance(message.get(name), str) for name in names):
            raise BadLine(f"messages[{position}]: expected an object whose role and content are strings")
    try:
        return tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except TypeError as error:  # one that adds an object to a text, say
        raise BadLine(f"the chat template cannot write it: {error}") from error


def template_of(tokenizer: Any, tools: list[dict[str, Any]] | None = None) -> str:
    if not tokenizer.chat_template:
        raise ValueError(
            "messages need a chat template and the model's tokenizer has none: expected prompt and completion"
        )
    return tokenizer.get_chat_template(tools=tools)
