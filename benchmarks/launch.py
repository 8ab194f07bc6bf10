"""What a call costs the host: small layers called in a row, wall-clock time a call, everything that Python, the dispatcher and the launches take.

On a card the same calls as one CUDA graph stand beside it: what is left once nobody launches. On a CPU the layer's own work is in the figure.
"""

from dataclasses import dataclass
from typing import Any

import torch

from .card_goals import GRAPH, BrokenProcessError, Session, all_runs, may_be_tried
from .cases import BOTH, LAUNCHES, TRAINING, LoRALinearCase, MultiLoRACase
from .clock import (
    WARM_UP_CALLS,
    HostClock,
    Run,
    captured,
    clock_of,
    graph_pool,
    require_no_wait,
    sweep,
    time_in_turn,
)
from .rivals import build, choice

CALLS = 50  # in a row
SECONDS = 1.0  # of timing, a case and pass
LEFT_OUT = {
    "packed",
    "merged",
    "compiled",
}  # what costs the host as the frozen layer does, and what would compile each of 32 copies


@dataclass(frozen=True)
class LaunchRow:
    case: str
    shape: str
    numbers: str
    pass_: str
    implementation: str  # what fastlora runs by default
    microseconds: dict[str, float]  # of a call, by rival
    graph_microseconds: dict[str, float]  # of a call in a replayed CUDA graph; empty on a CPU


def measure_launch(case: LoRALinearCase | MultiLoRACase, pass_: str, session: Session) -> LaunchRow:
    """One case and pass; what cannot run, or cannot be captured, is left out with a note."""
    device, training = session.device, pass_ == TRAINING
    operator = "lora_linear" if isinstance(case, LoRALinearCase) else "multi_lora"
    problem = build(case, training, device)
    runs = all_runs(problem, training, may_be_tried(session, operator))
    for name in LEFT_OUT & runs.keys():
        del runs[name]
    what = f"{case.name}, {pass_}"

    ready = {name: session.attempt(what, name, _warm, run) for name, run in runs.items()}
    rows = {name: run for name, run in ready.items() if run is not None}
    times = time_in_turn(rows, HostClock(device), SECONDS)
    graphs: dict[str, Run] = {}
    if device.type == "cuda":
        pool = graph_pool(device)
        for name, run in rows.items():
            graph = session.attempt(f"{what}, {GRAPH}", name, _capture, run, device, pool, mode=GRAPH)
            graphs |= {} if graph is None else {name: graph}
    replays = time_in_turn(graphs, clock_of(device), SECONDS) if graphs else {}
    return LaunchRow(
        case.name,
        case.shape(training),
        case.number_format(),
        pass_,
        choice(case, training, device),
        {name: 1e6 * one.seconds / CALLS for name, one in times.items()},
        {name: 1e6 * one.seconds / CALLS for name, one in replays.items()},
    )


def _warm(run: Run) -> Run:
    """CALLS of the run in a row."""
    for turn in range(WARM_UP_CALLS):
        run(turn)
    return sweep(run, CALLS)


def _capture(run: Run, device: torch.device, pool: Any) -> Run:
    require_no_wait(run, device)
    return captured(run, device, pool)


def launch_rows(session: Session) -> list[LaunchRow]:
    """Every case of LAUNCHES in both passes, or those before something broke the process."""
    rows = []
    try:
        for case in LAUNCHES:
            rows += [measure_launch(case, pass_, session) for pass_ in BOTH]
    except BrokenProcessError as error:
        session.notes.append(f"launch: {error}: the process was of no more use")
    return rows
