"""All runs of a results.jsonl on one page of HTML: tables beside published figures, and a plot for each metric.

The page is `page.html` with its sections filled in; plots are SVG drawn here, and nothing is loaded from elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from antiphon.evaluate.runs import REPORT, RESULTS, Published, interval, latest, published, read_results, shown
from antiphon.evaluate.scoring import METRICS
from antiphon.evaluate.sets import SETS
from antiphon.files import write_text

WIDTH, LEFT, RIGHT, STEP, TOP = 720, 190, 20, 26, 8  # of a plot, in its own units
TICKS = 5  # about as many lines behind a plot

Row = dict[str, Any]  # a row of a line of results.jsonl


def write_page(out: Path) -> Path:
    """Write OUT/report.html from OUT/results.jsonl, whole or not at all; its path.

    Raises:
        InputError: there are no results, or the file cannot be written.
    """
    lines = read_results(out / RESULTS)
    by_set = latest(lines)
    page = files("antiphon.evaluate").joinpath("page.html").read_text("utf-8")
    counted = f"{len(lines)} run{'s' * (len(lines) != 1)}, {len(by_set)} set{'s' * (len(by_set) != 1)}"
    filled = {
        "intro": f"{counted}; each table has the latest run of each model.",
        "sections": "\n".join(section(name, by_set[name]) for name in SETS if name in by_set),
        "runs": "".join(map(run_row, lines)),
    }
    for name, text in filled.items():
        page = page.replace(f"{{{{{name}}}}}", text)
    write_text(out / REPORT, page)
    return out / REPORT


def section(name: str, runs: dict[str, dict[str, Any]]) -> str:
    """One set: what is measured, a plot and a table of each metric, and what to know about the runs."""
    chosen = SETS[name]
    warnings = [f"{model}: {line['note']}" for model, line in runs.items() if line["note"]]
    metrics = dict.fromkeys(row["metric"] for line in runs.values() for row in line["rows"])
    parts = [f"<section><h2>{escape(chosen.title)}</h2><p class='sub'>{escape(chosen.protocol)}.</p>"]
    parts += [f"<p class='own'><b>{escape(warning)}</b></p>" for warning in warnings]
    for metric in metrics:
        rows = [(model, row) for model, line in runs.items() for row in line["rows"] if row["metric"] == metric]
        parts.append(f"<figure>{plot(name, metric, rows)}{table(name, metric, rows)}</figure>")
    parts += [f"<p class='note'>{escape(note)}</p>" for model, line in runs.items() for note in notes(model, line)]
    return "\n".join([*parts, "</section>"])


def notes(model: str, line: dict[str, Any]) -> Iterator[str]:
    """What limits a run: what was left out or not measured, who listened, and that it was not the whole set."""
    data, judges = line["data"], line["judges"]
    counts = ", ".join(f"{part} {count}" for part, count in data["items"].items())
    yield f"{model}: items taken: {counts}."
    if data["left_out"]:
        yield f"{model}: {data['left_out']} items had no readable sound, such as {'; '.join(data['left_out_first'])}."
    if judges["ear"]:
        voice = f"; all in the voice {judges['voice']}" if judges["voice"] else ""
        yield f"{model}: what was said was written down by {judges['ear']}{voice}."
    yield from (f"{model}: {note}." for note in judges["notes"])


def table(name: str, metric: str, rows: Sequence[tuple[str, Row]]) -> str:
    """Rows of one metric, with the figures that others report."""
    head = "".join(f"<th>{title}</th>" for title in ("part", "model", metric, "95 % interval", "items", "published"))
    lines = []
    for model, row in rows:
        unit = f", {row['unit']}" if row["unit"] else ""
        cells = (
            f"<td>{escape(row['part'])}{unit}</td><td>{escape(model)}</td>"
            f"<td class='own number'>{shown(metric, row['value'])}</td>"
            f"<td class='number'>{interval(metric, row['low'], row['high']) or 'one group alone'}</td>"
            f"<td class='number'>{row['items']} in {row['groups']} groups</td>"
            f"<td>{cited(metric, published().get((name, row['part'], metric), []))}</td>"
        )
        lines.append(f"<tr>{cells}</tr>")
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def cited(metric: str, others: Sequence[Published]) -> str:
    """Published figures of a row, each with its source."""
    by_source: dict[str, list[str]] = {}
    for other in others:
        by_source.setdefault(other.source, []).append(f"{escape(other.model)} {shown(metric, other.value)}")
    return "<br>".join(
        f"{', '.join(figures)} <span class='sub'>({escape(source)})</span>" for source, figures in by_source.items()
    )


def run_row(line: dict[str, Any]) -> str:
    """A run in the list of all."""
    model, data = line["model"], line["data"]
    version = line["versions"]["antiphon"]
    return (
        f"<tr><td>{escape(line['run'])}<br>{line['seconds']:g} s on {escape(line['device'])}, "
        f"Antiphon {escape(str(version))}</td>"
        f"<td>{escape(model['name'])}<br><code>{(model['sha256'] or 'no files')[:16]}</code></td>"
        f"<td>{escape(data['set'])}<br><code>{data['sha256'][:16]}</code></td>"
        f"<td><code>{escape(line['command'])}</code></td></tr>"
    )


# ----------------------------------------------------------------------------------------------------- plots


@dataclass(frozen=True)
class Axis:
    """From 0 to `top`, with a line every `step`: 1, 2 or 5 times a power of ten."""

    top: float
    step: float

    @classmethod
    def to(cls, most: float) -> Axis:
        """The shortest that has room for `most`."""
        rough = max(most, 1e-6) / TICKS
        power = 10 ** math.floor(math.log10(rough))
        step = next(power * times for times in (1, 2, 5, 10) if power * times >= rough * 0.999)
        return cls(step * max(1, math.ceil(most / step - 1e-9)), step)

    def x(self, value: float) -> float:
        """Where a value is, in the plot's units."""
        return LEFT + (WIDTH - LEFT - RIGHT) * value / self.top

    def ticks(self) -> list[float]:
        """The values that have lines."""
        return [number * self.step for number in range(round(self.top / self.step) + 1)]


def plot(name: str, metric: str, rows: Sequence[tuple[str, Row]]) -> str:
    """One line per row: its value with the interval, and rings where others are."""
    others = [published().get((name, row["part"], metric), []) for _, row in rows]
    values = [other.value for some in others for other in some]
    values += [row[key] for _, row in rows for key in ("value", "low", "high") if row[key] is not None]
    axis, bottom = Axis.to(max(values, default=1.0)), TOP + STEP * len(rows)
    marks = [line for tick in axis.ticks() for line in tick_marks(metric, tick, axis.x(tick), bottom)]
    for number, ((model, row), some) in enumerate(zip(rows, others, strict=True)):
        marks.append(line_of(f"{row['part']} · {model}", metric, row, some, TOP + STEP * (number + 0.5), axis))
    better = "less is better" if METRICS[metric].less_is_better else "more is better"
    label = escape(f"{metric}, {better}: filled and with its interval, measured here; rings, published")
    height = bottom + 40
    caption = f"<text class='soft' x='{WIDTH - RIGHT}' y='{bottom + 34}' text-anchor='end'>{label}</text>"
    return f"<svg viewBox='0 0 {WIDTH} {height}' role='img' aria-label='{label}'>{''.join(marks)}{caption}</svg>"


def line_of(title: str, metric: str, row: Row, others: Sequence[Published], y: float, axis: Axis) -> str:
    """The marks of one row at height `y`."""
    short = title if len(title) <= 28 else f"{title[:27]}…"
    marks = [f"<text x='{LEFT - 10}' y='{y + 4:.1f}' text-anchor='end'>{escape(short)}</text>"]
    for other in others:
        named = escape(f"{other.model} {shown(metric, other.value)}")
        marks.append(
            f"<circle class='other' cx='{axis.x(other.value):.1f}' cy='{y:.1f}' r='4'><title>{named}</title></circle>"
        )
    if row["low"] is not None:
        low, high = axis.x(row["low"]), axis.x(row["high"])
        marks.append(f"<line class='own' stroke-width='2' x1='{low:.1f}' y1='{y:.1f}' x2='{high:.1f}' y2='{y:.1f}'/>")
    named = escape(f"{title} {shown(metric, row['value'])}")
    marks.append(
        f"<circle class='own' cx='{axis.x(row['value']):.1f}' cy='{y:.1f}' r='4'><title>{named}</title></circle>"
    )
    return "".join(marks)


def tick_marks(metric: str, value: float, x: float, bottom: float) -> tuple[str, str]:
    """A line behind the plot, and what stands below it."""
    named = f"{100 * value:g} %" if METRICS[metric].percent else f"{value:g}"
    line = f"<line class='grid' x1='{x:.1f}' y1='{TOP}' x2='{x:.1f}' y2='{bottom}'/>"
    return line, f"<text class='soft' x='{x:.1f}' y='{bottom + 16}' text-anchor='middle'>{named}</text>"
