"""Instruction templates: a task asked in many ways, alone, behind examples of itself, and turned round, as FLAN does it.

A template is a pair of texts over a row's fields: `{field}` stands for the field's text, `{{` and `}}` for braces. A text holds nothing else, no
attribute, no index, no code: a stranger's file can be read. `{options}` lists the answers that are allowed.

What a row gets (its kind, wording, list of options, and examples) follows from the seed, the set's name and the row's number, and from nothing else.
Kinds are spread evenly: of any hundred rows in a row nearly a set's shares are of each.

Wei et al. 2022 (arXiv:2109.01652) ask each task in ten ways, some of them turned round; Longpre et al. 2023 (arXiv:2301.13688) mix rows with
examples and without, with options and without.
"""

import functools
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from string import Formatter
from typing import Any

from fastlora import reading
from fastlora.data.examples import BadLine, Example, Prompt
from fastlora.typed import check_fields, listed, shown

ASSETS = Path(__file__).parent.parent / "assets" / "templates"
OPTIONS = "options"
"""The field that lists the answers."""
FIELD = re.compile(r"[^\W\d]\w*")
LISTINGS = (  # what opens a list of options, what one of them looks like, and what stands between two
    ("Options:\n", "- {}", "\n"),
    ("Choices:\n", "* {}", "\n"),
    ("Choose from: ", "{}", ", "),
    ("Possible answers: ", "{}", " | "),
    ("Answer with one of these: ", '"{}"', ", "),
    ("The answer is one of the following.\n", "{}", "\n"),
    ("Candidates: ", "[{}]", " "),
)
STRIDES = (5**0.5 - 1) / 2, 2**0.5 - 1
"""Multiples of these, without their whole parts, fill the unit square evenly (Kronecker's sequence)."""


@functools.lru_cache(maxsize=4096)
def _parts(text: str) -> tuple[tuple[str, str | None], ...]:
    """Literal text, and the field behind it.

    Raises:
        ValueError: the text has a brace that is neither of a field nor doubled.
    """
    try:
        found = list(Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"{error}: expected {{field}}, or {{{{ and }}}} for braces") from None
    for _, name, spec, conversion in found:
        if name is not None and (spec or conversion or not FIELD.fullmatch(name)):
            inner = name + f"!{conversion}" * bool(conversion) + f":{spec}" * bool(spec)
            raise ValueError(
                f"{{{inner[:40]}}}: expected the name of a field and nothing else, or {{{{ and }}}} for braces"
            )
    return tuple((literal, name) for literal, name, _, _ in found)


def _fields(text: str) -> set[str]:
    return {name for _, name in _parts(text) if name is not None}


def _fill(text: str, values: Mapping[str, str]) -> str:
    return "".join(literal + ("" if name is None else values[name]) for literal, name in _parts(text))


def _text(row: Mapping[str, Any], name: str) -> str:
    """A row's field as it stands in a prompt; a list's parts with commas."""
    if name not in row:
        raise BadLine(f"no field {name!r}, there are {listed(list(row)) or 'none'}")
    value = row[name]
    parts = value if isinstance(value, (list, tuple)) else [value]
    for part in parts:
        if not isinstance(part, (str, int, float)):
            raise BadLine(f"{name}: expected a text, a number, or a list of them, got {type(part).__name__}")
        if isinstance(part, float) and not math.isfinite(part):  # as tables have it where there is nothing
            raise BadLine(f"{name}={part}: expected a text, or a finite number")
    return ", ".join(map(str, parts))


@dataclass(frozen=True)
class Template:
    """One wording.

    Raises:
        TypeError, ValueError: a text is none, is empty, or has a brace that is not a field's; the message begins with input or target.
    """

    input: str
    target: str
    name: str = ""

    def __post_init__(self) -> None:
        check_fields(self)
        for which in ("input", "target"):
            text = getattr(self, which)
            if not text.strip():
                raise ValueError(f"{which}: expected a text, got {shown(text)}")
            try:
                _parts(text)
            except ValueError as error:
                raise ValueError(f"{which}: {error}") from None
        if OPTIONS in _fields(self.target):
            raise ValueError("target: expected the answer, {options} lists all of them")

    @property
    def fields(self) -> set[str]:
        """Those of a row that it asks for."""
        return (_fields(self.input) | _fields(self.target)) - {OPTIONS}

    @property
    def shows_options(self) -> bool:
        return OPTIONS in _fields(self.input)

    @property
    def answer(self) -> str | None:
        """The field that the target is, where it is nothing else."""
        literal, name = _parts(self.target)[0]
        return name if self.target == f"{{{name}}}" and not literal else None


@dataclass(frozen=True)
class TemplateSet:
    """The wordings of one task, and how they are mixed.

    A share of the rows is turned round (`inverted_share`), another has examples before it (`few_shot_share`), the rest is asked plainly. Examples
    are other rows of the task in the same wording, never the row itself nor one that asks the same, white space and case aside; those that make
    a row longer than max_characters or max_tokens are left out.

    Raises:
        TypeError, ValueError: a field is of another type or out of range; the message names it.
    """

    templates: list[Template]
    name: str = ""
    inverted: list[Template] = field(default_factory=list)  # what was given is asked for
    options: list[str] | str = field(default_factory=list)  # the answers allowed, or the field that has a row's own
    few_shot_share: float = 0.0
    inverted_share: float = 0.0
    options_share: float | None = None  # of rows whose wording lists the options; None: as many as wordings do
    shots: list[int] = field(default_factory=lambda: [1, 2, 3])  # how many examples, one of these drawn
    x_y_delimiter: str = "\n"  # between input and target
    example_separator: str = "\n\n\n"
    max_characters: int | None = None  # of a row with examples
    max_tokens: int | None = None
    as_messages: bool = False  # a user's message and the assistant's, for the chat template, in place of text

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.templates:
            raise ValueError("templates: expected at least one")
        for name in ("few_shot_share", "inverted_share", "options_share"):
            share = getattr(self, name)
            if share is not None and not 0 <= share <= 1:
                raise ValueError(f"{name}={shown(share)}: expected 0 to 1")
        if self.few_shot_share + self.inverted_share > 1:
            raise ValueError(f"few_shot_share={self.few_shot_share}: expected at most 1 together with inverted_share")
        if self.inverted_share and not self.inverted:
            raise ValueError(f"inverted_share={self.inverted_share}: expected templates in inverted, there are none")
        if not self.shots or min(self.shots) < 1:
            raise ValueError(f"shots={shown(self.shots)}: expected numbers, 1 or more")
        for name in ("max_characters", "max_tokens"):
            most = getattr(self, name)
            if most is not None and most < 1:
                raise ValueError(f"{name}={shown(most)}: expected 1 or more")
        if self.max_characters is not None and self.max_tokens is not None:
            raise ValueError("max_characters and max_tokens exclude each other: expected one of them")
        self._check_options()

    def _check_options(self) -> None:
        listing = [one.shows_options for one in self.templates]
        if not self.options and (any(listing) or any(one.shows_options for one in self.inverted)):
            raise ValueError("options: expected the answers, or the field that has them: a template has {options}")
        if isinstance(self.options, list) and len(set(self.options)) < len(self.options):
            raise ValueError(f"options={shown(self.options)}: expected each once")
        if self.options_share and not any(listing):
            raise ValueError(f"options_share={self.options_share}: expected a template with {{options}}, there is none")
        if self.options_share is not None and self.options_share < 1 and all(listing):
            raise ValueError(
                f"options_share={self.options_share}: expected a template without {{options}}, there is none"
            )

    @classmethod
    def read(cls, source: str | Path, **fields: Any) -> "TemplateSet":
        """The templates of a YAML file (templates, inverted, options), or of those that ship, by name: `TemplateSet.read("sentiment")`.

        Args:
            fields: of the set; those that the file has, too, take the place of the file's.

        Raises:
            OSError: there is no such file.
            TypeError, ValueError: it is no such file; the message is FILE: field: expected.
        """
        path = ASSETS / f"{source}.yaml" if str(source) in shipped() else Path(source)
        if not os.path.isfile(path):  # where a name is none, pathlib raises
            raise FileNotFoundError(f"templates: there is no file {source}; those that ship are {', '.join(shipped())}")
        try:
            content = reading.yaml_file(path, words=True)
            for key in content if isinstance(content, dict) else ():
                if key not in ("fields", "templates", "inverted", "options"):
                    raise ValueError(f"{key}: expected one of fields, templates, inverted, options")
            if not isinstance(content, dict) or "templates" not in content:
                raise ValueError("templates: expected a list of them")
            content.pop("fields", None)  # for people
            return cls(**{**parsed(content), **fields})
        except (TypeError, ValueError) as error:
            raise type(error)(f"{path}: {error}") from None

    def example(
        self,
        rows: Sequence[Mapping[str, Any]],
        number: int,
        seed: int = 0,
        length: Callable[[Example], int] | None = None,
        max_tokens: int | None = None,
    ) -> Example:
        """A row as it is asked.

        Args:
            rows: all of the task: examples are drawn from them.
            number: the row's, from 0.
            length: tokens of an example, for max_tokens.
            max_tokens: a smaller one than the set's own, or in place of none: what a longer row would lose.

        Raises:
            BadLine: a field is missing or is no text, a text is empty, or a field of the target is; the answer is none of the options. So too of the
                rows before it, whose numbers, from 1, the message has.
            ValueError: the set has max_tokens, and no length is given.
        """
        draw = Random(f"fastlora template {seed} {self.name} {number}")
        pool, most = self._kind(number, seed)
        template, listing = draw.choice(pool), draw.choice(LISTINGS)
        shots = draw.choice(self.shots) if most else 0
        own = self._render(template, rows[number], listing, draw)
        exemplars = self._exemplars(rows, number, shots, template, listing, draw)
        if self.max_tokens is not None and length is None:
            raise ValueError(f"max_tokens={self.max_tokens}: expected a length that counts tokens")
        budget = min((one for one in (self.max_tokens, max_tokens) if one is not None), default=None)
        while True:
            found = self._example(template, own, exemplars)
            if not exemplars:
                return found
            over = self.max_characters is not None and _characters(found) > self.max_characters
            if not over and (length is None or budget is None or length(found) <= budget):
                return found
            exemplars.pop()

    def _kind(self, number: int, seed: int) -> tuple[list[Template], bool]:
        """The templates that a row's is one of, and whether examples stand before it."""
        start = Random(f"fastlora kinds {seed} {self.name}")
        place, listed_place = ((start.random() + stride * number) % 1 for stride in STRIDES)
        if place < self.inverted_share:
            return self.inverted, False
        pool = self.templates
        if self.options_share is not None:
            pool = [one for one in pool if one.shows_options == (listed_place < self.options_share)]
        return pool, place < self.inverted_share + self.few_shot_share

    def _render(
        self, template: Template, row: Mapping[str, Any], listing: tuple[str, str, str], draw: Random
    ) -> tuple[str, str]:
        """(input, target)"""
        values = {name: _text(row, name) for name in template.fields}
        if template.shows_options:
            options = self._options(row)
            if template.answer is not None and values[template.answer] not in options:
                raise BadLine(f"{template.answer}={shown(values[template.answer])}: expected one of {listed(options)}")
            opening, bullet, between = listing
            shuffled = draw.sample(options, len(options))
            values[OPTIONS] = opening + between.join(bullet.format(one) for one in shuffled)
        blank = [name for name in sorted(_fields(template.target)) if not values[name].strip()]
        if blank and template.answer is None:
            raise BadLine(f"{blank[0]} is empty, which the target of template {template.name!r} has")
        texts = _fill(template.input, values), _fill(template.target, values)
        for which, text in zip(("input", "target"), texts, strict=True):
            if not text.strip():
                raise BadLine(f"the {which} of template {template.name!r} is empty")
            try:
                text.encode()
            except UnicodeEncodeError:
                raise BadLine("has half of a surrogate pair, which is no character") from None
        return texts

    def _options(self, row: Mapping[str, Any]) -> list[str]:
        if isinstance(self.options, list):
            return self.options
        found = row.get(self.options)
        given = found if isinstance(found, (list, tuple)) else []
        plain = all(isinstance(one, (str, int, float)) for one in given)
        options = list(dict.fromkeys(map(str, given))) if plain else []
        if len(options) < 2:
            raise BadLine(f"{self.options}: expected a list of at least two options, got {shown(found)}")
        return options

    def _exemplars(
        self,
        rows: Sequence[Mapping[str, Any]],
        number: int,
        shots: int,
        template: Template,
        listing: tuple[str, str, str],
        draw: Random,
    ) -> list[tuple[str, str]]:
        """Other rows, (input, target) each."""
        asked = sorted(_fields(template.input) - {OPTIONS})

        def of(one: int, found: Callable[[Mapping[str, Any]], Any]) -> Any:
            try:
                return found(rows[one])
            except BadLine as error:
                raise BadLine(f"row {one + 1} of the task, which is to stand before it: {error}") from None

        def question(row: Mapping[str, Any]) -> list[list[str]]:
            return [_text(row, name).casefold().split() for name in asked]

        drawn = draw.sample(
            range(len(rows) - 1), min(2 * shots, len(rows) - 1)
        )  # as many again, for what asks the same
        others = [one + (one >= number) for one in drawn]
        own = question(rows[number])
        different = [one for one in others if of(one, question) != own]
        return [of(one, lambda row: self._render(template, row, listing, draw)) for one in different[:shots]]

    def _example(self, template: Template, own: tuple[str, str], exemplars: Sequence[tuple[str, str]]) -> Example:
        before = "".join(f"{x}{self.x_y_delimiter}{y}{self.example_separator}" for x, y in exemplars)
        text, target = before + own[0], own[1]
        prompt: Prompt = [{"role": "user", "content": text}] if self.as_messages else text + self.x_y_delimiter
        shots = f" ({len(exemplars)} shot{'s' * (len(exemplars) > 1)})" if exemplars else ""
        return Example(prompt, target, task=self.name, template=template.name + shots)


def shipped() -> list[str]:
    """The names of the templates that ship."""
    return sorted(path.stem for path in ASSETS.glob("*.yaml"))


def parsed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a TemplateSet as YAML has them, with its templates as Templates.

    Raises:
        TypeError, ValueError: one is none; the message is field: expected.
    """
    found = dict(content)
    for key in ("templates", "inverted"):
        if key in found:
            found[key] = _templates(found[key], key)
    if isinstance(found.get("options"), list):
        found["options"] = [str(one) if type(one) in (int, float) else one for one in found["options"]]
    return found


def _templates(content: Any, key: str) -> list[Template]:
    if not isinstance(content, list):
        raise TypeError(f"{key}: expected a list, each with input, target and name, got {type(content).__name__}")
    made: list[Template] = []
    for number, one in enumerate(content):
        where = f"{key}[{number}]"
        if not isinstance(one, dict) or not {"input", "target"} <= set(one) <= {"input", "target", "name"}:
            raise ValueError(f"{where}: expected input, target and perhaps name, got {shown(one)}")
        try:
            made.append(replace(Template(**one), name=one.get("name") or str(number + 1)))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{where}.{error}") from None
        if any(other.name == made[-1].name for other in made[:-1]):
            raise ValueError(f"{where}.name={made[-1].name!r}: expected another, one before has it")
    return made


def _characters(example: Example) -> int:
    prompt = example.prompt
    before = prompt if isinstance(prompt, str) else "".join(one["content"] for one in prompt)
    return len(before) + len(example.completion)
