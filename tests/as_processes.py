"""What each of several gloo processes runs, and what starts them: each launch imports everything once, and goes through many cases.

As a script: `torchrun ... as_processes.py CASES FOLDER`, which leaves FOLDER/RANK.json, each case's result by its name.
"""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import tiny
import torch
from accelerate import Accelerator
from full_disk import disk_of
from peft import LoraConfig, get_peft_model
from torch import distributed as dist
from transformers import AutoModelForCausalLM

import fastlora
from fastlora.config import TrainConfig
from fastlora.data.examples import read_examples
from fastlora.data.rows import collate, encode
from fastlora.frozen import packed
from fastlora.train import _Run, train

STEPS = 20
LR = 2e-3
PATIENCE = 600  # seconds for a launch


def launch(cases: str, folder: Path, count: int, **more: str) -> subprocess.CompletedProcess[str]:
    """Run the cases of that name on so many processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "FASTLORA_TRIAL": "0", **more}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    return subprocess.run(
        [*command, __file__, cases, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def results(folder: Path, rank: int = 0) -> dict[str, Any]:
    return json.loads((folder / f"{rank}.json").read_text())


# ---- fastlora train

RUNS: dict[str, dict[str, Any]] = {
    "lora": {"gradient_accumulation_steps": 2, "batch_size": 2, "gradient_checkpointing": True},
    "full": {"method": "full"},
    "prompt": {"method": "prompt", "num_virtual_tokens": 4},
    "share_prefix": {"share_prefix": True, "batch_size": 4},
}
OF_MANY = ("lora", "full")
SHARDED: dict[str, dict[str, Any]] = {
    "fsdp": {"gradient_accumulation_steps": 2, "batch_size": 2},
    "fsdp-checkpointing": {"gradient_checkpointing": True},
    "fsdp-prompt": {"method": "prompt", "num_virtual_tokens": 4},
    "fsdp-dora": {"method": "dora", "share_prefix": True},
}


def config(folder: Path, name: str, processes: int = 1, **more: Any) -> TrainConfig:
    """A run by its name, whose steps take the same rows on 1, 2 and 4 processes."""
    ranked = more.get("method", "lora") in ("lora", "dora")
    options: dict[str, Any] = {"lora_dropout": 0.0, "r": 4} if ranked else {}
    options |= {"model": folder / "base", "data": folder / "data.jsonl", "max_steps": STEPS, "seed": 3, "lr": LR}
    options |= {"batch_size": 4, "save_steps": 10, **more}
    options["batch_size"] = options["batch_size"] * 2 // processes
    return TrainConfig(**options, output=folder / f"{name}-{processes}")


def rows() -> list[dict[str, str]]:
    """Some of which begin alike, for more than eight tokens."""
    found = tiny.rows(40, seed=5)
    for row in found[::2]:
        row["prompt"] = f"The horse runs. The dog sleeps. The cat sings. {row['prompt']}"
    return found


def losses(output: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


def said(run: Callable[[], Any]) -> str:
    """What an error says, and its class."""
    try:
        run()
    except (Exception, KeyboardInterrupt) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


# ---- plain loops


def adapted(seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(seed)
    options: Any = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "init_lora_weights": False}
    return get_peft_model(tiny.llama().to(dtype), LoraConfig(target_modules="all-linear", **options)).train()


def batch(step: int, rank: int, count: int) -> dict[str, torch.Tensor]:
    """A process's part of a step's four rows."""
    ids = torch.randint(1, 40, (4, 12), generator=torch.Generator().manual_seed(step))[rank::count]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def fully_sharded(model: Any) -> Any:
    """FSDP2's way: a group a block, and one of what is left; adapters are sharded with their base."""
    from torch.distributed.fsdp import fully_shard

    for block in model.get_base_model().model.layers:
        fully_shard(block)
    return fully_shard(model)


def plain_loop(model: Any, rank: int = 0, count: int = 1, number: int = STEPS) -> list[float]:
    """The losses of a plain loop, the mean over all processes each."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)
    found = []
    for step in range(number):
        loss = model(**batch(step, rank, count)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        shared = loss.detach().clone()
        if count > 1:
            dist.all_reduce(shared)
        found.append(shared.item() / count)
    return found


def whole_adapter(model: Any) -> dict[str, list[float]]:
    """What PEFT's file of a sharded model holds, of which rank 0 alone has all."""
    from peft import get_peft_model_state_dict
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
    found = get_peft_model_state_dict(model, state_dict=get_model_state_dict(model, options=options))
    return {name: value.flatten().tolist() for name, value in found.items()}


def told(model: Any) -> dict[str, list[str]]:
    return {line.name: [line.implementation, line.reason] for line in fastlora.report(model)}


def loaded(base: Path, **distributed: int) -> Any:
    """A model that transformers has spread over the processes, with an adapter where PEFT's works tensor parallel: on layers cut by column."""
    from transformers.distributed import DistributedConfig

    model: Any = AutoModelForCausalLM.from_pretrained(base, distributed_config=DistributedConfig(**distributed))
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, target_modules=BY_COLUMN, init_lora_weights=False)).train()


BY_COLUMN = ["q_proj", "v_proj", "up_proj"]
ACCELERATED: dict[str, bool] = {"frozen": True, "loss": True, "fuse": True}


def layers(folder: Path, rank: int, count: int) -> dict[str, Any]:
    """Accelerated layers under FSDP2, and over weights that are in pieces already."""
    found: dict[str, Any] = {}
    for name, how in (("plain", {}), ("all", ACCELERATED)):
        model = fully_sharded(fastlora.accelerate(adapted(), **how))
        found[f"before {name}"] = told(model)
        found[f"losses {name}"] = plain_loop(model, rank, count)
        found[f"told {name}"] = told(model)
        found[f"adapter {name}"] = whole_adapter(model)
        fastlora.restore(model)
        found[f"restored {name}"] = plain_loop(model, rank, count, 1)
    half = fastlora.accelerate(adapted(dtype=torch.bfloat16), **ACCELERATED)
    found["whole bfloat16"] = plain_loop(half, number=1)  # every process alone
    found["packed"] = [len(packed._by_key)]
    half = fully_sharded(half)
    found["bfloat16"] = plain_loop(half, rank, count)
    found["packed"].append(len(packed._by_key))
    late = fastlora.accelerate(fully_sharded(adapted()), **ACCELERATED)
    found["losses late"] = plain_loop(late, rank, count)
    found["told late"] = told(late)
    for name, how in (("tp", {"tp_size": count}), ("fsdp", {"fsdp_size": count})):
        for accelerated in (False, True):
            model = loaded(folder / "base", **how)
            if accelerated:
                with warnings.catch_warnings(record=True) as warned:
                    fastlora.accelerate(model, **ACCELERATED)
                found[f"warned {name}"] = [str(one.message) for one in warned]
            among = (0, 1) if name == "tp" else (rank, count)  # tensor parallel processes share their rows
            found[f"losses {name} {accelerated}"] = plain_loop(model, *among)
        found[f"told {name}"] = told(model)
    return found


def trainer_losses(folder: Path, count: int) -> list[float]:
    """Of transformers' Trainer with an accelerated model, as one of so many processes."""
    from transformers import AutoTokenizer, Trainer, TrainingArguments

    rows = encode(read_examples(folder / "data.jsonl"), AutoTokenizer.from_pretrained(folder / "base"), 64).rows
    options: Any = {"max_steps": 8, "learning_rate": LR, "logging_steps": 1, "save_strategy": "no", "report_to": []}
    options |= {"use_cpu": True, "disable_tqdm": True, "remove_unused_columns": False, "seed": 0}
    arguments = TrainingArguments(str(folder / "trainer"), per_device_train_batch_size=8 // count, **options)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    trainer = Trainer(
        fastlora.accelerate(model, **ACCELERATED),
        arguments,
        data_collator=lambda batch: collate(batch, 0),
        train_dataset=rows[:32],
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trainer(folder: Path, rank: int, count: int) -> dict[str, Any]:
    return {"losses": trainer_losses(folder, count)}


def trainings(folder: Path, rank: int, count: int) -> dict[str, Any]:
    """`fastlora train` in one group, again and again; on more than two processes those of OF_MANY."""
    for name, more in RUNS.items():
        if count > 2 and name not in OF_MANY:
            continue
        train(config(folder, name, count, **more), progress=False)
    return {}


def sharded(folder: Path, rank: int, count: int) -> dict[str, Any]:
    found = {}
    for name, more in SHARDED.items():
        result = train(config(folder, name, count, **{**more, "fsdp": True}), progress=False)
        found[name] = result.implementations
    return found


def interrupted(folder: Path, rank: int, count: int) -> dict[str, Any]:
    """SIGTERM to the last process alone, after a few steps; then it goes on."""
    stopped = config(folder, "stopped", count, **RUNS["lora"])
    metrics = Path(stopped.output) / "metrics.jsonl"

    def stop() -> None:
        while not metrics.exists() or metrics.read_text().count("\n") < 5:
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    if rank == count - 1:
        thread.start()
    found = {"said": said(lambda: train(stopped, progress=False)), "steps": len(losses(Path(stopped.output)))}
    train(replace(stopped, resume=True), progress=False)
    return found


def failures(folder: Path, rank: int, count: int) -> dict[str, Any]:
    """What goes wrong on one of two processes, and what each says; the last of them ends that process."""
    found = {}

    def run(name: str, **more: Any) -> str:
        return said(lambda: train(config(folder, name, count, **more), progress=False))

    found["exists"] = run("lora")  # of `trainings`, on rank 0's disk
    found["data"] = run("no-data", **{"data": folder / "none.jsonl"} if rank else {})
    with disk_of(10_000) if rank == 0 else nullcontext():
        found["disk"] = run("disk", save_steps=2)
    backward = _Run._backward

    def poisoned(self: Any, rows: Any) -> torch.Tensor:
        return backward(self, rows) * (math.nan if rank and self.step == 2 else 1)

    def dying(self: Any, rows: Any) -> torch.Tensor:
        if rank and self.step == 2:
            raise IndexError("a token that the model has not")
        return backward(self, rows)

    _Run._backward = poisoned
    found["nan"] = run("nan")
    _Run._backward = dying
    found["dies"] = run("dies")
    return found


CASES: dict[str, list[Callable[[Path, int, int], dict[str, Any]]]] = {
    "all": [layers, trainer, trainings, sharded, interrupted, failures],
    "trainings": [trainings],
}


def main(cases: str, folder: Path) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(mixed_precision="no")
    rank, count = accelerator.process_index, accelerator.num_processes
    found = {}
    for case in CASES[cases]:
        found[case.__name__] = case(folder, rank, count)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)  # a group that one has left in the middle of a step is not taken apart


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
