"""Frames per second and the first sound on one checkpoint: transformers, the readable loop, the engine alone and full.

    python -m benchmarks.engine [--model antiphon/tiny] [--frames 40] [--rounds 3] [--together 8]

All answer the same question greedily, one after another in each round, and say the same (which is checked). Each lane
of the engine is a thread; the others have two threads for their products.
"""

import argparse
import os
import platform
import statistics
import time
import warnings
from typing import Any

import torch

from antiphon.engine import Engine
from antiphon.generate import AudioDelta, Omni, Options, collect, load
from antiphon.memory import hold_memory
from antiphon.sampling import GREEDY, Sampling
from antiphon.weights import find_checkpoint
from benchmarks.vs_transformers import fastest_experts, ours, question, session_opening, theirs


def together(model: Omni, engine: Engine, options: Options, count: int) -> tuple[float, float, list[int], int]:
    """Seconds for `count` answers at once, seconds to the first sound, what was read and said, and frames in all."""
    calls = [engine.open(window=8) for _ in range(count)]
    start = time.perf_counter()
    for call in calls:
        call.append_clip(question(), 16000)
        call.append_text("What did you hear?")
        call.commit()
    answers = [call.respond(options) for call in calls]
    first = next(time.perf_counter() - start for event in answers[0] if isinstance(event, AudioDelta))
    replies = [collect(events) for events in answers]
    took = time.perf_counter() - start
    for call in calls:
        call.close()
    frames = sum(len(reply.codes) for reply in replies)
    return took, first, replies[0].text_ids, frames


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--frames", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--together", type=int, default=8)
    given = parser.parse_args()
    from transformers import Qwen3OmniMoeForConditionalGeneration

    warnings.simplefilter("ignore")
    hold_memory()
    folder = find_checkpoint(given.model)
    model = load(folder, dtype=torch.float32)
    other: Any = Qwen3OmniMoeForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    greedy = Sampling(0.0, repetition_penalty=1.05)
    options = Options(model.voices[0], True, 0, given.frames // 2, given.frames, GREEDY, greedy, GREEDY, verbatim=True)
    ids = [*ours(model, options)[2], *session_opening(model)]
    torch.set_num_threads(2)
    experts = fastest_experts(other, options, ids)
    with Engine(model) as engine:
        engine.warm(given.together)
        for count in (1, given.together):
            together(model, engine, options, count)
        seen: dict[str, list[tuple[float, float, int]]] = {}
        for _ in range(given.rounds):
            torch.set_num_threads(2)
            took, said = theirs(other, options, ids)
            reading, first, _, text = ours(model, options)
            torch.set_num_threads(1)
            alone, full = (together(model, engine, options, count) for count in (1, given.together))
            assert text == alone[2] == full[2] == said[: len(text)], "they disagree: run antiphon verify"
            frames = alone[3]
            seen.setdefault(f"transformers ({experts})", []).append((took, took, frames))
            seen.setdefault("readable loop", []).append((reading, first, frames))
            seen.setdefault("engine, alone", []).append((alone[0], alone[1], frames))
            seen.setdefault(f"engine, {given.together} at once", []).append((full[0], full[1], full[3]))
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, float32\n")
    print("| | frames/s | over transformers | first sound |\n|---|---|---|---|")
    base = [run[0] / run[2] for run in next(iter(seen.values()))]
    for name, runs in seen.items():
        ratio = statistics.median(b / (took / frames) for b, (took, _, frames) in zip(base, runs, strict=True))
        rate, sound = (statistics.median(values) for values in ([f / t for t, _, f in runs], [s for _, s, _ in runs]))
        print(f"| {name} | {rate:.1f} | {ratio:.1f} | {1000 * sound:.0f} ms |")


if __name__ == "__main__":
    main()
