"""What a call costs the host: small layers called in a row, wall-clock time a call, everything that Python, the dispatcher and the launches take.

On a card the same calls as one CUDA graph stand beside it: what is left once nobody launches. On a CPU the layer's own work is in the figure.
"""

from dataclasses import dataclass

from fastlora.choice.clock import HostClock, Timing

from .card_goals import EAGER, GRAPH, BrokenProcessError, Session, may_be_tried, times_by_mode
from .cases import BOTH, LAUNCHES, TRAINING, LoRALinearCase, MultiLoRACase
from .device import clock_of
from .gate import CaseError
from .rivals import build, choice, rivals_of

CALLS = 50  # in a row
SECONDS = 1.0  # of timing, a case, pass and mode
# What costs the host as the frozen layer does, and what would compile each of 32 copies.
LEFT_OUT = ("packed", "merged", "compiled")


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
    contest = build(case, training, device, rivals_of(case, device, without=LEFT_OUT))
    runs = contest.runs(training, may_be_tried(session, case))
    clocks = {EAGER: HostClock(device)} | ({GRAPH: clock_of(device)} if device.type == "cuda" else {})
    what = f"{case.name}, {pass_}"
    found: dict[str, dict[str, Timing]] = {}
    try:
        found.update(times_by_mode(session, what, case.operator, runs, CALLS, clocks, SECONDS))
    except CaseError as error:  # of a mode that is left out
        session.notes.append(str(error))
    times = ({name: 1e6 * one.seconds for name, one in found.get(mode, {}).items()} for mode in (EAGER, GRAPH))
    default = choice(case, training, device)
    return LaunchRow(case.name, case.shape(training), case.number_format(), pass_, default, *times)


def launch_rows(session: Session) -> list[LaunchRow]:
    """Every case of LAUNCHES in both passes, or those before something broke the process."""
    rows = []
    try:
        for case in LAUNCHES:
            rows += [measure_launch(case, pass_, session) for pass_ in BOTH]
    except BrokenProcessError as error:
        session.notes.append(f"launch: {error}: the process was of no more use")
    return rows
