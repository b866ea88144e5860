"""The page about a labelling job: hours in and out at every step, histograms, examples to listen to, and the cost.

Everything is in one file: pictures as SVG, sound as FLAC.
"""

from __future__ import annotations

import base64
import io
from collections import Counter, defaultdict
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import soundfile
from jinja2 import Environment, select_autoescape

from antiphon.error_rates import normalize_text
from antiphon.files import write_text
from antiphon.scale.gather import DUPLICATE, REJECTED, Figures, Judged
from antiphon.scale.label import Job
from antiphon.scale.segments import Usage, shard_of
from antiphon.serve.vad import RATE

REPORT = "report.html"
ALL = 20_000_000  # hours that the estimate is for: what AuT saw
KEPT_EXAMPLES, FAULTY_EXAMPLES = 8, 2  # to listen to: of what is kept, and of each fault
REASONS = 20  # that are listed
FAULTS = {
    "empty": "no letter in the text",
    "repetition": "the text goes round in circles",
    "language": "no language, or none that was asked for",
    "script": "letters of another language's script",
    "rate": "too many or too few characters per second",
    "unsure": "teachers disagree, or the teacher is not sure",
    DUPLICATE: "the same sound as another segment",
}


def write_report(job: Job, figures: Figures) -> None:
    """Write the page, whole or not at all."""
    page = files("antiphon.scale").joinpath("report.html").read_text("utf-8")
    template = Environment(autoescape=select_autoescape(default_for_string=True)).from_string(page)
    write_text(job.out / REPORT, template.render(report_data(job, figures)))


def report_data(job: Job, figures: Figures) -> dict[str, Any]:
    """What the page shows."""
    languages = defaultdict[str, float](float)
    for one in figures.kept:
        languages[one.language] += one.seconds / 3600
    reasons = Counter(row["reason"] for row in figures.quarantine)
    examples = [{**vars(one), "seconds": one.seconds, "sound": _sound(job, one)} for one in examples_of(figures.judged)]
    return {
        "teachers": [at.name for at in job.teachers],
        "steps": steps_of(figures),
        "costs": [cost for step, usage in figures.usage.items() if (cost := cost_of(step, usage))],
        "all": ALL,
        "languages": sorted(languages.items(), key=lambda one: -one[1]),
        "reasons": reasons.most_common(REASONS),
        "quarantined": len(figures.quarantine),
        "pictures": pictures_of(figures),
        "examples": examples,
        "faults": FAULTS,
    }


def steps_of(figures: Figures) -> list[tuple[str, int, float]]:
    """Name, pieces and hours that are left after every step."""
    unread = sum("teacher" not in row for row in figures.quarantine)
    failed = len({row["name"] for row in figures.quarantine if "teacher" in row})
    steps = [
        ("recordings that were found", figures.recordings, figures.read),
        ("that could be read", figures.recordings - unread, figures.read),
        ("segments of speech", len(figures.judged) + failed, figures.speech),
        ("that every teacher wrote down", len(figures.judged), figures.hours()),
    ]
    count, hours = steps[-1][1:]
    for fault in REJECTED:
        some = sum(one.fault == fault for one in figures.judged)
        count, hours = count - some, hours - figures.hours(fault)
        if some:
            steps.append((f"without those: {FAULTS[fault]}", count, hours))
    return [*steps, ("kept", len(figures.kept), figures.hours(""))]


def cost_of(step: str, usage: Sequence[Usage]) -> dict[str, Any]:
    """What a step took, by hour of recording, and what it would take for `ALL`; nothing where it was not run."""
    is_gpu = any(one.gpu for one in usage)
    spent = sum(one.wall if is_gpu else one.core for one in usage) / 3600
    heard = sum(one.heard for one in usage) / 3600
    if not spent or not heard:
        return {}
    unit = "GPU" if is_gpu else "core"
    where = ", ".join(sorted({one.where for one in usage}))
    total = ALL * spent / heard
    return {
        **{"step": step, "unit": unit, "where": where, "heard": heard, "spent": spent, "speed": heard / spent},
        **{"all": total, "days": total / 24 / 1000},
    }


def examples_of(judged: Sequence[Judged]) -> list[Judged]:
    """Some of what is kept, from the surest to the least sure, and some of each fault."""
    kept = sorted((one for one in judged if not one.fault), key=lambda one: (-(one.score or 0), one.name))
    some = kept[:: max(1, len(kept) // KEPT_EXAMPLES)][:KEPT_EXAMPLES]
    for fault in REJECTED:
        some += [one for one in judged if one.fault == fault][:FAULTY_EXAMPLES]
    return some


def _sound(job: Job, one: Judged) -> str:
    """A segment as a data URL."""
    start, stop = one.segment.offset, one.segment.offset + one.segment.stop - one.segment.start
    pcm, _ = soundfile.read(str(shard_of(job.out, one.block)), start=start, stop=stop, dtype="int16")
    file = io.BytesIO()
    soundfile.write(file, pcm, RATE, format="FLAC")
    return "data:audio/flac;base64," + base64.b64encode(file.getvalue()).decode()


def pictures_of(figures: Figures) -> dict[str, str]:
    """Histograms of all segments and of what is kept, as SVG by what is along the axis."""
    if not figures.judged:
        return {}
    axes = {
        "seconds of a segment": lambda one: one.seconds,
        "characters per second": lambda one: len(normalize_text(one.text).replace(" ", "")) / one.seconds,
        "score": lambda one: one.score,
    }
    pictures = {}
    for name, value in axes.items():
        values = [[v for one in some if (v := value(one)) is not None] for some in (figures.judged, figures.kept)]
        if values[0]:
            pictures[name] = _histogram(values, name)
    return pictures


def _histogram(values: Sequence[Sequence[float]], name: str) -> str:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 2.6), layout="constrained")
    FigureCanvasSVG(figure)
    plot = figure.add_subplot()
    _, edges, _ = plot.hist(values[0], bins=40, color="#c9c4b8", label="all")
    plot.hist(values[1], bins=list(edges), color="#0a777b", label="kept")
    plot.set_xlabel(name)
    plot.set_ylabel("segments")
    plot.legend(frameon=False)
    for side in ("top", "right"):
        plot.spines[side].set_visible(False)
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True)
    text = file.getvalue()
    return text[text.index("<svg") :]
