"""The report's drawings as inline SVG text: the DAG with its times, training curves, a line from stage to stage.
Only strings in and out; colours come from the page's CSS variables, so they follow light and dark."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

LANES = {
    "data": ("sources", "ingest", "quality", "caption", "verify", "score", "curate"),
    "train": ("components", "t2i", "edit", "joint", "sft", "refl", "dmd2", "export"),
}
"""Fixed places of the well-known steps: data on top, training below it, evaluations and the report below that."""


@dataclasses.dataclass(frozen=True)
class Node:
    """One step of a run. state: done, skipped, failed, stopped, running; seconds of the computation behind it."""

    name: str
    state: str
    seconds: float
    parents: tuple[str, ...] = ()


def clock(seconds: float) -> str:
    """Seconds for people: 0.4 s, 12 s, 3 min 20 s, 1 h 02 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"


def number(value: float) -> str:
    """A measured value with three significant digits; large counts with thin thousands."""
    if value != value or math.isinf(value):
        return "–"
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}".replace(",", "\u202f")
    return f"{value:,.0f}".replace(",", "\u202f") if abs(value) >= 1000 else f"{value:.3g}"


def dag(nodes: Sequence[Node]) -> str:
    """The steps as boxes in three lanes with their real edges (shortcuts left out) and a bar for their share of time."""
    places = _places(nodes)
    width, height, box_w, box_h = 124, 84, 104, 52
    columns, rows = max(x for x, _ in places.values()) + 1, max(y for _, y in places.values()) + 1
    longest = max((node.seconds for node in nodes), default=0.0) or 1.0
    parts = []
    for source, target in _reduced(nodes):
        (x1, y1), (x2, y2) = places[source], places[target]
        if y1 == y2:
            a, b, y = x1 * width + box_w, x2 * width, y1 * height + box_h / 2
            lift = 0 if abs(x2 - x1) == 1 else -34
            parts.append(f'<path class="edge" d="M{a} {y}C{a + 10} {y + lift} {b - 10} {y + lift} {b} {y}"/>')
        else:
            a, b = x1 * width + box_w / 2, x2 * width + box_w / 2
            top, bottom = (y1 * height + box_h, y2 * height) if y2 > y1 else (y1 * height, y2 * height + box_h)
            middle = (top + bottom) / 2
            parts.append(f'<path class="edge" d="M{a} {top}C{a} {middle} {b} {middle} {b} {bottom}"/>')
    for node in nodes:
        x, y = places[node.name]
        bar = max(2.0, (box_w - 16) * node.seconds / longest)
        parts.append(
            f'<g class="node {escape(node.state)}" transform="translate({x * width} {y * height})">'
            f"<title>{escape(node.name)}: {escape(node.state)}, {clock(node.seconds)}</title>"
            f'<rect class="box" width="{box_w}" height="{box_h}" rx="7"/>'
            f'<text class="name" x="8" y="19">{escape(_short(node.name))}</text>'
            f'<text class="time" x="8" y="34">{clock(node.seconds)}{_mark(node.state)}</text>'
            f'<rect class="bar" x="8" y="{box_h - 9}" width="{bar:.1f}" height="3" rx="1.5"/></g>'
        )
    size = f"{columns * width - (width - box_w) + 4} {rows * height - (height - box_h) + 4}"
    return f'<svg class="dag" viewBox="-2 -2 {size}" role="img" aria-label="The steps of this run">{"".join(parts)}</svg>'


def _short(name: str) -> str:
    return name.replace("evaluate_", "eval ")


def _mark(state: str) -> str:
    return {"done": "", "skipped": " · reused", "failed": " · failed", "stopped": " · stopped"}.get(state, f" · {escape(state)}")


def _places(nodes: Sequence[Node]) -> dict[str, tuple[int, int]]:
    """Column and row of each step: known ones in their lane, an evaluation below its stage, others in a lane of their own."""
    names = [node.name for node in nodes]
    lanes = [[name for name in order if name in names] for order in LANES.values()]
    places = {name: (column, row) for row, lane in enumerate(lanes) for column, name in enumerate(lane)}
    rest = [name for name in names if name not in places]
    for name in [item for item in rest if item.removeprefix("evaluate_") in places]:
        places[name] = (places[name.removeprefix("evaluate_")][0], len(lanes))
        rest.remove(name)
    if "report" in rest:
        places["report"] = (max((x for x, _ in places.values()), default=-1) + 1, len(lanes))
        rest.remove("report")
    for column, name in enumerate(rest):
        places[name] = (column, len(lanes) + 1)
    used = {row: index for index, row in enumerate(sorted({row for _, row in places.values()}))}
    return {name: (column, used[row]) for name, (column, row) in places.items()}


def _reduced(nodes: Sequence[Node]) -> list[tuple[str, str]]:
    """Edges parent -> child without those that a longer way already tells (transitive reduction)."""
    parents = {node.name: set(node.parents) & {other.name for other in nodes} for node in nodes}
    above: dict[str, set[str]] = {}

    def ancestors(name: str, seen: frozenset[str] = frozenset()) -> set[str]:
        if name not in above:
            direct = parents[name] - seen
            above[name] = direct | {far for parent in direct for far in ancestors(parent, seen | {name})}
        return above[name]

    kept = []
    for child, direct in parents.items():
        for parent in sorted(direct):
            if not any(parent in ancestors(other) for other in direct - {parent}):
                kept.append((parent, child))
    return kept


def curve(title: str, points: Sequence[tuple[float, float]]) -> str:
    """One metric over training steps: raw values faint, a centred moving mean (a twentieth of the run) on top."""
    points = _thinned([(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)], 400)
    if not points:
        return ""
    reach = len(points) // 40
    windows = [points[max(0, i - reach) : i + reach + 1] for i in range(len(points))]
    means = [(x, sum(y for _, y in window) / len(window)) for (x, _), window in zip(points, windows, strict=True)]
    low, high = _range([y for _, y in points])
    left, right = points[0][0], points[-1][0]

    def path(values: Iterable[tuple[float, float]]) -> str:
        return "M" + "L".join(
            f"{_scale(x, left, right, 4, 236):.1f} {_scale(min(max(y, low), high), low, high, 92, 8):.1f}" for x, y in values
        )

    return (
        f'<figure class="curve"><figcaption>{escape(title)}<b>{number(means[-1][1])}</b></figcaption>'
        f'<svg viewBox="0 0 240 112" role="img" aria-label="{escape(title)}">'
        f'<path class="grid" d="M4 8H236M4 50H236M4 92H236"/><path class="raw" d="{path(points)}"/><path class="mean" d="{path(means)}"/>'
        f'<text x="4" y="106">{number(left)}</text><text x="236" y="106" text-anchor="end">{number(right)}</text>'
        f'<text x="236" y="18" text-anchor="end">{number(high)}</text>'
        f'<text x="4" y="89">{number(low)}</text></svg></figure>'
    )


def stage_lines(stages: Sequence[str], series: Mapping[str, Mapping[str, float]]) -> str:
    """Rates between 0 and 1 from stage to stage, one line per name, each point labelled in per cent."""
    if len(stages) < 2 or not series:
        return ""
    width, height, step = 60 + 92 * (len(stages) - 1) + 60, 210, 92
    parts = [f'<path class="grid" d="M40 {_rate(y)}H{width - 40}"/>' for y in (0, 0.25, 0.5, 0.75, 1)]
    parts += [f'<text x="32" y="{_rate(y) + 4}" text-anchor="end">{y:.0%}</text>' for y in (0, 0.5, 1)]
    for index, stage in enumerate(stages):
        parts.append(f'<text x="{60 + step * index}" y="{height - 6}" text-anchor="middle">{escape(stage.replace("_", " "))}</text>')
    for line, values in enumerate(series.values()):
        dots = [(60 + step * index, _rate(values[stage]), values[stage]) for index, stage in enumerate(stages) if stage in values]
        if not dots:
            continue
        parts.append(f'<path class="line s{line % 4}" d="M{"L".join(f"{x} {y:.1f}" for x, y, _ in dots)}"/>')
        for x, y, value in dots:
            label = y - 9 if line % 2 == 0 else y + 17
            parts.append(f'<circle class="dot s{line % 4}" cx="{x}" cy="{y:.1f}" r="3.6"/>')
            parts.append(f'<text class="value s{line % 4}" x="{x}" y="{label:.1f}" text-anchor="middle">{100 * value:.0f}</text>')
    keys = "".join(f'<span class="key s{line % 4}">{escape(name)}</span>' for line, name in enumerate(series))
    svg = f'<svg class="stages" viewBox="0 0 {width} {height}" role="img" aria-label="Rates after each stage">{"".join(parts)}</svg>'
    return f'<div class="keys">{keys}</div>{svg}'


def rate_grid(stages: Sequence[str], rows: Sequence[tuple[str, Mapping[str, tuple[float, str]]]]) -> str:
    """Rates of many parts (rows) after each stage (columns) as cells that are the fuller the higher the rate. Each row: its name
    and, by stage, the rate and the words shown when the pointer rests on it."""
    if not stages or not rows:
        return ""
    left, cell_w, cell_h, top = 132, 74, 22, 24
    parts = [
        f'<text x="{left + cell_w * (index + 0.5)}" y="14" text-anchor="middle">{escape(stage.replace("_", " "))}</text>'
        for index, stage in enumerate(stages)
    ]
    for line, (name, values) in enumerate(rows):
        y = top + cell_h * line
        parts.append(f'<text x="{left - 8}" y="{y + 15}" text-anchor="end">{escape(name)}</text>')
        for index, stage in enumerate(stages):
            if stage not in values:
                continue
            value, words = values[stage]
            x = left + cell_w * index
            parts.append(
                f'<g class="rate"><title>{escape(words)}</title><rect class="full" x="{x}" y="{y}" width="{cell_w - 3}" height="{cell_h - 3}"/>'
                f'<rect class="part" x="{x}" y="{y}" width="{(cell_w - 3) * value:.1f}" height="{cell_h - 3}"/>'
                f'<text class="value" x="{x + cell_w / 2 - 1}" y="{y + 14}" text-anchor="middle">{100 * value:.0f}</text></g>'
            )
    size = f"{left + cell_w * len(stages)} {top + cell_h * len(rows)}"
    return f'<svg class="rates" viewBox="0 0 {size}" role="img" aria-label="Rates of each part after each stage">{"".join(parts)}</svg>'


def changes(rows: Sequence[tuple[str, float, float, float]], words: Sequence[str], reach: float) -> str:
    """Changes with their intervals as dots and whiskers around zero: (name, value, low, high) a row, `words` beside each. The axis ends
    at `reach` on both sides; what lies beyond is drawn at its end. Full dots: the interval leaves out zero."""
    if not rows:
        return ""
    left, width, line_h, top = 150, 330, 22, 24
    middle, bottom = left + width / 2, top + line_h * len(rows)

    def across(value: float) -> float:
        return _scale(min(max(value, -reach), reach), -reach, reach, left, left + width)

    ticks = (-reach, -reach / 2, 0.0, reach / 2, reach)
    parts = [f'<path class="grid" d="M{across(tick):.1f} {top - 4}V{bottom}"/>' for tick in ticks]
    parts += [f'<text x="{across(tick):.1f}" y="14" text-anchor="middle">{_signed(tick)}</text>' for tick in ticks]
    parts.append(f'<path class="zero" d="M{middle} {top - 4}V{bottom}"/>')
    for index, ((name, value, low, high), beside) in enumerate(zip(rows, words, strict=True)):
        y = top + line_h * (index + 0.5)
        kind = "up" if low > 0 else "down" if high < 0 else "open"
        parts.append(
            f'<g class="change {kind}"><text x="{left - 10}" y="{y + 4}" text-anchor="end">{escape(name)}</text>'
            f'<path d="M{across(low):.1f} {y}H{across(high):.1f}"/><circle cx="{across(value):.1f}" cy="{y}" r="4"/>'
            f'<text class="beside" x="{left + width + 12}" y="{y + 4}">{escape(beside)}</text></g>'
        )
    svg = f'<svg class="changes" viewBox="0 0 {left + width + 300} {bottom + 4}" role="img" aria-label="Changes with their intervals">'
    return f'{svg}{"".join(parts)}</svg>'


def _signed(value: float) -> str:
    return "0" if value == 0 else f"{value:+g}".replace("-", "\u2212")


def _rate(value: float) -> float:
    return _scale(min(max(value, 0.0), 1.0), 0, 1, 178, 18)


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Between the 1st and 99th percentile, so that one spike does not flatten a curve."""
    ordered = sorted(values)
    cut = len(ordered) // 100
    low, high = ordered[cut], ordered[len(ordered) - 1 - cut]
    return (low - 0.5, high + 0.5) if low == high else (low, high)


def _scale(value: float, low: float, high: float, start: float, stop: float) -> float:
    return start if high == low else start + (stop - start) * (value - low) / (high - low)


def _thinned(points: Sequence[tuple[float, float]], count: int) -> list[tuple[float, float]]:
    """At most `count` points: means of equal runs, so that a long curve keeps its shape and stays small."""
    if len(points) <= count:
        return list(points)
    size = math.ceil(len(points) / count)
    runs = [points[start : start + size] for start in range(0, len(points), size)]
    return [(run[-1][0], sum(y for _, y in run) / len(run)) for run in runs]
