"""One case of an operator measured: the times of every rival, peak memory, how near the machine's limit it comes, the errors."""

from collections.abc import Iterator
from dataclasses import dataclass

from .cases import TRAINING, OperatorCase, dtype_name
from .device import peak_of_call
from .gate import Error, require_right
from .machine import bandwidths, product_rate
from .rivals import FASTLORA, build, implementations, rivals_of
from .session import Session

NOT_COMPILED = "torch.compile was left out (--quick)"


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


def measure_operator(session: Session, case: OperatorCase, budget: float, with_compile: bool) -> Iterator[Row]:
    """The rows of a case, one for each of its passes and each implementation worth timing; `budget` seconds a pass.

    Raises:
        CaseError: an implementation's error is beyond its bound; nothing of this pass is timed then.
    """
    device = session.device
    number, flops, bandwidth = dtype_name(case.dtype), product_rate(device, case.dtype), bandwidths(device)["copy"]
    limits = f"this machine's limits: {number} product {flops / 1e9:.0f} GFLOP/s, copy {bandwidth / 1e9:.0f} GB/s"
    for note in [limits, *([] if with_compile else [NOT_COMPILED])]:
        session.notes += [] if note in session.notes else [note]
    for pass_ in case.passes:
        training = pass_ == TRAINING
        chosen, *others = names = implementations(case, training, device)
        what = f"{case.name}, {pass_}"
        worst = {name: require_right(case, training, name, device) for name in names}
        timed = rivals_of(case, device, without=() if with_compile else ("compiled",))
        runs = build(case, training, device, timed).runs(training, others)
        times = session.times(what, case, runs, budget)
        peaks = {name: peak_of_call(runs[name], device) for name in times}
        work = case.work(training)
        least = {"flops": work.flops / flops, "bytes": work.bytes / bandwidth}
        bound_by = max(least, key=lambda what: least[what])
        for name in names:
            own = FASTLORA if name == chosen else name  # as the user gets it, or forced
            if own not in times:
                continue
            shown = {rival: rival for rival in times if rival not in others} | {FASTLORA: own}
            yield Row(
                case.name, case.shape(training), case.number_format(), pass_, name, name == chosen, times[own].rounds,
                {rival: times[run].seconds for rival, run in shown.items()},
                {rival: times[run].ratio for rival, run in shown.items()},
                {rival: peaks[run] for rival, run in shown.items()},
                work.flops, work.bytes, least[bound_by] / times[own].seconds, bound_by, worst[name],
            )  # fmt: skip
