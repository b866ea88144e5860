"""What `antiphon bench` counts: packets that come too late, who is refused, answers that derail, and who is sooner."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import grouped_mm

from antiphon import cli
from antiphon.audio import write_audio
from antiphon.bench import against, commands, turns
from antiphon.bench import derailed as derailing
from antiphon.bench import floor as floors
from antiphon.bench.against import compare, together
from antiphon.bench.commands import tone
from antiphon.bench.derailed import LOST, derailed, missing
from antiphon.bench.figures import TITLES, cells, in_time, kept, run, summary, trace_of
from antiphon.bench.floor import weights_read
from antiphon.bench.load import AUDIBLE, Answered, Load, Packet, ask, measure
from antiphon.bench.pictures import latency, moment
from antiphon.bench.turns import nth_over_second
from antiphon.engine import Engine
from antiphon.engine import call as calls
from antiphon.errors import InputError
from antiphon.evaluate.stages import Case
from antiphon.generate import Done, collect
from antiphon.layers import Experts
from antiphon.random_model import random_model, shape_of
from antiphon.transcripts import Piece, Transcript
from benchmarks.races import FlatTalker, decoders, lines, parameters, race, right_context, talkers
from tests.models import IDS, config_json, omni, script

QUESTION = (tone()[:8000], 16000)


# ------------------------------------------------------------------------------------------------ loads


@pytest.mark.parametrize(("buffer", "late"), [(0.0, 2), (0.08, 1), (0.16, 0)])
def test_a_packet_is_late_when_a_player_has_nothing_left(buffer, late):
    came = [1.0, 1.05, 1.16, 1.24 + 0.08, 1.32 + 0.1, 1.40]
    assert Answered(0.9, code=1.0, packets=[Packet(at, 0.08) for at in came]).late(buffer) == late


def test_a_packet_of_more_sound_keeps_a_player_busy_for_longer():
    packets = [Packet(1.0, 0.4), Packet(1.39, 0.1), Packet(1.51, 0.1), Packet(1.55, 0.4)]
    assert Answered(0.9, code=1.0, packets=packets).late(0.0) == 1
    assert Answered(0.9).late(0.0) == 0


def test_nobody_waits_for_the_silence_after_a_question():
    class Ear:
        def __init__(self) -> None:
            self.heard = 0

        def append_audio(self, samples, rate) -> None:
            self.heard += len(samples)

    ear: Any = Ear()
    spoken = np.full(1600, 5 * AUDIBLE, np.float32)
    ask(ear, (np.concatenate([spoken, np.zeros(16000, np.float32)]), 16000), uploaded=False)
    assert ear.heard == len(spoken)


def test_arrivals_of_an_open_loop_are_independent_and_the_same_in_every_run():
    load = Load(None, rate=5.0, seconds=400.0)
    at = np.array(load.arrivals())
    assert len(at) == pytest.approx(5 * 400, rel=0.1)
    assert at.max() < 400
    gaps = np.diff(at)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1)  # as of a Poisson process, and not of a clock
    assert load.arrivals() == list(at)
    assert len(Load(64).arrivals()) == 64
    assert max(Load(64).arrivals()) < 3


@pytest.mark.parametrize("uploaded", [True, False])
def test_a_load_is_measured_and_its_timeline_can_be_read(tmp_path, uploaded):
    few = Load(1, turns=1, uploaded=uploaded, max_frames=4, max_text_tokens=6)
    loads = [few, replace(few, conversations=3, turns=2)]
    with Engine(omni()) as engine:
        runs = list(run(engine, [QUESTION], loads))
    figures = [one.figures for one in runs]
    assert [one["answers"] for one in figures] == [1, 6]
    assert [one["held"] for one in figures] == [1, 3]
    for one in figures:
        assert one["errors"] == one["refused"] == 0
        for p in ("p50", "p95", "p99"):
            assert one["text_ms"][p] <= one["code_ms"][p] <= one["sound_ms"][p]
        assert set(one["late"]) == {"0 ms", "80 ms", "160 ms"}
        assert one["memory_mb"] > 0
        assert len(cells(one)) == len(TITLES)
    events = json.loads(json.dumps(trace_of(runs[1].work)))["traceEvents"]
    names = {event["name"] for event in events}
    assert {"thread_name", "thinker", "talker", "frame", "sound"} <= names
    assert {event["tid"] for event in events} == {0, 1, 2}
    moment(runs[1].work, runs[1].answers[0], tmp_path / "moment.png")
    latency(figures, tmp_path / "latency.png")
    for name in ("moment.png", "latency.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_who_comes_while_the_engine_is_full_is_refused_and_counted():
    crowd = Load(None, rate=60.0, seconds=0.3, turns=1, uploaded=True, max_frames=4, max_text_tokens=4)
    with Engine(omni(), capacity=1) as engine:
        opened, closed = (one.figures for one in run(engine, [QUESTION], [crowd, Load(3, 0.0, 0, 1, True, 4, 4)]))
        assert engine.capacity == 1
    assert opened["refused"] > 0
    assert opened["errors"] == 0
    assert opened["held"] == opened["answers"] - opened["refused"] >= 1
    assert opened["packets"] >= opened["held"]
    assert closed["refused"] == 0, "in a closed loop it is the load that says how many there are"
    assert closed["held"] == 3


def test_an_answer_that_fails_is_counted():
    with Engine(omni()) as engine:
        load = Load(1, turns=1, uploaded=True, max_frames=4)
        answers = measure(engine, [(np.zeros(8, np.float32), 16000)], load)  # too short to be a sound
        figures = summary(load, answers, 1.0)
    assert figures["errors"] == 1
    assert figures["packets"] == 0
    assert figures["sound_ms"] == {"p50": None, "p95": None, "p99": None}
    json.dumps(figures, allow_nan=False)
    assert len(cells(figures)) == len(TITLES)


def test_a_conversation_that_cannot_begin_is_an_error_and_nobody_who_was_refused():
    with Engine(omni()) as engine:
        load = Load(2, turns=1, uploaded=True, window=3)
        figures = summary(load, measure(engine, [QUESTION], load), 1.0)
    assert figures["errors"] == 2
    assert figures["refused"] == figures["in_time"] == 0


def test_a_conversation_is_kept_in_time_if_none_of_its_answers_is_late_or_fails():
    def answered(conversation: int, *came: float, **more: Any) -> Answered:
        return Answered(0, conversation, code=0.0, packets=[Packet(at, 0.08) for at in came], **more)

    steady = (0.0, 0.05, 0.10)
    answers = [answered(0, *steady), answered(0, 0.0, 0.3), answered(1, *steady)]
    answers += [answered(2, *steady, error="no room"), Answered(0, 3, error="full", refused=True)]
    assert in_time(answers) == 1
    loads = [{"conversations": c, "in_time": n} for c, n in ((1, 1), (4, 4), (8, 7), (None, 9))]
    assert kept(loads) == 4


# --------------------------------------------------------------------------------- answers that derail


def test_what_is_missing_of_an_answer():
    said = "one two three four"
    assert missing(said, "One, two: three four!") == 0
    assert missing(said, "one two four") == 0.25
    assert missing(said, "one two three four and so on") == 0  # more than was said is not less
    assert missing(said, "") == 1
    assert missing("今天天气很好", "今天气很好") == pytest.approx(1 / 6)
    assert missing("", "") == 0
    assert missing(said, "one two", cut_off=True) == 0
    assert missing(said, "one six", cut_off=True) > 0
    assert missing(said, "", cut_off=True) == 1


def test_answers_that_lose_their_text_or_run_away_are_counted(monkeypatch):
    model, text = omni(), "Good morning, it is seven."
    script(monkeypatch, model, text)
    session = model.session()
    session.append_text("hello")
    reply = collect(session.respond(max_frames=30))
    heard = iter([text, "something else was heard", text])
    monkeypatch.setattr(
        derailing, "transcribe", lambda *_: Transcript([Piece(0.0, 1.0, next(heard))], 1.0)
    )  # the words alone are another's
    assert derailed(model, [Answered(0, reply=reply), Answered(0, reply=reply), Answered(0)]) | {"missing": 0} == {
        **{"read_back": 2, "derailed": 1, "lost": 1, "runaway": 0, "missing": 0}
    }
    monkeypatch.setattr(derailing, "RUNAWAY", 0.0)
    monkeypatch.setattr(derailing, "PAUSE", len(reply.audio) / reply.sample_rate - 0.01)
    assert derailed(model, [Answered(0, reply=reply)])["runaway"] == 1


def test_answers_are_read_back_by_the_model_itself():
    model = omni()
    with Engine(model) as engine:
        (one,) = run(engine, [QUESTION], [Load(1, turns=1, uploaded=True, max_frames=8, max_text_tokens=4)])
    found = derailed(model, one.answers)
    assert found["read_back"] == 1
    assert found["derailed"] == (found["missing"] > LOST or found["runaway"])


# ------------------------------------------------------------------------------- beside others and itself


def test_a_frame_reads_the_weights_of_the_experts_it_takes_and_of_mtp_once_for_each_codebook():
    model = omni()
    speech, read = model.speaking(), weights_read(model)
    mtp, experts = speech.mtp, [m for m in speech.talker.model.modules() if isinstance(m, Experts)]
    stacked = sum(p.nbytes for m in experts for p in m.parameters())
    whole = sum(p.nbytes for p in [*speech.talker.model.parameters(), *speech.talker.codec_head.parameters()])
    table = speech.talker.model.codec_embedding.weight.nbytes
    assert read["Talker"] == whole - table - stacked + stacked / 2  # two of four experts
    layers = sum(p.nbytes for p in [*mtp.model.layers.parameters(), *mtp.model.norm.parameters()])
    assert read["MTP"] == (mtp.codebooks - 1) * layers + sum(p.nbytes for p in mtp.lm_head.parameters())


def test_grouped_products_are_counted_as_operations():
    x, weight = torch.randn(6, 32, dtype=torch.bfloat16), torch.randn(4, 64, 32, dtype=torch.bfloat16)
    ends = torch.tensor([1, 3, 3, 6], dtype=torch.int32)
    assert floors.operations(lambda: grouped_mm(x, weight.transpose(1, 2), offs=ends)) == 2 * 6 * 32 * 64
    assert floors.operations(lambda: x @ x.T) == 2 * 6 * 32 * 6


def test_the_floor_is_the_slower_of_reading_and_computing(monkeypatch):
    monkeypatch.setattr(floors, "machine", lambda *_: (1e9, 1e12))
    slow = floors.floor(omni())
    assert slow["frame_ms"] == pytest.approx(1000 * slow["frame"]["bytes"] / 1e9)
    assert slow["frame"]["operations"] > slow["frame"]["bytes"] / 4  # a product and a sum for each weight of four bytes
    monkeypatch.setattr(floors, "machine", lambda *_: (1e12, 1e9))
    assert floors.floor(omni())["token_ms"] == pytest.approx(1000 * slow["token"]["operations"] / 1e9)


def test_transformers_the_readable_loop_and_the_engine_say_the_same(pair, monkeypatch):
    ours, theirs = pair("base")
    monkeypatch.setattr(against, "EXPERTS", ("eager",))  # as it was loaded, and as it is left to others
    case = Case([[(tone()[:16000], 16000), "What did you hear?"]], None, ours.voices[0], 3, 5)
    with Engine(ours) as engine:
        rows = compare(engine, theirs, case, rounds=1, counts=(1, 2), threads=1)
    assert [row["name"].split(" (")[0] for row in rows] == [
        *("transformers", "readable loop", "engine, 1 at once", "engine, 2 at once")
    ]
    assert all(row["says_the_same"] for row in rows)
    assert rows[0]["over_transformers"] == rows[0]["sooner"] == 1
    assert all(row["frames_per_second"] > 0 and row["first_sound_ms"] > 0 for row in rows)


def test_answers_at_once_do_not_wait_to_be_taken(monkeypatch):
    monkeypatch.setattr(calls, "KEPT_FRAMES", 2)
    case = Case([["What did you hear?"]], None, omni().voices[0], 8, 16)
    with Engine(omni()) as engine:
        engine.warm(2)
        timed = together(engine, case, 2)
        both = sum(work.name == "frame" and len(work.calls) == 2 for work in engine.work)
    assert timed.frames == 2 * 16
    assert both > 8  # where only two frames are kept for the second, it is hardly ever with the first


def test_a_late_turn_is_timed_beside_the_second_of_a_fresh_conversation(monkeypatch):
    load = Load(uploaded=True, max_frames=2, max_text_tokens=3, verbatim=True)
    with Engine(omni()) as engine:
        found = nth_over_second(engine, QUESTION, 4, load, rounds=2)
        assert found["positions"] == pytest.approx(3 * found["positions_second"], rel=0.2)
        assert found["nth_ms"] > 0
        monkeypatch.setattr(turns, "_first_packet", lambda engine, session, *_, **__: len(session.ids) / 1000)
        told = nth_over_second(engine, QUESTION, 4, load, rounds=1)
        assert told["ratio"] == pytest.approx(told["positions"] / told["positions_second"])


def test_a_conversation_without_room_for_the_turn_says_so():
    model = omni({"thinker_config.text_config.max_position_embeddings": 100})
    load = Load(uploaded=True, max_frames=2, max_text_tokens=3, verbatim=True)
    with Engine(model) as engine, pytest.raises(InputError, match="before its last turn"):
        nth_over_second(engine, QUESTION, 20, load, rounds=1)


# ---------------------------------------------------------------------------------------- random weights


@pytest.fixture(scope="module")
def shape(tmp_path_factory) -> Path:
    """A folder with nothing but a config.json."""
    folder = tmp_path_factory.mktemp("shape")
    (folder / "config.json").write_text(json.dumps(config_json(IDS)))
    return folder


def test_random_weights_need_a_config_and_nothing_else(shape):
    model = random_model(shape, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    session = model.session()
    session.append_audio(*QUESTION)
    *_, done = session.respond(max_frames=4, max_text_tokens=4, verbatim=True)
    assert isinstance(done, Done)
    assert len(done.reply.codes) == 4
    assert np.square(done.reply.audio).mean() > 1e-4
    assert len(done.reply.text) > 0


def test_the_released_shape_comes_with_the_package():
    _, config = shape_of("release")
    assert config.text.num_experts == 128
    assert config.code2wav is not None
    assert config.code2wav.frame_samples == 1920


def run_command(monkeypatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["antiphon", "bench", *map(str, words)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return int(left.value.code or 0)


@pytest.mark.long
def test_bench_from_the_command_line(monkeypatch, capsys, shape, tmp_path):
    question = tmp_path / "question.wav"
    write_audio(question, *QUESTION)
    limits = ("--max-frames", 4, "--turns", 1, "--uploaded", "--rounds", 1)
    loads = ("-c", 2, "--rate", 20, "--seconds", 0.2, "--nth-turn", 3, "--read-back", "--question", question)
    out = tmp_path / "figures.json"
    assert run_command(monkeypatch, "--random", shape, "--capacity", 3, *loads, *limits, "--out", out) == 0
    printed, figures = capsys.readouterr().out, json.loads(out.read_text())
    assert "| 2 at once |" in printed
    assert "| 20 a second |" in printed
    assert "as given: 3 conversations" in printed
    assert "turn 3 (" in printed
    assert [one["conversations"] for one in figures["loads"]] == [2, None]
    assert figures["loads"][0]["read_back"] == 2
    assert figures["turns"]["ratio"] > 0
    monkeypatch.setattr(commands, "MOST", 2)
    assert run_command(monkeypatch, "--random", shape, "-c", 1, *limits, "--json") == 0
    measured = json.loads(capsys.readouterr().out)
    assert 1 <= measured["capacity"] <= 2
    assert measured["loads"][0]["sound_ms"]["p99"] > 0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("-c", 0), "-c and --rate a number above zero"),
        (("--rate", -1), "-c and --rate a number above zero"),
        (("--against", "transformers"), "give a MODEL instead of --random"),
        (("--nth-turn", 3, "--plot", "x.png"), "no load to draw"),
        (("-c", 1, "--window", 3), "window is 3; expected one of"),
    ],
)
def test_what_cannot_be_measured_is_refused(monkeypatch, capsys, shape, words, sentence):
    assert run_command(monkeypatch, "--random", shape, *words) == 1
    assert sentence in " ".join(capsys.readouterr().err.split())


# ------------------------------------------------------------------------------------------------- races


def test_a_flat_talker_of_equal_size_needs_more_operations(shape):
    _, config = shape_of(shape)
    with torch.inference_mode():
        racers = talkers(config, 2, "cpu", torch.float32)
        results = race(racers, 0.16, rounds=1)
    assert results[1].flops > 1.5 * results[0].flops
    assert len(lines(results)) == 4
    assert config.talker is not None
    one, two = (parameters(FlatTalker.as_large_as(size, config.talker)) for size in (10**5, 2 * 10**5))
    assert one == pytest.approx(10**5, rel=0.1)
    assert two == pytest.approx(2 * 10**5, rel=0.1)


def test_right_context_is_what_changes_before_its_cause():
    def looks_ahead(x: torch.Tensor) -> torch.Tensor:
        """Two steps of each; the first also sees the next three steps of x."""
        padded = torch.nn.functional.pad(x[0], (0, 3))
        return torch.stack([padded.unfold(0, 4, 1).sum(-1), x[0]], 1).flatten()

    x = torch.arange(40.0)[None] ** 2
    assert right_context(looks_ahead, x, 2) == 6
    assert right_context(lambda x: x[0].cumsum(0), x, 1) == 0


@pytest.mark.long
def test_code2wav_waits_for_no_later_code_and_token2wav_for_more_than_a_block(shape):
    _, config = shape_of(shape)
    with torch.inference_mode():
        racers, (streamed, whole, theirs) = decoders(config, 20, "cpu", torch.float32, published=False)
    assert streamed == whole == 0
    assert 0.24 < theirs < 1.6  # a block of its transformer is 240 ms; the clip ends here
    assert [racer.name.split(",")[0] for racer in racers] == ["Code2Wav", "Code2Wav", "token2wav"]
