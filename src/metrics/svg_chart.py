"""Line charts as SVG, inline or in a file: no script, no library, nothing to load, readable at the width of a phone."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 42, 12, 10, 30
MAX_POINTS, MAX_DOTS = 300, 60
HEAD = 22  # room above a chart that is a file, for title and legend
COLOURS = ("#2563eb", "#d9480f", "#0f8a5f")
FILE_STYLE = """text { fill: #5b6570; font: 11px sans-serif } .end { text-anchor: end } .middle { text-anchor: middle }
.grid { stroke: #dfe3e8 } path { fill: none; stroke-width: 1.8; stroke-linejoin: round } """

Point = tuple[float, float | None]


@dataclass(frozen=True)
class Series:
    """``points`` are (x, y); a y of None breaks the line. ``dots`` draws the points, if they are
    few, with their values as tooltips."""

    name: str
    points: Sequence[Point]
    dots: bool = False
    steps: bool = False


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that span ``low`` to ``high``."""
    if not high - low > 1e-9 * max(1.0, abs(low), abs(high)):  # or rounding would give all ticks one value
        margin = (abs(low) if abs(low) > 1e-6 else 1.0) / 2
        low, high = low - margin, high + margin
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((factor * power for factor in (1, 2, 5) if factor * power >= rough * 0.999), 10 * power)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def thin_out(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most ``limit`` points, each the mean of neighbours: a long run stays a small file."""
    if len(points) <= limit:
        return list(points)
    thinned = []
    for index in range(limit):
        bucket = points[index * len(points) // limit : (index + 1) * len(points) // limit]
        values = [y for _, y in bucket if y is not None]
        x = sum(x for x, _ in bucket) / len(bucket)
        thinned.append((x, sum(values) / len(values) if values else None))
    return thinned


def short_number(value: float) -> str:
    """4 digits at most: 0.25, 12.5, 1250, 16k, 3M."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.3g}{unit}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    from_zero: bool = False,
    marks: Sequence[tuple[float, str]] = (),
    format_y: Callable[[float], str] = short_number,
) -> str:
    """A figure of a page with title, legend and one line a series; ``marks`` are vertical lines with a tooltip each.

    The page's style gives the classes their colours. Empty if no point is known.
    """
    drawn = _draw(series, x_label=x_label, from_zero=from_zero, marks=marks, format_y=format_y)
    if not drawn:
        return ""
    legend = "".join(f'<span><i class="k{n}"></i>{escape(one.name)}</span>' for n, one in enumerate(series, 1))
    legend += '<span><i class="kmark"></i>failed rounds</span>' if marks else ""
    picture = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{drawn}</svg>'
    return f"<figure><figcaption>{escape(title)}<small>{legend}</small></figcaption>{picture}</figure>"


def chart_file(title: str, series: Sequence[Series], *, x_label: str) -> str:
    """The same chart as a file of its own, in colours that suit a white page. Empty if no point is known."""
    drawn = _draw(series, x_label=x_label)
    if not drawn:
        return ""
    style = FILE_STYLE + " ".join(f".s{n} {{ stroke: {c} }} .d{n} {{ fill: {c} }}" for n, c in enumerate(COLOURS, 1))
    legend = "".join(
        f'<tspan dx="12" style="fill: {colour}">{escape(one.name)}</tspan>'
        for one, colour in zip(series, COLOURS, strict=False)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 {-HEAD} {WIDTH} {HEIGHT + HEAD}"><style>{style}</style>'
        f'<rect y="{-HEAD}" width="{WIDTH}" height="{HEIGHT + HEAD}" fill="white"/>'
        f'<text x="{LEFT}" y="-6">{escape(title)}{legend}</text>{drawn}</svg>\n'
    )


def _draw(
    series: Sequence[Series],
    *,
    x_label: str,
    from_zero: bool = False,
    marks: Sequence[tuple[float, str]] = (),
    format_y: Callable[[float], str] = short_number,
) -> str:
    """Grid, marks and lines, in a frame of WIDTH by HEIGHT; empty if no point is known."""
    lines = [(number, one, thin_out(one.points)) for number, one in enumerate(series, 1)]
    known = [(x, y) for _, _, points in lines for x, y in points if y is not None]
    if not known:
        return ""
    low_x, high_x = min(x for x, _ in known), max(x for x, _ in known)
    lowest, highest = min(y for _, y in known), max(y for _, y in known)
    ticks = nice_ticks(min(0.0, lowest) if from_zero else lowest, highest)
    ticks_x = [tick for tick in nice_ticks(low_x, high_x) if low_x <= tick <= high_x] or [low_x]

    def at_x(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * ((x - low_x) / (high_x - low_x) if high_x > low_x else 0.5)

    def at_y(y: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (y - ticks[0]) / (ticks[-1] - ticks[0])

    parts = []
    for tick in ticks:
        y = at_y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="end" x="{LEFT - 6}" y="{y + 4:.1f}">{escape(format_y(tick))}</text>')
    for tick in ticks_x:
        where = f'x="{at_x(tick):.1f}" y="{HEIGHT - BOTTOM + 14}"'
        parts.append(f'<text class="middle" {where}>{short_number(tick)}</text>')
    parts.append(f'<text class="end" x="{WIDTH - RIGHT}" y="{HEIGHT - 2}">{escape(x_label)}</text>')
    for x, text in marks:
        if low_x <= x <= high_x:
            where = f'x1="{at_x(x):.1f}" x2="{at_x(x):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"'
            parts.append(f'<line class="mark" {where}><title>{escape(text)}</title></line>')
    for number, one, points in lines:
        parts.append(f'<path class="s{number}" d="{_path(points, at_x, at_y, steps=one.steps)}"/>')
        if (one.dots and len(points) <= MAX_DOTS) or len(points) == 1:
            for x, y in points:
                if y is not None:
                    tip = f"{escape(one.name)}: {escape(format_y(y))} at {short_number(x)}"
                    where = f'cx="{at_x(x):.1f}" cy="{at_y(y):.1f}"'
                    parts.append(f'<circle class="d{number}" {where} r="3"><title>{tip}</title></circle>')
    return "".join(parts)


def _path(points: Sequence[Point], at_x, at_y, *, steps: bool) -> str:
    drawn, pen_down, height = [], False, ""
    for x, y in points:
        if y is None:
            pen_down = False
            continue
        if pen_down and steps:
            drawn.append(f"L{at_x(x):.1f} {height}")
        height = f"{at_y(y):.1f}"
        drawn.append(f"{'L' if pen_down else 'M'}{at_x(x):.1f} {height}")
        pen_down = True
    return "".join(drawn)
