"""Where rows come from: files of every kind, folders, patterns, saved data sets, and several of them; each row keeps its place."""

import csv
import gzip
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny

from fastlora.data import sources
from fastlora.data.examples import DataError, Example, read_examples

ROWS = [{"prompt": f"a{n}", "completion": f"b{n}"} for n in range(3)]
EXPECTED = [("a0", "b0"), ("a1", "b1"), ("a2", "b2")]


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def pairs(data: Any, **options: Any) -> list[tuple[Any, str]]:
    return [(one.prompt, one.completion) for one in read_examples(data, **options)]


def places(data: Any, **options: Any) -> list[str]:
    return [one.source.rpartition("/")[2] for one in read_examples(data, **options)]


TEXTS = {
    "rows.jsonl": lines(ROWS),
    "rows.txt": lines(ROWS),
    "rows": lines(ROWS),
    "rows.JSON": json.dumps(ROWS),
    "lines.json": lines(ROWS),
    "object.json": json.dumps({"canary": "x", "empty": [], "examples": ROWS}, indent=1),
    "rows.csv": "prompt,id,completion\r\na0,1,b0\r\na1,2,b1\r\na2,3,b2\r\n",
    "quoted.csv": '"prompt","completion"\n"a0","b0"\na1,b1\n\n"a2",b2',
    "rows.tsv": "prompt\tcompletion\na0\tb0\na1\tb1\na2\tb2\n",
}


@pytest.mark.parametrize("name", TEXTS)
def test_text_of_every_kind_is_read_packed_or_not(tmp_path, name):
    content = TEXTS[name].encode()
    for path in (
        write(tmp_path / name, content),
        write(tmp_path / f"{name}.gz", gzip.compress(content)),
        write(tmp_path / f"marked-{name}", b"\xef\xbb\xbf" + content),
    ):
        assert pairs(path) == EXPECTED


def test_rows_keep_their_lines_or_where_there_are_none_their_numbers(tmp_path):
    table = write(tmp_path / "rows.csv", 'prompt,completion\n\n"a\nb",c\nd,"e ""f"", g"\n')
    assert pairs(table) == [("a\nb", "c"), ("d", 'e "f", g')]
    assert places(table) == ["rows.csv:3", "rows.csv:5"]
    assert places(write(tmp_path / "rows.jsonl", "\n" + lines(ROWS[:2]))) == ["rows.jsonl:2", "rows.jsonl:3"]
    assert places(write(tmp_path / "rows.json", json.dumps(ROWS, indent=1))) == [f"rows.json:{n}" for n in (1, 2, 3)]


def test_a_tsv_knows_no_quotes(tmp_path):
    path = write(tmp_path / "rows.tsv", 'prompt\tcompletion\n"Claim." Is it so?\t"yes"\n"open\tno\n')
    assert pairs(path) == [('"Claim." Is it so?', '"yes"'), ('"open', "no")]


def test_a_file_without_a_header_is_read_by_places(tmp_path):
    columns = {"prompt": "#1", "completion": "#3"}
    assert pairs(write(tmp_path / "rows.tsv", "a0\tx\tb0\na1\ty\tb1\n"), columns=columns) == EXPECTED[:2]
    assert pairs(write(tmp_path / "rows.csv", "a0,x,b0,more\n"), columns=columns) == EXPECTED[:1]
    with pytest.raises(DataError, match=r"rows\.csv:2: no column '#3': there are '#1', '#2'"):
        read_examples(write(tmp_path / "rows.csv", "a,b,c\na,b\n"), columns=columns)


def test_one_row_in_a_json_file_is_a_row(tmp_path):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (found,) = read_examples(write(tmp_path / "one.json", json.dumps({"messages": messages}, indent=1)))
    assert (found.prompt, found.completion) == (messages[:1], "b")
    asked = {"dialogue": messages, "id": 1}
    assert read_examples(write(tmp_path / "one.json", json.dumps(asked)), columns={"messages": "dialogue"})
    inside = write(tmp_path / "in.json", json.dumps({"of": {"q": "a", "a": "b"}, "tags": [{}]}, indent=1))
    assert pairs(inside, columns={"prompt": "of.q", "completion": "of.a"}) == [("a", "b")]


def test_long_fields_are_read_and_csv_is_left_as_it_was(tmp_path):
    before = csv.field_size_limit()
    path = write(tmp_path / "rows.csv", f"prompt,completion\n{'a' * 200_000},b\n")
    assert len(read_examples(path)[0].prompt) == 200_000 and csv.field_size_limit() == before


BAD = {
    "fields.csv": (
        "prompt,completion\na,b,c\n",
        DataError,
        r"fields\.csv:2: has 3 fields, expected 2 as in the header",
    ),
    "quotes.csv": ('prompt,completion\n"a"b,c\n', DataError, r"quotes\.csv:2: not CSV \("),
    "open.csv": ('prompt,completion\n"a,b\nc\n', DataError, r"open\.csv:2: not CSV \("),
    "text.csv": (b"prompt,completion\na,b\n\xff,c\n", DataError, r"text\.csv:3: not UTF-8"),
    "empty.csv": ("prompt,completion\n", ValueError, r"empty\.csv has no rows"),
    "twice.csv": ("prompt,prompt\na,b\n", ValueError, r"twice\.csv:1: the column 'prompt' is there twice"),
    "headless.tsv": ("a\tb\nc\td\n", DataError, r"headless\.tsv:2: fits no format: has the fields 'a', 'b'"),
    "rows.json": (
        '[{"prompt": "a"}, 3]',
        DataError,
        r"rows\.json:1: no field 'completion'(.|\n)*rows\.json:2: .* got int",
    ),
    "word.json": ('"a"', ValueError, r"word\.json: expected a list of rows, got str"),
    "none.json": ('{"a": 1}', ValueError, r"none\.json: expected a list of rows, or an object with one, got 0"),
    "cut.json": ('[{"prompt": "a"', ValueError, r"cut\.json: not JSON \("),
    "empty.json": (" \n", ValueError, r"empty\.json has no rows"),
    "rows.jsonl.zip": (b"PK\x03\x04", ValueError, r"zip is zip, expected text in UTF-8: unpack it first"),
    "wide.csv": ("prompt,completion\na,b\n".encode("utf-16"), ValueError, r"wide\.csv is UTF-16 text, expected text"),
    "cut.jsonl.gz": (gzip.compress(b"{}" * 99)[:-9], ValueError, r"cut\.jsonl\.gz is damaged gzip"),
    "bad.jsonl.gz": (b"\x1f\x8bx", ValueError, r"bad\.jsonl\.gz is damaged gzip"),
    "bad.parquet": (b"PAR1 and no more", ValueError, r"bad\.parquet cannot be read as Parquet"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_named(tmp_path, name):
    content, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        read_examples(write(tmp_path / name, content))


def test_folders_and_patterns_are_their_files_in_order(tmp_path):
    write(tmp_path / "set" / "b.jsonl", lines(ROWS[1:]))
    write(tmp_path / "set" / "a.csv", "prompt,completion\na0,b0\n")
    write(tmp_path / "set" / "README.md", "no rows")
    write(tmp_path / "set" / ".hidden.jsonl", "no rows")
    write(tmp_path / "set" / "deeper" / "c.jsonl", lines(ROWS))
    assert pairs(tmp_path / "set") == EXPECTED
    assert places(tmp_path / "set") == ["a.csv:2", "b.jsonl:1", "b.jsonl:2"]
    assert pairs(f"{tmp_path}/set/*.jsonl") == EXPECTED[1:]
    assert len(pairs(f"{tmp_path}/**/*.jsonl")) == 5
    write(tmp_path / "odd[1].jsonl", lines(ROWS[:1]))
    assert pairs(tmp_path / "odd[1].jsonl") == EXPECTED[:1], "a file is one, whatever its name looks like"
    assert len(pairs(f"{tmp_path}/**/**/**/*.jsonl")) == 6, "each file once, whichever way it is found"
    with pytest.raises(FileNotFoundError, match=r"^data: there is no file .*/\*\.tsv"):
        read_examples(f"{tmp_path}/*.tsv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty is a folder without files that end in \.jsonl, "):
        read_examples(tmp_path / "empty")


@pytest.mark.parametrize(
    ("data", "meant"),
    [
        ("tatsu-lab/alpaca", "; of the hub: hf:tatsu-lab/alpaca"),
        ("openai/gsm8k:main:test[:10]", "; of the hub: hf:openai/gsm8k:main:test[:10]"),
        ("a.jsonl,b.jsonl", ": several sources are given by repeating the option, and in a file of options or in Python as a list"),
        ("identity,alpaca_en", ": several sources are given by repeating the option, and in a file of options or in Python as a list"),
        ("rows/a.jsonl", ""),
        ("rows/a.csv.gz", ""),
        ("../rows", ""),
        ("/rows/a", ""),
        ("a/b/c", ""),
        ("rows", ""),
    ],
)  # fmt: skip
def test_a_file_that_there_is_not_names_what_may_have_been_meant(tmp_path, monkeypatch, data, meant):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as raised:
        read_examples(data)
    assert str(raised.value) == f"data: there is no file {data}{meant}"


def test_no_file_of_a_folder_is_left_out_without_a_word(tmp_path, caplog):
    write(tmp_path / "set" / "a.jsonl", lines(ROWS))
    for name in ("b.jsonl.zst", "c.csv.zip", "notes.zip", "d.txt.xz"):
        write(tmp_path / "set" / name, "packed")
    assert pairs(tmp_path / "set") == EXPECTED
    (record,) = caplog.records
    told = f"data: {tmp_path}/set: left out b.jsonl.zst, c.csv.zip: unpack them first, or pack them by gzip"
    assert record.getMessage() == told
    (tmp_path / "set" / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    for data in (tmp_path / "set", f"{tmp_path}/set/*.jsonl"):
        with pytest.raises(FileNotFoundError, match=r"^data: there is no file .*gone\.jsonl"):
            read_examples(data)


def test_a_column_that_no_row_has_is_told(tmp_path, caplog):
    rows = [{"instruction": "i", "output": "o", "text": {"more": "m"}}, {"instruction": "i", "output": "o"}]
    path = write(tmp_path / "rows.jsonl", lines(rows))
    columns = {"instruction": "instruction", "output": "output", "input": "text.more"}
    assert read_examples(path, columns=columns)[0].prompt[0]["content"] == "i\n\nm" and not caplog.records
    read_examples([path, path], columns=columns | {"input": "txt", "system": "sys"})
    assert [record.getMessage() for record in caplog.records] == [
        f"columns: none of the 4 rows of {path}, {path} has the column 'txt', which is to be the input",
        f"columns: none of the 4 rows of {path}, {path} has the column 'sys', which is to be the system",
    ]


def test_several_sources_follow_one_another_and_all_their_problems_are_told(tmp_path):
    first, second = write(tmp_path / "a.jsonl", lines(ROWS[:1])), write(tmp_path / "b.csv", TEXTS["rows.csv"])
    assert pairs([first, str(second)]) == [EXPECTED[0], *EXPECTED]
    assert pairs((second, first), max_samples=2) == [*EXPECTED[:2], EXPECTED[0]]
    bad = [write(tmp_path / name, "{\n") for name in ("c.jsonl", "d.jsonl")]
    with pytest.raises(DataError, match="2 bad lines") as caught:
        read_examples([bad[0], first, bad[1]])
    assert [Path(one.split(":")[0]).name for one in caught.value.problems] == ["c.jsonl", "d.jsonl"]
    with pytest.raises(ValueError, match=r"e\.jsonl has no rows"):
        read_examples([first, write(tmp_path / "e.jsonl", "")])


def test_what_stands_behind_the_samples_is_not_looked_at(tmp_path):
    path = write(tmp_path / "rows.jsonl", lines(ROWS) + "{\n")
    assert pairs(path, max_samples=3) == EXPECTED
    with pytest.raises(DataError):
        read_examples(path, max_samples=4)


def test_options_of_no_use_are_refused():
    for data, options, message in (
        ([], {}, r"data=\[\] is empty"),
        (["a", ""], {}, "data=.* is empty"),
        ("a", {"max_samples": 0}, "max_samples=0: expected at least 1"),
        ("a", {"max_samples": 1.5}, "max_samples=1.5: expected at least 1, an integer"),
        ("a", {"max_samples": True}, "max_samples=True: expected at least 1"),
        ("a", {"streaming": True, "max_samples": 3}, "streaming=True: expected a data set of the hub"),
        ("hf:a/b", {"streaming": True}, "streaming=True: expected max_samples"),
        ("hf:", {}, "data=hf:: expected hf:OWNER/NAME, "),
        ("hf:a/b:c:d:e", {}, "expected hf:OWNER/NAME, hf:OWNER/NAME:SPLIT or hf:OWNER/NAME:CONFIG:SPLIT"),
    ):
        with pytest.raises(ValueError, match=message):
            read_examples(data, **options)


def test_the_files_behind_sources_are_known_before_they_are_read(tmp_path):
    file, other = write(tmp_path / "a.jsonl", "{"), write(tmp_path / "set" / "b.csv", "x")
    given = [str(file), str(tmp_path / "set"), f"{tmp_path}/se?/*.csv", str(tmp_path / "gone"), "hf:a/b", "x" * 300]
    assert sources.local_files(given) == [file, other, other]
    assert sources.named([file, other]) == f"{file}, {other}" and sources.named(file) == str(file)
    assert sources.one_or_several([file]) == str(file) and sources.one_or_several((file, "b")) == [str(file), "b"]
    assert [sources.one_or_several(one) for one in (file, "b", 3, [3])] == [file, "b", 3, 3]


@pytest.mark.parametrize("package", ["pyarrow", "datasets"])
def test_a_missing_package_is_named_with_what_to_install(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    data = {"pyarrow": write(tmp_path / "rows.parquet", b"PAR1"), "datasets": "hf:a/b"}[package]
    with pytest.raises(
        ModuleNotFoundError, match=rf"needs the package {package}.*pip install 'fastlora-kernels\[data\]'"
    ):
        read_examples(data)
    assert pairs(write(tmp_path / "rows.jsonl", lines(ROWS))) == EXPECTED


def test_parquet_is_read_and_its_nulls_are_not_there(tmp_path):
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    rows = [
        {"prompt": "a0", "completion": "b0"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": "n"}]},
    ]
    path = tmp_path / "rows.parquet"
    parquet.write_table(arrow.Table.from_pylist([{"messages": None, **rows[0]}, {"prompt": None, **rows[1]}]), path)
    found = read_examples(path)
    assert found[0] == Example("a0", "b0", f"{path}:1")
    assert found[1].prompt == [{"role": "user", "content": "a"}] and found[1].turn["name"] == "n"
    assert [one.source for one in found] == [f"{path}:1", f"{path}:2"] and len(read_examples(path, max_samples=1)) == 1
    assert pairs(tmp_path) == [(one.prompt, one.completion) for one in found]


def test_a_parquet_file_that_is_damaged_is_named(tmp_path):
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    path, texts = tmp_path / "rows.parquet", arrow.array(["a"])
    parquet.write_table(arrow.Table.from_arrays([texts, texts, texts], ["prompt", "prompt", "completion"]), path)
    with pytest.raises(ValueError, match=r"^data: .*rows\.parquet: the column 'prompt' is there twice"):
        read_examples(path)
    no_text = arrow.Array.from_buffers(arrow.string(), 1, [None, texts.buffers()[1], arrow.py_buffer(b"\xff")])
    parquet.write_table(arrow.table({"prompt": no_text, "completion": texts}), path)
    with pytest.raises(ValueError, match=r"^data: .*rows\.parquet cannot be read as Parquet: "):
        read_examples(path)


@pytest.fixture
def saved(tmp_path) -> Path:
    """Two splits, as `datasets` saves them."""
    datasets = pytest.importorskip("datasets")
    part = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": part, "test": part.select([2])}).save_to_disk(str(tmp_path / "saved"))
    return tmp_path / "saved"


def test_a_saved_data_set_is_read(saved):
    assert pairs(saved / "train") == EXPECTED and pairs(saved / "train", max_samples=1) == EXPECTED[:1]
    assert places(saved / "test") == ["test:1"]
    assert sources.local_files(saved / "test") and all(one.is_file() for one in sources.local_files(saved / "test"))
    with pytest.raises(ValueError, match=r"saved holds several splits: expected one of them, .*/SPLIT: test, train"):
        read_examples(saved)
    (saved / "train" / "state.json").write_text("{")
    with pytest.raises(ValueError, match="train cannot be read as a saved data set"):
        read_examples(saved / "train")


@pytest.fixture
def hub(tmp_path, monkeypatch) -> str:
    """A folder in the place of the hub's data set: `datasets` loads both alike."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write(tmp_path / "set" / "train.jsonl", lines(ROWS))
    write(tmp_path / "set" / "test.jsonl", lines(ROWS[2:]))
    return f"hf:{tmp_path}/set"


def test_a_hub_data_set_is_read_by_split_whole_or_streaming(hub):
    assert pairs(hub) == EXPECTED and pairs(f"{hub}:test") == EXPECTED[2:]
    assert pairs(f"{hub}:default:train[:2]") == EXPECTED[:2]
    assert [one.source for one in read_examples(f"{hub}:test")] == [f"{hub}:test:1"]
    assert pairs(hub, streaming=True, max_samples=2) == EXPECTED[:2]
    with pytest.raises(ValueError, match=r"^data: hf:.*:validation cannot be loaded: "):
        read_examples(f"{hub}:validation")


@pytest.mark.parametrize(("error", "kind"), [(ConnectionError("reset"), OSError), (RuntimeError("odd"), ValueError)])
def test_what_goes_wrong_behind_the_first_rows_is_named_with_the_data_set(monkeypatch, error, kind):
    def some(*_: Any, **__: Any) -> Any:
        yield from ROWS[:2]
        raise error

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=some))
    with pytest.raises(kind, match=rf"^data: hf:a/b cannot be loaded behind row 2: {error}"):
        read_examples("hf:a/b", streaming=True, max_samples=3)
    assert pairs("hf:a/b", streaming=True, max_samples=2) == EXPECTED[:2]


def test_a_hub_data_set_that_is_not_there_is_named(tmp_path):
    pytest.importorskip("datasets")
    with pytest.raises((OSError, ValueError), match=r"^data: hf:.*gone cannot be loaded: "):
        read_examples(f"hf:{tmp_path}/gone")


def test_rows_of_the_tiny_task_are_the_same_from_every_kind_of_file(tmp_path):
    """What `fastlora train` is given in the other tests."""
    rows = tiny.rows(8)
    table = tmp_path / "rows.csv"
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(rows)
    assert pairs(table) == pairs(tiny.save_data(tmp_path / "rows.jsonl", 8))
