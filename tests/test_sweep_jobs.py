"""What a sweep trains: a grid's jobs, a file's jobs, and every wrong option named before anything runs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sweeps import a_sweep, some_files  # noqa: F401  (fixtures)
from training import on_cpu, one_thread  # noqa: F401  (fixtures)

from fastlora.sweep import Sweep, jobs_of

GIVEN: dict[str, Any] = {"model": "m", "data": "d.jsonl", "eval_data": "e.jsonl", "output": "o"}


def test_a_grid_is_every_combination():
    jobs = jobs_of(Sweep(**GIVEN, r=[4, 8], lr=[1e-4, 1e-3], max_steps=5, weight_decay=0.1))
    assert [job.name for job in jobs] == ["r4-lr0.0001", "r4-lr0.001", "r8-lr0.0001", "r8-lr0.001"]
    for job in jobs:
        config = job.config
        assert (config.lora_alpha, config.lora_dropout, config.weight_decay, config.max_steps) == (
            2 * config.r,
            0.0,
            0.1,
            5,
        )
        assert (job.folder, job.eval_data, job.patience) == (Path("o/jobs") / job.name, Path("e.jsonl"), None)
    (only,) = jobs_of(Sweep(**GIVEN))
    assert (only.name, only.config.lr_scheduler_type, only.config.method) == ("r16-lr0.0002", "cosine", "lora")


def test_what_varies_is_in_the_name():
    given = Sweep(
        **GIVEN, lora_alpha=[8.0, 16.5], lora_dropout=[0.0, 0.1], seed=[0, 7], target_modules=["all-linear", ["q_proj"]]
    )
    jobs = jobs_of(given)
    assert len({job.name for job in jobs}) == len(jobs) == 16
    assert jobs[0].name == "r16-lr0.0002-a8-d0-s0-t1" and jobs[-1].name == "r16-lr0.0002-a16.5-d0.1-s7-t2"
    assert jobs[-1].config.target_modules == ["q_proj"] and jobs[-1].config.seed == 7


def listing(tmp_path: Path, text: str, **more: Any) -> Sweep:
    path = tmp_path / "jobs.yaml"
    path.write_text(text)
    return Sweep(**{**GIVEN, **more}, jobs=path)


def test_a_file_lists_jobs_with_options_of_their_own(tmp_path):
    text = """
- name: first
  r: 4
  lr: 1e-3
  data: own.jsonl
  max_steps: 7
- lr: 2.5e-4
  target_modules: [q_proj, v_proj]
  patience: 3
  eval_data: other.jsonl
  gradient_accumulation_steps: 2
"""
    first, second = jobs_of(listing(tmp_path, text, epochs=2, eval_steps=4))
    assert (first.name, first.config.r, first.config.lr, first.config.max_steps) == ("first", 4, 1e-3, 7)
    assert (str(first.config.data), first.config.lora_alpha, first.config.epochs) == ("own.jsonl", 8, 2)
    assert (second.name, second.patience, second.eval_data) == ("r16-lr0.00025", 3, Path("other.jsonl"))
    assert second.config.target_modules == ["q_proj", "v_proj"] and second.config.gradient_accumulation_steps == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- r: 4\n- r: 4\n", r"job 2: name='r4-lr0.0002': expected another, an earlier job has it"),
        ("- rank: 4\n", "job 1: 'rank': expected one of name, eval_data, patience, r, lr"),
        ("- r: 0\n", "job 1: r=0: expected at least 1"),
        ("- r: many\n", "job 1: r='many': expected int, got str"),
        ("- name: ../up\n", "job 1: name='../up': expected letters"),
        ("- name: 3\n", "job 1: name=3: expected letters"),
        ("- lr: .nan\n", "job 1: lr=nan: expected a finite number"),
        ("- data:\n", "job 1: data: expected a file, none is given"),
        ("- patience: 0\n", "job 1: patience=0: expected at least 1"),
        ("- patience: 2\n", "job 1: patience=2: expected eval_steps as well"),
        ("- eval_data: [1]\n", r"job 1: eval_data=\[1\]: expected a file"),
        ("- model: other\n", "job 1: 'model': expected one of"),
        ("r: 4\n", "expected a list of jobs"),
        ("[]", "expected a list of jobs"),
        ("- 4\n", "expected a list of jobs"),
        ("- r: 4\n  r: 8\n", "no YAML list of jobs .*'r' is there twice"),
        ("- 4: r\n", "job 1: 4: expected one of"),
        ("- &a {r: 4}\n- *a\n", r"no YAML list of jobs .*an alias \(\*\) is not taken"),
        ("- {r: 4\n", "no YAML list of jobs"),
        ("- !!python/object:os.system {}\n", "no YAML list of jobs"),
        ("- " + "[" * 5000, "no YAML list of jobs"),
    ],
)
def test_a_bad_file_is_told(tmp_path, text, message):
    with pytest.raises((ValueError, TypeError), match=message):
        listing(tmp_path, text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": []}, r"r=\[\]: expected values, each once"),
        ({"lr": [1e-3, 1e-3]}, r"lr=\[0.001, 0.001\]: expected values, each once"),
        ({"r": [4.5]}, "r="),
        ({"model": ""}, "model='' is empty"),
        ({"data": None}, "data: expected a file"),
        ({"max_tokens": 0}, "max_tokens=0: expected 1 to"),
        ({"limit": 0}, "limit=0: expected 1 to"),
        ({"eval_steps": 0}, "eval_steps=0: expected 1 to"),
        ({"patience": 2}, "patience=2: expected eval_steps as well"),
        ({"resume": True, "overwrite": True}, "resume and overwrite exclude each other"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "lr_scheduler_type="),
        ({"lr": [-1.0]}, "lr=-1.0: expected a finite number"),
        ({"dtype": "float16"}, "dtype='float16': expected"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Sweep(**{**GIVEN, **options})


def test_a_file_and_a_grid_exclude_each_other(tmp_path):
    with pytest.raises(ValueError, match="jobs and r exclude each other"):
        listing(tmp_path, "- lr: 1e-3\n", r=[4])
    with pytest.raises(FileNotFoundError, match="jobs: there is no file"):
        Sweep(**GIVEN, jobs=tmp_path / "none.yaml")


def test_jobs_have_schedules_and_optimisers_of_their_own(given, tmp_path):
    """And go on from a checkpoint with them, to the same bits."""
    from sweeps import adapter, alone, distance
    from training import assert_same_bits

    from fastlora import checkpoint
    from fastlora.sweep import sweep
    from fastlora.sweep.saved import NAME

    text = """
- {name: sgd, r: 3, lr: 1e-1, optim: sgd, lr_scheduler_type: polynomial, lr_scheduler_kwargs: {power: 2.0, lr_end: 1e-4}}
- {name: warm, r: 4, lr: 5e-3, warmup_steps: 2, adam_beta2: 0.9, adam_epsilon: 1e-6}
- {name: factors, r: 4, lr: 1e-2, optim: adafactor, lr_scheduler_type: constant}
"""
    (tmp_path / "jobs.yaml").write_text(text)
    given = replace(given, r=None, lr=None, jobs=tmp_path / "jobs.yaml", max_steps=6, save_steps=3)
    found = {}
    for job, one in zip(jobs_of(given), sweep(given, progress=False), strict=True):
        found[job.name] = adapter(Path(one.output))
        expected = alone(job, tmp_path / "alone")
        zeros = {name: 0 * value for name, value in expected.items()}
        assert distance(found[job.name], expected) <= 1e-5 * distance(expected, zeros)
    checkpoint.clear(Path(given.output), after=3)
    (Path(given.output) / NAME).unlink()
    for one in sweep(replace(given, resume=True), progress=False):
        assert_same_bits(adapter(Path(one.output)), found[one.name])


def test_jobs_of_a_file_train_on_rows_of_their_own(given, files, tmp_path):
    import tiny
    from sweeps import adapter, alone, distance

    from fastlora.sweep import best, sweep

    other, held_out = (
        tiny.save_data(tmp_path / "other.jsonl", 10, seed=9),
        tiny.save_data(tmp_path / "held.jsonl", 4, seed=8),
    )
    text = f"""
- name: short
  r: 3
  lr: 1e-2
  data: {other}
  max_steps: 3
  batch_size: 2
  eval_data: {held_out}
- name: long
  r: 4
  lr: 5e-3
  lr_scheduler_type: linear
  gradient_accumulation_steps: 2
"""
    (tmp_path / "jobs.yaml").write_text(text)
    given = replace(given, r=None, lr=None, jobs=tmp_path / "jobs.yaml", halving=True)  # of groups of one job
    outcomes = sweep(given, progress=False)
    assert [(one.name, one.steps, one.status) for one in outcomes] == [("short", 3, "done"), ("long", 6, "done")]
    assert {data: one.name for data, one in best(outcomes).items()} == {
        str(held_out): "short",
        str(files["eval_data"]): "long",
    }
    for job, one in zip(jobs_of(given), outcomes, strict=True):
        expected = alone(job, tmp_path / "alone")
        assert distance(adapter(Path(one.output)), expected) <= 1e-5 * distance(
            expected, {name: 0 * value for name, value in expected.items()}
        )
