"""An experiment's curves as a PNG."""

import io
from collections.abc import Sequence

from .experiments import Chart


def png(charts: Sequence[Chart], title: str) -> bytes:
    """Beside one another, with a line of where and when above."""
    from matplotlib.figure import Figure  # without pyplot: no display, no state

    figure, image = Figure(figsize=(6.5 * len(charts), 4.5), layout="constrained"), io.BytesIO()
    figure.suptitle(title, fontsize=8)
    for number, chart in enumerate(charts, 1):
        axes = figure.add_subplot(1, len(charts), number)
        for name, line in chart.lines.items():
            axes.plot(*zip(*line, strict=True), marker="o", label=name, markersize=4)
        if chart.is_log:
            axes.set_xscale("log")
        axes.set_title(chart.title, fontsize=10)
        axes.set(xlabel=chart.across, ylabel=chart.up)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(image, dpi=110, format="png")
    return image.getvalue()
