"""Line charts as inline SVG, drawn here so that the report needs no library and follows the page's colours.

The page's script reads ``data-*`` of each chart and shows the value under the pointer.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 380, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 12, 34  # room for tick labels
Place = Callable[[float], float]  # from a value to a coordinate
MOST_POINTS = 400  # of one line; more cannot be told apart at this width


@dataclass(frozen=True)
class Series:
    """One curve: what the axis says, how values are written, and the points."""

    title: str
    unit: str
    steps: Sequence[float]  # ascending
    values: Sequence[float]
    scale: float = 1.0  # factor on the values, 100 for per cent
    note: str = ""  # one line under the title: what a good curve does
    smooth: bool = False  # draw the running mean over the faint raw line
    from_zero: bool = False  # the axis must show zero
    band: Sequence[tuple[float, float, float]] = ()  # step, lowest and highest that were to be expected


def line_chart(series: Series) -> Markup:
    """One series as ``<svg class="chart">``; a single point becomes a dot."""
    steps, values = thin(series.steps, [value * series.scale for value in series.values])
    x_ticks = ticks(steps[0], steps[-1], 4)
    band = [(step, low * series.scale, high * series.scale) for step, low, high in series.band if step <= steps[-1]]
    low, high = min([*values, *(row[1] for row in band)]), max([*values, *(row[2] for row in band)])
    y_ticks = ticks(min(low, 0.0) if series.from_zero else low, high, 5)
    x_low, x_high = steps[0], max(steps[-1], steps[0] + 1e-9)
    y_low, y_high = min(y_ticks[0], low), max(y_ticks[-1], high)

    def x(step: float) -> float:
        return LEFT + (step - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - y_low) / max(y_high - y_low, 1e-300) * (HEIGHT - TOP - BOTTOM)

    points = [(round(x(step), 1), round(y(value), 1)) for step, value in zip(steps, values, strict=True)]
    parts = [_axes(x_ticks, y_ticks, x, y)]
    if len(band) > 1:
        edge = [(step, low) for step, low, _ in band] + [(step, high) for step, _, high in reversed(band)]
        parts.append(_path([(round(x(step), 1), round(y(value), 1)) for step, value in edge], "band"))
    if series.smooth and len(values) >= 20:
        mean = [(px, round(y(value), 1)) for (px, _), value in zip(points, running_mean(values), strict=True)]
        parts += [_path(points, "raw"), _path(mean, "line")]
    elif len(points) > 1:
        parts.append(_path(points, "line"))
    if len(points) <= 12:
        parts += [f'<circle class="point" cx="{px}" cy="{py}" r="3"/>' for px, py in points]
    hover = [
        [px, py, tick_label(step), value_label(value)]
        for (px, py), step, value in zip(points, steps, values, strict=True)
    ]
    plot = f'x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" height="{HEIGHT - TOP - BOTTOM}"'
    cursor = f'<line y1="{TOP}" y2="{HEIGHT - BOTTOM}"/><circle r="4"/>'
    parts.append(f'<g class="cursor" visibility="hidden">{cursor}</g><rect class="catch" {plot}/>')
    unit = f" {series.unit}" if series.unit else ""
    summary = (
        f"{series.title}: from {value_label(values[0])}{unit} at step {tick_label(steps[0])}"
        f" to {value_label(values[-1])}{unit} at step {tick_label(steps[-1])}"
    )
    return Markup(  # noqa: S704 (all text in it is escaped above or made of numbers)
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(summary)}"'
        f' data-unit="{escape(series.unit)}" data-points="{escape(json.dumps(hover))}">{"".join(parts)}</svg>'
    )


def _axes(x_ticks: list[float], y_ticks: list[float], x: Place, y: Place) -> str:
    parts = []
    for tick in y_ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{y(tick) + 3.5:.1f}" text-anchor="end">{tick_label(tick)}</text>')
    bottom = HEIGHT - BOTTOM
    for tick in x_ticks:
        parts.append(f'<line class="tick" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(f'<text x="{x(tick):.1f}" y="{bottom + 16}" text-anchor="middle">{tick_label(tick)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(f'<text class="axis-name" x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">step</text>')
    return "".join(parts)


def _path(points: list[tuple[float, float]], kind: str) -> str:
    return f'<path class="{kind}" d="M' + "L".join(f"{x} {y}" for x, y in points) + '"/>'


def thin(steps: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most ``MOST_POINTS`` of the points, evenly spaced in number, first and last kept."""
    count = len(steps)
    if count <= MOST_POINTS:
        return list(steps), list(values)
    chosen = [round(i * (count - 1) / (MOST_POINTS - 1)) for i in range(MOST_POINTS)]
    return [steps[i] for i in chosen], [values[i] for i in chosen]


def running_mean(values: Sequence[float]) -> list[float]:
    """Centred mean over a window of a twentieth of the curve; narrower at the ends, so both stay honest."""
    radius = max(1, len(values) // 40)
    means = []
    for i in range(len(values)):
        reach = min(radius, i, len(values) - 1 - i)
        window = values[i - reach : i + reach + 1]
        means.append(sum(window) / len(window))
    return means


def ticks(low: float, high: float, count: int) -> list[float]:
    """About ``count`` multiples of 1, 2, 2.5 or 5 times a power of ten, all within [low, high]."""
    if not high > low:
        reach = abs(low) * 0.1 or 1.0
        low, high = low - reach, high + reach
    rough = (high - low) / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.7)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, last + 1)] or [low]


def tick_label(value: float) -> str:
    """Short: 12k, 1.5M, 0.25, 3e-5."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:g}M"
    if size >= 1e4:
        return f"{value / 1e3:g}k"
    if 0 < size < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}".replace("-", "\u2212")
    return f"{value:g}".replace("-", "\u2212")


def value_label(value: float) -> str:
    """Four significant digits, for the pointer."""
    return f"{value:.4g}".replace("-", "\u2212")
