"""Pictures of a bench: the moment around a question's end, and latency over load. They need matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from antiphon.bench.load import Answered
from antiphon.engine.call import Work
from antiphon.errors import InputError

BEFORE, AFTER = 0.1, 0.3  # seconds around the end of a question
OTHER = "#d9d9d9"  # work that has no colour of its own
COLOURS = {
    "wish": "#b3b3b3",
    "aut": "#8da0cb",
    "thinker": "#66c2a5",
    "draw": "#a6d854",
    "talker": "#fc8d62",
    "frame": "#e78ac3",
    "sound": "#ffd92f",
}
MEANING = {
    "wish": "mel",
    "aut": "AuT",
    "thinker": "Thinker reads",
    "draw": "next token",
    "talker": "Talker reads along",
    "frame": "codes: Talker, MTP",
    "sound": "sound: Code2Wav",
}


def moment(work: Sequence[Work], answer: Answered, path: Path) -> None:
    """What the lanes did around the end of a question, and when the packets of its answer left."""
    axes, save = _figure(9, 3.0, path)
    lanes = {"thinking": 2.0, "speaking": 1.0, "sounding": 0.0}
    for one in work:
        if -BEFORE <= one.start - answer.asked <= AFTER:
            place = (1000 * (one.start - answer.asked), 1000 * (one.stop - one.start))
            colour = COLOURS.get(one.name, OTHER)
            axes.barh(lanes[one.lane], place[1], left=place[0], height=0.7, color=colour, label=one.name)
    for i, at in enumerate(packet.at for packet in answer.packets if packet.at < answer.asked + AFTER):
        axes.annotate(
            "", (1000 * (at - answer.asked), -0.95), (1000 * (at - answer.asked), -0.4), arrowprops={"arrowstyle": "->"}
        )
        axes.text(1000 * (at - answer.asked), -1.25, str(i), ha="center", fontsize=7)
    axes.axvline(0, color="black", linewidth=1)
    axes.text(0, 2.55, " the last voiced sample arrives", fontsize=8)
    axes.set_yticks([2.0, 1.0, 0.0, -0.95], ["Thinking", "Speaking", "Sounding", "packets"])
    axes.set_xlim(-1000 * BEFORE, 1000 * AFTER)
    axes.set_ylim(-1.5, 2.9)
    axes.set_xlabel("ms")
    handles, names = axes.get_legend_handles_labels()
    shown = dict(zip(names, handles, strict=True))
    known = [name for name in MEANING if name in shown]
    axes.legend(
        [shown[n] for n in known],
        [MEANING[n] for n in known],
        fontsize=7,
        ncols=7,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.22),
        frameon=False,
    )
    save()


def latency(figures: Sequence[dict[str, Any]], path: Path) -> None:
    """From the last voiced sample to the first text, packet and sound, over the load; closed loops if there are any."""
    axes, save = _figure(6, 3.6, path)
    closed = [one for one in figures if one["conversations"] is not None]
    figures = closed or figures
    many = [one["conversations"] if closed else one["rate"] for one in figures]
    for name, label in (("text", "first text"), ("code", "first packet"), ("sound", "first sound")):
        (line,) = axes.plot(many, [one[f"{name}_ms"]["p50"] for one in figures], marker="o", label=f"{label}, p50")
        axes.plot(many, [one[f"{name}_ms"]["p95"] for one in figures], linestyle=":", color=line.get_color())
    axes.set_xlabel(f"conversations {'at once' if closed else 'a second'} (dotted: p95)")
    axes.set_ylabel("ms after the last voiced sample")
    axes.set_xscale("log", base=2)
    axes.set_xticks(many, [str(c) for c in many])
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    save()


def _figure(width: float, height: float, path: Path) -> tuple[Any, Any]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise InputError("pictures need matplotlib; install it with pip install 'antiphon[train]'") from None
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return axes, lambda: figure.savefig(path)
