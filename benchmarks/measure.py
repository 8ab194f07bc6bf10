"""One case measured: the times of every rival, peak memory, how near the machine's limit it comes, the errors."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from .cases import TRAINING, Case
from .clock import Run, clock_of, peak_of_call, time_in_turn
from .gate import Error, errors, worst
from .machine import Limits
from .rivals import FASTLORA, Problem, build, implementations


@dataclass(frozen=True)
class Row:
    """One case, pass and implementation of fastlora's. Times are medians; ratios are over the frozen layer alone."""

    case: str
    shape: str
    numbers: str
    pass_: str
    implementation: str
    chosen: bool  # whether `choose` takes this implementation here
    rounds: int
    seconds: dict[str, float]  # rival -> one call; "fastlora" is this row's implementation
    ratios: dict[str, float]  # rival -> time over the frozen layer's
    peak_bytes: dict[str, int | None]  # rival -> memory held at the peak of one call
    flops: int
    bytes: int
    limit: float  # the least time that this machine's own rates allow, over fastlora's time
    bound_by: str  # "flops" or "bytes"
    error: Error

    def loses(self) -> bool:
        """Whether plain PyTorch, through PEFT or compiled, computes the same thing faster."""
        rivals = [time for name, time in self.ratios.items() if name in ("peft", "compiled")]
        return self.ratios[FASTLORA] > min(rivals)


class CaseError(RuntimeError):
    """An implementation is outside its error bound on a case that was to be timed."""


def require_right(what: str, found: Sequence[Error]) -> Error:
    """The worst of the errors; raises CaseError where it is beyond its bound."""
    error = worst(found)
    if not error.within:
        raise CaseError(
            f"{what}: the error of {error.result} is {error.error:.2g}, its bound {error.bound:.2g}: not timed"
        )
    return error


def compile_or_drop(runs: dict[str, Run], notes: list[str], case: str) -> None:
    """Warm the compiled rival up; where torch.compile cannot run here, leave it out and say why."""
    try:
        for turn in range(2):
            runs["compiled"](turn)
    except Exception as error:
        del runs["compiled"]
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        notes.append(f"{case}: torch.compile fails here, its column is empty: {first_line}")


def _runs(problem: Problem, training: bool, names: list[str], with_compile: bool) -> dict[str, Run]:
    """Every rival, and fastlora for each implementation: the chosen first, as the user gets it, the others forced."""
    runs = {
        name: problem.run(name, training)
        for name in problem.rivals
        if name != FASTLORA and (with_compile or name != "compiled")
    }
    runs[names[0]] = problem.run(FASTLORA, training)
    for name in names[1:]:
        runs[name] = problem.run(FASTLORA, training, name)
    return runs


def measure(
    operator: str, case: Case, device: torch.device, limits: Limits, budget: float, with_compile: bool, notes: list[str]
) -> Iterator[Row]:
    """The rows of a case, one for each of its passes and each implementation worth timing; `budget` seconds a pass.

    Raises:
        CaseError: an implementation's error is beyond its bound; nothing of this pass is timed then.
    """
    clock = clock_of(device)
    for pass_ in case.passes:
        training = pass_ == TRAINING
        names = implementations(operator, case, training, device)
        found = {
            name: require_right(f"{operator} {name}, {case.name}, {pass_}", errors(case, training, name, device))
            for name in names
        }
        problem = build(case, training, device)
        runs = _runs(problem, training, names, with_compile)
        if "compiled" in runs:
            compile_or_drop(runs, notes, f"{case.name}, {pass_}")
        times = time_in_turn(runs, clock, budget)
        peaks = {name: peak_of_call(run, device) for name, run in runs.items()}
        work = case.work(training)
        least = {"flops": work.flops / limits.flops[case.dtype], "bytes": work.bytes / limits.bandwidth}
        bound_by = max(least, key=lambda what: least[what])
        for name in names:
            label = {other: other for other in runs if other not in names} | {name: FASTLORA}
            timing = {label[other]: times[other] for other in label}
            yield Row(
                case.name,
                case.shape(training),
                case.number_format(),
                pass_,
                name,
                name == names[0],
                times[name].rounds,
                {rival: one.seconds for rival, one in timing.items()},
                {rival: one.ratio for rival, one in timing.items()},
                {label[other]: peaks[other] for other in label},
                work.flops,
                work.bytes,
                least[bound_by] / times[name].seconds,
                bound_by,
                found[name],
            )
