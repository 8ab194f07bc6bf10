"""python -m benchmarks.plot FOLDER: a PNG beside each result file of the goals on a card, and of the cost of a call; and trainer.py's."""

import json
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .rivals import FASTLORA

OURS, THEIRS, TARGET = "#0a7d5a", "#9aa5b1", "#c0392b"


def bars(axes: Any, title: str, unit: str, values: Mapping[str, float], goal: float | None) -> None:
    """One horizontal bar a rival, the shortest first; the goal a line."""
    names = sorted(values, key=lambda name: values[name], reverse=True)
    drawn = axes.barh(
        names, [values[name] for name in names], color=[OURS if FASTLORA in name else THEIRS for name in names]
    )
    axes.bar_label(drawn, fmt="%.3g", padding=2, fontsize=7)
    if goal is not None:
        axes.axvline(goal, color=TARGET, linestyle="--", linewidth=1)
    axes.set_title("\n".join(textwrap.wrap(title, 60)), fontsize=8)
    axes.set_xlabel(unit, fontsize=7)
    axes.tick_params(labelsize=7)
    axes.margins(x=0.2)


def charts(content: Mapping[str, Any]) -> list[tuple[str, str, dict[str, float], float | None]]:
    """(title, unit, value of each rival, goal) of everything in a result file that can be drawn."""
    if "ways" in content:
        ways = content["ways"]
        return [
            ("a training step", "seconds", {way["name"]: way["seconds"] for way in ways}, None),
            ("peak memory", "GB", {way["name"]: way["peak_bytes"] / 1e9 for way in ways}, None),
        ]
    found = []
    for row in content["rows"]:
        values = row["rivals"] | ({} if row["peft"] is None else {"peft": row["peft"]})
        if values:
            found.append((row["what"], row["unit"] or "ratio", {**values, FASTLORA: row["ours"]}, row["goal"]))
    return found


def draw(path: Path) -> Path | None:
    """Draw a result file beside it; None where it holds nothing to draw."""
    from matplotlib.figure import Figure  # without pyplot: no display, no state

    content = json.loads(path.read_text())
    found = charts(content)
    if not found:
        return None
    columns = min(3, len(found))
    lines = -(-len(found) // columns)
    figure = Figure(figsize=(5 * columns, 2.6 * lines), layout="constrained")
    machine = content["machine"]
    figure.suptitle(f"{machine['name']}, {machine['date']}, commit {machine['commit']}", fontsize=10)
    for number, (title, unit, values, goal) in enumerate(found, 1):
        bars(figure.add_subplot(lines, columns, number), title, unit, values, goal)
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=110)
    return target


def main(folder: Path) -> int:
    """Draw what the folder holds of a card; returns the exit code."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print("matplotlib is not installed: no plots")
        return 0
    for path in sorted([*folder.glob("*-goals.json"), *folder.glob("*-launch.json")]):
        if json.loads(path.read_text())["machine"].get("device") == "cuda":
            print(f"drawn: {draw(path)}")
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit("usage: python -m benchmarks.plot FOLDER")
    sys.exit(main(Path(sys.argv[1])))
