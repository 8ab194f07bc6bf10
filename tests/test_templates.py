"""TemplateSet: what a row gets follows from seed and number, no row stands before itself, shares come out, and a stranger's text is a text."""

from collections import Counter
from dataclasses import replace

import pytest

from fastlora import Template, TemplateSet
from fastlora.data.examples import BadLine, Example
from fastlora.data.templates import ASSETS, LISTINGS, shipped
from fastlora.reading import yaml_file

ROWS = [{"text": f"note {i}", "label": ("good", "bad")[i % 2]} for i in range(200)]
ASKED = [
    Template("How is {text}?\n{options}", "{label}", "listed"),
    Template("{text}: good or bad?", "{label}", "plain"),
    Template("Rate {text}.\n{options}", "It is {label}.", "sentence"),
]
TURNED = [Template("Write something {label}.", "{text}", "turned")]


def a_set(**fields: object) -> TemplateSet:
    return TemplateSet(
        **{"templates": ASKED, "inverted": TURNED, "options": ["good", "bad"], "name": "notes", **fields}
    )


def all_of(templates: TemplateSet, rows: list[dict] = ROWS, **more: object) -> list[Example]:
    return [templates.example(rows, number, **more) for number in range(len(rows))]


def test_the_same_seed_and_number_give_the_same_and_others_give_others():
    mixed = a_set(few_shot_share=0.5, inverted_share=0.1)
    once = all_of(mixed, seed=3)
    assert [mixed.example(ROWS, number, seed=3) for number in reversed(range(200))] == once[::-1]
    assert all_of(replace(mixed), seed=3) == once != all_of(mixed, seed=4) != all_of(a_set(name="other"), seed=4)
    # These very texts, on every machine: a draw that changes is another training.
    first = a_set(few_shot_share=1.0, shots=[1]).example(ROWS, 0, seed=0)
    assert (first.task, first.completion in ("good", "It is good.")) == ("notes", True)


def test_every_wording_and_listing_comes_and_the_names_stay_with_the_example():
    found = all_of(a_set(inverted_share=0.2))
    assert {one.template for one in found} == {"listed", "plain", "sentence", "turned"}
    listed = [one.prompt for one in found if one.template == "listed"]
    for opening, _, _ in LISTINGS:
        assert any(opening in prompt for prompt in listed), opening
    assert {prompt.index("good") < prompt.index("bad") for prompt in listed} == {True, False}


@pytest.mark.parametrize(
    ("few", "turned", "listed"), [(0.5, 0.1, None), (0.25, 0.25, 0.5), (0.0, 0.0, 1.0), (1.0, 0.0, 0.3)]
)
def test_shares_come_out_in_every_stretch_of_rows(few, turned, listed):
    """By Kronecker's sequence, of whose first hundred points no interval misses its share by more than three or four."""
    plain = [Template("{text}", "{label}", "p"), ASKED[1]]
    mixed = a_set(few_shot_share=few, inverted_share=turned, options_share=listed, templates=[*ASKED, *plain])
    found = all_of(mixed, seed=5)
    for start in (0, 37, 100):
        stretch = found[start : start + 100]
        assert abs(sum("shot" in one.template for one in stretch) - 100 * few) <= 4
        assert abs(sum(one.template == "turned" for one in stretch) - 100 * turned) <= 4
        if listed is not None:
            asked = [one for one in stretch if one.template != "turned"]
            shows = sum(one.template.startswith(("listed", "sentence")) for one in asked)
            assert abs(shows - listed * len(asked)) <= 6


def test_examples_are_other_rows_in_the_same_wording_and_never_the_row_nor_what_asks_the_same():
    rows = [{"text": f"note {i % 20}", "label": "good"} for i in range(60)]  # each question three times
    asked = Template("<{text}>", "{label}.", "t")
    mixed = TemplateSet(
        [asked], "notes", few_shot_share=1.0, shots=[1, 2, 5], x_y_delimiter=" -> ", example_separator=" | "
    )
    shots = Counter()
    for number, one in enumerate(all_of(mixed, rows)):
        *before, own = one.prompt.split(" | ")
        assert own == f"<{rows[number]['text']}> -> " and one.completion == "good."
        assert all(part.endswith(" -> good.") for part in before)
        assert not any(part.startswith(f"<{rows[number]['text']}>") for part in before)
        assert one.template == f"t ({len(before)} shot{'s' * (len(before) > 1)})"
        shots[len(before)] += 1
    assert set(shots) == {1, 2, 5} and min(shots.values()) >= 10
    alone = mixed.example(rows[:1], 0)
    assert alone.template == "t" and alone.prompt == "<note 0> -> "
    assert mixed.example([rows[0], rows[20], rows[40]], 1).template == "t", "all ask the same"


def test_what_asks_the_same_in_other_letters_or_spaces_gives_no_answer_away():
    rows = [{"text": ("Who came?", " who\ncame? ", "WHO  CAME?")[i % 3] if i < 6 else f"n{i}", "label": f"l{i // 6}"}
            for i in range(12)]  # fmt: skip
    asked = TemplateSet([Template("{text}", "{label}", "t")], few_shot_share=1.0, shots=[5])
    for number, one in enumerate(all_of(asked, rows)[:6]):
        assert "l0" not in one.prompt and "shot" in one.template, number


def test_a_bad_row_that_stands_before_another_is_told_by_its_number():
    rows = [*ROWS[:5], {"text": "odd", "label": "awful"}]
    asked = TemplateSet([ASKED[0]], options=["good", "bad"], few_shot_share=1.0, shots=[5])
    told = "^row 6 of the task, which is to stand before it: label='awful': expected one of good, bad"
    for number in range(5):
        with pytest.raises(BadLine, match=told):
            asked.example(rows, number)
    with pytest.raises(BadLine, match="^label='awful'"):
        asked.example(rows, 5)
    with pytest.raises(BadLine, match="^row 6 of the task, which is to stand before it: no field 'text'"):
        asked.example([*ROWS[:5], {"label": "good"}], 0)


def test_examples_that_make_a_row_too_long_are_left_out_and_the_row_itself_never():
    rows = [{"text": "x" * 10, "label": "good"}, *({"text": f"{i:010}", "label": "good"} for i in range(50))]
    full = TemplateSet(
        [Template("{text}", "{label}")], few_shot_share=1.0, shots=[5], x_y_delimiter=":", example_separator=";"
    )
    whole, one_more = full.example(rows, 0).prompt, len("0000000000:good;")
    for most, left in ((15, 0), (15 + one_more - 1, 0), (15 + one_more, 1), (15 + 3 * one_more, 3), (500, 5), (1, 0)):
        short = replace(full, max_characters=most).example(rows, 0)
        assert short.prompt == whole[: left * one_more] + "x" * 10 + ":", most
    by_tokens = replace(full, max_tokens=4)
    words = lambda example: example.prompt.count(":") + 1  # noqa: E731
    assert by_tokens.example(rows, 0, length=words).prompt.count(";") == 2
    assert full.example(rows, 0, length=words, max_tokens=3).prompt.count(";") == 1
    assert by_tokens.example(rows, 0, length=words, max_tokens=3).prompt.count(";") == 1
    with pytest.raises(ValueError, match="^max_tokens=4: expected a length"):
        by_tokens.example(rows, 0)


def test_messages_in_place_of_text():
    one = a_set(as_messages=True, few_shot_share=1.0, shots=[2]).example(ROWS, 0)
    (message,) = one.prompt
    assert (
        message["role"] == "user" and message["content"].count("\n\n\n") == 2 and not message["content"].endswith("\n")
    )


def test_a_text_is_a_text_and_nothing_is_read_into_it():
    rows = [{"text": "{label} {0} {text.x} {{", "label": "bad"}]
    one = TemplateSet([Template("{{{text}}} {options}", "{label}")], options=["good", "bad"]).example(rows, 0)
    assert one.prompt.startswith("{{label} {0} {text.x} {{} ")
    listed = TemplateSet([Template("{words}", "{n}")]).example([{"words": ["a", "b", 3], "n": 0.5}], 0)
    assert (listed.prompt, listed.completion) == ("a, b, 3\n", "0.5")


@pytest.mark.parametrize(
    "text",
    [
        "{text.__class__}",
        "{text[0]}",
        "{text!r}",
        "{text:>9}",
        "{}",
        "{0}",
        "{text",
        "text}",
        "{a b}",
        "{text:{x}}",
        "{ text}",
    ],
)
def test_what_is_no_field_is_no_template(text):
    for which in ("input", "target"):
        with pytest.raises(ValueError, match=rf"^{which}: .*expected"):
            Template(**{"input": "a {text}", "target": "{text}", which: text})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"label": "bad"}, "no field 'text', there are label"),
        ({"text": None, "label": "bad"}, "text: expected a text, a number, or a list of them, got NoneType"),
        ({"text": ["a", {}], "label": "bad"}, "text: expected .*, got dict"),
        ({"text": "a", "label": "awful"}, "label='awful': expected one of good, bad"),
        ({"text": "a\ud800", "label": "bad"}, "half of a surrogate pair"),
        ({"text": float("nan"), "label": "bad"}, "text=nan: expected a text, or a finite number"),
        ({"text": ["a", float("inf")], "label": "bad"}, "text=inf: expected a text, or a finite"),
    ],
)
def test_a_row_that_cannot_be_asked_says_why(row, message):
    with pytest.raises(BadLine, match=message):
        TemplateSet([ASKED[0]], options=["good", "bad"]).example([row], 0)


def test_an_empty_text_is_no_row():
    with pytest.raises(BadLine, match="the target of template '' is empty"):
        TemplateSet([Template("{text}", "{label}")]).example([{"text": "a", "label": " "}], 0)
    sentence = TemplateSet([Template("{text}", "It is {label}.", "s")])
    with pytest.raises(BadLine, match="label is empty, which the target of template 's' has"):
        sentence.example([{"text": "a", "label": ""}], 0)
    part = TemplateSet([ASKED[1]]).example([{"text": "", "label": "good"}], 0)
    assert part.prompt == ": good or bad?\n", "what is asked may be empty in part"


def test_options_of_the_row_itself():
    asked = TemplateSet([Template("{question} {options}", "{answer}")], options="choices")
    one = asked.example([{"question": "2+2?", "choices": [3, 4], "answer": 4}], 0)
    assert one.completion == "4" and "3" in one.prompt
    assert asked.example([{"question": "2+2?", "choices": [3, 4, "3"], "answer": 4}], 0).prompt.count("3") == 1
    for wrong in ("3, 4", ["4"], ["4", 4], None, [{"text": "4"}, "3"]):
        with pytest.raises(BadLine, match="^choices: expected a list of at least two options"):
            asked.example([{"question": "2+2?", "choices": wrong, "answer": "4"}], 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"templates": []}, "^templates: expected at least one"),
        ({"templates": "sentiment"}, "^templates='sentiment': expected a list"),
        ({"few_shot_share": 1.5}, "^few_shot_share=1.5: expected 0 to 1"),
        ({"few_shot_share": 0.7, "inverted_share": 0.7}, "^few_shot_share=0.7: expected at most 1 together"),
        ({"inverted": [], "inverted_share": 0.1}, "^inverted_share=0.1: expected templates in inverted"),
        ({"shots": []}, r"^shots=\[\]: expected numbers"),
        ({"shots": [0]}, r"^shots=\[0\]: expected numbers"),
        ({"shots": 3}, "^shots=3: expected a list of int"),
        ({"max_tokens": 0}, "^max_tokens=0: expected 1"),
        ({"max_tokens": 9, "max_characters": 9}, "^max_characters and max_tokens exclude"),
        ({"options": []}, "^options: expected the answers"),
        ({"options": ["good", "good"]}, "^options=.*: expected each once"),
        ({"options_share": 0.5, "templates": ASKED[:1]}, "^options_share=0.5: expected a template without"),
        ({"options_share": 0.5, "templates": ASKED[1:2]}, "^options_share=0.5: expected a template with"),
        ({"as_messages": 1}, "^as_messages=1: expected bool"),
    ],
)
def test_a_field_that_is_none_is_named(fields, message):
    with pytest.raises((TypeError, ValueError), match=message):
        a_set(**fields)


def test_the_target_lists_no_options():
    with pytest.raises(ValueError, match="^target: expected the answer"):
        Template("{text}", "{options}")


SHIPPED = {
    "summarisation": {"dialogue": "A: Tea?\nB: Yes.", "summary": "B wants tea."},
    "classification": {"text": "It rained.", "label": "weather", "options": ["weather", "sport"]},
    "yes_no": {"question": "Is snow cold?", "answer": "yes"},
    "paraphrase": {"first": "He ran.", "second": "He was running.", "label": "yes"},
    "multiple_choice": {"question": "Which is a fruit?", "choices": ["pear", "chair", "car"], "answer": "pear"},
    "keywords": {"keywords": ["dog", "ball", "park"], "text": "The dog chases a ball in the park."},
    "sentiment": {"text": "I loved it.", "label": "positive"},
    "entailment": {"premise": "It rains.", "hypothesis": "The street is wet.", "label": "maybe"},
}


@pytest.mark.parametrize("name", SHIPPED)
def test_what_ships_asks_in_six_ways_or_more_of_the_fields_that_it_names(name):
    content, row = yaml_file(ASSETS / f"{name}.yaml", words=True), SHIPPED[name]
    found = TemplateSet.read(name, inverted_share=0.3 if content.get("inverted") else 0.0, name=name)
    assert len(found.templates) >= 6
    every = [*found.templates, *found.inverted]
    assert len({one.name for one in every}) == len(every) == len({one.input for one in every})
    assert (
        set.union(*(one.fields for one in every)) | ({found.options} if isinstance(found.options, str) else set())
        == set(content["fields"])
        == set(row)
    )
    seen = {one.template for one in all_of(found, [row] * 300)}
    assert seen == {one.name for one in every}
    if found.options:
        listing = [one.shows_options for one in found.templates]
        assert sum(listing) >= 3 and sum(not one for one in listing) >= 2, "a share of either can be asked for"


def test_all_that_ships_is_named_here():
    assert shipped() == sorted(SHIPPED)


def test_a_file_of_templates(tmp_path):
    path = tmp_path / "t.yaml"
    path.write_text(
        'templates:\n  - {input: "{a}?", target: "{b}"}\n  - {name: second, input: "{a} {options}", target: "{b}"}\noptions: [yes, no, 3]\n'
    )
    found = TemplateSet.read(path, few_shot_share=0.5)
    assert [one.name for one in found.templates] == ["1", "second"]
    assert found.options == ["yes", "no", "3"] and found.few_shot_share == 0.5
    assert TemplateSet.read(path, options=["no", "yes"]).options == ["no", "yes"]


FILES = {
    "- a": "templates: expected a list of them",
    "templates: [": "while parsing",
    "templates: {}": r"templates: expected a list, each with input, target and name, got dict",
    "templates: [a]": r"templates\[0\]: expected input, target and perhaps name, got 'a'",
    "templates: [{input: a}]": r"templates\[0\]: expected input, target",
    "templates: [{input: a, target: b, code: c}]": r"templates\[0\]: expected input, target",
    "templates: [{input: '{a', target: b}]": r"templates\[0\].input: .*expected",
    "templates: [{input: a, target: 3}]": r"templates\[0\].target=3: expected str, got int",
    "templates: [{input: a, target: b, name: x}, {input: c, target: b, name: x}]": r"templates\[1\].name='x': expected another",
    "templates: [{input: a, target: b}]\nwordings: 3": "wordings: expected one of fields, templates, inverted, options",
    "templates: [{input: '{options}', target: b}]": "options: expected the answers",
    "templates: [{input: a, target: b}]\ntemplates: []": "the field 'templates' is there twice",
    "templates: !!python/name:os.system": "could not determine a constructor",
    "templates: &x [*x]": "an alias",
}


@pytest.mark.parametrize("content", FILES)
def test_a_file_that_is_none_is_named_with_its_field(content, tmp_path):
    path = tmp_path / "t.yaml"
    path.write_text(content)
    with pytest.raises((TypeError, ValueError), match=rf"^{path}: .*{FILES[content]}"):
        TemplateSet.read(path)


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file .*; those that ship are .*sentiment"):
        TemplateSet.read(tmp_path / "t.yaml")
