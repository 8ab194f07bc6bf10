"""Rows in, examples out: the one entrance. Where rows come from is `sources`' business, what a row may hold that of `formats`."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

from fastlora.data import formats, sources
from fastlora.data.formats import BadLine, Example, Message, Prompt
from fastlora.data.sources import Columns, Sources
from fastlora.typed import shown

logger = logging.getLogger("fastlora")

__all__ = [
    "BadLine",
    "Columns",
    "DataError",
    "Example",
    "Message",
    "Prompt",
    "Sources",
    "named_as",
    "parse_line",
    "read_examples",
]

LISTED_PROBLEMS = 20
LISTED_LIKE = 3  # places of one problem, behind the first


class DataError(ValueError):
    """Rows that cannot be used: `problems` holds all of them, each with FILE:LINE; the message twenty, of each kind the first and how many more."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        places: dict[str, list[str]] = {}
        for problem in problems:
            place, _, reason = problem.partition(": ")
            places.setdefault(reason, []).append(place)
        listed = [f"{first}: {reason}{_others(rest)}" for reason, (first, *rest) in places.items()]
        if len(listed) > LISTED_PROBLEMS:
            told = sum(map(len, list(places.values())[:LISTED_PROBLEMS]))
            listed = [*listed[:LISTED_PROBLEMS], f"... and {len(problems) - told} more"]
        count = f"{len(problems)} bad line" + ("s" if len(problems) > 1 else "")
        super().__init__("\n".join([f"{count} in the data:", *listed]))


def _others(places: list[str]) -> str:
    """Of the rows that have the same fault as one that is told."""
    if not places:
        return ""
    more = ", ..." if len(places) > LISTED_LIKE else ""
    return f" (and {len(places)} like it: {', '.join(places[:LISTED_LIKE])}{more})"


def read_examples(
    data: Sources, *, columns: Columns | None = None, max_samples: int | None = None, streaming: bool = False
) -> list[Example]:
    """Read one source of rows, or several one after another; bad rows are told all at once.

    Args:
        data: a file, folder or pattern, or hf:OWNER/NAME, as `sources` tells; or a list of them.
        columns: which column is which field ({"prompt": "question", "completion": "answer"}); no other is read then. #1 is the first column of a
            CSV or TSV without a header, a.b is b of the object a. One that a row may lack, and that none has, is told in a warning.
        max_samples: take only the first so many rows of each source; those behind are not looked at.
        streaming: read the hub's data sets row by row, up to max_samples, without downloading the whole.

    Raises:
        OSError: there is no such file, or it cannot be read.
        DataError: some rows are no JSON, fit no format or two, or have a field of a wrong type, or an empty one.
        ValueError: a file is compressed otherwise than by gzip, no UTF-8 text, or damaged; a source has no rows; a bad option.
        ImportError: a package that reads such a source is missing.
    """
    check_reading(data, columns, max_samples, streaming)
    examples: list[Example] = []
    problems: list[str] = []
    unseen = {name: column for name, column in (columns or {}).items() if name in formats.OPTIONAL}
    for source in sources.each(data):
        before = len(examples) + len(problems)
        for place, fields in sources.rows(source, columns, max_samples, streaming):
            try:
                if isinstance(fields, BadLine):
                    raise fields
                unseen = {name: one for name, one in unseen.items() if not formats.has_column(fields, one)}
                examples.append(formats.example(fields, place, columns))
            except BadLine as error:
                problems.append(f"{place}: {error}")
        if len(examples) + len(problems) == before:
            raise ValueError(f"data: {source} has no rows")
    if problems:
        raise DataError(problems)
    for name, column in unseen.items():
        text = "columns: none of the %d rows of %s has the column %r, which is to be the %s"
        logger.warning(text, len(examples), sources.named(data), column, name)
    return examples


@contextmanager
def named_as(option: str) -> Iterator[None]:
    """What is wrong with a source, which is `data` to who reads it, is said of the option that it was given by."""
    try:
        yield
    except (ImportError, OSError, ValueError) as error:
        if option == "data" or not re.match("data[:=]", str(error)):
            raise
        raise type(error)(option + str(error).removeprefix("data")) from error


def check_reading(data: Sources, columns: Columns | None, max_samples: int | None, streaming: bool) -> None:
    """What can be told of these options before anything is read.

    Raises:
        ValueError: one of them is out of range, or of no use; the message names it.
    """
    given = sources.each(data)
    if not given or not all(given):
        raise ValueError(f"data={data!r} is empty")
    formats.check_columns(columns)
    if max_samples is not None and (type(max_samples) is not int or max_samples < 1):
        raise ValueError(f"max_samples={shown(max_samples)}: expected at least 1, an integer")
    if streaming and max_samples is None:
        raise ValueError("streaming=True: expected max_samples as well, what is read is kept in memory")
    if streaming and not any(one.startswith(sources.HUB) for one in given):
        raise ValueError(f"streaming=True: expected a data set of the hub, {sources.HUB}OWNER/NAME, none is given")


def parse_line(line: bytes, source: str = "") -> Example:
    """The example that one line of a JSONL file holds; it depends on nothing but the line.

    Raises:
        BadLine: the line cannot be used.
    """
    fields = sources.fields_of(line)
    if isinstance(fields, BadLine):
        raise fields
    return formats.example(fields, source)


def parse_columns(text: str) -> dict[str, str]:
    """As the command line has them: prompt=question,completion=answer.

    Raises:
        ValueError: a part is no such pair, or names a field twice.
    """
    pairs = [part.partition("=") for part in text.split(",")]
    found = {name.strip(): column.strip() for name, _, column in pairs}
    if not all(column for _, _, column in pairs) or len(found) < len(pairs):
        raise ValueError(f"columns={text!r}: expected field=column with commas, each field once")
    return found
