"""Mixture: rates by hand, every stretch of draws with its shares, every row before any again, and any draw without those before it."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from fastlora import Mixture, Task
from fastlora.data.mixture import Order, of_files, with_rehearsal

COUNTS = {"large": 9000, "middle": 2000, "small": 100}


def tasks(*names: str) -> list[Task]:
    return [Task(name, f"{name}.jsonl") for name in names]


def mixed(**fields: object) -> Mixture:
    return Mixture(tasks(*COUNTS), **fields)


def order_of(mixture: Mixture, counts: dict[str, int] = COUNTS, seed: int = 0) -> tuple[Order, list[str]]:
    names = [name for name, count in counts.items() for _ in range(count)]
    return mixture.order(names, seed), names


def shares(rates: dict[str, float]) -> list[float]:
    return [pytest.approx(one, rel=1e-12) for one in rates.values()]


def test_rates_by_hand():
    assert shares(mixed().rates(COUNTS)) == [9000 / 11100, 2000 / 11100, 100 / 11100]
    assert shares(mixed(mixing_maximum=3000).rates(COUNTS)) == [3000 / 5100, 2000 / 5100, 100 / 5100]
    assert shares(mixed(mixing="fixed", weights=[1, 1, 2]).rates(COUNTS)) == [0.25, 0.25, 0.5]
    roots = mixed(mixing="temperature", mixing_temperature=2).rates({"large": 900, "middle": 400, "small": 100})
    assert shares(roots) == [30 / 60, 20 / 60, 10 / 60]
    capped = mixed(mixing="temperature", mixing_temperature=2, mixing_maximum=400)
    assert shares(capped.rates({"large": 900, "middle": 400, "small": 100})) == [20 / 50, 20 / 50, 10 / 50]
    equal = mixed(mixing="temperature", mixing_temperature=1e9).rates(COUNTS)
    assert all(one == pytest.approx(1 / 3, rel=1e-6) for one in equal.values())
    rehearsing = Mixture(tasks("a", "b"), rehearse=0.1, rehearsal=Task("rehearsal", "r.jsonl"))
    assert shares(rehearsing.rates({"a": 30, "b": 10, "rehearsal": 5})) == [0.675, 0.225, 0.1]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"mixing_maximum": 3000},
        {"mixing": "temperature", "mixing_temperature": 10 / 3},
        {"mixing": "fixed", "weights": [0.01, 3, 7]},
        {"rehearse": 0.1, "rehearsal": Task("rehearsal", "r.jsonl")},
    ],
    ids=str,
)
def test_every_task_has_its_share_of_every_stretch(fields):
    """A task of k has half a draw more or less by a time, and all tasks together k / 2: by that much is a count off, at most."""
    counts = {**COUNTS, **({"rehearsal": 50} if "rehearse" in fields else {})}
    order, names = order_of(mixed(**fields), counts)
    rates = mixed(**fields).rates(counts)
    drawn = [names[row] for row in order.draws(0, 2000)]
    so_far: Counter[str] = Counter()
    for number, name in enumerate(drawn, 1):
        so_far[name] += 1
        for task, rate in rates.items():
            assert abs(so_far[task] - rate * number) <= min(0.5 + len(counts) / 2 * rate, 1.5) + 1e-6, (number, task)
    for start in range(0, 2000, 8):
        step = Counter(drawn[start : start + 8])
        assert all(abs(step[task] - 8 * rate) <= 2.5 for task, rate in rates.items())


def test_a_tenth_is_rehearsed_exactly():
    """Of ten draws each one, and of steps of eight rows none or one."""
    order, names = order_of(
        Mixture(tasks("a"), rehearse=0.1, rehearsal=Task("rehearsal", "r.jsonl")), {"a": 70, "rehearsal": 9}
    )
    drawn = [names[row] for row in order.draws(0, 400)]
    assert all(drawn[start : start + 10].count("rehearsal") == 1 for start in range(0, 400, 10))
    assert {drawn[start : start + 8].count("rehearsal") for start in range(0, 400, 8)} == {0, 1}
    assert order.epoch == 78, "an epoch has each of the 70 others once"
    assert sorted(row for row in order.draws(0, 78) if row < 70) == list(range(70))


def test_an_epoch_has_each_row_once_and_a_capped_one_its_cap():
    counts = {"large": 30, "middle": 10, "small": 3}
    order, names = order_of(mixed(), counts)
    for epoch in range(3):
        drawn = order.draws(43 * epoch, 43 * epoch + 43)
        assert sorted(drawn) == list(range(43)), epoch
    assert order.epoch == 43 and order.draws(0, 43) != order.draws(43, 86), "each in an order of its own"
    capped, _ = order_of(mixed(mixing_maximum=10), counts)
    assert capped.epoch == 23
    assert Counter(names[row] for row in capped.draws(0, 23)) == {"large": 10, "middle": 10, "small": 3}


def test_no_row_comes_again_before_all_of_its_task_have_come():
    counts = {"large": 40, "middle": 7, "small": 3}
    order, names = order_of(mixed(mixing="fixed", weights=[1, 2, 2]), counts)
    by_task: dict[str, list[int]] = {name: [] for name in counts}
    for row in order.draws(0, 1000):
        by_task[names[row]].append(row)
    for name, rows in by_task.items():
        size = counts[name]
        times = [rows[start : start + size] for start in range(0, len(rows) // size * size, size)]
        assert len(times) >= 4 and all(len(set(one)) == size for one in times), name
        assert len({tuple(one) for one in times}) > 1, "each time through in another order"


@pytest.mark.parametrize("weights", [[1, 1, 1], [0.001, 5, 3], [1, 1e-6, 1e-6]])
def test_any_draws_are_found_without_those_before_them(weights):
    order, _ = order_of(mixed(mixing="fixed", weights=weights), {"large": 5, "middle": 7, "small": 3})
    whole = order.draws(0, 500)
    for start in (0, 1, 2, 13, 100, 499):
        fresh, _ = order_of(mixed(mixing="fixed", weights=weights), {"large": 5, "middle": 7, "small": 3})
        assert fresh.draws(start, 500) == whole[start:]
        assert [fresh.draws(one, one + 1)[0] for one in range(start, min(start + 30, 500))] == whole[start : start + 30]
    far, _ = order_of(mixed(mixing="fixed", weights=weights))
    assert len(far.draws(10**9, 10**9 + 8)) == 8, "and at once"


def test_the_seed_orders_rows_and_the_name_does():
    first, names = order_of(mixed())
    other, _ = order_of(mixed(), seed=1)
    assert first.draws(0, 50) != other.draws(0, 50)
    assert [names[row] for row in first.draws(0, 50)] == [names[row] for row in other.draws(0, 50)]
    assert (
        first.fingerprint() == order_of(mixed())[0].fingerprint() != order_of(mixed(mixing_maximum=50))[0].fingerprint()
    )


def test_many_tasks_one_of_each_a_round():
    counts = {f"t{i}": 10 for i in range(60)}
    order, names = order_of(Mixture(tasks(*counts)), counts)
    drawn = [names[row] for row in order.draws(0, 600)]
    assert all(len(set(drawn[start : start + 60])) == 60 for start in range(0, 600, 60))
    assert "and 48 more" in order.describe() and order.describe().startswith("t0 10 rows 1.67 %, ")


WRONG = [
    ({"tasks": []}, "^tasks: expected at least one"),
    ({"tasks": tasks("a", "a")}, "^tasks: expected each name once, got 'a' twice"),
    ({"mixing": "equal"}, "^mixing='equal': expected 'proportional' or 'temperature' or 'fixed'"),
    ({"mixing_maximum": 0}, "^mixing_maximum=0: expected 1 or more"),
    ({"mixing": "temperature"}, "^mixing_temperature: expected one with mixing=temperature"),
    ({"mixing_temperature": 2.0}, "^mixing_temperature=2.0: expected one with mixing=temperature, and with no other"),
    ({"mixing": "temperature", "mixing_temperature": 0}, "^mixing_temperature=0: expected a finite number above 0"),
    ({"mixing": "fixed"}, r"^weights=\[\]: expected 2 for mixing=fixed"),
    ({"mixing": "fixed", "weights": [1, 0]}, r"^weights=\[1, 0\]: expected finite numbers above 0"),
    ({"mixing": "fixed", "weights": [1, 1], "mixing_maximum": 3}, "^mixing_maximum=3: expected none"),
    ({"weights": [1, 1]}, "^weights=.*: expected none, mixing=proportional follows the rows"),
    ({"rehearse": 1.0, "rehearsal": Task("r", "r.jsonl")}, "^rehearse=1.0: expected 0 to below 1"),
    ({"rehearse": 0.1}, "^rehearse=0.1: expected above 0 with something to rehearse"),
    ({"rehearsal": Task("r", "r.jsonl")}, "^rehearse=0.0: expected above 0"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_a_field_that_is_none_is_named(fields, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Mixture(**{"tasks": tasks("a", "b"), **fields})


def test_a_task_without_rows_is_named():
    with pytest.raises(ValueError, match="^tasks: b has no rows left, max_length drops them all"):
        Mixture(tasks("a", "b")).order(["a", "a"], 0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, count in (("a", 3), ("b", 2)):
        rows = [{"prompt": f"{name}{i}?", "completion": name} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.yaml").write_text("name: own\ndata: b.jsonl\nmax_samples: 1\n")
    return tmp_path


def test_a_file_of_a_mixture(folder):
    (folder / "mixture.yaml").write_text(
        "mixing: fixed\ntasks:\n- {task: a.jsonl, weight: 2}\n- {task: task.yaml, weight: 1}\n- {data: b.jsonl, weight: 0.5}\n"
    )
    mixture = Mixture.read(folder / "mixture.yaml")
    assert [one.name for one in mixture.tasks] == ["a", "own", "b"] and mixture.weights == [2, 1, 0.5]
    found = mixture.examples()
    assert [(one.task, one.prompt) for one in found] == [
        ("a", "a0?"), ("a", "a1?"), ("a", "a2?"), ("own", "b0?"), ("b", "b0?"), ("b", "b1?"),
    ]  # fmt: skip
    (folder / "plain.yaml").write_text("mixing_maximum: 2\ntasks: [a.jsonl, task.yaml]\n")
    assert shares(Mixture.read(folder / "plain.yaml").rates({"a": 3, "own": 1})) == [2 / 3, 1 / 3]


def test_files_and_rehearsal(folder):
    mixture = with_rehearsal(of_files([str(folder / "a.jsonl")], {}), folder / "task.yaml", 0.25)
    assert [one.task for one in mixture.examples()] == ["a", "a", "a", "rehearsal"]
    assert mixture.rates({"a": 3, "rehearsal": 1}) == {"a": 0.75, "rehearsal": 0.25}
    cut = of_files([str(folder / "a.jsonl"), str(folder / "task.yaml")], {"max_samples": 2})
    cut = with_rehearsal(cut, folder / "b.jsonl", 0.25, 1)
    assert [one.task for one in cut.examples()] == ["a", "a", "own", "rehearsal"]
    alike = of_files(["x/train.jsonl", "y/train.jsonl", "y/test.jsonl"], {})
    assert [one.name for one in alike.tasks] == ["x/train.jsonl", "y/train.jsonl", "test"]
    absolute = of_files([os.path.abspath(str(one.data)) for one in alike.tasks], {})
    assert [one.name for one in absolute.tasks] == [one.name for one in alike.tasks], "whose orders follow from them"
    both = of_files(["x/a.jsonl", "x/a.csv", "y/b/a.csv", "hf:one/rows", "hf:two/rows"], {})
    assert [one.name for one in both.tasks] == ["a.jsonl", "x/a.csv", "b/a.csv", "hf:one/rows", "hf:two/rows"]
    with pytest.raises(ValueError, match=r"^data=\./x\.jsonl: is given twice|^data=x\.jsonl: is given twice"):
        of_files(["x.jsonl", "./x.jsonl"], {})
    with pytest.raises(ValueError, match="^data=y.jsonl: is given twice, expected each once; mixing says how often"):
        of_files(["x.jsonl", "y.jsonl", "z.jsonl", "y.jsonl"], {})


FILES = {
    "[]": "tasks: expected a list of them, beside mixing, mixing_maximum, mixing_temperature",
    "tasks: a.jsonl": "tasks: expected a list of them",
    "tasks: [a.jsonl]\nweights: [1]": "'weights': expected one of tasks, mixing",
    "tasks: []": "tasks: expected at least one",
    "tasks: [3]": r"tasks\[0\]: expected a file, or a task's fields, got int",
    "tasks: [a.jsonl, {data: b.jsonl, name: c, colour: red}]": r"tasks\[1\]: 'colour': expected one of name, data",
    "tasks: [{task: a.jsonl, name: c}]": r"tasks\[0\]: task: expected a file, and beside it weight only",
    "tasks: [{task: a.jsonl, weight: much}]": r"tasks\[0\]: weight='much': expected a number",
    "tasks: [{task: a.jsonl, weight: 2}]": r"weights=\[2\]: expected none, mixing=proportional",
    "tasks: [{task: a.jsonl, weight: 2}, b.jsonl]\nmixing: fixed": r"weights=\[2\]: expected 2 for mixing=fixed",
    "tasks: [a.jsonl]\nmixing: temperature": "mixing_temperature: expected one",
    "tasks: [a.jsonl]\nmixing: equal": "mixing='equal': expected",
    "tasks: [a.jsonl, a.jsonl]": "tasks: expected each name once, got 'a' twice",
    "tasks: [{task: bad.yaml}]": r"tasks\[0\]: .*bad.yaml: name: expected one, got none",
}


@pytest.mark.parametrize("content", FILES)
def test_a_file_that_is_none_is_named_with_its_field(content, folder):
    (folder / "bad.yaml").write_text("data: a.jsonl")
    (folder / "mixture.yaml").write_text(content)
    with pytest.raises((TypeError, ValueError), match=rf"^{folder}/mixture.yaml: .*{FILES[content]}"):
        Mixture.read(folder / "mixture.yaml")


def test_files_that_are_not_there(folder):
    with pytest.raises(FileNotFoundError, match="^mixture: there is no file .*no.yaml"):
        Mixture.read(folder / "no.yaml")
    (folder / "mixture.yaml").write_text("tasks: [no.yaml]")
    with pytest.raises(FileNotFoundError, match="there is no file .*/no.yaml, expected a task's"):
        Mixture.read(folder / "mixture.yaml")
