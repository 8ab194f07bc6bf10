"""The built-in tasks: seeded, split without overlap, with answers that follow from their prompts."""

import itertools
import json
import re
from pathlib import Path
from random import Random

import pytest

from fastlora.data.examples import read_examples
from fastlora.demo.tasks import TASKS, TaskExample, generate, main, split_of
from fastlora.demo.wordings import Template, TemplateSet
from fastlora.demo.words import DAYS, PEOPLE, number_in_words


def completion(example: TaskExample) -> str:
    return example.completion.strip()


@pytest.mark.parametrize("task", TASKS)
def test_same_seed_same_examples(task: str) -> None:
    assert generate(task, 30, seed=3) == generate(task, 30, seed=3)
    assert generate(task, 30, seed=3) != generate(task, 30, seed=4)
    assert generate(task, 10, seed=3) == generate(task, 30, seed=3)[:10]


@pytest.mark.parametrize("task", TASKS)
def test_splits_share_no_content(task: str) -> None:
    counts = {"train": 1500, "validation": 300, "test": 300}
    splits = {split: generate(task, count, seed=0, split=split) for split, count in counts.items()}
    for one, other in itertools.combinations(splits.values(), 2):
        assert not {example.content for example in one} & {example.content for example in other}
        assert not {example.prompt for example in one} & {example.prompt for example in other}
    assert all(split_of(task, example.content) == split for split in splits for example in splits[split])


@pytest.mark.parametrize("task", TASKS)
def test_every_template_is_used(task: str) -> None:
    templates = TASKS[task].templates.templates
    assert len(templates) >= 5 and len(set(templates)) == len(templates)
    openings = {re.match(r"[^{]*", template.prompt).group() for template in templates} - {""}
    prompts = [example.prompt for example in generate(task, 200, seed=1)]
    for opening in openings:
        assert any(prompt.startswith(opening) for prompt in prompts), opening


@pytest.mark.parametrize("task", TASKS)
def test_completions_begin_with_one_space_and_end_without(task: str) -> None:
    for example in generate(task, 100, seed=2):
        assert re.fullmatch(r" \S(.*\S)?", example.completion)
        assert example.prompt == example.prompt.rstrip()


def test_summaries_follow_from_their_dialogues() -> None:
    for example in generate("summarization", 300, seed=0):
        turns = re.findall(r"^(\w+): (.+)$", example.prompt, re.MULTILINE)
        turns = [(speaker, line) for speaker, line in turns if speaker in PEOPLE]
        speakers = [speaker for speaker, _ in turns]
        assert 5 <= len(turns) <= 8 and len(set(speakers)) == 2
        assert all(one != next_one for one, next_one in zip(speakers, speakers[1:], strict=False))
        summary = completion(example)
        assert all(speaker in summary for speaker in speakers)
        assert 1 <= summary.count(".") <= 2
        said = " ".join(line for _, line in turns)
        days = [day for day in DAYS if day in summary]
        assert days and all(day in said for day in days)
        assert all(summary not in line and line not in summary for _, line in turns)


def test_sentiment_offers_all_its_options() -> None:
    examples = generate("sentiment", 300, seed=0)
    options = TASKS["sentiment"].templates.options
    assert {completion(example) for example in examples} == set(options)
    offered = [re.findall(r"^- (\w+)$", example.prompt, re.MULTILINE) for example in examples]
    assert {frozenset(found) for found in offered} == {frozenset(), frozenset(options)}
    assert len({tuple(found) for found in offered}) > 2  # in more than one order


def test_arithmetic_is_right() -> None:
    for example in generate("arithmetic", 300, seed=0):
        first, sign, second = example.content.split()
        result = int(first) + int(second) if sign == "+" else int(first) - int(second)
        assert completion(example) == number_in_words(result)
        assert all(number_in_words(int(number)) in example.prompt for number in (first, second))


def test_ordering_is_right() -> None:
    numbers = [number_in_words(number) for number in range(10)]
    for example in generate("ordering", 300, seed=0):
        ranked = sorted(example.content.split(", "), key=numbers.index)
        if "smallest to the largest" in example.prompt or "smallest first" in example.prompt:
            expected = ", ".join(ranked)
        elif "largest to the smallest" in example.prompt or "Count down" in example.prompt:
            expected = ", ".join(reversed(ranked))
        else:
            expected = ranked[0] if "smallest" in example.prompt else ranked[-1]
        assert len(ranked) >= 3 and completion(example) == expected


def test_translation_keeps_the_record() -> None:
    for example in generate("translation", 300, seed=0):
        name, item, colour, count = example.content.split(",")
        record = {"name": name, "item": item, "colour": colour, "count": int(count)}
        pairs = "; ".join(f"{key} = {value}" for key, value in record.items())
        answer = completion(example)
        assert answer in (example.content, pairs) or json.loads(answer) == record
        assert answer not in example.prompt


@pytest.mark.parametrize("task", ("extraction", "reading"))
def test_answers_stand_in_the_text(task: str) -> None:
    for example in generate(task, 300, seed=0):
        values = re.split(r", |; ", re.sub(r"\b(person|place|day): ", "", completion(example)))
        assert all(re.sub("^(the|on|in) ", "", value).rstrip(".") in example.prompt for value in values)


def test_descriptions_state_the_facts_and_nothing_else() -> None:
    for example in generate("description", 300, seed=0):
        facts = dict(re.findall(r"(\w+): (\w+)(?:;|$)", example.prompt, re.MULTILINE))
        sentence = completion(example)
        assert facts["who"] in sentence and facts["what"] in sentence
        assert ("Leave out the city" in example.prompt) <= (facts["where"] not in sentence)
        assert ("Begin with the day" in example.prompt) == sentence.startswith(f"On {facts['when']}")


def test_template_names_a_missing_field() -> None:
    assert Template("{a}?", "{b}").render({"a": "1", "b": "2"}) == ("1?", " 2")
    with pytest.raises(KeyError, match="b"):
        Template("{a}?", "{b}").render({"a": "1"})
    drawn = {TemplateSet((Template("{x} {options}", "{x}"),), ("p", "q")).draw({"x": "1"}, Random(i)) for i in range(9)}
    assert drawn == {("1 OPTIONS:\n- p\n- q", " 1"), ("1 OPTIONS:\n- q\n- p", " 1")}


@pytest.mark.parametrize(("number", "words"), [(0, "zero"), (13, "thirteen"), (40, "forty"), (99, "ninety-nine")])
def test_number_in_words(number: int, words: str) -> None:
    assert number_in_words(number) == words


@pytest.mark.parametrize("number", (-1, 100))
def test_number_in_words_out_of_range(number: int) -> None:
    with pytest.raises(ValueError, match="number must be from 0 to 99"):
        number_in_words(number)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("poetry", 1, 0), "task must be one of summarization, .* got 'poetry'"),
        (("reading", 1, 0, "dev"), "split must be one of train, validation, test, got 'dev'"),
        (("reading", -1, 0), "count must not be negative, got -1"),
    ],
)
def test_bad_arguments(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(*arguments)


def test_command_writes_what_train_reads(tmp_path: Path) -> None:
    file = tmp_path / "dialogues.jsonl"
    main(["--task", "summarization", "--count", "7", "--seed", "5", "--output", str(file)])
    rows = [(row.prompt, row.completion) for row in read_examples(file)]
    assert rows == [(example.prompt, example.completion) for example in generate("summarization", 7, seed=5)]
