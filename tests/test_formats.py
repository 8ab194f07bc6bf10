"""What a row may hold: each format becomes the same Example, and what fits none, or two, is told by name."""

import json
from typing import Any

import pytest

from fastlora.data import formats
from fastlora.data.examples import BadLine, Example, parse_columns, parse_line
from fastlora.data.formats import FIELDS, OPTIONAL, REQUIRED, example

USER = {"role": "user", "content": "How many?"}
ANSWER = {"role": "assistant", "content": "Four."}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"type": "function", "id": "c1", "function": {"name": "count", "arguments": {"of": "legs", "deep": [None, 1.5]}}}
TOOL = {"type": "function", "function": {"name": "count", "parameters": {"type": "object", "properties": {}}}}
CALLING = {"role": "assistant", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "4", "name": "count", "tool_call_id": "c1"}


def test_the_documentation_lists_the_formats_fields():
    """Each of them stands in the module's table, in the row of its format."""
    rows = [line for line in (formats.__doc__ or "").splitlines() if line.startswith("|")][2:]
    assert len(rows) == len(REQUIRED)
    for (name, required), row in zip(REQUIRED.items(), rows, strict=True):
        assert row.startswith(f"| {name} |") and all(f"`{field}`" in row for field in required)
    assert all(any(f"`{field}`" in row for row in rows) for field in OPTIONAL) and len(set(FIELDS)) == len(FIELDS)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"prompt": "a", "completion": "b", "id": 7}, Example("a", "b")),
        ({"text": "All of it."}, Example("", "All of it.")),
        ({"messages": [USER, ANSWER]}, Example([USER], "Four.")),
        ({"prompt": [USER], "completion": [ANSWER]}, Example([USER], "Four.")),
        (
            {"conversations": [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "Four."}]},
            Example([USER], "Four."),
        ),
        ({"conversations": [USER, ANSWER]}, Example([USER], "Four.")),
        (
            {"conversations": [USER, ANSWER], "system": "Be brief."},
            Example([{"role": "system", "content": "Be brief."}, USER], "Four."),
        ),
        ({"instruction": "How many?", "output": "Four."}, Example([USER], "Four.")),
        ({"instruction": "How many?", "input": "", "output": "Four.", "system": ""}, Example([USER], "Four.")),
        (
            {"instruction": "Add.", "input": "2, 2", "output": "Four.", "system": "Be brief.", "history": [["a", "b"]]},
            Example(
                [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b"},
                    {"role": "user", "content": "Add.\n\n2, 2"},
                ],
                "Four.",
            ),
        ),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_a_format_is_known_by_its_fields(fields, expected):
    assert example(fields) == expected
    assert parse_line(json.dumps(fields).encode(), "f:3") == Example(**{**vars(expected), "source": "f:3"})


def test_messages_keep_what_templates_read():
    thought = {"role": "assistant", "content": "Four.", "reasoning_content": "2 + 2", "name": None}
    found = example({"messages": [USER, CALLING, RESULT, thought], "tools": [TOOL]})
    assert found.prompt == [USER, CALLING, RESULT] and found.completion == "Four." and found.tools == [TOOL]
    assert found.turn == {"role": "assistant", "content": "Four.", "reasoning_content": "2 + 2"}
    assert found.messages == [USER, CALLING, RESULT, found.turn] and found.turns is None


def test_the_last_turn_may_call_a_tool_and_say_nothing():
    for content in ({}, {"content": None}, {"content": ""}):
        found = example({"messages": [USER, {**CALLING, **content}], "tools": json.dumps([TOOL])})
        assert found.completion == "" and found.turn["tool_calls"] == [CALL] and found.tools == [TOOL]
        assert found.messages[-1] == found.turn


def test_arguments_as_text_become_the_object_that_templates_write():
    text = {**CALL, "function": {**CALL["function"], "arguments": json.dumps(CALL["function"]["arguments"])}}
    flat = {"name": "count", "arguments": '{"of": "legs"}'}
    found = example({"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [text, flat]}]})
    assert found.turn["tool_calls"] == [CALL, {"name": "count", "arguments": {"of": "legs"}}]


def test_sharegpt_has_calls_and_what_they_give():
    call = json.dumps({"name": "count", "arguments": {"of": "legs"}})
    turns = [("human", "How many?"), ("function_call", call), ("observation", "4"), ("gpt", "Four.")]
    found = example({"conversations": [{"from": name, "value": value} for name, value in turns], "tools": "[]"})
    calling = {"role": "assistant", "tool_calls": [{"name": "count", "arguments": {"of": "legs"}}]}
    assert found == Example([USER, calling, {"role": "tool", "content": "4"}], "Four.")


def test_a_completion_of_several_messages_counts_and_its_prompt_does_not():
    found = example({"prompt": [USER, ANSWER, USER], "completion": [ANSWER, USER, ANSWER]})
    assert found.turns == (3, 5) and len(found.messages) == 6
    assert example({"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}).turns == (3,)


def test_a_weight_takes_a_turn_out():
    light = {**ANSWER, "weight": 0}
    assert example({"messages": [USER, light, USER, {**ANSWER, "weight": 1.0}]}) == Example(
        [USER, ANSWER, USER], "Four.", turns=(3,)
    )
    assert example({"messages": [{**USER, "weight": 0}, ANSWER, USER, light]}).turns == (1,)
    shared = [{"from": "human", "value": "a", "weight": 0}, {"from": "gpt", "value": "b", "weight": 1}]
    assert example({"conversations": shared}).turns is None


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "fits no format: has the fields none, expected prompt and completion; messages; conversations; "),
        ({"question": "a", "answer": "b"}, "has the fields 'question', 'answer', expected"),
        (
            {"x" * 99 + str(i): 1 for i in range(30)},
            r"fits no format: has the fields 'x{40}', .{0,90} \.\.\., expected",
        ),
        ({"prompt": "a", "completion": "b", "text": "c"}, "has both prompt and text, of two formats"),
        ({"messages": [USER, ANSWER], "output": "c"}, "has both messages and output"),
        ({"instruction": "a", "input": "b"}, "no field 'output'"),
        ({"completion": "b"}, "no field 'prompt'"),
        ({"text": " "}, "text is empty"),
        ({"text": ["a"]}, "text: expected a string, got list"),
        ({"prompt": [USER], "completion": "b"}, "expected two texts or two lists of messages, got list and str"),
        ({"prompt": [], "completion": [ANSWER]}, "prompt is empty"),
        ({"prompt": [USER], "completion": [ANSWER, USER]}, "the last message is by 'user'"),
        ({"messages": "a"}, "messages: expected a list, got str"),
        ({"messages": [ANSWER, "a"]}, r"messages\[1\]: expected an object with role and content, got str"),
        ({"messages": [USER, {"role": "assistant"}]}, r"messages\[1\]: expected an object with role and content"),
        ({"messages": [USER, {**USER, "tool_calls": [CALL]}, ANSWER]}, "a message by 'user' calls nothing"),
        ({"messages": [{"role": "user", "content": None, "tool_calls": [CALL]}, ANSWER]}, r"\[0\]: expected an object"),
        ({"messages": [USER, {**ANSWER, "content": " "}]}, r"messages\[1\].content is empty"),
        ({"messages": [USER, {**ANSWER, "content": [{"type": "text"}]}]}, "content: expected a string, got list"),
        ({"messages": [USER, {**ANSWER, "mood": 1}]}, r"messages\[1\] has the field 'mood': expected role, content, "),
        ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, r"messages\[1\].weight=0.5: expected 0 or 1"),
        ({"messages": [USER, {**ANSWER, "weight": True}]}, "weight=True"),
        ({"messages": [USER, {**ANSWER, "weight": 0}]}, "no turn of the assistant's counts"),
        ({"messages": [USER, {**CALLING, "tool_calls": {}}]}, r"messages\[1\]: expected an object with role"),
        (
            {"messages": [USER, {**CALLING, "tool_calls": ["f"]}]},
            r"tool_calls\[0\]: expected an object with a function",
        ),
        ({"messages": [USER, {**CALLING, "tool_calls": [{"function": {"name": 3}}]}]}, "a function's name and arg"),
        (
            {"messages": [USER, {**CALLING, "tool_calls": [{"name": "f", "arguments": "{"}]}]},
            r"tool_calls\[0\].arguments: not JSON",
        ),
        (
            {"messages": [USER, {**CALLING, "tool_calls": [{"name": "f", "arguments": "[1]"}]}]},
            "arguments: expected a JSON object, got list",
        ),
        (
            {"messages": [USER, {**CALLING, "tool_calls": [{"name": "f", "arguments": {"x": float("nan")}}]}]},
            r"tool_calls\[0\]: nan is no JSON",
        ),
        (
            {"messages": [USER, {**CALLING, "tool_calls": [{"name": "f", "arguments": {"\ud800": 1}}]}]},
            r"tool_calls\[0\] has half of a surrogate pair",
        ),
        (
            {"messages": [USER, {**CALLING, "tool_calls": [{"name": "f", "arguments": {"x": nested(40)}}]}]},
            r"tool_calls\[0\] is nested deeper than 32",
        ),
        ({"messages": [USER, ANSWER], "tools": "[1"}, "tools: not JSON"),
        ({"messages": [USER, ANSWER], "tools": "3"}, "tools: expected a list, got int"),
        ({"messages": [USER, ANSWER], "tools": ["f"]}, r"tools\[0\]: expected an object, got str"),
        ({"messages": [USER, ANSWER], "tools": [{"x": nested(40)}]}, r"tools\[0\] is nested deeper"),
        ({"conversations": [USER]}, "conversations: expected a list of at least two turns"),
        (
            {"conversations": [{"from": "bing", "value": "a"}, ANSWER]},
            r"conversations\[0\].from='bing': expected one of",
        ),
        ({"conversations": [{"from": "human"}, ANSWER]}, r"conversations\[0\]: expected from and value, or role and"),
        ({"conversations": [{"from": "human", "value": "a", "role": "user"}, ANSWER]}, "expected from and value, or"),
        ({"conversations": [USER, {"from": "function_call", "value": "f()"}]}, r"\[1\].value: not JSON"),
        ({"conversations": [USER, {"from": ["gpt"], "value": "a"}]}, r"from=\['gpt'\]"),
        (
            {"instruction": "a", "output": "b", "history": ["c"]},
            r"history\[0\]: expected an instruction and its answer",
        ),
        ({"instruction": "a", "output": "b", "history": {"c": 1}}, "history: expected a list, got dict"),
        ({"instruction": "a", "output": "b", "input": 3}, "input: expected a string, got int"),
        (
            {"prompt": "a", "completion": "b", "tools": [TOOL]},
            "tools: prompt and completion are texts, which have no p",
        ),
        ({"prompt": "a", "completion": "b", "system": "Be brief."}, "system: prompt and completion are texts"),
        (
            {"messages": [SYSTEM, USER, ANSWER], "system": "Be long."},
            "has a system, and another one as its first message",
        ),
    ],
)
def test_a_bad_row_is_told_by_its_field(fields, message):
    with pytest.raises(BadLine, match=message) as caught:
        example(fields)
    assert len(str(caught.value)) < 300


def test_columns_say_what_is_read_and_nothing_else_is():
    row = {"question": "a", "answer": "b", "text": "c", "messages": 3}
    assert example(row, columns={"prompt": "question", "completion": "answer"}) == Example("a", "b")
    assert example(row, columns={"text": "text"}) == Example("", "c")
    alpaca = {"instruction": "instruction", "output": "output", "input": "input"}
    assert example({"instruction": "a", "output": "b", "text": "x"}, columns=alpaca) == Example(
        [{"role": "user", "content": "a"}], "b"
    )
    with pytest.raises(BadLine, match="no column 'reply': there are 'question', 'answer', 'text', 'messages'"):
        example(row, columns={"prompt": "question", "completion": "reply"})
    with pytest.raises(BadLine, match="no field 'completion'"):
        example(row, columns={"prompt": "question"})


@pytest.mark.parametrize(
    "fields",
    [{"messages": [USER, ANSWER]}, {"prompt": [USER], "completion": [ANSWER]}, {"conversations": [USER, ANSWER]}],
)
def test_a_system_of_its_own_is_the_first_message_and_never_the_second(fields):
    opened = {name: value if name == "completion" else [SYSTEM, *value] for name, value in fields.items()}
    expected = Example([SYSTEM, USER], "Four.", turns=example(fields).turns)
    assert example(fields | {"system": SYSTEM["content"]}) == example(opened) == expected
    assert example(opened | {"system": SYSTEM["content"]}) == example(opened | {"system": None}) == expected
    assert example(fields | {"system": ""}) == example(fields) != expected


def test_the_turns_that_count_are_told_behind_a_system():
    light = {**ANSWER, "weight": 0}
    assert example({"messages": [USER, light, USER, ANSWER], "system": "Be brief."}).turns == (4,)


def test_alpaca_has_tools_and_two_texts_may_have_none_of_them():
    alpaca = {"instruction": "How many?", "output": "Four.", "tools": json.dumps([TOOL])}
    assert example(alpaca) == Example([USER], "Four.", tools=[TOOL])
    for tools in ([], "", "[]", None):
        assert example({"prompt": "a", "completion": "b", "tools": tools, "system": ""}) == Example("a", "b")


def test_columns_name_parts_of_objects():
    row = {"a": {"q": "x", "deep": {"r": "y"}}, "a.q": "whole", "b": [1]}
    assert example(row, columns={"prompt": "a.q", "completion": "a.deep.r"}) == Example("whole", "y")
    alpaca = {"instruction": "a.q", "output": "a.deep.r", "input": "a.no"}
    assert example(row, columns=alpaca) == Example([{"role": "user", "content": "whole"}], "y")
    for column in ("a.no", "a.q.x.y", "b.0", "."):
        with pytest.raises(BadLine, match=f"no column '{column}': there are 'a', 'a.q', 'b'"):
            example(row, columns={"prompt": "a.q", "completion": column})


def test_columns_are_spelt_with_commas():
    assert parse_columns("prompt=question, completion=the answer") == {"prompt": "question", "completion": "the answer"}
    for text in ("prompt", "prompt=", "prompt=a,,completion=b", "prompt=a,prompt=b"):
        with pytest.raises(ValueError, match="expected field=column with commas, each field once"):
            parse_columns(text)
    for columns, message in (
        ({}, "columns={}: expected names"),
        ({"question": "a"}, "got 'question'"),
        ({"prompt": ""}, "got 'prompt'"),
        ({"prompt": "#1", "completion": "answer"}, "or numbers"),
        ({"text": "a", "tools": "b"}, "text has no tools, expected none"),
        ({"messages": "a", "input": "b"}, "messages has no input, expected none"),
    ):
        with pytest.raises(ValueError, match=message):
            formats.check_columns(columns)
    assert [formats.is_numbered(one) for one in ("#1", "#12", "#0", "#", "#x", "1")] == [True, True] + [False] * 4
