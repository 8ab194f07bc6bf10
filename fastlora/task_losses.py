"""What each of several tasks had of a step: its rows and its mean loss, from the loss that is trained on, without another forward."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastlora.data.rows import Row

LAST = 10  # steps a task's loss in the summary is the mean of


class TaskLosses:
    """Sums of the labelled tokens' losses by task, over a step's batches; of data that is one task nothing is kept.

    Args:
        names: the rows' tasks.

    Attributes:
        names: each once, in order; none where there is one task only.
        sums: [tasks], float32: of this process's batches since `begin`.
        shared: the same over all processes, once they have told one another.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        several = list(dict.fromkeys(names))
        self.names = several if len(several) > 1 else []
        self._device = device
        self.shared: list[float] = []
        self._number = {name: number for number, name in enumerate(self.names)}
        self.begin()

    def begin(self) -> None:
        """A step begins."""
        self.sums = torch.zeros(len(self.names), device=self._device)

    def room(self, rows: Sequence[Row]) -> Tensor | None:
        """Where LanguageModelLoss writes a batch's losses to; None where nobody asks for them."""
        if not self.names:
            return None
        return torch.zeros(sum(row.labelled for row in rows), device=self._device)

    def add(self, losses: Tensor | None, rows: Sequence[Row]) -> None:
        """A batch's, as `room` has been filled: row after row."""
        if losses is None:
            return
        counted = [row for row in rows if row.labelled]
        for row, its in zip(counted, losses.split([row.labelled for row in counted]), strict=True):
            self.sums[self._number[row.task]] += its.sum()

    def record(self, rows: Sequence[Row]) -> dict[str, Any]:
        """What metrics.jsonl says of a step: `tasks`, with each task's rows and mean loss a labelled token.

        Args:
            rows: the step's, of all processes.
        """
        tokens: Counter[str] = Counter()
        for row in rows:
            tokens[row.task] += row.labelled
        counts = Counter(row.task for row in rows)
        tasks = {
            name: {"rows": counts[name], "loss": total / tokens[name]}
            for name, total in zip(self.names, self.shared, strict=True)
            if tokens[name]
        }
        return {"tasks": tasks} if self.names else {}


def summed_up(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """What the summary says of each task: the rows of all steps, and the mean of its last ten steps' losses."""
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        for name, its in record.get("tasks", {}).items():
            task = found.setdefault(name, {"rows": 0, "losses": []})
            task["rows"] += its["rows"]
            task["losses"].append(its["loss"])
    return {
        name: {"rows": task["rows"], "loss": sum(task["losses"][-LAST:]) / len(task["losses"][-LAST:])}
        for name, task in sorted(found.items())
    }
