"""What a sweep gains: a step of 8 jobs in one batch, against 8 steps one after another, ours and PEFT's, by the size of a job's batch.

A small Llama with random weights, adapters of rank 16 on all linear layers, a row a job. Jobs share the reading of the base's weights, the
launches and the calls, but not its FLOPs: the gain falls as a job's own rows fill the machine, and is told for each size. A step is forward,
backward, clipping, AdamW and the schedule, as `fastlora sweep` and `fastlora train` take it; PEFT's is the same on transformers' model and loss.
One step stands for each of the eight that follow one another: the jobs differ in their rates alone.
"""

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from fastlora.choice.clock import time_in_turn

from .device import clock_of
from .model_steps import NARROW, save_random
from .session import Line, Session
from .step import require_agreement
from .table import render

JOBS, R = 8, 16
TOKENS = (16, 64, 256, 1024)  # of a job's one row
GOAL_TOKENS = 64  # where the goals are
OVER_OURS, OVER_PEFT = 3.0, 6.0  # at least
DTYPES: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
LAYERS = 6
ROWS = 16  # of the file
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # of the first loss, relative
SECONDS = 3.0  # of timing, a line


@dataclass(frozen=True)
class Gain:
    """Of a dtype and a row's length: seconds of a step of all jobs, and of one step alone."""

    numbers: str
    tokens: int
    sweep: float
    alone: float
    peft: float
    over_ours: float  # times the speed of JOBS steps alone, the median over the rounds
    over_peft: float


def sweep_lines(quick: bool) -> dict[str, Line]:
    """A line a dtype and length; quick: the goal's length in float32."""
    cases = [("float32", GOAL_TOKENS)] if quick else [(dtype, tokens) for dtype in DTYPES for tokens in TOKENS]
    return {
        f"{JOBS} jobs, a row of {tokens} tokens each, {dtype}": partial(_line, dtype=dtype, tokens=tokens)
        for dtype, tokens in cases
    }


def _line(session: Session, dtype: Any, tokens: int) -> Iterator[Gain]:
    from fastlora.sweep.jobs import Sweep, jobs_of
    from fastlora.sweep.run import SweepRun

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_random(NARROW, folder / "model", num_hidden_layers=LAYERS, max_position_embeddings=2048)
        data = _write_rows(folder / "rows.jsonl")
        given = Sweep(
            model=folder / "model", data=data, eval_data=data, output=folder / "out", r=[R], lr=[1e-4 * (1 + i) for i in range(JOBS)],
            max_steps=10**6, batch_size=1, max_length=tokens, max_tokens=JOBS * tokens, dtype=dtype,
        )  # fmt: skip
        jobs = jobs_of(given)
        together, alone = (SweepRun(given, its, session.device, None) for its in (jobs, jobs[:1]))
        for run in (together, alone):
            run.claim_output()
        peft = _peft(folder / "model", dtype, session.device, alone)
        losses = {"fastlora": alone.train_step()[0][0], "sweep": together.train_step()[0][0], "PEFT": peft()}
        require_agreement(losses, TOLERANCE[dtype], f"a row of {tokens} tokens, {dtype}")
        runs = {
            "sweep": lambda _: together.train_step(),
            "alone": lambda _: alone.train_step(),
            "peft": lambda _: peft(),
        }
        timed = time_in_turn(runs, clock_of(session.device), SECONDS)
        seconds = {name: one.seconds for name, one in timed.items()}
        gains = JOBS * timed["alone"].ratio, JOBS * timed["peft"].ratio
        yield Gain(dtype, tokens, seconds["sweep"], seconds["alone"], seconds["peft"], *gains)


def _write_rows(path: Path) -> Path:
    """Rows of more tokens than any that is timed, each cut to just as many."""
    from fastlora.demo.tasks import generate

    drawn = iter(generate("summarization", 40 * ROWS, 0))
    rows = ([next(drawn) for _ in range(40)] for _ in range(ROWS))
    texts = [{"prompt": "\n\n".join(one.prompt for one in row), "completion": row[-1].completion} for row in rows]
    path.write_text("".join(json.dumps(one) + "\n" for one in texts))
    return path


def _peft(model: Path, dtype: Any, device: torch.device, ours: Any) -> Any:
    """A step of one job by PEFT and transformers, on the rows of ours; it returns the loss."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base: Any = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    config = LoraConfig(r=R, lora_alpha=2 * R, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(0)
    peer: Any = get_peft_model(base.to(device), config).train()
    trained = [parameter for parameter in peer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    number = 0

    def step() -> float:
        nonlocal number
        loss = peer(**ours.batch(ours.jobs[0].course.step_rows(number))).loss
        number += 1
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def sweep_table(found: Sequence[Gain], notes: Sequence[str]) -> str:
    """For people."""
    heads = (
        "numbers",
        "tokens a job",
        "sweep of 8",
        "one alone",
        "PEFT alone",
        "x ours, 8 in turn",
        "x PEFT's, 8 in turn",
        "goals",
    )
    cells = []
    for one in found:
        goals = "-"
        if one.tokens == GOAL_TOKENS:
            met = [
                "met" if value >= goal else "missed"
                for value, goal in ((one.over_ours, OVER_OURS), (one.over_peft, OVER_PEFT))
            ]
            goals = f"{OVER_OURS:g}: {met[0]}, {OVER_PEFT:g}: {met[1]}"
        times = [f"{1e3 * value:.1f} ms" for value in (one.sweep, one.alone, one.peft)]
        cells.append((one.numbers, str(one.tokens), *times, f"{one.over_ours:.2f}", f"{one.over_peft:.2f}", goals))
    legend = (
        f"sweep: a step of {JOBS} jobs of rank {R} in one batch; alone: a step of one of them, of which {JOBS} follow one another;"
        " medians timed in turn"
    )
    return "\n".join([legend, "", render(heads, cells), "", *notes])
