"""What a call costs the host: small layers called in a row, wall-clock time a call, everything that Python, the dispatcher and the launches take.

On a card the same calls as one CUDA graph stand beside it: what is left once nobody launches. On a CPU the layer's own work is in the figure.
"""

from collections.abc import Iterator
from functools import partial

from fastlora.choice.clock import HostClock

from .cases import BOTH, LAUNCHES, TRAINING, Case
from .device import clock_of
from .gate import CaseError
from .goals import Goal
from .rivals import build, choice, rivals_of
from .session import EAGER, GRAPH, Line, Session, seconds_of

CALLS = 50  # in a row
SECONDS = 1.0  # of timing, a case, pass and mode
# What costs the host as the frozen layer does, and what would compile each of 32 copies.
LEFT_OUT = ("packed", "merged", "compiled")


def launch_lines() -> dict[str, Line]:
    """Every case in both passes."""
    return {
        f"{case.name}, {case.number_format()}, {pass_}": partial(launch_line, case=case, pass_=pass_)
        for case in LAUNCHES
        for pass_ in BOTH
    }


def launch_line(session: Session, case: Case, pass_: str) -> Iterator[Goal]:
    """Microseconds a call in each mode; what cannot run, or cannot be captured, is left out with a note."""
    device, training = session.device, pass_ == TRAINING
    contest = build(case, training, device, rivals_of(case, device, without=LEFT_OUT))
    runs = contest.runs(training, session.may_be_tried(case))
    clocks = {EAGER: HostClock(device)} | ({GRAPH: clock_of(device)} if device.type == "cuda" else {})
    what = f"a call of a {case.name}, {pass_}"
    try:
        for mode, times in session.times_by_mode(what, case, runs, CALLS, clocks, SECONDS):
            values = {name: 1e6 * one.seconds for name, one in times.items()}
            default = choice(case, training, device)
            yield Goal.of(f"{what}, {mode}", case, training, "us", values, seconds_of(times), default)
    except CaseError as error:  # of a mode that is left out
        session.notes.append(str(error))
