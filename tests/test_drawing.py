"""Curves as SVG: within their plot, thinned to their last point, readable in light and in dark."""

import re
from xml.etree import ElementTree

import pytest

from fastlora import drawing


def points_of(svg: str) -> list[list[tuple[float, float]]]:
    lines = ElementTree.fromstring(svg).findall("polyline")
    return [[tuple(map(float, point.split(","))) for point in line.get("points").split()] for line in lines]


@pytest.mark.parametrize("logarithmic", [True, False])
@pytest.mark.parametrize(
    "series",
    [
        {"a": [(1, 3.0), (2, 1.0), (3, 2.0)], "b": [(3, 0.5)]},
        {"a": [(1, 0.0), (2, 0.0)]},
        {"a": [(0, 1e-12)]},
        {"a": [(1, 1e9), (10**6, 1e-9)]},
    ],
)
def test_points_stay_within_the_plot(series, logarithmic):
    for line in points_of(drawing.curves(series, logarithmic=logarithmic)):
        for x, y in line:
            assert (
                drawing.LEFT <= x <= drawing.WIDTH - drawing.RIGHT and 9.9 <= y <= drawing.HEIGHT - drawing.BELOW + 0.1
            )


def test_higher_is_higher_and_later_is_further_right():
    ((low, high),) = points_of(drawing.curves({"a": [(1, 1.0), (2, 2.0)]}))
    assert low[0] < high[0] and low[1] > high[1]
    ((half, whole),) = points_of(drawing.curves({"a": [(5, 0.25), (10, 0.5)]}, logarithmic=False))
    assert half[0] - drawing.LEFT == pytest.approx((whole[0] - drawing.LEFT) / 2, abs=0.1)


def test_the_foremost_lies_over_the_others_and_keeps_its_place_among_the_names():
    svg = ElementTree.fromstring(drawing.curves({"a": [(1, 1.0)], "b": [(1, 2.0)]}, "a"))
    assert [line.find("title").text for line in svg.findall("polyline")] == ["b", "a"]
    names = [one.text for one in svg.findall("text") if one.get("fill")]
    assert names == ["a", "b"] and svg.findall("polyline")[-1].get("stroke") == drawing.BEST


def test_nothing_to_draw_is_said():
    assert drawing.curves({}) == drawing.curves({"a": []}) == "<p>None.</p>"


def test_long_curves_are_thinned_to_their_last_point():
    points = drawing.running_mean([(step, 1.0) for step in range(1, 10_003)])
    assert len(points) <= drawing.POINTS + 1 and points[0] == (1, 1.0) and points[-1] == (10_002, 1.0)
    assert drawing.running_mean([(1, 2.0), (2, 1.0)]) == [(1, 2.0), (2, 1.9)]
    assert drawing.running_mean([]) == drawing.thinned([]) == []


def luminance(colour: str) -> float:
    """WCAG's, of #rgb or #rrggbb."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_words_and_lines_are_seen_in_light_and_in_dark():
    light, dark = (dict(re.findall(r"--(\w+): (#\w+)", part)) for part in drawing.STYLE.split("@media"))
    assert light.keys() == dark.keys()
    for theme in (light, dark):
        for ink in ("ink", "soft"):
            assert min(contrast(theme[ink], theme[ground]) for ground in ("paper", "quiet")) >= 4.5, ink
        for line in (*drawing.LINES, drawing.BEST):
            assert contrast(line, theme["paper"]) >= 2.5, line
    assert set(re.findall(r"var\(--(\w+)\)", drawing.STYLE)) == light.keys()


def test_text_is_escaped_and_without_what_no_page_may_hold():
    assert drawing.safe("<a b='\"'>&\x00\ud800") == "&lt;a b=&#x27;&quot;&#x27;&gt;&amp;\ufffd\ufffd"
    assert "<td>&lt;b&gt;</td>" in drawing.table([("<b>", 1)], ("<h>",)) and "<h>" not in drawing.table([], ("<h>",))
