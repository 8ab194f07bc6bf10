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
        for place, (name, line) in enumerate(chart.lines.items()):
            across, up = zip(*line, strict=True)
            if chart.names:
                width = 0.8 / len(chart.lines)
                aside = (place - (len(chart.lines) - 1) / 2) * width
                axes.bar_label(axes.bar([x + aside for x in across], up, width, label=name), fmt="%.3f", fontsize=7)
            else:
                axes.plot(across, up, marker="o", label=name, markersize=4)
        if chart.is_log:
            axes.set_xscale("log")
        if chart.names:
            axes.set_xticks(range(len(chart.names)), chart.names)
        axes.set_title(chart.title, fontsize=10)
        axes.set(xlabel=chart.across, ylabel=chart.up)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(image, dpi=110, format="png")
    return image.getvalue()
