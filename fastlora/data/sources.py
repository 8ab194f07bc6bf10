"""Where rows come from: a file, a folder or pattern of files, or a data set of the hub. Each row has a place, FILE:LINE, for messages.

A source is
- a file. By its ending it is JSON (.json: a list of rows, an object of which one field is a list of rows, or lines), CSV with a
  header (.csv), or TSV with a header (.tsv); by its content Parquet. Any other has a JSON object a line. All but Parquet may be gzip;
- a folder: its files with one of these endings or .jsonl, in order of their names, or what a data set's `save_to_disk` left. Those that are
  compressed otherwise than by gzip are left out, with a warning;
- a pattern (`rows/*.jsonl`, `**` for any depth): the files that match, each once, in order;
- hf:OWNER/NAME, hf:OWNER/NAME:SPLIT or hf:OWNER/NAME:CONFIG:SPLIT: what `datasets.load_dataset` gives of it; the split is train unless told.

A TSV's fields are what stands between the tabs: it knows neither quotes nor escapes. A file without a header is read where columns are named by their
places: #1, #2. Files of several lines a row, as JSON's lists and Parquet, have the row's number in place of the line's.

Parquet needs pyarrow, saved and hub data sets `datasets`: the extra `data`.
"""

import csv
import glob
import gzip
import importlib
import logging
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from fastlora import reading
from fastlora.data.formats import FIELDS, BadLine, is_numbered
from fastlora.typed import listed

logger = logging.getLogger("fastlora")

HUB = "hf:"
ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
GZIP, PARQUET = b"\x1f\x8b", b"PAR1"
COMPRESSED = {b"PK\x03\x04": "zip", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2"}
PACKED = (".xz", ".zst", ".bz2", ".zip")
OTHER_FILES = {b"\xff\xfe": "UTF-16 text", b"\xfe\xff": "UTF-16 text"}
YAML = (".yaml", ".yml")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
SAVED, SPLITS = ("state.json", "dataset_info.json"), "dataset_dict.json"
INSTALL = "pip install 'fastlora-kernels[data]'"
LONGEST_FIELD = 2**31 - 1  # characters of a CSV's

Sources = str | Path | Sequence[str | Path]
Columns = Mapping[str, str]
Found = tuple[str, dict[str, Any] | BadLine]
"""A row's place, and its fields or what is wrong with them."""


def each(data: Sources) -> list[str]:
    """The sources, of one or several."""
    return [str(data)] if isinstance(data, str | Path) else [str(one) for one in data]


def one_or_several(data: Any) -> Any:
    """Of a list or tuple of sources one alone if there is no other, and strings where it has paths, as JSON has; else what it is."""
    if not isinstance(data, list | tuple):
        return data
    found = [str(one) if isinstance(one, Path) else one for one in data]
    return found[0] if len(found) == 1 else found


def named(data: Sources) -> str:
    """One or several sources, as tables and messages name them."""
    return ", ".join(each(data))


def local_files(data: Sources) -> list[Path]:
    """The files that are read for some sources; none of what is not there, or of the hub."""
    found: list[Path] = []
    for source in each(data):
        if not source.startswith(HUB):
            path = Path(source)
            found += sorted(one for one in path.rglob("*") if one.is_file()) if _is_saved(path) else _files(path)
    return found


def rows(
    source: str, columns: Columns | None = None, limit: int | None = None, streaming: bool = False
) -> Iterator[Found]:
    """The rows of one source, in order.

    Args:
        columns: of which only one thing counts here: whether a CSV or TSV has a header.
        limit: end behind so many rows, and read no further.
        streaming: read a hub's data set row by row, without keeping it on the disk.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: a file is compressed otherwise, no UTF-8 text, damaged, or without a header; a folder or pattern has no files.
        ImportError: a package of the extra `data` is missing.
    """
    return islice(_rows(source, columns, streaming), limit)


def _rows(source: str, columns: Columns | None, streaming: bool) -> Iterator[Found]:
    path = Path(source)
    if source.startswith(HUB):
        yield from _hub(source, streaming)
    elif _is_saved(path):
        yield from _saved(path)
    else:
        files = _files(path)
        if os.path.isdir(path):
            if not files:
                raise ValueError(f"data: {path} is a folder without files that end in {', '.join(ENDINGS)}")
            packed = sorted(
                one.name for one in path.iterdir() if one.suffix in PACKED and _ending(one.with_suffix("")) in ENDINGS
            )
            if packed:
                logger.warning("data: %s: left out %s: unpack them first, or pack them by gzip", path, listed(packed))
        for file in files or [path]:
            yield from _file(file, columns)


def _files(path: Path) -> list[Path]:
    """The files that a path or pattern stands for; none where there are none."""
    try:
        if path.is_dir():
            found = [one for one in path.iterdir() if _ending(one) in ENDINGS and not one.name.startswith(".")]
        elif path.exists():
            return [path]
        else:
            found = [Path(one) for one in glob.glob(str(path), recursive=True)] if glob.has_magic(str(path)) else []
        # A pattern with ** twice finds files twice; a link to nothing is told where it is read.
        return sorted({one for one in found if one.is_file() or (one.is_symlink() and not one.exists())})
    except OSError:  # a name that is too long, say, which `_file` tells
        return []


def _ending(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _file(path: Path, columns: Columns | None) -> Iterator[Found]:
    if path.suffix.lower() in YAML and path.is_file():
        raise ValueError(
            f"data: {path} is YAML, expected rows: a task's may be trained and measured on, and nothing else"
        )
    try:
        with path.open("rb") as file:
            beginning = file.peek(8)[:8]  # of a pipe as well
            if beginning.startswith(PARQUET):
                yield from _parquet(path)
            elif beginning.startswith(GZIP):
                with gzip.open(file) as unpacked:
                    yield from _text(unpacked, path, columns)
            else:
                yield from _text(file, path, columns)
    except FileNotFoundError:
        raise FileNotFoundError(f"data: there is no file {path}{_meant(str(path))}") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"data: {path} is damaged gzip ({error})") from None
    except OSError as error:
        raise type(error)(f"data: {path} cannot be read: {error.strerror or error}") from error


def of_hub(name: str) -> bool:
    """Whether a source looks like a data set of the hub without its hf:, and not like a file that is read here."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(:[^/]+)?", name) is not None and _ending(Path(name)) not in (
        *ENDINGS,
        *YAML,
    )


def _meant(name: str) -> str:
    """What may have been meant by the name of a file that there is not, as the end of a message."""
    if "," in name:
        return ": several sources are given by repeating the option, and in a file of options or in Python as a list"
    return f"; of the hub: {HUB}{name}" if of_hub(name) else ""


def _text(file: Iterable[bytes], path: Path, columns: Columns | None) -> Iterator[Found]:
    lines = _without_mark(file, path)
    ending = _ending(path)
    if ending in (".csv", ".tsv"):
        yield from _table(lines, path, ending, columns)
    elif ending == ".json":
        yield from _document(b"".join(lines), path, columns)
    else:
        yield from _lines(lines, path)


def _without_mark(file: Iterable[bytes], path: Path) -> Iterator[bytes]:
    for number, line in enumerate(file):
        if number == 0:
            for magic, kind in (COMPRESSED | OTHER_FILES).items():
                if line.startswith(magic):
                    hint = ": unpack it first, or pack it by gzip" if magic in COMPRESSED else ""
                    raise ValueError(f"data: {path} is {kind}, expected text in UTF-8{hint}")
            line = line.removeprefix(BYTE_ORDER_MARK)
        yield line


def fields_of(line: bytes) -> dict[str, Any] | BadLine:
    """What a line of JSON has, or what is wrong with it."""
    try:
        return reading.json_object(line, strict=False)
    except ValueError as error:
        return BadLine(str(error))


def _lines(lines: Iterable[bytes], path: Path) -> Iterator[Found]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield f"{path}:{number}", fields_of(line)


def _document(text: bytes, path: Path, columns: Columns | None) -> Iterator[Found]:
    """A .json: a list of rows, an object of which one field is such a list, or lines."""
    lines = text.splitlines(keepends=True)
    written = [line for line in lines if line.strip()]
    if not written:
        return
    first = written[0].lstrip()
    if first.startswith(b"{") and len(written) > 1 and isinstance(fields_of(first), dict):
        yield from _lines(lines, path)
        return
    try:
        value = reading.json_value(text, strict=False)
    except ValueError as error:
        raise ValueError(f"data: {path}: {error}") from None
    if isinstance(value, dict):
        named = (columns or {}).values()
        if value.keys() & {*FIELDS, *named, *(column.partition(".")[0] for column in named)}:
            value = [value]
        else:
            found = [one for one in value.values() if isinstance(one, list) and one and isinstance(one[0], dict)]
            if len(found) != 1:
                raise ValueError(f"data: {path}: expected a list of rows, or an object with one, got {len(found)}")
            (value,) = found
    if not isinstance(value, list):
        raise ValueError(f"data: {path}: expected a list of rows, got {type(value).__name__}")
    for number, fields in enumerate(value, 1):
        wrong = BadLine(f"expected a JSON object, got {type(fields).__name__}")
        yield f"{path}:{number}", fields if isinstance(fields, dict) else wrong


def _table(lines: Iterable[bytes], path: Path, ending: str, columns: Columns | None) -> Iterator[Found]:
    """A CSV, or a TSV, whose first row names the columns; a row's place is its first line."""

    def decoded() -> Iterator[str]:
        for line in lines:
            try:
                yield line.decode()
            except UnicodeDecodeError:
                raise BadLine("not UTF-8") from None

    before = csv.field_size_limit(LONGEST_FIELD)  # of the whole process
    try:
        if ending == ".csv":
            reader = csv.reader(decoded(), strict=True)
        else:
            reader = csv.reader(decoded(), delimiter="\t", quoting=csv.QUOTE_NONE)
        numbered = any(map(is_numbered, (columns or {}).values()))
        header: list[str] | None = None
        while True:
            place = f"{path}:{reader.line_num + 1}"
            try:
                values = next(reader, None)
            except BadLine as error:
                yield place, error
                return
            except csv.Error as error:  # what follows cannot be told apart
                yield place, BadLine(f"not {ending[1:].upper()} ({error})")
                return
            if values is None:
                return
            if not values:
                continue
            if numbered:
                yield place, {f"#{number}": value for number, value in enumerate(values, 1)}
            elif header is None:
                header = values
                _require_once(header, place)
            elif len(values) != len(header):
                yield place, BadLine(f"has {len(values)} fields, expected {len(header)} as in the header")
            else:
                yield place, dict(zip(header, values, strict=True))
    finally:
        csv.field_size_limit(before)


def _parquet(path: Path) -> Iterator[Found]:
    arrow, parquet = _require("pyarrow", path), _require("pyarrow.parquet", path)
    try:
        number = 0
        with parquet.ParquetFile(path) as file:
            _require_once(file.schema_arrow.names, str(path))
            for batch in file.iter_batches(batch_size=1000):
                for fields in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", _without_nulls(fields)
    # Also for a text that is none, and a date beyond Python's.
    except (arrow.ArrowException, UnicodeDecodeError, OverflowError) as error:
        raise ValueError(f"data: {path} cannot be read as Parquet: {error}") from error


def _require_once(names: Sequence[str], place: str) -> None:
    twice = [name for name in names if name and names.count(name) > 1]
    if twice:
        raise ValueError(f"data: {place}: the column {twice[0][:40]!r} is there twice")


def _is_saved(path: Path) -> bool:
    """Whether a folder is what a data set's `save_to_disk` left."""
    # os.path finds no file where a name is none.
    there = {name for name in (*SAVED, SPLITS) if os.path.isfile(path / name)}
    return SPLITS in there or there == {*SAVED}


def _saved(path: Path) -> Iterator[Found]:
    datasets = _require("datasets", path)
    if os.path.isfile(path / SPLITS):
        splits = sorted(one.name for one in path.iterdir() if _is_saved(one))
        raise ValueError(f"data: {path} holds several splits: expected one of them, {path}/SPLIT: {listed(splits)}")
    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # of many kinds, as what is damaged has
        raise ValueError(f"data: {path} cannot be read as a saved data set: {error}") from error
    for number, fields in enumerate(found, 1):
        yield f"{path}:{number}", _without_nulls(fields)


def _hub(source: str, streaming: bool) -> Iterator[Found]:
    parts = re.split(r":(?![^\[]*\])", source.removeprefix(HUB))  # a split may be train[:100]
    if not 1 <= len(parts) <= 3 or not all(parts):
        raise ValueError(f"data={source}: expected hf:OWNER/NAME, hf:OWNER/NAME:SPLIT or hf:OWNER/NAME:CONFIG:SPLIT")
    datasets = _require("datasets", source)
    name, *more = parts
    split = more.pop() if more else "train"
    number = 0
    try:
        # Streaming, what is wrong with a later file shows when it is come to.
        for number, fields in enumerate(datasets.load_dataset(name, *more[:1], split=split, streaming=streaming), 1):
            yield f"{source}:{number}", _without_nulls(fields)
    except Exception as error:  # no such data set, no network, no such split
        kinds = (FileNotFoundError, ConnectionError)
        kind = next((one for one in kinds if isinstance(error, one)), ValueError)
        behind = f" behind row {number}" if number else ""
        raise kind(f"data: {source} cannot be loaded{behind}: {error}") from error


def _require(package: str, source: Any) -> Any:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        name = package.partition(".")[0]
        raise ModuleNotFoundError(f"data: {source} needs the package {name}, which is missing: {INSTALL}") from error


def _without_nulls(value: Any) -> Any:
    """A table has a null wherever another row has a field: what is null was not there."""
    if isinstance(value, dict):
        return {name: _without_nulls(one) for name, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value
