"""One choice for a whole run: kept in its checkpoints, and the same on every rank and in every process beside it."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import tiny
import torch
from measurements import a_machine, choose, entry, half_times, needs_native, restart, small_weights  # noqa: F401  (fixtures)

from fastlora import checkpoint
from fastlora.choice import problems, table, trial
from fastlora.choice.table import Measurement
from fastlora.train import TrainConfig, train


@needs_native
def test_a_state_keeps_the_choice(machine: Path, timed: list[list[str]], tmp_path: Path) -> None:
    """As a checkpoint keeps it: through torch.save and a strict torch.load, whatever has been measured since."""
    table.keep("cpu", [entry(2.0)], "a test")
    torch.save(table.state(), tmp_path / "state.pt")
    table.keep("cpu", [entry(0.5), entry(0.5, rows=1)], "a test")
    assert (choose(64), choose(1)) == ("cpu", "cpu")
    table.load_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert (choose(64), choose(1)) == ("reference", "reference")
    trial.try_out(small_weights())
    assert timed == [] and table.is_fixed()
    restart()
    assert (choose(64), choose(1)) == ("cpu", "cpu")


@needs_native
def test_a_resumed_run_chooses_as_the_run_before(machine: Path, tmp_path: Path) -> None:
    with tiny.on_cpu():
        options = {
            "model": str(tiny.save_model(tmp_path / "model")),
            "output": tmp_path / "out",
            "r": 2,
            "max_steps": 2,
        }
        config = TrainConfig(data=tiny.save_data(tmp_path / "data.jsonl", 8), save_steps=1, **options)
        table.keep("cpu", tiny_measurements(2.0), "a test")
        before = train(config, progress=False)
        table.keep("cpu", tiny_measurements(0.5), "a test")
        shutil.rmtree(checkpoint.folder(config.output, 2))
        after = train(replace(config, resume=True), progress=False)
    assert before.implementations == after.implementations and before.implementations["reference"] >= 14


def tiny_measurements(ratio: float) -> list[Measurement]:
    """One for every class that a tiny model's trial would look at."""
    todo = problems.listed("cpu", ["lora_linear", "lora_linear_shared"], [torch.float32], ["small"])
    return [entry(ratio, op, one.rows, dropout=one.dropout) for one in todo for op in (one.op, f"{one.op}_backward")]


RANK = """
import sys, torch
from pathlib import Path
from fastlora import operators, ops
from fastlora.choice import measure, problems, table, trial
table.SHIPPED = Path(sys.argv[2], "no", "tables")
rank, ratio = int(sys.argv[1]), float(sys.argv[3])
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
measure.ratios = lambda functions, *_: {name: ratio for name in functions if name != "reference"}
trial.try_out({"lora_linear": [torch.ones(8, 8)]})
print(operators.lora_linear.choose(torch.ones(64, 8), torch.ones(8, 8)).implementation, table.is_fixed())
torch.distributed.destroy_process_group()
"""


def side_by_side(script: str, arguments: list[list[str]], caches: list[Path]) -> list[str]:
    """What processes with these arguments print that run at the same time."""
    running = []
    for own, cache in zip(arguments, caches, strict=True):
        environment = {**os.environ, "FASTLORA_CACHE": str(cache), "PYTHONPATH": os.pathsep.join(sys.path)}
        environment["FASTLORA_IMPL"] = ""
        environment.pop("TRITON_INTERPRET", None)
        command = [sys.executable, "-c", script, *own]
        running.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    outputs = [process.communicate(timeout=120) for process in running]
    assert all(process.returncode == 0 for process in running), outputs
    return [out for out, _ in outputs]


@needs_native
def test_rank_0_decides_for_all(machine: Path, tmp_path: Path) -> None:
    """Each rank would measure something else, on a disk of its own; only rank 0 measures, and both choose as it does."""
    arguments = [[str(rank), str(tmp_path / "meeting"), ratio] for rank, ratio in enumerate(("2.0", "0.5"))]
    caches = [tmp_path / "cache0", tmp_path / "cache1"]
    outputs = side_by_side(RANK, arguments, caches)
    assert [out.split() for out in outputs] == [["reference", "False"], ["reference", "True"]]
    assert caches[0].exists() and not caches[1].exists()


ONE_OF_MANY = """
import sys, time, torch
from pathlib import Path
from fastlora import operators, ops
from fastlora.choice import measure, problems, table, trial
own, other = Path(sys.argv[1]), Path(sys.argv[2])
table.SHIPPED = own.parent / "no" / "tables"
own.touch()
while not other.exists():
    time.sleep(0.01)
measured = []
def ratios(functions, *_):
    time.sleep(0.05)
    measured.append(1)
    return {name: float(sys.argv[3]) for name in functions if name != "reference"}
measure.ratios = ratios
trial.try_out({"lora_linear": [torch.ones(8, 8)]})
print(operators.lora_linear.choose(torch.ones(64, 8), torch.ones(8, 8)).implementation, len(measured))
"""


@needs_native
def test_processes_that_do_not_know_of_one_another_choose_alike(machine: Path, tmp_path: Path) -> None:
    """As under torchrun before torch.distributed begins: whoever is first measures, the others wait and take what it has found."""
    here, there = str(tmp_path / "here"), str(tmp_path / "there")
    outputs = side_by_side(ONE_OF_MANY, [[here, there, "2.0"], [there, here, "0.5"]], [tmp_path / "cache"] * 2)
    (first, one), (second, two) = (out.split() for out in outputs)
    assert first == second and sorted((int(one), int(two)))[0] == 0 < int(one) + int(two)
