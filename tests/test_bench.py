"""What `antiphon bench` counts: packets that come too late, first sounds, and a timeline that viewers read."""

import json

import numpy as np
import pytest

from antiphon.engine import Engine
from antiphon.engine.bench import AUDIBLE, Answered, Load, _ask, measure, run, summary, trace_of
from antiphon.engine.commands import table, tone
from antiphon.engine.pictures import latency, moment
from tests.models import omni


@pytest.mark.parametrize(("buffer", "late"), [(0.0, 2), (0.08, 1), (0.16, 0)])
def test_a_packet_is_late_when_a_player_has_nothing_left(buffer, late):
    packets = [1.0, 1.05, 1.16, 1.24 + 0.08, 1.32 + 0.1, 1.40]
    assert Answered(0.9, packets=packets).late(0.08, buffer) == late


def test_nobody_waits_for_the_silence_after_a_question():
    class Ear:
        def __init__(self) -> None:
            self.heard = 0

        def append_audio(self, samples, rate) -> None:
            self.heard += len(samples)

    ear, spoken = Ear(), np.full(1600, 5 * AUDIBLE, np.float32)
    _ask(ear, np.concatenate([spoken, np.zeros(16000, np.float32)]), 16000, uploaded=False)
    assert ear.heard == len(spoken)


@pytest.mark.parametrize("uploaded", [True, False])
def test_a_load_is_measured_and_its_timeline_can_be_read(tmp_path, uploaded):
    loads = [Load(1, 1, uploaded, 4), Load(3, 2, uploaded, 4)]
    runs = list(run(omni(), [(tone()[:8000], 16000)], loads))
    figures = [one.figures for one in runs]
    assert [one["answers"] for one in figures] == [1, 6]
    for one in figures:
        assert one["errors"] == 0
        assert one["text_ms"]["p50"] <= one["code_ms"]["p50"] <= one["sound_ms"]["p50"]
        assert set(one["late"]) == {"0 ms", "80 ms", "160 ms"}
    assert table(figures).row_count == 2
    events = json.loads(json.dumps(trace_of(runs[1].work)))["traceEvents"]
    names = {event["name"] for event in events}
    assert {"thread_name", "thinker", "talker", "frame"} <= names
    assert {event["tid"] for event in events} == {0, 1}
    moment(runs[1].work, runs[1].answers[0], tmp_path / "moment.png")
    latency(figures, tmp_path / "latency.png")
    for name in ("moment.png", "latency.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_an_answer_that_fails_is_counted():
    with Engine(omni()) as engine:
        answers = measure(engine, [(np.zeros(8, np.float32), 16000)], Load(1, 1, True, 4))  # too short to be a sound
        figures = summary(engine, Load(1, 1, True, 4), answers, 1.0)
    assert figures["errors"] == 1
    assert figures["packets"] == 0
