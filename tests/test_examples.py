"""Lines in, token rows out: which lines are refused, which tokens count."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from tokenizers import processors

from fastlora.data.examples import IGNORE, DataError, Example, collate, encode, encode_prompt, read_examples

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
    "{": "not JSON",
    "[" * 100_000: "not JSON",
    "[1]": "expected a JSON object, got list",
    '{"prompt": "a"}': "no field 'completion'",
    '{"text": "a"}': "no field 'prompt' and no field 'completion'",
    '{"prompt": 1, "completion": "b"}': "prompt: expected a string, got int",
    '{"prompt": "a", "completion": null}': "completion: expected a string, got NoneType",
    '{"prompt": "a", "completion": " "}': "completion is empty",
    '{"prompt": "", "completion": "b"}': "prompt is empty",
    '{"prompt": "\\ud800", "completion": "b"}': "surrogate",
    '{"prompt": "a", "messages": []}': "has both",
    '{"messages": [{"role": "user", "content": "a"}]}': "at least two",
    '{"messages": [{"role": "user"}, {"role": "assistant", "content": "b"}]}': r"messages\[0\]: expected an object",
    '{"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]}': "by 'user'",
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.items(), ids=list(BAD_LINES.values()))
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
    path = write(tmp_path / "data.jsonl", *["{"] * 25)
    with pytest.raises(DataError) as caught:
        read_examples(path)
    assert [problem.split(": ")[0] for problem in caught.value.problems] == [f"{path}:{n}" for n in range(1, 26)]
    assert str(caught.value).count("data.jsonl:") == 20 and str(caught.value).endswith("and 5 more")


def test_a_file_without_rows_and_no_file_are_errors(tmp_path):
    with pytest.raises(DataError, match="no rows"):
        read_examples(write(tmp_path / "empty.jsonl", ""))
    with pytest.raises(FileNotFoundError, match=r"missing\.jsonl"):
        read_examples(tmp_path / "missing.jsonl")


def test_rows_that_lose_their_completion_are_dropped_and_counted(words):
    long, short = (
        Example("The cat runs. " * 8, " It runs.", "data:1"),
        Example("The", " cat runs and eats and sings.", "data:2"),
    )
    encoded = encode([long, short], words, 8)
    assert encoded.dropped == [long] and encoded.cut == 1
    (row,) = encoded.rows
    assert len(row.input_ids) == 8 and row.labelled > 0


def test_it_is_an_error_if_every_row_is_dropped(words):
    with pytest.raises(DataError, match="max_length=8 cuts off the whole completion of every one of the 1 rows"):
        encode([Example("The cat runs. " * 8, " It runs.")], words, 8)


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
