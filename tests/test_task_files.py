"""Tasks: a YAML file's fields, the rows of its data, and an error that names file, field and what was expected."""

import json
from pathlib import Path

import pytest

from fastlora import Task, TemplateSet
from fastlora.data.examples import DataError, read_examples
from fastlora.data.tasks import files_of, read_rows

ROWS = [{"note": f"note {i}", "mark": ("good", "bad")[i % 2], "of": {"who": f"who {i}"}} for i in range(6)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


def written(folder: Path, text: str) -> Path:
    path = folder / "task.yaml"
    path.write_text(text)
    return path


WHOLE = """
name: notes
cluster: sentiment
data: rows.jsonl
columns: {text: note, label: mark, who: of.who}
templates:
  - {name: one, input: "{who}: {text}\\n{options}", target: "{label}"}
options: [good, bad]
few_shot_share: 0.5
shots: [1]
max_samples: 5
"""


def test_a_file_is_the_object_of_its_fields(folder):
    task = Task.read(written(folder, WHOLE))
    assert (task.name, task.cluster, task.max_samples) == ("notes", "sentiment", 5)
    found = task.examples(seed=1)
    assert len(found) == 5 and found == Task.read(folder / "task.yaml").examples(seed=1)
    assert [one.source for one in found] == [f"{folder}/rows.jsonl:{n}" for n in range(1, 6)]
    assert {one.task for one in found} == {"notes"}
    assert [one.completion for one in found] == ["good", "bad", "good", "bad", "good"]
    assert all(f"who {i}: note {i}\n" in one.prompt for i, one in enumerate(found))
    same = Task("notes", ROWS, task.templates, "sentiment", task.columns, 5)
    assert [one.prompt for one in same.examples(seed=1)] == [one.prompt for one in found]
    assert [one.source for one in same.examples()][:2] == ["notes:1", "notes:2"]


def test_templates_that_ship_and_those_of_a_file_beside(folder):
    asked = "name: n\ndata: rows.jsonl\ncolumns: {text: note, label: mark}\n"
    found = Task.read(written(folder, f"{asked}templates: sentiment\noptions: [good, bad]\ninverted_share: 0.5\n"))
    assert found.templates and found.templates.options == ["good", "bad"] and len(found.templates.templates) >= 6
    assert len(found.examples()) == 6
    (folder / "own.yaml").write_text('templates: [{input: "{text}", target: "{label}"}]')
    assert Task.read(written(folder, f"{asked}templates: own.yaml\n")).examples()[1].prompt == "note 1\n"


def test_rows_that_are_prompts_already(folder):
    (folder / "plain.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 3)
    found = Task.read(written(folder, "name: plain\ndata: plain.jsonl\nmax_samples: 2\n")).examples()
    assert [(one.prompt, one.completion, one.task, one.template) for one in found] == [("a", "b", "plain", "")] * 2


def test_tables(folder):
    (folder / "t.csv").write_text('note,mark\n"a, b",good\nc,bad\n')
    asked = 'templates: [{input: "{text}", target: "{label}"}]\n'
    found = Task.read(
        written(folder, f"name: t\ndata: t.csv\ncolumns: {{text: note, label: mark}}\n{asked}")
    ).examples()
    assert [(one.prompt, one.completion) for one in found] == [("a, b\n", "good"), ("c\n", "bad")]
    (folder / "t.tsv").write_text('say "hi"\tgood\nc\tbad\n')
    found = Task.read(
        written(folder, f"name: t\ndata: t.tsv\ncolumns: {{text: '#1', label: '#2'}}\n{asked}")
    ).examples()
    assert [(one.prompt, one.completion) for one in found] == [('say "hi"\n', "good"), ("c\n", "bad")]


WRONG = {
    "[]": "expected a task's fields, got list",
    "data: rows.jsonl": "name: expected one, got none",
    "name: n": "data: expected one, got none",
    "name: ''\ndata: rows.jsonl": "name='': expected a name",
    "name: 3\ndata: rows.jsonl": "name=3: expected str, got int",
    "name: n\ndata: rows.jsonl\ncolums: {}": "'colums': expected one of name, data, templates, cluster, columns, max_samples",
    "name: n\ndata: rows.jsonl\ncluster: [a]": r"cluster=\['a'\]: expected str",
    "name: n\ndata: rows.jsonl\ncolumns: [a]\ntemplates: sentiment": "columns=.*: expected dict",
    "name: n\ndata: rows.jsonl\ncolumns: {a: b}": "columns=.*: expected a column for one of prompt, completion",
    "name: n\ndata: [{a: b}]": "data: expected templates as well",
    "name: n\ndata: rows.jsonl\nmax_samples: 0": "max_samples=0: expected 1 or more",
    "name: n\ndata: 3": "data=3: expected",
    "name: n\ndata: rows.jsonl\nshots: [1]": "shots: expected templates as well",
    "name: n\ndata: rows.jsonl\ntemplates: 3": "templates: expected a list",
    "name: n\ndata: rows.jsonl\ntemplates: sentiment\nshots: [0]": r"shots=\[0\]: expected numbers",
    "name: n\ndata: rows.jsonl\ntemplates: [{input: '{x.y}', target: b}]": r"templates\[0\].input: .*expected the name",
    "name: n\ndata: rows.jsonl\ntemplates: sentiment\ninverted: 3": "inverted: expected a list",
    "name: n\nname: m": "the field 'name' is there twice",
}


@pytest.mark.parametrize("content", WRONG)
def test_a_file_that_is_none_is_named_with_its_field(content, folder):
    with pytest.raises((TypeError, ValueError), match=rf"^{folder}/task.yaml: .*{WRONG[content]}"):
        Task.read(written(folder, content))


def test_rows_to_measure_on_may_be_a_tasks(folder):
    """Asked in its own wordings, the same for every run; with as many examples as there is room for."""
    path = written(folder, "name: n\ndata: rows.jsonl\ncolumns: {text: note, label: mark}\ntemplates: sentiment\noptions: [good, bad]\n"
                           "few_shot_share: 1\nmax_tokens: 30")  # fmt: skip
    plain = folder / "plain.jsonl"
    plain.write_text('{"q": "a", "completion": "b"}\n')
    words = lambda one: len(one.prompt.split())  # noqa: E731
    found = read_rows([str(path), str(plain)], columns={"prompt": "q", "completion": "completion"}, length=words)
    assert found[:-1] == Task.read(path).examples(0, words) and found[-1].prompt == "a" and len(found) > 3
    assert files_of([str(path), plain]) == [path, plain, folder / "rows.jsonl"]
    fewer = read_rows(path, length=words, max_tokens=1)
    assert [one.source for one in fewer] == [one.source for one in found[:-1]]
    assert not any("shot" in one.template for one in fewer)
    assert read_rows(plain, columns={"text": "q"}) == read_examples(plain, columns={"text": "q"})
    with pytest.raises(ValueError, match=rf"^data: {path} is YAML, expected rows: a task's may be"):
        read_examples(path)


def test_files_that_are_not_there(folder):
    with pytest.raises(FileNotFoundError, match="there is no file .*/no.yaml, expected a task's"):
        Task.read(folder / "no.yaml")
    with pytest.raises(
        FileNotFoundError, match="^.*task.yaml: templates: there is no file .*no.yaml; those that ship are"
    ):
        Task.read(written(folder, "name: n\ndata: rows.jsonl\ntemplates: no.yaml"))
    with pytest.raises(
        FileNotFoundError, match="^.*task.yaml: templates: there is no file sentiments; those that ship are"
    ):
        Task.read(written(folder, "name: n\ndata: rows.jsonl\ntemplates: sentiments"))
    with pytest.raises(OSError, match="no.jsonl"):
        Task.read(written(folder, "name: n\ndata: no.jsonl\ntemplates: sentiment")).examples()


def test_rows_that_cannot_be_asked_are_told_at_once_each_with_its_line(folder):
    with (folder / "rows.jsonl").open("a") as file:
        file.write('{"note": "x", "mark": "awful"}\n{"note": ["x", {}], "mark": "bad"}\n')
    asked = "name: n\ndata: rows.jsonl\ncolumns: {text: note, label: mark}\ntemplates: sentiment\noptions: [good, bad]\noptions_share: 1"
    with pytest.raises(DataError) as caught:
        Task.read(written(folder, asked)).examples()
    assert len(caught.value.problems) == 2
    assert caught.value.problems[0] == f"{folder}/rows.jsonl:7: label='awful': expected one of good, bad"
    assert caught.value.problems[1].startswith(f"{folder}/rows.jsonl:8: text: expected a text")
    lacking = Task("n", [{"note": "x"}], TemplateSet.read("sentiment"), columns={"label": "mark.of", "text": "note"})
    with pytest.raises(DataError, match="n:1: no column 'mark.of': there are 'note'"):
        lacking.examples()
