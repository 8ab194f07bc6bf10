"""Examples in, token rows out: what the training loop reads, and what generation starts from.

The loss counts the completion's tokens only, and the mask is built from tokens, never from characters. A row begins with
the prompt's own tokens, so that generation starts from exactly what training saw. Where the whole text's tokens begin
with those, the row is the whole text's: a completion tokenised apart can differ, SentencePiece's gets a space that the
text does not have. Where a merge runs across the border, the completion gets tokens with which the row still decodes to
the whole text. The last token that counts is the end token.

Messages go through the tokenizer's chat template, and a row's tools with them. `train_on_turns` says which of the assistant's
turns count, each with its end:
- auto: those that the row names (the completion's of prompt and completion, or those of a weight); else all, if the template
  marks what the assistant wrote (`{% generation %}`), and if not the last.
- last: the last.
- all: all, but for those that the row leaves out. Where the template marks none, a turn is what the template adds to the turns
  before it: exact, or refused.

With `completion_only_loss=False` the prompt counts as well. Of plain text all does.

A row of more than `max_length` tokens is cut as `truncation` says:
- prompt: the prompt loses its oldest tokens, and messages their oldest turns; what stays is told in prompts.py. The
  completion and its end token stay. A completion that leaves no room for the prompt loses its end, and the prompt keeps half of max_length.
  A row of plain text has no prompt, and loses its end.
- completion: the row loses its end. It trains all the same, if a part of its completion is left: TRL's keep_start.
- drop: the row is left out.

An encoder-decoder's row has two sides (pairs.py), each of at most `max_length` tokens: a prompt that is longer is cut by `prompt` alone, a completion
by `prompt` and `completion`; else the row is left out.
"""

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from os.path import commonprefix
from typing import Any, Literal, get_args

import torch
from jinja2 import TemplateError, TemplateSyntaxError
from torch import Tensor

from fastlora.data import pairs
from fastlora.data.examples import BadLine, DataError, Example, Message
from fastlora.data.mixture import Order
from fastlora.data.prompts import decode, kept_first, opening_of, render, stays, template_of, tokens_of
from fastlora.language_model_loss import IGNORE
from fastlora.typed import shown

logger = logging.getLogger("fastlora")

Truncation = Literal["prompt", "completion", "drop"]  # what a row that is too long loses, see above
TRUNCATIONS = get_args(Truncation)
Turns = Literal["auto", "last", "all"]  # which of the assistant's count, see above
TURNS = get_args(Turns)
SHOWN_CHARACTERS = 400  # of a row in a warning
SHOWN_AT_A_SEAM = 20  # on either side
WORD = re.compile(r"\w+")  # templates may write a text as JSON has it
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Of a message, by the names that one template or another reads."""
WIDEST = 8  # tokens that a text's end may have more in a longer text
# What a completion is tokenised behind where its own prompt would merge with it: one of these rarely does.
ANCHORS = ("\n", "=", ".", "0", "a", "q", "x", "z")


@dataclass(frozen=True)
class Row:
    input_ids: list[int]
    labels: list[int]  # the token itself, or IGNORE
    prompt_length: int = 0  # tokens before the last turn's answer: what generation starts from
    task: str = ""  # the example's

    @property
    def labelled(self) -> int:
        """How many tokens count in the loss (the first token is predicted from nothing, so it never does)."""
        return sum(label != IGNORE for label in self.labels[1:])

    @property
    def completion_length(self) -> int:
        """Tokens of the last turn's answer, its end token with them."""
        return _labels_end(self) - self.prompt_length

    @property
    def sides(self) -> tuple[list[int], ...]:
        """All that a model reads of it, in as many sequences as it has stacks that read."""
        return (self.input_ids,)

    @property
    def tokens(self) -> int:
        return sum(map(len, self.sides))


@dataclass(frozen=True)
class Pair(Row):
    """An encoder-decoder's: input_ids are the encoder's, all of them the prompt's; labels are what the decoder is to write, as long as that is."""

    @property
    def labelled(self) -> int:
        return sum(label != IGNORE for label in self.labels)

    @property
    def completion_length(self) -> int:
        return len(self.labels)

    @property
    def sides(self) -> tuple[list[int], ...]:
        return self.input_ids, self.labels


@dataclass(frozen=True)
class Encoded:
    rows: list[Row]
    examples: list[Example]  # each row's
    dropped: list[Example]  # those that max_length left no row of
    prompt_cut: list[Example]  # those whose row lost a part of the prompt
    completion_cut: list[Example]  # those whose row lost the completion's end
    order: Order | None = None  # in which a mixture's rows come


def encode(
    examples: Sequence[Example],
    tokenizer: Any,
    max_length: int,
    truncation: str = "prompt",
    *,
    train_on_turns: str = "auto",
    completion_only_loss: bool = True,
    encoder_decoder: bool = False,
) -> Encoded:
    """Token rows of at most `max_length` tokens; warns once of each kind of rows that lost something.

    Args:
        truncation: what a row that is too long loses: prompt, completion or drop, see above.
        train_on_turns: which of the assistant's turns count: auto, last or all, see above.
        completion_only_loss: the prompt does not count.
        encoder_decoder: whose rows they are: each is a `Pair`, of which the completion counts and nothing else.

    Raises:
        DataError: the tokenizer's chat template refuses some messages, the tokenizer has no tokens for some text, or a turn's cannot be told apart.
        ValueError: a bad max_length, truncation or train_on_turns, or max_length drops every row; the data has messages and the tokenizer
            no chat template that can serve.
    """
    require_count("max_length", max_length, 2, "a token of the prompt and one of the completion")
    if truncation not in TRUNCATIONS:
        raise ValueError(f"truncation={truncation!r}: expected one of {', '.join(TRUNCATIONS)}")
    check_counting(train_on_turns, completion_only_loss)
    if encoder_decoder and (train_on_turns != "auto" or not completion_only_loss):
        raise ValueError(
            f"train_on_turns={train_on_turns!r} and completion_only_loss={completion_only_loss}: an encoder-decoder's completion counts, no turns"
        )
    if not examples:
        raise ValueError("data: expected at least one row")
    opening, special = opening_of(tokenizer), _special_ids(tokenizer)
    encoded, problems, unended = Encoded([], [], [], [], []), [], []
    for example in examples:
        try:
            if encoder_decoder:
                whole, ended = _pair(example, tokenizer), True
            else:
                whole, ended = _encode(example, tokenizer, opening, special, train_on_turns)
        except TemplateSyntaxError as error:
            raise ValueError(f"the tokenizer's chat template is no Jinja template: {error}") from error
        except (TemplateError, BadLine, UnicodeEncodeError) as error:
            problems.append(f"{example.source}: {error}")
            continue
        if not ended:
            unended.append((example, whole))
        if not completion_only_loss:
            whole = _counting_all(whole)
        first = kept_first(whole.input_ids, tokenizer, opening)
        if isinstance(whole, Pair):
            row: Row | None = _fit_pair(whole, max_length, truncation, first)
        else:
            row = _fit(whole, max_length, truncation, first, partial(_stays, example, tokenizer))
        if row is None:
            encoded.dropped.append(example)
            continue
        encoded.rows.append(replace(row, task=example.task))
        encoded.examples.append(example)
        if row.prompt_length < whole.prompt_length:
            encoded.prompt_cut.append(example)
        if row.completion_length < whole.completion_length:
            encoded.completion_cut.append(example)
    if problems:
        raise DataError(problems)
    if not encoded.rows:
        raise ValueError(
            f"max_length={max_length} with truncation={truncation!r} drops every one of the {len(examples)} rows"
        )
    _warn_of_cuts(encoded, max_length)
    _warn_of_thoughts(encoded.examples, tokenizer)
    _warn_of_seams(encoded.examples)
    if train_on_turns == "auto" and completion_only_loss:
        _warn_of_turns(encoded.examples, tokenizer)
    if unended:
        example, row = unended[0]
        text = marked(row, tokenizer)
        logger.warning(
            "the chat template's {%% generation %%} block leaves the end token out in %d of %d rows: the model may not learn"
            " to stop. The first, %s, [[what counts]]: %s",
            len(unended),
            len(examples),
            example.source,
            repr(text if len(text) <= SHOWN_CHARACTERS else "..." + text[-SHOWN_CHARACTERS:]),
        )
    return encoded


def check_counting(train_on_turns: str, completion_only_loss: bool) -> None:
    """
    Raises:
        ValueError: train_on_turns is none, or of no use where all counts; the message names it.
    """
    if train_on_turns not in TURNS:
        raise ValueError(f"train_on_turns={train_on_turns!r}: expected one of {', '.join(TURNS)}")
    if not completion_only_loss and train_on_turns != "auto":
        raise ValueError(
            f"completion_only_loss=False and train_on_turns={train_on_turns!r} exclude each other: all counts"
        )


def row_length(tokenizer: Any, encoder_decoder: bool = False) -> Callable[[Example], int]:
    """What counts the tokens of an example's row, or its longer side, before anything is cut; it raises BadLine where there is no row."""
    opening, special = opening_of(tokenizer), _special_ids(tokenizer)

    def length(example: Example) -> int:
        if encoder_decoder:
            return max(map(len, _pair(example, tokenizer).sides))
        try:
            return len(_encode(example, tokenizer, opening, special)[0].input_ids)
        except TemplateError as error:
            raise BadLine(str(error)) from None

    return length


def _warn_of_cuts(encoded: Encoded, max_length: int) -> None:
    for cut, text in (
        (encoded.dropped, "dropped %d of %d rows"),
        (encoded.prompt_cut, "cut the oldest tokens of the prompt in %d of %d rows"),
        (encoded.completion_cut, "cut the end of the completion, and its end token, in %d of %d rows"),
    ):
        if cut:
            count = len(encoded.rows) + len(encoded.dropped)
            logger.warning(f"max_length=%d: {text} (the first: %s)", max_length, len(cut), count, cut[0].source)


def _warn_of_thoughts(examples: Sequence[Example], tokenizer: Any) -> None:
    """What the assistant thought decides what it says, and a template that knows it by another name leaves it out."""
    for name in THOUGHTS:
        with_it = [one for one in examples if any(name in message for message in one.messages)]
        left_out = [one for one in with_it if not re.search(rf"\b{name}\b", template_of(tokenizer, one.tools))]
        if left_out:
            text = "the tokenizer's chat template does not read %s: left out in %d of %d rows (the first: %s)"
            logger.warning(text, name, len(left_out), len(examples), left_out[0].source)


def _warn_of_seams(examples: Sequence[Example]) -> None:
    """A completion stands right behind its prompt: two words become one where neither brings what parts them."""
    run_together = [
        (one.source, one.prompt[-SHOWN_AT_A_SEAM:], one.completion[:SHOWN_AT_A_SEAM])
        for one in examples
        if isinstance(one.prompt, str) and isinstance(one.completion, str) and one.prompt
        if _is_of_word(one.prompt[-1]) and _is_of_word(one.completion[0])
    ]
    if run_together:
        text = "prompt and completion run together in %d of %d rows (the first, %s: %r and %r): expected a space or line break between them"
        logger.warning(text, len(run_together), len(examples), *run_together[0])


def _is_of_word(character: str) -> bool:
    """Whether it is a letter or digit of a script that parts words: those have capitals."""
    return character.isdecimal() or character.lower() != character.upper()


def _warn_of_turns(examples: Sequence[Example], tokenizer: Any) -> None:
    """What auto comes down to where the template marks nothing."""
    several = [
        one
        for one in examples
        if one.turns is None
        and sum(message["role"] == "assistant" for message in one.messages) > 1
        and not _marks_turns(template_of(tokenizer, one.tools))
    ]
    if several:
        logger.warning(
            "train_on_turns=auto: the chat template marks no turns: of several turns of the assistant's only the last counts,"
            " in %d of %d rows (the first: %s); train_on_turns=all counts every one",
            len(several),
            len(examples),
            several[0].source,
        )


def require_count(name: str, value: Any, least: int = 1, reason: str = "") -> None:
    """Raise ValueError unless `value` is an integer of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r}: expected an integer, at least {least}" + (f", {reason}" if reason else ""))


def _encode(
    example: Example,
    tokenizer: Any,
    opening: list[int],
    special: set[int],
    train_on_turns: str = "auto",
    whole_prompt: bool = True,
) -> tuple[Row, bool]:
    """The whole row, and whether its last label is an end token, as far as it has one. whole_prompt: every message must be written."""
    if isinstance(example.prompt, str):
        before, whole = example.prompt, example.prompt + example.completion
        prompt = tokens_of(tokenizer, before)
        completion = _continue(tokenizer, before, prompt, whole)
        return _end(opening + prompt, completion, tokenizer), True
    template = template_of(tokenizer, example.tools)
    _require_read(template, example)
    before = render(tokenizer, example.prompt, example.tools, add_generation_prompt=True)
    whole = render(tokenizer, example.messages, example.tools)
    prompt = tokens_of(tokenizer, before)
    marked = _marks_turns(template)
    counted = _counted(example, train_on_turns, marked)
    if not marked and not whole.startswith(before):
        raise ValueError(
            f"{example.source}: the chat template renders the prompt otherwise without the answer:"
            " expected a template with {% generation %}"
        )
    _require_written(whole, example, whole_prompt)
    if marked:
        return _encode_marked(example, counted, before, prompt, whole, tokenizer, special)
    row = _end(prompt, _continue(tokenizer, before, prompt, whole), tokenizer)
    return _counting(row, counted, example, whole, tokenizer, special), True


def _marks_turns(template: str) -> bool:
    return bool(re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", template))


def _pair(example: Example, tokenizer: Any) -> Row:
    prompt, answer = pairs.encode(tokenizer, example)
    return Pair(prompt, answer, len(prompt))


def _require_read(template: str, example: Example) -> None:
    """
    Raises:
        ValueError: the row has something that decides what is said, and that the template leaves out without a word.
    """
    calls = any(message.get("tool_calls") for message in example.messages)
    for name, given in (("tools", example.tools), ("tool_calls", calls)):
        if given and not re.search(rf"\b{name}\b", template):
            raise ValueError(f"{example.source}: the row has {name}, which the tokenizer's chat template does not read")


def _require_written(whole: str, example: Example, whole_prompt: bool) -> None:
    """
    Raises:
        BadLine: the template has left out a message without a word, as some do where they know no such role; of the assistant's earlier turns
            some leave out what it thought, and that may be all.
    """
    for position, message in reversed(list(enumerate(example.messages))):
        content, is_last = message.get("content", ""), position == len(example.messages) - 1
        if not is_last and (message["role"] == "assistant" or not whole_prompt):
            continue
        if content.strip() and not any(word in whole for word in WORD.findall(content) or content.split()):
            # Or it takes lists of texts and images, and was given a text: what is left to train on are the turn's ends.
            who = "what the assistant says" if is_last else f"messages[{position}], by {shown(message['role'])}"
            raise BadLine(f"the chat template writes nothing of {who}")


def _counted(example: Example, train_on_turns: str, marked: bool) -> set[int]:
    """Which messages count, by their place."""
    messages = example.messages
    last, named = len(messages) - 1, example.turns
    every = {position for position, message in enumerate(messages) if message["role"] == "assistant"}
    counted = every if named is None else set(named)
    if train_on_turns == "last" or (train_on_turns == "auto" and named is None and not marked):
        counted = counted & {last}
    if not counted:
        raise BadLine("its last turn does not count, and train_on_turns='last' counts no other")
    return counted


def _counting(row: Row, counted: set[int], example: Example, whole: str, tokenizer: Any, special: set[int]) -> Row:
    """The row, of whose last turn alone there are labels, with labels of these turns."""
    last = len(example.messages) - 1
    labels = [*row.labels] if last in counted else [IGNORE] * len(row.labels)
    for position in sorted(counted - {last}):
        start, stop = _turn(position, row, example, whole, tokenizer, special)
        labels[start:stop] = row.input_ids[start:stop]
    return Row(row.input_ids, labels, row.prompt_length)


def _turn(position: int, row: Row, example: Example, whole: str, tokenizer: Any, special: set[int]) -> tuple[int, int]:
    """Where the tokens of a turn start and stop, its end token with them: what it adds to the messages before it."""
    if position == 0:
        raise BadLine("messages[0] is the assistant's: nothing stands before it")
    borders = []
    for count, opened in ((position, True), (position + 1, False)):
        text = render(tokenizer, example.messages[:count], example.tools, add_generation_prompt=opened)
        if not whole.startswith(text):
            raise ValueError(
                f"{example.source}: the chat template renders messages[{position}] otherwise where more follows, so that"
                " its tokens cannot be told: expected a template with {% generation %}, or train_on_turns='last'"
            )
        borders.append(tokens_of(tokenizer, text))
    before, tokens = borders
    tokens = (
        tokens[: _last_end(tokens, special, tokenizer) + 1] or tokens
    )  # white space behind an end token does not count
    start, stop = _border(row.input_ids, before, tokenizer), _border(row.input_ids, tokens, tokenizer)
    if not 0 <= start < stop:
        raise BadLine(f"messages[{position}]: a token reaches across its border, so that its tokens cannot be told")
    return start, stop


def _border(ids: list[int], tokens: list[int], tokenizer: Any) -> int:
    """How many of a row's tokens make the text of these, which it begins with; -1 where a token reaches beyond its end."""
    same = len(commonprefix((ids, tokens)))
    if same == len(tokens):
        return same
    text = decode(tokenizer, tokens)
    # White space before a word is cut otherwise than at the end of a text: the row's tokens may differ, and end there all the same.
    ends = range(same + 1, min(len(ids), len(tokens) + WIDEST) + 1)
    return next((end for end in ends if decode(tokenizer, ids[:end]) == text), -1)


def _counting_all(row: Row) -> Row:
    """The row with labels of all up to its last one; the first token is predicted from nothing."""
    end = _labels_end(row)
    return Row(row.input_ids, [IGNORE, *row.input_ids[1:end], *row.labels[end:]], row.prompt_length)


def _continue(tokenizer: Any, before: str, prompt: list[int], whole: str) -> list[int]:
    """The tokens that take `prompt`, those of the text `before`, to the text `whole`."""
    tokens, completion = tokens_of(tokenizer, whole), whole[len(before) :]
    if not prompt and (before or not tokens):
        raise BadLine(f"{'prompt' if before else 'text'}: the tokenizer has no token for it")
    if tokens[: len(prompt)] == prompt and len(tokens) > len(prompt):
        return tokens[len(prompt) :]
    # A merge across the border. Tokenised apart the completion may get a space in front, or lose what continues a word.
    right = (decode(tokenizer, prompt) + completion, decode(tokenizer, tokens))
    best: list[int] = []
    reached = (-1, 0)
    for anchor in ("", *ANCHORS, before[-1]):
        tokens = _behind(anchor, completion, tokenizer)
        text = decode(tokenizer, prompt + tokens) if tokens else ""
        if text in right:
            return tokens
        agreement = len(commonprefix((text, right[0]))), -len(tokens)
        if tokens and agreement > reached:
            best, reached = tokens, agreement
    if not best:
        raise BadLine("completion: the tokenizer has no token for it")
    return best  # nothing is exact: the text has characters that the tokenizer does not know, or does not keep


def _behind(anchor: str, text: str, tokenizer: Any) -> list[int]:
    """The tokens of a text that stands behind another; none where the two merge."""
    first, both = tokens_of(tokenizer, anchor) if anchor else [], tokens_of(tokenizer, anchor + text)
    return both[len(first) :] if both[: len(first)] == first else []


def _end(prompt: list[int], completion: list[int], tokenizer: Any) -> Row:
    """The row whose last label is the end token; white space behind one that the text has itself does not count."""
    counted = _last_end(completion, {tokenizer.eos_token_id}, tokenizer) + 1
    if not counted:
        completion = completion if tokenizer.eos_token_id is None else [*completion, tokenizer.eos_token_id]
        counted = len(completion)
    labels = [IGNORE] * len(prompt) + completion[:counted] + [IGNORE] * (len(completion) - counted)
    return Row(prompt + completion, [IGNORE, *labels[1:]], len(prompt))


def _last_end(ids: list[int], ends: set[int], tokenizer: Any) -> int:
    """Where the last end token stands, if nothing but white space follows it; else -1."""
    at = next((i for i in reversed(range(len(ids))) if ids[i] in ends), -1)
    return -1 if at < 0 or decode(tokenizer, ids[at + 1 :]).strip() else at


def _encode_marked(
    example: Example, chosen: set[int], before: str, prompt: list[int], whole: str, tokenizer: Any, special: set[int]
) -> tuple[Row, bool]:
    """What the template marks of the chosen turns counts, and the end of each with it."""
    ids, counted = tokens_of(tokenizer, whole), _marks(example, whole, tokenizer)
    if ids[: len(prompt)] != prompt and whole.startswith(before):
        # A merge across the border of the last turn.
        completion = _continue(tokenizer, before, prompt, whole)
        rest = next((n for n, mark in enumerate(reversed(counted)) if mark), 0)  # behind what counts
        rest = rest if completion[len(completion) - rest :] == ids[len(ids) - rest :] else 0
        same = len(commonprefix((ids, prompt)))
        counted = counted[:same] + [False] * (len(prompt) - same) + [True] * (len(completion) - rest) + [False] * rest
        ids = prompt + completion
    if ids[: len(prompt)] == prompt:
        # What generation is given does not count: a block may begin before it, or white space belong to its last token.
        given = next((n for n, mark in enumerate(reversed(counted[: len(prompt)])) if not mark), len(prompt))
        counted[len(prompt) - given : len(prompt)] = [False] * given
    turns = _runs(counted)
    if not turns:
        raise BadLine("the chat template marks nothing of it by {% generation %}")
    every = [position for position, message in enumerate(example.messages) if message["role"] == "assistant"]
    if len(turns) != len(every) and len(chosen) < len(every):
        raise BadLine(
            f"the chat template marks {len(turns)} parts of {len(every)} turns by {{% generation %}}: which of them are"
            " the turns that count cannot be told"
        )
    kept = [position in chosen for position in every] if len(chosen) < len(every) else [True] * len(turns)
    ended, ends = True, special
    for (start, stop), keep in zip(reversed(turns), reversed(kept), strict=True):
        # What the template writes behind the words goes before a token that the words end with themselves.
        end = stop if stop < len(ids) and ids[stop] in ends else start + _last_end(ids[start:stop], ends, tokenizer)
        if not keep:
            counted[start:stop] = [False] * (stop - start)
        if not keep or end < start:
            ended = ended and (not keep or tokenizer.eos_token_id is None)
            continue
        counted[start : end + 1] = [True] * (end + 1 - start)
        counted[end + 1 : stop] = [False] * len(counted[end + 1 : stop])
        ends = {tokenizer.eos_token_id, ids[end]}  # what ends the last turn ends those before it
    labels = [token if count else IGNORE for token, count in zip(ids, counted, strict=True)]
    return Row(ids, labels, len(prompt) if ids[: len(prompt)] == prompt else turns[-1][0]), ended


def _marks(example: Example, whole: str, tokenizer: Any) -> list[bool]:
    """Which tokens of the rendered messages are marked: transformers' own mask ends in a character of several tokens."""
    from transformers.utils.chat_template_utils import render_jinja_template

    if not tokenizer.is_fast:
        raise ValueError(
            f"a chat template with {{% generation %}} needs a fast tokenizer, got {type(tokenizer).__name__}"
        )
    tools: Any = example.tools
    rendered: Any = render_jinja_template(
        conversations=[example.messages],
        tools=tools,
        chat_template=template_of(tokenizer, example.tools),
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    places = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    (spans,) = rendered[1]
    # A token without a character is a space, whose place some tokenizers set behind it.
    return [any(start < b and a < stop if a < b else start < a <= stop for start, stop in spans) for a, b in places]


def _runs(counted: Sequence[bool]) -> list[tuple[int, int]]:
    """Where each run of marks starts and stops."""
    edges = [i for i, (a, b) in enumerate(pairwise([False, *counted, False])) if a != b]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _special_ids(tokenizer: Any) -> set[int]:
    """The end token, and every token that stands for no text: one of those ends a turn where the end token does not."""
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return (added | set(tokenizer.all_special_ids)) - {tokenizer.unk_token_id} | {tokenizer.eos_token_id}


def marked(row: Row, tokenizer: Any) -> str:
    """A row's text as its tokens have it, with [[ ]] around what counts in the loss; an encoder-decoder's with each side on a line of its own."""
    if isinstance(row, Pair):
        return f"encoder: {decode(tokenizer, row.input_ids)}\ndecoder: [[{decode(tokenizer, row.labels)}]]"
    text, position = "", 0
    for start, stop in _runs([label != IGNORE for label in row.labels]):
        text += decode(tokenizer, row.input_ids[position:start])
        text, position = f"{text}[[{decode(tokenizer, row.input_ids[start:stop])}]]", stop
    return text + decode(tokenizer, row.input_ids[position:])


def _labels_end(row: Row) -> int:
    return next((i + 1 for i in reversed(range(len(row.labels))) if row.labels[i] != IGNORE), 0)


def _stays(example: Example, tokenizer: Any, ids: list[int], length: int) -> tuple[int, int]:
    return stays(tokenizer, ids, length, example.prompt, example.tools)


def _fit(
    row: Row, max_length: int, truncation: str, first: int, stays: Callable[[list[int], int], tuple[int, int]]
) -> Row | None:
    """The row in `max_length` tokens; None: it is dropped.

    Args:
        first: the tokens that open it, which the prompt's own come behind.
        stays: of a prompt's tokens and a length, which of them stay.
    """
    if len(row.input_ids) > max_length:
        # What follows the last label trains nothing, and goes before anything else.
        end = _labels_end(row)
        row = Row(row.input_ids[:end], row.labels[:end], min(row.prompt_length, end))
        excess = end - max_length
        if excess > 0 and truncation == "drop":
            return None
        if excess > 0 and truncation == "prompt" and row.prompt_length > first:
            length = row.prompt_length - excess
            if length <= first:  # nothing of the prompt itself would stay
                length = min(row.prompt_length, max_length // 2)
            if length <= first:
                return None
            until, start = stays(row.input_ids[: row.prompt_length], length)
            ids, labels = (tokens[:until] + tokens[start:] for tokens in (row.input_ids, row.labels))
            row = Row(ids, labels, until + row.prompt_length - start)
        row = Row(row.input_ids[:max_length], row.labels[:max_length], min(row.prompt_length, max_length))
    return row if row.labelled else None


def _fit_pair(row: Row, max_length: int, truncation: str, first: int) -> Pair | None:
    """As `_fit`, of each side."""
    prompt, answer = (len(side) > max_length for side in row.sides)
    if (truncation == "drop" and (prompt or answer)) or (
        prompt and (truncation == "completion" or max_length <= first + 1)  # nothing of the prompt itself would stay
    ):
        return None
    ids = row.input_ids
    if prompt:
        ids = ids[:first] + ids[len(ids) - (max_length - first) :]
    return Pair(ids, row.labels[:max_length], len(ids))


def reference(example: Example, row: Row, tokenizer: Any) -> str:
    """What an answer to a row's prompt is held against: what is said, or all that the template makes of a turn that says more."""
    if example.turn is None:
        return example.completion
    return tokenizer.decode(row.input_ids[row.prompt_length : _labels_end(row)], skip_special_tokens=True)


def turn_end(tokenizer: Any, messages: list[Message]) -> int | None:
    """The token that the chat template ends the assistant's turn with; None where it is none of the special ones."""
    try:
        row, _ = _encode(Example(messages, "a"), tokenizer, [], special := _special_ids(tokenizer), whole_prompt=False)
    except (TemplateError, ValueError):
        return None
    last = row.labels[_labels_end(row) - 1]
    return last if last in special else None


def count_tokens(rows: Sequence[Row]) -> int:
    """Padding aside."""
    return sum(row.tokens for row in rows)


def pad_token_id(tokenizer: Any) -> int:
    """The token that fills rows up. The attention mask hides it, so the end token serves where there is none for it."""
    return next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)


def collate(rows: Sequence[Row], pad: int) -> dict[str, Tensor]:
    """One batch padded on the right to its longest row: input_ids, attention_mask, labels, each int64 [rows, width]. An encoder-decoder's labels
    have a width of their own."""
    return {
        "input_ids": _padded([row.input_ids for row in rows], pad),
        "attention_mask": _padded([[1] * len(row.input_ids) for row in rows], 0),
        "labels": _padded([row.labels for row in rows], IGNORE),
    }


def _padded(sequences: Sequence[list[int]], filler: int) -> Tensor:
    width = max(map(len, sequences))
    return torch.tensor([one + [filler] * (width - len(one)) for one in sequences])


def batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
