"""`fastlora sweep`: each job's adapter is the one that it has alone, whatever the others do."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from sweeps import a_sweep, adapter, alone, distance, some_files  # noqa: F401  (fixtures)
from tiny import llama
from training import assert_same_bits, on_cpu, one_thread  # noqa: F401  (fixtures)
from typer.testing import CliRunner

import fastlora
from fastlora import cli, metrics
from fastlora.course import TrainingError
from fastlora.data.rows import Row
from fastlora.evaluation import evaluate
from fastlora.models import load_model
from fastlora.peft import mixed
from fastlora.peft.layers import Fused
from fastlora.sweep import Job, best, jobs_of, sweep
from fastlora.sweep.run import PAGE, SweepRun
from fastlora.sweep.saved import NAME


def assert_as_alone(found: Path, job: Job, folder: Path) -> None:
    """The adapter and losses of `fastlora train`, but for rounding, which a training blows up: test_sweep_gradients.py has the bound."""
    expected = alone(job, folder)
    at_first = alone(replace(job, config=replace(job.config, lr=0.0)), folder / "first")
    assert distance(adapter(found), expected) <= 1e-4 * distance(expected, at_first)
    theirs = [record["loss"] for record in metrics.read(folder / job.name)]
    assert [record["loss"] for record in metrics.read(found)] == pytest.approx(theirs, rel=1e-4)
    configs = [json.loads((one / "adapter_config.json").read_text()) for one in (found, folder / job.name)]
    for one in configs:
        one["target_modules"] = sorted(one["target_modules"])
    assert configs[0] == configs[1]


def test_each_adapter_is_the_one_it_has_alone(given, tmp_path):
    """Of other ranks, rates, seeds and layers; other seeds have other rows."""
    grid = {"r": [1, 6], "lr": [1e-2], "seed": [0, 3], "target_modules": ["all-linear", ["q_proj", "down_proj"]]}
    given = replace(given, **grid)
    for job, one in zip(jobs_of(given), sweep(given, progress=False), strict=True):
        assert_as_alone(Path(one.output), job, tmp_path / "alone")


def test_however_the_rows_are_cut_into_batches(given, tmp_path):
    given = replace(given, lr=[1e-2], max_tokens=50)
    for job, one in zip(jobs_of(given), sweep(given, progress=False), strict=True):
        assert_as_alone(Path(one.output), job, tmp_path / "alone")


def test_on_a_16_bit_base(given, tmp_path):
    """Whose adapters are float32."""
    given = replace(given, lr=[1e-3], dtype="bfloat16")
    for job, one in zip(jobs_of(given), sweep(given, progress=False), strict=True):
        expected = alone(job, tmp_path / "alone")
        at_first = alone(replace(job, config=replace(job.config, lr=0.0)), tmp_path / "first")
        assert distance(adapter(Path(one.output)), expected) <= 0.1 * distance(expected, at_first)
        theirs = [record["loss"] for record in metrics.read(tmp_path / "alone" / job.name)]
        assert [record["loss"] for record in metrics.read(Path(one.output))] == pytest.approx(theirs, rel=1e-2)


@pytest.mark.parametrize(("packs", "expected"), [(True, [[3, 3, 4], [9], [2]]), (False, [[3, 3], [4], [9], [2]])])
def test_a_batch_has_no_more_tokens_than_told(packs, expected):
    """Padding counts where it is computed; a row that alone has more is a batch of its own."""
    rows = [("job0", Row([1] * length, [1] * length)) for length in (3, 3, 4, 9, 2)]
    run: Any = SimpleNamespace(loss=SimpleNamespace(packs=packs), given=SimpleNamespace(max_tokens=10))
    assert [[len(row.input_ids) for _, row in part] for part in SweepRun._parts(run, rows)] == expected
    run.given.max_tokens = 1
    assert [len(part) for part in SweepRun._parts(run, rows)] == [1] * 5


def test_one_job_has_the_bits_that_it_has_alone(given, tmp_path):
    """With dropout, too: it draws the same masks."""
    given = replace(given, r=[3], lr=[1e-2], lora_dropout=[0.2])
    (outcome,) = sweep(given, progress=False)
    (job,) = jobs_of(given)
    assert_same_bits(adapter(Path(outcome.output)), alone(job, tmp_path / "alone"))
    losses = [record["loss"] for record in metrics.read(Path(outcome.output))]
    assert losses == [record["loss"] for record in metrics.read(tmp_path / "alone" / job.name)]


def test_a_sweep_is_the_same_bits_again(given, tmp_path):
    given = replace(given, lora_dropout=[0.0, 0.3])
    first = sweep(given, progress=False)
    second = sweep(replace(given, output=tmp_path / "again"), progress=False)
    for one, other in zip(first, second, strict=True):
        assert_same_bits(adapter(Path(one.output)), adapter(Path(other.output)))


def test_a_job_without_dropout_does_not_feel_the_dropout_of_others(given, tmp_path):
    """Its rows are its own, and so are their masks."""
    given = replace(given, r=[4], lr=[1e-2], lora_dropout=[0.0, 0.5])
    plain, dropped = sweep(given, progress=False)
    jobs = jobs_of(given)
    assert_as_alone(Path(plain.output), jobs[0], tmp_path / "alone")
    # Other masks than alone, of the same kind.
    expected = alone(jobs[1], tmp_path / "alone")
    assert distance(adapter(Path(dropped.output)), expected) > 0.01
    losses = metrics.read(tmp_path / "alone" / jobs[1].name)
    assert dropped.train_loss == pytest.approx(sum(one["loss"] for one in losses) / 6, rel=0.1)


def test_the_masks_of_two_jobs_are_drawn_apart(given):
    """Two jobs alike in all but their place: at the first step B is zero, and its gradient tells of the mask alone."""
    given = replace(given, r=[4], lr=[1e-2], lora_dropout=[0.5])
    job = jobs_of(given)[0]
    run = SweepRun(given, [job, replace(job, name="other")], torch.device("cpu"), None)
    rows = {one.adapter: one.course.step_rows(0) for one in run.jobs}
    sums: list[dict[str, torch.Tensor]] = [{}, {}]
    draws = 40
    for _ in range(draws):
        run._backward(run.jobs, rows)
        gradients = [
            {name.replace(one.adapter, "a"): p.grad.clone() for name, p in one.trained.items() if "lora_B" in name}
            for one in run.jobs
        ]
        assert all(not torch.equal(value, gradients[1][name]) for name, value in gradients[0].items())
        for own, total in zip(gradients, sums, strict=True):
            for name, value in own.items():
                total[name] = total.get(name, 0) + value / draws
        for one in run.jobs:
            one.optimizer.zero_grad()
    for module in run.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    run._backward(run.jobs, rows)
    for one, total in zip(run.jobs, sums, strict=True):
        plain = {name.replace(one.adapter, "a"): p.grad for name, p in one.trained.items() if "lora_B" in name}
        size = distance(plain, {name: value * 0 for name, value in plain.items()})
        assert (
            distance(total, plain) < 0.5 * size
        )  # on average what it is without dropout: 40 draws of standard deviation about 1


def test_a_job_that_diverges_ends_alone(given, tmp_path, caplog):
    given = replace(given, r=[3], lr=[1e-2, 1e30])
    outcomes = sweep(given, progress=False)
    good, bad = outcomes
    assert (good.status, bad.status) == ("done", "diverged") and bad.steps < 6
    assert (
        bad.reason.startswith(f"step {bad.steps + 1}: the loss is")
        and bad.loss is None
        and "the other jobs go on" in caplog.text
    )
    assert not (Path(bad.output) / "adapter_config.json").exists()
    assert len(metrics.read(Path(bad.output))) == bad.steps
    assert_as_alone(Path(good.output), jobs_of(given)[0], tmp_path / "alone")
    assert best(outcomes) == {good.config["eval_data"]: good}
    with pytest.raises(TrainingError, match="every job has diverged; step .* a lower lr may help"):
        sweep(replace(given, lr=[1e30, 2e30], output=tmp_path / "none"), progress=False)


def test_the_held_out_loss_is_evals_and_the_lowest_is_the_best(given, files):
    outcomes = sweep(replace(given, eval_steps=2), progress=False)
    for one in outcomes:
        assert [step for step, _ in one.evaluations] == [2, 4, 6] and one.steps == 6
        model, tokenizer = load_model(str(files["model"]), {"default": Path(one.output)})
        found = evaluate(model, tokenizer, files["eval_data"], batch_size=4, generations=False)
        assert one.loss == one.evaluations[-1][1] == pytest.approx(found.loss, rel=1e-5)
    (chosen,) = best(outcomes).values()
    assert chosen.loss == min(one.loss for one in outcomes)
    content = json.loads((given.output / NAME).read_text())
    assert content["best"] == {str(files["eval_data"]): chosen.name}
    assert [one["name"] for one in content["jobs"]] == [job.name for job in jobs_of(given)]
    assert (given.output / PAGE).is_file()


def test_halving_ends_the_worse_half_at_each_rung(given):
    """Eight jobs of eight steps: 8 to 4 after one, to 2 after two, to 1 after four."""
    given = replace(
        given, lr=[1e-1, 1e-2, 1e-3, 1e-4], max_steps=8, halving=True, lr_scheduler_type="constant", warmup_ratio=0.0
    )
    outcomes = sweep(given, progress=False)
    assert sorted(one.steps for one in outcomes) == [1] * 4 + [2] * 2 + [4, 8]
    for rung, left in ((1, 4), (2, 2), (4, 1)):
        at_rung = {one.name: dict(one.evaluations)[rung] for one in outcomes if rung in dict(one.evaluations)}
        gone_on = {one.name for one in outcomes if one.steps > rung}
        assert gone_on == set(sorted(at_rung, key=at_rung.get)[:left])
    halved = next(one for one in outcomes if one.steps == 4)
    assert (
        halved.status == "halved"
        and halved.reason.startswith("step 4: held-out loss ")
        and halved.reason.endswith("place 2 of 2")
    )
    assert (Path(halved.output) / "adapter_model.safetensors").is_file() and halved.loss == halved.evaluations[-1][1]


def test_halving_wants_as_many_steps_of_each(given, tmp_path):
    (tmp_path / "jobs.yaml").write_text("- {r: 2, batch_size: 4}\n- {r: 3, batch_size: 2}\n")
    given = replace(given, r=None, lr=None, max_steps=None, epochs=1, jobs=tmp_path / "jobs.yaml", halving=True)
    with pytest.raises(ValueError, match="halving: expected jobs of as many steps each, some have 6 and some 12"):
        sweep(given, progress=False)


def test_patience_ends_a_job_that_gets_no_better(given):
    given = replace(given, r=[2], lr=[0.0, 1e-2], eval_steps=1, patience=2)
    still, better = sweep(given, progress=False)
    assert (still.status, still.steps) == ("no longer better", 3) and "2 measurements ago" in still.reason
    assert better.steps > 3


def test_layers_that_cannot_run_in_one_batch_are_refused(given, files):
    with pytest.raises(ValueError, match=r"target_modules: .*lm_head: a sweep trains no adapter of the model's head"):
        sweep(replace(given, target_modules=[["q_proj", "lm_head"]]), progress=False)
    with pytest.raises(ValueError, match="target_modules: .*embed_tokens: a sweep needs layers that are fused, and"):
        sweep(replace(given, target_modules=[["q_proj", "embed_tokens"]]), progress=False)
    with pytest.raises(ValueError, match="no module is called 'nothing'"):
        sweep(replace(given, target_modules=[["nothing"]]), progress=False)


def test_names_reach_training_layers_by_row_and_by_token() -> None:
    """PEFT refuses names in training; each example's gradient is what it is alone."""
    model: Any = get_peft_model(
        llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), adapter_name="one"
    )
    model.add_adapter("two", LoraConfig(r=3, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    fastlora.accelerate(model).train()
    ids = torch.randint(40, (3, 5), generator=torch.Generator().manual_seed(0))
    names = mixed.RowNames(["two", "one", "two"], [5, 5, 5])
    with mixed.training(model.base_model, Fused, names):
        together = model(input_ids=ids).logits
    for i, name in enumerate(["two", "one", "two"]):
        model.set_adapter(name)
        torch.testing.assert_close(together[i : i + 1], model(input_ids=ids[i : i + 1]).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="names are of another batch"), mixed.training(model.base_model, Fused, names):
        model(input_ids=ids[:2])
    with pytest.raises(ValueError, match=r"names=\('c',\): expected adapters of the model"):
        mixed.training(model.base_model, Fused, mixed.RowNames(["c"], [5]))
    plain: Any = get_peft_model(llama(), LoraConfig(target_modules=["embed_tokens"]))
    with pytest.raises(ValueError, match="expected LoRA layers of linear layers alone"):
        mixed.training(plain.base_model, Fused, names)


def test_the_command_prints_a_table_and_names_the_best(given, files, tmp_path):
    words = [
        "sweep",
        "--model",
        str(files["model"]),
        "--data",
        str(files["data"]),
        "--eval-data",
        str(files["eval_data"]),
    ]
    options = [
        "--r",
        "2,4",
        "--lr",
        "1e-2",
        "--target-modules",
        "all-linear;q_proj,v_proj",
        "--max-steps",
        "2",
        "--output",
        str(tmp_path / "out"),
    ]
    ran = CliRunner().invoke(cli.app, [*words, *options])
    assert ran.exit_code == 0, ran.output
    for name in ("r2-lr0.01-t1", "r4-lr0.01-t2", "held-out loss", "is the best by", "sweep.html"):
        assert name in ran.output
    wrong = CliRunner().invoke(cli.app, [*words, *options, "--halving", "--lr", "0.1,x"])
    assert wrong.exit_code == 2 and "--lr '0.1,x': expected numbers with commas" in wrong.output
    held = CliRunner().invoke(cli.app, [*words, *options])
    assert (
        held.exit_code == 2
        and "holds sweep.json, sweep.html, jobs, checkpoints: --resume goes on from there" in held.output
    )
