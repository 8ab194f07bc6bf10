"""Built-in instruction tasks, generated from a seed.

``python -m fastlora.demo.tasks --task summarization --count 400 --output FILE.jsonl`` writes some of one task.

Each task draws a content (its facts) and renders it with one of several templates. Whether a content belongs to the
training, the validation or the test split is decided by a checksum of the content itself, so no two share one, whatever
the seeds and counts.
"""

import argparse
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from fastlora.demo.dialogues import dialogue
from fastlora.demo.wordings import TemplateSet, of_task
from fastlora.demo.words import (
    ASPECTS,
    BLAME,
    CITIES,
    COLOURS,
    DAYS,
    DEEDS,
    FRUITS,
    GOODS,
    PEOPLE,
    PRAISE,
    VENUES,
    number_in_words,
)

SPLITS = ("train", "validation", "test")
HELD_OUT = 5  # one content in five, half of them for validation


@dataclass(frozen=True)
class TaskExample:
    """One row: ``content`` is what the split was decided by, ``completion`` begins with a space."""

    task: str
    prompt: str
    completion: str
    content: str


@dataclass(frozen=True)
class Task:
    """A task draws a content and its fields from a generator; its templates put them into words."""

    draw: Callable[[Random], tuple[str, dict[str, str]]]
    templates: TemplateSet


def split_of(task: str, content: str) -> str:
    """The split a content belongs to, the same on every machine and in every run."""
    place, rest = divmod(zlib.crc32(f"{task}:{content}".encode()), HELD_OUT)
    return "train" if rest else "validation" if place % 2 else "test"


def generate(task: str, count: int, seed: int, split: str = "train") -> list[TaskExample]:
    """``count`` examples of a task from one split, the same for the same arguments. Contents may repeat within a split.

    Raises ValueError for an unknown task or split, or a negative count.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if count < 0:
        raise ValueError(f"count must not be negative, got {count}")
    rng = Random(f"{task}:{split}:{seed}")
    examples: list[TaskExample] = []
    while len(examples) < count:
        content, fields = TASKS[task].draw(rng)
        if split_of(task, content) == split:
            prompt, completion = TASKS[task].templates.draw(fields, rng)
            examples.append(TaskExample(task, prompt, completion, content))
    return examples


def _sentiment(rng: Random) -> tuple[str, dict[str, str]]:
    label = rng.choice(of_task("sentiment").options)
    venue, city = rng.choice(VENUES), rng.choice(CITIES)
    if label == "neutral":
        fact = rng.choice(("is open on {}", "opens at ten on {}", "is closed on {}", "was built on a {}"))
        opening = fact.format(rng.choice(DAYS))
        text = f"The {venue} in {city} {opening}. The {rng.choice(ASPECTS)} is on the {rng.choice(('left', 'right'))}."
        return text, {"text": text, "label": label}
    words, opposite = (PRAISE, BLAME) if label == "positive" else (BLAME, PRAISE)
    first, second = rng.sample(ASPECTS, 2)
    claims = [f"the {first} was {rng.choice(words)}", f"the {second} was {rng.choice(words)}"]
    if rng.random() < 0.5:  # a negated word of the other side says the same
        claims[1] = f"the {second} was not {rng.choice(opposite)}"
    rng.shuffle(claims)
    text = f"We visited the {venue} in {city}: {claims[0]} and {claims[1]}."
    return text, {"text": text, "label": label}


def _extraction(rng: Random) -> tuple[str, dict[str, str]]:
    person, thing, place, day = rng.choice(PEOPLE), rng.choice(GOODS), rng.choice(CITIES), rng.choice(DAYS)
    deed, colour = rng.choice(tuple(DEEDS.values())), rng.choice(COLOURS)
    pattern = rng.choice(
        (
            "On {day} {person} {deed} the {colour} {thing} in {place}.",
            "In {place}, {person} {deed} the {colour} {thing} in the rain. It was a {day}.",
            "{person} {deed} the {thing} near the station of {place} last {day}.",
            "It was {day} when {person} {deed} a {colour} {thing} at a market in {place}.",
            "The {thing} that {person} {deed} on {day} is now in {place}.",
        )
    )
    text = pattern.format(person=person, thing=thing, place=place, day=day, deed=deed, colour=colour)
    return text, {"text": text, "person": person, "thing": thing, "place": place, "day": day}


def _arithmetic(rng: Random) -> tuple[str, dict[str, str]]:
    # The tens never change: with carrying, the base had 7 % right after 4,000 steps.
    tens, ones = 10 * rng.randint(1, 9), sorted((rng.randint(1, 8), rng.randint(2, 9)))
    person, fruit = rng.choice(PEOPLE), rng.choice(FRUITS)
    question = f"How many {fruit} does {person} have now?"
    first, second = tens + ones[1], ones[0]
    sign, result, operation, deed = "-", first - second, "minus", f"sells {number_in_words(second)}"
    if rng.random() < 0.5:
        first, second = tens + ones[0], rng.randint(1, 9 - ones[0])
        sign, result, operation, deed = "+", first + second, "plus", f"buys {number_in_words(second)} more"
    content = f"{first} {sign} {second}"
    return content, {
        "expression": f"{number_in_words(first)} {operation} {number_in_words(second)}",
        "story": f"{person} has {number_in_words(first)} {fruit} and {deed}.",
        "question": question,
        "result": number_in_words(result),
    }


def _translation(rng: Random) -> tuple[str, dict[str, str]]:
    drawn = {name: rng.choice(words) for name, words in {"name": PEOPLE, "item": GOODS, "colour": COLOURS}.items()}
    record = {**drawn, "count": rng.randint(1, 99)}
    csv = ",".join(str(value) for value in record.values())
    pairs = "; ".join(f"{key} = {value}" for key, value in record.items())
    return csv, {"pairs": pairs, "json": json.dumps(record), "csv": csv}


def _ordering(rng: Random) -> tuple[str, dict[str, str]]:
    numbers = rng.sample(range(1, 10), rng.randint(3, 5))
    ranked = sorted(numbers)
    text = _listed(numbers)
    return text, {
        "numbers": text,
        "ascending": _listed(ranked),
        "descending": _listed(ranked[::-1]),
        "smallest": number_in_words(ranked[0]),
        "largest": number_in_words(ranked[-1]),
    }


def _listed(numbers: list[int]) -> str:
    return ", ".join(number_in_words(number) for number in numbers)


def _reading(rng: Random) -> tuple[str, dict[str, str]]:
    size = rng.randint(2, 3)
    deeds = rng.sample(tuple(DEEDS.items()), size)
    columns = (rng.sample(PEOPLE, size), rng.sample(GOODS, size), rng.sample(DAYS, size), rng.sample(CITIES, size))
    events = list(zip(deeds, *columns, strict=True))
    sentences = [f"{who} {past} the {what} in {where} on {day}." for (_, past), who, what, day, where in events]
    chosen = rng.randrange(size)
    (verb, past), who, what, day, where = events[chosen]
    question, answer = rng.choice(
        (
            (f"What did {who} do?", sentences[chosen]),
            (f"What happened in {where}?", sentences[chosen]),
            (f"What did {who} {verb}?", f"the {what}"),
            (f"When did {who} {verb} the {what}?", f"on {day}"),
            (f"Where was {who} on {day}?", f"in {where}"),
            (f"Who {past} the {what}?", who),
        )
    )
    story = " ".join(sentences)
    return story, {"story": story, "question": question, "answer": answer}


def _description(rng: Random) -> tuple[str, dict[str, str]]:
    verb, past = rng.choice(tuple(DEEDS.items()))
    person, thing, place, day = (rng.choice(words) for words in (PEOPLE, GOODS, CITIES, DAYS))
    pairs = [f"who: {person}", f"verb: {verb}", f"what: {thing}", f"where: {place}", f"when: {day}"]
    rng.shuffle(pairs)
    content = " ".join((person, thing, place, day, verb))  # in one order: a shuffle does not make a new content
    fields = {"person": person, "thing": thing, "place": place, "day": day}
    return content, {**fields, "past": past, "facts": "; ".join(pairs)}


DRAWN_BY = {
    "summarization": dialogue,
    "sentiment": _sentiment,
    "extraction": _extraction,
    "arithmetic": _arithmetic,
    "translation": _translation,
    "ordering": _ordering,
    "reading": _reading,
    "description": _description,
}
TASKS = {task: Task(draw, of_task(task)) for task, draw in DRAWN_BY.items()}
ADAPTED_TASK = "summarization"
BASE_TASKS = tuple(task for task in TASKS if task != ADAPTED_TASK)


def answers(model: Any, tokenizer: Any, examples: Sequence[TaskExample]) -> list[str]:
    """Greedy answers to the examples' prompts, in their order, without spaces around them."""
    from fastlora import generation  # who only draws examples waits for no model

    prompts = [example.prompt for example in examples]
    texts = generation.generate(model, tokenizer, prompts, max_new_tokens=48, batch_size=50)
    return [text.strip() for text in texts]


def main(arguments: list[str] | None = None) -> None:
    """Write examples of one task as prompt-completion JSONL."""
    parser = argparse.ArgumentParser(prog="python -m fastlora.demo.tasks", description=main.__doc__)
    parser.add_argument("--task", choices=TASKS, default=ADAPTED_TASK)
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--output", type=Path, required=True, help="the JSONL file to write")
    options = parser.parse_args(arguments)
    write_jsonl(generate(options.task, options.count, options.seed, options.split), options.output)


def write_jsonl(examples: list[TaskExample], path: Path) -> None:
    """Write examples as rows of prompt and completion, what ``fastlora train --data`` reads."""
    rows = (json.dumps({"prompt": example.prompt, "completion": example.completion}) for example in examples)
    path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
