"""What is trained and measured on: the rows that a folder's claims.yaml names.

    dialogues:                 # one task, to be learnt
      train: dialogues/train.jsonl
      validation: dialogues/validation.jsonl
      test: dialogues/test.jsonl
      columns: {prompt: dialogue, completion: summary}   # where the columns have names of their own
    examples: {train: ..., validation: ..., test: ...}   # the same, where more rows of one task are; else the dialogues
    clusters:                  # kinds of tasks, each file a wording or a task; the last ones are held out, never trained on
      sentiment: clusters/sentiment
      topic: clusters/ag_news_*.jsonl
    others: others             # tasks of other kinds, each file a task: what may be forgotten

A place is a file, a folder of JSONL files, a pattern, or a list of them, from the folder on.
"""

import glob
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from fastlora import reading, writing
from fastlora.data.examples import Example, read_examples
from fastlora.data.rows import encode
from fastlora.typed import fits

NAME = "claims.yaml"
PARTS = ("train", "validation", "test")
HELD = 10  # of a cluster's file one row in so many is not trained on


@dataclass(frozen=True)
class Rows:
    """Of one task, in a fixed order at random, so that the first of them are a sample."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]


@dataclass(frozen=True)
class Material:
    dialogues: Rows
    examples: Rows
    clusters: dict[str, Rows]  # a cluster's test rows are its validation rows, and each other cluster's test
    others: dict[str, list[Example]]


def read(folder: Path, tokenizer: Any, max_length: int) -> Material:
    """All rows that have at most max_length tokens.

    Raises:
        OSError: there is no claims.yaml, or a file that it names is missing.
        ValueError: it says something else than the above, or a task has no row that fits; the message has the file and what of it.
    """
    path = folder / NAME
    try:
        said = reading.yaml_file(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(said, dict) or not {"dialogues", "clusters", "others"} <= set(said) <= {
        *("dialogues", "examples", "clusters", "others")
    }:
        raise ValueError(f"{path}: expected dialogues, clusters, others, and examples if need be, nothing else")
    if not isinstance(said["clusters"], dict) or len(said["clusters"]) < 2:
        raise ValueError(f"{path}: clusters: expected two at least, each with a name")

    def fitting(examples: Sequence[Example], what: str) -> list[Example]:
        if not all(isinstance(one.prompt, str) for one in examples):
            raise ValueError(f"{path}: {what}: expected rows whose prompt is text")
        try:
            kept = encode(examples, tokenizer, max_length, "drop").examples
        except ValueError as error:
            raise ValueError(f"{path}: {what}: {error}") from error
        Random(0).shuffle(kept)
        return kept

    def task(key: str) -> Rows:
        given = said[key]
        if not isinstance(given, dict) or not set(PARTS) <= set(given) <= {*PARTS, "columns"}:
            raise ValueError(f"{path}: {key}: expected {', '.join(PARTS)}, and columns if need be")
        if not fits(given.get("columns", {}), dict[str, str]):
            raise ValueError(f"{path}: {key}: columns: got {given['columns']!r}, expected field: column, texts both")
        parts = {part: read_examples(_files(path, given[part]), columns=given.get("columns")) for part in PARTS}
        return Rows(**{part: fitting(rows, f"{key}: {part}") for part, rows in parts.items()})

    def cluster(name: str, place: Any) -> Rows:
        trained: list[Example] = []
        held: list[Example] = []
        for file in _files(path, place):
            rows = read_examples(file)
            # The same rows stand in the files of several wordings, in the same order: what is held out of one is so of all.
            count = max(1, len(rows) // HELD)
            held += rows[:count]
            trained += rows[count:]
        kept = fitting(held, f"clusters: {name}")
        return Rows(fitting(trained, f"clusters: {name}"), kept, kept)

    def others() -> dict[str, list[Example]]:
        found: dict[str, list[Example]] = {}
        for file in _files(path, said["others"]):
            name = Path(file).stem
            if name in found:
                raise ValueError(f"{path}: others: two files are called {name}: expected each name once")
            found[name] = fitting(read_examples(file), f"others: {name}")
        return found

    dialogues = task("dialogues")
    return Material(
        dialogues,
        task("examples") if "examples" in said else dialogues,
        {str(name): cluster(name, place) for name, place in said["clusters"].items()},
        others(),
    )


def _files(path: Path, place: Any) -> list[str]:
    """The files of a place that claims.yaml names, in order."""
    given = place if isinstance(place, list) else [place]
    if not given or not all(isinstance(one, str) and one for one in given):
        raise ValueError(f"{path}: got {place!r}, expected a file, a folder, a pattern, or a list of them")
    found: list[str] = []
    for one in given:
        whole = path.parent / one
        files = sorted(map(str, whole.glob("*.jsonl"))) if whole.is_dir() else sorted(glob.glob(str(whole)))
        if not files:
            raise FileNotFoundError(f"{path}: {one}: expected a file, a folder with JSONL files, or a pattern of some")
        found += files
    return found


def mixed(parts: Mapping[str, Sequence[Example]], count: int) -> list[Example]:
    """That many rows in all, equally many of each part as far as it has them, in a fixed order at random."""
    rows = [one for part in parts.values() for one in part[: -(-count // len(parts))]]
    Random(0).shuffle(rows)
    return rows[:count]


def write(path: Path, rows: Sequence[Example]) -> Path:
    """The rows as a file that `compare` reads; one that is there must say the same.

    Raises:
        FileExistsError: it says something else: the material has changed since the first run.
    """
    lines = [json.dumps({"prompt": one.prompt, "completion": one.completion}) + "\n" for one in rows]
    content = "".join(lines).encode()
    if path.exists():
        if path.read_bytes() != content:
            raise FileExistsError(f"{path}: the material has changed since it was written: expected another --output")
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    writing.whole(path, content)
    return path
