"""Where the time of a frame goes on a GPU: every recorded step by rows, a whole question, and the kernels of each.

    python -m benchmarks.gpu_steps [--shape release] [--device cuda] [--dtype bfloat16] [--rows 1 16 64] [--plain]

Weights are random. `--plain` leaves out our own kernels, for what they are worth. Milliseconds are of replays one after
another; for some, what the profiler saw: how many kernels, how long they were busy, and which took longest.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

import antiphon.code2wav
import antiphon.engine.speaking
import antiphon.layers
from antiphon.bench.commands import tone
from antiphon.caches import KVCache
from antiphon.engine import Engine
from antiphon.engine.sounding import Sounding
from antiphon.engine.speaking import RELEASED, Speaking
from antiphon.engine.thinking import Thinking
from antiphon.random_model import random_model

PAST = 100  # positions that rows have behind them
AGAIN = 20  # replays that are timed together
SHOWN = 12  # kernels of a profile
LIMITS = {"max_frames": 8, "max_text_tokens": 8, "verbatim": True}  # of answers


class Clock:
    """Times and profiles, printed as they are found."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.start = device, time.perf_counter()

    def say(self, *words: object) -> None:
        """A line."""
        print(f"{time.perf_counter() - self.start:6.1f} s ", *words, flush=True)

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def time(self, name: str, run: Callable[[], object], profiled: bool = False) -> None:
        """Milliseconds of a run, after a first one whose seconds are those of recording it."""
        begun = time.perf_counter()
        run()
        self.wait()
        ready = time.perf_counter()
        for _ in range(AGAIN):
            run()
        self.wait()
        took = (time.perf_counter() - ready) / AGAIN
        self.say(f"{name}: {1000 * took:.3f} ms (the first took {ready - begun:.2f} s)")
        if profiled and self.device.type == "cuda":
            self.profile(name, run)

    def profile(self, name: str, run: Callable[[], object]) -> None:
        """The kernels of a run."""
        kinds = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=kinds) as seen:
            run()
            self.wait()
        spent, count = Counter[str](), Counter[str]()
        for event in seen.events() or ():
            if event.device_type.name == "CUDA":
                spent[event.name] += event.device_time
                count[event.name] += 1
        self.say(f"   {name}: {count.total()} kernels, busy for {sum(spent.values()) / 1000:.2f} ms")
        for kernel, busy in spent.most_common(SHOWN):
            print(f"{busy / 1000:18.3f} ms {count[kernel]:5d} of {kernel[:100]}", flush=True)


def steps(clock: Clock, think: Thinking, speak: Speaking, sounding: Sounding, rows: int) -> None:
    """The steps of all lanes for so many conversations."""
    model, profiled = think.model, rows in (1, 64)
    place: dict[str, Any] = {"device": model.device, "dtype": model.dtype}

    def caches(lane: Thinking | Speaking, nobody: KVCache) -> list[KVCache]:
        held = [lane.held(nobody.copy()) for _ in range(rows)]
        for cache in held:
            cache.advance(PAST)
        return held

    x, thoughts = torch.randn(rows, model.thinker.config.hidden_size, **place), caches(think, think.think.nobody)
    clock.time(f"Thinker, {rows} rows", lambda: think.think(thoughts, x), profiled)
    clock.time(f"scores of text, {rows} rows", lambda: model.thinker.logits(x))
    hidden, seen, keys = speak.examples(rows)
    hidden, words = torch.randn_like(hidden), torch.zeros(rows, dtype=torch.long, device=model.device)
    spoken = caches(speak, speak.go_on.nobody)
    clock.time(f"Talker, {rows} rows", lambda: speak.go_on(spoken, words, hidden), profiled)
    codes = speak.recorded(RELEASED, rows)
    clock.time(f"MTP, {rows} rows", lambda: codes(hidden, seen, keys), profiled)
    sound, (some, _) = sounding.recorded(rows), sounding.examples(rows)
    own = torch.arange(1, rows + 1, device=model.device)
    clock.time(f"Code2Wav, {rows} rows", lambda: sound(some, own), profiled)


def question(clock: Clock, engine: Engine, count: int, told: bool) -> None:
    """So many whole questions at once, and the first frames of their answers: every batch, if that is to be told."""
    begun, done, calls = time.perf_counter(), len(engine.work), [engine.open() for _ in range(count)]
    for call in calls:
        call.append_audio(tone(), 16000)
    answers = [call.respond(seed=seed, **LIMITS) for seed, call in enumerate(calls)]
    engine.run()
    clock.wait()
    if told:
        clock.say(f"{count} questions, each {len(tone()) / 16000:.0f} s: {1000 * (time.perf_counter() - begun):.1f} ms")
        for work in list(engine.work)[done:][:40]:
            took, at = 1000 * (work.stop - work.start), 1000 * (work.start - begun)
            print(f"{at:18.1f} + {took:7.1f} ms {work.lane} {work.name}, {len(work.calls)} calls", flush=True)
    for call, answer in zip(calls, answers, strict=True):
        answer.reply()
        call.close()
    engine.run()


def main() -> None:
    """Print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="release")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--questions", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--plain", action="store_true", help="leave out our own kernels")
    given = parser.parse_args()
    if given.plain:
        for user in (antiphon.layers, antiphon.engine.speaking, antiphon.code2wav):
            setattr(user, "usable", lambda like: False)  # noqa: B010
    torch.set_num_threads(1)
    clock = Clock(torch.device(given.device))
    with torch.inference_mode():
        model = random_model(given.shape, given.device, getattr(torch, given.dtype))
        engine = Engine(model, max(given.rows))
        think, speak, sounding = engine.lanes
        assert isinstance(think, Thinking)
        assert isinstance(speak, Speaking)
        assert isinstance(sounding, Sounding)
        sounding.make_room(max(given.rows))
        clock.say(f"{given.shape}, {given.dtype}, {'plain' if given.plain else 'our own kernels'}")
        for rows in given.rows:
            steps(clock, think, speak, sounding, rows)
        for count in given.questions:
            question(clock, engine, count, told=False)
            question(clock, engine, count, told=True)
        if clock.device.type == "cuda":
            clock.profile("a question", lambda: question(clock, engine, 1, told=False))


if __name__ == "__main__":
    main()
