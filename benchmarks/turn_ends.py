"""Users cut off and time waited, by how the end of a turn is told: server_vad and semantic_vad at each eagerness.

    python -m benchmarks.turn_ends [--model tiny] [--clips 60] [--languages zh en] [--voices train]

Clips are the corpus's, of sentences that training never meets (`--voices held-out` or flite: nor their voices). Each is
played whole, and again with a pause in it, at the quietest place near a drawn one, as training breaks clips off; a
pause is as long as drawn between 0.2 and 1.5 s. They go through what the server listens with, in steps of 32 ms:
`Listener`, silero, and for semantic_vad AuT and its head, which judge when silence has lasted 150 ms.

A user is cut off if the turn ends before the last word does. The others wait from the end of the last word to the end
of the turn; there the answer begins, which is not in it. The head's judgement counts as made at once: how long it
takes is printed, and beyond 64 ms it adds to the waiting.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from antiphon.audio import Samples
from antiphon.engine.thinking import LIVE_WINDOW
from antiphon.generate import Omni, load
from antiphon.serve.listening import Listener
from antiphon.serve.sounds import WIRE_RATE
from antiphon.serve.vad import EAGERNESS, Sign, TurnTaking
from antiphon.train import espeak
from antiphon.train.corpus import Set, make_clip
from antiphon.train.data import resample
from antiphon.train.stages.turn import HISS, SILENCE, breaking_point

BEFORE, AFTER = 0.5, 9.0  # seconds of silence around a clip: longer than the longest wait
PAUSES = (0.2, 1.5)  # seconds; the logarithm is drawn evenly
PIECE = 0.04  # seconds that a client sends at once


@dataclass(frozen=True)
class Played:
    """A clip as the microphone has it."""

    samples: Samples  # [N] at WIRE_RATE
    end: float  # seconds, of the last word
    pause: float  # seconds in its middle; 0 is none


@dataclass
class Outcome:
    """How one way of telling turns did."""

    name: str
    cut: dict[bool, list[bool]] = field(default_factory=lambda: {True: [], False: []})  # by whether there was a pause
    waited: list[float] = field(default_factory=list)  # seconds, of those that were not cut off
    judged: list[float] = field(default_factory=list)  # seconds that a judgement took

    def row(self) -> str:
        """A line of the table."""
        p50, p95 = (1000 * np.percentile(self.waited, q) for q in (50, 95)) if self.waited else (np.nan, np.nan)
        paused, whole = (100 * np.mean(self.cut[kind]) for kind in (True, False))
        return f"| {self.name} | {paused:.0f} % | {whole:.0f} % | {p50:.0f} ms | {p95:.0f} ms |"


def clips(count: int, languages: Sequence[str], voices: str, seed: int) -> Iterator[Samples]:
    """What is said [N] at WIRE_RATE, without silence around it."""
    made = Set("speech", -(-count // len(languages)), "sentence", tuple(languages), voices=voices, seed=seed)
    for index in range(count):
        sound = resample(make_clip("turns", made, index).samples, espeak.RATE, WIRE_RATE)
        loud = (np.abs(sound) > SILENCE).nonzero()[0]
        yield sound[loud[0] : loud[-1] + 1]


def played(said: Samples, pause: float, random: np.random.Generator) -> Played:
    """A clip with silence around it, and a pause in it."""

    def silence(seconds: float) -> Samples:
        return (HISS * random.standard_normal(round(seconds * WIRE_RATE))).astype(np.float32)

    place = breaking_point(said, WIRE_RATE, random) if pause else len(said)
    parts = [silence(BEFORE), said[:place], silence(pause), said[place:], silence(AFTER)]
    return Played(np.concatenate(parts), BEFORE + len(said) / WIRE_RATE + pause, pause)


def play(one: Played, taking: TurnTaking, model: Omni, outcome: Outcome) -> None:
    """Let a clip be heard until its turn ends."""
    listener, session = Listener("audio/pcm", taking), model.session(window=LIVE_WINDOW)
    for piece in np.array_split(one.samples, round(len(one.samples) / WIRE_RATE / PIECE)):
        for sign in listener.push(piece):
            if sign is Sign.PAUSED and taking.likely is not None and listener.detector is not None:
                if (new := listener.inbox.unheard()) is not None:
                    session.append_audio(new, WIRE_RATE)
                begun = time.perf_counter()
                listener.detector.judged(model.turn_end(session.recent()))
                outcome.judged.append(time.perf_counter() - begun)
            elif sign is Sign.STOPPED:
                is_cut = listener.ms / 1000 < one.end - PIECE
                outcome.cut[one.pause > 0].append(is_cut)
                if not is_cut:
                    outcome.waited.append(listener.ms / 1000 - one.end)
                return
    raise AssertionError("the turn did not end, or did not begin: is this clip speech?")


def ways() -> dict[str, TurnTaking]:
    """The detectors by name; eagerness auto is medium."""
    semantic = {f"semantic_vad, {e}": TurnTaking.of_eagerness(e, True, True) for e in EAGERNESS if e != "auto"}
    return {"server_vad": TurnTaking(), **semantic}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--clips", type=int, default=60)
    parser.add_argument("--languages", nargs="+", default=["zh", "en"])
    parser.add_argument("--voices", default="train", choices=["train", "held-out", espeak.FLITE])
    parser.add_argument("--seed", type=int, default=12)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    model, random = load(given.model, dtype=torch.float32), np.random.Generator(np.random.Philox(given.seed))
    heard: list[Played] = []
    for said in clips(given.clips, given.languages, given.voices, given.seed):
        heard += [played(said, pause, random) for pause in (0.0, float(np.exp(random.uniform(*np.log(PAUSES)))))]
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, one thread"
    spoken = f"{', '.join(given.languages)}; voices {given.voices}"
    print(f"{given.clips} clips ({spoken}), whole and with a pause; {machine}\n")
    print("| | cut off in a pause | cut off in a whole clip | waited, p50 | waited, p95 |\n|---|---|---|---|---|")
    judged: list[float] = []
    for name, taking in ways().items():
        outcome = Outcome(name)
        for one in heard:
            play(one, taking, model, outcome)
        print(outcome.row(), flush=True)
        judged += outcome.judged
    p50, p95 = (1000 * np.percentile(judged, q) for q in (50, 95))
    print(f"\na judgement takes {p50:.0f} ms (p50), {p95:.0f} ms (p95)")


if __name__ == "__main__":
    main()
