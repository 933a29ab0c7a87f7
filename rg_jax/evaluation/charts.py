"""Charts as inline SVG: curves of a run, and bars with the whiskers of their intervals.

Each function returns one `<svg>` element as text, which needs no script and no network. Colours
come from the page's CSS variables, so a chart follows the page's light or dark dress.
"""

import html
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

from rg_jax.evaluation.page_assets import STYLE

COLOURS = ("--c0", "--c1", "--c2", "--c3", "--c4", "--c5", "--c6", "--c7")
MOST_POINTS = 300

Number = int | float
Point = tuple[Number, Number]


def ticks(low: Number, high: Number, about: int = 5) -> list[float]:
    """Round numbers that span [low, high], about as many as asked for."""
    if not high > low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / max(about, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [k * step for k in range(first, last + 1)]


def short(value: Number) -> str:
    """A number for an axis: 0.05, 12, 1.5k, 2e-05."""
    if value == 0:
        return "0"
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    if abs(value) < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-").replace(".0e", "e")
    return f"{value:.4g}"


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most `most` points: neighbours are averaged, the last point is kept as it is."""
    if len(points) <= most:
        return list(points)
    out = []
    size = len(points) / (most - 1)
    for k in range(most - 1):
        part = points[round(k * size) : max(round((k + 1) * size), round(k * size) + 1)]
        if part:
            xs, ys = zip(*part, strict=True)
            out.append((sum(xs) / len(xs), sum(ys) / len(ys)))
    return [*out, points[-1]]


def line_chart(
    title: str,
    series: Mapping[str, Sequence[Point]],
    *,
    percent: bool = False,
    from_zero: bool = True,
    width: int = 370,
    height: int = 250,
) -> str:
    """Curves over the training step, one colour per series, with a legend where there are several.

    Points that are not finite are left out and show as a gap. Without any point: an empty string.
    """
    scale = 100.0 if percent else 1.0
    series = {
        name: thin([(x, y * scale) for x, y in points if math.isfinite(y)])
        for name, points in series.items()
    }
    series = {name: points for name, points in series.items() if points}
    if not series:
        return ""
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    y_ticks = ticks(min(0.0, *ys) if from_zero else min(ys), max(ys))
    x_low, x_high = min(0.0, *xs), max(xs)
    x_ticks = [t for t in ticks(x_low, x_high, 4) if x_low <= t <= x_high * (1 + 1e-9)]
    x_high = x_high if x_high > x_low else x_low + 1
    legend_rows = _legend_rows(list(series), width - 4) if len(series) > 1 else []
    left, right, top = 52, width - 20, 34 + 17 * len(legend_rows)
    bottom = height - 38

    def at(x: Number, y: Number) -> tuple[float, float]:
        share = (y - y_ticks[0]) / ((y_ticks[-1] - y_ticks[0]) or 1)
        return left + (x - x_low) / (x_high - x_low) * (right - left), bottom - share * (
            bottom - top
        )

    parts = [f'<text class="t" x="4" y="16">{html.escape(title)}</text>']
    for row, names in enumerate(legend_rows):
        x = 4
        for name in names:
            colour = COLOURS[list(series).index(name) % len(COLOURS)]
            y = 33 + 17 * row
            parts.append(
                f'<line x1="{x}" x2="{x + 14}" y1="{y - 4}" y2="{y - 4}" '
                f'stroke="var({colour})" stroke-width="2.5"/>'
                f'<text class="l" x="{x + 19}" y="{y}">{html.escape(name)}</text>'
            )
            x += _legend_width(name)
    for tick in y_ticks:
        _, y = at(x_low, tick)
        parts.append(
            f'<line class="g" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="n" x="{left - 7}" y="{y + 3.5:.1f}" text-anchor="end">'
            f"{short(tick)}</text>"
        )
    for tick in x_ticks:
        x, _ = at(tick, y_ticks[0])
        parts.append(
            f'<text class="n" x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">'
            f"{short(tick)}</text>"
        )
    parts.append(f'<text class="n" x="{right}" y="{bottom + 33}" text-anchor="end">step</text>')
    for k, (name, points) in enumerate(series.items()):
        colour = COLOURS[k % len(COLOURS)]
        placed = [at(x, y) for x, y in points]
        path = "M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in placed)
        parts.append(
            f'<path d="{path}" fill="none" stroke="var({colour})" stroke-width="1.8" '
            f'stroke-linejoin="round"><title>{html.escape(name)}</title></path>'
        )
        marked = placed if len(placed) <= 25 else placed[-1:]
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.4" fill="var({colour})"/>' for x, y in marked
        ]
    last = "; ".join(f"{name} ends at {short(points[-1][1])}" for name, points in series.items())
    return _svg(width, height + 2, f"{title}: {last}", parts)


def bar_chart(
    rows: Sequence[tuple[str, Mapping[str, Number | None], bool]], *, width: int = 760
) -> str:
    """Horizontal bars with 95 % whiskers; a row is (name, {"mean","low","high"}, is it ours).

    Values are shares and shown times 100. Rows without a mean are left out.
    """
    rows = [row for row in rows if row[1] and row[1].get("mean") is not None]
    if not rows:
        return ""
    left, right, high = 194, width - 150, 34
    top_value = max(100 * r[1].get("high", r[1]["mean"]) for r in rows)
    axis = ticks(0.0, min(max(top_value, 1.0), 100.0), 5)
    bottom = 8 + high * len(rows)

    def at(value: Number) -> float:
        return left + value / axis[-1] * (right - left)

    parts = []
    for tick in axis:
        parts.append(
            f'<line class="g" x1="{at(tick):.1f}" x2="{at(tick):.1f}" y1="4" y2="{bottom}"/>'
            f'<text class="n" x="{at(tick):.1f}" y="{bottom + 16}" text-anchor="middle">'
            f"{short(tick)}</text>"
        )
    spoken = []
    for k, (name, metric, ours) in enumerate(rows):
        mean = 100 * metric["mean"]
        low, upper = (100 * metric.get(end, metric["mean"]) for end in ("low", "high"))
        middle = 8 + high * k + high / 2 - 2
        parts.append(
            f'<text class="b" x="{left - 12}" y="{middle + 4}" text-anchor="end">'
            f"{html.escape(name)}</text>"
            f'<rect x="{left}" y="{middle - 9}" width="{max(at(mean) - left, 0.5):.1f}" '
            f'height="18" rx="2" fill="var({"--ours" if ours else "--bar"})"/>'
            f'<path class="w" d="M{at(low):.1f} {middle} H{at(upper):.1f} '
            f'M{at(low):.1f} {middle - 4.5} v9 M{at(upper):.1f} {middle - 4.5} v9"/>'
            f'<text class="b v" x="{right + 14}" y="{middle + 4}">{mean:.1f}'
            f'<tspan class="n" dx="6">{low:.1f} to {upper:.1f}</tspan></text>'
        )
        spoken.append(f"{name} {mean:.1f} % ({low:.1f} to {upper:.1f})")
    return _svg(width, bottom + 24, "; ".join(spoken), parts)


def histogram(
    title: str,
    bars: Sequence[tuple[str, Number]],
    *,
    unit: str = "",
    width: int = 370,
    height: int = 210,
) -> str:
    """Upright bars: how many of each kind, in their order. `unit` stands below at the right.

    Every bar has its label and count as a tooltip; below it labels are thinned to what finds room.
    Without any bar: an empty string.
    """
    if not bars:
        return ""
    left, right, top, bottom = 44, width - 8, 34, height - 38
    y_ticks = ticks(0.0, max(1, *(count for _, count in bars)), 4)
    step = (right - left) / len(bars)
    wide = min(0.84 * step, 56)
    widest = max(len(label) for label, _ in bars) * 6.2 + 8
    every = max(1, math.ceil(widest / step))
    parts = [f'<text class="t" x="4" y="16">{html.escape(title)}</text>']
    for tick in y_ticks:
        y = bottom - tick / y_ticks[-1] * (bottom - top)
        parts.append(
            f'<line class="g" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="n" x="{left - 7}" y="{y + 3.5:.1f}" text-anchor="end">'
            f"{short(tick)}</text>"
        )
    for k, (label, count) in enumerate(bars):
        x, high = left + k * step, count / y_ticks[-1] * (bottom - top)
        parts.append(
            f'<rect x="{x + (step - wide) / 2:.1f}" y="{bottom - high:.1f}" width="{wide:.1f}" '
            f'height="{high:.1f}" fill="var(--ours)"><title>{html.escape(label)}: {count:,}'
            "</title></rect>"
        )
        if k % every == 0:
            parts.append(
                f'<text class="n" x="{x + step / 2:.1f}" y="{bottom + 17}" text-anchor="middle">'
                f"{html.escape(label)}</text>"
            )
    if unit:
        parts.append(
            f'<text class="n" x="{right}" y="{bottom + 33}" text-anchor="end">'
            f"{html.escape(unit)}</text>"
        )
    spoken = ", ".join(f"{label} {count}" for label, count in bars)
    return _svg(width, height, f"{title}: {spoken}", parts)


def scatter_chart(
    title: str,
    points: Sequence[Point],
    x_name: str,
    y_name: str,
    *,
    side: int = 420,
) -> str:
    """Points on equal axes with the line on which both agree; where several lie on one spot the
    dot's area grows with their number.

    Points that are not finite are left out. Without any point: an empty string.
    """
    spots = Counter((float(x), float(y)) for x, y in points if math.isfinite(x + y))
    if not spots:
        return ""
    axis = ticks(min(min(s) for s in spots), max(max(s) for s in spots))
    left, right, top, bottom = 52, side - 14, 34, side - 44
    span = axis[-1] - axis[0]

    def at(x: Number, y: Number) -> tuple[float, float]:
        across, up = (x - axis[0]) / span, (y - axis[0]) / span
        return left + across * (right - left), bottom - up * (bottom - top)

    parts = [f'<text class="t" x="4" y="16">{html.escape(title)}</text>']
    for tick in axis:
        (x, y), (low_x, low_y) = at(tick, tick), at(axis[0], axis[0])
        parts.append(
            f'<path class="g" d="M{low_x:.1f} {y:.1f}H{right}M{x:.1f} {low_y:.1f}V{top}"/>'
            f'<text class="n" x="{left - 7}" y="{y + 3.5:.1f}" text-anchor="end">{short(tick)}'
            f'</text><text class="n" x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">'
            f"{short(tick)}</text>"
        )
    (x0, y0), (x1, y1) = at(axis[0], axis[0]), at(axis[-1], axis[-1])
    parts.append(f'<path class="w" stroke-dasharray="4 4" d="M{x0} {y0}L{x1} {y1}"/>')
    most = max(spots.values())
    for (x, y), count in sorted(spots.items(), key=lambda item: -item[1]):
        px, py = at(x, y)
        parts.append(
            f'<circle cx="{px:.1f}" cy="{py:.1f}" r="{3 + 9 * math.sqrt(count / most):.1f}" '
            f'fill="var(--ours)" fill-opacity="0.55"><title>{count:,}</title></circle>'
        )
    parts.append(
        f'<text class="n" x="{right}" y="{bottom + 35}" text-anchor="end">{html.escape(x_name)}'
        f'</text><text class="n" x="{left}" y="{top - 6}">{html.escape(y_name)}</text>'
    )
    return _svg(side, side, f"{title}, {spots.total():,} points", parts)


def standalone(svg: str) -> str:
    """A chart as the text of an SVG file, with the colours that it has on a light page."""
    root = "".join(re.findall(r"(--[\w]+:#[0-9a-f]+;)", STYLE.split("@media")[0]))
    rules = "".join(re.findall(r"svg \.?\w[^{}]*\{[^}]*\}", STYLE))
    style = f"<style>svg {{ {root} background:#fff; font-family:sans-serif; }} {rules}</style>"
    head, rest = svg.split(">", 1)
    return f'{head} xmlns="http://www.w3.org/2000/svg">{style}{rest}\n'


def _legend_width(name: str) -> float:
    return 34 + 6.2 * len(name)


def _legend_rows(names: Sequence[str], room: Number) -> list[list[str]]:
    rows: list[list[str]] = [[]]
    used = 0.0
    for name in names:
        if rows[-1] and used + _legend_width(name) > room:
            rows.append([])
            used = 0.0
        rows[-1].append(name)
        used += _legend_width(name)
    return rows


def _svg(width: Number, height: Number, spoken: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" width="{width:g}" role="img" '
        f'aria-label="{html.escape(spoken, quote=True)}">{"".join(parts)}</svg>'
    )
