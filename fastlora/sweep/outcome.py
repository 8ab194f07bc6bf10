"""What has become of a sweep's jobs, which of them is the best, and both as a table."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastlora.sweep.saved import Status


@dataclass(frozen=True)
class Outcome:
    """What has become of a job."""

    name: str
    status: Status
    reason: str  # why it ended before its last step; empty where it did not
    steps: int  # that were done
    all_steps: int
    loss: (
        float | None
    )  # held out, nats a token, after the last step that was done; None where it diverged before one was measured
    train_loss: float | None  # mean over the last ten steps
    evaluations: list[tuple[int, float]]  # step, held-out loss
    tokens: int  # trained on, padding not
    trainable_parameters: int
    r: int
    lr: float
    config: dict[str, Any]  # TrainConfig's, with which `fastlora train` trains the same adapter alone
    output: str  # the adapter's folder


def best(outcomes: Iterable[Outcome]) -> dict[str, Outcome]:
    """By held-out data the job with the lowest loss there, of those that have an adapter."""
    found: dict[str, Outcome] = {}
    for one in outcomes:
        key = one.config["eval_data"]
        if (
            one.loss is not None
            and one.status != "diverged"
            and (key not in found or one.loss < (found[key].loss or 0.0))
        ):
            found[key] = one
    return found


def rows(outcomes: Sequence[Outcome], best: Mapping[str, Outcome]) -> list[dict[str, str]]:
    """A table's rows as text, by column, in the jobs' order; the best have a star."""

    def shown(value: Any, form: str) -> str:
        return "-" if value is None else format(value, form)

    names = {one.name for one in best.values()}
    return [
        {
            "job": f"{one.name}{' *' * (one.name in names)}",
            "r": f"{one.r}",
            "lr": f"{one.lr:g}",
            "held-out loss": shown(one.loss, ".4f"),
            "loss, last ten steps": shown(one.train_loss, ".4f"),
            "steps": f"{one.steps:,} of {one.all_steps:,}",
            "trained": f"{one.trainable_parameters:,}",
            "ended": one.status,
        }
        for one in outcomes
    ]
