"""Lines in, token rows out: which lines are refused, which tokens count."""

import json
import lzma
import os
import random
from pathlib import Path

import pytest
import tiny
import torch
from tokenizers import processors

from fastlora.data.examples import BadLine, DataError, Example, parse_line, read_examples
from fastlora.data.prompts import cut_prompt, encode_prompt
from fastlora.data.rows import TRUNCATIONS, Row, collate, encode
from fastlora.language_model_loss import IGNORE

GOOD = b'{"prompt": "a", "completion": "b"}\n'
GENERATION_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
DIALOGUE = [
    {"role": "user", "content": "The cat"},
    {"role": "assistant", "content": "runs"},
    {"role": "user", "content": "The dog"},
    {"role": "assistant", "content": "sings"},
]


@pytest.fixture
def words():
    return tiny.tokenizer()


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def counted(words, row) -> str:
    return words.decode([label for label in row.labels if label != IGNORE])


def test_only_the_completion_and_the_end_token_count(words):
    (row,) = encode([Example("The cat sings.", " It sings.")], words, 64).rows
    prompt = words("The cat sings.")["input_ids"]
    completion = [*words(" It sings.", add_special_tokens=False)["input_ids"], words.eos_token_id]
    assert prompt[0] == words.bos_token_id
    assert row.input_ids == prompt + completion
    assert row.labels == [IGNORE] * len(prompt) + completion
    assert row.labelled == len(completion)


def test_a_merge_across_the_border_does_not_move_it(words):
    together = words("The cat")["input_ids"]
    prompt, completion = "The c", "at"
    assert together != words(prompt)["input_ids"] + words(completion, add_special_tokens=False)["input_ids"]
    (row,) = encode([Example(prompt, completion)], words, 64).rows
    assert row.input_ids[: len(row.input_ids) - row.labelled] == encode_prompt(words, prompt)
    assert counted(words, row) == "at</s>"


def test_a_tokenizer_that_closes_every_text_does_not_end_the_prompt(words):
    ends = [("<s>", words.bos_token_id), ("</s>", words.eos_token_id)]
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    assert words("The cat")["input_ids"][-1] == words.eos_token_id
    (row,) = encode([Example("The cat", " runs")], words, 64).rows
    assert row.input_ids.count(words.eos_token_id) == 1 and row.input_ids[-1] == words.eos_token_id


def test_messages_count_the_last_turn(words, tmp_path):
    examples = read_examples(write(tmp_path / "data.jsonl", {"messages": DIALOGUE}))
    (row,) = encode(examples, words, 64).rows
    assert counted(words, row) == "sings</s>"
    assert words.decode(row.input_ids) == words.apply_chat_template(DIALOGUE, tokenize=False)
    assert encode_prompt(words, DIALOGUE[:-1]) == row.input_ids[: len(row.input_ids) - row.labelled]


def test_messages_count_every_marked_turn(words):
    words.chat_template = GENERATION_TEMPLATE
    (row,) = encode([Example(DIALOGUE[:-1], "sings")], words, 64).rows
    assert counted(words, row) == "runs</s>sings</s>"


def test_messages_without_a_template_are_refused(words):
    words.chat_template = None
    with pytest.raises(ValueError, match="chat template"):
        encode([Example(DIALOGUE[:-1], "sings")], words, 64)


def test_a_template_that_refuses_names_the_line(words):
    words.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"data:7: roles must alternate"):
        encode([Example(DIALOGUE[:-1], "sings", "data:7")], words, 64)


BAD_LINES = {
    "{": r"not JSON \(Expecting property name enclosed in double quotes: column 2\)",
    "[" * 100_000: "not JSON",
    "[1]": "expected a JSON object, got list",
    '{"prompt": "a"}': "no field 'completion': there are 'prompt'",
    '{"promt": "a", "completion": "b"}': "no field 'prompt': there are 'promt', 'completion'",
    '{"question": "a"}': "fits no format: has the fields 'question', expected prompt and completion; messages; ",
    '{"prompt": 1, "completion": "b"}': "prompt: expected a string, got int",
    '{"prompt": "a", "completion": null}': "completion: expected a string, got NoneType",
    '{"prompt": "a", "completion": " "}': "completion is empty",
    '{"prompt": "", "completion": "b"}': "prompt is empty",
    '{"prompt": "\\ud800", "completion": "b"}': "surrogate",
    '{"prompt": "a", "messages": []}': "has both",
    '{"prompt": "a", "completion": "b", "id": %s}' % ("1" * 5000): "not JSON .*5000 digits",
    '{"prompt": "a", "completion": "b", "prompt": "c"}': "the field 'prompt' is there twice",
    '{"prompt": NaN, "completion": "b"}': "prompt: expected a string, got float",
    '{"prompt": "a\0", "completion": "b"}': "not JSON",
    '\ufeff{"prompt": "a", "completion": "b"}': "not JSON .*BOM",
    '{"prompt": "a", "completion": "b"} {"prompt": "a", "completion": "b"}': "not JSON .*Extra data",
    '{"messages": [{"role": "user", "content": "a"}]}': "at least two",
    '{"messages": [{"role": "user"}, {"role": "assistant", "content": "b"}]}': r"messages\[0\]: expected an object",
    '{"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]}': "by 'user'",
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.items(), ids=range(len(BAD_LINES)))
def test_a_bad_line_is_named_with_file_and_number(tmp_path, line, message):
    path = write(tmp_path / "data.jsonl", {"prompt": "a", "completion": "b"}, "", line)
    with pytest.raises(DataError, match=rf"data\.jsonl:3: .*{message}"):
        read_examples(path)


def test_bytes_that_are_no_text_are_named(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"prompt": "a", "completion": "b"}\n\xff\n')
    with pytest.raises(DataError, match=r"data\.jsonl:2: not UTF-8"):
        read_examples(path)


def test_all_bad_lines_are_found_and_twenty_listed(tmp_path):
    path = write(tmp_path / "data.jsonl", *[f'{{"field {n}": ""}}' for n in range(25)])
    with pytest.raises(DataError) as caught:
        read_examples(path)
    assert [problem.split(": ")[0] for problem in caught.value.problems] == [f"{path}:{n}" for n in range(1, 26)]
    assert str(caught.value).count("data.jsonl:") == 20 and str(caught.value).endswith("and 5 more")


def test_lines_with_one_fault_are_told_as_one(tmp_path):
    lines = [line for _ in range(30) for line in ("{", '{"text": ""}')]
    path = write(tmp_path / "data.jsonl", *lines, '{"text": 1}', '{"text": ""}')
    with pytest.raises(DataError) as caught:
        read_examples(path)
    heading, *told = str(caught.value).splitlines()
    assert heading == "62 bad lines in the data:" and len(caught.value.problems) == 62 and len(told) == 3
    assert told[0].startswith(f"{path}:1: ")
    assert told[0].endswith(f" (and 29 like it: {path}:3, {path}:5, {path}:7, ...)")
    assert told[1].startswith(f"{path}:2: ") and "(and 30 like it: " in told[1]
    assert told[2].startswith(f"{path}:61: ") and "like it" not in told[2]


def test_files_that_cannot_be_read_are_named(tmp_path):
    compressed = tmp_path / "data.jsonl.xz"
    compressed.write_bytes(lzma.compress(GOOD))
    (tmp_path / "folder").mkdir()
    wide = tmp_path / "wide.jsonl"
    wide.write_bytes(GOOD.decode().encode("utf-16"))
    for path, kind, message in (
        (write(tmp_path / "empty.jsonl", ""), ValueError, r"empty\.jsonl has no rows"),
        (tmp_path / "missing.jsonl", FileNotFoundError, r"there is no file .*missing\.jsonl"),
        (tmp_path / "folder", ValueError, r"folder is a folder without files that end in \.jsonl, "),
        (compressed, ValueError, r"data\.jsonl\.xz is xz, expected text in UTF-8: unpack it first, or pack it by gzip"),
        (wide, ValueError, r"wide\.jsonl is UTF-16 text, expected text in UTF-8"),
        (tmp_path / ("x" * 300), OSError, "xxx cannot be read: "),
    ):
        with pytest.raises(kind, match=f"^data: .*{message}") as caught:
            read_examples(path)
        assert not isinstance(caught.value, DataError)


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + GOOD,  # a byte order mark
        GOOD.replace(b"\n", b"\r\n"),
        GOOD.rstrip(b"\n"),
        b"\n \t\r\n" + GOOD + b"\n",
        b'{"score": NaN, "worst": -Infinity, "big": 1e999, "prompt": "a", "completion": "b"}\n',
        b'{"half": "\\ud800", "\\ud800": 1, "prompt": "a", "completion": "b"}',
    ],
)
def test_lines_of_other_programs_are_read(tmp_path, content):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    (example,) = read_examples(path)
    assert (example.prompt, example.completion) == ("a", "b")


def test_a_pipe_is_read():
    reader, writer = os.pipe()
    os.write(writer, GOOD)
    os.close(writer)
    assert len(read_examples(f"/dev/fd/{reader}")) == 1
    os.close(reader)


def test_random_bytes_are_an_example_or_a_bad_line():
    draw = random.Random(0)
    seeds = [
        GOOD,
        json.dumps({"messages": DIALOGUE}).encode(),
        *(line.encode() for line in BAD_LINES if len(line) < 200),
    ]
    pieces = [
        b'"',
        b"{",
        b"}",
        b"[",
        b"]",
        b":",
        b",",
        b"\\",
        b"\0",
        b"\xff",
        b"\xed\xa0\x80",
        b"1" * 5000,
        b"NaN",
        b"[" * 5000,
    ]
    read = 0
    for _ in range(3000):
        line = bytearray(draw.choice(seeds))
        for _ in range(draw.randint(0, 3)):
            start = draw.randint(0, len(line))
            line[start : start + draw.randint(0, 4)] = draw.choice([*pieces, bytes([draw.randrange(256)])])
        try:
            example = parse_line(bytes(line), "source")
        except BadLine as error:
            assert str(error) and len(str(error)) < 300
        else:
            read += 1
            texts = [example.prompt] if isinstance(example.prompt, str) else [one["content"] for one in example.prompt]
            assert all(text.encode() for text in (*texts, example.completion)) and example.source == "source"
    assert 50 < read < 2950


def parts(words, row: Row) -> tuple[str, str]:
    """A row's prompt and what counts of it, as text."""
    return words.decode(row.input_ids[: row.prompt_length]), counted(words, row)


LONG = Example("The owl hides. The cat runs. What does the cat do?", " It runs.", "data:1")


def test_a_row_that_is_too_long_loses_its_prompts_oldest_tokens(words, caplog):
    whole = encode([LONG], words, 64).rows[0]
    (row,) = (encoded := encode([LONG], words, 12)).rows
    assert len(row.input_ids) == 12 and row.input_ids[0] == words.bos_token_id
    assert row.input_ids[1:] == whole.input_ids[-11:] and row.labels[1:] == whole.labels[-11:]
    assert parts(words, row)[1] == " It runs.</s>" and parts(words, row)[0].endswith("does the cat do?")
    assert row.input_ids[: row.prompt_length] == cut_prompt(words, encode_prompt(words, LONG.prompt), row.prompt_length)
    assert encoded.prompt_cut == encoded.examples == [LONG] and not encoded.completion_cut + encoded.dropped
    (record,) = caplog.records
    assert (
        record.getMessage() == "max_length=12: cut the oldest tokens of the prompt in 1 of 1 rows (the first: data:1)"
    )


def test_words_that_run_together_across_the_seam_are_told(words, caplog):
    parted = [("Is it?", "yes"), ("is", " it"), ("is\n", "it"), ("は", "い"), ("(", "a"), ("2 +", "2"), ("", "text")]
    encode([Example(prompt, completion, "data:1") for prompt, completion in parted], words, 64)
    assert not caplog.records
    seams = [("- yes\n- no", "no"), ("2", "2"), ("не", "да"), ("the cat", "s")]
    encode(
        [Example(prompt, completion, f"data:{n}") for n, (prompt, completion) in enumerate([*parted, *seams])],
        words,
        64,
    )
    (record,) = caplog.records
    assert record.getMessage() == (
        "prompt and completion run together in 4 of 11 rows (the first, data:7: '- yes\\n- no' and 'no'):"
        " expected a space or line break between them"
    )


def test_a_completion_that_leaves_no_room_for_its_prompt_loses_its_end(words, caplog):
    example = Example("What does the cat do?", " It runs. It sleeps. It sings. It eats. It hides." * 2, "data:2")
    (row,) = (encoded := encode([example], words, 12)).rows
    prompt, completion = parts(words, row)
    assert (len(row.input_ids), row.prompt_length) == (12, 6) and row.input_ids[0] == words.bos_token_id
    assert example.prompt.endswith(prompt.removeprefix("<s>")) and example.completion.startswith(completion)
    assert encoded.prompt_cut == encoded.completion_cut == [example]
    assert [record.getMessage().split(": ")[1] for record in caplog.records] == [
        "cut the oldest tokens of the prompt in 1 of 1 rows (the first",
        "cut the end of the completion, and its end token, in 1 of 1 rows (the first",
    ]


def test_every_way_to_cut(words):
    end = Example("The", " cat runs and eats and sings.", "data:2")
    short = Example("The", " cat", "data:3")
    found = {name: encode([LONG, end, short], words, 10, name) for name in TRUNCATIONS}
    cut = {name: (one.examples, one.dropped, one.prompt_cut, one.completion_cut) for name, one in found.items()}
    assert cut == {
        "prompt": ([LONG, end, short], [], [LONG], [end]),
        "completion": ([end, short], [LONG], [], [end]),
        "drop": ([short], [LONG, end], [], []),
    }
    assert all(len(row.input_ids) <= 10 for one in found.values() for row in one.rows)
    whole = encode([end], words, 64).rows[0]
    assert found["completion"].rows[0].input_ids == whole.input_ids[:10]


def test_messages_are_cut_alike_and_what_follows_the_end_token_goes_first(words):
    words.chat_template = words.chat_template.replace("{{ eos_token }}", "{{ eos_token }}{{ '\n' }}")
    whole = encode([Example(DIALOGUE[:-1], "sings")], words, 64).rows[0]
    assert words.decode(whole.input_ids).endswith("</s>\n") and parts(words, whole)[1] == "sings</s>"
    total = len(whole.input_ids)
    last = len(words("\n", add_special_tokens=False)["input_ids"])
    for name in TRUNCATIONS:
        encoded = encode([Example(DIALOGUE[:-1], "sings")], words, total - last, name)
        assert encoded.rows[0].input_ids == whole.input_ids[:-last]
        assert not encoded.prompt_cut + encoded.completion_cut + encoded.dropped
    (row,) = encode([Example(DIALOGUE[:-1], "sings")], words, 10).rows
    later = encode([Example(DIALOGUE[2:-1], "sings")], words, 64).rows[0]
    assert len(row.input_ids) == 10 and row.input_ids == [*later.input_ids[:2], *later.input_ids[3:-last]]
    assert row.input_ids[: row.prompt_length] == cut_prompt(
        words, encode_prompt(words, DIALOGUE[:-1]), row.prompt_length, DIALOGUE[:-1]
    )


def test_a_max_length_that_drops_every_row_is_no_bad_line(words):
    for truncation in ("completion", "drop"):
        with pytest.raises(ValueError, match=f"max_length=8 with truncation='{truncation}' drops every one") as caught:
            encode([LONG], words, 8, truncation)
        assert not isinstance(caught.value, DataError)
    assert len(encode([LONG], words, 8).rows[0].input_ids) == 8


def test_wrong_options_are_named(words):
    for options, message in (
        ((1,), "max_length=1: expected an integer, at least 2"),
        ((64.0,), "max_length=64.0"),
        ((True,), "max_length=True"),
        ((64, "end"), "truncation='end': expected one of prompt, completion, drop"),
    ):
        with pytest.raises(ValueError, match=message):
            encode([LONG], words, *options)
    with pytest.raises(ValueError, match="expected at least one row"):
        encode([], words, 64)


def test_collate_pads_on_the_right(words):
    rows = encode(
        [Example("The cat", " runs"), Example("The dog sleeps. What does the dog do?", " It sleeps.")], words, 64
    ).rows
    batch = collate(rows, pad=0)
    for i, row in enumerate(rows):
        n = len(row.input_ids)
        assert batch["input_ids"][i].tolist() == row.input_ids + [0] * (batch["input_ids"].shape[1] - n)
        assert batch["attention_mask"][i].sum() == n and batch["attention_mask"][i, :n].all()
        assert batch["labels"][i].tolist() == row.labels + [IGNORE] * (batch["labels"].shape[1] - n)
    assert all(value.dtype == torch.int64 for value in batch.values())
