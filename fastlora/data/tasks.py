"""Tasks: where a task's rows lie, and how they are asked. A YAML file has a task's fields, by the names that Python gives them:

    name: dialogues
    cluster: summarisation
    data: dialogues.jsonl        # relative to this file
    columns: {summary: note}     # a template's field, and the row's name for it; others have their own names
    templates: summarisation     # of those that ship, a YAML file's, or a list of input, target and name
    few_shot_share: 0.3

and every other field of a TemplateSet. Without templates, the rows are prompts and completions, or messages, already.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from fastlora import reading
from fastlora.data import sources
from fastlora.data.examples import BadLine, DataError, Example, check_reading, read_examples
from fastlora.data.formats import column_of
from fastlora.data.templates import TemplateSet, parsed
from fastlora.typed import check_fields, shown

OF_TEMPLATES = tuple(one.name for one in fields(TemplateSet) if one.name != "name")


@dataclass(frozen=True)
class Task:
    """What there is of one task, and how it is asked.

    Raises:
        TypeError, ValueError: a field is of another type, or out of range; the message names it.
    """

    name: str
    data: str | Path | list[dict[str, Any]]  # what `sources` reads, or the rows
    templates: TemplateSet | None = None  # None: the rows are prompts and completions, or messages
    cluster: str = ""  # of like tasks, for people
    columns: dict[str, str] | None = (
        None  # a template's field, or a format's: the row's own name for it; a.b is b of the object a
    )
    max_samples: int | None = None  # the first so many rows
    streaming: bool = False  # a hub's data set row by row

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.name.strip() or "\n" in self.name:
            raise ValueError(f"name={shown(self.name)}: expected a name, on one line")
        if not self.data:
            raise ValueError("data: expected a file or rows, got none")
        if self.max_samples is not None and self.max_samples < 1:
            raise ValueError(f"max_samples={shown(self.max_samples)}: expected 1 or more")
        if isinstance(self.data, list):
            if self.templates is None:
                raise ValueError("data: expected templates as well: rows without are a file's, of a format of its own")
        else:
            columns = None if self.templates else self.columns  # templates have fields of any name
            check_reading(self.data, columns, self.max_samples, self.streaming)

    @classmethod
    def read(cls, path: str | Path) -> "Task":
        """The task that a YAML file describes.

        Raises:
            OSError: it is not there.
            TypeError, ValueError: it is none; the message is FILE: field: expected.
        """
        path = Path(path)
        if not os.path.isfile(path):  # where a name is none, pathlib raises
            raise FileNotFoundError(f"there is no file {path}, expected a task's")
        try:
            return made(reading.yaml_file(path, words=True), path.parent)
        except (FileNotFoundError, TypeError, ValueError) as error:
            raise type(error)(f"{path}: {error}") from None

    def examples(
        self, seed: int = 0, length: Callable[[Example], int] | None = None, max_tokens: int | None = None
    ) -> list[Example]:
        """Every row as it is asked, in the data's order.

        Args, Raises: as `TemplateSet.example`; also DataError: some rows cannot be used; OSError, ValueError: the file cannot be read.
        """
        if self.templates is None:
            assert not isinstance(self.data, list)
            found = read_examples(
                self.data, columns=self.columns, max_samples=self.max_samples, streaming=self.streaming
            )
            return [replace(one, task=self.name) for one in found]
        rows, places = self._rows()
        own, found, problems = replace(self.templates, name=self.name), [], []
        for number, source in enumerate(places):
            try:
                found.append(replace(own.example(rows, number, seed, length, max_tokens), source=source))
            except BadLine as error:
                problems.append(f"{source}: {error}")
        if problems:
            raise DataError(problems)
        return found

    def _rows(self) -> tuple[list[dict[str, Any]], list[str]]:
        """Rows by the templates' names of their fields, and where each is from."""
        columns = self.columns or {}
        each: list[sources.Found]
        if isinstance(self.data, list):
            each = [(f"{self.name}:{number}", row) for number, row in enumerate(self.data[: self.max_samples], 1)]
        else:
            each = list(sources.rows(str(self.data), columns, self.max_samples, self.streaming))
        problems, rows, places = [], [], []
        for place, row in each:
            try:
                if isinstance(row, BadLine):
                    raise row
                rows.append({**row, **{name: column_of(row, column) for name, column in columns.items()}})
                places.append(place)
            except BadLine as error:
                problems.append(f"{place}: {error}")
        if problems:
            raise DataError(problems)
        if not rows:
            raise ValueError(f"data: {self.data} has no rows")
        return rows, places


def is_task(source: str | Path) -> bool:
    """Whether a source is a task's YAML, by its name."""
    return Path(source).suffix.lower() in sources.YAML


def check_asking(data: sources.Sources, columns: sources.Columns | None) -> None:
    """
    Raises:
        ValueError: columns are given where all of the data are tasks' files.
    """
    if columns and all(map(is_task, sources.each(data))):
        raise ValueError(f"columns={shown(columns)}: expected none beside a task's file, which says it itself")


def files_of(data: sources.Sources) -> list[Path]:
    """The files that are read for some sources, and of tasks those with their rows."""
    given = sources.each(data)
    tasks = [Task.read(one) for one in given if is_task(one) and os.path.isfile(one)]
    own = [str(one.data) for one in tasks if not isinstance(one.data, list)]
    return sources.local_files([*given, *own])


def read_rows(
    data: sources.Sources,
    *,
    columns: sources.Columns | None = None,
    length: Callable[[Example], int] | None = None,
    max_tokens: int | None = None,
) -> list[Example]:
    """The rows of sources of which each may be a task's YAML: what is measured on. A task asks the same of every run, whatever that one's seed.

    Args:
        columns: which column is which field, of those that are no task's.
        length, max_tokens: as of `Task.examples`.

    Raises:
        As `read_examples`, `Task.read` and `Task.examples`.
    """
    given = sources.each(data)
    if not any(map(is_task, given)):
        return read_examples(data, columns=columns)
    found: list[Example] = []
    problems: list[str] = []
    for one in given:
        try:
            if is_task(one):
                found += Task.read(one).examples(length=length, max_tokens=max_tokens)
            else:
                found += read_examples(one, columns=columns)
        except DataError as error:  # bad lines of all sources are told at once
            problems += error.problems
    if problems:
        raise DataError(problems)
    return found


def made(content: Any, folder: Path) -> Task:
    """The task of these fields.

    Args:
        folder: that its files' names are relative to.

    Raises:
        TypeError, ValueError: as of Task and TemplateSet, or a field is none of theirs; the message is field: expected.
        OSError: a file of templates is not there.
    """
    if not isinstance(content, dict):
        raise TypeError(f"expected a task's fields, got {type(content).__name__}")
    own = tuple(one.name for one in fields(Task))
    for key in content:
        if key not in own and key not in OF_TEMPLATES:
            raise ValueError(f"{shown(key)}: expected one of {', '.join(dict.fromkeys((*own, *OF_TEMPLATES)))}")
    for key in ("name", "data"):
        if key not in content:
            raise ValueError(f"{key}: expected one, got none")
    given = {key: value for key, value in content.items() if key in own and key != "templates"}
    if given["data"] and isinstance(given["data"], str) and not given["data"].startswith(sources.HUB):
        given["data"] = str(folder / given["data"])
    asked = {key: value for key, value in content.items() if key in OF_TEMPLATES}
    if not asked:
        return Task(**given)
    source = asked.pop("templates", None)
    if isinstance(source, str):
        beside = folder / source
        return Task(templates=TemplateSet.read(beside if is_task(beside) else source, **parsed(asked)), **given)
    if source is None:
        raise ValueError(f"{next(iter(asked))}: expected templates as well")
    return Task(templates=TemplateSet(**parsed({"templates": source, **asked})), **given)
