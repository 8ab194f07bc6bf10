"""What a row holds, on every kind of tokenizer: it decodes to its text, begins as generation begins, and ends with the end."""

import logging
import random
import re
from typing import Any

import pytest
import tokenizer_kinds as kinds
from chat_templates import TEMPLATES, chat_template

from fastlora.data.examples import DataError, Example
from fastlora.data.prompts import encode_prompt
from fastlora.data.rows import Row, encode, turn_end
from fastlora.language_model_loss import IGNORE

KINDS = {
    "byte-level": lambda: kinds.byte_level(add_prefix_space=False, template="<s> $A"),
    "byte-level, a space in front, ends every text": lambda: kinds.byte_level(True, "<s> $A </s>"),
    "byte-level, adds nothing": lambda: kinds.byte_level(add_prefix_space=False),
    "byte-level without an end token": lambda: kinds.byte_level(False, "<s> $A", eos_token=None),
    "metaspace": lambda: kinds.metaspace("first", "bpe", "<s> $A"),
    "metaspace, unigram": lambda: kinds.metaspace("first", "unigram", "<s> $A"),
    "metaspace, unigram, unknown characters, ends every text": lambda: kinds.metaspace(
        "always", "unigram", "$A </s>", byte_fallback=False
    ),
    "legacy metaspace, ends every text": lambda: kinds.legacy_metaspace(prepend=True, template="<s> $A </s>"),
    "metaspace without a space in front": lambda: kinds.legacy_metaspace(prepend=False, template="<s> $A"),
    "word piece": kinds.word_piece,
}
WORDS = [
    *(
        "the",
        "cat",
        "runs",
        "play",
        "ing",
        "sing",
        "Answer:",
        "2+2=",
        "4",
        "13",
        "é",
        "中",
        "🙂",
        "naïve",
        "it's",
        "x=y",
    ),
    *(
        "\n",
        "\n\n",
        "  ",
        " ",
        "\t",
        ".",
        ",",
        "?",
        "a",
        "b",
        "_",
        "\u200b",
        "e\u0301",
        "\ufb01",
        "##ing",
        "</s>",
        "<s>",
    ),
    "<|user|>",
]
SPECIAL = re.compile(r"</?s>|<\|user\|>|<unk>|\[UNK\]")


@pytest.fixture(scope="module", params=KINDS)
def words(request) -> Any:
    return KINDS[request.param]()


def decode(words: Any, ids: list[int]) -> str:
    return words.decode(ids, clean_up_tokenization_spaces=False)


def random_pair(draw: random.Random) -> tuple[str, str]:
    """A text cut in two anywhere, in the middle of a word too, both halves more than white space."""
    while True:
        text = "".join(draw.choice(["", " ", " "]) + draw.choice(WORDS) for _ in range(draw.randint(2, 8)))
        border = draw.randint(1, len(text) - 1)
        if text[:border].strip() and text[border:].strip():
            return text[:border], text[border:]


def row_of(words: Any, prompt: Any, completion: str) -> Row:
    (row,) = encode([Example(prompt, completion)], words, 10**6).rows
    return row


def check_labels(words: Any, row: Row) -> None:
    """One run of labels behind the prompt, whose last is the end token; at most white space behind."""
    labels = row.labels[row.prompt_length :]
    last = max(i for i, label in enumerate(labels) if label != IGNORE)
    assert row.labels[: row.prompt_length] == [IGNORE] * row.prompt_length
    assert labels[: last + 1] == row.input_ids[row.prompt_length :][: last + 1]
    assert not decode(words, row.input_ids[row.prompt_length :][last + 1 :]).strip()
    if words.eos_token_id is not None:
        assert labels[last] == words.eos_token_id


def test_random_texts(words):
    draw, exact, merged = random.Random(0), 0, 0
    for _ in range(200):
        prompt, completion = random_pair(draw)
        try:
            row = row_of(words, prompt, completion)
        except DataError as error:  # BERT's normalizer drops some characters
            assert "has no token for it" in str(error) and words.cls_token
            continue
        begin = encode_prompt(words, prompt)
        closed = words(prompt)["input_ids"]
        assert row.input_ids[: row.prompt_length] == begin == closed[: len(begin)] and len(closed) - len(begin) <= 1
        check_labels(words, row)
        own, rest = words(prompt, add_special_tokens=False)["input_ids"], row.input_ids[len(begin) :]
        whole = words(prompt + completion, add_special_tokens=False)["input_ids"]
        ended = [rest, rest[:-1]] if rest[-1] == words.eos_token_id else [rest]
        assert len(ended) == 2 or words.eos_token_id is None
        if whole[: len(own)] == own and len(whole) > len(own):
            assert whole[len(own) :] in ended
            continue
        merged += 1
        across = any(match.start() < len(prompt) < match.end() for match in SPECIAL.finditer(prompt + completion))
        if words.unk_token_id in (whole + own + rest) or across:
            continue
        exact += 1
        assert any(decode(words, own + ids) in (decode(words, whole), decode(words, own) + completion) for ids in ended)
    assert merged >= 25 and exact >= 10


@pytest.mark.parametrize(("prompt", "completion"), [("2+2=", "4"), ("The c", "at"), ("Answer: ", "4"), ("A:", " 4")])
def test_no_space_is_made_up_and_none_is_lost(words, prompt, completion):
    row = row_of(words, prompt, completion)
    text = decode(words, words(prompt + completion, add_special_tokens=False)["input_ids"])
    opened = len(encode_prompt(words, prompt)) - len(words(prompt, add_special_tokens=False)["input_ids"])
    end = -1 if words.eos_token_id is not None else None
    assert decode(words, row.input_ids[opened:end]) == text
    if words.cls_token:  # BERT keeps neither case nor space
        text, prompt, completion = (part.replace(" ", "").lower() for part in (text, prompt, completion))
    assert text.strip() == prompt + completion


@pytest.mark.parametrize("completion", [" a</s> b", " a</s>", " a</s>\n", "</s> b", " a </s></s>"])
def test_a_completion_ends_once_wherever_it_has_the_end_token_itself(completion):
    words = KINDS["byte-level"]()
    row = row_of(words, "The cat", completion)
    check_labels(words, row)
    appended = "" if completion.rstrip().endswith("</s>") else "</s>"
    assert decode(words, row.input_ids) == f"<s>The cat{completion}{appended}"


CHATTING = [name for name in KINDS if name not in ("word piece", "byte-level without an end token")]
DIALOGUE = [
    {"role": "user", "content": "the cat?"},
    {"role": "assistant", "content": "runs </s> x"},
    {"role": "user", "content": "2+2="},
]


@pytest.fixture(scope="module", params=CHATTING)
def chatting(request) -> Any:
    return KINDS[request.param]()


def labelled(words: Any, row: Row) -> list[str]:
    """The text of each run of labels."""
    runs: list[list[int]] = [[]]
    for label in row.labels:
        runs = [*runs, []] if label == IGNORE and runs[-1] else runs
        if label != IGNORE:
            runs[-1].append(label)
    return [decode(words, ids) for ids in runs if ids]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("answer", ["4", "sing </s> x", "sing </s>", " 4 \n", "é中"])
def test_an_answer_in_a_template(chatting, name, answer):
    chatting.chat_template = chat_template(name)
    row, begin = row_of(chatting, DIALOGUE, answer), encode_prompt(chatting, DIALOGUE)
    assert row.input_ids[: row.prompt_length] == begin
    check_labels(chatting, row)
    whole = chatting.apply_chat_template([*DIALOGUE, {"role": "assistant", "content": answer}])["input_ids"]
    assert whole[: len(begin)] != begin or row.input_ids in (whole, [*whole, chatting.eos_token_id])
    assert (row.input_ids[-1] == chatting.eos_token_id) == (name != "ChatML")


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_block_that_stops_short_of_the_end_token_is_extended_to_it(chatting, name, caplog):
    chatting.chat_template = chat_template(name, "{% generation %}", "{% endgeneration %}")
    row = row_of(chatting, DIALOGUE, "4")
    end = "<|assistant|>" if name == "Gemma" else "</s>"
    assert [text.replace(" ", "") for text in labelled(chatting, row)] == [f"runs</s>x{end}", f"4{end}"]
    assert row.input_ids[: row.prompt_length] == encode_prompt(chatting, DIALOGUE)
    assert turn_end(chatting, DIALOGUE) == chatting.convert_tokens_to_ids(end)
    assert not caplog.records


@pytest.mark.parametrize("marked", [False, True], ids=["last turn", "marked turns"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_random_dialogues(chatting, name, marked):
    blocks = ("{% generation %}", "{% endgeneration %}") if marked else ("", "")
    chatting.chat_template = chat_template(name, *blocks)
    draw = random.Random(0)
    for _ in range(20):
        texts = [*random_pair(draw), *random_pair(draw)]
        messages = [
            {"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, texts, strict=True)
        ]
        row, begin = row_of(chatting, messages[:-1], texts[-1]), encode_prompt(chatting, messages[:-1])
        whole = chatting.apply_chat_template(messages)["input_ids"]
        end = "<|assistant|>" if name == "Gemma" and marked else "</s>"
        assert row.input_ids[: row.prompt_length] == begin
        assert whole[: len(begin)] != begin or row.input_ids in (whole, [*whole, chatting.eos_token_id])
        # The spaces aside, which decoders add and drop behind special tokens.
        said = [
            text.strip() if name in ("Llama 3", "Gemma") else text for text in (texts[1::2] if marked else texts[-1:])
        ]
        said = [decode(chatting, chatting(text, add_special_tokens=False)["input_ids"]) for text in said]
        behind = "<|assistant|></s>" if name == "Gemma" and not marked else end
        assert ["".join(run.split()) for run in labelled(chatting, row)] == [
            "".join(run.split()) + behind for run in said
        ]


def test_a_block_that_begins_before_the_generation_prompt_does_not_count_it(chatting):
    template = chat_template("ChatML", "{% generation %}", "{% endgeneration %}")
    template = template.replace("{{ '<|user|>' + m.role + '\n' }}", "").replace(
        "{% generation %}", "{% generation %}{{ '<|user|>' + m.role + '\n' }}"
    )
    chatting.chat_template = template
    row = row_of(chatting, DIALOGUE, "4")
    assert row.input_ids[: row.prompt_length] == encode_prompt(chatting, DIALOGUE)
    first, last = (text.replace(" ", "") for text in labelled(chatting, row))
    assert first == "<|user|>assistant\nruns</s>x</s>" and last == "4</s>"


@pytest.mark.parametrize("end", ["</s>", "</s>\n"])
def test_a_block_with_the_end_token_is_left_as_it_is(chatting, end, caplog):
    template = chat_template("ChatML", "{% generation %}", f"{{{{ {end!r} }}}}{{% endgeneration %}}")
    chatting.chat_template = template.replace(
        "{% else %}{{ m.content }}", "{% else %}{{ m.content + '</s>\n' }}"
    ).replace("{% endif %}{{ '</s>\n' }}", "{% endif %}")
    row = row_of(chatting, DIALOGUE, "4")
    assert decode(chatting, row.input_ids).count("</s>") == 5  # one of them in what the assistant said
    assert [text.replace(" ", "") for text in labelled(chatting, row)] == ["runs</s>x</s>", "4</s>"]
    assert not caplog.records


def test_a_block_without_the_end_token_is_told_once_with_the_row(caplog):
    words = KINDS["byte-level"]()
    words.chat_template = chat_template("ChatML", "{% generation %}", "{% endgeneration %}{{ ' .' }}")
    with caplog.at_level(logging.WARNING, "fastlora"):
        encode([Example(DIALOGUE, "4", f"data:{n}") for n in (7, 8)], words, 512)
    (record,) = caplog.records
    shown = "'<|user|>user\\nthe cat?</s>\\n<|user|>assistant\\n[[runs </s> x]] .</s>\\n"
    shown += "<|user|>user\\n2+2=</s>\\n<|user|>assistant\\n[[4]] .</s>\\n'"
    assert "in 2 of 2 rows" in record.getMessage() and record.getMessage().endswith(f"data:7, [[what counts]]: {shown}")


def test_a_merge_across_the_border_of_a_marked_turn_does_not_move_it():
    words = KINDS["byte-level"]()
    words.chat_template = chat_template("ChatML", "{{ '!' }}{% generation %}", "{% endgeneration %}").replace(
        "assistant\\n'", "assistant\\n!p'"
    )
    words.chat_template = words.chat_template.replace("{{ '!' }}", "{{ '!p' }}")
    row, begin = row_of(words, DIALOGUE, "laying"), encode_prompt(words, DIALOGUE)
    whole = words.apply_chat_template([*DIALOGUE, {"role": "assistant", "content": "laying"}])["input_ids"]
    assert whole[: len(begin)] != begin == row.input_ids[: row.prompt_length]
    assert decode(words, row.input_ids) == decode(words, whole)
    assert labelled(words, row)[-1] == "laying</s>" and len(labelled(words, row)) == 2


def test_a_template_that_marks_nothing_is_a_bad_line():
    words = KINDS["byte-level"]()
    words.chat_template = chat_template("ChatML", "{% if false %}{% generation %}", "{% endgeneration %}{% endif %}")
    with pytest.raises(DataError, match="data:3: the chat template writes nothing of what the assistant says"):
        encode([Example(DIALOGUE, "4", "data:3")], words, 512)


def test_a_template_that_cannot_serve_is_no_bad_line():
    words = KINDS["byte-level"]()
    for template, message in (
        ("{% for %}", "no Jinja template"),
        ("{{ messages | length }}", "renders the prompt otherwise"),
    ):
        words.chat_template = template
        with pytest.raises(ValueError, match=message) as caught:
            encode([Example(DIALOGUE, "4", "data:3")], words, 512)
        assert not isinstance(caught.value, DataError)
